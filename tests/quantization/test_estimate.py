"""Estimates from headers, against the models that are then loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.fakes.tiny_models import write_tiny_llama
from tests.models.test_quantized_checkpoint import CASES, compressed, write_quantized
from trident_llm.config import EngineConfig
from trident_llm.engine.loading import load_model
from trident_llm.errors import BadRequest
from trident_llm.kernels.triton_language import TritonLanguageKernels
from trident_llm.models import checkpoint, llama
from trident_llm.quantization.estimate import estimate_memory
from trident_llm.quantization.scheme import METHOD_BITS

CALIBRATION = {"isq_calibration_samples": 4, "isq_calibration_length": 32}
COMMON: dict[str, Any] = {"device": "cpu", "isq_cache": False, **CALIBRATION}
TOLERANCE = 0.005
UNEVEN = {"hidden": 160, "heads": 5, "kv_heads": 1, "intermediate_size": 416, "vocab": 301}
"""Sizes that fill no layout's panels of outputs and blocks of inputs."""
SETTINGS: tuple[dict[str, Any], ...] = (
    {},
    *({"isq_method": method} for method in METHOD_BITS),
    *({"isq_method": "rtn", "isq_bits": bits} for bits in METHOD_BITS["rtn"][1:]),
    {"isq_method": "rtn", "isq_bits": 6, "isq_group_size": "channel"},
    {"isq_method": "rtn", "isq_bits": 8, "isq_layers": "1=rtn:4:32; lm_head=none"},
    {"isq_method": "rtn", "isq_layers": "0=smoothquant; lm_head=fp8"},
)


def loaded(config: EngineConfig) -> tuple[int, int]:
    """Bytes before and after, of the model in memory."""
    model = load_model(config, lambda text: None)
    return model.weights_bytes_before, model.weights_bytes_after


def check(config: EngineConfig, gpu_memory: int | None = None) -> None:
    found = estimate_memory(config, gpu_memory)
    before, after = loaded(config)
    assert found.before == before and found.after == pytest.approx(after, rel=TOLERANCE)


@pytest.fixture(params=[None, 80 << 30], ids=["cpu", "gpu"])
def gpu_memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int | None:
    """Of the device whose layouts models that are loaded on the CPU get."""
    if request.param is not None:
        kernels = TritonLanguageKernels(num_processors=1, pdl=False)
        monkeypatch.setattr(llama, "kernels_for", lambda device: kernels)
    return request.param


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: "-".join(map(str, settings.values())) or "none")
def test_what_is_loaded(
    tmp_path: Path, settings: dict[str, Any], tied: bool, dtype: str, gpu_memory: int | None
) -> None:
    model = write_tiny_llama(tmp_path, tie_word_embeddings=tied, attention_bias=True, **UNEVEN)
    check(EngineConfig(model=str(model), dtype=dtype, **COMMON, **settings), gpu_memory)


@pytest.mark.parametrize("case", sorted(CASES.keys() - {"gptq-ordered"}))
def test_quantized_checkpoints(tmp_path: Path, case: str, gpu_memory: int | None) -> None:
    folders = write_quantized(tmp_path, *CASES[case], **UNEVEN)
    check(EngineConfig(model=str(folders.quantized), dtype="bf16", **COMMON), gpu_memory)


