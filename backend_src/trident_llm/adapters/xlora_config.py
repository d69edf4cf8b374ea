"""XLoraConfig: what xlora_config.json says about a mix of adapters (X-LoRA, Buehler and Buehler 2024).

In the formats of the xlora package and of PEFT.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import BadRequest, NotFound
from .lora_config import CONFIG_FILE, read_json_object
from .spec import check_name

XLORA_CONFIG_FILE = "xlora_config.json"
CLASSIFIER_FILE = "xlora_classifier.safetensors"


@dataclass(frozen=True)
class XLoraConfig:
    adapters: tuple[str, ...]
    """Names of the members, in the order of the classifier's outputs."""
    hidden_size: int
    depth: int
    """Linear layers of the classifier."""
    size: int
    """Width between them."""
    relu: bool
    """Whether ReLU stands between them."""
    layerwise: bool
    """Whether every module has scalings of its own."""
    softmax: bool
    softmax_topk: bool
    """Whether the kept scalings go through a softmax once more."""
    temperature: float
    top_k: int
    """0: all."""
    pass_scaling: float
    """Scaling of all members while the classifier's input is computed."""
    global_weight: float


def config_path(folder: Path) -> Path:
    """The xlora package writes xlora_config.json; PEFT writes adapter_config.json."""
    return folder / (XLORA_CONFIG_FILE if (folder / XLORA_CONFIG_FILE).is_file() else CONFIG_FILE)


def member_folder(folder: Path, name: str, what: str) -> Path:
    """Where a member lies: adapters/NAME, or NAME. Raises ``NotFound``."""
    for candidate in (folder / "adapters" / name, folder / name):
        if (candidate / CONFIG_FILE).is_file():
            return candidate
    raise NotFound(f"{what}: no folder adapters/{name} with an {CONFIG_FILE}")


def read_xlora_config(folder: Path, what: str) -> XLoraConfig:
    """Raises ``NotFound`` or ``BadRequest`` that begins with ``what``."""
    path = config_path(folder)
    values = read_json_object(path, what)
    if path.name == CONFIG_FILE and values.get("peft_type") != "XLORA":
        raise BadRequest(f"{what}: peft_type {values.get('peft_type')!r} is no X-LoRA model; allowed: XLORA")
    try:
        return _parse(values)
    except (TypeError, ValueError, AttributeError) as error:
        raise BadRequest(f"{what}: {path.name}: {error}") from None


def _parse(values: dict[str, Any]) -> XLoraConfig:
    adapters = values.get("adapters")
    if not isinstance(adapters, (dict, list)) or len(adapters) < 1:
        raise ValueError("adapters names no members")
    if values.get("use_mean_pool"):
        raise ValueError("use_mean_pool is not supported: its scalings depend on later tokens")
    config = XLoraConfig(
        adapters=tuple(check_name(name) for name in adapters),
        hidden_size=_integer(values, "hidden_size", None),
        depth=_integer(values, "xlora_depth", 1),
        size=_integer(values, "xlora_size", 2048),
        relu=bool(values.get("enable_relu_and_dropout", True)),
        layerwise=bool(values.get("layerwise_scalings", False)),
        softmax=bool(values.get("enable_softmax", True)),
        softmax_topk=bool(values.get("enable_softmax_topk", False)),
        temperature=_number(values, "softmax_temperature", 1.0),
        top_k=_integer(values, "top_k_lora", 0) if values.get("top_k_lora") is not None else 0,
        pass_scaling=_number(values, "scaling_pass_value", 0.0),
        global_weight=_number(values, "global_scaling_weight", 1.0),
    )
    if config.temperature <= 0:
        raise ValueError(f"softmax_temperature {config.temperature} is not greater than 0")
    if not 0 <= config.top_k <= len(config.adapters):
        raise ValueError(f"top_k_lora {config.top_k} is more than the {len(config.adapters)} adapters")
    return config


def _integer(values: dict[str, Any], key: str, default: int | None) -> int:
    value = values.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        if value == default == 0:
            return 0
        raise ValueError(f"{key} is {value!r}, not an integer of at least 1")
    return value


def _number(values: dict[str, Any], key: str, default: float) -> float:
    value = values.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{key} is {value!r}, not a number")
    return float(value)
