"""Checkpoints: stored tensors under their Hugging Face names, with shapes known before anything is read.

One class per file format, with the same few methods. Knows nothing of what a model expects.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from ..errors import LoadFailed
from .gguf_config import ROPE_FACTORS, gguf_architecture
from .gguf_file import GgufFile, open_gguf
from .model_config import ModelConfig
from .source import ModelSource

FLOATS = ("F64", "F32", "F16", "BF16")
"""safetensors' names of the dtypes that parameters come in."""
_QUANTIZED = ("F8_E4M3", "I8", "I32", "I64")
"""And of those that quantized ones are made of."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file. ``name`` is Hugging Face's, ``stored_name`` the file's own."""

    name: str
    stored_name: str
    shape: tuple[int, ...]
    file: Path
    dtype: str = ""
    """The file format's name of it."""

    def error(self, problem: str) -> LoadFailed:
        alias = "" if self.name == self.stored_name else f" ({self.name})"
        return LoadFailed(f"{self.file}: tensor {self.stored_name}{alias}: {problem}")


class Checkpoint(Protocol):
    """What weight readers need of a file format."""

    tensors: list[StoredTensor]
    """All tensors, in the order in which reading is cheapest."""

    def read(self, tensor: StoredTensor) -> torch.Tensor:
        """The values of one of ``tensors``, on the CPU, in any float dtype. They may map the file."""
        ...


def open_checkpoint(source: ModelSource, config: ModelConfig) -> Checkpoint:
    """Read the headers of a model's weight files. Raises ``LoadFailed`` naming the file that is broken."""
    if source.format == "gguf":
        return GgufCheckpoint(open_gguf(source.weight_files[0]), config)
    return SafetensorsCheckpoint(source.weight_files)


class SafetensorsCheckpoint:
    """One or more safetensors files, mapped into memory."""

    def __init__(self, files: tuple[Path, ...], *, quantized: bool = False) -> None:
        """quantized: whether there may be integers and 8-bit floats."""
        self.tensors: list[StoredTensor] = []
        for path in files:
            self.tensors.extend(_safetensors_header(path, FLOATS + _QUANTIZED if quantized else FLOATS))
        self._open_path: Path | None = None
        self._open_file: Any = None

    def read(self, tensor: StoredTensor) -> torch.Tensor:
        try:
            return self._file(tensor.file).get_tensor(tensor.stored_name)
        except (SafetensorError, OSError, RuntimeError) as error:
            raise tensor.error(f"cannot be read: {error}") from error

    def _file(self, path: Path) -> Any:
        """The mapped file. Only the last one stays open: neighbouring tensors mostly lie in one file."""
        if path != self._open_path:
            self._open_path, self._open_file = path, safe_open(path, framework="pt")
        return self._open_file


def _safetensors_header(path: Path, dtypes: tuple[str, ...]) -> list[StoredTensor]:
    tensors = []
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.offset_keys():
                view = file.get_slice(name)
                tensor = StoredTensor(name, name, tuple(view.get_shape()), path, view.get_dtype())
                if tensor.dtype not in dtypes:
                    raise tensor.error(f"dtype {tensor.dtype} is not supported; supported: {', '.join(dtypes)}")
                tensors.append(tensor)
    except (SafetensorError, OSError) as error:
        raise LoadFailed(f"{path}: cannot be read as safetensors: {error}") from error
    return tensors


class GgufCheckpoint:
    """One GGUF file: blocks are dequantized to float32, one tensor at a time."""

    def __init__(self, file: GgufFile, config: ModelConfig) -> None:
        self._file = file
        interleaved = gguf_architecture(file).gguf_interleaves_qk
        self._interleaved_heads = (
            {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads} if interleaved else {}
        )
        self.tensors = [
            StoredTensor(
                _hugging_face_name(tensor.name), tensor.name, tensor.shape, file.path, tensor.quantization.name
            )
            for tensor in file.tensors.values()
            if tensor.name != ROPE_FACTORS
        ]

    def read(self, tensor: StoredTensor) -> torch.Tensor:
        values = self._file.read(tensor.stored_name)
        num_heads = self._interleaved_heads.get(tensor.stored_name.split(".")[-2])
        if num_heads is not None:
            values = _deinterleave(values, num_heads)
        return torch.from_numpy(np.ascontiguousarray(values))


def _deinterleave(values: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of q or k ([heads * head_dim, ...]) from GGUF's order of rotary pairs (0, d/2, 1, d/2 + 1, ...) to
    Hugging Face's (0, 1, ..., d/2, d/2 + 1, ...). Undoes ``permute`` of llama.cpp's convert_hf_to_gguf.py."""
    pairs = values.reshape(num_heads, -1, 2, *values.shape[1:])
    return pairs.swapaxes(1, 2).reshape(values.shape)


_GGUF_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_GGUF_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def _hugging_face_name(name: str) -> str:
    """Hugging Face's name of a GGUF tensor (blk.0.attn_q.weight -> model.layers.0.self_attn.q_proj.weight); names
    outside the scheme stay as they are."""
    parts = name.split(".")
    if len(parts) == 2 and parts[0] in _GGUF_TOP:
        return f"{_GGUF_TOP[parts[0]]}.{parts[1]}"
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in _GGUF_LAYER:
        return f"model.layers.{parts[1]}.{_GGUF_LAYER[parts[2]]}.{parts[3]}"
    return name
