"""LoraConfig: what adapter_config.json says about the tensors beside it. PEFT's format; ranks, scales, refusals."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import BadRequest, NotFound

CONFIG_FILE = "adapter_config.json"

_PLAIN = {
    "fan_in_fan_out": "weights stored transposed",
    "modules_to_save": "whole modules beside the low-rank updates",
    "layer_replication": "layers that the base model does not have",
    "trainable_token_indices": "changed embeddings",
    "target_parameters": "updates of parameters that are no linear layer",
    "lora_bias": "biases of the updates",
    "alora_invocation_tokens": "activation by tokens of the prompt",
    "use_qalora": "pooled inputs (QALoRA)",
    "use_bdlora": "block-diagonal updates",
    "arrow_config": "routing by Arrow",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
}
"""Fields of PEFT that change what an adapter computes, and are not supported when set."""


@dataclass(frozen=True)
class LoraConfig:
    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    use_rslora: bool
    use_dora: bool

    def rank_of(self, module: str) -> int:
        """module: its full name, as in model.layers.0.self_attn.q_proj."""
        return int(_by_pattern(self.rank_pattern, module, self.rank))

    def scale_of(self, module: str) -> float:
        """Factor on B A x: alpha / r, or alpha / sqrt(r) with rank stabilization (Kalajdzievski 2023)."""
        rank = self.rank_of(module)
        alpha = _by_pattern(self.alpha_pattern, module, self.alpha)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


def read_json_object(path: Path, what: str) -> dict[str, Any]:
    """The JSON object in ``path``. Raises ``NotFound`` or ``BadRequest`` that begins with ``what``."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise NotFound(f"{what}: no {path.name} in its folder") from None
    except (OSError, ValueError, RecursionError) as error:
        raise BadRequest(f"{what}: {path.name} cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise BadRequest(f"{what}: {path.name} holds no JSON object")
    return values


def read_lora_config(path: Path, what: str) -> LoraConfig:
    """Parse adapter_config.json. Raises ``NotFound`` or ``BadRequest`` that begins with ``what``."""
    values = read_json_object(path, what)
    if values.get("peft_type") != "LORA":
        raise BadRequest(f"{what}: peft_type {values.get('peft_type')!r} is not supported; allowed: LORA")
    for field, meaning in _PLAIN.items():
        if values.get(field):
            raise BadRequest(f"{what}: {field} is set; {meaning} are not supported. Train without it, or merge it")
    if values.get("bias", "none") != "none":
        raise BadRequest(f"{what}: bias {values['bias']!r} is not supported; allowed: none")
    try:
        return LoraConfig(
            rank=_rank(values.get("r", 8)),
            alpha=float(values.get("lora_alpha", 8)),
            rank_pattern={str(key): _rank(rank) for key, rank in (values.get("rank_pattern") or {}).items()},
            alpha_pattern={str(key): float(alpha) for key, alpha in (values.get("alpha_pattern") or {}).items()},
            use_rslora=bool(values.get("use_rslora")),
            use_dora=bool(values.get("use_dora")),
        )
    except (TypeError, ValueError, AttributeError) as error:
        raise BadRequest(f"{what}: {path.name}: {error}") from None


def _rank(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"a rank of {value!r} is not an integer of at least 1")
    return value


def _by_pattern(pattern: Mapping[str, float], module: str, default: float) -> float:
    """PEFT's rule: the first key that the end of the module's name matches, as a regular expression."""
    for key, value in pattern.items():
        try:
            if re.match(rf"(.*\.)?({key})$", module):
                return value
        except re.error:
            continue
    return default
