"""BlockManager: which KV-cache blocks belong to whom. Knows block ids and token ids, no tensors.

Blocks are reference counted. A full block whose tokens are known is registered under the hash of everything before
and in it, so that another sequence with the same beginning can share it. A block nobody references waits in the free
queue, oldest first, and keeps its content (and hash) until it is needed for something else:

    block_table of A   [ 7 ][ 2 ][ 5 ]            ref_counts: 7 -> 2, 2 -> 2, 5 -> 1, 9 -> 1
    block_table of B   [ 7 ][ 2 ][ 9 ]            blocks 7 and 2 hold the common prefix
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

from .block_events import AllocateReason, BlockEvents, EvictReason, FreeReason
from .host_tier import HostTier
from .sequence import Sequence

RELEASED = -1
"""Stands in a block table for a block that has been given back before its sequence ended."""


@dataclass(frozen=True)
class BlockCopy:
    """Copy a block's K and V in every layer before the step writes to ``destination``."""

    source: int
    destination: int


@dataclass(frozen=True)
class PrefixMatch:
    """The beginning of a sequence, as far as it need not be computed."""

    blocks: list[int]
    """In the pool."""
    num_host: int = 0
    """So many blocks after these come back from the host tier."""

    def __len__(self) -> int:
        return len(self.blocks) + self.num_host


