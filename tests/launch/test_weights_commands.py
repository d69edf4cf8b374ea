"""``trident quantize`` and ``trident estimate`` as a shell calls them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.fakes.tiny_models import write_tiny_llama
from tests.models.test_quantized_checkpoint import reader_of
from trident_client.cli import main
from trident_llm.kernels.quantized_weight import QuantizedWeight


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return str(write_tiny_llama(tmp_path / "model"))


def test_quantize(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    arguments = ["quantize", model, "--method", "rtn", "--bits", "8", "--group-size", "32", "--out", str(out)]
    assert main([*arguments, "--set", "device=cpu", "--set", "isq_layers=0=rtn:4"]) == 0
    assert f"wrote {out}" in capsys.readouterr().out
    weights = [reader_of(out).read_stored(f"model.layers.{layer}.mlp.up_proj.weight") for layer in range(2)]
    assert [weight.bits for weight in weights if isinstance(weight, QuantizedWeight)] == [4, 8]
    assert not isinstance(reader_of(out).read_stored("lm_head.weight"), QuantizedWeight)
    assert main([*arguments, "--set", "device=cpu"]) == 2
    assert "it exists already" in capsys.readouterr().err


def test_estimate(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", model, "--method", "rtn", "--gpu-memory", "1.5GiB"]) == 0
    text = capsys.readouterr().out
    words = ("embedding", "attention", "mlp", "norms", "head", "total", "1.5 GiB", "tokens")
    assert all(word in text for word in words)
    assert main(["estimate", model, "--json", "--set", "device=cpu"]) == 0
    assert json.loads(capsys.readouterr().out)["device"] == "cpu"


def test_estimate_of_streams(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["estimate", model, "--gpu-memory", "1.5GiB", "--stream-tokens", "40", "--set", "dtype=bf16"]
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["streams"] == found["kv_tokens"] // 48 and found["stream_tokens"] == 40
    assert found["kv_tokens"] == found["kv_room"] // found["kv_bytes_per_token"]
    assert main([*arguments, "--set", "max_num_seqs=9"]) == 0
    text = capsys.readouterr().out.splitlines()[-1]
    match = re.fullmatch(r"streams of 40 tokens: ([\d,]+) / \(16 x ceil\(40 / 16\)\) = ([\d,]+) at once, .*", text)
    assert match and text.endswith("max_num_seqs lets 9 run")
    assert int(match[1].replace(",", "")) // 48 == int(match[2].replace(",", ""))
    assert main(["estimate", model, "--stream-tokens", "40", "--set", "device=cpu"]) == 2
    assert "--gpu-memory" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--gpu-memory", "1GiB", "--stream-tokens", "0"], "--stream-tokens: 0"),
        (["--gpu-memory", "1GiB", "--stream-tokens", "100000000"], "--stream-tokens: 100000000"),
        (["--gpu-memory", "much"], "--gpu-memory 'much'"),
        (["--gpu-memory", "0"], "--gpu-memory '0'"),
        (["--method", "rtn", "--set", "isq_method=awq"], "--method and --set isq_method"),
        (["--set", "dtype=bf16", "--set", "dtype=fp32"], "--set dtype: given twice"),
        (["--set", "isq_metod=awq"], "unknown setting 'isq_metod'"),
        (["--method", "rtn", "--bits", "3"], "isq_bits"),
    ],
)
def test_bad_arguments(model: str, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str) -> None:
    assert main(["estimate", model, *arguments]) == 2
    assert words in capsys.readouterr().err


def test_unknown_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", "/no/such/folder"]) == 1
    assert "no such file or folder" in capsys.readouterr().err
