"""An endpoint of somebody, asked politely: what it states of its limits is kept, and who asks is said.

`ask` gives an answer for good or raises: what may be better later is tried again after the time that the endpoint
states, or after one that doubles; what will not be is told at once.
"""

import asyncio
import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

import httpx

from epigone import __version__
from epigone.arena.journal import Kept
from epigone.errors import Fault, UserError, check_sizes

FIRST_WAIT = 0.5
LONGEST_WAIT = 60.0
"""Seconds before a question is tried again where the endpoint states none: the first time, and at most."""


@dataclass(frozen=True)
class Endpoint:
    """An OpenAI-compatible endpoint that you run or may use, and how it is asked.

    Attributes:
        url: its base, such as http://127.0.0.1:8000/v1.
        model: the model's name there.
        chat: ask /chat/completions, each prompt as a user's message; else /completions, which goes on from the prompt.
        key: name of the environment variable that holds the key; where it is not set, no key is sent.
        together: prompts in one question; only /completions takes several.
        at_once: questions under way; fewer for a while where the endpoint has too many.
        seconds: for an answer.
        tries: of a question, before the collection stops.
        template: tokens that a chat's template, with a prompt of the system's own, may have at most.
        patience: seconds that the endpoint may tell us to wait; where it is longer, the collection stops.
        read_price: of a million tokens that it reads, in any currency.
        write_price: of a million tokens that it writes.
    """

    url: str
    model: str
    chat: bool = False
    key: str = "OPENAI_API_KEY"
    together: int = 1
    at_once: int = 16
    seconds: float = 120.0
    tries: int = 8
    template: int = 256
    patience: float = 600.0
    read_price: float = 0.0
    write_price: float = 0.0

    def __post_init__(self) -> None:
        check_sizes(
            self, together=1, at_once=1, seconds=1, tries=1, template=0, patience=0, read_price=0, write_price=0
        )
        if not self.url.startswith(("http://", "https://")):
            raise UserError(f"endpoint '{self.url}': give its base URL, such as http://127.0.0.1:8000/v1")
        if (parts := urlsplit(self.url)).username or parts.password or parts.query:
            raise UserError("endpoint: no password and no query in the URL, which is published: use 'key'")
        if self.chat and self.together > 1:
            raise UserError(f"together={self.together}: a chat is asked alone; only completions take several prompts")


@dataclass(frozen=True)
class Asking:
    """What is asked for each prompt.

    Attributes:
        n: answers.
        max_tokens: of each.
        temperature: 0 is the most probable token every time.
        top_p: among the smallest set that holds this probability.
        seed: for endpoints that have one; None sends none.
        scores: log-probabilities of the answer's tokens, and of so many others at each place; None asks for none.
        stop: strings before which an answer ends.
        ids: ask for tokens by their ids, as Epigone's server and vLLM can tell them.
    """

    n: int = 1
    max_tokens: int = 64
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    scores: int | None = None
    stop: tuple[str, ...] = ()
    ids: bool = False

    def __post_init__(self) -> None:
        check_sizes(self, n=1, max_tokens=1, temperature=0, seed=0, scores=0)


class Unanswerable(Exception):
    """The endpoint will never answer this question."""


