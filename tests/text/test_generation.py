"""A generation from submission to text: deltas in, outputs out, and how it ends."""

from __future__ import annotations

from tests.text.generations import EOS, delta, running, start, text_of
from trident_llm.errors import Cancelled, EngineFailed, Overloaded
from trident_llm.protocol import Abort
from trident_llm.text import Tokenizer


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
