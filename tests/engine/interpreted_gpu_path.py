"""Run by test_gpu_path in a process with TRITON_INTERPRET=1."""

from __future__ import annotations

import dataclasses

import pytest

from tests.engine.helpers import FREE_TRANSFERS
from tests.engine.test_cuda_engine import random_requests, requantize_once_all_run, run
from tests.fakes.fake_cuda import run_gpu_path_on_cpu
from tests.fakes.tiny_models import write_tiny_llama
from trident_llm import EngineConfig
from trident_llm.engine.engine import EngineCore
from trident_llm.engine.loading import load_model
from trident_llm.kernels.prefill_attention import prefill_attention
from trident_llm.protocol import SampleStart, SamplingParams, Submit


@pytest.mark.parametrize(
    ("settings", "preempts"),
    [
        ({}, False),
        ({"max_num_blocks": 5, "max_num_batched_tokens": 16, "prefix_caching": False}, True),
        ({"kv_cache_dtype": "int8"}, False),
    ],
    ids=["whole", "chunked-small-pool", "int8"],
)
def test_tokens_equal_those_of_the_cpu(tmp_path, monkeypatch, settings, preempts):
    folder = write_tiny_llama(tmp_path, vocab=1000)
    defaults = {"dtype": "fp32", "device": "cpu", "max_num_blocks": 64, "block_size": 8, "max_num_seqs": 6}
    defaults["kv_cache_dtype"] = settings.get("kv_cache_dtype", "auto")
    requests = random_requests(7, longest=20, longest_output=8)
    expected, reasons = run(EngineCore(EngineConfig(model=str(folder), **defaults)), requests)
    run_gpu_path_on_cpu(monkeypatch)
    core = EngineCore(EngineConfig(model=str(folder), **{**defaults, **settings}))
    got, got_reasons = run(core, requests)
    assert got == expected and got_reasons == reasons
    assert (core.stats()["preemptions_total"] > 0) == preempts
    assert core.stats()["kv_blocks_used"] == 0


def test_splits_of_long_contexts_change_no_token(tmp_path, monkeypatch):
    """Prompts share a prefix, so that their own tokens are few and their contexts long; decodes run beside them."""
    folder = write_tiny_llama(tmp_path)
    settings = {"dtype": "fp32", "device": "cpu", "max_num_blocks": 64, "block_size": 8, "max_num_seqs": 4}
    config = EngineConfig(model=str(folder), **settings)
    params = SamplingParams(seed=1, max_tokens=4, temperature=0.8, ignore_eos=True)
    shared = [5 + index % 90 for index in range(150)]
    requests = [
        Submit(request_id=f"r{index}", prompt_ids=[*shared, *range(20, 24 + index)], params=params)
        for index in range(3)
    ]
    batches = [requests[:1], requests[1:]]
    cpu = EngineCore(config)
    expected = [run(cpu, batch) for batch in batches]
    run_gpu_path_on_cpu(monkeypatch)
    monkeypatch.setattr("trident_llm.engine.device_input._LONG_CONTEXT", 128)
    was_split = []

    def attention(*args, workspace, **options):
        was_split.append(workspace is not None)
        prefill_attention(*args, workspace=workspace, **options)

    monkeypatch.setattr("trident_llm.kernels.step_attention.prefill_attention", attention)
    core = EngineCore(config)
    assert [run(core, batch) for batch in batches] == expected
    assert True in was_split and False in was_split


