"""A generation from submission to text: deltas in, outputs out."""

from __future__ import annotations

import itertools
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trident_llm.errors import BadRequest, Cancelled, EngineFailed, Overloaded
from trident_llm.generation import Generation, Output, decode_prompt, logprobs_json
from trident_llm.options import RequestOptions
from trident_llm.protocol import Abort, Delta, Limits, SampleStart, TokenLogprobs, TopLogprob, Welcome
from trident_llm.text import Tokenizer

EOS = 256
WELCOME = Welcome(
    epoch="one",
    model="bytes",
    tokenizer_folder="",
    max_model_len=64,
    vocab_size=257,
    eos_token_ids=[EOS],
    max_num_seqs=4,
    max_queue_size=4,
    limits=Limits(max_n=4, max_stop_strings=4, max_logprobs=4, max_prompt_bytes=200),
)


def start(tokenizer: Tokenizer, prompt: str = "Hello", **options: object) -> Generation:
    parsed = RequestOptions.parse(
        options, limits=WELCOME.limits, max_model_len=WELCOME.max_model_len, vocab_size=WELCOME.vocab_size
    )
    return Generation("r", prompt, parsed, tokenizer, WELCOME)


def running(tokenizer: Tokenizer, prompt: str = "Hello", **options: object) -> Generation:
    generation = start(tokenizer, prompt, **options)
    generation.submit()
    return generation


def delta(text: str | bytes | list[int], offset: int = 0, **fields: object) -> Delta:
    data = text.encode() if isinstance(text, str) else text
    values: dict[str, object] = {"request_id": "r", "sample_index": 0, **fields}
    return Delta(offset=offset, token_ids=list(data), **values)  # type: ignore[arg-type]


def text_of(output: Output | None) -> str | None:
    return None if output is None else output.text


def test_submit_carries_the_request(byte_tokenizer: Tokenizer) -> None:
    generation = start(
        byte_tokenizer, "Hé", n=2, seed=5, temperature=0.5, request_priority=-1, cache_salt="s", logprobs=2, user="u"
    )
    submit = generation.submit()
    assert (submit.request_id, submit.prompt_ids) == ("r", list("Hé".encode()))
    assert submit.samples == [SampleStart(index=0), SampleStart(index=1)]
    assert submit.user == "u"
    assert (submit.priority, submit.cache_salt, submit.params.seed, submit.params.logprobs) == (-1, "s", 5, 2)
    assert submit.params.max_tokens == 64 - 3


def test_seed_is_drawn_once(byte_tokenizer: Tokenizer) -> None:
    one, two = start(byte_tokenizer), start(byte_tokenizer)
    assert one.submit().params.seed == one.submit().params.seed
    assert one.submit().params.seed != two.submit().params.seed


def test_max_tokens_is_cut_to_the_context(byte_tokenizer: Tokenizer) -> None:
    assert start(byte_tokenizer, max_tokens=1000, min_tokens=100).params.max_tokens == 59
    assert start(byte_tokenizer, max_tokens=1000, min_tokens=100).params.min_tokens == 59
    assert start(byte_tokenizer, "x" * 63).params.max_tokens == 1


def test_messages_are_rendered(byte_tokenizer: Tokenizer) -> None:
    messages = json.dumps([{"role": "user", "content": "hi"}])
    generation = start(byte_tokenizer, "", messages=messages)
    assert generation.prompt == "user:hi\nassistant:"
    assert generation.prompt_ids == list(b"user:hi\nassistant:")
    assert start(byte_tokenizer, "", messages=json.loads(messages)).prompt == generation.prompt


