"""What the OpenAI-compatible API accepts: checked, bounded, nothing ignored that would matter."""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from swarmnode.http.failures import ApiError
from swarmnode.session_messages import (
    Sampling,
)

MAX_PROMPTS = 32
MAX_STOPS = 16
_SEED_MASK = (1 << 63) - 1
_NOTHING: tuple[Any, ...] = (None, False, 0, [], {}, "")
_UNSUPPORTED = [
    "tools",
    "functions",
    "logit_bias",
    "frequency_penalty",
    "presence_penalty",
    "suffix",
    "audio",
    "prediction",
    "web_search_options",
    "reasoning_effort",
    "min_p",
    "min_tokens",
    "ignore_eos",
    "use_beam_search",
    "prompt_logprobs",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
    "structured_outputs",
]
_NEUTRAL: Mapping[str, tuple[Any, ...]] = dict.fromkeys(_UNSUPPORTED, ()) | {
    "n": (1,),
    "best_of": (1,),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "repetition_penalty": (1,),
    "top_k": (-1,),
}
"""Parameters that would change the answer and are not supported, with their harmless values."""


class _Request(BaseModel):
    """Unknown fields (user, metadata, store, ...) are accepted: they do not change the answer."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class StreamOptions(_Request):
    include_usage: bool = False


Stops = Annotated[list[Annotated[str, Field(max_length=1024)]], Field(max_length=MAX_STOPS)]


class _Generation(_Request):
    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, ge=0, le=1)
    seed: int | None = None
    stop: str | Stops | None = None

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling(self, num_logprobs: int) -> Sampling:
        """OpenAI's defaults; without a seed a fresh one; top_p 0 means greedy."""
        top_p = 1.0 if self.top_p is None else self.top_p
        temperature = 1.0 if self.temperature is None or top_p == 0 else self.temperature
        seed = secrets.randbits(63) if self.seed is None else self.seed & _SEED_MASK
        if top_p == 0:
            return Sampling(0.0, 1.0, seed, num_logprobs)
        return Sampling(temperature, top_p, seed, num_logprobs)


TokenIds = Annotated[list[Annotated[int, Field(ge=0, lt=1 << 31)]], Field(min_length=1)]


class CompletionRequest(_Generation):
    """POST /v1/completions."""

    prompt: (
        str
        | TokenIds
        | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS)]
    )
    echo: bool | None = None
    logprobs: int | None = Field(default=None, ge=0, le=5)

    @property
    def prompts(self) -> list[str | list[int]]:
        """One text or list of token ids for each choice."""
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)


class Part(_Request):
    """A piece of a message; only text is supported."""

    type: Literal["text"]
    text: str


class ChatMessage(_Request):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part] | None = None

    def plain(self) -> dict[str, str]:
        """Role and content as chat templates know them."""
        content = self.content or ""
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatRequest(_Generation):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=1024)]
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


RequestT = TypeVar("RequestT", bound=_Generation)


def read(kind: type[RequestT], raw: object) -> RequestT:
    """Check a request. Raises: ApiError naming the parameter that is wrong or not supported."""
    if not isinstance(raw, dict):
        raise ApiError("the request must be a JSON object")
    for name, neutral in _NEUTRAL.items():
        if name in raw and raw[name] not in _NOTHING and raw[name] not in neutral:
            raise ApiError(
                f"{name} is not supported; leave it out",
                param=name,
                code="unsupported_parameter",
            )
    try:
        request = kind.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        param = str(first["loc"][0]) if first["loc"] else None
        where = ".".join(str(part) for part in first["loc"])
        raise ApiError(f"{where}: {first['msg']}", param=param, code="invalid_value") from None
    if isinstance(request, CompletionRequest) and request.echo and request.logprobs is not None:
        raise ApiError(
            "echo with logprobs is not supported: prompts are not scored",
            param="echo",
            code="unsupported_parameter",
        )
    if isinstance(request, ChatRequest) and request.top_logprobs and not request.logprobs:
        raise ApiError("top_logprobs needs logprobs = true", param="top_logprobs")
    return request


@dataclass(frozen=True)
class Want:
    """One generation, ready to run."""

    prompt: list[int]
    max_tokens: int
    sampling: Sampling
    stops: tuple[str, ...]


def fit(prompt: list[int], max_tokens: int | None, max_positions: int) -> int:
    """How many tokens may be made; all that fit unless `max_tokens` says how many.

    Raises: ApiError if the prompt is empty, or prompt and answer are longer than the context.
    """
    if not prompt:
        raise ApiError("the prompt is empty; give at least one token", param="prompt")
    room = max_positions - len(prompt)
    if room < 1 or (max_tokens or 0) > room:
        raise ApiError(
            f"the model's context is {max_positions} tokens, but {len(prompt)} in the prompt and "
            f"{max_tokens or 1} in the answer were asked for",
            param="messages",
            code="context_length_exceeded",
        )
    return max_tokens or room
