"""What is remembered of the engine's unasked ends: how often, which requests were there, and which one is to blame.

A request whose computation kills the engine comes back with every restart, together with all that ran beside it. So
whoever was there twice runs alone once, before anything else; only a death alone condemns it. Knows no processes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import msgspec

SUSPECT_DEATHS = 2
"""Deaths at which a request becomes a suspect."""
_MAX_REMEMBERED = 10_000
"""Requests; those that were there last are kept."""


def base_id(request_id: str) -> str:
    """What all submissions of one request share: a resubmission adds ``.NUMBER``."""
    return request_id.partition(".")[0]


class Deaths(msgspec.Struct, frozen=True, kw_only=True):
    """Stored beside the engine's socket. Requests by their base ids."""

    total: int = 0
    in_a_row: int = 0
    """The last deaths before which no step was completed, back to the last request that was condemned."""
    counts: dict[str, int] = {}
    """In how many deaths a request was there."""
    condemned: dict[str, int] = {}
    """Requests that died alone, with their counts."""

    @property
    def suspects(self) -> frozenset[str]:
        """Who must run alone first."""
        return frozenset(request for request, count in self.counts.items() if count >= SUSPECT_DEATHS)

    def after(self, request_ids: Iterable[str], *, num_completed: int, blames_requests: bool) -> Deaths:
        """One death later. ``request_ids``: of the steps in flight. ``num_completed``: steps since it was ready.
        ``blames_requests``: the end may have been their doing; somebody else's signal is not."""
        present = {base_id(request_id) for request_id in request_ids} if blames_requests else set()
        counts, condemned = dict(self.counts), dict(self.condemned)
        for request in present:
            counts[request] = counts.pop(request, 0) + 1
        in_a_row = 0 if num_completed else self.in_a_row + 1
        if len(present) == 1 and counts[(lone := next(iter(present)))] >= SUSPECT_DEATHS:
            condemned[lone] = counts.pop(lone)
            in_a_row = 0
        return Deaths(
            total=self.total + 1, in_a_row=in_a_row, counts=_latest(counts), condemned=_latest(condemned)
        )

    def acquit(self, request_id: str) -> Deaths:
        """``request_id`` has run alone and nothing happened."""
        counts = {request: count for request, count in self.counts.items() if request != base_id(request_id)}
        return msgspec.structs.replace(self, counts=counts)


def _latest(counts: Mapping[str, int]) -> dict[str, int]:
    return dict(list(counts.items())[-_MAX_REMEMBERED:])
