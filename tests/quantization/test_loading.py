"""Quantization as users meet it: through settings, with the CPU's own kernels, the cache and the statistics."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.fakes.tiny_models import write_tiny_llama
from trident_llm import EngineConfig
from trident_llm.engine.engine import EngineCore
from trident_llm.engine.loading import LoadedModel, load_model
from trident_llm.errors import BadRequest, LoadFailed
from trident_llm.quantization.cache import cache_root


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny"))


def settings_of(model: Path, **settings: str) -> EngineConfig:
    fixed = {
        "model": str(model),
        "device": "cpu",
        "dtype": "fp32",
        "num_threads": "1",
        "max_num_blocks": "40",
        "max_model_len": "128",
        "isq_calibration_samples": "6",
        "isq_calibration_length": "64",
    }
    return EngineConfig.from_parameters({**fixed, **settings})


def load(model: Path, **settings: str) -> tuple[LoadedModel, list[str]]:
    lines: list[str] = []
    return load_model(settings_of(model, **settings), lines.append), lines


def weights_of(model: LoadedModel) -> dict[str, Any]:
    layer = model.decoder.layers[1]
    return {"qkv": layer.qkv, "down": layer.down, "head": model.decoder.head}


def products(model: LoadedModel) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        linear(torch.randn(3, 128 if name == "down" else 64, generator=generator))
        for name, linear in weights_of(model).items()
    ]


@pytest.mark.parametrize("method", ["rtn", "awq", "gptq", "smoothquant", "fp8"])
def test_the_second_start_reads_what_the_first_one_kept(folder, method):
    first, lines = load(folder, isq_method=method)
    again, lines_again = load(folder, isq_method=method)
    assert any("quantizing layer 2 of 2" in line for line in lines)
    assert not any("quantizing" in line for line in lines_again)
    assert again.quantization.from_cache and not first.quantization.from_cache
    assert again.quantization.layers == first.quantization.layers
    for one, other in zip(products(first), products(again), strict=True):
        assert torch.equal(one, other)
    scales = [layer.down.input_scales for model in (first, again) for layer in model.decoder.layers]
    if method in ("awq", "smoothquant"):
        assert torch.equal(scales[0], scales[2]) and torch.equal(scales[1], scales[3])
    else:
        assert scales == [None] * 4


@pytest.mark.parametrize(
    "other",
    [
        {"isq_bits": "6"},
        {"isq_layers": "0=rtn:8"},
        {"isq_calibration_samples": "5"},
        {"isq_method": "gptq", "sliding_window": "16"},
    ],
)
def test_other_settings_are_other_content(folder, other):
    load(folder, isq_method="gptq")
    model, _ = load(folder, **{"isq_method": "gptq", **other})
    assert not model.quantization.from_cache


def test_other_weights_are_other_content(tmp_path):
    for seed in (0, 1):
        model, _ = load(write_tiny_llama(tmp_path / "model", seed=seed), isq_method="rtn")
        assert not model.quantization.from_cache


def test_a_checkpoint_that_is_quantized_already_is_refused(tmp_path):
    model_folder = write_tiny_llama(tmp_path / "model")
    path = model_folder / "config.json"
    stored = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": stored}))
    with pytest.raises(BadRequest, match=r"isq_method: rtn, but the model.s weights are quantized already \(awq\)"):
        load(model_folder, isq_method="rtn")


def test_a_damaged_cache_is_made_anew(folder):
    first, _ = load(folder, isq_method="rtn")
    (file,) = cache_root().glob("*/000.safetensors")
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)
    again, lines = load(folder, isq_method="rtn")
    assert not again.quantization.from_cache and any("damaged and made anew" in line for line in lines)
    assert load(folder, isq_method="rtn")[0].quantization.from_cache
    assert torch.equal(products(first)[0], products(again)[0])


def test_without_a_place_for_the_cache_the_model_loads(folder, own_cache):
    own_cache.mkdir(parents=True, exist_ok=True)
    (own_cache / "trident").write_text("in the way")
    model, lines = load(folder, isq_method="rtn")
    assert model.quantization is not None and any("not kept on disk" in line for line in lines)


def test_a_failed_quantization_leaves_nothing_behind(tmp_path):
    model_folder = write_tiny_llama(tmp_path / "model")
    tensors = load_file(model_folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("inf")
    save_file(tensors, model_folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LoadFailed, match=r"model\.layers\.1\.mlp\.gate_up_proj has values that are not finite"):
        load(model_folder, isq_method="rtn")
    assert not list(cache_root().iterdir())


def test_isq_cache_false_keeps_nothing(folder):
    load(folder, isq_method="rtn", isq_cache="false")
    assert not cache_root().exists()


@pytest.mark.parametrize("tied", [False, True])
def test_memory_before_and_after(tmp_path, tied):
    model_folder = write_tiny_llama(tmp_path / "model", hidden=256, vocab=512, tie_word_embeddings=tied)
    config = settings_of(model_folder, isq_method="rtn", isq_bits="8")
    core = EngineCore(config, progress=lambda text: None)
    memory = core.stats()["memory"]
    decoder = core.model.decoder
    embedding, layers = 512 * 256, 2 * (256 * (256 + 256) + 256 * 256 + 3 * 256 * 512)
    assert memory["weights_bytes_before"] == 4 * (embedding * (1 if tied else 2) + layers + 5 * 256)
    assert memory["weights_bytes_after"] == decoder.num_bytes < 0.75 * memory["weights_bytes_before"]
    report = core.stats()["quantization"]
    assert report["average_bits"] == pytest.approx(8 + 16 / 128) and report["peak_bytes"] > 0
    assert report["layers"]["lm_head"].startswith("rtn 8 bits, group 128, error 0.00")
    assert torch.equal(decoder.embedding, decoder.embedding.float()) and decoder.head.weight is not decoder.embedding


def test_max_loss_chooses_bits_and_says_what_it_lost(folder):
    model, lines = load(folder, isq_method="gptq", isq_max_loss="0.05", isq_calibration_samples="16")
    report = model.quantization
    # A random model may even gain.
    assert report.held_out_loss <= 0.05
    assert 4 < report.average_bits < 16
    assert len(report.layers) == 9
    costs = [float(line.split()[3]) for line in lines if line.startswith("held-out text costs")]
    assert report.held_out_loss == pytest.approx(math.expm1(costs[-1]), abs=1e-4), "what was measured, not a bound"
    again, _ = load(folder, isq_method="gptq", isq_max_loss="0.05", isq_calibration_samples="16")
    assert again.quantization.from_cache and again.quantization.held_out_loss == report.held_out_loss


def test_the_search_leaves_alone_what_a_rule_names(folder):
    model, _ = load(
        folder, isq_method="rtn", isq_max_loss="0.05", isq_layers="0=rtn:6; .*o_proj=none", isq_calibration_samples="8"
    )
    layers = model.quantization.layers
    assert not any("o_proj" in name for name in layers)
    assert [text[:10] for name, text in layers.items() if ".layers.0." in name] == ["rtn 6 bits"] * 3


def test_another_context_length_is_no_reason_to_quantize_again(folder):
    load(folder, isq_method="gptq")
    assert load(folder, isq_method="gptq", max_model_len="256")[0].quantization.from_cache


def test_dummy_weights_are_quantized_too(folder):
    model, _ = load(folder, isq_method="awq", load_format="dummy")
    assert model.quantization.average_bits == pytest.approx(4 + 24 / 64)
    assert load(folder, isq_method="awq", load_format="dummy")[0].quantization.from_cache


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"isq_method": "hqq"}, r"isq_method: 'hqq' is not one of rtn, awq, gptq, smoothquant, fp8, none"),
        ({"isq_method": "smoothquant", "isq_bits": "4"}, "isq_bits: smoothquant has no 4 bits"),
        ({"isq_method": "rtn", "isq_group_size": "128"}, "isq_group_size: group size 128 does not divide the 64 inp"),
        ({"isq_method": "rtn", "isq_group_size": "48"}, "isq_group_size: '48' is not one of auto"),
        ({"isq_method": "rtn", "isq_layers": "9=none"}, "isq_layers: rule '9=none' matches no layer"),
        ({"isq_method": "rtn", "isq_calibration": "/nowhere.txt"}, r"isq_calibration: '/nowhere\.txt' cannot be read"),
        ({"isq_max_loss": "0.05"}, "isq_max_loss: 0.05 chooses bits for the layers of isq_method"),
        ({"isq_method": "gptq", "isq_bits": "4", "isq_max_loss": "0.05"}, "isq_max_loss: .* leave isq_bits empty"),
    ],
)
def test_bad_settings_are_refused_before_weights_are_read(folder, monkeypatch, settings, message):
    def no_weights(*args: object, **kwargs: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr("trident_llm.engine.loading.open_weights", no_weights)
    with pytest.raises(BadRequest, match=message):
        load(folder, **settings)


@pytest.mark.parametrize("content", [b"", b"\x89PNG\0\0"])
def test_an_unusable_calibration_file_is_refused_before_weights_are_read(folder, tmp_path, monkeypatch, content):
    monkeypatch.setattr("trident_llm.engine.loading.open_weights", lambda *args, **kwargs: 1 / 0)
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    with pytest.raises(BadRequest, match=r"isq_calibration: '.*text\.txt' is (empty|binary)"):
        load(folder, isq_method="gptq", isq_calibration=str(path))
