"""The web application: routes, who may use them, and how errors look.

    POST /v1/chat/completions, /v1/completions ─► account ─► body ─► request ─► jobs ─► GeneratedResponse
    GET  /v1/models, /v1/models/NAME, /healthz, / (the chat page)

Knows nothing of generation, threads or the swarm; `swarm.api.serving` puts it on a socket.
"""

import asyncio
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Lifespan

from swarm.api.config import ApiLimits
from swarm.api.engine import Engine
from swarm.api.errors import ApiError, as_api_error, overloaded
from swarm.api.generation import Job
from swarm.api.keys import Keys
from swarm.api.models import Models, ServedModel
from swarm.api.page import page_routes
from swarm.api.replies import ChatForm, Form, Header, TextForm
from swarm.api.requests import ChatRequest, Options, TextRequest, parse_chat, parse_text
from swarm.api.streaming import GeneratedResponse
from swarm.errors import SwarmError
from swarm.rates import Rates

logger = logging.getLogger(__name__)

ANYBODY = "anybody"
"""The account of everybody, where no keys are asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Api:
    """The endpoints and what they need."""

    models: Models
    engine: Engine
    limits: ApiLimits
    rates: Rates
    """Requests of each account, or address."""
    keys: Keys | None
    """None: no key is needed."""
    check_health: Callable[[], Awaitable[None]]
    """Raises SwarmError when no answer could be generated now."""

    def app(self, lifespan: Lifespan[Starlette]) -> Starlette:
        """The ASGI application; `lifespan` is around all of its requests."""
        routes = [
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/completions", self.complete, methods=["POST"]),
            Route("/v1/models", self.list_models),
            Route("/v1/models/{name:path}", self.show_model),
            Route("/healthz", self.health),
            *page_routes(),
        ]
        return Starlette(
            routes=routes,
            lifespan=lifespan,
            exception_handlers={SwarmError: _on_swarm_error, HTTPException: _on_http_error, Exception: _on_bug},
        )

    async def chat(self, request: Request) -> Response:
        """Answer a conversation."""
        account = self._account(request)
        parsed = parse_chat(await self._body(request))
        model = self.models.find(parsed.model)
        jobs = await asyncio.to_thread(self._chat_jobs, parsed, model)
        return self._generate(jobs, account, parsed.options, ChatForm, "chatcmpl")

    async def complete(self, request: Request) -> Response:
        """Continue texts."""
        account = self._account(request)
        parsed = parse_text(await self._body(request))
        model = self.models.find(parsed.model)
        jobs = await asyncio.to_thread(self._text_jobs, parsed, model)
        return self._generate(jobs, account, parsed.options, TextForm, "cmpl")

    async def list_models(self, request: Request) -> Response:
        """All names that can be asked for."""
        self._account(request)
        return _json({"object": "list", "data": [_describe(model) for model in self.models.all]})

    async def show_model(self, request: Request) -> Response:
        """One of them."""
        self._account(request)
        return _json(_describe(self.models.find(request.path_params["name"])))

    async def health(self, request: Request) -> Response:
        """200 while the swarm can answer; for load balancers, so without a key."""
        await self.check_health()
        return _json({"status": "ok"})

    def _account(self, request: Request) -> str:
        """Who is asking.

        Raises:
            ApiError: nobody whom we know, or somebody who asks too often.
        """
        account = self._owner_of_key(request)
        caller, now = account if self.keys is not None else _address(request), time.monotonic()
        if not self.rates.charge(caller, now):
            what = f"over {self.rates.rate.per_s:g} requests per second"
            raise overloaded(what, self.rates.retry_after_s(caller, now))
        return account

    def _owner_of_key(self, request: Request) -> str:
        if self.keys is None:
            return ANYBODY
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        account = self.keys.account(key.strip()) if scheme.lower() == "bearer" else None
        if account is None:
            raise ApiError(
                "a valid API key is needed: Authorization: Bearer sk-swarm-...", status=401, code="invalid_api_key"
            )
        return account

    async def _body(self, request: Request) -> bytes:
        """The body, of bounded size and in bounded time.

        Raises:
            ApiError: it isn't.
        """
        media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if media_type != "application/json":  # which a web page of somebody else can't send without asking
            raise ApiError(f"content-type is {media_type[:80]!r}, need application/json", status=415)
        limit, body = self.limits.max_body_bytes, bytearray()
        try:
            async with asyncio.timeout(self.limits.body_timeout_s):
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > limit:
                        raise ApiError(f"the body has more than {limit} bytes", status=413, code="body_too_large")
        except ClientDisconnect as error:
            raise ApiError("hung up before the body ended") from error
        except TimeoutError as error:
            raise ApiError(f"the body took more than {self.limits.body_timeout_s:g} s", status=408) from error
        return bytes(body)

    def _chat_jobs(self, request: ChatRequest, model: ServedModel) -> list[Job]:
        options = request.options
        self._check_rows(1, options)
        return [self._job(model, model.prompts.chat(request.turns), options)]

    def _text_jobs(self, request: TextRequest, model: ServedModel) -> list[Job]:
        options, texts = request.options, request.prompts
        self._check_rows(len(texts), options)
        return [self._job(model, model.prompts.text(text), options) for text in texts]

    def _job(self, model: ServedModel, prompt: tuple[int, ...], options: Options) -> Job:
        """One prompt and its answers.

        Raises:
            ApiError: it is too much for the model or for this gateway.
        """
        room = model.max_positions - len(prompt)
        wanted = options.max_tokens
        if room < (wanted or 1):
            raise ApiError(
                f"{model.name} has {model.max_positions} positions; the prompt takes {len(prompt)}"
                f" and the answer {wanted or 1}",
                code="context_length_exceeded",
                param="messages" if wanted is None else "max_tokens",
            )
        if wanted is not None and wanted > self.limits.max_tokens:
            raise ApiError(f"max_tokens is {wanted}, at most {self.limits.max_tokens}", param="max_tokens")
        return Job(
            model=model,
            prompt=prompt,
            rows=options.n,
            max_tokens=wanted or min(self.limits.max_tokens, room, options.usual_max_tokens or room),
            sampling=model.sampling(options),
            stop=options.stop,
            ignore_eos=options.ignore_eos,
        )

    def _check_rows(self, num_prompts: int, options: Options) -> None:
        rows, limit = num_prompts * options.n, self.limits.max_rows_per_request
        if rows > limit:
            raise ApiError(f"{rows} answers asked for, at most {limit} in one request", param="n")

    def _generate(
        self, jobs: Sequence[Job], account: str, options: Options, form: type[ChatForm] | type[TextForm], prefix: str
    ) -> Response:
        model = jobs[0].model
        header = Header(
            id=f"{prefix}-{secrets.token_hex(12)}",
            created=int(time.time()),
            model=model.name,
            fingerprint=f"swarm-{model.digest[:12]}",
        )
        written: Form = form(
            header,
            model.prompts.spell,
            with_logprobs=options.top_logprobs is not None,
            with_usage=options.include_usage,
        )
        return GeneratedResponse(
            self.engine,
            jobs,
            account,
            written,
            stream=options.stream,
            include_usage=options.include_usage,
            send_timeout_s=self.limits.send_timeout_s,
        )


def _address(request: Request) -> str:
    return request.client.host if request.client is not None else ""


def _describe(model: ServedModel) -> dict[str, str | int]:
    return {
        "id": model.name,
        "object": "model",
        "created": 0,
        "owned_by": "swarm",
        "digest": model.digest,
        "max_model_len": model.max_positions,
    }


def _json(value: object) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")


def _refusal(error: ApiError) -> Response:
    return Response(error.body, error.status, headers=error.headers, media_type="application/json")


async def _on_swarm_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, SwarmError)
    return _refusal(as_api_error(error))


async def _on_http_error(request: Request, error: Exception) -> Response:
    """Starlette's own: no such path, or not with this method."""
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path[:200]}: {error.detail}"
    return _refusal(ApiError(message, status=error.status_code, code="not_found" if error.status_code == 404 else None))


async def _on_bug(request: Request, error: Exception) -> Response:
    """What nobody thought of; the server logs the traceback."""
    return _refusal(ApiError("internal error", status=500, type="server_error", code="internal_error"))
