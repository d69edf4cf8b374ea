"""PairedBlocks: a BlockManager for sequences that may have a companion, whose tokens they share.

A sequence with a mix of adapters is computed twice: as the classifier's input, and with the adapters. Either pass has K
and V of its own, in blocks of the same pool. The companion's blocks hold what any sequence with the same tokens and no
adapters computes, so they are shared with those. What both passes have is computed by neither; where the companion's
blocks reach further they are kept, and that pass is computed again without being stored.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from .block_events import FreeReason
from .block_manager import BlockCopy, BlockManager, PrefixMatch
from .sequence import Sequence


@dataclass(frozen=True)
class PairedMatch(PrefixMatch):
    """``blocks`` is no longer than what both have."""

    companion: PrefixMatch = dataclasses.field(kw_only=True)


class PairedBlocks(BlockManager):
    """What a method says of a sequence goes for its companion too."""

    def match_prefix(self, seq: Sequence) -> PrefixMatch:
        matched = super().match_prefix(seq)
        if seq.companion is None:
            return matched
        companion = super().match_prefix(seq.companion).blocks
        return PairedMatch(matched.blocks[: len(companion)], companion=PrefixMatch(companion))

    def blocks_missing(self, matched: PrefixMatch, num_tokens: int) -> int:
        missing = super().blocks_missing(matched, num_tokens)
        if isinstance(matched, PairedMatch):
            missing += super().blocks_missing(matched.companion, num_tokens)
        return missing

    def admit(self, seq: Sequence, matched: PrefixMatch, num_tokens: int) -> None:
        if seq.companion is None:
            super().admit(seq, matched, num_tokens)
            return
        assert isinstance(matched, PairedMatch)
        # The first to be admitted takes new blocks, which must not be those that the second has matched.
        self._hold(matched.companion.blocks)
        super().admit(seq, matched, num_tokens)
        super().admit(seq.companion, matched.companion, num_tokens)
        self._let_go(matched.companion.blocks)

    def blocks_to_grow(self, seq: Sequence, num_tokens: int) -> int:
        needed = super().blocks_to_grow(seq, num_tokens)
        if seq.companion is not None:
            needed += super().blocks_to_grow(seq.companion, _companion_tokens(seq, num_tokens))
        return needed

    def grow(self, seq: Sequence, num_tokens: int) -> tuple[BlockCopy, ...]:
        copies = super().grow(seq, num_tokens)
        if seq.companion is not None:
            copies += super().grow(seq.companion, _companion_tokens(seq, num_tokens))
        return copies

    def release_before(self, seq: Sequence, position: int) -> None:
        super().release_before(seq, position)
        if seq.companion is not None:
            super().release_before(seq.companion, position)

    def fork(self, parent: Sequence, child: Sequence) -> None:
        super().fork(parent, child)
        if parent.companion is not None and child.companion is not None:
            super().fork(parent.companion, child.companion)

    def register(self, seq: Sequence) -> None:
        super().register(seq)
        if seq.companion is not None:
            super().register(seq.companion)

    def free(self, seq: Sequence, reason: FreeReason = FreeReason.FINISHED) -> None:
        super().free(seq, reason)
        if seq.companion is not None:
            super().free(seq.companion, reason)


def _companion_tokens(seq: Sequence, num_tokens: int) -> int:
    """Tokens that the companion's blocks lack once ``seq`` has ``num_tokens`` more; none of frozen scalings."""
    assert seq.companion is not None
    end = min(seq.num_computed + num_tokens, seq.freeze_at or seq.num_computed + num_tokens)
    return max(end - seq.companion.num_computed, 0)
