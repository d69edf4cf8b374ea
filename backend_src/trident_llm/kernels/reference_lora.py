"""Torch twin of the low-rank updates, for the CPU: a few small matrix products per slot and run of rows."""

from __future__ import annotations

from torch import Tensor

from .lora_layer import LoraLayer, LoraRows, SlotRun


def add_lora(y: Tensor, x: Tensor, bias: Tensor | None, layer: LoraLayer, rows: LoraRows) -> None:
    """Add to y [T, out], which is W x + bias, what ``rows`` take of the updates in ``layer``; in place. x: [T, in]."""
    runs = [run for run in rows.runs if layer.host_ranks[run.slot] and run.weight != 0]
    with_gains = any(layer.host_has_gains[run.slot] for run in runs)
    product = None if not with_gains else y.clone() if bias is None else y - bias
    for run in runs:
        rank, here = layer.host_ranks[run.slot], slice(run.start, run.end)
        first_row = 0
        for part, size in enumerate(layer.part_sizes):
            outputs = slice(first_row, first_row + size)
            first_row += size
            hidden = x[here] @ layer.a[run.slot, part, :rank].t()
            factor: Tensor | float = 1.0 if run.weight is None else run.weight
            if run.weight is None:
                factor = _weights(layer, part, rows, run)
                hidden = (hidden * factor).to(x.dtype)
            y[here, outputs].addmm_(hidden, layer.b[run.slot, outputs, :rank].t(), alpha=run.weight or 1.0)
            if product is not None and layer.host_has_gains[run.slot]:
                gained = product[here, outputs] * layer.gains[run.slot, outputs]
                y[here, outputs].add_((gained * factor).to(y.dtype))


def _weights(layer: LoraLayer, part: int, rows: LoraRows, run: SlotRun) -> Tensor:
    """[rows of the run, 1]."""
    weights = rows.part_weights(layer.first_target + part)
    return weights[run.start : run.end, run.slot, None]
