"""LoraProblem: random low-rank updates of one layer and rows that mix them, with the result by the formula."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from trident_llm.kernels.lora_layer import TILE_ROWS, LoraLayer, LoraRows, SlotRun, allocate_lora_layer


@dataclass(frozen=True)
class LoraProblem:
    x: torch.Tensor
    y: torch.Tensor
    bias: torch.Tensor | None
    layer: LoraLayer
    rows: LoraRows
    expected: torch.Tensor
    """float64."""


def make_problem(
    weights: torch.Tensor,
    *,
    ranks: tuple[int, ...],
    part_sizes: tuple[int, ...] = (48, 16, 16),
    num_inputs: int = 72,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    gained: tuple[int, ...] = (),
    with_bias: bool = False,
    first_target: int = 0,
) -> LoraProblem:
    """weights: [parts or 1, rows, slots]. ranks: of each slot; 0 leaves it empty. gained: slots with gains."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int, kind: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(kind).to(device)

    num_rows, num_outputs = weights.shape[1], sum(part_sizes)
    layer = allocate_lora_layer(
        part_sizes, num_inputs, first_target=first_target, num_slots=len(ranks), max_rank=max(*ranks, 24),
        dtype=dtype, device=torch.device(device),
    )  # fmt: skip
    # What lies beyond a slot's rank must not count.
    layer.a.fill_(7.0)
    layer.b.fill_(7.0)
    layer.gains.fill_(7.0)
    for slot, rank in enumerate(ranks):
        if rank:
            gains = random(num_outputs, kind=torch.float32) if slot in gained else None
            layer.set(slot, random(len(part_sizes), rank, num_inputs), random(num_outputs, rank), gains)
    x, y = random(num_rows, num_inputs), random(num_rows, num_outputs)
    bias = random(num_outputs) if with_bias else None
    rows = lora_rows(weights.to(device))
    problem = LoraProblem(x, y, bias, layer, rows, expected=y)
    return replace(problem, expected=expected_sum(problem, ranks))


def lora_rows(weights: torch.Tensor) -> LoraRows:
    """Rows with everything that either implementation reads."""
    num_rows, num_slots = weights.shape[1:]
    used = (weights != 0).any(0).cpu()
    groups = used.split(TILE_ROWS)
    tiles = torch.full((1 + len(groups), num_slots), -1, dtype=torch.int32)
    for tile, group in zip(tiles[1:], groups, strict=True):
        slots = group.any(0).nonzero()[:, 0].int()
        tile[: len(slots)] = slots
        tiles[0, slots] = slots
    runs = tuple(
        SlotRun(slot, row, row + 1, None) for slot in range(num_slots) for row in range(num_rows) if used[row, slot]
    )
    return LoraRows(weights=weights, tile_slots=tiles.to(weights.device), runs=runs)


def expected_sum(problem: LoraProblem, ranks: tuple[int, ...]) -> torch.Tensor:
    """y and what its rows take of the updates, in float64."""
    x, layer, rows = problem.x.double(), problem.layer, problem.rows
    result = problem.y.double().clone()
    product = result.clone() if problem.bias is None else result - problem.bias.double()
    for slot, rank in enumerate(ranks):
        if not rank:
            continue
        first = 0
        for part, size in enumerate(layer.part_sizes):
            here = slice(first, first + size)
            first += size
            update = x @ layer.a[slot, part, :rank].double().T @ layer.b[slot, here, :rank].double().T
            if layer.host_has_gains[slot]:
                update += product[:, here] * layer.gains[slot, here].double()
            result[:, here] += rows.part_weights(layer.first_target + part)[:, slot, None].double() * update
    return result


def mixed_weights(num_rows: int, num_slots: int, num_parts: int = 1, seed: int = 1) -> torch.Tensor:
    """Rows without any slot, with one, and with several."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(num_parts, num_rows, num_slots, generator=generator) + 0.1
    keep = torch.rand(num_rows, num_slots, generator=generator) < torch.tensor([0.0, 0.4, 1.0])[
        torch.arange(num_rows) % 3, None
    ]
    return weights * keep
