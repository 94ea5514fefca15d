"""Endpoints that answer as they are told to, without a network."""

import asyncio
import json
import random

import httpx


class Stub(httpx.AsyncBaseTransport):
    """Answers every prompt with itself, reversed, after a while; and as `script` says where that gives something.

    Attributes:
        asked: the prompts of all questions that came, in their order.
        most: questions that were under way at once, at most.
    """

    def __init__(self, seconds=0.0, script=lambda number, body: None, shape="legacy"):
        self.seconds, self.script, self.shape = seconds, script, shape
        self.asked, self.headers, self.under_way, self.most = [], [], 0, 0

    async def handle_async_request(self, request):
        body = json.loads(await request.aread())
        self.headers.append(request.headers)
        prompts = [body["messages"][0]["content"]] if "messages" in body else body["prompt"]
        prompts = [prompts] if isinstance(prompts, str) else prompts
        number = len(self.asked)
        self.asked.append(prompts)
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        try:
            await asyncio.sleep(self.seconds * random.uniform(0.5, 1.5))
            told = self.script(number, body)
            if isinstance(told, Exception):
                raise told
            return told or httpx.Response(200, json=self.answer(body, prompts))
        finally:
            self.under_way -= 1

    def answer(self, body, prompts):
        n, chat = body["n"], "messages" in body
        choices = []
        for index in range(len(prompts) * n):
            text = prompts[index // n][::-1]
            content = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
            scores = {"logprobs": self.scores(text)} if body.get("logprobs") not in (None, False) else {}
            choices.append({"index": index, "finish_reason": "stop"} | content | scores)
        random.shuffle(choices)  # by their index they are in order
        read, written = sum(map(len, prompts)), sum(len(prompt) * n for prompt in prompts)
        return {"choices": choices, "usage": {"prompt_tokens": read, "completion_tokens": written}}

    def scores(self, text):
        if self.shape == "legacy":
            tops = [{letter: -0.5, "x": -1.0} for letter in text]
            return {"tokens": list(text), "token_logprobs": [-0.5] * len(text), "top_logprobs": tops, "text_offset": []}
        top = [{"token": "x", "logprob": -1.0, "bytes": None}]
        return {"content": [{"token": t, "logprob": -0.5, "bytes": None, "top_logprobs": top} for t in text]}


def refusal(status, message="no", **headers):
    return httpx.Response(status, json={"error": {"message": message}}, headers=headers)
