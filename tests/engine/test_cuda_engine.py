"""The engine on a GPU gives what it gives on the CPU: graphs, lookahead and device sampling change no token."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from tests.fakes.tiny_models import write_tiny_llama
from trident_llm import EngineConfig
from trident_llm.engine import requantize
from trident_llm.engine.engine import EngineCore
from trident_llm.protocol import SampleStart, SamplingParams, Submit
from trident_llm.sampling.sampler import SamplingRow, sample

pytestmark = pytest.mark.gpu
_names = itertools.count()


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return write_tiny_llama(
        tmp_path_factory.mktemp("tiny"), hidden=256, heads=8, kv_heads=2, head_dim=64, layers=3, vocab=1000
    )


def make_core(folder, device, **settings):
    defaults = {"dtype": "fp32", "max_num_blocks": 512, "block_size": 16, "max_num_seqs": 40}
    return EngineCore(EngineConfig(model=str(folder), device=device, **{**defaults, **settings}))


def random_requests(count, seed=0, longest=60, longest_output=24, **fixed):
    """Requests that use every option the sampler has."""
    rng = random.Random(seed)
    requests = []
    for index in range(count):
        options = {
            "temperature": rng.choice([0.0, 0.0, 0.7, 1.3]),
            "repetition_penalty": rng.choice([1.0, 1.0, 1.2]),
            "frequency_penalty": rng.choice([0.0, 0.0, 0.5]),
            "logit_bias": rng.choice([{}, {}, {5: 2.0, 900: -3.0}]),
            "min_tokens": rng.choice([0, 5]),
            "logprobs": rng.choice([None, None, 2]),
            **fixed,
        }
        limits = {"max_tokens": rng.randint(1, longest_output), "ignore_eos": bool(index % 2)}
        params = SamplingParams(seed=index, **limits, **options)
        samples = [SampleStart(index=i) for i in range(rng.choice([1, 1, 1, 3]))]
        prompt = [rng.randrange(5, 1000) for _ in range(rng.randint(1, longest))]
        requests.append(Submit(request_id=f"r{next(_names)}", prompt_ids=prompt, params=params, samples=samples))
    return requests


def run(core, requests):
    """All tokens by (request, sample), after everything has ended."""
    for request in requests:
        core.add(request)
    tokens, reasons = {}, {}
    while core.has_work():
        for delta in core.step():
            key = (delta.request_id, delta.sample_index)
            tokens.setdefault(key, []).extend(delta.token_ids)
            reasons[key] = delta.finish_reason
            core.check_integrity()
    return tokens, reasons


@pytest.mark.parametrize(
    ("settings", "preempts"),
    [
        ({}, False),
        ({"max_num_batched_tokens": 64}, False),
        ({"max_num_blocks": 24, "prefix_caching": False}, True),
        ({"block_size": 32, "max_num_blocks": 200}, False),
    ],
    ids=["whole", "chunked", "small-pool", "blocks-of-32"],
)
def test_tokens_equal_those_of_the_cpu(model_folder, settings, preempts):
    requests = random_requests(60)
    expected, reasons = run(make_core(model_folder, "cpu"), requests)
    core = make_core(model_folder, "cuda", **settings)
    got, got_reasons = run(core, requests)
    assert_equal_but_for_rounding(model_folder, requests, got, expected)
    assert all(got_reasons[key] == reasons[key] for key in got if got[key] == expected[key])
    assert (core.stats()["preemptions_total"] > 0) == preempts
    assert core.stats()["kv_blocks_used"] == 0


def assert_equal_but_for_rounding(folder, requests, got, expected):
    """Equal tokens, except from a token on that logits changed within float32's rounding would have drawn too."""
    by_id = {request.request_id: request for request in requests}
    assert got.keys() == expected.keys()
    different = [key for key in got if got[key] != expected[key]]
    assert len(different) <= len(got) // 20, different
    for key in different:
        request = by_id[key[0]]
        pairs = enumerate(zip(got[key], expected[key], strict=False))
        at = next(index for index, (ours, theirs) in pairs if ours != theirs)
        tokens = [*request.prompt_ids, *expected[key][:at]]
        row = SamplingRow(
            params=request.params,
            sample_index=key[1],
            position=len(tokens),
            token_ids=tokens,
            num_prompt_tokens=len(request.prompt_ids),
            stop_ids=frozenset() if request.params.ignore_eos else frozenset({2}),
        )
        logits = _next_logits(folder, tokens)
        noise = torch.randn(512, len(logits), generator=torch.Generator().manual_seed(0)) * 1e-5 * logits.abs().max()
        drawn = set(sample(logits + noise, [row] * len(noise)).token_ids)
        assert {got[key][at], expected[key][at]} <= drawn, (key, at, drawn)


def _next_logits(folder, tokens):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        return model(torch.tensor([tokens])).logits[0, -1]


