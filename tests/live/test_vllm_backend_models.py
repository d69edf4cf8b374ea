"""What users of vllm_backend do with models: ensembles, two engines in one server, loading and unloading."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator

import numpy as np
import psutil
import pytest
import tritonclient.grpc as grpcclient
from tritonclient.utils import InferenceServerException

from tests.fakes.byte_tokenizer import write_byte_tokenizer
from tests.fakes.engine_runs import wait_until
from tests.fakes.fake_engine import expected_text
from tests.live.live_server import LiveServer, fake_repository, serve
from tests.live.requests import generate
from tests.live.tensor_stream import TensorStream, inputs_of

pytestmark = pytest.mark.live
PROMPT = "In short,"
ENSEMBLE = """
name: "pipeline"
platform: "ensemble"
max_batch_size: 1
input [ { name: "text_input" data_type: TYPE_STRING dims: [ -1 ] } ]
output [ { name: "text_output" data_type: TYPE_STRING dims: [ -1 ] } ]
ensemble_scheduling { step [ {
  model_name: "llm_vllm"
  model_version: -1
  input_map { key: "text_input" value: "text_input" }
  output_map { key: "text_output" value: "text_output" }
} ] }
"""
OWNER = """
backend: "python"
instance_group [ {{ kind: KIND_CPU count: 1 }} ]
parameters {{ key: "model" value {{ string_value: "{model}" }} }}
"""
"""Like llm_vllm, with an engine of its own."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """The doors of one engine and an ensemble are loaded; ``other`` and ``strange`` are not."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = write_byte_tokenizer(folder / "model")
    repository = fake_repository(folder, "--step-time 0.01")
    (repository / "pipeline/1").mkdir(parents=True)
    (repository / "pipeline/config.pbtxt").write_text(ENSEMBLE)
    owner = OWNER.format(model=tokenizer)
    strange = owner + 'parameters { key: "enforce_eager" value { string_value: "true" } }\n'
    for name, config in {"other": owner, "strange": strange}.items():
        shutil.copytree(repository / "llm/1", repository / name / "1")
        (repository / name / "config.pbtxt").write_text(config)
    loaded = ("--only", "llm,llm_vllm,pipeline", "--doors", "1", "--set", "max_queue_size=32")
    with serve("--model-repository", str(repository), "--model", str(tokenizer), *loaded) as server:
        yield server


def check_answers(server: LiveServer, model: str) -> None:
    with TensorStream(server, model) as connection:
        answer = connection.answer(inputs_of(PROMPT, {"max_tokens": "5"}))
    assert answer.error is None and answer.text() == PROMPT + expected_text(PROMPT, 5)


def engines(server: LiveServer) -> list[psutil.Process]:
    found = []
    for process in server.run.processes():
        with contextlib.suppress(psutil.NoSuchProcess):
            if "tests.fakes.fake_engine" in process.cmdline():
                found.append(process)
    return found


def test_an_ensemble_has_the_door_as_a_step(server: LiveServer) -> None:
    batched = grpcclient.InferInput("text_input", [1, 1], "BYTES")
    batched.set_data_from_numpy(np.array([[PROMPT.encode()]], dtype=np.object_))
    expected = PROMPT + expected_text(PROMPT, 16)
    with TensorStream(server, "pipeline") as connection:
        assert connection.answer([batched]).tensors["text_output"].tolist() == [[expected.encode()]]
    assert generate(server, "pipeline", PROMPT).body["text_output"] == expected


def test_a_second_engine_comes_and_goes_beside_the_first(server: LiveServer) -> None:
    with server.grpc_client() as client:
        client.load_model("other")
        assert client.is_model_ready("other") and len(engines(server)) == 2
        check_answers(server, "other")
        check_answers(server, "llm_vllm")
        client.unload_model("other")
        wait_until(lambda: not client.is_model_ready("other") and len(engines(server)) == 1)
        check_answers(server, "llm_vllm")


def test_the_door_goes_and_comes_while_its_engine_stays(server: LiveServer) -> None:
    before = engines(server)
    with server.grpc_client() as client:
        client.unload_model("llm_vllm")
        wait_until(lambda: not client.is_model_ready("llm_vllm"))
        assert generate(server, "llm", PROMPT, max_tokens=5).body["text_output"] == expected_text(PROMPT, 5)
        client.load_model("llm_vllm")
        check_answers(server, "llm_vllm")
    assert engines(server) == before


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("strange", "[INVALID_ARG] unknown setting 'enforce_eager'; known settings: adapter_root"),
        ("nobody", "nobody"),
    ],
)
def test_what_cannot_be_loaded_says_why_and_harms_nobody(server: LiveServer, model: str, words: str) -> None:
    with server.grpc_client() as client:
        with pytest.raises(InferenceServerException) as caught:
            client.load_model(model)
        assert words in caught.value.message()
        assert not client.is_model_ready(model)
    check_answers(server, "llm_vllm")
