"""Other weights under a serving engine: tokens before and after, what waits, what fails, and what is kept."""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.fakes.peft_adapters import write_adapter
from tests.fakes.tiny_models import write_tiny_llama
from trident_llm import Engine, EngineConfig
from trident_llm.engine import requantize
from trident_llm.engine.engine import EngineCore
from trident_llm.engine.process import _load_core
from trident_llm.errors import BadRequest, LoadFailed, NotFound, Overloaded, TridentError
from trident_llm.protocol import SampleStart, SamplingParams, Submit
from trident_llm.run_directory import Requantized, RunDirectory

_names = itertools.count()
AWQ = {"isq_method": "awq", "isq_bits": 4}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny"))


def settings_of(folder: Path, **settings: Any) -> EngineConfig:
    fixed = {
        "device": "cpu", "dtype": "fp32", "num_threads": 1, "max_num_blocks": 64, "block_size": 8, "max_num_seqs": 4,
        "max_model_len": 128, "isq_calibration_samples": 4, "isq_calibration_length": 32,
    }  # fmt: skip
    return EngineConfig(model=str(folder), **{**fixed, **settings})


def submit(prompt: list[int], max_tokens: int = 12, **fields: Any) -> Submit:
    params = SamplingParams(seed=3, max_tokens=max_tokens, temperature=0.8, ignore_eos=True)
    return Submit(request_id=f"r{next(_names)}", prompt_ids=prompt, params=params, **fields)


def prompt_of(length: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(5, 300), k=length)


class Run:
    """An engine, and the tokens and errors of its requests."""

    def __init__(self, config: EngineConfig, **options: Any) -> None:
        self.core = EngineCore(config, **options)
        self.tokens: dict[str, list[int]] = {}
        self.errors: dict[str, str] = {}

    def add(self, *submits: Submit) -> None:
        for one in submits:
            self.core.add(one)

    def step(self) -> None:
        for delta in self.core.step() if self.core.has_work() else self.core.poll():
            name = f"{delta.request_id}/{delta.sample_index}" if delta.sample_index else delta.request_id
            self.tokens.setdefault(name, []).extend(delta.token_ids)
            if delta.error:
                self.errors[delta.request_id] = delta.error
        self.core.check_integrity()

    def until(self, done: Callable[[], bool], seconds: float = 60.0) -> None:
        deadline = time.monotonic() + seconds
        while not done():
            assert time.monotonic() < deadline
            self.step()

    def poll_until(self, done: Callable[[], bool]) -> None:
        """Let threads and commands go on, but compute no token."""
        deadline = time.monotonic() + 60.0
        while not done():
            assert time.monotonic() < deadline
            assert not self.core.poll()
            time.sleep(0.001)

    def finish(self, *submits: Submit) -> list[list[int]]:
        self.add(*submits)
        self.until(lambda: not self.core.has_work())
        return [self.tokens[one.request_id] for one in submits]

    def command(self, name: str, **arguments: Any) -> dict[str, Any]:
        reply: Future[dict[str, Any]] = self.core.run_command(name, arguments)
        self.poll_until(reply.done)
        return reply.result()

    def begin(self, **settings: Any) -> str:
        return str(self.command("requantize", settings=settings)["id"])

    def job(self, job_id: str) -> dict[str, Any]:
        return self.command("job", id=job_id)

    def wait(self, job_id: str) -> dict[str, Any]:
        self.until(lambda: self.job(job_id)["state"] != "running")
        return self.job(job_id)


@pytest.fixture
def run(folder: Path) -> Iterator[Run]:
    run = Run(settings_of(folder))
    yield run
    run.core.close()


def fresh(folder: Path, *submits: Submit, **settings: Any) -> list[list[int]]:
    """What an engine says that has been loaded with these settings."""
    return Run(settings_of(folder, **settings)).finish(*submits)


