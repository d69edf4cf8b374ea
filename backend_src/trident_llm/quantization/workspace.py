"""About how much memory a quantization needs beside the weights that it makes."""

from __future__ import annotations

import dataclasses

import torch

from ..config import EngineConfig
from ..models.model_config import ModelConfig
from .estimate import estimate_memory
from .run import SENSITIVITY_SAMPLES
from .walk import batch_size

_FLOAT_BYTES = 4
_LAYER_COPIES = 3
"""Of a layer in full precision: as read, merged, and what the method works on."""


def bytes_to_build(config: EngineConfig, model_config: ModelConfig, dtype: torch.dtype, device: torch.device) -> int:
    """About the most that is in use at once while the weights of ``config`` are made, these included."""
    counted = config
    if config.isq_max_loss:
        # Bits are not known before they are chosen; these are the most.
        counted = dataclasses.replace(config, isq_max_loss=0.0, isq_bits=8)
    weights = estimate_memory(counted, None if device.type == "cpu" else 1).after
    return weights + _workspace(config, model_config, dtype, device)


def _workspace(config: EngineConfig, model: ModelConfig, dtype: torch.dtype, device: torch.device) -> int:
    hidden, inner = model.hidden_size, model.intermediate_size
    q_size, kv_size = model.num_attention_heads * model.head_dim, model.num_key_value_heads * model.head_dim
    layer = hidden * (2 * q_size + 2 * kv_size + 3 * inner)
    length = min(config.isq_calibration_length, config.max_model_len or model.max_position_embeddings)
    rows = batch_size(device, length) * length
    hessians = _FLOAT_BYTES * (2 * hidden**2 + q_size**2 + 3 * inner**2)
    texts = config.isq_calibration_samples * length * hidden * dtype.itemsize
    passing = rows * (4 * hidden + 3 * inner) * _FLOAT_BYTES
    total = _LAYER_COPIES * layer * _FLOAT_BYTES + 2 * model.vocab_size * hidden * dtype.itemsize + hessians
    total += texts + passing
    if config.isq_max_loss:
        tokens = SENSITIVITY_SAMPLES * length
        inputs = tokens * hidden * dtype.itemsize * model.num_hidden_layers
        total += inputs + tokens * _FLOAT_BYTES * (6 * hidden + 5 * inner + 2 * q_size)
    return total
