"""One client process of bench_server: streams requests over one gRPC channel and times their responses.

Started as ``python stream_client.py HOST:PORT``. It takes orders as JSON lines on standard input, and ends with it:
prompts and their numbers of new tokens, answered with ``{"prepared": n}``; then a time of the monotonic clock, at
which it sends all requests, answered with a report. While requests run it only notes when which bytes came, which
costs asyncio with raw messages about 30 us of CPU a response; it reads the messages when all have ended.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Awaitable
from dataclasses import asdict, dataclass
from typing import Any

import grpc
import grpc.aio
from tritonclient.grpc import service_pb2

from trident_client.errors import TridentError
from trident_client.wire import CHANNEL_OPTIONS, AnswerDecoder, generate_request

METHOD = "/inference.GRPCInferenceService/ModelStreamInfer"
CONNECT_SECONDS = 30.0
REQUEST_SECONDS = 600.0
"""After this long a request counts as failed."""
OPTIONS = {
    "temperature": 0,
    "ignore_eos": True,
    "return_finish_reason": False,
    "return_num_input_tokens": False,
    "return_num_output_tokens": True,
}


@dataclass(frozen=True, kw_only=True)
class Stream:
    """One request as its client saw it. Times are those of the monotonic clock."""

    submitted: float
    first_token: float
    """When the first response with a token came."""
    ended: float
    """When the last response came."""
    output_tokens: int
    responses: int
    error: str = ""
    """Why the request failed; empty when it did not."""


@dataclass(frozen=True)
class Received:
    """What came in answer to one request: times of arrival with raw messages, and the error that ended it."""

    submitted: float
    arrivals: list[tuple[float, bytes]]
    error: str


async def request(method: Any, message: bytes) -> Received:
    """Send one request and note what comes back, to the end of its stream."""
    arrivals: list[tuple[float, bytes]] = []
    error = ""
    submitted = time.monotonic()
    try:
        async for payload in method(message, timeout=REQUEST_SECONDS):
            arrivals.append((time.monotonic(), payload))
    except grpc.aio.AioRpcError as rpc_error:
        error = f"{rpc_error.code().name}: {rpc_error.details()}"
    return Received(submitted, arrivals, error)


def read(received: Received, new_tokens: int) -> Stream:
    """Count the tokens. A request that ended early, or with another number of tokens than asked for, failed."""
    decoder = AnswerDecoder()
    error, output_tokens, first = received.error, 0, received.submitted
    try:
        for arrived, payload in received.arrivals:
            response = service_pb2.ModelStreamInferResponse.FromString(payload)
            count = sum(chunk.num_output_tokens or 0 for chunk in decoder.decode(response))
            if count and not output_tokens:
                first = arrived
            output_tokens += count
        if not error:
            decoder.check_complete()
    except TridentError as trident_error:
        error = str(trident_error)
    if not error and output_tokens != new_tokens:
        error = f"{output_tokens} output tokens instead of {new_tokens}"
    return Stream(
        submitted=received.submitted,
        first_token=first,
        ended=received.arrivals[-1][0] if received.arrivals else received.submitted,
        output_tokens=output_tokens,
        responses=len(received.arrivals),
        error=error,
    )


def encode(prompt: str, new_tokens: int) -> bytes:
    return generate_request("llm", prompt, True, {**OPTIONS, "max_tokens": new_tokens}).SerializeToString()


async def run_order(method: Any, order: dict[str, Any]) -> dict[str, Any]:
    """All requests of one order, sent when the next line on standard input says so."""
    counts = order["new_tokens"]
    messages = [encode(prompt, count) for prompt, count in zip(order["prompts"], counts, strict=True)]
    say({"prepared": len(messages)})
    await asyncio.sleep(json.loads(sys.stdin.readline()) - time.monotonic())
    began, cpu_began = time.monotonic(), time.process_time()
    calls: list[Awaitable[Received]] = [request(method, message) for message in messages]
    answers = await asyncio.gather(*calls)
    cpu_seconds, seconds = time.process_time() - cpu_began, time.monotonic() - began
    streams = [read(received, count) for received, count in zip(answers, counts, strict=True)]
    return {"streams": [asdict(stream) for stream in streams], "cpu_seconds": cpu_seconds, "seconds": seconds}


async def serve_orders(address: str) -> None:
    async with grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS) as channel:
        await asyncio.wait_for(channel.channel_ready(), CONNECT_SECONDS)
        # The server reads one message and the end of the requests, which is what this kind of call sends, too.
        method = channel.unary_stream(METHOD)
        say({"connected": address})
        while line := sys.stdin.readline():
            say(await run_order(method, json.loads(line)))


def say(message: dict[str, Any]) -> None:
    print(json.dumps(message), flush=True)


if __name__ == "__main__":
    asyncio.run(serve_orders(sys.argv[1]))
