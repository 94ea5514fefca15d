"""The shapes of the OpenAI interface: what may be asked, and what is answered.

Fields that ask for something that is not there (penalties, tools, other formats) are taken at the value that asks for
nothing, and refused at any other, so that nobody believes to have got it.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from epigone.arena.answers import Place
from epigone.data.tokenizers import Tokenizer

ASKED = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
"""What is not described is refused, and nothing is taken for something else: true is no number."""

MOST_TEXTS = 128
"""Texts of one question: prompts times n."""

UNSHOWN = -9999.0
"""What stands for a score that is not shown where the interface wants a number."""


def _is_text(text: str) -> str:
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("half of a surrogate pair is no text")
    return text


def _are_numbers(given: Any) -> Any:
    """Stops at the first that is none, where a hundred thousand errors would be made."""
    if isinstance(given, list) and not all(type(one) is int for one in given):
        raise ValueError("token ids are whole numbers")
    return given


Words = Annotated[str, AfterValidator(_is_text)]
TokenIds = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1), BeforeValidator(_are_numbers)]
Stop = Annotated[Words, Field(min_length=1, max_length=200)]
Nothing = Annotated[float, Field(ge=0, le=0)] | None


class _Asked(BaseModel):
    """What both endpoints take."""

    model_config = ASKED

    model: Words
    temperature: float | None = Field(1.0, ge=0, le=2, description="0 takes the most probable token every time.")
    top_p: float | None = Field(1.0, gt=0, le=1)
    top_k: int | None = Field(0, ge=0, lt=2**31, description="Among so many of the best; 0 is off.")
    n: int | None = Field(1, ge=1, le=MOST_TEXTS)
    seed: int | None = Field(None, ge=0, lt=2**32, description="The same text for the same seed.")
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    stream: bool | None = False
    stream_options: "StreamOptions | None" = None
    user: Words | None = Field(None, max_length=1000)
    return_tokens_as_token_ids: bool | None = Field(
        False, description="Name tokens 'token_id:N', which tells apart those that look the same."
    )
    presence_penalty: Nothing = None
    frequency_penalty: Nothing = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: only where 'stream' is true")
        return self

    @property
    def stops(self) -> list[str]:
        """The strings before which a text is cut."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class StreamOptions(BaseModel):
    """How a stream is sent."""

    model_config = ASKED

    include_usage: bool | None = False


class CompletionRequest(_Asked):
    """`POST /v1/completions`."""

    prompt: (
        Words
        | Annotated[list[Words], Field(min_length=1, max_length=MOST_TEXTS)]
        | TokenIds
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MOST_TEXTS)]
    )
    max_tokens: int | None = Field(16, ge=0, lt=2**31, description="0 only with 'echo'.")
    logprobs: int | None = Field(None, ge=0, description="So many of the best scores of each place.")
    echo: bool | None = Field(False, description="Give back the prompt, and its scores with 'logprobs'.")
    suffix: Literal[""] | None = None
    best_of: int | None = Field(None, ge=1, le=MOST_TEXTS, description="Only as many as 'n'.")

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ValueError("best_of: must be as 'n', or left out; choosing is the client's")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens: 0 asks for nothing, unless 'echo' is true")
        return self

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts, each as text or as ids."""
        given: Any = self.prompt
        return [given] if isinstance(given, str) or isinstance(given[0], int) else given


class Part(BaseModel):
    """A part of a message."""

    model_config = ASKED

    type: Literal["text"]
    text: Words


class Message(BaseModel):
    """One message of a chat."""

    model_config = ASKED

    role: Literal["system", "developer", "user", "assistant"]
    content: Words | Annotated[list[Part], Field(min_length=1, max_length=256)]
    name: Words | None = Field(None, max_length=1000)

    @property
    def text(self) -> str:
        """What it says."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class TextFormat(BaseModel):
    """The only format of an answer."""

    model_config = ASKED

    type: Literal["text"]


