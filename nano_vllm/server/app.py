"""The routes."""

from __future__ import annotations

import asyncio
import base64
import importlib.metadata
import time
from collections.abc import AsyncIterator
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response, StreamingResponse

from nano_vllm.server.chat import ChatAnswer
from nano_vllm.server.completions import CompletionAnswer
from nano_vllm.server.documentation import document
from nano_vllm.server.errors import ApiError, invalid
from nano_vllm.server.event import event
from nano_vllm.server.generation import error_response, json_response, respond
from nano_vllm.server.guard import REQUEST_ID, Guard
from nano_vllm.server.http_body import Disconnected, decode, read_body
from nano_vllm.server.page import page_html
from nano_vllm.server.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from nano_vllm.server.responses import (
    ChatCompletion,
    Completion,
    Health,
    ModelCard,
    ModelList,
    Text,
    TokenizerInfo,
    Tokens,
    Version,
)
from nano_vllm.server.routes import Routes
from nano_vllm.server.service import Service
from nano_vllm.server.validation import is_short

COMPLETION = msgspec.json.Decoder(CompletionRequest)
CHAT = msgspec.json.Decoder(ChatRequest)
TOKENIZE = msgspec.json.Decoder(TokenizeRequest)
DETOKENIZE = msgspec.json.Decoder(DetokenizeRequest)
STATE_SECONDS = 0.25
"""Between two pictures of the engine."""
CLIENT_CLOSED = 499
LARGE_BODY = 2**18
"""Bytes; what is longer is decoded beside the event loop."""

routes = Routes()


def make_app(service: Service) -> Guard:
    """The whole ASGI application."""
    config = service.config
    handlers: dict[Any, Any] = {
        ApiError: _on_api_error,
        Disconnected: _on_disconnect,
        HTTPException: _on_http_error,
        Exception: _on_failure,
    }
    app = Starlette(routes=routes.served, exception_handlers=handlers)
    app.state.service = service
    app.state.created = int(time.time())
    return Guard(app, config.api_key, config.log_format if config.access_log else None)


async def _on_api_error(request: Request, error: ApiError) -> Response:
    return error_response(error)


async def _on_disconnect(request: Request, error: Disconnected) -> Response:
    return Response(status_code=CLIENT_CLOSED)


async def _on_http_error(request: Request, error: HTTPException) -> Response:
    response = error_response(ApiError(error.status_code, str(error.detail).lower()))
    response.headers.update(error.headers or {})
    return response


async def _on_failure(request: Request, error: Exception) -> Response:
    request_id = request.scope[REQUEST_ID]
    return error_response(ApiError(500, f"internal error; see the server's log for {request_id}"))


def service_of(request: Request) -> Service:
    return request.app.state.service


async def body_of(request: Request, decoder: msgspec.json.Decoder[Any]) -> Any:
    service = service_of(request)
    body = await read_body(request.headers, request.receive, service.config.read_timeout)
    if len(body) > LARGE_BODY:
        return await service.in_thread(decode, body, decoder)
    return decode(body, decoder)


@routes.post("/v1/completions", CompletionRequest, Completion)
async def create_completion(request: Request) -> Response:
    """Continue texts."""
    service = service_of(request)
    gate = service.check_open()
    asked: CompletionRequest = await body_of(request, COMPLETION)
    service.check_model(asked.model)
    if is_short(asked):
        prompts = gate.completion(asked)
    else:
        prompts = await service.in_thread(gate.completion, asked)
    answer = CompletionAnswer(asked, prompts, service.model_name, service.tokenizer)
    return await respond(service, answer, request)


@routes.post("/v1/chat/completions", ChatRequest, ChatCompletion)
async def create_chat_completion(request: Request) -> Response:
    """Answer a conversation."""
    service = service_of(request)
    gate = service.check_open()
    asked: ChatRequest = await body_of(request, CHAT)
    service.check_model(asked.model)
    prompt = await service.in_thread(gate.chat, asked)
    return await respond(service, ChatAnswer(asked, prompt, service.model_name), request)


