"""A sliding-window Mistral: tokens equal those of transformers, and blocks return to the pool on the way."""

from __future__ import annotations

import pytest
import torch

from tests.engine.test_engine import run, submit, tokens
from tests.fakes.tiny_models import write_tiny_llama
from trident_llm import EngineConfig
from trident_llm.engine.engine import EngineCore

WINDOW = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    target = tmp_path_factory.mktemp("mistral")
    return write_tiny_llama(target, architecture="MistralForCausalLM", sliding_window=WINDOW)


@pytest.mark.parametrize("lookahead", [False, True])
@pytest.mark.parametrize("budget", [16, 256])
def test_tokens_equal_transformers_with_few_blocks(folder, lookahead, budget):
    from transformers import AutoModelForCausalLM

    settings = {"max_num_blocks": 26, "block_size": 8, "max_num_seqs": 8, "max_num_batched_tokens": budget}
    config = EngineConfig(model=str(folder), dtype="fp32", device="cpu", num_threads=1, **settings)
    core = EngineCore(config, lookahead=lookahead)
    prompts = [[5 + (7 * i + j) % 300 for j in range(10 + 20 * i)] for i in range(5)]
    requests = [submit(prompt, temperature=0.0, max_tokens=60) for prompt in prompts]
    deltas = run(core, *requests)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert model.config.sliding_window == WINDOW
    for request in requests:
        prompt = torch.tensor([request.prompt_ids])
        with torch.inference_mode():
            expected = model.generate(
                prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=60, do_sample=False, eos_token_id=None
            )
        assert tokens(deltas, request) == expected[0, prompt.shape[1] :].tolist()
    assert core.stats()["kv_blocks_used"] == 0


def test_a_window_bounds_what_a_sequence_holds(folder):
    settings = {"max_num_blocks": 64, "block_size": 8, "max_num_seqs": 2}
    core = EngineCore(EngineConfig(model=str(folder), dtype="fp32", device="cpu", num_threads=1, **settings))
    core.add(submit(range(10, 20), temperature=0.0, max_tokens=200))
    used = []
    while core.has_work():
        core.step()
        used.append(core.stats()["kv_blocks_used"])
    assert max(used) == WINDOW // 8 + 1
