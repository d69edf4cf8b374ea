"""Any request, whatever is in it, becomes a generation or an error with a code; none takes long.

``TRIDENT_FUZZ_EXAMPLES=100000`` in the environment makes it a run of many minutes; ``load_tests/fuzz.py`` lets coverage
guide it.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fakes.byte_tokenizer import write_byte_tokenizer
from trident_llm.errors import TridentError, parse_error
from trident_llm.options import LLM_DEFAULTS, VLLM_DEFAULTS, RequestOptions
from trident_llm.protocol import Limits, Welcome
from trident_llm.server.request import RequestReader

fuzz = settings(
    max_examples=int(os.environ.get("TRIDENT_FUZZ_EXAMPLES", "150")),
    deadline=2000,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
OPTIONS = sorted(RequestOptions.__dataclass_fields__)
NUMBERS = st.one_of(st.integers(), st.floats(), st.sampled_from([0, 1, -1, 2**31, 2**63, 2**64, 1e308, -0.0]))
ODD_TEXTS = ["", "true", "-1", "1e999", "nan", "[]", "{}", '{"5": 1}', "\x00", "[[", "é"]
TEXTS = st.one_of(st.text(), st.sampled_from(ODD_TEXTS))
LEAVES = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(TEXTS, inner, max_size=4)),
    max_leaves=8,
)
MESSAGES = st.lists(st.dictionaries(st.sampled_from(["role", "content", "x"]), VALUES, max_size=3), max_size=3)
PARAMETERS = st.dictionaries(
    st.one_of(st.sampled_from(OPTIONS), st.text(max_size=10)),
    st.one_of(VALUES, VALUES.map(json.dumps), MESSAGES, MESSAGES.map(json.dumps)),
    max_size=6,
)
TENSORS = st.one_of(
    st.binary(max_size=60).map(lambda data: np.array([data], dtype=np.object_)),
    st.text(max_size=60).map(lambda text: np.array([[text]], dtype=np.object_)),
    st.lists(st.booleans(), max_size=3).map(np.array),
    st.lists(st.floats(width=32), max_size=3).map(lambda row: np.array(row, dtype=np.float32)),
    st.integers(-(2**63), 2**63 - 1).map(np.array),
)


@dataclass(frozen=True)
class FakeTensor:
    title: str
    array: np.ndarray

    def name(self) -> str:
        return self.title

    def as_numpy(self) -> np.ndarray:
        return self.array


@dataclass
class FakeRequest:
    parameter_text: str
    tensors: list[FakeTensor] = field(default_factory=list)
    microseconds: int = 0

    def parameters(self) -> str:
        return self.parameter_text

    def request_id(self) -> str:
        return self.parameter_text[:64]

    def inputs(self) -> list[FakeTensor]:
        return self.tensors

    def timeout(self) -> int:
        return self.microseconds


@pytest.fixture(scope="module")
def readers(tmp_path_factory: pytest.TempPathFactory) -> list[RequestReader]:
    return make_readers(tmp_path_factory.mktemp("model"))


def make_readers(folder: Path) -> list[RequestReader]:
    """Of both generation doors."""
    write_byte_tokenizer(folder)
    limits = Limits(max_n=4, max_stop_strings=4, max_logprobs=5, max_prompt_bytes=1000)
    welcome = Welcome(
        epoch="e",
        model="m",
        tokenizer_folder=str(folder),
        max_model_len=256,
        vocab_size=300,
        eos_token_ids=[257],
        max_num_seqs=4,
        max_queue_size=4,
        limits=limits,
    )
    return [RequestReader(welcome, defaults) for defaults in (LLM_DEFAULTS, VLLM_DEFAULTS)]


def read(reader: RequestReader, request: FakeRequest) -> None:
    """Raises whatever is neither a generation nor an error for users."""
    try:
        generation = reader.read(request)
    except TridentError as error:
        assert parse_error(str(error)).code == error.code
        assert "site-packages" not in str(error) and "backend_src" not in str(error)
        return
    submit = generation.submit()
    assert 1 <= submit.params.max_tokens <= 256 - len(submit.prompt_ids)
    assert 1 <= len(submit.samples) <= 4
    assert submit.prompt_ids and all(0 <= token_id < 300 for token_id in submit.prompt_ids)
    assert generation.cancel() and generation.finished


PROMPTS = st.one_of(st.binary(max_size=40), st.text(max_size=40))
TIMEOUTS = st.integers(0, 2**63)
NAMES = ["text_input", *OPTIONS, "lora_name", "image", "embedding_request"]
INPUTS = st.lists(st.tuples(st.sampled_from(NAMES), TENSORS), max_size=5)


@fuzz
@given(PARAMETERS, PROMPTS, TIMEOUTS)
def test_parameters(readers: list[RequestReader], parameters: dict[str, Any], prompt: object, timeout: int):
    read_parameters(readers, parameters, prompt, timeout)


def read_parameters(readers: list[RequestReader], parameters: dict[str, Any], prompt: object, timeout: int) -> None:
    tensor = FakeTensor("text_input", np.array([prompt], dtype=np.object_))
    for reader in readers:
        read(reader, FakeRequest(json.dumps(parameters), [tensor], timeout))


@fuzz
@given(INPUTS)
def test_tensors(readers: list[RequestReader], tensors: list[tuple[str, np.ndarray]]):
    read_tensors(readers, tensors)


def read_tensors(readers: list[RequestReader], tensors: list[tuple[str, np.ndarray]]) -> None:
    for reader in readers:
        read(reader, FakeRequest("", [FakeTensor(name, array) for name, array in tensors]))
