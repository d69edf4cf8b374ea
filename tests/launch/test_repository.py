"""The private copy of the model repository, and its config.pbtxt as the server will read it."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.grpc import model_config_pb2

from tests.launch.helpers import ECHO_REPOSITORY
from trident_llm.errors import BadRequest
from trident_llm.launch.options import Options, parse_options
from trident_llm.launch.repository import copy_repository, read_config, write_config


def options(*arguments: str) -> Options:
    return parse_options([f"--model-repository={ECHO_REPOSITORY}", *arguments])


def parameters(config: model_config_pb2.ModelConfig) -> dict[str, str]:
    return {key: value.string_value for key, value in config.parameters.items()}


@given(st.dictionaries(st.text(min_size=1), st.text()))
def test_any_text_survives_the_round_trip(settings: dict[str, str]) -> None:
    config = model_config_pb2.ModelConfig(backend="python")
    for key, value in settings.items():
        config.parameters[key].string_value = value
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.pbtxt"
        write_config(config, path)
        assert read_config(path) == config


@pytest.mark.parametrize(
    "revision", ['a"b', "a\\b", 'x" } } parameters { key: "dtype', "line\nbreak", "ünï ☃", "#no comment"]
)
def test_settings_reach_the_copy_as_they_are(tmp_path: Path, revision: str) -> None:
    engine = copy_repository(options("--model=a/b", "--doors=3", "--set", f"revision={revision}"), tmp_path)
    config = read_config(tmp_path / "llm/config.pbtxt")
    assert parameters(config) == {"max_num_seqs": "64", "model": "a/b", "revision": revision}
    assert config.instance_group[0].count == 3
    assert config.model_transaction_policy.decoupled
    assert engine is not None and (engine.revision, engine.max_num_seqs) == (revision, 64)


def test_the_secret_is_not_written(tmp_path: Path) -> None:
    engine = copy_repository(options("--set", "admin_token=hush"), tmp_path)
    assert "hush" not in (tmp_path / "llm/config.pbtxt").read_text()
    assert engine is not None and engine.admin_token == "hush"


def test_the_original_stays_as_it_is(tmp_path: Path) -> None:
    before = (ECHO_REPOSITORY / "llm/config.pbtxt").read_text()
    copy_repository(options("--set", "dtype=fp32"), tmp_path)
    assert (ECHO_REPOSITORY / "llm/config.pbtxt").read_text() == before
    assert (tmp_path / "other/config.pbtxt").read_text() == (ECHO_REPOSITORY / "other/config.pbtxt").read_text()


def test_models_find_the_package_beside_them(tmp_path: Path) -> None:
    copy_repository(options(), tmp_path)
    for name in ("llm", "other"):
        assert (tmp_path / name / "1/trident_llm/errors.py").is_file()


def test_the_default_model_is_the_one_that_comes_along(tmp_path: Path) -> None:
    copy_repository(options(), tmp_path)
    model = parameters(read_config(tmp_path / "llm/config.pbtxt"))["model"]
    assert Path(model).is_file() and Path(model).name.startswith("SmolLM2-135M-Instruct")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("no_such=1", "unknown setting 'no_such'; known settings: .*block_size"),
        ("max_num_seqs=abc", "max_num_seqs: 'abc' is not an integer from 1"),
        ("speculative=ngram", "speculative: not available yet"),
        ("admin_token=\udcff", "admin_token: .* is not valid UTF-8"),
    ],
)
def test_a_wrong_setting_is_refused_before_anything_starts(tmp_path: Path, setting: str, message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        copy_repository(options("--set", setting), tmp_path)


def test_a_syntax_error_is_placed(tmp_path: Path) -> None:
    path = tmp_path / "config.pbtxt"
    path.write_text('backend: "python"\nmax_batch_size: many\n')
    with pytest.raises(BadRequest, match=r"config.pbtxt: 2:17"):
        read_config(path)
