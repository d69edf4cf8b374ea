"""A real Triton server with a private copy of the model repository, and an engine process that may be the fake one."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import textwrap
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import tritonclient.http as httpclient

from tests.fakes.byte_tokenizer import write_byte_tokenizer
from tests.live.addresses import Addresses
from trident_llm.launch.options import parse_options
from trident_llm.launch.ports import hold_ports
from trident_llm.launch.repository import copy_repository
from trident_llm.launch.run_folder import RunFolder, new_run_folder
from trident_llm.launch.server_home import find_server
from trident_llm.launch.server_process import DEFAULT_DRAIN_TIMEOUT, ServerProcess, server_command, server_environment

ROOT = Path(__file__).resolve().parents[2]
START_SECONDS = 90.0

FAKE_ENGINE_MODEL = '''
from trident_llm.run_directory import Launch
from trident_llm.server.model import TridentPythonModel


class TritonPythonModel(TridentPythonModel):
    def launch(self, model_config, parameters):
        launch = super().launch(model_config, parameters)
        command = ["env", "PYTHONPATH={root}:{root}/backend_src", launch.command[0], "-m", "tests.fakes.fake_engine"]
        return Launch(parameters=launch.parameters, command=[*command, *"{options}".split()])
'''


@dataclass(frozen=True)
class LiveServer(Addresses):
    """Addresses of a running server, and its processes."""

    run: RunFolder
    process: ServerProcess

    def http_client(self) -> httpclient.InferenceServerClient:
        return httpclient.InferenceServerClient(f"127.0.0.1:{self.ports.http}")

    def find_process(self, text: str) -> psutil.Process:
        """The one process of this server whose command line contains ``text``."""
        (found,) = [process for process in self.run.processes() if text in " ".join(process.cmdline())]
        return found


def fake_repository(folder: Path, options: str) -> Path:
    """A copy of the model repository whose engine is the fake one, started with ``options``."""
    repository = folder / "repository"
    shutil.copytree(ROOT / "model_repository", repository)
    code = FAKE_ENGINE_MODEL.format(root=ROOT, options=options)
    (repository / "llm/1/model.py").write_text(textwrap.dedent(code))
    return repository


@contextlib.contextmanager
def serve(*arguments: str) -> Iterator[LiveServer]:
    """Start a server with the launcher's options, wait until it is ready, and clear everything at the end."""
    options = parse_options(["--http-port", "0", "--grpc-port", "0", "--metrics-port", "0", *arguments])
    with hold_ports(options) as ports, new_run_folder() as run:
        process = None
        try:
            engine = copy_repository(options, run.models)
            home = find_server(os.environ, run.backends)
            drain_timeout = engine.drain_timeout if engine is not None else DEFAULT_DRAIN_TIMEOUT
            command = server_command(home, options, ports, run, drain_timeout)
            token = engine.admin_token if engine is not None else ""
            environment = server_environment(os.environ, home, run, token)
            process = ServerProcess(command, environment, ("127.0.0.1", ports.http), run.log, drain_timeout)
            began = time.monotonic()
            process.wait_until_ready(lambda: _check_time(began))
            yield LiveServer(ports, run, process)
        except BaseException:
            if run.log.exists():
                sys.stderr.write(run.log.read_text(errors="replace")[-8000:])
            raise
        finally:
            if process is not None:
                process.stop()
            run.clear()


@contextlib.contextmanager
def serve_fake(folder: Path, *arguments: str, engine: str = "--step-time 0.01") -> Iterator[LiveServer]:
    """``engine``: options of the fake engine; ``arguments``: of the launcher."""
    tokenizer = write_byte_tokenizer(folder / "model")
    repository = fake_repository(folder, engine)
    with serve("--model-repository", str(repository), "--model", str(tokenizer), *arguments) as server:
        yield server


def _check_time(began: float) -> None:
    if time.monotonic() - began > START_SECONDS:
        raise TimeoutError(f"the server was not ready within {START_SECONDS:.0f} s")
