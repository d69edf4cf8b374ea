"""Mixes of every kind that PEFT writes, and engines of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.adapters.helpers import AdaptedModel, make_core
from trident_llm.engine.engine import EngineCore

NEW_TOKENS = 8
MEMBERS: dict[str, dict[str, Any]] = {
    "one": {"r": 4}, "two": {"r": 3, "targets": ("q_proj", "v_proj", "up_proj")}, "three": {"r": 4, "use_rslora": True},
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "dense": {},
    "layerwise": {"layerwise_scalings": True, "xlora_depth": 2},
    "deep-top-2": {"layerwise_scalings": True, "xlora_depth": 3, "top_k_lora": 2, "softmax_temperature": 0.5},
    "softmax-topk": {
        "layerwise_scalings": True, "top_k_lora": 2, "enable_softmax": False, "enable_softmax_topk": True,
        "global_scaling_weight": 1.3,
    },
    "no-softmax": {"enable_softmax": False, "global_scaling_weight": 0.5},
    "scaled-pass": {"scaling_pass_value": 0.4, "layerwise_scalings": True},
}  # fmt: skip


@dataclass(frozen=True)
class TestedMix:
    __test__ = False

    folder: Path
    oracle: Any

    def core(self, adapted: AdaptedModel, **settings: Any) -> EngineCore:
        return make_core(adapted, **{"adapters": "", "xlora": str(self.folder), **settings})
