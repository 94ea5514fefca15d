"""The prompt box as its askers see it: with the official client, by hand, with bad intentions and in a crowd."""

import asyncio
import contextlib
import dataclasses
import json
import socket
import subprocess
import sys
import threading
import time

import httpx
import numpy as np
import openai
import pytest
import uvicorn
from decoder_variants import LLAMA, spread_params

from epigone.arena import server as server_module
from epigone.arena.accounts import Accounts, Bounds, Key, State
from epigone.arena.engine import Engine
from epigone.arena.policies import Best, Policy, shown_scores
from epigone.arena.server import Box, application
from epigone.data.tokenizers import Bytes
from epigone.errors import Fault
from epigone.sampling.decode import sample
from epigone.verbs import serve

BYTES = Bytes().build()
CONFIG = dataclasses.replace(LLAMA, vocab_size=BYTES.size, max_length=64)
PARAMS = spread_params(CONFIG)
POLICY = Policy(scores=(Best(5, own=True),))
BOUNDS = Bounds(body=200_000, seconds=60.0, patience=1.0, texts=8)


@contextlib.contextmanager
def listening(box):
    """The box on a free port, in a thread."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        config = uvicorn.Config(
            application(box), http=serve._patient_protocol(), log_config=None, log_level="error", access_log=False
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            while not server.started:
                time.sleep(0.01)
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="module")
def engine():
    with Engine(CONFIG, PARAMS, POLICY, best=5, slots=4, waiting=40) as engine:
        yield engine


@pytest.fixture(scope="module")
def accounts(tmp_path_factory):
    with Accounts(tmp_path_factory.mktemp("box") / "box.sqlite", serving=True) as accounts:
        yield accounts


@pytest.fixture(scope="module")
def secret(accounts):
    return accounts.add("alice", 10**6, 10**8)


@pytest.fixture(scope="module")
def box(engine, accounts):
    return Box("toy", BYTES, engine, CONFIG.max_length, 5, accounts, BOUNDS)


@pytest.fixture(scope="module")
def url(box):
    with listening(box) as url:
        yield url


@pytest.fixture
def client(url, secret):
    with openai.OpenAI(base_url=f"{url}/v1", api_key=secret, max_retries=0) as client:
        yield client


@pytest.fixture
def post(url, secret):
    """Send something to an endpoint, as it is."""

    def post(path, content, key=secret, **headers):
        content = json.dumps(content) if isinstance(content, dict | list) else content
        given = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"} | headers
        return httpx.post(f"{url}{path}", content=content, headers=given, timeout=60)

    return post


def alone(prompt, seed, number=0, length=12, **knobs):
    """What the sampler writes for a prompt by itself."""
    ids = BYTES.encode(prompt)
    tokens = sample(CONFIG, PARAMS, [ids], seed, samples=number + 1, length=length, slots=2, **knobs)[0][number].tokens
    ended = len(tokens) > 0 and tokens[-1] == BYTES.specials.eos
    return tokens[:-1] if ended else tokens, "stop" if ended else "length"


def continued(prompt, tokens):
    """The text that tokens add to a prompt."""
    return BYTES.decode([*BYTES.encode(prompt), *tokens])[len(prompt) :]


def test_the_official_client_gets_what_the_sampler_writes(client):
    prompts = ["the cat", "so"]
    answer = client.completions.create(model="toy", prompt=prompts, n=2, seed=3, max_tokens=12, temperature=0.8)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    read, written = 0, 0
    for choice in answer.choices:
        prompt = prompts[choice.index // 2]
        tokens, why = alone(prompt, 3, choice.index % 2, temperature=0.8)
        assert (choice.text, choice.finish_reason) == (continued(prompt, tokens), why)
        written += len(tokens)
    read = sum(map(len, prompts))
    assert answer.usage.model_dump(exclude_none=True) == {
        "prompt_tokens": read,
        "completion_tokens": written,
        "total_tokens": read + written,
    }
    assert [model.id for model in client.models.list()] == ["toy"]
    assert client.models.retrieve("toy").max_model_len == 64


def test_ids_are_a_prompt_too(client):
    ids = BYTES.encode("the cat").tolist()
    by_text, by_ids = (
        client.completions.create(model="toy", prompt=prompt, seed=3, max_tokens=12).choices[0].text
        for prompt in ("the cat", [ids])
    )
    assert by_ids == by_text
    assert by_ids == client.completions.create(model="toy", prompt=ids, seed=3, max_tokens=12).choices[0].text


def test_a_chat_is_answered_whole_and_in_pieces(client):
    asked = {"model": "toy", "messages": [{"role": "user", "content": "the cat"}], "seed": 5, "max_tokens": 12, "n": 2}
    whole = client.chat.completions.create(**asked)
    texts = [choice.message.content for choice in whole.choices]
    assert texts == [BYTES.decode(alone("the cat", 5, number)[0]) for number in range(2)]
    pieces, ends, usage = ["", ""], [None, None], None
    for chunk in client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            pieces[choice.index] += choice.delta.content
            assert ends[choice.index] is None
            ends[choice.index] = choice.finish_reason
    assert pieces == texts
    assert ends == [choice.finish_reason for choice in whole.choices]
    assert usage == whole.usage


def test_a_completion_in_pieces_is_the_whole_one_with_its_scores(client):
    asked = {"model": "toy", "prompt": "the cat", "seed": 5, "max_tokens": 20, "logprobs": 3, "echo": True, "n": 2}
    whole = client.completions.create(**asked)
    texts, scores = ["", ""], [[], []]
    for chunk in client.completions.create(**asked, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            found = choice.logprobs
            scores[choice.index] += zip(found.tokens, found.token_logprobs, found.text_offset, strict=True)
    for choice in whole.choices:
        assert texts[choice.index] == choice.text
        found = choice.logprobs
        names, numbers, offsets = zip(*scores[choice.index], strict=True)
        assert (list(names), list(offsets)) == (found.tokens, found.text_offset)
        assert numbers == pytest.approx(found.token_logprobs, abs=1e-5)


def test_scores_are_those_of_the_policy(client):
    asked = {"model": "toy", "prompt": "the cat", "seed": 5, "max_tokens": 9, "echo": True, "logprobs": 4}
    found = client.completions.create(**asked, extra_body={"return_tokens_as_token_ids": True}).choices[0].logprobs
    ids = np.array([int(name.removeprefix("token_id:")) for name in found.tokens], np.int32)
    assert ids[:7].tolist() == BYTES.encode("the cat").tolist()
    (seen,) = shown_scores(CONFIG, PARAMS, POLICY, [ids], 4)
    np.testing.assert_allclose(found.token_logprobs, seen.own[: len(ids)], atol=2e-4)
    for place, own, shown in zip(range(len(ids)), found.token_logprobs, found.top_logprobs, strict=True):
        wanted = {f"token_id:{i}": float(x) for i, x in zip(seen.ids[place], seen.log_probs[place], strict=True)}
        assert shown == pytest.approx(wanted | {found.tokens[place]: own}, abs=2e-4)
    chat = client.chat.completions.create(
        model="toy",
        messages=[{"role": "user", "content": "the cat"}],
        seed=5,
        max_tokens=9,
        logprobs=True,
        top_logprobs=2,
    )
    content = chat.choices[0].logprobs.content
    assert [one.logprob for one in content] == pytest.approx(found.token_logprobs[7:], abs=1e-6)
    assert all(len(one.top_logprobs) == 2 for one in content)


def test_a_text_that_is_there_is_scored_and_nothing_is_written(client):
    asked = {"model": "toy", "prompt": ["the cat", "a"], "max_tokens": 0, "echo": True, "logprobs": 0}
    answer = client.completions.create(**asked)
    documents = [BYTES.encode("the cat"), BYTES.encode("a")]
    for choice, document, seen in zip(
        answer.choices, documents, shown_scores(CONFIG, PARAMS, POLICY, documents, 0), strict=True
    ):
        np.testing.assert_allclose(choice.logprobs.token_logprobs, seen.own[: len(document)], atol=1e-5)
        assert choice.logprobs.text_offset == list(range(len(document)))
    assert [choice.text for choice in answer.choices] == ["the cat", "a"]
    assert answer.usage.completion_tokens == 0
    pieces = list(client.completions.create(**asked, stream=True))
    assert [piece.choices[0].finish_reason for piece in pieces] == ["length", "length"]


def test_a_text_stops_before_a_string(client):
    whole = client.completions.create(model="toy", prompt="so", seed=9, max_tokens=40).choices[0].text
    stop = whole[5:7]
    for stream in (False, True):
        asked = {"model": "toy", "prompt": "so", "seed": 9, "max_tokens": 40, "stop": ["never in it", stop]}
        answer = client.completions.create(**asked, stream=stream)
        choices = [choice for chunk in answer for choice in chunk.choices] if stream else answer.choices
        assert "".join(choice.text for choice in choices) == whole[: whole.index(stop)]
        assert choices[-1].finish_reason == "stop"


QUESTION = {"model": "toy", "prompt": "the cat", "max_tokens": 4}
CHAT = {"model": "toy", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
WRONG = [
    ({"model": "gpt-7"}, 404, "no model"),
    ({"prompt": "x" * 64}, 400, "64 tokens"),
    ({"max_tokens": 60}, 400, "63 at most"),
    ({"max_tokens": 0}, 400, "echo"),
    ({"max_tokens": -1}, 400, "max_tokens"),
    ({"max_tokens": 10**30}, 400, "max_tokens"),
    ({"max_tokens": 1.5}, 400, "max_tokens"),
    ({"max_tokens": True}, 400, "max_tokens"),
    ({"n": 9}, 400, "8 texts at most"),
    ({"n": 0}, 400, "n:"),
    ({"temperature": -0.1}, 400, "temperature"),
    ({"temperature": float("nan")}, 400, "temperature"),
    ({"temperature": 1e400}, 400, "temperature"),
    ({"top_p": 0}, 400, "top_p"),
    ({"seed": -1}, 400, "seed"),
    ({"seed": 2**32}, 400, "seed"),
    ({"logprobs": 6}, 400, "5 at most"),
    ({"stop": ""}, 400, "stop"),
    ({"stop": ["a"] * 5}, 400, "stop"),
    ({"prompt": []}, 400, "prompt"),
    ({"prompt": [[]]}, 400, "prompt"),
    ({"prompt": [260]}, 400, "token 260"),
    ({"prompt": [-1]}, 400, "prompt"),
    ({"prompt": ["a", 1]}, 400, "prompt"),
    ({"prompt": "\ud800"}, 400, "surrogate"),
    ({"prompt": None}, 400, "prompt"),
    ({"best_of": 3}, 400, "best_of"),
    ({"presence_penalty": 0.5}, 400, "presence_penalty"),
    ({"logit_bias": {"5": 100}}, 400, "logit_bias"),
    ({"stream_options": {"include_usage": True}}, 400, "stream"),
    ({"tempratur": 1}, 400, "tempratur"),
]


@pytest.mark.parametrize(("change", "status", "says"), WRONG)
def test_a_wrong_question_is_told_what_is_wrong(post, change, status, says):
    answer = post("/v1/completions", QUESTION | change)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert says in error["message"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "king", "content": "hi"}]}, "role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "content"),
        ({"top_logprobs": 2}, "logprobs"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
    ],
)
def test_a_wrong_chat_is_told_what_is_wrong(post, change, says):
    answer = post("/v1/chat/completions", CHAT | change)
    assert answer.status_code == 400
    assert says in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"{", 400),
        (b"", 400),
        (b"null", 400),
        (b"[1]", 400),
        (b'{"model": "toy", "prompt": "\xff\xfe"}', 400),
        (b"[" * 9000, 400),
        (b'{"model": "toy", "prompt": "' + b"x" * 300_000 + b'"}', 413),
    ],
)
def test_a_body_that_is_no_question_is_refused(post, content, status):
    answer = post("/v1/completions", content)
    assert answer.status_code == status
    assert answer.json()["error"]["message"]


def test_what_is_no_json_by_its_own_word_and_what_is_no_place_is_refused(post, url, secret):
    assert post("/v1/completions", QUESTION, **{"Content-Type": "text/plain"}).status_code == 415
    assert post("/v1/nothing", QUESTION).status_code == 404
    assert httpx.get(f"{url}/v1/completions").status_code == 405


def raw(url, content, wait=8.0):
    """Bytes to the server, and what it says until it closes."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=wait) as connection:
        connection.sendall(content)
        said = b""
        with contextlib.suppress(TimeoutError, ConnectionResetError):
            while chunk := connection.recv(65536):
                said += chunk
        return said


HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


def test_tricks_with_headers_and_slow_clients_are_refused(url, monkeypatch):
    monkeypatch.setattr(serve, "HEADER_SECONDS", 0.5)
    for trick in (
        HEAD + b"Content-Length: 5\r\nContent-Length: 50\r\nConnection: close\r\n\r\n{}",
        HEAD + b"Content-Length: -5\r\nConnection: close\r\n\r\n{}",
        HEAD + b"Transfer-Encoding: chunked, chunked\r\nConnection: close\r\n\r\n{}",
        HEAD + b"X: " + b"x" * 200_000 + b"\r\n\r\n",
        b"\x16\x03\x01\x02\x00",
    ):
        assert raw(url, trick).split(b" ")[1].startswith(b"4"), trick[:90]
    assert b" 413 " in raw(url, HEAD + b"Content-Length: 999999999\r\n\r\n" + b"x" * 300_000)
    assert b" 408 " in raw(url, HEAD + b"Content-Length: 50\r\n\r\n{")  # the rest never comes
    assert b" 408 " in raw(url, b"POST /v1/comp")
    assert httpx.get(f"{url}/health").json() == {"status": "ok"}


def test_who_may_not_ask_is_refused(post, accounts):
    assert post("/v1/completions", QUESTION, key="epigone-guess").status_code == 401
    assert post("/v1/completions", QUESTION, Authorization="Basic YTpi").status_code == 401
    assert post("/v1/completions", QUESTION, Authorization="Bearer é".encode()).status_code == 401
    mallory = accounts.add("mallory", 100, 10**6)
    assert post("/v1/completions", QUESTION, key=mallory).status_code == 200
    accounts.change("mallory", State.DEGRADED)
    assert post("/v1/completions", QUESTION, key=mallory).status_code == 200
    assert post("/v1/completions", QUESTION | {"logprobs": 1}, key=mallory).status_code == 403
    accounts.change("mallory", State.REFUSED)
    answer = post("/v1/completions", QUESTION, key=mallory)
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "key_refused")


