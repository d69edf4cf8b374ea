"""Rotary position embedding: the frequencies of each Hugging Face rope type, and cos/sin rows by position.

Su et al. 2021; scaled variants as transformers computes them. Knows nothing of attention.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import BadRequest
from .model_config import ModelConfig


@dataclass(frozen=True)
class RotaryRows:
    """cos and sin [T, 1, head_dim] of a step's tokens, in the form that the rotary kernel reads."""

    cos: Tensor
    sin: Tensor
    """First half negated."""


class RotaryEmbedding:
    """A table of cos and sin for positions 0 .. max_model_len - 1.

    Raises ``BadRequest`` for a rope type, or a length under a rope type, that is not supported.
    """

    def __init__(
        self, config: ModelConfig, *, max_model_len: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        frequencies = rope_frequencies(config, max_model_len)
        angles = torch.arange(max_model_len).float().unsqueeze(1) * frequencies.inverse
        table = torch.cat((angles.cos(), angles.sin()), -1) * frequencies.attention_factor
        self._table = table.to(device=device, dtype=dtype)
        """[max_model_len, head_dim]: cos of all pairs, then sin."""

    def rows(self, positions: Tensor) -> RotaryRows:
        """The rows for positions [T] int64."""
        cos, sin = self._table.index_select(0, positions).unsqueeze(1).chunk(2, -1)
        return RotaryRows(torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1))


@dataclass(frozen=True)
class RopeFrequencies:
    inverse: Tensor
    """[head_dim / 2] float32 radians per position."""
    attention_factor: float = 1.0
    """Factor on cos and sin."""


def rope_frequencies(config: ModelConfig, max_model_len: int) -> RopeFrequencies:
    """The frequencies of ``config``'s rope type. Raises ``BadRequest``."""
    scaling = config.rope_scaling or {}
    rope_type = str(scaling.get("rope_type", scaling.get("type", "default")))
    if rope_type not in _ROPE_TYPES:
        raise BadRequest(f"model: rope type {rope_type!r} is not supported; supported: {', '.join(_ROPE_TYPES)}")
    if scaling.get("partial_rotary_factor", 1.0) != 1.0:
        raise BadRequest(
            f"model: partial_rotary_factor {scaling['partial_rotary_factor']} is not supported; supported: 1.0"
        )
    if rope_type == "dynamic" and max_model_len > config.max_position_embeddings:
        # Beyond that length the frequencies grow with the prompt, so cached keys would depend on who computed them.
        raise BadRequest(
            f"max_model_len: {max_model_len} is too long for rope type 'dynamic'; "
            f"allowed: at most {config.max_position_embeddings}"
        )
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
    try:
        return _ROPE_TYPES[rope_type](config, scaling, config.rope_theta**exponents)
    except KeyError as error:
        raise BadRequest(f"model: rope type {rope_type!r} needs {error.args[0]!r} in the model's config") from None


def _default(config: ModelConfig, scaling: Mapping[str, Any], wavelengths: Tensor) -> RopeFrequencies:
    return RopeFrequencies(1.0 / wavelengths)


def _linear(config: ModelConfig, scaling: Mapping[str, Any], wavelengths: Tensor) -> RopeFrequencies:
    return RopeFrequencies(1.0 / wavelengths / scaling["factor"])


def _llama3(config: ModelConfig, scaling: Mapping[str, Any], wavelengths: Tensor) -> RopeFrequencies:
    """Long wavelengths are slowed by ``factor``, short ones stay, those between are blended (Llama 3.1)."""
    inverse = 1.0 / wavelengths
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = _original_length(config, scaling) * inverse / (2 * math.pi)
    blend = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return RopeFrequencies((1 - blend) * inverse / scaling["factor"] + blend * inverse)


def _yarn(config: ModelConfig, scaling: Mapping[str, Any], wavelengths: Tensor) -> RopeFrequencies:
    """Frequencies that turn often in the original context stay, rare ones are slowed (Peng et al. 2023)."""
    original = _original_length(config, scaling)
    factor = scaling["factor"]
    if factor is None:
        factor = config.max_position_embeddings / original

    def dimension(turns: float) -> float:
        """The (fractional) dimension that makes this many turns in the original context."""
        return config.head_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    low, high = dimension(scaling.get("beta_fast") or 32), dimension(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.head_dim - 1)
    ramp = (torch.arange(config.head_dim // 2).float() - low) / (high - low if high != low else 0.001)
    kept = 1 - ramp.clamp(0, 1)
    inverse = 1.0 / (factor * wavelengths) * (1 - kept) + 1.0 / wavelengths * kept
    return RopeFrequencies(inverse, _yarn_attention_factor(scaling, factor))


def _yarn_attention_factor(scaling: Mapping[str, Any], factor: float) -> float:
    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])

    def mscale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return mscale(scaling["mscale"]) / mscale(scaling["mscale_all_dim"])
    return mscale(1.0)


def _original_length(config: ModelConfig, scaling: Mapping[str, Any]) -> int:
    return scaling.get("original_max_position_embeddings") or config.max_position_embeddings


_ROPE_TYPES: dict[str, Callable[[ModelConfig, Mapping[str, Any], Tensor], RopeFrequencies]] = {
    "default": _default,
    "dynamic": _default,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
}
