"""A process that answers as the door ``llm`` does, without a model: each token at once, or one every so many seconds.

Started as ``python scripted_server.py SECONDS``; it prints the address at which it speaks gRPC, and serves until it is
ended. All streams have their next token at the same time, as from steps of an engine; messages are made in advance.
"""

from __future__ import annotations

import asyncio
import json
import struct
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import uvloop
from tritonclient.grpc import service_pb2

_SERVICE = "inference.GRPCInferenceService"
_TEXT = " token"


class ScriptedServer:
    """Handlers of raw messages; ``seconds`` from one token of a stream to the next."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._step = asyncio.Event()
        self._token, self._last = _token(last=False), _token(last=True)

    async def generate(self, requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        async for data in requests:
            request = service_pb2.ModelInferRequest.FromString(data)
            for number in range(request.parameters["max_tokens"].int64_param, 0, -1):
                if self._seconds:
                    await self._step.wait()
                yield self._token if number > 1 else self._last

    async def administer(self, data: bytes, context: Any) -> bytes:
        response = service_pb2.ModelInferResponse(model_name="llm_admin")
        _add(response, "result", "BYTES", _element(json.dumps({"ready": True, "adapters": [], "mixes": []})))
        return response.SerializeToString()

    async def is_ready(self, data: bytes, context: Any) -> bytes:
        return service_pb2.ModelReadyResponse(ready=True).SerializeToString()

    async def tick(self) -> None:
        """Let every stream have a token, again and again."""
        due = time.monotonic()
        while self._seconds:
            due += self._seconds
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            self._step.set()
            self._step = asyncio.Event()

    async def serve(self) -> None:
        server = grpc.aio.server()
        handlers = {
            "ModelStreamInfer": grpc.stream_stream_rpc_method_handler(self.generate),
            "ModelInfer": grpc.unary_unary_rpc_method_handler(self.administer),
            "ModelReady": grpc.unary_unary_rpc_method_handler(self.is_ready),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_SERVICE, handlers),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        print(f"127.0.0.1:{port}", flush=True)
        await asyncio.gather(self.tick(), server.wait_for_termination())


def _token(*, last: bool) -> bytes:
    response = service_pb2.ModelInferResponse(model_name="llm")
    _add(response, "text_output", "BYTES", _element(_TEXT))
    _add(response, "finish_reason", "BYTES", _element("length" if last else "None"))
    for name, value in (("num_input_tokens", 8), ("num_output_tokens", 1), ("num_cached_tokens", 0)):
        _add(response, name, "UINT32", struct.pack("<I", value))
    response.parameters["triton_final_response"].bool_param = last
    return service_pb2.ModelStreamInferResponse(infer_response=response).SerializeToString()


def _add(response: service_pb2.ModelInferResponse, name: str, datatype: str, raw: bytes) -> None:
    response.outputs.add(name=name, datatype=datatype, shape=[1])
    response.raw_output_contents.append(raw)


def _element(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<I", len(data)) + data


async def serve(seconds: float) -> None:
    await ScriptedServer(seconds).serve()


if __name__ == "__main__":
    uvloop.run(serve(float(sys.argv[1])))