def fail_once(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, error: Exception, after: int = 0) -> list[int]:
    """Have ``owner.name`` raise ``error`` at one call."""
    calls, original = [0], getattr(owner, name)

    def call(*args: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == after + 1:
            raise error
        return original(*args, **options)

    monkeypatch.setattr(owner, name, call)
    return calls


PROMPTS = [prompt_of(20, seed) for seed in range(6)]


@pytest.mark.parametrize("both_fit", [True, False])
def test_running_requests_finish_on_the_old_weights_and_waiting_ones_get_the_new(folder, run, monkeypatch, both_fit):
    if not both_fit:
        monkeypatch.setattr(requantize, "free_bytes", lambda device: 0)
    # Five sequences where four may run: the last request begins when the first has ended.
    pair = submit(PROMPTS[1], 30, samples=[SampleStart(index=index) for index in range(3)])
    old = [submit(PROMPTS[0], 25), pair, submit(PROMPTS[2], 20)]
    expected = fresh(folder, *old)
    undisturbed = Run(settings_of(folder))
    undisturbed.finish(pair)
    run.add(*old)
    run.until(lambda: all(one.request_id in run.tokens for one in old))
    job = run.begin(**AWQ)
    late = [submit(prompt) for prompt in PROMPTS]
    run.poll_until(lambda: run.core.scheduler.hold.is_active)
    run.add(*late)
    while run.core.scheduler.hold.is_active:
        assert not any(one.request_id in run.tokens for one in late)
        run.step()
    done = run.wait(job)
    assert (done["state"], done["error"]) == ("done", "") and "bits a weight" in done["progress"]
    assert [run.tokens[one.request_id] for one in old] == expected
    assert all(run.tokens[f"{pair.request_id}/{i}"] == undisturbed.tokens[f"{pair.request_id}/{i}"] for i in (1, 2))
    run.until(lambda: not run.core.has_work())
    assert [run.tokens[one.request_id] for one in late] == fresh(folder, *late, **AWQ)
    assert [run.tokens[one.request_id] for one in late] != fresh(folder, *late)
    stats = run.core.stats()
    assert stats["isq_method"] == "awq" and run.core.config.isq_bits == 4
    assert stats["memory"]["weights_bytes_after"] == run.core.model.decoder.num_bytes
    assert stats["quantization"]["layers"]["model.layers.0.mlp.down_proj"].startswith("awq 4 bits")
    assert run.command("jobs")["jobs"] == [run.job(job)]


def test_streams_go_on_while_the_new_weights_are_made(folder, run, monkeypatch):
    one = submit(PROMPTS[0], 100)
    (expected,) = fresh(folder, one)
    may_build, build = threading.Event(), run.core.model.source.build
    monkeypatch.setattr(run.core.model.source, "build", lambda *args: may_build.wait(60) and build(*args))
    run.add(one)
    run.step()
    job = run.begin(isq_method="gptq")
    before = len(run.tokens[one.request_id])
    run.until(lambda: len(run.tokens[one.request_id]) == before + 20)
    assert run.job(job)["state"] == "running" and not run.core.scheduler.hold.is_active
    may_build.set()
    assert run.wait(job)["state"] == "done"
    run.until(lambda: not run.core.has_work())
    assert run.tokens[one.request_id] == expected


def test_requests_that_come_back_half_done_count_as_running(folder, run, monkeypatch):
    monkeypatch.setattr(requantize, "free_bytes", lambda device: 0)
    running, half = submit(PROMPTS[0], 60), submit(PROMPTS[1], 20)
    (whole,) = fresh(folder, half)
    run.add(running)
    run.step()
    job = run.begin(isq_method="rtn")
    run.poll_until(lambda: run.core.scheduler.hold.is_active)
    again = submit(PROMPTS[1], 20, samples=[SampleStart(index=0, output_ids=whole[:7])])
    run.add(again)
    run.wait(job)
    assert run.tokens[again.request_id] == whole[7:]


def test_the_prefix_cache_is_flushed(folder, run):
    evicted: list[Any] = []
    run.core._events.subscribe(on_evict=lambda blocks, sequence, reason: evicted.append((len(blocks), reason)))
    run.finish(submit(PROMPTS[0]))
    hits = run.core.stats()["prefix_cache_hit_tokens_total"]
    cached = run.core.stats()["kv_blocks_cached"]
    assert cached > 0 and run.wait(run.begin(isq_method="rtn"))["state"] == "done"
    assert run.core.stats()["kv_blocks_cached"] == 0
    run.step()
    same = submit(PROMPTS[0])
    assert run.finish(same) == fresh(folder, same, isq_method="rtn")
    assert run.core.stats()["prefix_cache_hit_tokens_total"] == hits
    assert evicted == [(cached, "flushed")]
    run.finish(submit(PROMPTS[0]))
    assert run.core.stats()["prefix_cache_hit_tokens_total"] > hits


@pytest.mark.parametrize("both_fit", [True, False])
@pytest.mark.parametrize("where", ["build", "capture", "journal"])
def test_a_failure_leaves_the_old_weights(folder, monkeypatch, tmp_path, where, both_fit):
    if not both_fit:
        monkeypatch.setattr(requantize, "free_bytes", lambda device: 0)
    directory = RunDirectory(tmp_path / "run")
    directory.path.mkdir()
    run = Run(settings_of(folder, isq_method="rtn"), journal=directory)
    waiting = submit(PROMPTS[0])
    owner, name = {
        "build": (run.core.model.source, "build"), "capture": (run.core.runner, "capture"),
        "journal": (directory, "write_requantized"),
    }[where]  # fmt: skip
    fail_once(monkeypatch, owner, name, LoadFailed("no luck") if where == "build" else OSError("no luck"))
    job = run.begin(**AWQ)
    run.add(waiting)
    failed = run.wait(job)
    assert failed["state"] == "failed" and "no luck" in failed["error"] and failed["error"].startswith("[INTERNAL]")
    run.until(lambda: not run.core.has_work())
    assert run.tokens[waiting.request_id] == fresh(folder, waiting, isq_method="rtn")[0]
    assert run.core.config.isq_method == "rtn" and directory.read_requantized() is None
    after = submit(PROMPTS[1])
    assert run.wait(run.begin(**AWQ))["state"] == "done"
    assert run.core.stats()["requantize_jobs"] == {"running": 0, "done": 1, "failed": 1}
    assert run.finish(after) == fresh(folder, after, **AWQ)
    run.core.close()


def test_weights_that_do_not_fit_after_all_are_made_once_the_old_ones_are_gone(folder, run, monkeypatch):
    calls = fail_once(monkeypatch, run.core.model.source, "build", torch.OutOfMemoryError("too large"))
    assert run.wait(run.begin(**AWQ))["state"] == "done" and calls == [2]
    after = submit(PROMPTS[1])
    assert run.finish(after) == fresh(folder, after, **AWQ)


def test_an_engine_that_cannot_go_back_ends(folder, monkeypatch):
    run = Run(settings_of(folder))
    monkeypatch.setattr(requantize, "free_bytes", lambda device: 0)
    monkeypatch.setattr(run.core.model.source, "build", lambda *args: (_ for _ in ()).throw(LoadFailed("gone")))
    with pytest.raises(TridentError, match="the weights of before cannot be served again"):
        run.wait(run.begin(**AWQ))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r"settings: none are given; give some of isq_method, isq_bits, "),
        ({"dtype": "fp16"}, r"settings: 'dtype' is not about quantization; allowed: isq_method, "),
        ({"isq_method": "magic"}, r"isq_method: 'magic' is not one of rtn, awq, gptq, "),
        ({"isq_method": "smoothquant", "isq_bits": 4}, r"isq_bits: smoothquant has no 4 bits; allowed: 8"),
        ({"isq_bits": 4}, r"isq_bits: 4 is set, but isq_method is none"),
        ({"isq_bits": "four"}, r"isq_bits: 'four' is not an integer from 4 to 8"),
        ({"isq_layers": ["0=rtn"]}, r"isq_layers: \['0=rtn'\] is not allowed; give a string, a number, true or false"),
        ({"isq_method": "awq", "isq_calibration": "/gone.txt"}, r"isq_calibration: '/gone.txt' cannot be read"),
        ({"isq_method": "awq", "isq_calibration": "/dev/zero"}, r"isq_calibration: '/dev/zero' is no file"),
    ],
)
def test_bad_settings_are_refused_before_anything_happens(run, settings, message):
    with pytest.raises(BadRequest, match=message):
        run.command("requantize", settings=settings)
    assert run.command("jobs") == {"jobs": []} and not run.core.is_loading


