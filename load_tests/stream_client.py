"""One client process of a ClientPool: streams requests over one gRPC channel and times their responses.

Started as ``python stream_client.py HOST:PORT``. A response costs asyncio with raw messages about 30 us of CPU.
"""

from __future__ import annotations

import asyncio
import sys
import time
from typing import Any

import grpc
import grpc.aio
from client_orders import REQUEST_SECONDS, Received, Stream, say, serve_orders
from tritonclient.grpc import service_pb2

from trident_client.errors import TridentError
from trident_client.wire import CHANNEL_OPTIONS, AnswerDecoder, generate_request

METHOD = "/inference.GRPCInferenceService/ModelStreamInfer"
CONNECT_SECONDS = 30.0
OPTIONS = {
    "temperature": 0,
    "ignore_eos": True,
    "return_finish_reason": False,
    "return_num_input_tokens": False,
    "return_num_output_tokens": True,
}


class GrpcClient:
    """Asks with ``method``, which takes and gives serialized messages."""

    def __init__(self, method: Any) -> None:
        self._method = method

    async def prepare(self, prompt: str, new_tokens: int) -> bytes:
        return generate_request("llm", prompt, True, {**OPTIONS, "max_tokens": new_tokens}).SerializeToString()

    async def ask(self, request: bytes) -> Received:
        arrivals: list[tuple[float, bytes]] = []
        error = ""
        submitted = time.monotonic()
        try:
            async for payload in self._method(request, timeout=REQUEST_SECONDS):
                arrivals.append((time.monotonic(), payload))
        except grpc.aio.AioRpcError as rpc_error:
            error = f"{rpc_error.code().name}: {rpc_error.details()}"
        return Received(submitted, arrivals, error)

    def read(self, received: Received) -> Stream:
        decoder = AnswerDecoder()
        error, output_tokens, first, first_text = received.error, 0, received.submitted, 0.0
        try:
            for arrived, payload in received.arrivals:
                response = service_pb2.ModelStreamInferResponse.FromString(payload)
                chunks = decoder.decode(response)
                count = sum(chunk.num_output_tokens or 0 for chunk in chunks)
                if count and not output_tokens:
                    first = arrived
                if not first_text and any(chunk.text for chunk in chunks):
                    first_text = arrived
                output_tokens += count
            if not error:
                decoder.check_complete()
        except TridentError as trident_error:
            error = str(trident_error)
        return Stream(
            submitted=received.submitted,
            first_token=first,
            first_text=first_text or first,
            ended=received.arrivals[-1][0] if received.arrivals else received.submitted,
            output_tokens=output_tokens,
            responses=len(received.arrivals),
            error=error,
        )


async def serve(address: str) -> None:
    async with grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS) as channel:
        await asyncio.wait_for(channel.channel_ready(), CONNECT_SECONDS)
        say({"connected": address})
        # The server reads one message and the end of the requests, which is what this kind of call sends, too.
        await serve_orders(GrpcClient(channel.unary_stream(METHOD)))


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1]))