class Client:
    """An endpoint, connected; used as an async context."""

    def __init__(self, endpoint: Endpoint, asking: Asking, transport: httpx.AsyncBaseTransport | None = None) -> None:
        self.endpoint, self.asking = endpoint, asking
        self.allowed, self.waits = endpoint.at_once, 0
        self.lost = (0, 0)
        self._under_way, self._since, self._not_before = 0, 0, 0.0
        self._free = asyncio.Condition()
        secret = os.environ.get(endpoint.key)
        headers = {"User-Agent": f"epigone/{__version__} (epigone collect)"}
        headers |= {"Authorization": f"Bearer {secret}"} if secret else {}
        limits = httpx.Limits(max_connections=endpoint.at_once, max_keepalive_connections=endpoint.at_once)
        self._http = httpx.AsyncClient(headers=headers, timeout=endpoint.seconds, limits=limits, transport=transport)

    async def __aenter__(self) -> "Client":
        await self._http.__aenter__()
        return self

    async def __aexit__(self, *error: Any) -> None:
        await self._http.__aexit__(*error)

    async def ask(self, prompts: Sequence[str]) -> list[Kept]:
        """Answers to prompts, in one question.

        Raises Unanswerable where it is refused for good, UserError where the key or model is, and Fault where the
        endpoint does not answer or wants us to wait for longer than its patience.
        """
        why = ""
        for attempt in range(self.endpoint.tries):
            async with _Turn(self):
                wait, found = await self._try(prompts, attempt)
            if found is not None:
                return found
            why = str(wait[1])
            if wait[0] > self.endpoint.patience:
                raise Fault(
                    f"{self.endpoint.url} asks to come back in {wait[0]:,.0f} s ({why}): give the command again then"
                )
            self.waits += 1
            await asyncio.sleep(wait[0])
        raise Fault(
            f"{self.endpoint.url} did not answer in {self.endpoint.tries} tries: {why}; what it did answer is kept"
        )

    async def _try(self, prompts: Sequence[str], attempt: int) -> tuple[tuple[float, str], list[Kept] | None]:
        """Ask once: answers, or seconds to wait and why."""
        path = "/chat/completions" if self.endpoint.chat else "/completions"
        backoff = min(LONGEST_WAIT, FIRST_WAIT * 2**attempt) * random.uniform(0.5, 1.0)
        try:
            answer = await self._http.post(self.endpoint.url.rstrip("/") + path, json=self._body(prompts))
        except httpx.RequestError as error:
            if not isinstance(error, httpx.ConnectError):
                self._lose(prompts)
            return (backoff, f"{type(error).__name__} {error}".strip()), None
        except httpx.InvalidURL as error:
            raise UserError(f"endpoint '{self.endpoint.url}': {error}") from None
        if answer.status_code == 200:
            try:
                found = _kept(prompts, answer.json(), self.most, self.asking.n)
            except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
                self._lose(prompts)
                return (backoff, f"an answer that cannot be read ({type(error).__name__}: {error})"), None
            await self._went_well()
            return (0.0, ""), found
        why = f"HTTP {answer.status_code}: {_sentence(answer)}"
        if answer.status_code in (408, 409, 425, 429) or answer.status_code >= 500:
            stated = _stated(answer.headers.get("Retry-After"))
            if answer.status_code in (429, 503):
                self._hold(backoff if stated is None else stated)
            return (max(backoff, stated or 0.0), why), None
        if answer.status_code in (400, 413, 422):
            raise Unanswerable(why)
        raise UserError(f"{self.endpoint.url} refuses us: {why}")

    def _body(self, prompts: Sequence[str]) -> dict[str, Any]:
        asking = self.asking
        body: dict[str, Any] = {"model": self.endpoint.model, "max_tokens": asking.max_tokens, "n": asking.n}
        body |= {"temperature": asking.temperature, "top_p": asking.top_p}
        body |= {} if asking.seed is None else {"seed": asking.seed}
        body |= {"stop": list(asking.stop)} if asking.stop else {}
        body |= {"return_tokens_as_token_ids": True} if asking.ids else {}
        if self.endpoint.chat:
            scores = {} if asking.scores is None else {"logprobs": True, "top_logprobs": asking.scores}
            return body | scores | {"messages": [{"role": "user", "content": prompts[0]}]}
        scores = {} if asking.scores is None else {"logprobs": asking.scores}
        return body | scores | {"prompt": list(prompts) if len(prompts) > 1 else prompts[0]}

    def most(self, prompt: str) -> tuple[int, int]:
        """Tokens that a prompt may have, with those of a chat's template, and that may be written for it, at most."""
        return most_tokens(self.endpoint, self.asking, prompt)

    def _lose(self, prompts: Sequence[str]) -> None:
        """What was asked and never read may have been paid."""
        read, written = map(sum, zip(*map(self.most, prompts), strict=True))
        self.lost = (self.lost[0] + read, self.lost[1] + written)

    def _hold(self, seconds: float) -> None:
        """It has too many: nobody asks for a while, and then fewer do at once."""
        self._not_before = max(self._not_before, time.monotonic() + seconds)
        self.allowed, self._since = max(1, self.allowed // 2), 0

    async def _went_well(self) -> None:
        """After as many good answers as may be under way, one more may be."""
        self._since += 1
        if self._since >= self.allowed < self.endpoint.at_once:
            self.allowed, self._since = self.allowed + 1, 0
            async with self._free:
                self._free.notify()


class _Turn:
    """A place among the questions that are under way, when there is one and it is time."""

    def __init__(self, client: Client) -> None:
        self._client = client

    async def __aenter__(self) -> None:
        client = self._client
        async with client._free:
            await client._free.wait_for(lambda: client._under_way < client.allowed)
            client._under_way += 1
        try:
            while (wait := client._not_before - time.monotonic()) > 0 and wait <= client.endpoint.patience:
                await asyncio.sleep(wait)
        except BaseException:
            await self.__aexit__()
            raise

    async def __aexit__(self, *error: Any) -> None:
        async with self._client._free:
            self._client._under_way -= 1
            self._client._free.notify()


def most_tokens(endpoint: Endpoint, asking: Asking, prompt: str) -> tuple[int, int]:
    """Tokens that a prompt may have, with those of a chat's template, and that may be written for it, at most."""
    return len(prompt.encode()) + (endpoint.template if endpoint.chat else 2), asking.n * asking.max_tokens


def _kept(
    prompts: Sequence[str], body: dict[str, Any], most_of: Callable[[str], tuple[int, int]], n: int
) -> list[Kept]:
    """What an endpoint answered. Raises one of many errors for what is no answer to these prompts.

    Where it does not tell what it counts, the most that it may have been counts: a budget is no guess.
    """
    choices = sorted(body["choices"], key=lambda choice: choice.get("index", 0))
    if len(choices) != len(prompts) * n:
        raise ValueError(f"{len(choices)} answers to {len(prompts)} prompts, n={n}")
    if len(choices) > 1 and [choice.get("index") for choice in choices] != list(range(len(choices))):
        raise ValueError("answers that are not numbered from 0, so that nobody knows to which prompt they are")
    answers = [_answer(choice) for choice in choices]
    most = [most_of(prompt) for prompt in prompts]
    usage = {"prompt_tokens": sum(m[0] for m in most), "completion_tokens": sum(m[1] for m in most)}
    usage |= {name: tokens for name, tokens in (body.get("usage") or {}).items() if tokens is not None}
    read, written = int(usage["prompt_tokens"]), int(usage["completion_tokens"])
    parts = len(prompts)
    return [
        Kept(prompt, answers[i * n : (i + 1) * n], None, _part(read, i, parts), _part(written, i, parts))
        for i, prompt in enumerate(prompts)
    ]


def _part(total: int, index: int, parts: int) -> int:
    """Of tokens that are told in one number for several prompts: parts whose sum it is."""
    return total * (index + 1) // parts - total * index // parts


def _answer(choice: dict[str, Any]) -> dict[str, Any]:
    text = choice["message"].get("content") or "" if "message" in choice else choice["text"]  # a filter leaves none
    text = text.encode(errors="replace").decode()  # halves of characters are no text
    found: dict[str, Any] = {"text": text, "why": choice.get("finish_reason")}
    scores = _scores(choice.get("logprobs"))
    return found if scores is None else found | {"scores": scores}


def _scores(given: Any) -> list[Any] | None:
    """[token, log-probability, [[token, log-probability], ...]] of each place, in either of the interface's shapes.

    A token is its id where the endpoint tells it, else its text, which may be that of others too.
    """
    if not given:
        return None
    if "tokens" not in given:
        given = {"content": given.get("content") or []}
    if given.get("content") is not None:
        return [[*_pair(one), [_pair(top) for top in one.get("top_logprobs") or ()]] for one in given["content"]]
    tops = given.get("top_logprobs") or [None] * len(given["tokens"])
    places = zip(given["tokens"], given["token_logprobs"], tops, strict=True)
    return [[_token(own), score, [[_token(t), s] for t, s in (top or {}).items()]] for own, score, top in places]


def _pair(given: dict[str, Any]) -> list[Any]:
    return [given.get("id", _token(given["token"])), given["logprob"]]


def _token(name: str) -> int | str:
    number = name.removeprefix("token_id:")
    return int(number) if number != name and number.isdecimal() else name


def _sentence(answer: httpx.Response) -> str:
    """What an endpoint says of its refusal."""
    try:
        return " ".join(str(answer.json()["error"]["message"]).split())[:300]
    except (ValueError, KeyError, TypeError):
        return " ".join(answer.text.split())[:300] or answer.reason_phrase


def _stated(given: str | None) -> float | None:
    """Seconds of a Retry-After, which may be a date."""
    if given is None:
        return None
    try:
        return max(0.0, float(given))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(given).timestamp() - time.time())
    except (TypeError, ValueError):
        return None