def test_one_at_a_time_and_jobs_have_names(run):
    job = run.begin(isq_method="rtn")
    with pytest.raises(Overloaded, match="requantize: the weights are being changed already"):
        run.command("requantize", settings={"isq_method": "awq"})
    with pytest.raises(NotFound, match="id: no job 'x' in this engine process"):
        run.job("x")
    assert run.wait(job)["state"] == "done"
    back = run.wait(run.begin(isq_method=""))
    assert back["progress"] == "all weights are in full precision" and run.core.stats()["quantization"] is None
    assert run.core.stats()["requantize_jobs"] == {"running": 0, "done": 2, "failed": 0}


def test_adapters_stay_usable(folder, tmp_path):
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for index, (name, options) in enumerate({"plain": {}, "dora": {"use_dora": True}}.items()):
        write_adapter(base, tmp_path / name, seed=index, **options)
    settings = {
        "adapters": f"plain={tmp_path / 'plain'}, dora={tmp_path / 'dora'}", "adapter_root": str(tmp_path),
        "max_loras": 2, "max_lora_rank": 8,
    }  # fmt: skip
    run = Run(settings_of(folder, **settings))
    requests = [submit(PROMPTS[0], adapter=name) for name in ("plain", "dora", "plain:0.5,dora:0.5")]
    run.finish(*[submit(PROMPTS[0], adapter="plain"), submit(PROMPTS[0], adapter="dora")])
    for isq in ({"isq_method": "awq"}, {"isq_method": "smoothquant"}):
        job = run.begin(**isq)
        reply = run.core.run_command("load_adapter", {"name": "late", "path": "dora"})
        assert run.wait(job)["state"] == "done"
        run.until(reply.done)
        again = [submit(one.prompt_ids, adapter=one.adapter) for one in requests]
        found = run.finish(*again, submit(PROMPTS[0], adapter="late"))
        assert found[:3] == fresh(folder, *again, **settings, **isq)
        assert found[3] == found[1]
    run.core.close()