@routes.post("/tokenize", TokenizeRequest, Tokens)
async def tokenize(request: Request) -> Response:
    """Token ids of a text or a conversation."""
    service = service_of(request)
    gate = service.check_open()
    asked: TokenizeRequest = await body_of(request, TOKENIZE)
    service.check_model(asked.model)
    if (asked.prompt is None) == (asked.messages is None):
        raise invalid("give either prompt or messages", "prompt")

    def work() -> Tokens:
        if asked.prompt is None:
            _, token_ids = gate.conversation(asked)
        else:
            token_ids = gate.encode(asked.prompt, asked.add_special_tokens is not False)
        tokens = Tokens(len(token_ids), gate.max_model_len, token_ids)
        if asked.return_token_strs:
            id_to_piece = gate.tokenizer("return_token_strs").id_to_piece
            tokens.token_strs = [id_to_piece(token_id) or "" for token_id in token_ids]
        return tokens

    return json_response(await service.in_thread(work))


@routes.post("/detokenize", DetokenizeRequest, Text)
async def detokenize(request: Request) -> Response:
    """The text of tokens."""
    service = service_of(request)
    gate = service.check_open()
    asked: DetokenizeRequest = await body_of(request, DETOKENIZE)
    service.check_model(asked.model)
    return json_response(Text(await service.in_thread(gate.decode, asked.tokens)))


@routes.get("/tokenizer_info", TokenizerInfo)
async def tokenizer_info(request: Request) -> Response:
    """The tokens that begin and end a text, by their names; with /tokenize and /detokenize a client
    such as lm-eval needs no tokenizer of its own.
    """
    tokenizer = service_of(request).check_open().tokenizer("tokenizer_info")
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_ids[:1]
    return json_response(
        TokenizerInfo(
            None if bos is None else tokenizer.id_to_piece(bos),
            tokenizer.id_to_piece(eos[0]) if eos else None,
        )
    )


@routes.get("/v1/models", ModelList)
async def list_models(request: Request) -> Response:
    """The one model."""
    return json_response(ModelList([_model_card(request)]))


@routes.get("/v1/models/{model:path}", ModelCard)
async def get_model(request: Request) -> Response:
    """The model, by its name."""
    service_of(request).check_model(request.path_params["model"])
    return json_response(_model_card(request))


@routes.get("/version", Version)
async def version(request: Request) -> Response:
    """Of the server."""
    return json_response(Version(importlib.metadata.version("nano_vllm")))


@routes.get("/health", Health)
async def health(request: Request) -> Response:
    """Whether requests are served: 503 while the model loads, and when the engine is stuck."""
    status = service_of(request).status
    if status != "ready":
        raise ApiError(503, status)
    return json_response(Health(status))


@routes.get("/metrics", str, "text/plain")
async def metrics(request: Request) -> Response:
    """For Prometheus."""
    service = service_of(request)
    page = service.metrics.page(service.llm.pongs)
    return Response(page, media_type="text/plain; version=0.0.4; charset=utf-8")


@routes.get("/openapi.json", dict[str, Any])
async def openapi(request: Request) -> Response:
    """This API."""
    return json_response(document(routes))


@routes.get("/")
async def page(request: Request) -> Response:
    """A chat, and the engine at work."""
    return HTMLResponse(
        page_html(), headers={"content-security-policy": "default-src 'self' 'unsafe-inline'"}
    )


@routes.get("/favicon.ico")
async def favicon(request: Request) -> Response:
    """Browsers ask for it."""
    return Response(status_code=204)


@routes.get("/debug/state")
async def state(request: Request) -> Response:
    """An engine as server-sent events, a few a second, as the page shows it."""
    service = service_of(request)
    service.check_open()
    number, last = request.query_params.get("engine", "0"), service.llm.num_engines - 1
    if number not in map(str, range(last + 1)):
        raise invalid(f"engine must be in [0, {last}], got {number!r:.100}", "engine")
    return StreamingResponse(_states(service, int(number)), media_type="text/event-stream")


async def _states(service: Service, engine: int) -> AsyncIterator[bytes]:
    while service.status == "ready":
        try:
            pong = await service.llm.look(engine)
        except TimeoutError:
            continue
        picture = pong.picture
        assert picture is not None, "a picture was asked for"
        yield event(
            {
                "num_engines": service.llm.num_engines,
                "metrics": pong.metrics,
                "num_cached_blocks": pong.num_cached_blocks,
                "blocks": base64.b64encode(picture.blocks).decode(),
                "steps": [msgspec.structs.asdict(step) for step in picture.steps],
            }
        )
        await asyncio.sleep(STATE_SECONDS)


def _model_card(request: Request) -> ModelCard:
    service = service_of(request)
    gate = service.gate
    if gate is None:
        raise ApiError(503, f"not ready: {service.status}")
    return ModelCard(service.model_name, request.app.state.created, gate.max_model_len)
