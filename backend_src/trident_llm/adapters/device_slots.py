"""DeviceSlots: the room for adapters beside the model's linear layers, and what is copied into it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..kernels.lora_layer import LoraLayer, allocate_lora_layer
from ..models.layers import AdaptableLinear
from .slots import SlotLoad


class DeviceSlots:
    """Gives every linear layer ``num_slots`` empty updates of rank ``max_rank``."""

    def __init__(
        self,
        linears: Sequence[AdaptableLinear],
        *,
        num_slots: int,
        max_rank: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.num_slots = num_slots
        self._layers: list[LoraLayer] = []
        self.targets: list[str] = []
        """Full names of the modules that can be updated, in the order of ``LoraRows.weights``."""
        for linear in linears:
            layer = allocate_lora_layer(
                tuple(linear.parts.values()), linear.num_inputs, first_target=len(self.targets), num_slots=num_slots,
                max_rank=max_rank, dtype=dtype, device=device,
            )  # fmt: skip
            linear.linear.lora = layer
            self._layers.append(layer)
            self.targets += linear.parts
        self.num_bytes = sum(layer.num_bytes for layer in self._layers)

    @torch.inference_mode()
    def apply(self, loads: Sequence[SlotLoad]) -> None:
        """Copy adapters into their slots, after the steps launched so far and before those to come."""
        for load in loads:
            weights = load.adapter.weights
            assert weights is not None, f"{load.adapter.name} is not in host memory"
            for layer, update in zip(self._layers, weights.updates, strict=True):
                if update is None:
                    layer.clear(load.slot)
                else:
                    layer.set(load.slot, update.a, update.b, update.gains)