def test_an_engine_that_takes_over_has_the_new_weights(folder, tmp_path, monkeypatch):
    directory = RunDirectory(tmp_path / "run")
    directory.path.mkdir()
    config = settings_of(folder, isq_method="rtn", isq_bits=8)
    text = tmp_path / "text.txt"
    text.write_text("a text of one's own to calibrate on, " * 40)
    run = Run(config, journal=directory)
    assert run.wait(run.begin(isq_method="awq", isq_bits="", isq_calibration=str(text)))["state"] == "done"
    asked = submit(PROMPTS[3])
    expected = run.finish(asked)
    text.unlink()  # what was made of it is on disk
    successor = _load_core(config, lambda line: None, run_directory=directory)
    assert successor.config.isq_method == "awq" and successor.config.isq_bits is None
    other = Run.__new__(Run)
    other.core, other.tokens, other.errors = successor, {}, {}
    assert other.finish(submit(PROMPTS[3])) == expected
    broken = {"isq_method": "awq", "isq_calibration": str(text)}
    directory.write_requantized(Requantized(settings=broken, samples_digest="unknown"))
    successor = _load_core(config, lambda line: None, run_directory=directory)
    assert successor.config == config and directory.read_requantized() is None


def test_calibration_on_live_requests(folder, run):
    assert run.command("calibrate", action="start", max_samples=3, max_length=24)["collecting"]
    told = [submit(prompt_of(30, 50 + index), 6, calibration=True) for index in range(5)]
    run.finish(submit(PROMPTS[0]), *told)
    counts = run.command("calibrate", action="stop")
    assert counts == {"collecting": False, "requests": 5, "samples": 3, "tokens": 72}
    run.finish(submit(PROMPTS[1], calibration=True))
    assert run.core.stats()["calibration"] == counts
    with pytest.raises(BadRequest, match="calibrate: isq_method none calibrates nothing"):
        run.command("calibrate", action="apply")
    with pytest.raises(BadRequest, match="calibrate: isq_cache is false"):
        run.command("calibrate", action="apply", settings={"isq_method": "gptq", "isq_cache": False})
    with pytest.raises(BadRequest, match="what was collected has 72 tokens; at least 100 are needed"):
        run.command("calibrate", action="apply", settings={"isq_method": "gptq", "isq_calibration_length": 100})
    shipped = {"isq_method": "gptq", "isq_calibration_length": 24}
    collected = [list(sample) for sample in run.core.live_text._samples]
    reply = run.command("calibrate", action="apply", settings=shipped)
    assert run.wait(reply["id"])["state"] == "done"
    assert run.core.stats()["calibration"] == {"collecting": False, "requests": 0, "samples": 0, "tokens": 0}
    asked = submit(PROMPTS[2])
    assert all(sample in [(one.prompt_ids)[:24] for one in told] for sample in collected)
    assert run.finish(asked) != fresh(folder, asked, **shipped)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"action": "go"}, "action: 'go' is not one of start, stop, apply"),
        ({"action": "start", "max_samples": 0}, "max_samples: 0 is not allowed; give an integer from 1 to 8192"),
        ({"action": "stop", "max_length": 5}, "'max_length' is not an argument of calibrate stop; allowed: action"),
        ({"action": "apply", "settings": "x"}, "settings: 'x' is not allowed; give a JSON object"),
        ({}, "'calibrate' needs 'action'"),
    ],
)
def test_bad_arguments_of_calibrate(run, arguments, message):
    with pytest.raises(BadRequest, match=message):
        run.command("calibrate", **arguments)


def test_the_library_has_it_too(folder):
    with Engine(settings_of(folder)) as engine:
        assert engine.requantize(isq_method="rtn")["state"] == "done"
        assert engine.stats()["isq_method"] == "rtn"
        with pytest.raises(BadRequest, match="isq_bits"):
            engine.requantize(isq_bits=7)
