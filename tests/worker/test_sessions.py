"""Conversations: tokens as the whole model generates them, bounded caches, honest refusals."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from engine_swarm import LLAMA, TIED, Swarm, make_manifest

from swarmnode.domain import Generation, PeerId, SlotId
from swarmnode.manifest import Manifest
from swarmnode.messages import (
    Failed,
)
from swarmnode.session_messages import (
    Sampling,
    SessionClose,
    SessionFailed,
    SessionFrame,
    SessionToken,
)
from swarmnode.worker.engine.conversations import MAX_WAITING_BYTES
from swarmnode.worker.models import initialize, read_config
from swarmnode.worker.serving.sampling import sample
from swarmnode.worker.serving.sessions import SessionKey, Sessions

PROMPT = [3, 17, 42, 9, 5]
LAYERS = ((0, 1), (1, 3), (3, 4))
ACROSS = [["a"], ["b"], ["c"]]


class Chat:
    """A head that feeds tokens into stage 0 and reads what the last stage answers."""

    def __init__(self, swarm: Swarm, session: str = "s", sampling: Sampling | None = None) -> None:
        self.swarm, self.session, self.sampling = swarm, session, sampling or Sampling()
        self.length = 0

    def say(self, tokens: list[int], start: int | None = None, **changes: Any) -> None:
        at = self.length if start is None else start
        fields: dict[str, Any] = {
            "job": self.swarm.manifest.job,
            "generation": Generation(self.swarm.generation),
            "session": self.session,
            "target": SlotId(0, 0),
            "start": at,
            "stop": at + len(tokens),
            "shape": (1, len(tokens)),
            "sampling": self.sampling,
            "max_positions": 64,
        }
        frame = SessionFrame(**{**fields, **changes})
        payload = np.array(tokens, dtype="<i8").tobytes()
        self.swarm.tell(self.swarm.plan.host(SlotId(0, 0)), frame, payload)
        self.swarm.pump()
        self.length = frame.stop

    def answer(self, tokens: list[int]) -> SessionToken:
        self.say(tokens)
        (token,) = self.swarm.take(SessionToken)
        assert isinstance(token, SessionToken)
        assert (token.session, token.position) == (self.session, self.length)
        return token

    def generate(self, prompt: list[int], count: int) -> list[int]:
        tokens = [self.answer(prompt).token]
        while len(tokens) < count:
            tokens.append(self.answer(tokens[-1:]).token)
        return tokens

    def reason(self) -> str:
        (failed,) = self.swarm.take(SessionFailed)
        assert failed.session == self.session
        assert self.swarm.take(SessionToken) == []
        return str(failed.reason)


def swarm_of(
    blobs: Path,
    slots: list[list[str]],
    config: dict[str, Any] = LLAMA,
    kind: str = "serve",
    compute: str = "float32",
) -> Swarm:
    config = {**config, "initializer_range": 0.3}
    manifest = make_manifest(blobs, config, stages=3, slots=1, compute=compute)
    manifest = Manifest.model_validate({**manifest.model_dump(), "kind": kind})
    swarm = Swarm(manifest, slots, blobs, LAYERS)
    swarm.configure()
    return swarm


def whole_model(
    manifest: Manifest, dtype: torch.dtype = torch.float32
) -> transformers.PreTrainedModel:
    config = read_config(manifest.model.config)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    initialize(model, manifest.run.seed)
    return model.eval()


@pytest.mark.parametrize("slots", [ACROSS, [["a"], ["b"], ["a"]], [["a"], ["a"], ["a"]]])
@pytest.mark.parametrize("config", [LLAMA, TIED], ids=["untied", "tied"])
def test_greedy_tokens_equal_generate(
    slots: list[list[str]], config: dict[str, Any], tmp_path: Path
) -> None:
    swarm = swarm_of(tmp_path, slots, config)
    model = whole_model(swarm.manifest)
    prompt = torch.tensor([PROMPT])
    with torch.no_grad():
        whole = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=30,
            min_new_tokens=30, do_sample=False, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
    expected = whole[0, len(PROMPT) :].tolist()
    assert len(set(expected)) > 5, "a constant answer would prove little"
    assert Chat(swarm).generate(PROMPT, 30) == expected


def test_a_model_that_is_served_in_bfloat16_is_held_in_bfloat16(tmp_path: Path) -> None:
    swarm = swarm_of(tmp_path, ACROSS, compute="bfloat16")
    token = Chat(swarm, sampling=Sampling(num_logprobs=1)).answer(PROMPT)
    with torch.no_grad():
        model = whole_model(swarm.manifest, torch.bfloat16)
        logits = model(torch.tensor([PROMPT]), logits_to_keep=1).logits[0, -1].float()
    assert token.token == int(logits.argmax())
    assert token.logprob == pytest.approx(float(torch.log_softmax(logits, -1).max()), abs=1e-6)
    assert {p.dtype for p in swarm.weights().values()} == {torch.bfloat16}


def test_logprobs_are_those_of_the_whole_model(tmp_path: Path) -> None:
    swarm = swarm_of(tmp_path, ACROSS)
    token = Chat(swarm, sampling=Sampling(num_logprobs=3)).answer(PROMPT)
    with torch.no_grad():
        logits = whole_model(swarm.manifest)(torch.tensor([PROMPT])).logits[0, -1]
    values, tokens = torch.log_softmax(logits, -1).topk(3)
    assert [t for t, _ in token.top] == tokens.tolist()
    assert [v for _, v in token.top] == pytest.approx(values.tolist(), abs=1e-5)
    assert token.logprob == token.top[0][1]


def test_sampling_repeats_with_its_seed_and_only_with_it(tmp_path: Path) -> None:
    swarm = swarm_of(tmp_path, ACROSS)
    drawn = [
        Chat(swarm, name, Sampling(temperature=1.0, top_p=0.95, seed=seed)).generate(PROMPT, 12)
        for name, seed in (("x", 1), ("y", 1), ("z", 2))
    ]
    assert drawn[0] == drawn[1]
    assert drawn[0] != drawn[2]


def test_conversations_go_on_while_the_job_trains(tmp_path: Path) -> None:
    swarm = swarm_of(tmp_path, ACROSS, kind="train")
    quiet = Swarm(swarm.manifest, ACROSS, tmp_path, LAYERS)
    quiet.configure()
    expected = Chat(quiet).generate(PROMPT, 6)
    chat = Chat(swarm)
    swarm.begin(0)
    swarm.pump(max_units=2)
    assert chat.generate(PROMPT, 6) == expected
    assert swarm.commit(0).hashes == quiet.step(0).hashes


def test_the_oldest_idle_session_gives_way(tmp_path: Path) -> None:
    swarm = swarm_of(tmp_path, ACROSS)
    chats = [Chat(swarm, f"s{number}") for number in range(5)]
    for chat in chats[:4]:
        chat.answer(PROMPT)
    chats[0].answer([1])
    chats[4].answer(PROMPT)
    for chat in (chats[0], chats[4]):
        chat.answer([2])
    chats[1].say([2])
    assert "no cache" in chats[1].reason()


def test_a_closed_session_is_gone_on_every_stage(tmp_path: Path) -> None:
    swarm = swarm_of(tmp_path, ACROSS)
    chat = Chat(swarm)
    chat.answer(PROMPT)
    close = SessionClose(swarm.manifest.job, Generation(1), "s", SlotId(0, 0))
    swarm.tell(PeerId("a"), close)
    swarm.pump()
    held = [e._conversations for e in swarm.engines.values()]
    assert [len(c._sessions) for c in held if c is not None] == [0, 0, 0]
    chat.say([1])
    assert "no cache" in chat.reason()
    chat.length = 0
    assert chat.answer(PROMPT)


def test_a_new_generation_forgets_the_sessions(tmp_path: Path) -> None:
    swarm = swarm_of(tmp_path, ACROSS)
    chat = Chat(swarm)
    chat.answer(PROMPT)
    swarm.configure(0, "keep")
    chat.say([1])
    assert "no cache" in chat.reason()


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"start": 3, "stop": 4}, "does not go on there"),
        ({"stop": 7}, "another size"),
        ({"shape": (1, 2)}, "another size"),
        ({"stop": 5}, "do not fit"),
        ({"max_positions": 5}, "do not fit"),
    ],
)
def test_a_piece_that_does_not_fit_is_refused(
    changes: dict[str, Any], word: str, tmp_path: Path
) -> None:
    swarm = swarm_of(tmp_path, ACROSS)
    chat = Chat(swarm)
    chat.answer(PROMPT)
    chat.say([1], **changes)
    assert word in chat.reason()
    assert swarm.take(Failed) == []


@pytest.mark.parametrize("token", [-1, 61, 1 << 40])
def test_a_token_outside_the_vocabulary_is_refused(token: int, tmp_path: Path) -> None:
    swarm = swarm_of(tmp_path, ACROSS)
    chat = Chat(swarm)
    chat.say([token])
    assert "vocabulary" in chat.reason()


def test_sampling_keeps_to_the_nucleus_and_to_its_odds() -> None:
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))
    drawn = [
        sample(logits, Sampling(temperature=1.0, top_p=0.75, seed=7), position).token
        for position in range(800)
    ]
    assert set(drawn) == {0, 1}
    assert drawn.count(0) / 800 == pytest.approx(0.5 / 0.8, abs=0.06)
    assert {sample(logits, Sampling(temperature=9.0, top_p=0.0), p).token for p in range(50)} == {0}
    assert sample(logits, Sampling(), 3).token == 0
    assert sample(logits, Sampling(), 3).logprob == pytest.approx(np.log(0.5))


def test_sessions_are_bounded_by_conversation_not_by_stage() -> None:
    sessions: Sessions[str] = Sessions(max_sessions=2)
    for name in ("x", "y"):
        for stage in (0, 1):
            sessions.add(SessionKey(name, stage), name)
    assert len(sessions) == 2
    assert sessions.get(SessionKey("x", 0)) is not None
    sessions.add(SessionKey("z", 0), "z")
    assert sessions.refusal(SessionKey("y", 1), 4) == "gone"
    assert sessions.refusal(SessionKey("x", 1), 0) is None
    sessions.close("x", 0)
    assert sessions.refusal(SessionKey("x", 0), 3) == "gone"
    assert len(sessions) == 2
    sessions.close("x", 1)
    assert len(sessions) == 1


def test_what_waits_of_conversations_is_bounded(tmp_path: Path) -> None:
    """A peer of the plan sends pieces and ends faster than a piece is computed."""
    swarm = swarm_of(tmp_path, ACROSS)
    job, generation, target = swarm.manifest.job, Generation(swarm.generation), SlotId(1, 0)
    large = bytes(MAX_WAITING_BYTES // 2)
    piece = SessionFrame(job, generation, "s", target, 0, 1, (1, 1, 32), Sampling(), 64)
    for _ in range(4):
        swarm.engines[PeerId("b")].handle(piece, large)
    for number in range(1000):
        session = "s" if number % 2 else f"s{number}"
        swarm.engines[PeerId("b")].handle(SessionClose(job, generation, session, target))
    conversations = swarm.engines[PeerId("b")]._conversations
    assert conversations is not None
    assert len(conversations._waiting) <= 3
    swarm.pump()
    reasons = [failed.reason for failed in swarm.take(SessionFailed)]
    assert sum("wait already" in reason for reason in reasons) == 2
