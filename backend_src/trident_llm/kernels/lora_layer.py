"""LoraLayer: the low-rank updates of one linear layer, one per slot, and which rows of a step they apply to.

A linear layer may stand for several of the checkpoint's, one above another (q, k and v; gate and up): its parts. Each
part has an A of its own, because its own update reads the same x through other rows:

    update of rows of part p, in slot s:  b[s, rows of p] @ (a[s, p] @ x) + gains[s, rows of p] * (W x)

The gains are those of DoRA (Liu et al. 2024), whose result is linear in W x and B A x.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

TILE_ROWS = 16
"""Rows of an activation that share a list of slots; the matrix instructions' least."""


def num_tiles(num_rows: int) -> int:
    return -(-num_rows // TILE_ROWS)


@dataclass(frozen=True)
class LoraLayer:
    """S slots of updates of at most rank R of a layer with P parts. A slot that its rank says is empty adds nothing."""

    a: Tensor
    """[S, P, R, in]."""
    b: Tensor
    """[S, out, R], the adapter's scale included. In memory [out, S, R]: a row of all slots' columns for an output."""
    gains: Tensor
    """[S, out] float32."""
    ranks: Tensor
    """[S] int32: rows of a and columns of b that count."""
    has_gains: Tensor
    """[S] int32: 1 where gains count."""
    part_sizes: tuple[int, ...]
    """Outputs of each part."""
    first_target: int
    """The parts' place in ``LoraRows.weights``: ``first_target``, ``first_target + 1``, ..."""
    host_ranks: list[int] = field(default_factory=list)
    """``ranks`` on the host, for kernels that run there."""
    host_has_gains: list[bool] = field(default_factory=list)

    @property
    def num_bytes(self) -> int:
        return self.a.nbytes + self.b.nbytes + self.gains.nbytes

    def clear(self, slot: int) -> None:
        """Make ``slot`` empty."""
        self.ranks[slot].fill_(0)
        self.has_gains[slot].fill_(0)
        self.host_ranks[slot], self.host_has_gains[slot] = 0, False

    def set(self, slot: int, a: Tensor, b: Tensor, gains: Tensor | None) -> None:
        """a: [P, r, in], b: [out, r], gains: [out]; any device. Asynchronous where they are pinned."""
        rank = a.shape[1]
        self.a[slot, :, :rank].copy_(a, non_blocking=True)
        self.b[slot, :, :rank].copy_(b, non_blocking=True)
        if gains is not None:
            self.gains[slot].copy_(gains, non_blocking=True)
        self.ranks[slot].fill_(rank)
        self.has_gains[slot].fill_(int(gains is not None))
        self.host_ranks[slot], self.host_has_gains[slot] = rank, gains is not None


def allocate_lora_layer(
    part_sizes: tuple[int, ...],
    num_inputs: int,
    *,
    first_target: int,
    num_slots: int,
    max_rank: int,
    dtype: torch.dtype,
    device: torch.device,
) -> LoraLayer:
    """A layer with empty slots."""
    num_outputs = sum(part_sizes)
    return LoraLayer(
        a=torch.zeros(num_slots, len(part_sizes), max_rank, num_inputs, dtype=dtype, device=device),
        b=torch.zeros(num_outputs, num_slots, max_rank, dtype=dtype, device=device).transpose(0, 1),
        gains=torch.zeros(num_slots, num_outputs, dtype=torch.float32, device=device),
        ranks=torch.zeros(num_slots, dtype=torch.int32, device=device),
        has_gains=torch.zeros(num_slots, dtype=torch.int32, device=device),
        part_sizes=part_sizes,
        first_target=first_target,
        host_ranks=[0] * num_slots,
        host_has_gains=[False] * num_slots,
    )


@dataclass(frozen=True)
class SlotRun:
    """Rows ``start`` to ``end`` - 1 take part of slot ``slot``: ``weight`` of it, or None: as ``weights`` say."""

    slot: int
    start: int
    end: int
    weight: float | None


@dataclass(frozen=True)
class LoraRows:
    """How much of which slot each row of an activation takes. N rows, S slots."""

    weights: Tensor
    """[M, N, S] float32: M is 1 where all layers' parts take the same, else the number of parts in the model."""
    tile_slots: Tensor
    """[1 + ceil(N / TILE_ROWS), S] int32. First each slot that has a weight in any row, at its own place, and -1 at the
    others'; then for each tile of rows the slots with a weight there, followed by -1."""
    runs: tuple[SlotRun, ...] = ()
    """The same on the host; empty where the step depends on its shape alone."""

    def part_weights(self, target: int) -> Tensor:
        """[N, S]: what the part ``target`` of the model takes."""
        return self.weights[target if self.weights.shape[0] > 1 else 0]
