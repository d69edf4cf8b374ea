"""Adapters, a mix and other weights under them through the real server: settings, admin commands, options and outputs,
with the client."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.peft_adapters import greedy, write_adapter
from tests.fakes.peft_mixes import greedy_without_cache, write_mix
from tests.fakes.tiny_models import write_tiny_llama
from tests.live.serving import serving
from trident_client import BadRequest, Completion, NotFound, TridentClient
from trident_client.cli import main
from trident_llm import Engine, EngineConfig
from trident_llm.text import Tokenizer

pytestmark = pytest.mark.live

PROMPT = "Hello"


@dataclass(frozen=True)
class Served:
    url: str
    folder: Path
    """Of the base model."""
    expected: dict[str, list[int]]
    """PEFT's tokens after PROMPT: of the base, of adapters a and b, of the mix."""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    import torch
    from transformers import AutoModelForCausalLM

    root = tmp_path_factory.mktemp("adapters")
    folder = write_tiny_llama(root / "base")
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    oracles = {name: write_adapter(base, root / name, seed=seed) for seed, name in enumerate("ab")}
    mix = write_mix(base, root / "mix", {"one": {"r": 2}, "two": {"r": 3}}, layerwise_scalings=True)
    prompt_ids = Tokenizer(folder).encode(PROMPT, add_special_tokens=True)
    expected = {name: greedy(model, prompt_ids, 8) for name, model in {"base": base, **oracles}.items()}
    expected["mix"] = greedy_without_cache(mix, prompt_ids, 8)
    settings = {
        "device": "cpu", "dtype": "fp32", "num_threads": 1, "max_num_blocks": 256, "max_lora_rank": 8,
        "adapters": f"a={root / 'a'}", "xlora": root / "mix", "adapter_root": root,
    }  # fmt: skip
    arguments = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    with serving(tmp_path_factory.mktemp("serve"), "--model", str(folder), "--no-sample", *arguments) as server:
        yield Served(f"127.0.0.1:{server.ports.grpc}", folder, expected)


def answer(client: TridentClient, **options: Any) -> Completion:
    return client.generate(PROMPT, stream=False, max_tokens=8, temperature=0, ignore_eos=True, **options)


def tokens_of(client: TridentClient, **options: Any) -> list[int]:
    entries = answer(client, logprobs=0, **options).samples[0].logprobs
    assert entries is not None
    return [int(next(iter(entry))) for entry in entries]


def test_requests_choose(served: Served) -> None:
    with TridentClient(served.url) as client:
        mixed = answer(client, return_scalings=True, return_layer_scalings=True)
        assert mixed.samples[0].scalings is not None and set(mixed.samples[0].scalings) == {"one", "two"}
        assert sum(mixed.samples[0].scalings.values()) == pytest.approx(1, abs=1e-4)
        assert tokens_of(client, xlora=False) == served.expected["base"]
        assert tokens_of(client, adapter="a") == served.expected["a"]
        assert tokens_of(client) == served.expected["mix"]


def test_adapters_come_and_go(served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    url = ["--url", served.url]
    assert main(["adapters", "load", "late", "b", *url]) == 0
    with TridentClient(served.url) as client:
        assert tokens_of(client, adapter="late") == served.expected["b"]
        assert main(["adapters", "list", *url]) == 0
        assert main(["adapters", "unload", "late", *url]) == 0
        with pytest.raises(NotFound, match="adapter: 'late' is not loaded; loaded: a, one, two, xlora"):
            answer(client, adapter="late")
        with pytest.raises(BadRequest, match="lies outside adapter_root"):
            client.load_adapter("late", "/etc")
    shown = capsys.readouterr().out
    assert "loaded late" in shown and "mix xlora: one, two" in shown


def test_a_picture_of_the_mix(served: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "routing.png"
    arguments = ["--url", served.url, "--max-tokens", "4", "--ignore-eos", "--out", str(path)]
    assert main(["xlora", "show", PROMPT, *arguments]) == 0
    assert path.read_bytes().startswith(b"\x89PNG")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["one", "two"] and len(lines) == 1 + 4 + 1 + 1


def test_other_weights_under_a_stream_and_after_a_kill(served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    """Last, for adapters' tokens are others then."""
    url = ["--url", served.url]
    long = {"max_tokens": 120, "temperature": 0, "ignore_eos": True, "xlora": False}
    config = EngineConfig(
        model=str(served.folder), device="cpu", dtype="fp32", num_threads=1, max_num_blocks=256, isq_method="rtn",
        isq_cache=False,
    )  # fmt: skip
    with Engine(config) as engine:
        (expected,) = engine.generate(PROMPT, stream=False, **{**long, "xlora": None})
    with TridentClient(served.url) as client:
        old = client.generate(PROMPT, stream=False, **long).text
        stream = client.generate(PROMPT, **long)
        text = next(stream).text
        with pytest.raises(BadRequest, match="isq_bits: smoothquant has no 4 bits"):
            client.requantize({"isq_method": "smoothquant", "isq_bits": 4})
        assert main(["requantize", "--method", "rtn", "--set", "isq_cache=false", *url]) == 0
        assert text + "".join(chunk.text for chunk in stream) == old
        assert client.generate(PROMPT, stream=False, **long).text == expected.text != old
        adapted, stats = tokens_of(client, adapter="a"), client.stats()
        assert stats["isq_method"] == "rtn" and adapted != served.expected["a"]
        memory = stats["memory"]
        assert memory["weights_bytes_after"] < memory["weights_bytes_before"]

        os.kill(stats["pid"], signal.SIGKILL)
        deadline = time.monotonic() + 60
        while not client.is_ready():
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert client.generate(PROMPT, stream=False, **long).text == expected.text
        assert tokens_of(client, adapter="a") == adapted
        stats = client.stats()
        assert stats["isq_method"] == "rtn" and stats["memory"] == memory
        assert client.jobs() == []
    assert "bits a weight" in capsys.readouterr().out
