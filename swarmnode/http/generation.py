"""One generation as text that is certain, and the forms in which OpenAI's API shows it."""

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any, Literal

from swarmnode.http.api import ModelView, NodeApi, Token
from swarmnode.http.requests import Want
from swarmnode.http.stream import closing
from swarmnode.http.text import REPLACEMENT, StopGate, TextDecoder

LOWEST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON cannot say."""
Finish = Literal["stop", "length"]


@dataclass(frozen=True)
class Shown:
    """A token and where its text begins in the answer."""

    token: Token
    offset: int


@dataclass(frozen=True)
class Piece:
    """The next part of an answer; the last one says why it ended and how many tokens it took."""

    text: str
    shown: tuple[Shown, ...]
    finish: Finish | None = None
    num_tokens: int = 0


async def pieces(api: NodeApi, model: ModelView, want: Want) -> AsyncGenerator[Piece, None]:
    """Generate, holding back what is not certain yet: part characters, part stop strings."""
    decoder, gate = TextDecoder(model.decode), StopGate(want.stops)
    waiting: list[Shown] = []
    num_tokens = num_decoded = num_given = 0
    async with closing(api.generate(model, want.prompt, want.max_tokens, want.sampling)) as tokens:
        async for token in tokens:
            waiting.append(Shown(token, num_decoded))
            num_tokens += 1
            text = decoder.push(token.token)
            num_decoded += len(text)
            free = gate.push(text)
            num_given += len(free)
            if gate.stopped:
                shown = tuple(each for each in waiting if each.offset < num_given)
                yield Piece(free, shown, "stop", num_tokens)
                return
            if free:
                shown = tuple(each for each in waiting if each.offset < num_given)
                waiting = waiting[len(shown) :]
                yield Piece(free, shown)
    tail = gate.push(decoder.finish())
    if not gate.stopped:
        tail += gate.finish()
    else:
        waiting = [each for each in waiting if each.offset < num_given + len(tail)]
    full = num_tokens >= want.max_tokens and not gate.stopped
    yield Piece(tail, tuple(waiting), "length" if full else "stop", num_tokens)


@dataclass(frozen=True)
class Reply:
    """How the answers of one request look: the envelope and the form of a choice."""

    model: ModelView
    kind: Literal["chat.completion", "text_completion"]
    id: str
    created: int
    with_logprobs: bool

    @property
    def is_chat(self) -> bool:
        return self.kind == "chat.completion"

    def envelope(self, choices: list[dict[str, Any]], *, chunk: bool = False) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": f"{self.kind}.chunk" if chunk and self.is_chat else self.kind,
            "created": self.created,
            "model": self.model.name,
            "choices": choices,
        }

    def choice(self, index: int, piece: Piece, *, chunk: bool = False) -> dict[str, Any]:
        """A whole choice, or with `chunk` the next part of it."""
        logprobs = self.logprobs(piece.shown) if self.with_logprobs else None
        body: dict[str, Any] = {"index": index}
        if not self.is_chat:
            body["text"] = piece.text
        elif chunk:
            body["delta"] = {"content": piece.text} if piece.text else {}
        else:
            body["message"] = {"role": "assistant", "content": piece.text, "refusal": None}
        return {**body, "logprobs": logprobs, "finish_reason": piece.finish}

    def logprobs(self, shown: tuple[Shown, ...]) -> dict[str, Any]:
        if self.is_chat:
            return {"content": [self._chat_logprob(each.token) for each in shown], "refusal": None}
        texts = [self.model.decode([each.token.token]) for each in shown]
        tops = [
            {self.model.decode([token]): _finite(value) for token, value in each.token.top}
            for each in shown
        ]
        return {
            "tokens": texts,
            "token_logprobs": [_finite(each.token.logprob) for each in shown],
            "top_logprobs": tops,
            "text_offset": [each.offset for each in shown],
        }

    def _chat_logprob(self, token: Token) -> dict[str, Any]:
        def entry(token_id: int, value: float) -> dict[str, Any]:
            text = self.model.decode([token_id])
            data = None if REPLACEMENT in text else list(text.encode())
            return {"token": text, "logprob": _finite(value), "bytes": data}

        top = [entry(token_id, value) for token_id, value in token.top]
        return {**entry(token.token, token.logprob), "top_logprobs": top}


def _finite(value: float) -> float:
    return max(value, LOWEST_LOGPROB)
