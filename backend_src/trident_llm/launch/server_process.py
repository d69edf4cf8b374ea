"""One running Triton server: its command line and environment, readiness, and its end."""

from __future__ import annotations

import contextlib
import http.client
import math
import os
import resource
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from ..errors import LoadFailed
from ..server.model_config import ADMIN_TOKEN_VARIABLE
from ..server.tracing import TRACE_HEADERS
from .options import Options
from .ports import Ports
from .repository import PACKAGE_FOLDER
from .run_folder import RUN_VARIABLE, RunFolder
from .server_home import ServerHome
from .server_log import ServerLog, load_failure

STOP_SECONDS = 1.8
"""How long the server may take to end after ``drain_timeout`` before it is killed."""

DEFAULT_DRAIN_TIMEOUT = 2.0
"""Where there is no engine that says it."""

_STACK_BYTES = 64 * 2**20
"""Least stack of the server's threads. Its HTTP library copies a form, as which curl sends JSON unless told otherwise,
onto the stack twice, and the server ends where that has no room: with 8 MiB at 4 MiB. A prompt of 4 MiB can be 24 MiB
of JSON."""

_GUARDED_APIS = "model-repository,shared-memory,trace,logging"


def server_command(
    home: ServerHome, options: Options, ports: Ports, run: RunFolder, drain_timeout: float = DEFAULT_DRAIN_TIMEOUT
) -> list[str]:
    """``drain_timeout``: seconds that requests which are under way may take when the server is to end."""
    command = [str(home.binary), f"--model-repository={run.models}"]
    if home.backends is not None:
        command.append(f"--backend-directory={home.backends}")
    for endpoint, port in (("http", ports.http), ("grpc", ports.grpc), ("metrics", ports.metrics)):
        command += [f"--{endpoint}-address={options.host}", f"--{endpoint}-port={port}"]
    command += [
        "--log-verbose=0",
        "--allow-metrics=true",
        "--metrics-interval-ms=1000",
        f"--grpc-header-forward-pattern={'|'.join(TRACE_HEADERS)}",
        f"--exit-timeout-secs={math.ceil(drain_timeout)}",
        f"--backend-config=python,shm-region-prefix-name={run.shared_memory_prefix}",
    ]
    if options.only:
        command += ["--model-control-mode=explicit", *(f"--load-model={name}" for name in options.only)]
    if options.is_public:
        # Loading a model over the network runs code, so what changes the server asks for a key that nobody has.
        rule = f"{_GUARDED_APIS}:trident-key={secrets.token_hex(16)}"
        command += [f"--http-restricted-api={rule}", f"--grpc-restricted-protocol={rule}"]
    return command


def server_environment(
    environ: Mapping[str, str], home: ServerHome, run: RunFolder, admin_token: str = ""
) -> dict[str, str]:
    """The server's embedded Python becomes that of the first python3 on PATH: this process's own."""
    environment = dict(environ)
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environ.get("PATH", os.defpath)])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(PACKAGE_FOLDER.parent), environ.get("PYTHONPATH")]))
    environment["LD_LIBRARY_PATH"] = os.pathsep.join(
        filter(None, [*map(str, home.libraries), environ.get("LD_LIBRARY_PATH")])
    )
    environment[RUN_VARIABLE] = str(run.path)
    if admin_token:
        environment[ADMIN_TOKEN_VARIABLE] = admin_token
    return environment


class ServerProcess:
    """A started server. It runs in a session of its own, so a terminal's Ctrl-C reaches the launcher alone."""

    def __init__(
        self,
        command: list[str],
        environment: dict[str, str],
        address: tuple[str, int],
        log: Path,
        drain_timeout: float = DEFAULT_DRAIN_TIMEOUT,
    ) -> None:
        """``address``: host and port of the HTTP endpoint, as this machine reaches it."""
        self._exit_seconds = math.ceil(drain_timeout) + STOP_SECONDS
        self.log = ServerLog(log)
        self._address = address
        self._is_ready = False
        with log.open("wb") as output, _stack_limit(_STACK_BYTES):
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )

    def wait_until_ready(self, on_wait: Callable[[], None], interval: float = 0.1) -> None:
        """Return when all models are loaded; ``on_wait`` runs at each look.

        Raises ``LoadFailed`` as soon as a model did not load or the server has ended.
        """
        while not self._answers_ready():
            reasons = [reason for text in self.log.new_errors() if (reason := load_failure(text)) is not None]
            if reasons:
                raise LoadFailed("the server could not load\n" + "\n".join(reasons))
            self.check()
            on_wait()
            time.sleep(interval)
        self._is_ready = True

    def check(self) -> None:
        """Raise ``LoadFailed`` if the server has ended, with the reason its log gives."""
        code = self._process.poll()
        if code is not None:
            how = f"by signal {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
            raise LoadFailed(f"the Triton server ended {how}:\n{self.log.failure()}")

    def stop(self) -> None:
        """End the server: it gets ``drain_timeout`` and a little for what is under way, none while it still loads."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(timeout=self._exit_seconds if self._is_ready else 0.2)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    def _answers_ready(self) -> bool:
        connection = http.client.HTTPConnection(*self._address, timeout=2.0)
        try:
            connection.request("GET", "/v2/health/ready")
            return connection.getresponse().status == http.HTTPStatus.OK
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()


@contextlib.contextmanager
def _stack_limit(size: int) -> Iterator[None]:
    """Threads of processes that are started inside have stacks of at least ``size`` bytes, if that is allowed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_STACK)
    # Without a limit the C library takes 2 MiB.
    wanted = size if soft == resource.RLIM_INFINITY else max(soft, size)
    resource.setrlimit(resource.RLIMIT_STACK, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_STACK, (soft, hard))