@pytest.mark.parametrize(
    ("prompt", "options", "said"),
    [
        ("", {}, "text_input: empty"),
        ("x" * 64, {}, "text_input: 64 tokens; at most 63 are allowed.* 64 \\(max_model_len\\)"),
        ("x" * 201, {}, "text_input: at least 201 bytes; at most 200 \\(max_prompt_bytes\\) are allowed"),
        ("é" * 101, {}, "text_input: at least 202 bytes"),
        ("a\ud800", {}, "text_input: unpaired surrogate at character 1"),
        ("", {"messages": "nonsense"}, "messages: no JSON at line 1 column 1"),
        ("", {"messages": "[" + " " * 200 + "]"}, "messages: at least 202 bytes"),
        ("", {"messages": [{"role": "user", "content": "x" * 64}]}, "messages: 80 tokens; at most 63"),
        ("", {"messages": [{"role": "user", "content": "\ud800"}]}, "surrogate"),
        ("hi", {"messages": []}, "text_input: must be empty when messages is given"),
    ],
)
def test_bad_prompt_is_refused(byte_tokenizer: Tokenizer, prompt: str, options: dict[str, object], said: str) -> None:
    with pytest.raises(BadRequest, match=said):
        start(byte_tokenizer, prompt, **options)


def test_long_prompt_is_refused_before_tokenizing() -> None:
    options = RequestOptions.parse({}, limits=WELCOME.limits, max_model_len=64, vocab_size=257)
    with pytest.raises(BadRequest, match="at least 10000000 bytes"):
        Generation("r", "x" * 10_000_000, options, object(), WELCOME)  # type: ignore[arg-type]


def test_decode_prompt() -> None:
    assert decode_prompt("é".encode()) == "é"
    with pytest.raises(BadRequest, match=r"text_input: not valid UTF-8 at byte 2 \(ff fe\)"):
        decode_prompt(b"ab\xff\xfe")
    with pytest.raises(BadRequest, match="messages: not valid UTF-8"):
        decode_prompt(b"\xe2\x82", "messages")


def test_text_comes_in_deltas(byte_tokenizer: Tokenizer) -> None:
    generation = running(byte_tokenizer)
    assert generation.take(0) is None
    assert generation.apply(delta("He", num_cached_tokens=4)) == []
    assert generation.apply(delta("é".encode()[:1], offset=2)) == []
    first = generation.take(0)
    assert first is not None
    assert (first.text, first.token_ids, first.finish_reason) == ("He", [72, 101, 0xC3], None)
    assert (first.num_input_tokens, first.num_output_tokens, first.num_cached_tokens) == (5, 3, 4)
    assert (first.logprobs, first.cumulative_logprob) == (None, None)
    assert generation.take(0) is None
    generation.apply(delta("é".encode()[1:], offset=3))
    generation.apply(delta([EOS], offset=4, finish_reason="stop", stopped_by_token=True))
    last = generation.take(0)
    assert last is not None
    assert (last.text, last.token_ids, last.finish_reason, last.num_output_tokens) == ("é", [0xA9, EOS], "stop", 5)
    assert generation.finished
    assert generation.take(0) is None
    assert generation.full_output(0).text == "Heé"
    assert generation.full_output(0).token_ids == [72, 101, 0xC3, 0xA9, EOS]


def test_stop_token_is_counted_and_not_shown(byte_tokenizer: Tokenizer) -> None:
    generation = running(byte_tokenizer, stop_token_ids=[ord("!")])
    generation.apply(delta("Hi!", finish_reason="stop", stopped_by_token=True))
    output = generation.full_output(0)
    assert (output.text, output.num_output_tokens, output.finish_reason) == ("Hi", 3, "stop")


def test_output_that_ends_without_text_is_still_taken(byte_tokenizer: Tokenizer) -> None:
    generation = running(byte_tokenizer)
    generation.apply(delta([EOS], finish_reason="stop", stopped_by_token=True))
    output = generation.take(0)
    assert output is not None
    assert (output.text, output.finish_reason, output.token_ids) == ("", "stop", [EOS])


def test_half_a_character_at_the_end_becomes_a_replacement_character(byte_tokenizer: Tokenizer) -> None:
    generation = running(byte_tokenizer)
    generation.apply(delta("a🎉".encode()[:3], finish_reason="length"))
    assert text_of(generation.take(0)) == "a\ufffd"


