"""The OpenAI-compatible API under /v1: models, completions and chat, whole or streamed."""

import asyncio
import json
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, Literal

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from swarmnode.errors import AuthError, DataError, SwarmError, UserError
from swarmnode.http import chat
from swarmnode.http.api import ModelView, NodeApi
from swarmnode.http.control import check_token, read_body
from swarmnode.http.failures import ApiError, openai_failure
from swarmnode.http.generation import Piece, Reply, Shown, pieces
from swarmnode.http.requests import ChatRequest, CompletionRequest, Want, fit, read
from swarmnode.http.stream import EventStream, closing, while_connected

MAX_BODY_BYTES = 8 << 20
DEFAULT_COMPLETION_TOKENS = 16
"""What OpenAI's completions make when max_tokens is left out."""


def routes(api: NodeApi, token: str | None) -> list[Route]:
    """The OpenAI-compatible API of `api`; without a `token` any key is accepted."""

    async def models(_request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [_model(each) for each in api.models()]})

    async def model(request: Request) -> Response:
        return JSONResponse(_model(await api.model(request.path_params["model"])))

    async def completions(request: Request) -> Response:
        asked = read(CompletionRequest, await _json(request))
        model = await api.model(asked.model)
        limit = asked.max_tokens or DEFAULT_COMPLETION_TOKENS
        wants, heads = [], []
        for prompt in asked.prompts:
            ids = await _encode(model, prompt) if isinstance(prompt, str) else prompt
            most = fit(ids, asked.max_tokens, model.max_positions)
            sampling = asked.sampling(asked.logprobs or 0)
            wants.append(Want(ids, min(limit, most), sampling, tuple(asked.stops)))
            heads.append(prompt if isinstance(prompt, str) else model.decode(ids))
        reply = _reply(model, "text_completion", asked.logprobs is not None)
        stream = bool(asked.stream)
        return await _answer(
            request, api, reply, wants, heads if asked.echo else [], stream, asked.wants_usage
        )

    async def chat_completions(request: Request) -> Response:
        asked = read(ChatRequest, await _json(request))
        model = await api.model(asked.model)
        messages = [message.plain() for message in asked.messages]
        text = await asyncio.to_thread(chat.render, model.chat_template, messages)
        ids = await _encode(model, text)
        most = fit(ids, asked.limit, model.max_positions)
        stops = asked.stops + ([chat.PLAIN_STOP] if model.chat_template is None else [])
        want = Want(ids, most, asked.sampling(asked.top_logprobs or 0), tuple(stops))
        reply = _reply(model, "chat.completion", bool(asked.logprobs))
        stream = bool(asked.stream)
        return await _answer(request, api, reply, [want], [], stream, asked.wants_usage)

    table: list[tuple[str, str, Callable[[Request], Awaitable[Response]]]] = [
        ("GET", "/v1/models", models),
        ("GET", "/v1/models/{model}", model),
        ("POST", "/v1/completions", completions),
        ("POST", "/v1/chat/completions", chat_completions),
    ]
    return [
        Route(path, _translated(endpoint, token), methods=[method])
        for method, path, endpoint in table
    ]


async def _answer(
    request: Request,
    api: NodeApi,
    reply: Reply,
    wants: list[Want],
    heads: list[str],
    stream: bool,
    with_usage: bool,
) -> Response:
    """Run `wants` one after the other; `heads` are echoed in front of their answers."""
    if stream:
        events = _events(api, reply, wants, heads, with_usage)
        return EventStream(events, lambda error: openai_failure(error).response())
    body = await while_connected(request.scope, request.receive, _whole(api, reply, wants, heads))
    return Response(status_code=503) if body is None else JSONResponse(body)


async def _whole(api: NodeApi, reply: Reply, wants: list[Want], heads: list[str]) -> dict[str, Any]:
    choices, num_tokens = [], 0
    for index, want in enumerate(wants):
        head = heads[index] if heads else ""
        async with closing(pieces(api, reply.model, want)) as parts:
            got = [piece async for piece in parts]
        shown = tuple(
            Shown(each.token, each.offset + len(head)) for piece in got for each in piece.shown
        )
        text = head + "".join(piece.text for piece in got)
        choices.append(reply.choice(index, Piece(text, shown, got[-1].finish)))
        num_tokens += got[-1].num_tokens
    return {**reply.envelope(choices), "usage": _usage(wants, num_tokens)}


async def _events(
    api: NodeApi, reply: Reply, wants: list[Want], heads: list[str], with_usage: bool
) -> AsyncGenerator[bytes, None]:
    num_tokens = 0
    usage: dict[str, Any] = {"usage": None} if with_usage else {}

    def chunk(choices: list[dict[str, Any]]) -> bytes:
        return _bytes({**reply.envelope(choices, chunk=True), **usage})

    for index, want in enumerate(wants):
        first = True
        async with closing(pieces(api, reply.model, want)) as parts:
            async for piece in parts:
                if first and reply.is_chat:
                    yield chunk([_opening(index)])
                elif first and heads:
                    yield chunk([reply.choice(index, Piece(heads[index], ()), chunk=True)])
                first = False
                num_tokens += piece.num_tokens
                if piece.finish and (piece.text or piece.shown) and reply.is_chat:
                    text_only = Piece(piece.text, piece.shown)
                    yield chunk([reply.choice(index, text_only, chunk=True)])
                    piece = Piece("", (), piece.finish)
                yield chunk([reply.choice(index, piece, chunk=True)])
    if with_usage:
        usage = {"usage": _usage(wants, num_tokens)}
        yield chunk([])
    yield b"[DONE]"


def _opening(index: int) -> dict[str, Any]:
    delta = {"role": "assistant", "content": ""}
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}


def _translated(
    endpoint: Callable[[Request], Awaitable[Response]], token: str | None
) -> Callable[[Request], Awaitable[Response]]:
    async def translated(request: Request) -> Response:
        try:
            if token is not None:
                check_token(request, token)
            return await endpoint(request)
        except AuthError as error:
            return ApiError(str(error), status=401, code="invalid_api_key").response()
        except ApiError as error:
            return error.response()
        except SwarmError as error:
            return openai_failure(error).response()

    return translated


async def _json(request: Request) -> object:
    try:
        body: object = json.loads(await read_body(request, MAX_BODY_BYTES))
    except UserError as error:
        raise ApiError(str(error), status=413) from None
    except (ValueError, RecursionError) as error:
        raise ApiError(f"the request is not JSON: {error}") from None
    return body


async def _encode(model: ModelView, text: str) -> list[int]:
    """Off the loop: a long prompt takes a tokenizer a while. Raises: DataError."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError("the prompt has half a surrogate pair; send valid Unicode") from None
    return await asyncio.to_thread(model.encode, text)


def _reply(
    model: ModelView, kind: Literal["chat.completion", "text_completion"], with_logprobs: bool
) -> Reply:
    prefix = "chatcmpl" if kind == "chat.completion" else "cmpl"
    return Reply(model, kind, f"{prefix}-{secrets.token_hex(12)}", int(time.time()), with_logprobs)


def _usage(wants: list[Want], num_tokens: int) -> dict[str, int]:
    num_prompt = sum(len(want.prompt) for want in wants)
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_tokens,
        "total_tokens": num_prompt + num_tokens,
    }


def _model(model: ModelView) -> dict[str, Any]:
    return {
        "id": model.name, "object": "model", "created": int(model.created_s),
        "owned_by": "swarmnode", "max_model_len": model.max_positions,
    }  # fmt: skip


def _bytes(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
