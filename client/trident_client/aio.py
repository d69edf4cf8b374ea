"""AsyncTridentClient: generation and administration over one gRPC channel, for asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Coroutine, Sequence
from contextlib import aclosing
from typing import Any, Literal, overload

import grpc
import grpc.aio
from tritonclient.grpc import service_pb2, service_pb2_grpc

from .admin_commands import AdminCommands
from .deadline import Deadline
from .errors import BadRequest, Cancelled, NotFound, Overloaded, TridentError, from_rpc
from .results import Chunk, Completion
from .retry import RetryPolicy
from .wire import (
    CHANNEL_OPTIONS,
    ERROR_END_SECONDS,
    AnswerDecoder,
    Message,
    OptionValue,
    admin_request,
    admin_result,
    check_url,
    generate_request,
)


class AsyncTridentClient(AdminCommands[Coroutine[Any, Any, dict[str, Any]]]):
    """``TridentClient`` for asyncio: the same arguments, results and errors. Belongs to the loop that first uses it.

    Close the client, or use it in an ``async with`` statement.
    """

    def __init__(
        self,
        url: str = "localhost:8001",
        model: str = "llm",
        *,
        admin_model: str = "llm_admin",
        admin_token: str = "",
        retry: RetryPolicy | None = None,
        credentials: grpc.ChannelCredentials | None = None,
    ) -> None:
        self.url = check_url(url)
        self.model = model
        self.admin_model = admin_model
        self._admin_token = admin_token
        self.retry = retry or RetryPolicy()
        self._credentials = credentials
        self._channel: grpc.aio.Channel | None = None
        self._connected_stub: Any = None

    @overload
    def generate(
        self,
        prompt: str | Sequence[Message],
        *,
        stream: Literal[True] = True,
        timeout: float | None = None,
        **options: OptionValue,
    ) -> AsyncGenerator[Chunk, None]: ...

    @overload
    def generate(
        self,
        prompt: str | Sequence[Message],
        *,
        stream: Literal[False],
        timeout: float | None = None,
        **options: OptionValue,
    ) -> Coroutine[Any, Any, Completion]: ...

    def generate(
        self,
        prompt: str | Sequence[Message],
        *,
        stream: bool = True,
        timeout: float | None = None,
        **options: OptionValue,
    ) -> AsyncGenerator[Chunk, None] | Awaitable[Completion]:
        """As ``TridentClient.generate``: ``async for chunk in client.generate(...)``, or with ``stream=False``
        ``await client.generate(...)``. Cancelling the task, or ``aclose()``, cancels the request on the server."""
        request = generate_request(self.model, prompt, stream, options)
        chunks = self._chunks(request, Deadline.after(timeout))
        return chunks if stream else _completion(chunks)

    async def admin(self, command: str, *, timeout: float | None = None, **arguments: Any) -> dict[str, Any]:
        request = admin_request(self.admin_model, command, self._admin_token, arguments)
        try:
            return admin_result(await self._stub().ModelInfer(request, timeout=Deadline.after(timeout).remaining()))
        except grpc.RpcError as error:
            raise from_rpc(error, self.url) from None

    async def jobs(self, *, timeout: float | None = None) -> list[dict[str, Any]]:
        """The jobs that the engine remembers, the newest first."""
        listed: list[dict[str, Any]] = (await self.admin("jobs", timeout=timeout))["jobs"]
        return listed

    async def is_ready(self, timeout: float = 5.0) -> bool:
        """Whether a request would be taken now: the server, the model and, where the admin door tells, the engine.

        False, too, when the server cannot be reached or does not say within ``timeout`` seconds.
        """
        deadline = Deadline.after(timeout)
        request = service_pb2.ModelReadyRequest(name=self.model)
        try:
            response = await self._stub().ModelReady(request, timeout=deadline.remaining())
            if not response.ready:
                return False
            return bool((await self.admin("health", timeout=deadline.left())).get("ready", False))
        except grpc.RpcError:
            return False
        except (NotFound, BadRequest):
            return True  # there is no admin door, or it asks for a token that this client lacks
        except TridentError:
            return False

    async def close(self) -> None:
        """Cancel what runs and close the channel."""
        if self._channel is not None:
            await self._channel.close()

    async def __aenter__(self) -> AsyncTridentClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def _stub(self) -> Any:
        """The stub; made on first use, because a channel belongs to the running event loop."""
        if self._channel is None:
            self._channel = (
                grpc.aio.secure_channel(self.url, self._credentials, options=CHANNEL_OPTIONS)
                if self._credentials is not None
                else grpc.aio.insecure_channel(self.url, options=CHANNEL_OPTIONS)
            )
            self._connected_stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        return self._connected_stub

    async def _chunks(self, request: service_pb2.ModelInferRequest, deadline: Deadline) -> AsyncGenerator[Chunk, None]:
        attempt = 0
        while True:
            started = False
            try:
                async with aclosing(self._attempt(request, deadline)) as chunks:
                    async for chunk in chunks:
                        started = True
                        yield chunk
                return
            except Overloaded as error:
                if started:
                    raise
                await asyncio.sleep(deadline.cut(self.retry.delay(attempt, error)))
            attempt += 1

    async def _attempt(self, request: service_pb2.ModelInferRequest, deadline: Deadline) -> AsyncGenerator[Chunk, None]:
        call = self._stub().ModelStreamInfer(iter((request,)), timeout=deadline.remaining())
        decoder = AnswerDecoder()
        try:
            async for response in call:
                for chunk in decoder.decode(response):
                    yield chunk
                if decoder.error is not None:
                    asyncio.get_running_loop().call_later(ERROR_END_SECONDS, call.cancel)
        except grpc.RpcError as error:
            raise decoder.error or from_rpc(error, self.url) from None
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            if decoder.error is not None:
                raise decoder.error from None
            # gRPC says CancelledError, too, when the call ended because the client was closed.
            raise Cancelled(f"the client of {self.url} was closed") from None
        finally:
            call.cancel()
        decoder.check_complete()


async def _completion(chunks: AsyncGenerator[Chunk, None]) -> Completion:
    return Completion.from_chunks([chunk async for chunk in chunks])