def test_stop_string_over_several_deltas(byte_tokenizer: Tokenizer) -> None:
    generation = running(byte_tokenizer, stop=["STOP", "STAY"])
    assert generation.apply(delta("one ST")) == []
    assert text_of(generation.take(0)) == "one "
    assert generation.apply(delta("OP and more", offset=6)) == [Abort(request_id="r", sample_index=0)]
    output = generation.take(0)
    assert output is not None
    assert (output.text, output.finish_reason, output.token_ids) == ("", "stop", list(b"OP"))
    assert output.num_output_tokens == len("one STOP"), "tokens after the stop string are not counted"
    assert generation.apply(delta("late", offset=17)) == []
    assert generation.full_output(0).text == "one "


def test_held_text_is_shown_when_no_stop_string_came_of_it(byte_tokenizer: Tokenizer) -> None:
    generation = running(byte_tokenizer, stop="STOP")
    generation.apply(delta("one STO", finish_reason="length"))
    output = generation.take(0)
    assert output is not None
    assert (output.text, output.finish_reason) == ("one STO", "length")


def test_stop_string_completed_by_the_last_token_needs_no_abort(byte_tokenizer: Tokenizer) -> None:
    generation = running(byte_tokenizer, stop="STOP")
    assert generation.apply(delta("one STOP", finish_reason="length")) == []
    assert generation.full_output(0).finish_reason == "stop"


def test_stop_string_before_min_tokens_does_not_count(byte_tokenizer: Tokenizer) -> None:
    generation = running(byte_tokenizer, stop="ab", min_tokens=3)
    generation.apply(delta("ab ab ab"))
    assert generation.full_output(0).text == "ab "


def test_samples_are_separate(byte_tokenizer: Tokenizer) -> None:
    generation = running(byte_tokenizer, n=2, stop="!")
    assert generation.apply(delta("one!")) == [Abort(request_id="r", sample_index=0)]
    generation.apply(delta("two", sample_index=1))
    assert not generation.finished
    generation.apply(delta([], offset=3, sample_index=1, finish_reason="length"))
    assert generation.finished
    outputs = [generation.take(index) for index in (0, 1)]
    assert [text_of(output) for output in outputs] == ["one", "two"]
    assert [output and output.finish_reason for output in outputs] == ["stop", "length"]


def test_duplicates_are_dropped(byte_tokenizer: Tokenizer) -> None:
    generation = running(byte_tokenizer)
    generation.apply(delta("abcd"))
    generation.apply(delta("ab"))
    generation.apply(delta("cdef", offset=2))
    generation.apply(delta("ef", offset=4, finish_reason="length"))
    assert generation.full_output(0).text == "abcdef"
    assert generation.full_output(0).finish_reason == "length"


def test_gap_asks_for_resubmission(byte_tokenizer: Tokenizer) -> None:
    generation = running(byte_tokenizer, n=2)
    generation.apply(delta("abc"))
    generation.apply(delta("done", sample_index=1, finish_reason="length"))
    assert generation.apply(delta("f", offset=5)) == [Abort(request_id="r")]
    assert generation.needs_resubmit
    assert generation.apply(delta("g", offset=6)) == []
    submit = generation.submit()
    assert not generation.needs_resubmit
    assert submit.request_id == generation.request_id != "r"
    assert submit.samples == [SampleStart(index=0, output_ids=list(b"abc"))]
    assert generation.apply(delta("d", offset=3)) == [], "a delta of the submission before is stale"
    generation.apply(delta("def", offset=3, finish_reason="length", request_id=submit.request_id))
    assert generation.full_output(0).text == "abcdef"
    assert generation.finished


def test_resubmission_keeps_stop_strings_and_characters_whole(byte_tokenizer: Tokenizer) -> None:
    """What was held back when the engine died goes on where it was."""
    generation = running(byte_tokenizer, stop="é!")
    generation.apply(delta(b"x" + "é".encode()[:1]))
    submit = generation.submit()
    assert submit.samples[0].output_ids == [ord("x"), 0xC3]
    aborts = generation.apply(delta("é!".encode()[1:] + b"y", offset=2, request_id=submit.request_id))
    assert aborts == [Abort(request_id=submit.request_id, sample_index=0)]
    assert generation.full_output(0).text == "x"


