"""The real OpenAI client against a real port."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import openai
import pytest
from fake_node import FakeNode

SCRIPT = "Ahoj sv\u011bte! \U0001f642 ok. "


@pytest.fixture
async def ai(address: str) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(
        base_url=f"{address}/v1", api_key="anything", max_retries=0, timeout=10
    ) as client:
        yield client


async def test_models_are_listed_and_found(ai: openai.AsyncOpenAI) -> None:
    assert [model.id async for model in ai.models.list()] == ["tiny"]
    assert (await ai.models.retrieve("tiny")).owned_by == "swarmnode"
    with pytest.raises(openai.NotFoundError) as caught:
        await ai.models.retrieve("gpt")
    assert caught.value.code == "model_not_found"


async def test_a_completion_has_text_usage_and_reason(
    ai: openai.AsyncOpenAI, node: FakeNode
) -> None:
    answer = await ai.completions.create(
        model="tiny", prompt="Hi", max_tokens=11, temperature=0, top_p=0.5, seed=7
    )
    (choice,) = answer.choices
    assert (choice.text, choice.finish_reason) == (SCRIPT.encode()[:11].decode(), "length")
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (2, 11)
    ((prompt, limit, sampling),) = node.prompts
    assert (prompt, limit) == (list(b"Hi"), 11)
    assert tuple(sampling) == (0.0, 0.5, 7, 0)


async def test_an_end_token_is_a_stop(ai: openai.AsyncOpenAI, node: FakeNode) -> None:
    node.end_after = 4
    answer = await ai.completions.create(model="tiny", prompt="Hi", max_tokens=50)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("Ahoj", "stop")


async def test_several_prompts_and_token_ids_and_echo(
    ai: openai.AsyncOpenAI, node: FakeNode
) -> None:
    answer = await ai.completions.create(
        model="tiny", prompt=["one ", "two "], max_tokens=4, echo=True
    )
    assert [choice.text for choice in answer.choices] == ["one Ahoj", "two Ahoj"]
    assert [choice.index for choice in answer.choices] == [0, 1]
    await ai.completions.create(model="tiny", prompt=[104, 105], max_tokens=1)
    assert node.prompts[-1][0] == [104, 105]


async def test_chat_speaks_through_the_plain_template_and_stops_at_the_next_user(
    ai: openai.AsyncOpenAI, node: FakeNode
) -> None:
    node.model_.script = b" Hello.\nUser: and more"
    answer = await ai.chat.completions.create(
        model="tiny",
        messages=[
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
        ],
        max_completion_tokens=100,
    )
    assert bytes(node.prompts[0][0]) == b"System: Be brief.\nUser: Hi\nAssistant:"
    (choice,) = answer.choices
    assert (choice.message.content, choice.message.role) == (" Hello.", "assistant")
    assert choice.finish_reason == "stop"


async def test_chat_uses_the_models_template(ai: openai.AsyncOpenAI, node: FakeNode) -> None:
    node.model_.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    await ai.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "Hi"}], max_tokens=2
    )
    assert bytes(node.prompts[0][0]) == b"[user]Hi"


async def test_a_streamed_chat_adds_up_in_whole_characters(ai: openai.AsyncOpenAI) -> None:
    num_tokens = len(SCRIPT.encode())
    stream = await ai.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "Hi"}],
        max_tokens=num_tokens,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    parts = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(parts) == SCRIPT
    assert all("\ufffd" not in part for part in parts)
    assert len(parts) > 10
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == num_tokens
    assert len({chunk.id for chunk in chunks}) == 1


async def test_a_streamed_completion_equals_the_whole_one(ai: openai.AsyncOpenAI) -> None:
    ask: dict[str, Any] = {"model": "tiny", "prompt": "Hi", "max_tokens": 20, "stop": "ok"}
    whole = await ai.completions.create(**ask)
    stream = await ai.completions.create(**ask, stream=True)
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason


@pytest.mark.parametrize("stream", [False, True])
async def test_a_stop_string_ends_the_text_and_frees_the_session(
    ai: openai.AsyncOpenAI, node: FakeNode, stream: bool
) -> None:
    ask: dict[str, Any] = {
        "model": "tiny", "prompt": "Hi", "max_tokens": 100, "stop": ["e! \U0001f642", "never"],
    }  # fmt: skip
    if stream:
        chunks = [chunk async for chunk in await ai.completions.create(**ask, stream=True)]
        text = "".join(chunk.choices[0].text for chunk in chunks)
        reason = chunks[-1].choices[0].finish_reason
    else:
        whole = await ai.completions.create(**ask)
        text, reason = whole.choices[0].text, whole.choices[0].finish_reason
        assert whole.usage is not None
        assert whole.usage.completion_tokens == len("Ahoj sv\u011bte! \U0001f642".encode())
    assert (text, reason) == ("Ahoj sv\u011bt", "stop")
    assert node.num_open == 0


async def test_logprobs_belong_to_the_text_that_is_shown(ai: openai.AsyncOpenAI) -> None:
    chat = await ai.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "Hi"}],
        max_tokens=50,
        logprobs=True,
        top_logprobs=2,
        stop=" sv",
    )
    shown = chat.choices[0].logprobs
    assert shown is not None
    assert shown.content is not None
    assert "".join(each.token for each in shown.content) == "Ahoj"
    assert shown.content[0].bytes == [ord("A")]
    assert [each.token for each in shown.content[0].top_logprobs] == ["A", "B"]
    stream = await ai.completions.create(
        model="tiny", prompt="Hi", max_tokens=9, logprobs=1, stream=True
    )
    offsets = []
    async for chunk in stream:
        logprobs = chunk.choices[0].logprobs
        assert logprobs is not None
        offsets += logprobs.text_offset or []
    assert offsets == [0, 1, 2, 3, 4, 5, 6, 7, 7]


@pytest.mark.parametrize(
    ("extra", "param"),
    [
        ({"n": 2}, "n"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"extra_body": {"top_k": 5}}, "top_k"),
    ],
)
async def test_what_is_not_supported_is_refused_by_name(
    ai: openai.AsyncOpenAI, node: FakeNode, extra: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await ai.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "Hi"}], **extra
        )
    assert (caught.value.code, caught.value.param) == ("unsupported_parameter", param)
    assert node.prompts == []


async def test_harmless_parameters_are_accepted(ai: openai.AsyncOpenAI) -> None:
    answer = await ai.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "Hi"}],
        max_tokens=1,
        n=1,
        user="me",
        metadata={"a": "b"},
        frequency_penalty=0,
        response_format={"type": "text"},
        tool_choice="none",
    )
    assert answer.choices[0].message.content == "A"


@pytest.mark.parametrize(
    ("ask", "code"),
    [
        ({"prompt": ""}, None),
        ({"prompt": "Hi", "temperature": 9}, "invalid_value"),
        ({"prompt": "Hi", "max_tokens": 0}, "invalid_value"),
        ({"prompt": "x" * 256}, "context_length_exceeded"),
        ({"prompt": "Hi", "max_tokens": 255}, "context_length_exceeded"),
        ({"prompt": "Hi", "echo": True, "logprobs": 1}, "unsupported_parameter"),
        ({"prompt": ["x"] * 33}, "invalid_value"),
    ],
)
async def test_impossible_values_are_refused(
    ai: openai.AsyncOpenAI, ask: dict[str, Any], code: str | None
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await ai.completions.create(model="tiny", **ask)
    assert caught.value.code == code
    assert isinstance(caught.value.body, dict)


async def test_an_unknown_model_and_broken_json_are_told(
    ai: openai.AsyncOpenAI, address: str
) -> None:
    with pytest.raises(openai.NotFoundError):
        await ai.completions.create(model="gpt", prompt="Hi")
    async with httpx.AsyncClient() as http:
        answer = await http.post(f"{address}/v1/completions", content=b"{")
        assert answer.status_code == 400
        assert (await http.post(f"{address}/v1/completions", json=[])).status_code == 400
        big = await http.post(f"{address}/v1/completions", content=b" " * ((8 << 20) + 1))
        assert big.status_code == 413


async def test_a_second_conversation_is_told_to_come_back(
    ai: openai.AsyncOpenAI, node: FakeNode
) -> None:
    node.pause_after = 3
    stream = await ai.completions.create(model="tiny", prompt="Hi", max_tokens=50, stream=True)
    assert (await anext(aiter(stream))).choices[0].text == "A"
    for streaming in (False, True):
        with pytest.raises(openai.RateLimitError) as caught:
            await ai.completions.create(model="tiny", prompt="Hi", stream=streaming)
        assert caught.value.response.headers["retry-after"] == "1"
    await stream.close()


async def test_a_client_that_leaves_closes_the_generator(
    ai: openai.AsyncOpenAI, node: FakeNode
) -> None:
    node.pause_after = 3
    stream = await ai.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "Hi"}], max_tokens=50, stream=True
    )
    await anext(aiter(stream))
    assert node.num_open == 1
    await stream.close()
    async with asyncio.timeout(5):
        await node.closed.wait()
    assert node.num_open == 0


async def test_a_client_that_gives_up_waiting_closes_the_generator(
    ai: openai.AsyncOpenAI, node: FakeNode
) -> None:
    node.pause_after = 3
    with pytest.raises(openai.APITimeoutError):
        await ai.with_options(timeout=0.3).completions.create(model="tiny", prompt="Hi")
    async with asyncio.timeout(5):
        await node.closed.wait()
    assert node.num_open == 0


@pytest.mark.parametrize("fail_after", [0, 6])
async def test_a_broken_route_is_an_error_not_a_short_answer(
    ai: openai.AsyncOpenAI, node: FakeNode, fail_after: int
) -> None:
    node.fail_after = fail_after
    with pytest.raises(openai.InternalServerError) as caught:
        await ai.completions.create(model="tiny", prompt="Hi", max_tokens=50)
    assert caught.value.status_code == 503
    assert caught.value.response.headers["x-should-retry"] == "false"
    got: list[str] = []

    async def stream() -> None:
        chunks = await ai.completions.create(model="tiny", prompt="Hi", max_tokens=50, stream=True)
        async for chunk in chunks:
            got.append(chunk.choices[0].text)  # noqa: PERF401  (an error must not lose them)

    with pytest.raises(openai.APIError, match="12D3KooWC") as midway:
        await stream()
    assert midway.value.code == "route_broken"
    assert "".join(got) == SCRIPT[:fail_after]
