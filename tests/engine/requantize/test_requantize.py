"""Other weights under a serving engine: tokens before and after, what waits, and what is kept."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from tests.engine.requantize.runs import AWQ, PROMPTS, Run, fresh, settings_of, submit
from tests.fakes.peft_adapters import write_adapter
from trident_llm import Engine
from trident_llm.engine import requantize
from trident_llm.engine.process import _load_core
from trident_llm.errors import BadRequest
from trident_llm.protocol import SampleStart
from trident_llm.run_directory import Requantized, RunDirectory


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


def test_the_library_has_it_too(folder):
    with Engine(settings_of(folder)) as engine:
        assert engine.requantize(isq_method="rtn")["state"] == "done"
        assert engine.stats()["isq_method"] == "rtn"
        with pytest.raises(BadRequest, match="isq_bits"):
            engine.requantize(isq_bits=7)
