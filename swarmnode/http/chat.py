"""From a conversation to a prompt: the model's own chat template, or a plain one."""

import datetime
import json
from collections.abc import Sequence
from typing import Any, NoReturn

import jinja2
from jinja2.exceptions import SecurityError
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from swarmnode.errors import DataError

MAX_PROMPT_CHARS = 4 << 20
PLAIN_STOP = "\nUser:"
"""Ends an answer under the plain template, where the model has no token for it."""
_ROLES = {"system": "System", "user": "User", "assistant": "Assistant"}


def render(template: str | None, messages: Sequence[dict[str, str]]) -> str:
    """The prompt of `messages` (role and content) that asks for the assistant's next words.

    Without a template: one line `Role: content` for each message, then `Assistant:`. A template
    runs in jinja2's sandbox: it can read its arguments and nothing else.
    Raises: DataError if the template does not take these messages.
    """
    if template is None:
        lines = [f"{_ROLES[message['role']]}: {message['content']}\n" for message in messages]
        return "".join(lines) + "Assistant:"
    pieces: list[str] = []
    num_chars = 0
    try:
        stream = _environment().from_string(template).generate(
            messages=list(messages), add_generation_prompt=True, bos_token="", eos_token="",
            tools=None, documents=None,
        )  # fmt: skip
        for piece in stream:
            num_chars += len(piece)
            if num_chars > MAX_PROMPT_CHARS:
                raise DataError(f"the chat template writes more than {MAX_PROMPT_CHARS} characters")
            pieces.append(piece)
    except (jinja2.TemplateError, TypeError, ValueError, KeyError, OverflowError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"the chat template does not take these messages: {reason}") from error
    return "".join(pieces)


class _Environment(ImmutableSandboxedEnvironment):
    """Also refuses products and powers that would fill the memory."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        small = all(isinstance(each, int | float) and abs(each) < 1e6 for each in (left, right))
        if not small or (operator == "**" and abs(right) > 8):
            raise SecurityError(f"{operator} of these values is not allowed")
        return super().call_binop(context, operator, left, right)


def _environment() -> _Environment:
    environment = _Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )

    def tojson(value: Any, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)

    def strftime_now(form: str) -> str:
        return datetime.datetime.now().astimezone().strftime(form)

    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    environment.filters["tojson"] = tojson
    environment.globals["strftime_now"] = strftime_now
    environment.globals["raise_exception"] = raise_exception
    return environment
