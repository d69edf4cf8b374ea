"""Exported folders: read back they are the same weights, and transformers computes the same logits with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.fakes.tiny_gguf import write_tiny_gguf
from tests.fakes.tiny_models import write_tiny_llama
from tests.models.test_quantized_checkpoint import decoder_of, expected_logits, logits_of, reader_of
from trident_llm.config import EngineConfig
from trident_llm.errors import BadRequest
from trident_llm.kernels.quantized_weight import QuantizedWeight, stack
from trident_llm.models.config_reader import read_model_config
from trident_llm.models.quantized_layouts import pack_fields, unpack_fields
from trident_llm.models.source import resolve_model
from trident_llm.quantization import export
from trident_llm.quantization.cache import CachedParameters
from trident_llm.quantization.modules import model_modules

FAST = {"isq_calibration_samples": 4, "isq_calibration_length": 32, "dtype": "fp32", "device": "cpu"}
SETTINGS: dict[str, dict[str, Any]] = {
    "rtn-4": {"isq_method": "rtn", "isq_bits": 4},
    "rtn-5-channel": {"isq_method": "rtn", "isq_bits": 5, "isq_group_size": "channel"},
    "rtn-8": {"isq_method": "rtn", "isq_bits": 8, "isq_group_size": "32"},
    "awq": {"isq_method": "awq"},
    "gptq-6": {"isq_method": "gptq", "isq_bits": 6},
    "smoothquant": {"isq_method": "smoothquant"},
    "fp8": {"isq_method": "fp8"},
    "rules": {"isq_method": "rtn", "isq_layers": "0=rtn:8; .*down_proj=smoothquant; .*1.self_attn.o_proj=none"},
}
READ_BY_TRANSFORMERS = {"rtn-8": 1e-3, "smoothquant": 0.03, "fp8": 0.03}
"""With symmetric weights: transformers gives packed zero points the wrong shape. The norm of the difference in logits
over theirs, which is that of the inputs' rounding: compressed-tensors takes 127.5 steps where we take 127."""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "trident" / "quantized"


def quantized_parameters(cache: Path) -> dict[str, Any]:
    (folder,) = (path for path in cache.iterdir() if path.is_dir())
    return dict(CachedParameters(folder).parameters(torch.device("cpu")))


def check_round_trip(folder: Path, cache: Path) -> None:
    """Every weight comes back to the bit, every other parameter with its values."""
    reader, made = reader_of(folder), quantized_parameters(cache)
    for module in model_modules(read_model_config(resolve_model(str(folder)))):
        parts = [reader.read_stored(f"{part}.weight") for part in module.parts]
        expected = made.pop(f"{module.name}.weight", None)
        if not isinstance(expected, QuantizedWeight):
            assert all(isinstance(part, torch.Tensor) for part in parts)
            continue
        actual = stack([part for part in parts if isinstance(part, QuantizedWeight)])
        assert actual.same_format(expected)
        for field in ("codes", "scales", "zero_points"):
            ours, theirs = getattr(actual, field), getattr(expected, field)
            if field != "zero_points" or expected.activations != "fp8":
                assert ours.dtype == theirs.dtype and torch.equal(ours.float(), theirs.float()), (module.name, field)
    for name, value in made.items():
        if isinstance(value, torch.Tensor) and name in reader.shapes:
            assert torch.equal(reader.read(name), value), name


def check_logits(folder: Path, tolerance: float) -> None:
    actual, expected = logits_of(decoder_of(folder)), expected_logits(folder)
    assert (actual - expected).norm() < tolerance * expected.norm()


@pytest.mark.parametrize("case", SETTINGS)
def test_comes_back_the_same(tmp_path: Path, cache: Path, case: str) -> None:
    model = write_tiny_llama(tmp_path / "model")
    out = tmp_path / "new" / "quantized"
    config = EngineConfig(model=str(model), **FAST, **{"isq_layers": "lm_head=none", **SETTINGS[case]})
    report = export.quantize_to_folder(config, out, lambda text: None)
    assert report.average_bits < 16
    assert (out / "tokenizer.json").is_file() and (out / "generation_config.json").is_file()
    check_round_trip(out, cache)
    if case in READ_BY_TRANSFORMERS:
        check_logits(out, READ_BY_TRANSFORMERS[case])


def test_tied_head_in_8_bits_is_a_weight_of_its_own(tmp_path: Path, cache: Path) -> None:
    model = write_tiny_llama(tmp_path / "model", tie_word_embeddings=True)
    config = EngineConfig(model=str(model), isq_method="rtn", isq_bits=8, **FAST)
    export.quantize_to_folder(config, tmp_path / "out", lambda text: None)
    fields = json.loads((tmp_path / "out" / "config.json").read_text())
    assert fields["tie_word_embeddings"] is False and "lm_head" not in fields["quantization_config"]["ignore"]
    check_logits(tmp_path / "out", READ_BY_TRANSFORMERS["rtn-8"])


def test_from_gguf(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """config.json is made of the file's metadata, and the tokenizer is the converted one."""
    folder = write_tiny_llama(tmp_path / "model")
    path = write_tiny_gguf(folder, tmp_path / "tiny.gguf")
    monkeypatch.setattr(export, "prepare_tokenizer", lambda source, progress: folder)
    config = EngineConfig(model=str(path), isq_method="rtn", isq_bits=8, isq_layers="lm_head=none", **FAST)
    export.quantize_to_folder(config, tmp_path / "out", lambda text: None)
    check_round_trip(tmp_path / "out", cache)
    assert read_model_config(resolve_model(str(tmp_path / "out"))).rope_theta == 10000.0
    check_logits(tmp_path / "out", READ_BY_TRANSFORMERS["rtn-8"])


def test_shards(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "_SHARD_BYTES", 50_000)
    config = EngineConfig(model=str(write_tiny_llama(tmp_path / "model")), isq_method="rtn", **FAST)
    export.quantize_to_folder(config, tmp_path / "out", lambda text: None)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(files) > 2 and set(index["weight_map"].values()) == {path.name for path in files}
    assert index["metadata"]["total_size"] == sum(t.nbytes for path in files for t in load_file(path).values())
    check_round_trip(tmp_path / "out", cache)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"isq_method": "none"}, "isq_method: none"),
        ({"isq_method": "rtn", "isq_cache": False}, "isq_cache"),
        ({"isq_method": "smoothquant", "isq_bits": 4}, "isq_bits"),
    ],
)
def test_refused(tmp_path: Path, settings: dict[str, Any], words: str) -> None:
    config = EngineConfig(model=str(write_tiny_llama(tmp_path / "model")), **FAST, **settings)
    with pytest.raises(BadRequest, match=words):
        export.quantize_to_folder(config, tmp_path / "out", lambda text: None)
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    with pytest.raises(BadRequest, match="--out"):
        export.quantize_to_folder(config, tmp_path / "out", lambda text: None)


@pytest.mark.parametrize("bits", [4, 5, 6, 8])
def test_fields_without_gaps(bits: int) -> None:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    for count in (1, 31, 32, 33, 576):
        codes = torch.randint(0, 2**bits, (5, count), dtype=torch.uint8)
        packed = pack_fields(codes, bits)
        assert torch.equal(unpack_fields(packed, bits, count), codes)
        assert torch.equal(packed, pack_to_int32((codes.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8), bits))
