"""Greedy tokens of the engine equal those of transformers, in fp32, however the work is cut up."""

import copy

import pytest
import torch

from trident_llm import Engine, EngineConfig

# Around block and chunk boundaries, and up to several chunks.
PROMPT_LENGTHS = (5, 6, 8, 11, 15, 16, 17, 31, 32, 33, 47, 63, 64, 65, 100, 128, 150, 300, 420, 700)
NEW_TOKENS = 20


@pytest.fixture(scope="module")
def oracle(smollm2):
    """(prompt, greedy tokens by transformers) for each length."""
    return greedy_cases(smollm2, smollm2.model)


def greedy_cases(smollm2, model):
    text = smollm2.long_text
    ids = smollm2.tokenizer(text)["input_ids"]
    cases = []
    for index, length in enumerate(PROMPT_LENGTHS):
        start = 97 * index
        prompt = smollm2.tokenizer.decode(ids[start : start + length])
        prompt_ids = smollm2.tokenizer(prompt, return_tensors="pt")["input_ids"].to(model.device)
        with torch.inference_mode():
            output = model.generate(prompt_ids, max_new_tokens=NEW_TOKENS, do_sample=False)
        cases.append((prompt, output[0, prompt_ids.shape[1] :].tolist()))
    return cases


def engine_config(smollm2, **settings):
    settings = {"dtype": "fp32", "device": "cpu", "max_model_len": 752, "max_num_blocks": 1024, **settings}
    return EngineConfig(model=str(smollm2.gguf), **settings)


def tokens_of(stream):
    return [token for output in stream for token in output.token_ids]


def options():
    return {"temperature": 0.0, "max_tokens": NEW_TOKENS}


# 400 tokens one after another read all weights each: minutes where other programs use the memory, too.
@pytest.mark.timeout(400)
def test_one_at_a_time_equals_transformers(smollm2, oracle):
    with Engine(engine_config(smollm2, prefix_caching=False)) as engine:
        for prompt, expected in oracle:
            assert tokens_of(engine.generate(prompt, **options())) == expected
        engine.check_integrity()


@pytest.mark.parametrize(
    ("settings", "preempts"),
    [
        ({}, False),
        ({"max_num_batched_tokens": 64, "max_num_seqs": 64}, False),
        ({"max_num_batched_tokens": 64, "max_num_seqs": 64, "max_num_blocks": 47, "prefix_caching": False}, True),
        ({"max_num_blocks": 47, "max_num_batched_tokens": 256}, True),
    ],
    ids=["whole", "chunked", "chunked-small-pool", "cached-small-pool"],
)
def test_all_at_once_equals_transformers(smollm2, oracle, settings, preempts):
    check_all_at_once(smollm2, oracle, settings, preempts)


@pytest.fixture(scope="module")
def gpu_oracle(smollm2):
    return greedy_cases(smollm2, copy.deepcopy(smollm2.model).to("cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("settings", "preempts"),
    [
        ({}, False),
        ({"max_num_batched_tokens": 64, "max_num_seqs": 64}, False),
        ({"max_num_blocks": 47, "max_num_batched_tokens": 256, "max_num_seqs": 64}, True),
    ],
    ids=["whole", "chunked", "cached-small-pool"],
)
def test_on_a_gpu_equals_transformers_on_it(smollm2, gpu_oracle, settings, preempts):
    check_all_at_once(smollm2, gpu_oracle, {"device": "cuda", **settings}, preempts)


def check_all_at_once(smollm2, oracle, settings, preempts):
    with Engine(engine_config(smollm2, **settings)) as engine:
        streams = [engine.generate(prompt, **options()) for prompt, _ in oracle]
        for stream, (prompt, expected) in zip(streams, oracle, strict=True):
            assert tokens_of(stream) == expected, prompt[:60]
        engine.check_integrity()
        stats = engine.stats()
        assert (stats["preemptions_total"] > 0) == preempts
        assert stats["kv_blocks_used"] == 0
        assert stats["peak_running_requests"] > 4
