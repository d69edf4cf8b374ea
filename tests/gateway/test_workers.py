"""``trident openai --workers N`` as a user starts it: how workers share the load, die, and end."""

from __future__ import annotations

import contextlib
import http.client
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import openai
import psutil
import pytest

from load_tests.served_gateway import ServedGateway
from load_tests.served_model import environment_of_checkout
from tests.fakes.fake_triton import Answer, FakeTriton, Hang
from tests.gateway.gateways import client
from trident_client.cli import EXIT_BAD_REQUEST, EXIT_UNAVAILABLE
from trident_gateway.affinity import FEW_REQUESTS, key_of, ranked

TEXT = "Hello, world"
SLOW = Answer(("a", "b", "c", "d"), delay=0.4)


@contextlib.contextmanager
def serving(*urls: str, workers: int = 2, arguments: tuple[str, ...] = ()) -> Iterator[ServedGateway]:
    """A gateway of which nothing is left at the end."""
    with ServedGateway(",".join(urls), environment_of_checkout(), ["--workers", str(workers), *arguments]) as gateway:
        wait_until(lambda: len(gateway.workers()) == workers and all(answers(gateway) for _ in range(8)))
        processes = gateway.processes()
        yield gateway
    wait_until(lambda: not any(process.is_running() for process in processes))


def answers(gateway: ServedGateway) -> bool:
    """Whether the worker of a new connection answers."""
    connection = http.client.HTTPConnection(gateway.address, timeout=10)
    connection.request("GET", "/health")
    status = connection.getresponse().status
    connection.close()
    return status == 200


