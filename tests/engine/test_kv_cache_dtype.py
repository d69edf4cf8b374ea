"""The setting kv_cache_dtype: what it allows, how many blocks it gives, and how near 8 bits come to full precision."""

from __future__ import annotations

import math
import random
from types import SimpleNamespace

import pytest
import torch

from tests.fakes.tiny_decoders import CPU
from tests.fakes.tiny_models import write_tiny_llama
from trident_llm import EngineConfig
from trident_llm.engine import loading
from trident_llm.engine.engine import EngineCore
from trident_llm.engine.loading import choose_kv_cache_dtype
from trident_llm.errors import BadRequest
from trident_llm.protocol import SampleStart, SamplingParams, Submit

CUDA = torch.device("cuda", 0)
LAYERS, HIDDEN, VOCAB = 2, 64, 320
ROUNDING_ERRORS = {"int8": 0.005, "fp8": 0.03}
"""Of K and V, relative to them. int8 is wrong by up to half of 1/127 of a head's largest value, evenly spread, and that
value is about twice the others; fp8 keeps three bits behind the first, so that a value is wrong by up to 1/16."""


@pytest.fixture
def model_folder(tmp_path):
    return write_tiny_llama(tmp_path, hidden=HIDDEN, layers=LAYERS, vocab=VOCAB)


def make_core(folder, **settings):
    defaults = {"dtype": "fp32", "device": "cpu", "num_threads": 1, "block_size": 8, "max_num_blocks": 512}
    return EngineCore(EngineConfig(model=str(folder), **{**defaults, **settings}))


@pytest.mark.parametrize(
    ("name", "dtype", "device", "capability", "expected"),
    [
        ("auto", torch.float32, CPU, None, torch.float32),
        ("bf16", torch.bfloat16, CPU, None, torch.bfloat16),
        ("fp16", torch.float16, CUDA, (7, 0), torch.float16),
        ("int8", torch.bfloat16, CPU, None, torch.int8),
        ("int8", torch.float16, CUDA, (7, 0), torch.int8),
        ("fp8", torch.bfloat16, CUDA, (8, 9), torch.float8_e4m3fn),
        ("fp8", torch.bfloat16, CUDA, (9, 0), torch.float8_e4m3fn),
    ],
)
def test_allowed(monkeypatch, name, dtype, device, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert choose_kv_cache_dtype(name, dtype, device) == expected


@pytest.mark.parametrize(
    ("name", "dtype", "device", "capability", "message"),
    [
        ("fp8", torch.bfloat16, CPU, None, "fp8 needs .* 8.9 or later; allowed here: auto, bf16, int8"),
        ("fp8", torch.float16, CUDA, (8, 6), "fp8 needs .* 8.9 or later; allowed here: auto, fp16, int8"),
        ("fp16", torch.bfloat16, CUDA, (9, 0), r"fp16 is not .*\(bf16\); allowed here: auto, bf16, fp8, int8"),
        ("bf16", torch.float32, CPU, None, r"bf16 is not .*\(fp32\); allowed here: auto, int8"),
    ],
)
def test_refused(monkeypatch, name, dtype, device, capability, message):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with pytest.raises(BadRequest, match="kv_cache_dtype: " + message):
        choose_kv_cache_dtype(name, dtype, device)


def test_a_wrong_combination_fails_the_load_before_weights_are_read(model_folder):
    (model_folder / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(BadRequest, match="kv_cache_dtype: fp8 needs a GPU"):
        make_core(model_folder, kv_cache_dtype="fp8")


def test_an_unknown_name_is_refused():
    with pytest.raises(BadRequest, match="kv_cache_dtype: 'int4' is not one of auto, bf16, fp16, fp8, int8"):
        EngineConfig.from_parameters({"model": "m", "kv_cache_dtype": "int4"})


def test_the_same_memory_holds_nearly_twice_the_blocks(model_folder, monkeypatch):
    memory = SimpleNamespace(available=100e6)
    monkeypatch.setattr(loading, "psutil", SimpleNamespace(virtual_memory=lambda: memory))
    pools = {}
    for name in ("auto", "int8"):
        core = make_core(model_folder, dtype="bf16", kv_cache_dtype=name, max_num_blocks=None, max_num_seqs=2048)
        pools[name] = core.model.kv_cache
        assert core.model.max_model_len == 512
    # A head of 16 numbers takes 32 bytes with 16 bits each; with 8, and the scale, 20.
    assert pools["int8"].num_blocks / pools["auto"].num_blocks == pytest.approx(32 / 20, rel=1e-3)
    assert 0.99 < pools["int8"].num_bytes / pools["auto"].num_bytes < 1.01


def greedy(core, prompts):
    """(token, log-probability) of 16 tokens for each prompt."""
    for index, prompt in enumerate(prompts):
        params = SamplingParams(seed=0, max_tokens=16, temperature=0.0, ignore_eos=True, logprobs=0)
        core.add(Submit(request_id=str(index), prompt_ids=prompt, params=params, samples=[SampleStart(index=0)]))
    found = [[] for _ in prompts]
    while core.has_work():
        for delta in core.step():
            found[int(delta.request_id)] += [(entry.token_id, entry.logprob) for entry in delta.logprobs]
    return found


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("cpu", "int8"),
        pytest.param("cuda", "int8", marks=pytest.mark.gpu),
        pytest.param("cuda", "fp8", marks=pytest.mark.gpu),
    ],
)
def test_log_probabilities_are_near_those_of_full_precision(model_folder, device, name):
    rng = random.Random(0)
    prompts = [[rng.randrange(5, VOCAB) for _ in range(rng.randint(1, 120))] for _ in range(60)]
    settings = {"device": device, "max_num_seqs": 16, "max_num_batched_tokens": 64}
    expected = greedy(make_core(model_folder, **settings), prompts)
    got = greedy(make_core(model_folder, kv_cache_dtype=name, **settings), prompts)
    errors, equal = [], 0
    for ours, theirs in zip(got, expected, strict=True):
        for (token, logprob), (expected_token, expected_logprob) in zip(ours, theirs, strict=True):
            if token != expected_token:
                break
            equal += 1
            errors.append(logprob - expected_logprob)
    # A product of the head, whose weights are 0.1, with a normed state. Errors of K and V of all layers add up squared.
    logit_size = 0.1 * math.sqrt(HIDDEN)
    limit = ROUNDING_ERRORS[name] * math.sqrt(2 * LAYERS) * logit_size
    assert 0.1 * limit < math.sqrt(sum(error**2 for error in errors) / len(errors)) < limit
    # Tokens differ from the first near-tie on.
    assert equal >= (0.85 if name == "int8" else 0.5) * 16 * len(prompts)
