"""Hold: which requests may run while the engine drains, before its weights change. Knows no queues."""

from __future__ import annotations

from collections.abc import Iterable

from .sequence import Sequence


class Hold:
    """Requests that have begun finish on the weights that they began with; all others wait."""

    def __init__(self) -> None:
        self._begun: set[str] | None = None
        """Requests that may go on; None: all may."""

    @property
    def is_active(self) -> bool:
        return self._begun is not None

    def begin(self, unfinished: Iterable[Sequence]) -> None:
        """From now on only those of ``unfinished`` go on that have begun."""
        self._begun = {seq.request_id for seq in unfinished if _has_begun(seq)}

    def added(self, seq: Sequence) -> None:
        """A request may come back that has generated tokens already: these are of the weights that are served now."""
        if self._begun is not None and _has_begun(seq):
            self._begun.add(seq.request_id)

    def end(self) -> None:
        self._begun = None

    def keeps_waiting(self, seq: Sequence) -> bool:
        return self._begun is not None and seq.request_id not in self._begun


def _has_begun(seq: Sequence) -> bool:
    """Its first token needs the whole request's prompt to have been computed: samples of a request go together."""
    return seq.started or seq.num_output_tokens > 0
