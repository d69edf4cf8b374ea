"""quantization_config of config.json: what is read, and what is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.tiny_models import write_tiny_llama
from trident_llm.errors import LoadFailed
from trident_llm.models.config_reader import read_model_config
from trident_llm.models.source import resolve_model
from trident_llm.models.stored_quantization import StoredQuantization, WeightFormat

WEIGHTS = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
FP8 = {"num_bits": 8, "type": "float", "strategy": "channel"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("model"))


def read(folder: Path, quantization: Any) -> StoredQuantization | None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": quantization}))
    return read_model_config(resolve_model(str(folder), weights=False)).quantization


def compressed(*groups: dict[str, Any], **fields: Any) -> dict[str, Any]:
    named = {f"group_{index}": {"targets": ["Linear"], **group} for index, group in enumerate(groups)}
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": named, **fields}


def test_formats(folder: Path) -> None:
    assert read(folder, None) is None and read(folder, {}) is None
    awq = read(folder, {"quant_method": "awq", "w_bit": 4, "q_group_size": 128, "version": "GEMM"})
    assert awq == StoredQuantization("awq", (("Linear", WeightFormat(4, "none")),))
    gptq = {"quant_method": "gptq", "bits": 8}
    assert read(folder, gptq) == StoredQuantization("gptq", (("Linear", WeightFormat(8, "none", 1)),))
    found = read(folder, {**gptq, "checkpoint_format": "gptq_v2"})
    assert found is not None and found.format_of("x") == WeightFormat(8, "none", 0)


def test_names_win_over_expressions_and_these_over_classes(folder: Path) -> None:
    bits = [{"weights": {**WEIGHTS, "num_bits": bits}} for bits in (4, 5, 6)]
    groups = (bits[0], {**bits[1], "targets": ["re:.*up_proj"]}, {**bits[2], "targets": ["a.up_proj"]})
    found = read(folder, compressed(*groups))
    assert found is not None
    formats = [found.format_of(name) for name in ("a.up_proj", "b.up_proj", "b.down_proj")]
    assert [form.bits for form in formats if form] == [6, 5, 4]
    only = read(folder, compressed(groups[1]))
    assert only is not None and only.format_of("b.down_proj") is None


def test_activations(folder: Path) -> None:
    int8 = {"weights": {**WEIGHTS, "num_bits": 8}, "input_activations": {"num_bits": 8, "type": "int"}}
    fp8 = {"weights": FP8, "input_activations": FP8}
    kinds = [found.formats[0][1].activations for group in (int8, fp8) if (found := read(folder, compressed(group)))]
    assert kinds == ["int8", "fp8"]


@pytest.mark.parametrize(
    ("quantization", "words"),
    [
        ({"quant_method": "bitsandbytes"}, ["quantization_config.quant_method: 'bitsandbytes'", "awq, gptq"]),
        ({"bits": 4}, ["quantization_config.quant_method: None"]),
        ({"quant_method": "awq", "bits": 3}, ["quantization_config.bits: 3"]),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, ["quantization_config.version: 'gemv'", "gemm"]),
        ({"quant_method": "awq", "bits": 4, "zero_point": False}, ["quantization_config.zero_point: False"]),
        ({"quant_method": "gptq", "bits": 3}, ["quantization_config.bits: 3", "4, 8"]),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, ["checkpoint_format: 'marlin'"]),
        ({"quant_method": "gptq", "bits": 4, "dynamic": {"x": {}}}, ["quantization_config.dynamic"]),
        ({"quant_method": "compressed-tensors"}, ["quantization_config.config_groups: missing"]),
        (compressed({"weights": WEIGHTS}, format="marlin-24"), ["quantization_config.format: 'marlin-24'"]),
        (compressed({"weights": WEIGHTS}, kv_cache_scheme={"num_bits": 8}), ["kv_cache_scheme"]),
        (compressed({"weights": WEIGHTS}, sparsity_config={"format": "sparse"}), ["sparsity_config.format: 'sparse'"]),
        (compressed({}), ["config_groups.group_0.weights: missing"]),
        (compressed({"weights": 3}), ["config_groups.group_0.weights: 3 is not an object"]),
        (compressed({"weights": {**WEIGHTS, "num_bits": 3}}), ["group_0.weights.num_bits: 3", "4, 5, 6, 8"]),
        (compressed({"weights": {**WEIGHTS, "num_bits": True}}), ["group_0.weights.num_bits: True"]),
        (compressed({"weights": {**FP8, "strategy": "block"}}), ["weights.strategy: 'block'"]),
        (compressed({"weights": {**FP8, "num_bits": 4}}), ["weights.num_bits: 4"]),
        (compressed({"weights": WEIGHTS, "targets": "Linear"}), ["group_0.targets: 'Linear'"]),
        (compressed({"weights": WEIGHTS, "targets": ["re:("]}), ["group_0.targets"]),
        (compressed({"weights": WEIGHTS, "input_activations": FP8}), ["input_activations.type"]),
        (
            compressed({"weights": FP8, "input_activations": {**FP8, "symmetric": False}}),
            ["input_activations.symmetric: False"],
        ),
        (compressed({"weights": WEIGHTS, "output_activations": FP8}), ["output_activations"]),
    ],
)
def test_refused_by_name(folder: Path, quantization: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(LoadFailed) as caught:
        read(folder, quantization)
    message = caught.value.message
    assert str(folder / "config.json") in message and all(word in message for word in words), message