def test_who_asks_too_often_or_too_much_is_told_when_to_come_back(post, accounts):
    hasty, poor = accounts.add("hasty", 3, 10**6), accounts.add("poor", 100, 30)
    answers = [post("/v1/completions", QUESTION, key=hasty) for _ in range(4)]
    assert [answer.status_code for answer in answers] == [200, 200, 200, 429]
    assert 1 <= int(answers[-1].headers["Retry-After"]) <= 60
    assert "a minute" in answers[-1].json()["error"]["message"]
    answers = [post("/v1/completions", QUESTION, key=poor) for _ in range(4)]
    assert [answer.status_code for answer in answers[:2]] == [200, 200]
    assert answers[-1].status_code == 429
    assert answers[-1].json()["error"]["code"] == "insufficient_quota"
    assert 1 <= int(answers[-1].headers["Retry-After"]) <= 86_400
    assert accounts.used("poor").tokens <= 30


def test_a_line_that_is_full_tells_when_to_come_back(post):
    fill = QUESTION | {"n": 8, "max_tokens": 50}
    found = []

    def ask(number):
        found.append(post("/v1/completions", fill | {"stream": number % 2 == 1}))

    many = [threading.Thread(target=ask, args=(number,)) for number in range(16)]
    for one in many:
        one.start()
    for one in many:
        one.join()
    statuses = [answer.status_code for answer in found]
    assert set(statuses) == {200, 429}
    for refused in (answer for answer in found if answer.status_code == 429):  # streams, too
        assert (refused.headers["Retry-After"], refused.json()["error"]["code"]) == ("1", "busy")


