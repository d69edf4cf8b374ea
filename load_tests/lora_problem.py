"""Low-rank updates with the shapes of Mistral-7B, as ``kernel_problems`` has linear layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from kernel_problems import COLD_BYTES, LINEAR_SHAPES, Launch, random_tensor, relative_error, release

from trident_llm.kernels.lora import add_lora
from trident_llm.kernels.lora_layer import TILE_ROWS, LoraRows, allocate_lora_layer


@dataclass
class Lora:
    """Updates of rank 16 of a linear layer of Mistral-7B: x [rows, in], each adapter's rows side by side."""

    name: str
    rows: int
    adapters: int
    max_adapters: int = 32
    flops = 0.0

    def prepare(self, device: str) -> None:
        num_outputs, num_inputs = LINEAR_SHAPES[self.name]
        parts = {"qkv": (4096, 1024, 1024), "gate_up": (14336, 14336)}.get(self.name, (num_outputs,))
        rank, used = 16, self.adapters
        self.num_bytes = used * rank * (len(parts) * num_inputs + num_outputs) * 2
        copies = 1 if device == "cpu" else max(4, int(COLD_BYTES / self.num_bytes / self.max_adapters * used))
        self.layers = []
        for _ in range(copies):
            layer = allocate_lora_layer(
                parts, num_inputs, first_target=0, num_slots=self.max_adapters, max_rank=rank, dtype=torch.bfloat16,
                device=torch.device(device),
            )  # fmt: skip
            if device != "cpu":
                layer.a.normal_(0, 0.02)
                layer.b.normal_(0, 0.02)
                layer.ranks.fill_(rank)
            self.layers.append(layer)
        chosen = torch.arange(self.rows) * used // self.rows
        weights = torch.zeros(1, self.rows, self.max_adapters)
        weights[0, torch.arange(self.rows), chosen] = 1.0
        groups = chosen.split(TILE_ROWS)
        tiles = torch.full((1 + len(groups), self.max_adapters), -1, dtype=torch.int32)
        for tile, own in zip(tiles[1:], groups, strict=True):
            slots = own.unique().int()
            tile[: len(slots)] = slots
            tiles[0, slots] = slots
        self.lora_rows = LoraRows(weights.to(device), tiles.to(device))
        self.chosen = chosen.to(device)
        self.x = random_tensor(device, self.rows, num_inputs)
        self.out = torch.zeros(self.rows, num_outputs, dtype=torch.bfloat16, device=device)

    def release(self) -> None:
        self.__dict__.pop("lora_rows", None)
        release(self)

    def launches(self, config: Any, pdl: bool = True) -> list[Launch]:
        return [
            lambda layer=layer: add_lora(self.out, self.x, None, layer, self.lora_rows, config=config, pdl=pdl)
            for layer in self.layers
        ]

    def error(self) -> float:
        layer, x = self.layers[-1], self.x.float()
        hidden = torch.einsum("ti,tpri->tpr", x, layer.a[self.chosen].float())
        parts = torch.cat([torch.full((size,), part) for part, size in enumerate(layer.part_sizes)])
        expected = torch.einsum("tor,tor->to", layer.b[self.chosen].float(), hidden[:, parts.to(x.device)])
        return relative_error(self.out, expected)

    def poison(self) -> None:
        """What an update is added to."""
        self.out.zero_()
