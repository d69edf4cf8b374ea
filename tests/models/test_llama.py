"""LlamaDecoder against transformers on tiny random models."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from tests.fakes.paged_steps import Chunk, PagedSteps
from tests.fakes.tiny_decoders import CPU, MAX_LEN, VOCAB, TinyDecoder, make_tiny, parameters_of
from trident_llm.engine.kv_cache import KVCache
from trident_llm.errors import LoadFailed
from trident_llm.models.llama import LlamaDecoder

FAMILY = {
    "llama": ("Llama", {}, {}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}, {"tie_word_embeddings": True}),
    "llama-biases": (
        "Llama",
        {"attention_bias": True, "mlp_bias": True},
        {"attention_bias": True, "attention_output_bias": True, "mlp_bias": True},
    ),
    "llama-one-head-each": ("Llama", {"num_key_value_heads": 6}, {"num_key_value_heads": 6}),
    "mistral-window": ("Mistral", {"sliding_window": 11}, {"sliding_window": 11}),
    "qwen2": ("Qwen2", {}, {"attention_bias": True}),
    "qwen3": ("Qwen3", {"head_dim": 24}, {"head_dim": 24, "qk_norm": True}),
}
TOKENS = [[random.Random(seed).randrange(VOCAB) for _ in range(length)] for seed, length in enumerate((70, 33, 5, 90))]


@pytest.fixture(scope="module", params=FAMILY)
def tiny(request) -> TinyDecoder:
    return make_tiny(*FAMILY[request.param])


@pytest.fixture(scope="module")
def llama() -> TinyDecoder:
    return make_tiny("Llama")


def new_steps() -> PagedSteps:
    return PagedSteps(len(TOKENS), max_len=MAX_LEN, block_size=8)


def assert_logits(tiny: TinyDecoder, actual: list[torch.Tensor]) -> None:
    for ids, logits in zip(TOKENS, actual, strict=True):
        torch.testing.assert_close(logits, tiny.expected(ids), rtol=0, atol=1e-4)


def test_whole_prompts_at_once(tiny):
    assert_logits(tiny, tiny.run(new_steps(), TOKENS, [[Chunk(i, 0, len(ids)) for i, ids in enumerate(TOKENS)]]))


def test_each_prompt_alone(tiny):
    assert_logits(tiny, tiny.run(new_steps(), TOKENS, [[Chunk(i, 0, len(ids))] for i, ids in enumerate(TOKENS)]))


def test_token_by_token_in_a_batch(tiny):
    schedule = [
        [Chunk(i, position, 1) for i, ids in enumerate(TOKENS) if position < len(ids)]
        for position in range(max(map(len, TOKENS)))
    ]
    assert_logits(tiny, tiny.run(new_steps(), TOKENS, schedule))


def test_decodes_mixed_with_chunks_of_every_size(tiny):
    rng, done, schedule = random.Random(7), [0] * len(TOKENS), []
    while any(start < len(ids) for start, ids in zip(done, TOKENS, strict=True)):
        chunks = []
        for i, ids in enumerate(TOKENS):
            size = min(rng.choice((0, 1, 1, 3, 8, 20)), len(ids) - done[i])
            if size:
                chunks.append(Chunk(i, done[i], size))
                done[i] += size
        if chunks:
            schedule.append(sorted(chunks, key=lambda chunk: chunk.num_tokens > 1))
    assert_logits(tiny, tiny.run(new_steps(), TOKENS, schedule))


def test_bf16_is_near_transformers_in_bf16():
    tiny = make_tiny("Llama", dtype=torch.bfloat16)
    exact = make_tiny("Llama")
    (logits,) = tiny.run(PagedSteps(1, max_len=MAX_LEN, block_size=8), TOKENS[:1], [[Chunk(0, 0, 70)]])
    ours = (logits - exact.expected(TOKENS[0])).pow(2).mean().sqrt()
    theirs = (tiny.expected(TOKENS[0]) - exact.expected(TOKENS[0])).pow(2).mean().sqrt()
    assert logits.dtype == torch.float32
    assert ours < 1.2 * theirs


def test_only_the_wanted_rows_have_logits(llama):
    steps = PagedSteps(1, max_len=MAX_LEN, block_size=8)
    cache = KVCache(llama.config, num_blocks=steps.num_blocks, block_size=8, dtype=torch.float32, device=CPU)
    model_input = steps.model_input(TOKENS, [Chunk(0, 0, 70)])
    every = llama.decoder.forward(model_input, cache)
    two = llama.decoder.forward(replace(model_input, logits_rows=torch.tensor([69, 3])), cache)
    none = llama.decoder.forward(replace(model_input, logits_rows=torch.tensor([], dtype=torch.int64)), cache)
    torch.testing.assert_close(two, every[[69, 3]])
    assert none.shape == (0, VOCAB)


def test_tokens_that_are_not_stored_read_what_is_there(llama):
    """Running tokens again without writing gives the same logits and leaves the cache as it was."""
    steps = PagedSteps(1, max_len=MAX_LEN, block_size=8)
    cache = KVCache(llama.config, num_blocks=steps.num_blocks, block_size=8, dtype=torch.float32, device=CPU)
    expected = llama.decoder.forward(steps.model_input(TOKENS, [Chunk(0, 0, 70)]), cache)
    before = [layer.values.clone() for layer in cache.layers]
    again = llama.decoder.forward(steps.model_input(TOKENS, [Chunk(0, 40, 30, stored=False)]), cache)
    torch.testing.assert_close(again, expected[40:])
    assert all(torch.equal(old, layer.values) for old, layer in zip(before, cache.layers, strict=True))


def load(tiny: TinyDecoder, weights: list[tuple[str, torch.Tensor]]) -> LlamaDecoder:
    decoder = LlamaDecoder(tiny.config, dtype=torch.float32, device=CPU, max_model_len=MAX_LEN)
    decoder.load_weights(weights)
    return decoder


def test_weights_may_come_in_any_order(llama):
    weights = list(parameters_of(llama.oracle, llama.config).items())
    random.Random(3).shuffle(weights)
    shuffled = replace(llama, decoder=load(llama, weights))
    assert_logits(llama, shuffled.run(new_steps(), TOKENS, [[Chunk(i, 0, len(ids)) for i, ids in enumerate(TOKENS)]]))
    assert shuffled.decoder.num_bytes == sum(tensor.nbytes for _, tensor in weights)


def test_loading_keeps_no_reference_to_the_given_tensors(llama):
    weights = [(name, t.clone()) for name, t in parameters_of(llama.oracle, llama.config).items()]
    copied = replace(llama, decoder=load(llama, weights))
    for _, tensor in weights:
        tensor.zero_()
    assert_logits(llama, copied.run(new_steps(), TOKENS, [[Chunk(i, 0, len(ids)) for i, ids in enumerate(TOKENS)]]))


def test_a_missing_tensor_is_named(llama):
    weights = parameters_of(llama.oracle, llama.config)
    del weights["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(LoadFailed, match=r"missing.*model\.layers\.1\.mlp\.up_proj\.weight"):
        load(llama, list(weights.items()))


def test_an_unknown_tensor_is_named(llama):
    weights = {**parameters_of(llama.oracle, llama.config), "model.layers.0.self_attn.q_proj.bias": torch.zeros(96)}
    with pytest.raises(LoadFailed, match=r"model\.layers\.0\.self_attn\.q_proj\.bias"):
        load(llama, list(weights.items()))


def test_a_misshapen_tensor_is_named_with_both_shapes(llama):
    weights = {**parameters_of(llama.oracle, llama.config), "model.norm.weight": torch.ones(1)}
    with pytest.raises(LoadFailed, match=r"model\.norm\.weight.*\[1\].*\[48\]"):
        load(llama, list(weights.items()))