def test_blocks_come_back_from_the_host(tmp_path, monkeypatch):
    """The pool holds one sequence at a time: what its turns share is evicted by the other conversation's."""
    folder = write_tiny_llama(tmp_path)
    settings = {"dtype": "fp32", "device": "cpu", "max_num_blocks": 7, "block_size": 8, "max_num_seqs": 4}
    # With int8 a block lies in two pools. The largest step is computed to measure what tokens cost.
    config = EngineConfig(model=str(folder), kv_cache_dtype="int8", max_num_batched_tokens=64, **settings)
    requests = []
    for turn in range(8):
        prompt = [5 + turn % 2] * 30 + [9 + turn] * 3
        params = SamplingParams(seed=turn, max_tokens=5, temperature=0.8, ignore_eos=True)
        requests.append(Submit(request_id=f"turn{turn}", prompt_ids=prompt, params=params))
    expected = [run(EngineCore(config), [request]) for request in requests]
    run_gpu_path_on_cpu(monkeypatch)
    monkeypatch.setattr("trident_llm.engine.engine.load_model", with_host_blocks(load_model, 12))
    monkeypatch.setattr("trident_llm.engine.cuda_runner.TransferCosts", lambda *measured: FREE_TRANSFERS)
    core = EngineCore(config)
    assert [run(core, [request]) for request in requests] == expected
    stats = core.stats()
    assert stats["swapped_blocks_total"] > stats["host_blocks_used"] > 0, "nothing came back"
    assert stats["prefix_cache_hit_tokens_total"] >= 6 * 24


def with_host_blocks(load, num_blocks):
    """``load_model`` as on a GPU: on a CPU the setting is refused."""
    return lambda *given, **options: dataclasses.replace(load(*given, **options), num_host_blocks=num_blocks)


def test_samples_may_outnumber_the_sequences_of_a_decode_step(tmp_path, monkeypatch):
    folder = write_tiny_llama(tmp_path)
    settings = {"dtype": "fp32", "device": "cpu", "max_num_blocks": 16, "block_size": 8, "max_num_seqs": 6}
    config = EngineConfig(model=str(folder), **settings)
    params = SamplingParams(seed=1, max_tokens=4, temperature=1.0, ignore_eos=True)
    samples = [SampleStart(index=index) for index in range(3)]
    request = Submit(request_id="r", prompt_ids=[7], params=params, samples=samples)
    expected = run(EngineCore(config), [request])
    run_gpu_path_on_cpu(monkeypatch)
    assert run(EngineCore(config), [request]) == expected


def test_other_weights_under_a_runner_with_buffers(tmp_path, monkeypatch):
    """The runner computes with them, the host tier's costs are measured anew, and buffers hold nothing of before.

    They are another model's, because the interpreter does not know what kernels of quantized weights do.
    """
    settings = {"dtype": "fp32", "device": "cpu", "max_num_blocks": 7, "block_size": 8, "max_num_seqs": 2}
    settings["max_num_batched_tokens"] = 32
    config, other = (
        EngineConfig(model=str(write_tiny_llama(tmp_path / str(seed), seed=seed)), **settings) for seed in range(2)
    )
    params = SamplingParams(seed=1, max_tokens=5, temperature=0.8, ignore_eos=True)
    before, after = (
        [Submit(request_id=f"{name}{i}", prompt_ids=[*range(20, 32 + i)], params=params) for i in range(2)]
        for name in ("before", "after")
    )
    expected = run(EngineCore(config), before), run(EngineCore(other), after)
    run_gpu_path_on_cpu(monkeypatch)
    monkeypatch.setattr("trident_llm.engine.engine.load_model", with_host_blocks(load_model, 8))
    core = EngineCore(config)
    built = load_model(other, print).source.build(core.model.source.quantization(other), print)
    monkeypatch.setattr(core.model.source, "build", lambda quantization, tell: built)
    captured, capture = [], core.runner.capture
    monkeypatch.setattr(core.runner, "capture", lambda progress: captured.append(1) or capture(progress))
    replies = requantize_once_all_run(core, {"isq_method": "rtn"})
    assert run(core, before) == expected[0]
    while core.is_loading:
        core.poll()
    assert core.run_command("job", {"id": replies[0].result()["id"]}).result()["error"] == "" and captured == [1]
    assert run(core, after) == expected[1]
    core.close()
