"""TridentClient: generation and administration over one gRPC channel, for any number of threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator, Sequence
from contextlib import closing
from typing import Any, Literal, overload

import grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

from .admin_commands import AdminCommands
from .deadline import Deadline
from .errors import BadRequest, NotFound, Overloaded, TridentError, from_rpc
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


class TridentClient(AdminCommands[dict[str, Any]]):
    """A connection to one server. Safe for threads: each generation is a gRPC stream of its own on a shared channel.

    ``url`` is host:port of the server's gRPC endpoint, ``model`` the main door; ``admin_token`` is the server's
    setting of that name; ``credentials`` turn TLS on. Errors are those of ``trident_client.errors``. Close the client,
    or use it in a ``with`` statement.
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
        self._channel = (
            grpc.secure_channel(url, credentials, options=CHANNEL_OPTIONS)
            if credentials is not None
            else grpc.insecure_channel(url, options=CHANNEL_OPTIONS)
        )
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)

    @overload
    def generate(
        self,
        prompt: str | Sequence[Message],
        *,
        stream: Literal[True] = True,
        timeout: float | None = None,
        **options: OptionValue,
    ) -> Generator[Chunk, None, None]: ...

    @overload
    def generate(
        self,
        prompt: str | Sequence[Message],
        *,
        stream: Literal[False],
        timeout: float | None = None,
        **options: OptionValue,
    ) -> Completion: ...

    def generate(
        self,
        prompt: str | Sequence[Message],
        *,
        stream: bool = True,
        timeout: float | None = None,
        **options: OptionValue,
    ) -> Generator[Chunk, None, None] | Completion:
        """Continue a prompt, or answer a list of chat messages.

        With ``stream`` a generator of chunks: closing it, an exception at its consumer or Ctrl-C cancels the request
        on the server. Otherwise the whole answer. ``timeout`` is in seconds, for everything including retries;
        ``options`` are the server's request options (``max_tokens``, ``temperature``, ``stop``, ...).
        The request is sent when the first chunk is asked for.
        """
        request = generate_request(self.model, prompt, stream, options)
        chunks = self._chunks(request, Deadline.after(timeout))
        return chunks if stream else Completion.from_chunks(chunks)

    def admin(self, command: str, *, timeout: float | None = None, **arguments: Any) -> dict[str, Any]:
        request = admin_request(self.admin_model, command, self._admin_token, arguments)
        try:
            return admin_result(self._stub.ModelInfer(request, timeout=Deadline.after(timeout).remaining()))
        except grpc.RpcError as error:
            raise from_rpc(error, self.url) from None

    def jobs(self, *, timeout: float | None = None) -> list[dict[str, Any]]:
        """The jobs that the engine remembers, the newest first."""
        listed: list[dict[str, Any]] = self.admin("jobs", timeout=timeout)["jobs"]
        return listed

    def is_ready(self, timeout: float = 5.0) -> bool:
        """Whether a request would be taken now: the server, the model and, where the admin door tells, the engine.

        False, too, when the server cannot be reached or does not say within ``timeout`` seconds.
        """
        deadline = Deadline.after(timeout)
        request = service_pb2.ModelReadyRequest(name=self.model)
        try:
            response = self._stub.ModelReady(request, timeout=deadline.remaining())
            return bool(response.ready and self.admin("health", timeout=deadline.left()).get("ready", False))
        except grpc.RpcError:
            return False
        except (NotFound, BadRequest):
            return True  # there is no admin door, or it asks for a token that this client lacks
        except TridentError:
            return False

    def close(self) -> None:
        """Cancel what runs and close the channel."""
        self._channel.close()

    def __enter__(self) -> TridentClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _chunks(self, request: service_pb2.ModelInferRequest, deadline: Deadline) -> Generator[Chunk, None, None]:
        attempt = 0
        while True:
            started = False
            try:
                with closing(self._attempt(request, deadline)) as chunks:
                    for chunk in chunks:
                        started = True
                        yield chunk
                return
            except Overloaded as error:
                if started:
                    raise
                time.sleep(deadline.cut(self.retry.delay(attempt, error)))
            attempt += 1

    def _attempt(self, request: service_pb2.ModelInferRequest, deadline: Deadline) -> Generator[Chunk, None, None]:
        call = self._stub.ModelStreamInfer(iter((request,)), timeout=deadline.remaining())
        decoder = AnswerDecoder()
        failure = None
        timer = threading.Timer(ERROR_END_SECONDS, call.cancel)
        timer.daemon = True
        try:
            for response in call:
                yield from decoder.decode(response)
                if decoder.error is not None and not timer.is_alive():
                    timer.start()
        except grpc.RpcError as error:
            failure = decoder.error or from_rpc(error.with_traceback(None), self.url)
        finally:
            timer.cancel()
            if timer.is_alive():
                timer.join()
            call.cancel()
            # No error that a caller keeps may refer to the call: gRPC's error is the call itself, and a call that is
            # destroyed at the interpreter's exit can wait for ever for a lock of gRPC's thread, which is dead by then.
            del call, timer
        if failure is not None:
            raise failure
        decoder.check_complete()