class ChatRequest(_Asked):
    """`POST /v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1, max_length=256)
    max_tokens: int | None = Field(None, ge=1, lt=2**31)
    max_completion_tokens: int | None = Field(None, ge=1, lt=2**31)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(None, ge=0)
    response_format: TextFormat | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs: only where 'logprobs' is true")
        return self

    @property
    def best(self) -> int | None:
        """Scores that are wanted of each place; None for none at all."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def length(self) -> int | None:
        """Tokens of an answer at most."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class Usage(BaseModel):
    """Tokens of a question and its answers."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Scores(BaseModel):
    """Scores of a completion's tokens: natural-log probabilities at temperature 1, as the policy shows them."""

    tokens: list[str] = []
    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float]] | None = None
    text_offset: list[int] = []


class Choice(BaseModel):
    """One text of a completion."""

    index: int
    text: str
    logprobs: Scores | None = None
    finish_reason: Literal["stop", "length"] | None = None


class Completion(BaseModel):
    """An answer, or a piece of one."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage | None = None


class TopScore(BaseModel):
    """A token that might have stood there; `bytes` is null where it is a part of a character."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenScore(TopScore):
    """A token that stands there; its score is -9999 where it is not shown."""

    top_logprobs: list[TopScore]


class ChatScores(BaseModel):
    """Scores of an answer's tokens."""

    content: list[TokenScore]
    refusal: None = None


class Answer(BaseModel):
    """What the model says."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    """One answer of several."""

    index: int
    message: Answer
    logprobs: ChatScores | None = None
    finish_reason: Literal["stop", "length"]


class ChatCompletion(BaseModel):
    """Answers to a chat."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class Delta(BaseModel):
    """What an answer gained."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChunkChoice(BaseModel):
    """A piece of one answer."""

    index: int
    delta: Delta
    logprobs: ChatScores | None = None
    finish_reason: Literal["stop", "length"] | None = None


class ChatChunk(BaseModel):
    """A piece of a stream."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None


class Model(BaseModel):
    """A model that may be asked. Beyond the interface: tokens of text and answer, scores of a place at most."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "epigone"
    max_model_len: int
    max_logprobs: int


class Models(BaseModel):
    """All of them."""

    object: Literal["list"] = "list"
    data: list[Model]


class Wrong(BaseModel):
    """What is wrong with a question."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class Refusal(BaseModel):
    """The body of every answer that is none."""

    error: Wrong


class Naming:
    """How tokens are called: as they look, or by their ids."""

    def __init__(self, tokenizer: Tokenizer, by_id: bool) -> None:
        self._tokenizer, self._by_id = tokenizer, by_id

    def __call__(self, token: int) -> str:
        return f"token_id:{token}" if self._by_id else self._tokenizer.token(token)

    def bytes(self, token: int) -> list[int] | None:
        """The UTF-8 bytes of a token, if it is whole characters."""
        text = self._tokenizer.token(token)
        return None if "\ufffd" in text else list(text.encode())


def scores_of(places: list[Place], best: int, name: Naming) -> Scores:
    """Places as `Scores`."""
    return Scores(
        tokens=[name(place.token) for place in places],
        token_logprobs=[place.score for place in places],
        top_logprobs=[_by_name(place, name) for place in places] if best else None,
        text_offset=[place.offset for place in places],
    )


def _by_name(place: Place, name: Naming) -> dict[str, float]:
    """The best, and the token's own score where it is shown and not among them; of equal names the best one."""
    own = [] if place.score is None else [(place.token, place.score)]
    found: dict[str, float] = {}
    for token, score in (*place.best, *own):
        found.setdefault(name(token), score)
    return found


def chat_scores_of(places: list[Place], name: Naming) -> ChatScores:
    """Places as `ChatScores`."""
    content = [
        TokenScore(
            token=name(place.token),
            logprob=UNSHOWN if place.score is None else place.score,
            bytes=name.bytes(place.token),
            top_logprobs=[TopScore(token=name(t), logprob=score, bytes=name.bytes(t)) for t, score in place.best],
        )
        for place in places
    ]
    return ChatScores(content=content)
