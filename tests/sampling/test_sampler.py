"""The sampler against a plain numpy implementation of the same definitions."""

import numpy as np
import pytest
import torch

from trident_llm.protocol import SamplingParams
from trident_llm.sampling.sampler import SamplingRow, sample

VOCAB = 3000


def row(position=5, sample_index=0, tokens=(1, 2, 3), num_prompt_tokens=1, stop_ids=(), **params):
    params = {"seed": 0, "max_tokens": 100, **params}
    return SamplingRow(SamplingParams(**params), sample_index, position, tokens, num_prompt_tokens, frozenset(stop_ids))


def draw_many(logits, count=4000, **params):
    rows = [row(position=i, **params) for i in range(count)]
    return np.array(sample(logits.expand(count, -1), rows).token_ids)


def expected_probs(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    scaled = logits.double().numpy() / temperature
    if min_p:
        scaled[scaled < scaled.max() + np.log(min_p)] = -np.inf
    order = np.argsort(-scaled, kind="stable")
    if top_k:
        scaled[order[top_k:]] = -np.inf
    probs = np.exp(scaled - scaled.max())
    probs /= probs.sum()
    before = np.cumsum(probs[order]) - probs[order]
    probs[order[before >= top_p]] = 0
    return probs / probs.sum()


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.5},
        {"top_k": 3},
        {"top_k": 2000},
        {"top_p": 0.6},
        {"top_k": 5, "top_p": 0.5},
        {"min_p": 0.2},
        {"temperature": 2.0, "top_p": 0.99},
        {"min_p": 0.05, "top_p": 0.9, "top_k": 50},
        {"top_p": 1e-6},
    ],
)
def test_frequencies_follow_the_definition(params):
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(1)) * 2
    expected = expected_probs(logits, **params)
    drawn = draw_many(logits, **params)
    assert expected[drawn].min() > 0, "a token outside the allowed set was drawn"
    # Compare the mass of the 10 likeliest tokens and of all others: five standard deviations.
    likely = np.argsort(-expected)[:10]
    for mass, frequency in [(expected[t], (drawn == t).mean()) for t in likely]:
        assert abs(mass - frequency) <= 5 * np.sqrt(mass * (1 - mass) / len(drawn)) + 1e-9


def test_a_flat_distribution_needs_more_than_the_first_candidates():
    logits = torch.zeros(VOCAB)
    drawn = draw_many(logits, top_p=0.9)
    assert len(set(drawn.tolist())) > 1500


def test_greedy_takes_the_largest_whatever_the_other_options():
    logits = torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(2))
    rows = [row(temperature=t, top_p=0.5, top_k=7) for t in (0.0, 1e-9, 0.0, 0.0)]
    assert sample(logits, rows).token_ids == logits.argmax(-1).tolist()


def test_rows_do_not_influence_each_other():
    logits = torch.randn(6, VOCAB, generator=torch.Generator().manual_seed(3))
    options = [{}, {"top_k": 4}, {"temperature": 0.0}, {"top_p": 0.3}, {"min_p": 0.1}, {"logit_bias": {5: 100.0}}]
    rows = [row(position=i, seed=9, **option) for i, option in enumerate(options)]
    together = sample(logits, rows).token_ids
    assert together == [sample(logits[i : i + 1], [rows[i]]).token_ids[0] for i in range(6)]
    assert together[5] == 5


def test_the_seed_decides():
    logits = torch.zeros(VOCAB)
    assert draw_many(logits, 50, seed=4).tolist() == draw_many(logits, 50, seed=4).tolist()
    assert draw_many(logits, 50, seed=4).tolist() != draw_many(logits, 50, seed=5).tolist()
    assert draw_many(logits, 50, sample_index=1).tolist() != draw_many(logits, 50).tolist()


def test_penalties_follow_their_definitions():
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(4))
    tokens = [10, 11, 11, 12, 11]  # one prompt token, then four output tokens
    options = {"repetition_penalty": 1.7, "frequency_penalty": 0.4, "presence_penalty": 0.3}
    expected = logits.clone()
    for token in (10, 11, 12):
        expected[token] = expected[token] / 1.7 if expected[token] > 0 else expected[token] * 1.7
    for token, count in ((11, 3), (12, 1)):
        expected[token] -= 0.4 * count + 0.3
    for bias in range(0, VOCAB, 97):
        probe = torch.full((VOCAB,), -1e9)
        probe[[10, 11, 12, bias]] = logits[[10, 11, 12, bias]]
        wanted = torch.full((VOCAB,), -1e9)
        wanted[[10, 11, 12, bias]] = expected[[10, 11, 12, bias]]
        got = sample(probe[None], [row(tokens=tokens, temperature=0.0, **options)]).token_ids[0]
        assert got == int(wanted.argmax())


def test_min_tokens_forbids_stop_tokens_until_it_is_reached():
    logits = torch.zeros(1, VOCAB)
    logits[0, 7] = 10
    options = {"temperature": 0.0, "min_tokens": 3, "stop_ids": {7}}
    assert sample(logits, [row(position=3, tokens=[1, 2, 3], **options)]).token_ids != [7]
    assert sample(logits, [row(position=4, tokens=[1, 2, 3, 4], **options)]).token_ids == [7]


def test_logprobs_are_of_the_untouched_distribution():
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(5))
    result = sample(logits, [row(logprobs=3, temperature=0.7, logit_bias={17: 50.0})])
    reference = torch.log_softmax(logits[0], dim=-1)
    entry = result.logprobs[0]
    assert result.token_ids == [17] and entry.token_id == 17
    assert entry.logprob == pytest.approx(float(reference[17]), abs=1e-6)
    assert entry.rank == int((reference > reference[17]).sum()) + 1
    values, ids = torch.topk(reference, 3)
    assert [t.token_id for t in entry.top] == ids.tolist()
    assert [t.logprob for t in entry.top] == pytest.approx(values.tolist())
    assert sample(logits, [row(logprobs=0)]).logprobs[0].top == []
    assert sample(logits, [row()]).logprobs == [None]