def test_error_ends_all_samples(byte_tokenizer: Tokenizer) -> None:
    generation = running(byte_tokenizer, n=2)
    generation.apply(delta("ab"))
    aborts = generation.apply(delta([], offset=2, finish_reason="error", error="[UNAVAILABLE] queue is full"))
    assert aborts == [Abort(request_id="r")]
    assert isinstance(generation.error, Overloaded)
    assert generation.error.message == "queue is full"
    assert generation.finished
    assert [generation.full_output(index).finish_reason for index in (0, 1)] == ["error", "error"]


def test_failure_and_cancellation(byte_tokenizer: Tokenizer) -> None:
    generation = running(byte_tokenizer)
    generation.apply(delta("ab"))
    assert generation.cancel() == [Abort(request_id="r")]
    assert generation.cancel() == []
    assert generation.fail(EngineFailed("too late")) == []
    assert generation.error is None
    output = generation.take(0)
    assert output is not None
    assert (output.text, output.finish_reason) == ("ab", "cancelled")
    never_sent = start(byte_tokenizer)
    assert never_sent.fail(Cancelled("gone")) == []
    assert isinstance(never_sent.error, Cancelled)


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


@given(
    token_ids=st.lists(st.sampled_from([*b"ab !", *"é🎉".encode(), EOS]), min_size=1, max_size=30),
    cuts=st.lists(st.integers(0, 30), max_size=6),
    overlap=st.integers(0, 3),
    restart_at=st.integers(0, 6),
)
def test_any_way_of_delivery_gives_the_same_text(
    byte_tokenizer: Tokenizer, token_ids: list[int], cuts: list[int], overlap: int, restart_at: int
) -> None:
    """Deltas of any size, repeated tokens, a restart in between and takes after each: the text is the full decoding
    up to the stop string, and the tokens are those up to its end."""
    whole = running(byte_tokenizer, stop="b!")
    whole.apply(delta(token_ids, finish_reason="length"))
    generation = running(byte_tokenizer, stop="b!")
    edges = sorted({0, len(token_ids), *(cut % (len(token_ids) + 1) for cut in cuts)})
    taken = []
    for number, (begin, end) in enumerate(itertools.pairwise(edges)):
        if number == restart_at and not generation.finished:
            generation.submit()
        begin = max(begin - overlap, 0)
        reason = "length" if end == len(token_ids) else None
        fields = {"offset": begin, "finish_reason": reason, "request_id": generation.request_id}
        generation.apply(delta(token_ids[begin:end], **fields))  # type: ignore[arg-type]
        taken.append(generation.take(0))
    outputs = [output for output in taken if output is not None]
    expected = byte_tokenizer.decode(token_ids).partition("b!")[0]
    assert "".join(output.text for output in outputs) == whole.full_output(0).text == expected
    assert [i for output in outputs for i in output.token_ids] == whole.full_output(0).token_ids
    assert generation.full_output(0) == whole.full_output(0)
    assert outputs[-1].finish_reason == whole.full_output(0).finish_reason


def test_a_resubmission_keeps_the_adapters_it_began_with(byte_tokenizer: Tokenizer) -> None:
    generation = running(byte_tokenizer, adapter="a", return_scalings=True)
    generation.apply(delta("x", adapter="a@3:1.0"))
    generation.apply(delta("y", offset=1))
    submit = generation.submit()
    assert (submit.adapter, submit.xlora, submit.return_scalings) == ("a@3:1.0", None, True)


def test_a_resubmission_without_adapters_gets_no_mix_that_came_since(byte_tokenizer: Tokenizer) -> None:
    generation = running(byte_tokenizer)
    assert generation.submit().xlora is None
    generation.apply(delta("x", request_id=generation.request_id))
    assert generation.submit().xlora is False


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
