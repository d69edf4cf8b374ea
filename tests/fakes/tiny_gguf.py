"""Writes a Hugging Face folder's model as GGUF, with the names and row order of llama.cpp's converter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.numpy import load_file

_ARCHITECTURES = {
    "LlamaForCausalLM": gguf.MODEL_ARCH.LLAMA,
    "Qwen2ForCausalLM": gguf.MODEL_ARCH.QWEN2,
    "Qwen3ForCausalLM": gguf.MODEL_ARCH.QWEN3,
}


def write_tiny_gguf(
    folder: Path,
    path: Path,
    *,
    quantization: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    rope_divisors: np.ndarray | None = None,
    drop: tuple[str, ...] = (),
    extra: dict[str, Any] | None = None,
) -> Path:
    """Convert the model in ``folder`` (one float32 model.safetensors) to ``path``; returns ``path``.

    Matrices are stored as ``quantization``. ``drop`` names metadata keys to leave out, ``extra`` metadata to add.
    """
    config = json.loads((folder / "config.json").read_text())
    arch = _ARCHITECTURES[config["architectures"][0]]
    name = gguf.MODEL_ARCH_NAMES[arch]
    writer = gguf.GGUFWriter(path, name)
    metadata = {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": config["head_dim"],
        "rope.freq_base": config["rope_parameters"]["rope_theta"],
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
    }
    for key, value in {**metadata, **(extra or {})}.items():
        if key not in drop:
            _add(writer, f"{name}.{key}", value)
    writer.add_uint32("tokenizer.ggml.bos_token_id", config["bos_token_id"])
    writer.add_uint32("tokenizer.ggml.eos_token_id", config["eos_token_id"])
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    names = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    for hf_name, values in load_file(folder / "model.safetensors").items():
        gguf_name = names.get_name(hf_name, try_suffixes=(".weight", ".bias"))
        assert gguf_name is not None, hf_name
        leaf = gguf_name.split(".")[-2]
        if arch is gguf.MODEL_ARCH.LLAMA and leaf in heads:
            values = _interleave(values, heads[leaf])
        kind = quantization if values.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(gguf_name, gguf.quantize(values, kind), raw_dtype=kind)
    if rope_divisors is not None:
        writer.add_tensor("rope_freqs.weight", rope_divisors.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_uint32(key, value)


def _interleave(values: np.ndarray, num_heads: int) -> np.ndarray:
    """Each head's rows 0, 1, ..., d - 1 become 0, d/2, 1, d/2 + 1, ..."""
    half = values.shape[0] // num_heads // 2
    order = [head * 2 * half + row for head in range(num_heads) for i in range(half) for row in (i, half + i)]
    return np.ascontiguousarray(values[order])
