"""The prompt box: an engine behind the OpenAI interface, with keys, limits, quotas, a query log and metrics.

    POST /v1/completions        text for text; `echo` with `logprobs` scores a text that is there
    POST /v1/chat/completions   an answer to messages, in the model's own chat template if it has one
    GET  /v1/models             what may be asked
    GET  /health, /metrics      for whoever runs the box

What cannot be answered is refused with a status and one sentence in the interface's own shape. No key and no prompt is
printed or logged anywhere but in the box's file.
"""

import asyncio
import contextlib
import math
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Coroutine, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import limits
import numpy as np
import prometheus_client
from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from epigone.arena.accounts import Accounts, Bounds, Key, OverQuota, State
from epigone.arena.answers import Piece, Place, Writing, offsets_of, places_of
from epigone.arena.engine import Ask, Engine, Full, Told, Why
from epigone.arena.protocol import (
    Answer,
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChatRequest,
    Choice,
    ChunkChoice,
    Completion,
    CompletionRequest,
    Delta,
    Model,
    Models,
    Naming,
    Refusal,
    Usage,
    Wrong,
    chat_scores_of,
    scores_of,
)
from epigone.data.tokenizers import Tokenizer
from epigone.errors import Fault, UserError
from epigone.sampling.loop import Knobs

CLIENT_GONE = 499
"""The status in the log of a question whose asker did not wait for the answer."""

_WITH_BODY = {("POST", "/v1/completions"), ("POST", "/v1/chat/completions")}
_KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


@dataclass(frozen=True)
class Box:
    """What stands behind the endpoint.

    Attributes:
        name: of the model.
        tokenizer: of the model.
        engine: which is running.
        most: tokens of a text and its prompt.
        best: scores of a place that may be asked for; None where the policy shows none.
        accounts: keys and log.
        bounds: of a question.
        anyone: the key of those who give none, or None where one must be given.
    """

    name: str
    tokenizer: Tokenizer
    engine: Engine
    most: int
    best: int | None
    accounts: Accounts
    bounds: Bounds = Bounds()
    anyone: Key | None = None


class Refused(Exception):
    """A question that is not answered: status, sentence, and after how many seconds it may be asked again."""

    def __init__(self, status: int, why: str, param: str | None = None, code: str | None = None, wait: int = 0) -> None:
        super().__init__(why)
        self.status, self.param, self.code, self.wait = status, param, code, wait

    def response(self) -> JSONResponse:
        """As it is sent."""
        wrong = Wrong(message=str(self), type=_kind(self.status), param=self.param, code=self.code)
        headers = {"Retry-After": str(self.wait)} if self.wait else {}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(Refusal(error=wrong).model_dump(), self.status, headers)


def _kind(status: int) -> str:
    return _KINDS.get(status, "invalid_request_error" if status < 500 else "api_error")


class _Question(NamedTuple):
    """A question that was taken: its number in the log, its texts, when it came; `read` is filled when it was read."""

    number: int
    prompts: list[np.ndarray]
    asks: list[Ask]
    began: float
    read: list[bool]

    @property
    def tokens(self) -> int:
        """Of its prompts, once something that was made of them has left."""
        return sum(map(len, self.prompts)) if self.read else 0


