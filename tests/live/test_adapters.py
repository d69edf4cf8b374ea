"""Adapters, a mix and other weights under them through the real server: settings, admin commands, options and outputs,
with the client."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.broken_adapters import REFUSED
from tests.fakes.engine_runs import wait_until
from tests.fakes.peft_adapters import greedy, write_adapter
from tests.fakes.peft_mixes import greedy_without_cache, write_mix
from tests.fakes.tiny_models import write_tiny_llama
from tests.live.requests import EventStream, GrpcStream, generate, post
from tests.live.serving import Serving, serving
from tests.live.tensor_stream import TensorStream, inputs_of
from trident_client import BadRequest, Completion, NotFound, TridentClient
from trident_client.cli import main
from trident_client.metrics_text import parse_metrics
from trident_llm import Engine, EngineConfig
from trident_llm.text import Tokenizer

pytestmark = pytest.mark.live

PROMPT = "Hello"


@dataclass(frozen=True)
class Served:
    server: Serving
    url: str
    metrics_url: str
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
        yield Served(server, server.grpc_url, server.metrics_url, folder, expected)


def answer(client: TridentClient, **options: Any) -> Completion:
    return client.generate(PROMPT, stream=False, max_tokens=8, temperature=0, ignore_eos=True, **options)


def tokens_of(client: TridentClient, **options: Any) -> list[int]:
    entries = answer(client, logprobs=0, **options).samples[0].logprobs
    assert entries is not None
    return [int(next(iter(entry))) for entry in entries]


def usage(served: Served) -> dict[str, tuple[float, float]]:
    """Requests and generated tokens by adapter, from the metrics."""
    with urllib.request.urlopen(served.metrics_url, timeout=10) as response:
        adapters = parse_metrics(response.read().decode(), 0.0).adapters
    names = ("adapter_requests_total", "adapter_generated_tokens_total")
    return {adapter: (values[names[0]], values[names[1]]) for adapter, values in adapters.items()}


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
        wait_until(lambda: usage(served).get("late") == (0, 0))
        before = {name: tuple(used.values()) for name, used in client.stats()["adapter_usage"].items()}
        assert before.keys() == {"a", "one", "two", "xlora", "late", "_other"}
        assert tokens_of(client, adapter="late") == served.expected["b"]
        wait_until(lambda: usage(served) == {**before, "late": (1, 8)})
        assert main(["top", "--once", "--interval", "0.1", "--metrics-url", served.metrics_url, *url]) == 0
        assert main(["adapters", "list", *url]) == 0
        assert main(["adapters", "unload", "late", *url]) == 0
        del before["late"]
        wait_until(lambda: usage(served) == before)
        with pytest.raises(NotFound, match="adapter: 'late' is not loaded; loaded: a, one, two, xlora"):
            answer(client, adapter="late")
        with pytest.raises(BadRequest, match="lies outside adapter_root"):
            client.load_adapter("late", "/etc")
    shown = capsys.readouterr().out
    assert "loaded late" in shown and "mix xlora: one, two" in shown
    assert re.search(r"(?m)^adapter +requests/s +tokens/s +users +slot$", shown)
    assert re.search(r"(?m)^late +0.0 +0.0 +0 +\d$", shown) and re.search(r"(?m)^xlora +0.0 +0.0 +- +-$", shown)


def test_a_picture_of_the_mix(served: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "routing.png"
    arguments = ["--url", served.url, "--max-tokens", "4", "--ignore-eos", "--out", str(path)]
    assert main(["xlora", "show", PROMPT, *arguments]) == 0
    assert path.read_bytes().startswith(b"\x89PNG")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["one", "two"] and len(lines) == 1 + 4 + 1 + 1


def test_vllm_backends_name_of_the_option(served: Served) -> None:
    greedy_options = {"max_tokens": "8", "temperature": "0", "ignore_eos": True, "logprobs": 0}
    with TensorStream(served.server) as connection:

        def ask(**options: Any) -> Any:
            return connection.answer(inputs_of(PROMPT, {**greedy_options, **options}, return_logprobs=True))

        for options, expected in (({"lora_name": "a"}, "a"), ({"xlora": False}, "base"), ({}, "mix")):
            rows = json.loads(ask(**options).text("logprobs"))
            assert [int(next(iter(row))) for row in rows] == served.expected[expected]
        unknown, twice = ask(lora_name="bactrian").error, ask(lora_name="a", adapter="a").error
    assert "[NOT_FOUND] adapter: 'bactrian' is not loaded; loaded: a, one, two, xlora" in unknown.message()
    assert twice.message().endswith("'a': given under its other name, too; give one of them")


def check_refused(served: Served, path: str, error: type[Exception], reason: str) -> None:
    """On both ways to llm_admin, under a new name and under one that is taken; nothing has changed then."""
    with TridentClient(served.url) as client:
        before = client.list_adapters()
        for name in ("new", "a"):
            arguments = json.dumps({"name": name, "path": path})
            answer = post(served.server, "/v2/models/llm_admin/generate", command="load_adapter", arguments=arguments)
            assert answer.status >= 400 and re.search(f"adapter '{name}': .*{reason}", answer.body["error"])
            with pytest.raises(error, match=f"adapter '{name}': .*{reason}"):
                client.load_adapter(name, path)
        assert client.list_adapters() == before
        assert tokens_of(client, adapter="a") == served.expected["a"]


@pytest.mark.parametrize("case", REFUSED)
def test_broken_adapters_change_nothing(served: Served, case: str) -> None:
    spoil, error, reason = REFUSED[case]
    folder = served.folder.parent / f"broken-{case}"
    shutil.copytree(served.folder.parent / "a", folder)
    spoil(folder)
    check_refused(served, folder.name, NotFound if error.code == "NOT_FOUND" else BadRequest, reason)


def test_adapters_outside_the_root_change_nothing(served: Served, tmp_path: Path) -> None:
    root = served.folder.parent
    outside = tmp_path / "outside"
    shutil.copytree(root / "a", outside)
    (root / "link").symlink_to(outside)
    shutil.copytree(root / "a", root / "half")
    (root / "half/adapter_model.safetensors").unlink()
    (root / "half/adapter_model.safetensors").symlink_to(outside / "adapter_model.safetensors")
    for path in (str(outside), f"../{root.name}/../..", "link", "/etc"):
        check_refused(served, path, BadRequest, "lies outside adapter_root")
    check_refused(served, "half", BadRequest, "adapter_model.safetensors is a link to outside adapter_root")
    check_refused(served, "nothing", NotFound, "'nothing' is no folder below adapter_root")


BAD_OPTIONS = {
    "unknown": ({"adapter": "nobody"}, "[NOT_FOUND] adapter: 'nobody' is not loaded; loaded: a, one, two, xlora"),
    "unknown in a blend": ({"adapter": "a:0.5,nobody:0.5"}, "[NOT_FOUND] adapter: 'nobody' is not loaded; loaded: a, "),
    "mix in a blend": (
        {"adapter": "a:0.5,xlora:0.5"}, "[INVALID_ARG] adapter: 'xlora' is an X-LoRA mix, which cannot be part of a ",
    ),
    "more than there are": ({"xlora_top_k": 9}, "[INVALID_ARG] xlora_top_k: 9 is more than the 2 adapters of 'xlora'"),
    "no mix": (
        {"adapter": "a", "xlora_temperature": 2}, "[INVALID_ARG] xlora_temperature: this request takes no X-LoRA mix",
    ),
}  # fmt: skip


@pytest.mark.parametrize("door", ["llm", "llm_vllm"])
@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_adapters_that_a_request_cannot_have(served: Served, door: str, case: str) -> None:
    options, error = BAD_OPTIONS[case]
    answer = generate(served.server, door, PROMPT, **options)
    assert answer.status >= 400 and answer.body["error"].startswith(error)
    (event,) = EventStream(served.server, door, PROMPT, **options).events()
    assert event["error"].startswith(error)
    with GrpcStream(served.server, door) as stream, TridentClient(served.url) as client:
        stream.submit(PROMPT, stream=True, **options)
        assert stream.next().error.startswith(error)
        assert tokens_of(client, adapter="a") == served.expected["a"]


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

        requests, tokens = stats["adapter_usage"]["a"].values()
        wait_until(lambda: usage(served)["a"] == (requests, tokens))
        os.kill(stats["pid"], signal.SIGKILL)
        deadline = time.monotonic() + 60
        while not client.is_ready():
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert client.generate(PROMPT, stream=False, **long).text == expected.text
        assert tokens_of(client, adapter="a") == adapted
        wait_until(lambda: usage(served)["a"] == (requests + 1, tokens + 8))
        stats = client.stats()
        assert stats["isq_method"] == "rtn" and stats["memory"] == memory
        assert client.jobs() == []
    assert "bits a weight" in capsys.readouterr().out
