"""EngineCore with a tiny random model: what requests ask for and what the pool looks like afterwards."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from tests.fakes.tiny_models import write_tiny_llama
from trident_llm import EngineConfig
from trident_llm.engine.engine import EngineCore
from trident_llm.errors import BadRequest, Overloaded
from trident_llm.protocol import SampleStart, SamplingParams, Submit

_names = itertools.count()


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return write_tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(params=[False, True], ids=["", "lookahead"])
def make_core(model_folder, request):
    def make(**settings):
        defaults = {"dtype": "fp32", "device": "cpu", "num_threads": 1, "max_num_blocks": 64, "block_size": 8}
        return EngineCore(EngineConfig(model=str(model_folder), **{**defaults, **settings}), lookahead=request.param)

    return make


def submit(prompt=(5, 6, 7, 8), samples=1, priority=0, cache_salt="", output_ids=None, **params):
    params = {"seed": 1, "max_tokens": 12, "ignore_eos": True, **params}
    starts = [SampleStart(index=i, output_ids=(output_ids or {}).get(i, [])) for i in range(samples)]
    return Submit(
        request_id=f"r{next(_names)}",
        prompt_ids=list(prompt),
        params=SamplingParams(**params),
        samples=starts,
        priority=priority,
        cache_salt=cache_salt,
    )


def run(core, *requests, max_steps=500):
    """Add, step to the end; returns all deltas by (request, sample)."""
    for request in requests:
        core.add(request)
    deltas: dict[tuple[str, int], list] = {}
    for _ in range(max_steps):
        if not core.has_work():
            break
        for delta in core.step():
            deltas.setdefault((delta.request_id, delta.sample_index), []).append(delta)
        core.check_integrity()
    assert not core.has_work()
    return deltas


def tokens(deltas, request, sample=0):
    return [token for delta in deltas[request.request_id, sample] for token in delta.token_ids]


def generate(core, request):
    return tokens(run(core, request), request)


def test_offsets_count_up_and_the_end_has_a_reason(make_core):
    core, request = make_core(), submit(max_tokens=5)
    deltas = run(core, request)[request.request_id, 0]
    assert [delta.offset for delta in deltas] == [0, 1, 2, 3, 4]
    assert [delta.finish_reason for delta in deltas] == [None] * 4 + ["length"]
    assert core.stats()["kv_blocks_used"] == 0


def test_tokens_of_steps_are_those_computed(make_core):
    core = make_core(max_num_batched_tokens=16, max_num_seqs=8)
    run(core, submit(prompt=range(5, 45)), submit(prompt=range(50, 60)))
    found = core.request_metrics.to_dict()["iteration_tokens_total"]
    assert found["sum"] == 40 + 10 + 2 * 11 and found["counts"][2] >= 3
    assert sum(found["counts"]) == core.stats()["steps_total"]


def test_a_random_stream_continues_the_same_after_resubmission(make_core):
    whole = generate(make_core(), submit(temperature=1.5, seed=42))
    for cut in (1, 5, 11):
        resumed = submit(temperature=1.5, seed=42, output_ids={0: whole[:cut]})
        deltas = run(make_core(), resumed)
        assert whole[:cut] + tokens(deltas, resumed) == whole
        assert deltas[resumed.request_id, 0][0].offset == cut


def test_penalties_and_limits_go_on_counting_after_resubmission(make_core):
    options = {"temperature": 1.0, "repetition_penalty": 1.3, "frequency_penalty": 0.5, "min_tokens": 8, "seed": 3}
    whole = generate(make_core(), submit(**options))
    assert len(whole) == 12
    resumed = submit(**options, output_ids={0: whole[:6]})
    assert whole[:6] + generate(make_core(), resumed) == whole


def test_samples_of_one_request_are_those_of_lone_requests(make_core):
    request = submit(prompt=range(10, 31), samples=3, temperature=1.0, seed=9)
    core = make_core()
    deltas = run(core, request)
    texts = [tokens(deltas, request, i) for i in range(3)]
    assert len({tuple(text) for text in texts}) == 3
    for settings in ({"max_num_seqs": 1, "max_num_batched_tokens": 8, "prefix_caching": False}, {"max_num_seqs": 2}):
        again = run(make_core(**settings), request)
        assert texts == [tokens(again, request, i) for i in range(3)]


def test_forks_share_the_prompt(make_core):
    core, request = make_core(prefix_caching=False), submit(prompt=range(10, 26), samples=4, max_tokens=2)
    core.add(request)
    core.step()
    assert core.stats()["kv_blocks_used"] == 2  # the prompt's 16 tokens, once
    core.step()
    core.check_integrity()


def test_everything_gives_the_same_tokens_when_blocks_are_short(make_core):
    rng = random.Random(0)
    requests = [
        submit([rng.randrange(5, 300) for _ in range(rng.randint(1, 40))], temperature=rng.choice([0.0, 1.0]), seed=i)
        for i in range(20)
    ]
    expected = [generate(make_core(prefix_caching=False), request) for request in requests]
    core = make_core(max_num_blocks=16, max_num_seqs=8, max_num_batched_tokens=16)
    deltas = run(core, *requests)
    assert core.stats()["preemptions_total"] > 0
    assert [tokens(deltas, request) for request in requests] == expected


def test_prefix_cache_hits_also_what_was_generated(make_core):
    core, first = make_core(), submit(prompt=range(10, 30), max_tokens=20)
    answer = generate(core, first)
    second = submit(prompt=[*range(10, 30), *answer, 7, 7], max_tokens=4)
    deltas = run(core, second)
    assert deltas[second.request_id, 0][0].num_cached_tokens == 32
    assert core.stats()["prefix_cache_hit_tokens_total"] == 32
    salted = submit(prompt=second.prompt_ids, max_tokens=4, cache_salt="tenant")
    assert run(core, salted)[salted.request_id, 0][0].num_cached_tokens == 0
    assert generate(make_core(prefix_caching=False), second) == tokens(deltas, second)


def test_requests_that_arrive_together_share_their_prompt(make_core):
    requests = [submit(prompt=range(10, 42), seed=i, temperature=1.0) for i in range(4)]
    expected = [generate(make_core(prefix_caching=False), request) for request in requests]
    core = make_core(max_num_batched_tokens=256)
    deltas = run(core, *requests)
    assert [tokens(deltas, request) for request in requests] == expected
    assert core.stats()["prefix_cache_hit_tokens_total"] == 3 * 24


def test_stop_tokens_end_a_sequence_and_min_tokens_holds_them_off(make_core):
    greedy = generate(make_core(), submit(temperature=0.0))
    stop = next(token for i, token in enumerate(greedy) if i >= 2 and token not in greedy[:i])
    request = submit(temperature=0.0, stop_token_ids=(stop,))
    deltas = run(make_core(), request)
    assert tokens(deltas, request) == greedy[: greedy.index(stop) + 1]
    last = deltas[request.request_id, 0][-1]
    assert last.finish_reason == "stop" and last.stopped_by_token
    held = generate(make_core(), submit(temperature=0.0, stop_token_ids=(stop,), min_tokens=12))
    assert stop not in held and len(held) == 12


def test_abort_frees_blocks_at_once(make_core):
    core = make_core(prefix_caching=False)
    requests = [submit(prompt=range(10, 50)), submit(prompt=range(60, 100), samples=2)]
    for request in requests:
        core.add(request)
    core.step()
    core.abort(requests[0].request_id)
    core.abort(requests[1].request_id, 1)
    core.abort("nobody")
    core.check_integrity()
    deltas = run(core)
    assert list(deltas) == [(requests[1].request_id, 0)]
    assert core.stats()["kv_blocks_used"] == 0


def test_the_model_length_ends_a_sequence(make_core):
    core = make_core(max_model_len=20)
    deltas = run(core, request := submit(prompt=range(10, 26), max_tokens=100))
    assert len(tokens(deltas, request)) == 4
    assert deltas[request.request_id, 0][-1].finish_reason == "length"


def test_what_can_never_run_is_refused_with_the_numbers(make_core):
    core = make_core(max_num_blocks=4)
    message = (
        r"40 tokens leave no room for output; allowed: at most 31 \(max_model_len 32, KV pool of 4 blocks of 8 tok"
    )
    with pytest.raises(BadRequest, match=message):
        core.add(submit(prompt=range(10, 50)))
    assert not core.has_work()


def test_what_fits_alone_is_served_also_beside_others(make_core):
    core = make_core(max_num_blocks=4)
    requests = [submit(range(10, 41)), submit([5], max_tokens=1000), submit(range(20, 40), samples=3, max_tokens=12)]
    deltas = run(core, *requests)
    assert [len(tokens(deltas, requests[i], sample)) for i, sample in ((0, 0), (1, 0), (2, 0), (2, 2))] == [
        1,
        31,
        12,
        12,
    ]
    assert core.stats()["preemptions_total"] > 0


def test_a_full_queue_refuses(make_core):
    core = make_core(max_num_seqs=2, max_queue_size=1)
    with pytest.raises(BadRequest, match=r"n: 4 is not allowed; at most max_queue_size \+ max_num_seqs \(3\)"):
        core.add(submit(samples=4))
    for _ in range(3):
        core.add(submit())
    with pytest.raises(
        Overloaded, match=r"^\[UNAVAILABLE\] 3 requests are waiting \(max_queue_size 1\); retry after 2 s$"
    ):
        core.add(submit())
    core.step()
    with pytest.raises(Overloaded):
        core.add(submit())
    core.add(resumed := submit(output_ids={0: [7, 8]}))
    assert len(tokens(run(core), resumed)) == 10


def test_a_request_that_would_wait_too_long_is_refused_at_once(make_core):
    core = make_core(max_num_seqs=2, max_queue_wait=1e-6)
    requests = [submit() for _ in range(6)]
    deltas = run(core, *requests[:4])
    # Four were taken while nothing was known of how quickly others end.
    assert core.num_places == 2 + 768
    core.add(submit())
    core.add(submit())
    core.step()
    assert core.num_places <= 0
    with pytest.raises(Overloaded, match=r"would wait for about .* s \(max_queue_wait 1e-06 s\)"):
        core.add(requests[4])
    core.add(resumed := submit(output_ids={0: [7, 8]}))
    assert len(tokens(run(core), resumed)) == 10
    assert all(len(tokens(deltas, request)) == 12 for request in requests[:4])


def test_waiting_too_long_is_an_error_for_that_request_only(make_core):
    core = make_core(max_num_seqs=1, queue_timeout=30.0)
    runs, waits = submit(), submit(samples=2)
    core.add(runs)
    core.step()
    core.add(waits)
    core.scheduler.waiting[0].arrival_time -= 31
    deltas = run(core)
    assert [delta.finish_reason for delta in deltas[waits.request_id, 1]] == ["error"]
    assert deltas[waits.request_id, 0][0].error.startswith("[UNAVAILABLE] waited longer than queue_timeout (30 s)")
    assert deltas[runs.request_id, 0][-1].finish_reason == "length"


def test_logprobs_equal_transformers(make_core, model_folder):
    import torch
    from transformers import AutoModelForCausalLM

    request = submit(temperature=0.8, logprobs=2)
    deltas = run(make_core(), request)[request.request_id, 0]
    got = tokens({(request.request_id, 0): deltas}, request)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    with torch.inference_mode():
        logits = model(torch.tensor([request.prompt_ids + got])).logits[0]
    reference = torch.log_softmax(logits, dim=-1)[len(request.prompt_ids) - 1 :]
    for position, delta in enumerate(deltas):
        entry = delta.logprobs[0]
        assert entry.logprob == pytest.approx(float(reference[position, entry.token_id]), abs=1e-4)
        assert [top.token_id for top in entry.top] == torch.topk(reference[position], 2).indices.tolist()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_model_len": 100_000}, "more than the model's own limit"),
        ({"max_model_len": 512, "max_num_blocks": 4}, "do not fit the KV pool of 4 blocks"),
        ({"dtype": "fp16"}, "not available on the CPU"),
    ],
)
def test_settings_that_cannot_be_met_say_why(make_core, settings, message):
    with pytest.raises(BadRequest, match=message):
        make_core(**settings)


@pytest.mark.parametrize(("asked", "variable", "expected"), [(3, "2", 3), (0, "2", 2), (0, None, 5)])
def test_threads_are_those_asked_for_or_as_openmp_says(make_core, monkeypatch, asked, variable, expected):
    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(5)))
    if variable:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
        torch.set_num_threads(int(variable))  # as it does when it is imported
    try:
        make_core(num_threads=asked)
        assert torch.get_num_threads() == expected
    finally:
        torch.set_num_threads(before)


def test_a_missing_gpu_is_said(make_core, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(BadRequest, match="PyTorch sees no CUDA device"):
        make_core(device="cuda")


def test_the_context_shrinks_to_the_pool_when_no_length_is_asked_for(make_core):
    assert make_core(max_num_blocks=4).welcome("e").max_model_len == 32