class _Server:
    """The work behind the routes."""

    def __init__(self, box: Box) -> None:
        self.box, self.made = box, int(time.time())
        self.rates = limits.strategies.MovingWindowRateLimiter(limits.storage.MemoryStorage())
        self.registry = prometheus_client.CollectorRegistry()
        names: dict[str, Any] = {"namespace": "epigone", "registry": self.registry}
        self.asked = prometheus_client.Counter("questions", "Questions by status", ["path", "status"], **names)
        self.tokens = prometheus_client.Counter("tokens", "Tokens that were read and written", ["what"], **names)
        self.seconds = prometheus_client.Histogram("seconds", "From a question to its end", ["path"], **names)
        growing = prometheus_client.Gauge("growing_texts", "Texts that grow now", **names)
        waiting = prometheus_client.Gauge("waiting_texts", "Texts that wait for a place", **names)
        growing.set_function(lambda: box.engine.load[0])
        waiting.set_function(lambda: box.engine.load[1])

    def admitted(self, given: HTTPAuthorizationCredentials | None) -> Key:
        """Who asks. Raises Refused for a key that is unknown or refused, or that asks too often."""
        key = (None if given is None else self.box.accounts.find(given.credentials)) or self.box.anyone
        if key is None:
            what = "no key was given" if given is None else "this key is not known"
            raise Refused(401, f"{what}: send 'Authorization: Bearer KEY'", code="invalid_api_key")
        if key.state == State.REFUSED:
            raise Refused(403, "this key is refused: ask whoever runs this endpoint", code="key_refused")
        rate = limits.RateLimitItemPerMinute(key.a_minute)
        if key is not self.box.anyone and not self.rates.hit(rate, key.name):
            wait = max(1, math.ceil(self.rates.get_window_stats(rate, key.name).reset_time - time.time()))
            why = f"{key.a_minute} questions a minute are allowed: ask again in {wait} s"
            raise Refused(429, why, code="rate_limit_exceeded", wait=wait)
        return key

    def best(self, key: Key, wanted: int | None, param: str) -> int | None:
        """How many scores are shown, of so many that are wanted. Raises Refused where that is too many."""
        if wanted is None:
            return None
        if self.box.best is None or key.state == State.DEGRADED:
            raise Refused(403, "this endpoint shows you no scores: leave it out", param, "scores_hidden")
        if wanted > self.box.best:
            raise Refused(400, f"{wanted} scores of each place: {self.box.best} at most", param)
        return wanted

    def check_model(self, name: str) -> None:
        """Raises Refused for another model."""
        if name != self.box.name:
            raise Refused(
                404, f"there is no model '{name[:100]}': '{self.box.name}' is here", "model", "model_not_found"
            )

    def check_texts(self, prompts: int, n: int) -> None:
        """Raises Refused for too many."""
        if prompts * n > self.box.bounds.texts:
            raise Refused(400, f"{prompts} prompts, n={n}: {self.box.bounds.texts} texts at most", "n")

    def check_length(self, tokens: int, more: int) -> None:
        """Raises Refused for a prompt that leaves no room for so many more tokens."""
        if tokens + more > self.box.most - 1:
            why = f"a prompt of {tokens} tokens, and {more} more: {self.box.most - 1} at most"
            raise Refused(400, why, None, "context_length_exceeded")

    def take(
        self,
        key: Key,
        path: str,
        asked: CompletionRequest | ChatRequest,
        prompts: list[np.ndarray],
        length: int | None,
        scores: bool,
    ) -> _Question:
        """Note a question in the log. Raises Refused where it is too long, too large or over the key's quota."""
        room = self.box.most - 1
        longest = max(map(len, prompts))
        n = asked.n or 1
        self.check_texts(len(prompts), n)
        self.check_length(longest, 1 if length is None else length)
        knobs = Knobs(*(value if value is not None else other for value, other in zip(
            (asked.temperature, asked.top_k, asked.top_p), Knobs(), strict=True)))  # fmt: skip
        seed = secrets.randbits(32) if asked.seed is None else asked.seed
        asks = [
            Ask(prompt, room - len(prompt) if length is None else length, seed, sample, knobs, scores)
            for prompt in prompts
            for sample in range(n)
        ]
        most = sum(map(len, prompts)) + sum(ask.length for ask in asks)
        settings = asked.model_dump(exclude={"prompt", "messages"}, exclude_defaults=True)
        try:
            number = self.box.accounts.note(key, path, [prompt.tolist() for prompt in prompts], settings, most)
        except OverQuota as error:
            raise Refused(429, str(error), code="insufficient_quota", wait=error.seconds) from None
        return _Question(number, prompts, asks, time.monotonic(), [])

    def settle(self, path: str, question: _Question, status: int, written: int) -> None:
        """Note how it ended."""
        seconds = time.monotonic() - question.began
        self.box.accounts.settle(question.number, status, question.tokens, written, seconds)
        self.tokens.labels("read").inc(question.tokens)
        self.tokens.labels("written").inc(written)
        self.seconds.labels(path).observe(seconds)

    async def told(
        self, enlist: Callable[[Callable[[int, Told], None]], list[Any]], enough: Collection[int] = ()
    ) -> AsyncGenerator[tuple[int, Told]]:
        """What the engine tells of texts until all have ended, or are among those of which the listener has enough.

        They are given up where nobody listens any more.
        """
        loop, heard = asyncio.get_running_loop(), asyncio.Queue[tuple[int, Told]]()

        def tell(number: int, told: Told) -> None:
            with contextlib.suppress(RuntimeError):  # the server has stopped
                loop.call_soon_threadsafe(heard.put_nowait, (number, told))

        try:
            tickets = enlist(tell)
        except Full as error:
            broken = self.box.engine.error
            raise Refused(503 if broken else 429, f"{error}", code="busy", wait=60 if broken else 1) from None
        left = dict(enumerate(tickets))
        try:
            while left:
                number, told = await heard.get()
                if number not in left:
                    continue
                yield number, told
                if told.why is not None:
                    del left[number]
                elif number in enough:
                    self.box.engine.give_up([left.pop(number)])
        finally:
            self.box.engine.give_up(left.values())

    async def pieces(self, question: _Question, writings: list[Writing]) -> AsyncGenerator[tuple[int, Piece]]:
        """Pieces of all texts as they come. Raises Refused where a text got no time at all, or the engine broke."""
        ended = set[int]()
        asks = [ask for ask in question.asks if ask.length]
        async with contextlib.aclosing(self.told(lambda tell: self.enlist(asks, tell), ended)) as all_told:
            async for number, told in all_told:
                if told.why == Why.ERROR or (told.why == Why.TIME and not writings[number].written):
                    raise Refused(503, "there was no time for this question: ask again later", code="busy", wait=5)
                question.read.append(True)
                piece = writings[number].add(told)
                if piece.why is not None:
                    ended.add(number)
                yield number, piece

    def enlist(self, asks: list[Ask], tell: Callable[[int, Told], None]) -> list[Any]:
        """Put texts into the engine's line."""
        return self.box.engine.ask(asks, tell, self.box.bounds.seconds)

    async def read(self, prompts: list[np.ndarray], offsets: list[list[int]], best: int) -> list[list[Place]]:
        """Places of texts that are there."""
        found: list[list[Place]] = [[] for _ in prompts]

        def enlist(tell: Callable[[int, Told], None]) -> list[Any]:
            return self.box.engine.read(prompts, tell, self.box.bounds.seconds)

        async with contextlib.aclosing(self.told(enlist)) as all_told:
            async for number, told in all_told:
                if told.seen is None:
                    raise Refused(503, "there was no time for this question: ask again later", code="busy", wait=5)
                found[number] = places_of(prompts[number], offsets[number], told.seen, best)
        return found

    def encoded(
        self, prompts: Sequence[str | list[int]], n: int, echo: bool
    ) -> tuple[list[np.ndarray], list[str], list[list[int]]]:
        """Ids of prompts; their text and the characters before each token, where they are to be given back.

        Raises Refused for too many prompts, for one that is too long, and for ids that are none.
        """
        self.check_texts(len(prompts), n)
        ids, texts, offsets = [], [], []
        for prompt in prompts:
            if isinstance(prompt, str):
                tokens, spans = self.box.tokenizer.encode_with_spans(prompt)
                text, first = prompt, spans[:, 0].tolist()
            else:
                if max(prompt) >= self.box.tokenizer.tokens:
                    raise Refused(400, f"token {max(prompt)}: there are {self.box.tokenizer.tokens}", "prompt")
                tokens = np.array(prompt, np.int32)
                self.check_length(len(prompt), 0)
                text, first = offsets_of(self.box.tokenizer, tokens) if echo else ("", [])
            ids.append(tokens)
            texts.append(text)
            offsets.append(first)
        return ids, texts, offsets

    def chat(self, asked: ChatRequest) -> np.ndarray:
        """Ids of messages: in the model's own template, or their contents on a line each where it has none."""
        tokenizer = self.box.tokenizer
        if tokenizer.chat_template is None:
            return tokenizer.encode("\n".join(message.text for message in asked.messages))
        rendered = tokenizer.render_chat([{"role": m.role, "content": m.text} for m in asked.messages])
        ids = tokenizer.encode(rendered, specials=True)
        return ids[1:] if len(ids) and ids[0] == tokenizer.specials.bos else ids


