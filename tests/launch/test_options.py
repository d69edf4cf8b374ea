"""Command-line options of the launcher: what they become, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.launch.helpers import ECHO_REPOSITORY
from trident_llm.errors import BadRequest, NotFound
from trident_llm.launch.options import Options, parse_options


def parse(*arguments: str) -> Options:
    return parse_options([f"--model-repository={ECHO_REPOSITORY}", *arguments])


def test_defaults_listen_on_loopback_with_the_usual_ports() -> None:
    options = parse()
    assert (options.host, options.http_port, options.grpc_port, options.metrics_port) == ("127.0.0.1", 8000, 8001, 8002)
    assert options.settings == {} and options.only == () and options.sample and not options.is_public


def test_settings_keep_everything_after_the_first_equals_sign() -> None:
    assert parse("--set", "admin_token=a=b c", "--set", "model=x/y").settings == {"admin_token": "a=b c"}
    assert parse("--set", "model=x/y").model == "x/y"


def test_a_local_model_becomes_an_absolute_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "small").mkdir()
    monkeypatch.chdir(tmp_path)
    assert parse("--model", "small").model == str(tmp_path / "small")
    assert parse("--model", "org/name").model == "org/name"


def test_folders_of_adapters_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "poets" / "one").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    settings = ("--set", "adapters=a=poets/one, b = org/name", "--set", "adapter_root=poets", "--set", "xlora=poets")
    assert parse(*settings).settings == {
        "adapters": f"a={tmp_path}/poets/one, b =org/name",
        "adapter_root": f"{tmp_path}/poets",
        "xlora": f"{tmp_path}/poets",
    }


@pytest.mark.parametrize("model", ["/no/such", "./no-such", "no-such.gguf", "~/no/such"])
def test_a_local_model_that_is_not_there_is_named(model: str) -> None:
    with pytest.raises(NotFound, match=f"--model {model}"):
        parse("--model", model)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "block_size"], "'block_size': not of the form key=value"),
        (["--set", "=3"], "not of the form key=value"),
        (["--set", "dtype=fp32", "--set", "dtype=bf16"], "dtype: given twice"),
        (["--model", "a/b", "--set", "model=c/d"], "give one of them"),
        (["--only", "llm,nothing"], "allowed are llm, other"),
        (["--only", ","], "allowed are llm, other"),
        (["--only", "other", "--model", "a/b"], "llm, which is not among the models to load"),
        (["--only", "other", "--doors", "2"], "llm, which is not among the models to load"),
        (["--host", "no.such.host.invalid"], "not an IPv4 address, nor a name"),
        (["--log", "/no/such/server.log"], "--log /no/such/server.log: no such file or directory"),
        (["--log", "/"], "--log /: is a directory"),
        (["--host", "::1"], "not an IPv4 address, nor a name"),
    ],
)
def test_bad_options_are_refused_by_name(arguments: list[str], message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        parse(*arguments)


@pytest.mark.parametrize(
    "arguments", [["--http-port", "65536"], ["--grpc-port", "x"], ["--doors", "0"], ["--mod", "x"], ["extra"]]
)
def test_bad_syntax_ends_with_exit_code_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        parse(*arguments)


def test_only_keeps_the_order_and_drops_repeats() -> None:
    assert parse("--only", "other, llm,other").only == ("other", "llm")


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.1"])
def test_listening_beyond_loopback_needs_an_admin_token(host: str) -> None:
    for settings in ([], ["--set", "admin_token="]):
        with pytest.raises(BadRequest, match=f"--host {host}.*admin_token"):
            parse("--host", host, *settings)
    options = parse("--host", host, "--set", "admin_token=secret")
    assert options.is_public and options.connect_host == ("127.0.0.1" if host == "0.0.0.0" else host)


def test_the_admin_token_may_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIDENT_ADMIN_TOKEN", "from outside")
    assert parse("--host", "0.0.0.0").settings == {"admin_token": "from outside"}
    assert parse("--set", "admin_token=given").settings == {"admin_token": "given"}
    assert parse("--only", "other").settings == {}


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "localhost"])
def test_loopback_needs_no_admin_token(host: str) -> None:
    assert not parse("--host", host).is_public


def test_a_folder_without_models_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no folder with models"):
        parse_options([f"--model-repository={tmp_path}"])
