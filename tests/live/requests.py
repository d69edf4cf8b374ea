"""Plain clients of the two generation doors, over HTTP and gRPC, and what the server says about itself."""

from __future__ import annotations

import contextlib
import http.client
import json
import queue
import threading
import time
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil
import tritonclient.grpc as grpcclient

from tests.live.live_server import LiveServer

ADMIN_ARGUMENTS = '{"admin_token": "secret"}'


@dataclass(frozen=True)
class HttpAnswer:
    status: int
    body: dict[str, Any]


def post(server: LiveServer, path: str, **fields: object) -> HttpAnswer:
    """POST JSON; for a refused request the body is its error."""
    request = urllib.request.Request(
        server.http_url + path, data=json.dumps(fields).encode(), headers={"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return HttpAnswer(response.status, json.load(response))
    except urllib.error.HTTPError as error:
        return HttpAnswer(error.code, json.loads(error.read().removeprefix(b"data: ")))


def generate(server: LiveServer, model: str, prompt: str, **options: object) -> HttpAnswer:
    return post(server, f"/v2/models/{model}/generate", text_input=prompt, **options)


def admin(server: LiveServer, command: str) -> dict[str, Any]:
    answer = post(server, "/v2/models/llm_admin/generate", command=command, arguments=ADMIN_ARGUMENTS)
    assert answer.status == 200, answer.body
    return json.loads(answer.body["result"])


def seconds_until_free(server: LiveServer, limit: float) -> float:
    """Seconds until the engine holds no block for any sequence. Raises ``TimeoutError`` after ``limit``."""
    began = time.monotonic()
    while admin(server, "stats")["kv_blocks_used"]:
        if time.monotonic() - began > limit:
            raise TimeoutError(f"blocks were still held after {limit} s")
        time.sleep(0.01)
    return time.monotonic() - began


def wait_until_running(server: LiveServer, num_requests: int = 1) -> None:
    """The door of ``llm_admin`` may find an engine that has just been loaded a moment after others do."""
    began = time.monotonic()
    while num_running(server) < num_requests:
        assert time.monotonic() - began < 20.0
        time.sleep(0.01)


def num_running(server: LiveServer) -> int:
    """Requests that run; 0 while the engine cannot be asked."""
    answer = post(server, "/v2/models/llm_admin/generate", command="stats", arguments=ADMIN_ARGUMENTS)
    if answer.body.get("error", "").startswith("[UNAVAILABLE]"):
        return 0
    assert answer.status == 200, answer.body
    return json.loads(answer.body["result"])["running_requests"]


def num_doors(server: LiveServer, model: str) -> int:
    """Processes that are doors of ``model``, of all its loads."""
    count = 0
    for process in server.run.processes():
        with contextlib.suppress(psutil.Error):
            *_, name, _ = ("", "", *process.cmdline())
            count += name.startswith(f"{model}_0_")
    return count


def metrics(server: LiveServer) -> dict[str, float]:
    """Our metrics by name, summed over labels, buckets apart."""
    with urllib.request.urlopen(server.metrics_url, timeout=10) as response:
        lines = response.read().decode().splitlines()
    found: dict[str, float] = defaultdict(float)
    for line in lines:
        if line.startswith("trident_") and ',le="' not in line:
            name, value = line.rsplit(" ", 1)
            found[name.partition("{")[0]] += float(value)
    return found


class EventStream:
    """One open generate_stream request."""

    def __init__(self, server: LiveServer, model: str, prompt: str, **options: object) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", server.ports.http, timeout=60)
        body = json.dumps({"text_input": prompt, "stream": True, **options})
        headers = {"Content-Type": "application/json"}
        self._connection.request("POST", f"/v2/models/{model}/generate_stream", body, headers)

    def events(self) -> Iterator[dict[str, Any]]:
        response = self._connection.getresponse()
        for line in response:
            if line.startswith(b"data: "):
                yield json.loads(line.removeprefix(b"data: "))

    def close(self) -> None:
        self._connection.close()


@dataclass(frozen=True)
class Answer:
    """One response on a gRPC stream."""

    request_id: str
    is_final: bool
    outputs: dict[str, list[Any]]
    error: str = ""


class GrpcStream:
    """One gRPC stream that carries any number of requests."""

    def __init__(
        self, server: LiveServer, model: str, *, batched: bool | None = None, headers: dict[str, str] | None = None
    ) -> None:
        """``batched``: whether the model has a batch dimension; None: only llm has."""
        self._model = model
        self._batched = model == "llm" if batched is None else batched
        self._client = server.grpc_client()
        self._answers: queue.SimpleQueue[Answer] = queue.SimpleQueue()
        self._client.start_stream(self._receive, headers=headers)

    def __enter__(self) -> GrpcStream:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def submit(self, prompt: str | bytes, request_id: str = "", **options: object) -> None:
        """``options`` go as request parameters, except booleans to llm_vllm, which has inputs for them."""
        batched = self._batched
        data = prompt if isinstance(prompt, bytes) else prompt.encode()
        inputs = [_tensor("text_input", np.array([data], dtype=np.object_), "BYTES", batched)]
        for name, value in list(options.items()):
            if not batched and isinstance(value, bool) and name != "ignore_eos":
                inputs.append(_tensor(name, np.array([value]), "BOOL", batched))
                del options[name]
        self._client.async_stream_infer(self._model, inputs, request_id=request_id, parameters=options)

    def next(self, timeout: float = 30.0) -> Answer:
        return self._answers.get(timeout=timeout)

    def until_final(self) -> list[Answer]:
        """All answers of the one request that was submitted; ends at its final one."""
        answers = [self.next()]
        while not answers[-1].is_final:
            answers.append(self.next())
        return answers

    def cancel(self) -> None:
        self._client.stop_stream(cancel_requests=True)

    def _receive(self, result: grpcclient.InferResult | None, error: Exception | None) -> None:
        if result is None:
            self._answers.put(Answer("", is_final=True, outputs={}, error=str(error)))
            return
        response = result.get_response()
        outputs = {output.name: result.as_numpy(output.name).reshape(-1).tolist() for output in response.outputs}
        final = response.parameters["triton_final_response"].bool_param
        self._answers.put(Answer(response.id, final, outputs))


def _tensor(name: str, array: np.ndarray, kind: str, batched: bool) -> grpcclient.InferInput:
    array = array[np.newaxis] if batched else array
    tensor = grpcclient.InferInput(name, list(array.shape), kind)
    tensor.set_data_from_numpy(array)
    return tensor


def text_of(answers: list[Answer], sample: int = 0) -> str:
    return b"".join(answer.outputs["text_output"][sample] for answer in answers).decode()


def run_threads(count: int, work: Any) -> list[Any]:
    """``work(index)`` in ``count`` threads at once; their results in order. An exception is raised again."""
    results: list[Any] = [None] * count
    errors: list[BaseException] = []

    def run(index: int) -> None:
        try:
            results[index] = work(index)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results