def ended(accounts, since, count):
    """How the last questions ended, when so many have."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        rows = accounts._base.execute("SELECT status FROM questions WHERE number > ?", (since,)).fetchall()
        if len(rows) == count and all(status is not None for (status,) in rows):
            return [status for (status,) in rows]
        time.sleep(0.02)
    raise AssertionError(rows)


def last(accounts):
    return accounts._base.execute("SELECT coalesce(max(number), 0) FROM questions").fetchone()[0]


def test_a_client_that_leaves_makes_room(url, secret, box, accounts):
    began, busy = last(accounts), threading.Event()
    held = box.engine._slots.grow

    def slowly(*given):
        busy.set()
        time.sleep(0.1)
        return held(*given)

    box.engine._slots.grow = slowly
    try:
        for stream in (False, True):
            busy.clear()
            asked = QUESTION | {"n": 8, "max_tokens": 50, "stream": stream}
            body = json.dumps(asked).encode()
            head = HEAD + f"Authorization: Bearer {secret}\r\nContent-Length: {len(body)}\r\n\r\n".encode()
            host, port = url.removeprefix("http://").split(":")
            with socket.create_connection((host, int(port))) as connection:
                connection.sendall(head + body)
                assert busy.wait(30)
            deadline = time.monotonic() + 5
            while box.engine.load != (0, 0) and time.monotonic() < deadline:
                time.sleep(0.02)
            assert box.engine.load == (0, 0)
    finally:
        box.engine._slots.grow = held
    assert ended(accounts, began, 2) == [499, 499]


def test_who_does_not_read_and_who_sends_a_second_head_slowly_is_left(box, secret, accounts, monkeypatch):
    monkeypatch.setattr(serve, "HEADER_SECONDS", 0.5)
    began = last(accounts)
    body = json.dumps(QUESTION | {"stream": True}).encode()
    head = HEAD + f"Authorization: Bearer {secret}\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with listening(box) as url:
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=20) as connection:
            connection.sendall(head + body)
            said = b""
            while b"[DONE]" not in said:
                said += connection.recv(65536)
            connection.settimeout(0.1)
            for byte in b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n" * 2:
                if b" 408 " in said:
                    break
                with contextlib.suppress(OSError):
                    connection.sendall(bytes([byte]))
                    said += connection.recv(65536)
        assert b" 408 " in said
    monkeypatch.setattr(server_module._Stream, "__call__", unread(server_module._Stream.__call__))
    with listening(dataclasses.replace(box, bounds=Bounds(seconds=0.5, patience=0.1))) as url:
        raw(url, head + body)
    assert ended(accounts, began, 2) == [200, 499]


def unread(call):
    """As if the client read nothing, so that nothing more can be sent."""

    async def stuck(self, scope, receive, send):
        async def send_nothing(message):
            await asyncio.sleep(60)

        await call(self, scope, receive, send_nothing)

    return stuck


def test_a_log_that_cannot_be_written_is_a_503(box, secret, post, monkeypatch):
    def full(*_):
        raise Fault("/secret/path: disk full")

    monkeypatch.setattr(Accounts, "note", full)
    answer = post("/v1/completions", QUESTION)
    assert answer.status_code == 503
    assert "secret" not in answer.text


def test_a_question_whose_time_is_over_says_so(box, secret):
    with listening(dataclasses.replace(box, bounds=Bounds(seconds=1e-6))) as url:
        answer = httpx.post(f"{url}/v1/completions", json=QUESTION, headers={"Authorization": f"Bearer {secret}"})
        assert answer.status_code == 503
        assert answer.headers["Retry-After"]
        asked = CHAT | {"stream": True}
        answer = httpx.post(f"{url}/v1/chat/completions", json=asked, headers={"Authorization": f"Bearer {secret}"})
        assert answer.status_code == 503
        assert "no time" in answer.json()["error"]["message"]


def test_a_text_that_has_stopped_makes_room_while_others_of_its_question_grow(client, box, monkeypatch):
    whole = client.completions.create(model="toy", prompt="so", seed=9, max_tokens=40, n=2)
    stop = whole.choices[0].text[3:5]
    assert stop not in whole.choices[1].text[:20]
    dropped, give_up = [], box.engine.give_up
    monkeypatch.setattr(box.engine, "give_up", lambda tickets: dropped.append(len(list(tickets))) or give_up(tickets))
    asked = {"model": "toy", "prompt": "so", "seed": 9, "max_tokens": 40, "n": 2, "stop": stop}
    assert client.completions.create(**asked).choices[0].text == whole.choices[0].text[:3]
    assert dropped[0] == 1


def test_a_prompt_that_is_read_is_paid_even_where_nobody_waits_for_the_rest(url, secret, accounts):
    began = last(accounts)
    asked = QUESTION | {"prompt": "x" * 40, "echo": True, "logprobs": 1, "max_tokens": 20, "stream": True}
    before = accounts.used("alice").tokens
    with httpx.stream("POST", f"{url}/v1/completions", json=asked, headers={"Authorization": f"Bearer {secret}"}) as s:
        next(s.iter_lines())
    ended(accounts, began, 1)
    assert accounts.used("alice").tokens - before >= 40


def test_ids_that_are_far_too_many_cost_no_time(post):
    began = time.monotonic()
    for prompt in ([100] * 40_000, [[100] * 300] * 100, [0.5] * 20_000):
        assert post("/v1/completions", QUESTION | {"prompt": prompt}).status_code in (400, 413)
    assert time.monotonic() - began < 5


def test_a_crowd_is_answered_each_once_and_as_if_it_were_alone(url, secret, accounts):
    began, count = last(accounts), 60

    async def crowd():
        limits = httpx.Limits(max_connections=30)
        async with httpx.AsyncClient(limits=limits, timeout=120, headers={"Authorization": f"Bearer {secret}"}) as many:

            async def one(number):
                asked = QUESTION | {"prompt": f"number {number}", "seed": number, "max_tokens": 3 + number % 7}
                return (await many.post(f"{url}/v1/completions", json=asked)).json()

            return await asyncio.gather(*map(one, range(count)))

    for number, answer in enumerate(asyncio.run(crowd())):
        tokens, _ = alone(f"number {number}", number, length=3 + number % 7)
        assert answer["choices"][0]["text"] == continued(f"number {number}", tokens), answer
    assert ended(accounts, began, count) == [200] * count


def test_a_policy_that_shows_nothing_and_an_open_box(box):
    anyone = Key("anyone", State.OPEN, 10**6, 10**9)
    with listening(dataclasses.replace(box, best=None, anyone=anyone)) as url:
        assert httpx.post(f"{url}/v1/completions", json=QUESTION, timeout=60).status_code == 200
        answer = httpx.post(f"{url}/v1/completions", json=QUESTION | {"logprobs": 0}, timeout=60)
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "scores_hidden")
        with openai.OpenAI(base_url=f"{url}/v1", api_key="whatever") as client:
            assert client.completions.create(**QUESTION).choices[0].text is not None


def test_metrics_count_what_was_asked_and_written(url, post, secret):
    def metrics():
        lines = httpx.get(f"{url}/metrics").text.splitlines()
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}

    before = metrics()
    post("/v1/completions", QUESTION)
    after = metrics()
    good = 'epigone_questions_total{path="/v1/completions",status="200"}'
    assert after[good] == before.get(good, 0) + 1
    read = 'epigone_tokens_total{what="read"}'
    assert after[read] == before.get(read, 0) + 7
    assert after["epigone_growing_texts"] == 0
    assert secret not in str(after)


def test_questions_that_are_made_up_from_the_description_are_answered_as_it_says(url, secret, tmp_path):
    """Questions that follow it and such that just do not: no 5xx, no other status or shape than it names, none without
    a key. What a description cannot say (a text has so many tokens) may refuse a question that follows it.
    """
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{url}/openapi.json", "--no-color"]
    command += ["-H", f"Authorization: Bearer {secret}", "--exclude-checks", "positive_data_acceptance"]
    command += ["--max-examples", "15", "--seed", "1", "--generation-database", "none"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    assert "Tested: 6" in done.stdout
