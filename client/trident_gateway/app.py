"""The gateway's routes, over FastAPI. Bodies are read and answers written by hand: no model objects per chunk."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException

from trident_client import Chunk, Completion, TridentError

from .affinity import LOAD_FACTOR
from .answers import DONE, AnswerWriter
from .attempts import generate
from .errors import ApiError, from_trident, unknown_model
from .merge import merged
from .places import LookUp, look_up, read_places
from .questions import Question, read_question
from .responses import EventStream, read_body, while_connected
from .running import Running
from .upstreams import Upstreams

_Chunks = AsyncGenerator[tuple[int, Chunk], None]


def create_app(
    urls: Sequence[str],
    *,
    api_key: str = "",
    admin_token: str = "",
    load_factor: float = LOAD_FACTOR,
    look_up: LookUp = look_up,
    running: Running | None = None,
) -> FastAPI:
    """The application. ``urls``: as ``read_places`` takes them, for gRPC; an empty ``api_key`` asks for none;
    ``running``: what runs, also for other workers.

    Raises ``BadRequest``.
    """
    places = read_places(urls)
    upstreams = Upstreams(places, admin_token, load_factor=load_factor, look_up=look_up, running=running)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await upstreams.find()
        await upstreams.refresh()
        watch = asyncio.create_task(upstreams.watch())
        try:
            yield
        finally:
            watch.cancel()
            await upstreams.close()

    app = FastAPI(lifespan=lifespan, openapi_url=None)
    app.add_exception_handler(ApiError, _refuse)
    app.add_exception_handler(HTTPException, _refuse_route)

    async def answer(request: Request, *, chat: bool) -> Response:
        _check_key(request, api_key)
        question = read_question(await read_body(request), chat=chat)
        try:
            return await while_connected(request, _respond(upstreams, question))
        except TridentError as error:
            raise from_trident(error, question.renamed) from None

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await answer(request, chat=True)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await answer(request, chat=False)

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        _check_key(request, api_key)
        return _json({"object": "list", "data": [_model(name) for name in upstreams.models()]})

    @app.get("/v1/models/{name:path}")
    async def model(request: Request, name: str) -> Response:
        _check_key(request, api_key)
        if name not in upstreams.models():
            await upstreams.refresh()  # another worker may know it already
        if name not in upstreams.models():
            raise unknown_model(name, upstreams.models())
        return _json(_model(name))

    @app.get("/health")
    async def health() -> Response:
        return _json({"status": "ok"})

    @app.get("/ready")
    async def ready() -> Response:
        return _json({"ready": upstreams.ready}, 200 if upstreams.ready else 503)

    return app


async def _respond(upstreams: Upstreams, question: Question) -> Response:
    if not await upstreams.knows(question.model):
        raise unknown_model(question.model, upstreams.models())
    model, options = question.model, question.options
    chunks = merged([generate(upstreams, model, question.key(prompt), prompt, options) for prompt in question.prompts])
    writer = AnswerWriter(question)
    if question.stream:
        # What the first chunk waits for can still be refused with a status.
        first = await _first(chunks)
        return EventStream(writer.chunk(first[1], first[0]) if first else b"", _events(chunks, writer, question))
    gathered: list[list[Chunk]] = [[] for _ in question.prompts]
    async with aclosing(chunks):
        async for prompt, chunk in chunks:
            gathered[prompt].append(chunk)
    body = writer.whole([Completion.from_chunks(parts) for parts in gathered])
    return Response(body, media_type="application/json")


async def _first(chunks: _Chunks) -> tuple[int, Chunk] | None:
    try:
        return await anext(chunks, None)
    except BaseException:
        await chunks.aclose()
        raise


async def _events(chunks: _Chunks, writer: AnswerWriter, question: Question) -> AsyncGenerator[bytes, None]:
    try:
        async with aclosing(chunks):
            async for prompt, chunk in chunks:
                yield writer.chunk(chunk, prompt)
    except TridentError as error:
        yield b"data: " + from_trident(error, question.renamed).body() + b"\n\n"
        return
    yield writer.usage_chunk()
    yield DONE


def _check_key(request: Request, api_key: str) -> None:
    """Raises ``ApiError`` 401; compares in constant time."""
    if not api_key:
        return
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), api_key.encode()):
        raise ApiError(401, "the API key is missing or wrong", kind="authentication_error", code="invalid_api_key")


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "trident"}


def _json(content: Any, status: int = 200) -> Response:
    return Response(json.dumps(content), status, media_type="application/json")


async def _refuse(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return Response(error.body(), error.status, headers=error.headers())


async def _refuse_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return await _refuse(request, ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}"))
