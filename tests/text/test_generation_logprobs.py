"""What outputs carry beside the text: logprobs, and the scalings of a mix."""

from __future__ import annotations

import json
import math

import pytest

from tests.text.generations import delta, running
from trident_llm.generation import logprobs_json
from trident_llm.protocol import TokenLogprobs, TopLogprob
from trident_llm.text import Tokenizer


def row(token: str, logprob: float, *top: str) -> TokenLogprobs:
    ranked = [TopLogprob(ord(other), -float(rank)) for rank, other in enumerate(top, start=1)]
    return TokenLogprobs(ord(token), logprob, 7, ranked)


def test_logprobs_stay_beside_their_tokens(byte_tokenizer: Tokenizer) -> None:
    generation = running(byte_tokenizer, logprobs=2, stop="c")
    generation.apply(delta("a", logprobs=[row("a", -0.5, "a", "b")]))
    first = generation.take(0)
    generation.apply(delta("abcd", logprobs=[row(char, -1.0, "x") for char in "abcd"]))
    second = generation.take(0)
    assert first is not None
    assert second is not None
    assert (first.cumulative_logprob, second.cumulative_logprob) == (-0.5, -2.5)
    assert first.logprobs is not None
    assert second.logprobs is not None
    assert [token.decoded_token for token in first.logprobs[0].top] == ["a", "b"]
    assert [position.chosen.decoded_token for position in second.logprobs] == ["b", "c"]
    assert [position.chosen.token_id for position in second.logprobs] == second.token_ids


def test_cumulative_logprob_alone(byte_tokenizer: Tokenizer) -> None:
    generation = running(byte_tokenizer, return_cumulative_logprob=True)
    assert generation.params.logprobs == 0
    generation.apply(delta("ab", logprobs=[row("a", -1.0), row("b", -2.0)]))
    output = generation.take(0)
    assert output is not None
    assert (output.cumulative_logprob, output.logprobs) == (-3.0, None)


def test_logprobs_json(byte_tokenizer: Tokenizer) -> None:
    generation = running(byte_tokenizer, logprobs=2)
    generation.apply(delta("ab", logprobs=[row("a", -math.inf, "x", "a"), row("b", -2.0)]))
    assert json.loads(logprobs_json(generation.full_output(0).logprobs)) == [
        {
            "97": {"logprob": -9999.0, "rank": 7, "decoded_token": "a"},
            "120": {"logprob": -1.0, "rank": 1, "decoded_token": "x"},
        },
        {"98": {"logprob": -2.0, "rank": 7, "decoded_token": "b"}},
    ]
    assert list(json.loads(logprobs_json(generation.full_output(0).logprobs))[0]) == ["97", "120"]
    assert logprobs_json(None) == "null"


def test_scalings_are_averaged_over_the_tokens(byte_tokenizer: Tokenizer) -> None:
    generation = running(byte_tokenizer, return_scalings=True)
    generation.apply(delta("x", scalings={"one": [0.2], "two": [0.8]}))
    generation.apply(delta("y", offset=1, scalings={"one": [0.6], "two": [0.4]}))
    output = generation.take(0)
    assert output is not None and output.scalings == pytest.approx({"one": 0.4, "two": 0.6})
    assert output.layer_scalings is None
    layered = running(byte_tokenizer, return_layer_scalings=True)
    rows = [{"one": [0.1, 0.3]}, {"one": [0.5, 0.7]}]
    layered.apply(delta("x", scalings=rows[0]))
    layered.take(0)
    layered.apply(delta("y", offset=1, scalings=rows[1]))
    output = layered.take(0)
    assert output is not None and output.scalings == pytest.approx({"one": 0.4})
    assert output.layer_scalings == rows[1:]
    plain = running(byte_tokenizer, return_scalings=True)
    plain.apply(delta("x"))
    assert plain.full_output(0).scalings is None