class BlockManager:
    """Allocates, shares and frees the ``num_blocks`` blocks of ``block_size`` tokens, and enters it in ``events``.

    ``host_tier`` keeps what the prefix cache loses; None: nothing does.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        prefix_caching: bool,
        events: BlockEvents | None = None,
        host_tier: HostTier | None = None,
    ) -> None:
        self.events = events or BlockEvents()
        self.host_tier = host_tier
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefix_caching = prefix_caching
        self._ref_counts = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._block_of_hash: dict[bytes, int] = {}
        self._hash_of_block: dict[int, bytes] = {}
        self._weights_generation = 0
        """Enters every hash: other weights compute other K and V."""
        self._announced: Counter[bytes] = Counter()
        """Hashes of prompt blocks that running sequences are about to compute, with the number of those."""
        self.num_cached = 0
        """Free blocks whose content can still be shared."""
        self.num_query_tokens = 0
        self.num_hit_tokens = 0

    @property
    def num_free(self) -> int:
        """Blocks that can be handed out now, those that still hold cached content included."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_blocks - len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def match_prefix(self, seq: Sequence) -> PrefixMatch:
        """Cached blocks that hold the beginning of ``seq``, at most all but its last token.

        Takes no reference: pass the result to ``admit`` before anything else is allocated.
        """
        if not self.prefix_caching:
            return PrefixMatch([])
        full = min(len(seq.token_ids) - 1, seq.num_cacheable) // self.block_size
        self._extend_hashes(seq, full)
        blocks = []
        for digest in seq.block_hashes[:full]:
            block = self._block_of_hash.get(digest)
            if block is None:
                break
            blocks.append(block)
        num_host = self.host_tier.count_leading(seq.block_hashes[len(blocks) : full]) if self.host_tier else 0
        return PrefixMatch(blocks, num_host)

    def must_wait(self, seq: Sequence, matched: PrefixMatch) -> bool:
        """Whether another sequence is computing or fetching what ``seq`` needs next: to share it beats repeating it."""
        shareable = min(len(seq.token_ids) - 1, seq.num_cacheable) // self.block_size if self.prefix_caching else 0
        for index in (len(matched.blocks), len(matched)):
            if index < shareable and seq.block_hashes[index] in self._announced:
                seq.waits_for = seq.block_hashes[index]
                return True
        return False

    def still_waits(self, seq: Sequence) -> bool:
        """``must_wait`` for a sequence that had to, without a new match."""
        if seq.waits_for not in self._announced:
            seq.waits_for = None
        return seq.waits_for is not None

    def blocks_missing(self, matched: PrefixMatch, num_tokens: int) -> int:
        """Free blocks that ``admit`` would take for a sequence of ``num_tokens`` with this match."""
        revived = sum(1 for block in matched.blocks if self._ref_counts[block] == 0)
        return self.blocks_for(num_tokens) - len(matched.blocks) + revived

    def admit(self, seq: Sequence, matched: PrefixMatch, num_tokens: int) -> None:
        """Give a sequence without blocks its matched prefix and new blocks for ``num_tokens`` tokens in all."""
        shared = matched.blocks
        self._hold(shared)
        self.events.allocated(seq, shared, AllocateReason.PREFIX_HIT)
        # What comes back from the host counts as computed, but others find it only once it has been used.
        seq.num_computed, seq.num_registered = len(matched) * self.block_size, len(shared)
        fetched = seq.block_hashes[len(shared) : len(matched)]
        if self.host_tier:
            self.host_tier.pin(fetched)
        new = self._take(seq, self.blocks_for(num_tokens) - len(shared), AllocateReason.PROMPT)
        if self.host_tier:
            for digest, block in zip(fetched, new, strict=False):
                self.host_tier.fetch(digest, block)
        seq.block_table = shared + new
        if self.prefix_caching:
            seq.num_announced = seq.num_cacheable // self.block_size
            self._extend_hashes(seq, seq.num_announced)
            self._announced.update(seq.block_hashes[len(shared) : seq.num_announced])

    def count_query(self, seq: Sequence, matched: PrefixMatch) -> None:
        """Enter one admission into the hit statistics."""
        if self.prefix_caching:
            self.num_query_tokens += len(seq.token_ids)
            self.num_hit_tokens += len(matched) * self.block_size

    def blocks_to_grow(self, seq: Sequence, num_tokens: int) -> int:
        """Free blocks needed before ``num_tokens`` more tokens can be written after ``num_computed``."""
        new = self.blocks_for(seq.num_computed + num_tokens) - len(seq.block_table)
        return max(new, 0) + (self._shared_write_block(seq) is not None)

    def grow(self, seq: Sequence, num_tokens: int) -> tuple[BlockCopy, ...]:
        """Make room for ``num_tokens`` more tokens; the caller has checked ``blocks_to_grow``.

        Only the block of the first new token can hold older ones, so at most one block must be copied.
        """
        copies: tuple[BlockCopy, ...] = ()
        index = self._shared_write_block(seq)
        if index is not None:
            source = seq.block_table[index]
            (seq.block_table[index],) = self._take(seq, 1, AllocateReason.COPY_ON_WRITE)
            copies = (BlockCopy(source, seq.block_table[index]),)
            self._ref_counts[source] -= 1
            self.events.freed(seq, [source], FreeReason.COPY_ON_WRITE)
        num_new = self.blocks_for(seq.num_computed + num_tokens) - len(seq.block_table)
        if num_new > 0:
            seq.block_table += self._take(seq, num_new, AllocateReason.GROWTH)
        return copies

    def release_before(self, seq: Sequence, position: int) -> None:
        """Give back the blocks whose tokens all lie before ``position``: a sliding window has passed them."""
        end = max(position, 0) // self.block_size
        passed = seq.block_table[seq.num_released : end]
        for block in passed:
            self._drop(block)
        seq.block_table[seq.num_released : end] = [RELEASED] * len(passed)
        seq.num_released = max(seq.num_released, end)
        self.events.freed(seq, passed, FreeReason.SLIDING_WINDOW)

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Let ``child`` share the blocks of all tokens that ``parent`` has computed."""
        child.block_table = parent.block_table[: self.blocks_for(parent.num_computed)]
        child.num_released = parent.num_released
        shared = child.block_table[child.num_released :]
        for block in shared:
            self._ref_counts[block] += 1
        self.events.allocated(child, shared, AllocateReason.FORK)
        child.num_computed = parent.num_computed
        child.num_registered = child.num_announced = min(parent.num_registered, len(child.block_table))
        child.block_hashes = list(parent.block_hashes)

    def register(self, seq: Sequence) -> None:
        """Make full blocks findable whose tokens are computed and known to the host."""
        if not self.prefix_caching:
            return
        full = min(seq.num_computed, seq.num_cacheable) // self.block_size
        if full <= seq.num_registered:
            return
        self._extend_hashes(seq, full)
        self._retract(seq, full)
        for index in range(max(seq.num_registered, seq.num_released), full):
            digest, block = seq.block_hashes[index], seq.block_table[index]
            # Two sequences may have computed the same content; the first one stays the one that is found.
            if digest not in self._block_of_hash and block not in self._hash_of_block:
                self._block_of_hash[digest] = block
                self._hash_of_block[block] = digest
        seq.num_registered = full

    def free(self, seq: Sequence, reason: FreeReason = FreeReason.FINISHED) -> None:
        """Give all blocks back. The end of the sequence is reused first: its beginning is likelier to be shared."""
        held = seq.block_table[seq.num_released :]
        for block in reversed(held):
            self._drop(block)
        self.events.freed(seq, held, reason)
        self._retract(seq, seq.num_announced)
        seq.block_table = []
        seq.num_computed = seq.num_registered = seq.num_announced = seq.num_released = 0

    def flush(self, waiting: Iterable[Sequence]) -> None:
        """Forget all cached content: the weights have changed. Nobody but ``waiting`` is left, who hold no blocks."""
        assert len(self._free) == self.num_blocks and not self._announced
        self._weights_generation += 1
        self.events.evicted(None, list(self._hash_of_block), EvictReason.FLUSHED)
        self._block_of_hash.clear()
        self._hash_of_block.clear()
        self.num_cached = 0
        if self.host_tier:
            self.host_tier.clear()
        for seq in waiting:
            for sample in (seq, *seq.forks):
                sample.block_hashes = []
                if sample.companion is not None:
                    sample.companion.block_hashes = []

    def check_integrity(self, live: Iterable[Sequence]) -> None:
        """Raise AssertionError unless every block is free or referenced exactly as often as ``live`` says."""
        counts = [0] * self.num_blocks
        announced: Counter[bytes] = Counter()
        for seq in live:
            held = seq.block_table[seq.num_released :]
            assert len(set(held)) == len(held) and RELEASED not in held, f"{seq.key}: a block twice or released"
            assert len(seq.block_table) * self.block_size >= seq.num_computed, f"{seq.key}: too few blocks"
            for block in held:
                counts[block] += 1
            announced.update(seq.block_hashes[seq.num_registered : seq.num_announced])
        assert counts == self._ref_counts, "reference counts disagree with the live sequences"
        assert all((counts[block] == 0) == (block in self._free) for block in range(self.num_blocks))
        assert self._announced == announced, "announced blocks disagree with the live sequences"
        assert {h: b for b, h in self._hash_of_block.items()} == self._block_of_hash
        assert self.num_cached == sum(counts[block] == 0 for block in self._hash_of_block)
        if self.host_tier:
            self.host_tier.check_integrity()

    def _retract(self, seq: Sequence, end: int) -> None:
        """The announced blocks before index ``end`` are computed, or never will be."""
        for digest in seq.block_hashes[seq.num_registered : min(end, seq.num_announced)]:
            self._announced[digest] -= 1
            if not self._announced[digest]:
                del self._announced[digest]

    def _hold(self, blocks: list[int]) -> None:
        """One more reference to each, so that none is taken for something else."""
        for block in blocks:
            if self._ref_counts[block] == 0:
                del self._free[block]
                self.num_cached -= 1
            self._ref_counts[block] += 1

    def _let_go(self, blocks: list[int]) -> None:
        for block in blocks:
            self._ref_counts[block] -= 1

    def _drop(self, block: int) -> None:
        self._ref_counts[block] -= 1
        if self._ref_counts[block] == 0:
            self._free[block] = None
            if block in self._hash_of_block:
                self.num_cached += 1
            else:
                self._free.move_to_end(block, last=False)

    def _take(self, seq: Sequence, count: int, reason: AllocateReason) -> list[int]:
        """``count`` free blocks for ``seq``, those without cached content first."""
        taken, evicted = [], []
        for _ in range(count):
            block, _ = self._free.popitem(last=False)
            digest = self._hash_of_block.pop(block, None)
            if digest is not None:
                del self._block_of_hash[digest]
                evicted.append(block)
                if self.host_tier:
                    self.host_tier.store(digest, block)
            self._ref_counts[block] = 1
            taken.append(block)
        self.num_cached -= len(evicted)
        self.events.evicted(seq, evicted, EvictReason.REUSED)
        self.events.allocated(seq, taken, reason)
        return taken

    def _shared_write_block(self, seq: Sequence) -> int | None:
        """Index of the block that the next token goes to, when others hold it too or may find it by its hash."""
        index = seq.num_computed // self.block_size
        if index >= len(seq.block_table) or self._ref_counts[seq.block_table[index]] == 1:
            return None
        return index

    def _extend_hashes(self, seq: Sequence, num_blocks: int) -> None:
        size = self.block_size
        while len(seq.block_hashes) < num_blocks:
            start = len(seq.block_hashes) * size
            parent = seq.block_hashes[-1] if seq.block_hashes else _root(seq.salt, self._weights_generation)
            tokens = array("q", seq.token_ids[start : start + size]).tobytes()
            seq.block_hashes.append(hashlib.blake2b(parent + tokens, digest_size=32).digest())


def _root(salt: bytes, weights_generation: int) -> bytes:
    """Start of a hash chain; of one length for all salts, so that no salt can imitate a chain."""
    generation = weights_generation.to_bytes(hashlib.blake2b.SALT_SIZE, "little")
    return hashlib.blake2b(salt, digest_size=32, person=b"trident-root", salt=generation).digest()
