"""StepBuffers: a step's inputs on the device, at addresses that depend on the step's sizes alone.

The host packs everything into one pinned buffer, so a step costs one copy to the device, and a CUDA graph captured for
some sizes finds its inputs in the same place every time.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..kernels.lora_layer import num_tiles

_TOKEN_FIELDS = {"token_ids": "int64", "positions": "int64", "slots": "int64", "sources": "int64"}
_SEQ_FIELDS = {"context_lens": "int32", "cu_seqlens_q": "int32", "seq_counts": "int32"}
_ROW_FIELDS = {"logits_rows": "int64"}
_ADAPTER_FIELDS = {"adapter_weights": "float32", "adapter_tiles": "int32", "adapter_row_tiles": "int32"}
"""See LoraRows: weights of the tokens, and the slots of all and of each tile of tokens, and of rows."""
_SAMPLE_FIELDS = {
    "seed": "int64",
    "sample_index": "int64",
    "position": "int64",
    "row": "int64",
    "temperature": "float32",
    "top_p": "float32",
    "min_p": "float32",
    "top_k": "int32",
    "penalty_slot": "int32",
    "repetition_penalty": "float32",
    "frequency_penalty": "float32",
    "presence_penalty": "float32",
}


@dataclass(frozen=True)
class StepSizes:
    """T tokens of S sequences, R rows of logits, N samples, and slots of adapters where tokens take some."""

    num_tokens: int
    num_seqs: int
    num_rows: int
    num_samples: int
    num_slots: int = 0

    def fields(self) -> dict[str, tuple[str, int]]:
        """dtype and length of each field. cu_seqlens_q has one entry more than there are sequences; seq_counts has two
        numbers, see AttentionMetadata."""
        lengths = {
            **dict.fromkeys(_TOKEN_FIELDS, self.num_tokens),
            **dict.fromkeys(_ROW_FIELDS, self.num_rows),
            **dict.fromkeys(_SAMPLE_FIELDS, self.num_samples),
            "context_lens": self.num_seqs,
            "cu_seqlens_q": self.num_seqs + 1,
            "seq_counts": 2,
            "adapter_weights": self.num_tokens * self.num_slots,
            "adapter_tiles": (1 + num_tiles(self.num_tokens)) * self.num_slots,
            "adapter_row_tiles": (1 + num_tiles(self.num_rows)) * self.num_slots,
        }
        dtypes = {**_TOKEN_FIELDS, **_SEQ_FIELDS, **_ROW_FIELDS, **_SAMPLE_FIELDS, **_ADAPTER_FIELDS}
        return {name: (dtypes[name], length) for name, length in lengths.items()}


@dataclass(frozen=True)
class _Layout:
    offsets: Mapping[str, tuple[str, int, int]]
    """dtype, byte offset and length by field."""
    num_bytes: int


@functools.lru_cache(maxsize=4096)
def _layout(sizes: StepSizes) -> _Layout:
    offsets, end = {}, 0
    for name, (dtype, length) in sizes.fields().items():
        # 16 bytes: what vectorised loads and dtype views ask for.
        offsets[name] = dtype, end, length
        end = -(-(end + length * np.dtype(dtype).itemsize) // 16) * 16
    return _Layout(offsets, end)


class StepBuffers:
    """Room for the largest step. Two pinned buffers take turns: the copy from one may still run when the next step is
    packed, but not the copy before it, because its step has been waited for.

    ``block_tables`` [max_seqs, table_width] int32 is separate: only the columns in use are sent.
    """

    def __init__(self, largest: StepSizes, *, table_width: int, device: torch.device) -> None:
        num_bytes = _layout(largest).num_bytes
        self._arena = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        pinned = device.type == "cuda"
        self._host = [torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=pinned) for _ in range(2)]
        self._host_tables = [
            torch.zeros(largest.num_seqs * table_width, dtype=torch.int32, pin_memory=pinned) for _ in range(2)
        ]
        self._table_arena = torch.zeros(largest.num_seqs * table_width, dtype=torch.int32, device=device)
        self.block_tables = torch.zeros(largest.num_seqs, table_width, dtype=torch.int32, device=device)
        self._turn = 0
        self.views = functools.lru_cache(maxsize=1024)(self._views)
        """The fields on the device. Equal sizes give equal addresses."""
        self._host_views = functools.lru_cache(maxsize=2048)(self._views_on_host)

    def _views(self, sizes: StepSizes) -> dict[str, Tensor]:
        return {
            name: self._arena[offset : offset + length * np.dtype(dtype).itemsize].view(getattr(torch, dtype))
            for name, (dtype, offset, length) in _layout(sizes).offsets.items()
        }

    def _views_on_host(self, sizes: StepSizes, turn: int) -> dict[str, NDArray[Any]]:
        arena = self._host[turn].numpy()
        return {
            name: arena[offset : offset + length * np.dtype(dtype).itemsize].view(dtype)
            for name, (dtype, offset, length) in _layout(sizes).offsets.items()
        }

    def clear(self) -> None:
        """Make all fields zeros, whatever sizes they are read with: positions, slots and tables that exist."""
        for tensor in (self._arena, self._table_arena, self.block_tables):
            tensor.zero_()

    def upload(self, sizes: StepSizes, values: Mapping[str, Sequence[Any]], tables: Sequence[Sequence[int]]) -> None:
        """Send a step. A field with fewer values than ``sizes`` says keeps zeros behind them, except that ``slots`` is
        filled with -1 (nothing is stored), ``sources``, ``penalty_slot`` and slots of tiles with -1 (none), and
        ``cu_seqlens_q`` with its last value (sequences without tokens)."""
        num_bytes = _layout(sizes).num_bytes
        self._turn ^= 1
        for name, view in self._host_views(sizes, self._turn).items():
            given = values.get(name, ())
            view[: len(given)] = given
            if len(given) < len(view):
                view[len(given) :] = given[-1] if name == "cu_seqlens_q" else _FILL.get(name, 0)
        self._arena[:num_bytes].copy_(self._host[self._turn][:num_bytes], non_blocking=True)
        self._upload_tables(tables)

    def _upload_tables(self, tables: Sequence[Sequence[int]]) -> None:
        width = max(map(len, tables))
        host = self._host_tables[self._turn][: len(tables) * width]
        rows = host.numpy().reshape(len(tables), width)
        for row, table in zip(rows, tables, strict=True):
            row[: len(table)] = table
        arena = self._table_arena[: len(tables) * width]
        arena.copy_(host, non_blocking=True)
        self.block_tables[: len(tables), :width].copy_(arena.view(len(tables), width))


_FILL = {"slots": -1, "sources": -1, "penalty_slot": -1, "adapter_tiles": -1, "adapter_row_tiles": -1}