def wait_until(condition: Callable[[], object], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def ask(gateway: ServedGateway, prompt: str) -> str:
    """The answer over a connection of its own, which any worker may get."""
    with client(f"http://{gateway.address}") as api:
        return api.completions.create(model="llm", prompt=prompt).choices[0].text


def prompt_for(server: FakeTriton, other: FakeTriton) -> str:
    prompts = (f"prompt {number}" for number in range(1000))
    order = [server.url, other.url]
    return next(prompt for prompt in prompts if ranked(order, key_of("llm", "", prompt)) == order)


def worker_with(gateway: ServedGateway, connection: socket.socket) -> psutil.Process:
    """Whose connection it is."""
    (found,) = [
        worker
        for worker in gateway.workers()
        if any(each.raddr == connection.getsockname() for each in worker.net_connections() if each.raddr)
    ]
    return found


def stream(gateway: ServedGateway, prompt: str) -> tuple[http.client.HTTPResponse, socket.socket]:
    """A stream that has begun, and its socket."""
    connection = http.client.HTTPConnection(gateway.address, timeout=20)
    body = {"model": "llm", "prompt": prompt, "stream": True}
    connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
    assert connection.sock is not None
    own = connection.sock
    response = connection.getresponse()
    assert response.status == 200
    assert b"data: " in response.readline()
    return response, own


def test_workers_bound_a_servers_load_together() -> None:
    with FakeTriton() as one, FakeTriton() as two, serving(one.url, two.url) as gateway:
        prompt = prompt_for(one, two)
        one.script[:] = [Hang(("a",))]
        begun = []
        while len({worker_with(gateway, own).pid for _, own in begun}) < 2:
            for response, _ in begun:
                response.close()
            wait_until(lambda: all(generation.cancelled.is_set() for generation in one.generations))
            begun = [stream(gateway, prompt) for _ in range(FEW_REQUESTS)]
        assert two.generations == []
        for _ in range(8):
            assert ask(gateway, prompt) == TEXT
        assert len(two.generations) == 8, "a server that all workers together keep busy is passed over by each"
        for response, _ in begun:
            response.close()


def test_a_worker_that_is_killed_is_replaced_and_its_requests_count_no_more(capfd: pytest.CaptureFixture[str]) -> None:
    with FakeTriton() as one, FakeTriton() as two, serving(one.url, two.url) as gateway:
        prompt = prompt_for(one, two)
        one.script[:] = [Hang(("a",))]
        begun = [stream(gateway, prompt) for _ in range(FEW_REQUESTS)]
        killed = worker_with(gateway, begun[0][1])
        lost = [response for response, own in begun if worker_with(gateway, own) == killed]
        killed.send_signal(signal.SIGKILL)
        for response in lost:
            with pytest.raises((http.client.HTTPException, OSError)):
                assert not response.read(), "cut off"
                raise OSError
        one.script[:] = [Answer()]
        before = len(one.generations)
        assert [ask(gateway, prompt) for _ in range(12)] == [TEXT] * 12, "new requests wait for the new worker"
        assert len(one.generations) > before, "there is room again at their own server"
        wait_until(lambda: len(gateway.workers()) == 2)
        assert killed.pid not in {worker.pid for worker in gateway.workers()}
        for response, _ in begun:
            response.close()
    assert "ended with exit code -9; starting another" in capfd.readouterr().err


def test_sigterm_lets_running_requests_finish() -> None:
    with FakeTriton(SLOW) as server, serving(server.url, arguments=("--drain-timeout", "20")) as gateway:
        running = [stream(gateway, f"prompt {number}")[0] for number in range(6)]
        gateway.process.terminate()
        for response in running:
            assert b"data: [DONE]" in response.read()
        assert gateway.process.wait(10) == -signal.SIGTERM
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(tuple(gateway.address.split(":")), 5)


def test_sigterm_cuts_off_what_does_not_finish(capfd: pytest.CaptureFixture[str]) -> None:
    with FakeTriton(Hang(("a",))) as server, serving(server.url, arguments=("--drain-timeout", "1")) as gateway:
        running = [stream(gateway, f"prompt {number}")[0] for number in range(4)]
        began = time.monotonic()
        gateway.process.terminate()
        gateway.process.wait(20)
        assert 1.0 <= time.monotonic() - began < 6.0
        wait_until(lambda: all(generation.cancelled.is_set() for generation in server.generations))
        for response in running:
            with pytest.raises(http.client.IncompleteRead):
                response.read()
    errors = capfd.readouterr().err
    assert "timeout graceful shutdown exceeded" in errors and "Traceback" not in errors


def test_a_second_interrupt_ends_at_once() -> None:
    with FakeTriton(Hang(("a",))) as server, serving(server.url, arguments=("--drain-timeout", "60")) as gateway:
        running = stream(gateway, "prompt")[0]
        gateway.process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        assert gateway.process.poll() is None
        gateway.process.send_signal(signal.SIGINT)
        assert gateway.process.wait(10) == 0
        running.close()


def test_workers_end_with_a_supervisor_that_is_killed() -> None:
    with FakeTriton(SLOW) as server, serving(server.url, arguments=("--drain-timeout", "20")) as gateway:
        processes = gateway.processes()
        running = [stream(gateway, f"prompt {number}")[0] for number in range(4)]
        gateway.process.kill()
        for response in running:
            assert b"data: [DONE]" in response.read(), "what runs may finish"
        wait_until(lambda: not any(process.is_running() and process.status() != "zombie" for process in processes))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_port_in_use_is_one_clear_error(workers: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        code, output = run("--port", port, "--workers", str(workers))
    assert code == EXIT_UNAVAILABLE
    assert output.startswith("trident: error: [UNAVAILABLE] --host, --port: 127.0.0.1:") and output.count("\n") == 1
    assert port in output and "in use" in output


@pytest.mark.parametrize("workers", ["0", "65", "-1"])
def test_numbers_of_workers_that_are_not_allowed(workers: str) -> None:
    code, output = run("--workers", workers)
    assert code == EXIT_BAD_REQUEST
    assert output == f"trident: error: [INVALID_ARG] --workers: {workers} is not allowed; give a number from 1 to 64\n"


def run(*arguments: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "trident_client.cli", "openai", *arguments]
    done = subprocess.run(command, env=environment_of_checkout(), capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout + done.stderr


BROKEN = """
from trident_client import Overloaded
from trident_gateway.listen import listen
from trident_gateway.workers import Settings, Supervisor

if __name__ == "__main__":
    settings = Settings(urls=["nowhere"], api_key="k", admin_token="t", load_factor=1.25, drain_timeout=1)
    assert "'k'" not in repr(settings) and "'t'" not in repr(settings)
    try:
        Supervisor(settings, listen("127.0.0.1", {port}, 2)).run()
    except Overloaded as error:
        print("refused:", error.message)
"""


def test_a_worker_that_cannot_start_ends_the_start(tmp_path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    (tmp_path / "broken.py").write_text(BROKEN.format(port=port))
    command = [sys.executable, str(tmp_path / "broken.py")]
    done = subprocess.run(command, env=environment_of_checkout(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("refused: worker ") and "could not start" in done.stdout
    assert "'nowhere'" in done.stderr and "Traceback" not in done.stderr


def test_what_concerns_all_workers_is_said_once(capfd: pytest.CaptureFixture[str]) -> None:
    with FakeTriton() as server, serving(server.url, "dns:no-such-host.invalid:8001", workers=3) as gateway:
        assert ask(gateway, "Hi") == TEXT
    assert capfd.readouterr().err.count("cannot be looked up") == 1


def test_every_worker_knows_the_models_and_whether_a_server_is_ready() -> None:
    with FakeTriton() as server, serving(server.url, workers=3) as gateway:
        server.results["list_adapters"] = {"adapters": [{"name": "poet"}], "mixes": []}
        for _ in range(12):
            with client(f"http://{gateway.address}") as api:
                assert api.models.retrieve("poet").id == "poet", "without waiting for the next question to the server"
        server.results["health"] = {"ready": False}
        wait_until(lambda: {ready(gateway) for _ in range(12)} == {503})
        server.results["health"] = {"ready": True}
        wait_until(lambda: {ready(gateway) for _ in range(12)} == {200})
        with client(f"http://{gateway.address}") as api, pytest.raises(openai.NotFoundError):
            api.models.retrieve("nobody")


def ready(gateway: ServedGateway) -> int:
    connection = http.client.HTTPConnection(gateway.address, timeout=10)
    connection.request("GET", "/ready")
    status = connection.getresponse().status
    connection.close()
    return status