class _Tally:
    """What the texts of one question have become."""

    def __init__(self, count: int) -> None:
        self.texts, self.places = [""] * count, [list[Place]() for _ in range(count)]
        self.ends: list[Why | None] = [None] * count

    def add(self, number: int, piece: Piece) -> None:
        self.texts[number] += piece.text
        self.places[number] += piece.places
        self.ends[number] = piece.why


def _finish(why: Why | None) -> Any:
    return None if why is None else "stop" if why == Why.STOP else "length"


async def _unless_gone(request: Request, work: Coroutine[Any, Any, Any]) -> Any:
    """The result of some work, which ends where the client leaves."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Refused(CLIENT_GONE, "the client has left")
        return task.result()
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _event(body: BaseModel | str, **more: Any) -> str:
    return f"data: {body if isinstance(body, str) else body.model_dump_json(**more)}\n\n"


def application(box: Box) -> ASGIApp:
    """The whole of it, as an ASGI application.

    Args:
        box: whose engine runs as long as the application does.
    """
    server = _Server(box)
    app = FastAPI(title="Epigone's prompt box", version="1", docs_url=None, redoc_url=None)
    bearer = HTTPBearer(auto_error=False, description="A key that 'epigone keys' made.")

    async def admitted(given: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)]) -> Key:
        return server.admitted(given)

    Admitted = Annotated[Key, Depends(admitted)]
    refusals: dict[int | str, dict[str, Any]] = {
        status: {"model": Refusal, "description": what}
        for status, what in {
            400: "The question cannot be read.",
            401: "No key, or an unknown one.",
            403: "The key is refused, or scores are not shown.",
            404: "There is no such model.",
            408: "The question did not arrive in time.",
            413: "The question is too large.",
            415: "The question is not JSON.",
            429: "Too many questions, too many tokens, or too many who wait.",
            503: "No time, or the engine is broken.",
        }.items()
    }
    stream: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> Response:
        return error.response()

    @app.exception_handler(UserError)
    async def impossible(request: Request, error: UserError) -> Response:
        return Refused(400, str(error)).response()

    @app.exception_handler(Fault)
    async def broken(request: Request, error: Fault) -> Response:
        return Refused(503, "this endpoint cannot write its log: ask again later", code="busy", wait=60).response()

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        place = [str(part) for part in first["loc"] if part != "body"]
        param = ".".join(place) or None
        what = first["msg"].removeprefix("Value error, ")
        return Refused(400, f"{param or 'body'}: {what}", param).response()

    @app.exception_handler(HTTPException)
    async def other(request: Request, error: HTTPException) -> Response:
        response = Refused(error.status_code, str(error.detail)).response()
        response.headers.update(error.headers or {})
        return response

    @app.get("/health", responses={503: refusals[503]})
    async def health() -> dict[str, str]:
        """Whether questions are answered."""
        if box.engine.error:
            raise Refused(503, "the engine is broken: start the server again", code="broken")
        return {"status": "ok"}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(
            prometheus_client.generate_latest(server.registry), media_type=prometheus_client.CONTENT_TYPE_LATEST
        )

    def model() -> Model:
        return Model(id=box.name, created=server.made, max_model_len=box.most, max_logprobs=box.best or 0)

    listed: dict[int | str, dict[str, Any]] = {status: refusals[status] for status in (401, 403, 429)}

    @app.get("/v1/models", responses=listed)
    async def models(key: Admitted) -> Models:
        """What may be asked."""
        return Models(data=[model()])

    @app.get("/v1/models/{name:path}", responses=listed | {404: refusals[404]})
    async def one_model(name: str, key: Admitted) -> Model:
        """One of them."""
        server.check_model(name)
        return model()

    async def answer(
        request: Request, question: _Question, writings: list[Writing], whole: Any, sent: Any, streams: bool
    ) -> Response:
        """Answer at once, or piece by piece; the log says how it ended."""
        path, status, tally = request.url.path, CLIENT_GONE, _Tally(len(question.asks))

        def settle() -> None:
            server.settle(path, question, status, sum(writing.written for writing in writings))
            server.asked.labels(path, str(status)).inc()

        async def events(first: str | None, rest: AsyncGenerator[str]) -> AsyncGenerator[str]:
            nonlocal status
            try:
                async with contextlib.aclosing(rest):
                    if first is not None:
                        yield first
                    async for event in rest:
                        yield event
                status = 200
                yield _event("[DONE]")
            except Refused as error:  # the status has been sent
                status = error.status
                yield _event(bytes(error.response().body).decode())
            except Exception:
                status = 500
                raise

        async def begun(rest: AsyncGenerator[str]) -> str | None:
            return await anext(rest, None)

        waits = streams
        try:
            if streams:  # what is refused is refused before a status is sent
                rest = sent(writings)
                first = await _unless_gone(request, begun(rest))
                waits = False
                return _Stream(events(first, rest), 2 * box.bounds.seconds + box.bounds.patience, settle)
            body = await _unless_gone(request, whole(writings, tally))
            status = 200
            return Response(body.model_dump_json(), media_type="application/json")
        except Exception as error:
            status = error.status if isinstance(error, Refused) else 500
            raise
        finally:
            if waits or not streams:
                settle()

    def usage(question: _Question, writings: list[Writing]) -> Usage:
        read, written = sum(map(len, question.prompts)), sum(writing.written for writing in writings)
        return Usage(prompt_tokens=read, completion_tokens=written, total_tokens=read + written)

    @app.post("/v1/completions", responses=refusals | stream, response_model=Completion)
    async def completions(asked: CompletionRequest, key: Admitted, request: Request) -> Response:
        """Text for text."""
        server.check_model(asked.model)
        best = server.best(key, asked.logprobs, "logprobs")
        given = (asked.prompts, asked.n or 1, bool(asked.echo))
        prompts, texts, offsets = await asyncio.to_thread(server.encoded, *given)
        length = 16 if asked.max_tokens is None else asked.max_tokens
        question = server.take(key, request.url.path, asked, prompts, length, best is not None)
        name, n = Naming(box.tokenizer, bool(asked.return_tokens_as_token_ids)), asked.n or 1
        about: dict[str, Any] = {"id": f"cmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": box.name}

        def choice(number: int, text: str, places: list[Place], why: Why | None) -> Choice:
            scores = None if best is None else scores_of(places, best, name)
            return Choice(index=number, text=text, logprobs=scores, finish_reason=_finish(why))

        async def heads() -> tuple[list[str], list[list[Place]]]:
            """What stands before each text: its prompt, if it is to be given back."""
            if not asked.echo:
                return [""] * len(prompts), [[] for _ in prompts]
            if best is None:
                return texts, [[] for _ in prompts]
            scores = await server.read(prompts, offsets, best)
            question.read.append(True)
            return texts, scores

        async def whole(writings: list[Writing], tally: _Tally) -> Completion:
            before, scores = await heads()
            async with contextlib.aclosing(server.pieces(question, writings)) as pieces:
                async for number, piece in pieces:
                    tally.add(number, piece)
            choices = []
            for number, (text, places, why) in enumerate(zip(tally.texts, tally.places, tally.ends, strict=True)):
                head = before[number // n]
                moved = [place._replace(offset=place.offset + len(head)) for place in places]
                choices.append(choice(number, head + text, scores[number // n] + moved, why or Why.LENGTH))
            return Completion(**about, choices=choices, usage=usage(question, writings))

        async def sent(writings: list[Writing]) -> AsyncGenerator[str]:
            before, scores = await heads()
            for number in range(len(writings)) if asked.echo else ():
                why = None if asked.max_tokens != 0 else Why.LENGTH
                yield _event(
                    Completion(**about, choices=[choice(number, before[number // n], scores[number // n], why)])
                )
            async with contextlib.aclosing(server.pieces(question, writings)) as pieces:
                async for number, (text, places, why) in pieces:
                    moved = [place._replace(offset=place.offset + len(before[number // n])) for place in places]
                    if text or moved or why is not None:
                        yield _event(Completion(**about, choices=[choice(number, text, moved, why)]))
            if asked.stream_options and asked.stream_options.include_usage:
                yield _event(Completion(**about, choices=[], usage=usage(question, writings)))

        writings = [Writing(box.tokenizer, asked.stops, best, ask.prompt.tolist()) for ask in question.asks]
        return await answer(request, question, writings, whole, sent, bool(asked.stream))

    @app.post("/v1/chat/completions", responses=refusals | stream, response_model=ChatCompletion)
    async def chat_completions(asked: ChatRequest, key: Admitted, request: Request) -> Response:
        """An answer to messages."""
        server.check_model(asked.model)
        best = server.best(key, asked.best, "top_logprobs")
        question = server.take(key, request.url.path, asked, [server.chat(asked)], asked.length, best is not None)
        name = Naming(box.tokenizer, bool(asked.return_tokens_as_token_ids))
        about: dict[str, Any] = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": box.name,
        }

        async def whole(writings: list[Writing], tally: _Tally) -> ChatCompletion:
            async with contextlib.aclosing(server.pieces(question, writings)) as pieces:
                async for number, piece in pieces:
                    tally.add(number, piece)
            choices = [
                ChatChoice(
                    index=number,
                    message=Answer(content=text),
                    logprobs=None if best is None else chat_scores_of(places, name),
                    finish_reason=_finish(why),
                )
                for number, (text, places, why) in enumerate(zip(tally.texts, tally.places, tally.ends, strict=True))
            ]
            return ChatCompletion(**about, choices=choices, usage=usage(question, writings))

        def chunk(number: int, delta: Delta, places: list[Place] | None = None, why: Why | None = None) -> str:
            scores = None if best is None or places is None else chat_scores_of(places, name)
            one = ChunkChoice(index=number, delta=delta, logprobs=scores, finish_reason=_finish(why))
            return _event(ChatChunk(**about, choices=[one]), exclude={"choices": {"__all__": {"delta": _unset(delta)}}})

        async def sent(writings: list[Writing]) -> AsyncGenerator[str]:
            begun = set[int]()
            async with contextlib.aclosing(server.pieces(question, writings)) as pieces:
                async for number, (text, places, why) in pieces:
                    if number not in begun:
                        begun.add(number)
                        yield chunk(number, Delta(role="assistant", content=""))
                    if text or places or why is not None:
                        yield chunk(number, Delta(content=text), places, why)
            if asked.stream_options and asked.stream_options.include_usage:
                yield _event(ChatChunk(**about, choices=[], usage=usage(question, writings)))

        writings = [Writing(box.tokenizer, asked.stops, best) for _ in question.asks]
        return await answer(request, question, writings, whole, sent, bool(asked.stream))

    for part in app.openapi()["components"]["schemas"].values():  # kept by the application, and served as it is then
        if "model" in part.get("properties", {}) and "stream" in part["properties"]:
            part["properties"]["model"] |= {"enum": [box.name]}
    return _Guarded(app, box.bounds, server)


class _Stream(StreamingResponse):
    """Events, and what is done when they are sent, or the client left, or has not read them in so many seconds."""

    def __init__(self, events: AsyncGenerator[str], seconds: float, settle: Callable[[], None]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self._events, self._seconds, self._settle = events, seconds, settle

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with asyncio.timeout(self._seconds), contextlib.aclosing(self._events):
                await super().__call__(scope, receive, send)
        except TimeoutError:
            pass  # the connection is closed, as an answer that was not sent whole
        finally:
            self._settle()


def _unset(delta: Delta) -> set[str]:
    """What a delta does not say."""
    return set(Delta.model_fields) - delta.model_fields_set


class _Guarded:
    """Reads a question's body before anything looks at it: all of it, in time, and no more than may be sent."""

    def __init__(self, app: ASGIApp, bounds: Bounds, server: _Server) -> None:
        self._app, self._bounds, self._server = app, bounds, server

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or (scope["method"], scope["path"]) not in _WITH_BODY:
            await self._app(scope, receive, send)
            return
        try:
            body = await self._body(scope, receive)
        except Refused as error:
            self._server.asked.labels("", str(error.status)).inc()
            response = error.response()
            response.headers["Connection"] = "close"  # the rest of the body is not read
            await response(scope, receive, send)
            return
        except ConnectionResetError:
            return
        await self._app(scope, _again(body, receive), send)

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        given = dict(reversed(scope["headers"]))
        kind = given.get(b"content-type", b"").split(b";")[0].strip().lower()
        if kind != b"application/json":
            raise Refused(415, "send JSON, with 'Content-Type: application/json'")
        body, most = bytearray(), self._bounds.body
        try:
            async with asyncio.timeout(self._bounds.patience):
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ConnectionResetError
                    body += message.get("body", b"")
                    more = message.get("more_body", False)
                    if len(body) > most:
                        raise Refused(413, f"a question of more than {most} bytes")
        except TimeoutError:
            raise Refused(408, f"the question did not arrive within {self._bounds.patience:g} s") from None
        return bytes(body)


def _again(body: bytes, receive: Receive) -> Callable[[], Awaitable[Message]]:
    """Gives a body that was read, and then what comes after it."""
    given = False

    async def next_message() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return next_message