def test_logprobs_equal_those_of_the_cpu(model_folder):
    requests = random_requests(12, seed=3, logprobs=3)
    entries = {}
    for device in ("cpu", "cuda"):
        core = make_core(model_folder, device)
        for request in requests:
            core.add(request)
        found = entries[device] = {}
        while core.has_work():
            for delta in core.step():
                found.setdefault((delta.request_id, delta.sample_index), []).extend(delta.logprobs)
    assert entries["cpu"].keys() == entries["cuda"].keys()
    for key, on_cpu in entries["cpu"].items():
        for ours, theirs in zip(entries["cuda"][key], on_cpu, strict=True):
            assert ours.token_id == theirs.token_id and ours.rank == theirs.rank
            assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)
            assert [top.token_id for top in ours.top] == [top.token_id for top in theirs.top]


# On Hopper prompts with heads of 128 have a kernel of their own.
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_logits_are_as_near_to_float32_as_those_of_transformers(tmp_path, dtype, head_dim):
    """Teacher-forced: the log-probabilities of given tokens, through chunks of several sizes and many step shapes,
    against float32. Transformers in the same dtype shows what rounding costs on this model."""
    model_folder = write_tiny_llama(
        tmp_path, hidden=256, heads=8, kv_heads=2, head_dim=head_dim, layers=3, vocab=1000
    )
    rng = random.Random(7)
    exact = _model_logprobs(model_folder, torch.float32, "cpu")
    rounded = _model_logprobs(model_folder, {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype], "cuda")
    ours, theirs = [], []
    for count in (1, 2, 3, 4, 8, 13, 16, 24, 40):
        requests = random_requests(
            count, seed=rng.randrange(1000), longest=200, logprobs=0, temperature=0.0, repetition_penalty=1.0,
            frequency_penalty=0.0, logit_bias={}, min_tokens=0,
        )  # fmt: skip
        budget = rng.choice([48, 64, 128, 2048])
        core = make_core(model_folder, "cuda", dtype=dtype, max_num_batched_tokens=budget, max_num_blocks=1024)
        for request in requests:
            core.add(request)
        tokens, logprobs = {}, {}
        while core.has_work():
            for delta in core.step():
                key = (delta.request_id, delta.sample_index)
                tokens.setdefault(key, []).extend(delta.token_ids)
                logprobs.setdefault(key, []).extend(entry.logprob for entry in delta.logprobs)
        for request in requests:
            for start in request.samples:
                key = (request.request_id, start.index)
                expected = exact(request.prompt_ids, tokens[key])
                ours += _errors(logprobs[key], expected)
                theirs += _errors(rounded(request.prompt_ids, tokens[key]), expected)
    assert max(ours) <= 1.5 * max(theirs)
    assert sum(ours) <= 1.2 * sum(theirs)


def _errors(values, expected):
    return [abs(a - b) for a, b in zip(values, expected, strict=True)]


def _model_logprobs(folder, dtype, device):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device)

    def logprobs(prompt_ids, output_ids):
        with torch.inference_mode():
            logits = model(torch.tensor([[*prompt_ids, *output_ids]], device=device)).logits[0].float()
        rows = torch.log_softmax(logits, dim=-1)[len(prompt_ids) - 1 : -1]
        return [float(row[token]) for row, token in zip(rows, output_ids, strict=True)]

    return logprobs


def requantize_once_all_run(core, settings):
    """The replies to the command, which is given when no request waits any more: none, and later one."""
    replies = []

    def launch(request_ids):
        if not core.scheduler.waiting and not replies:
            replies.append(core.run_command("requantize", {"settings": settings}))

    core.on_launch = launch
    return replies


@pytest.mark.parametrize("both_fit", [True, False])
def test_other_weights_under_captured_graphs(model_folder, monkeypatch, tmp_path, both_fit):
    """Running requests keep their tokens; later ones get those of an engine that was loaded with the settings."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if not both_fit:
        monkeypatch.setattr(requantize, "free_bytes", lambda device: 0)
    isq = {"isq_method": "gptq", "isq_calibration_samples": 4, "isq_calibration_length": 64}
    before, after = random_requests(20, seed=1), random_requests(20, seed=2)
    expected, _ = run(make_core(model_folder, "cuda"), before)
    core = make_core(model_folder, "cuda")
    replies = requantize_once_all_run(core, isq)
    got, _ = run(core, before)
    assert_equal_but_for_rounding(model_folder, before, got, expected)
    while core.is_loading:
        core.poll()
    assert core.run_command("job", {"id": replies[0].result()["id"]}).result()["state"] == "done"
    assert core.stats()["isq_method"] == "gptq" and core.stats()["memory"]["graph_bytes"] > 0
    again, _ = run(core, after)
    fresh, _ = run(make_core(model_folder, "cuda", **isq), after)
    different = [key for key in again if again[key] != fresh[key]]
    assert len(different) <= len(again) // 20, different
    core.close()