def test_float8_weights_alone_are_loaded_dequantized(tmp_path: Path, gpu_memory: int | None) -> None:
    def store(module: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        scales = weight.abs().amax(1, keepdim=True) / 448
        codes = (weight / scales).to(torch.float8_e4m3fn)
        return {"weight": codes, "weight_scale": scales}, codes.float() * scales

    config = compressed({"num_bits": 8, "type": "float", "strategy": "channel"})
    folders = write_quantized(tmp_path, config, store, **UNEVEN)
    check(EngineConfig(model=str(folders.quantized), dtype="bf16", **COMMON), gpu_memory)


def test_scales_keep_their_size_when_the_model_runs(tmp_path: Path) -> None:
    """On a CPU the first run in bf16 brings those of 4-bit planes into the form that its operator reads."""
    folder = write_tiny_llama(tmp_path, **UNEVEN)
    decoder = load_model(EngineConfig(model=str(folder), dtype="bf16", isq_method="rtn", **COMMON), print).decoder
    before = decoder.num_bytes
    for adaptable in decoder.adaptable_linears():
        adaptable.linear(torch.zeros(1, adaptable.num_inputs, dtype=decoder.dtype))
    assert decoder.num_bytes == before


def test_smollm2(smollm2_gguf: Path) -> None:
    """Two of the layers in 4 bits, which does not take as long as all."""
    check(EngineConfig(model=str(smollm2_gguf), dtype="bf16", isq_layers="3-4=rtn:4; 5=rtn:8", **COMMON))
    config = EngineConfig(model=str(smollm2_gguf), dtype="bf16", isq_method="rtn", **COMMON)
    groups = {group.name: group for group in estimate_memory(config, None).groups}
    assert groups["embedding"].after == groups["embedding"].before == 49152 * 576 * 2
    assert groups["mlp"].after == pytest.approx(groups["mlp"].before * 4.5 / 16, rel=0.01)


def test_no_weights_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> torch.Tensor:
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(checkpoint.SafetensorsCheckpoint, "read", refuse)
    for folder in (write_quantized(tmp_path, *CASES["awq"]).quantized, tmp_path / "dense"):
        assert estimate_memory(EngineConfig(model=str(folder), **COMMON), None).after > 0


def test_config_alone_is_enough(tmp_path: Path) -> None:
    folder = write_tiny_llama(tmp_path)
    config = EngineConfig(model=str(folder), isq_method="rtn", **COMMON)
    whole = estimate_memory(config, None)
    (folder / "model.safetensors").unlink()
    assert estimate_memory(config, None) == whole


def mistral() -> str:
    return str(Path(__file__).parents[2] / "load_tests" / "models" / "mistral-7b")


def test_mistral_on_a_gpu() -> None:
    """The layout of the kernels in the Triton language: 4 bits and 4 bytes for a group of 128; 8 bits for the head."""
    config = EngineConfig(model=mistral(), isq_method="rtn", dtype="bf16")
    found = estimate_memory(config, 80 << 30)
    groups = {group.name: group for group in found.groups}
    assert found.before == pytest.approx(14.48e9, rel=0.01)
    assert groups["attention"].after == 32 * (4096 * 6144 + 4096 * 4096) * 17 // 32
    assert groups["head"].after == pytest.approx(32000 * 4096 * 1.03, rel=0.01)
    assert found.after / found.before < 0.29
    assert found.kv_bytes_per_token == 128 << 10 and found.kv_tokens is not None
    assert 64 << 30 < found.kv_tokens * found.kv_bytes_per_token < 68 << 30
    small = estimate_memory(EngineConfig(model=mistral(), dtype="bf16"), 8 << 30)
    assert small.kv_room == 0 and small.kv_tokens == 0


@pytest.mark.parametrize(
    "change",
    [
        lambda config: config.update(isq_method="rtn", isq_bits=3),
        lambda config: config.update(isq_method="rtn", isq_max_loss=0.05),
    ],
)
def test_refused(tmp_path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    settings: dict[str, Any] = {"model": str(write_tiny_llama(tmp_path)), **COMMON}
    change(settings)
    with pytest.raises(BadRequest, match="isq_"):
        estimate_memory(EngineConfig(**settings), None)


def test_result_is_json(tmp_path: Path) -> None:
    found = estimate_memory(EngineConfig(model=str(write_tiny_llama(tmp_path)), **COMMON), 1 << 30)
    assert json.loads(json.dumps(found.to_dict()))["weights_bytes_before"] == found.before
