"""Conversations on one node: one stage's part of a piece of text, with the session's KV cache.

Letters: B = 1 sequence, S new positions, D hidden width, V vocabulary. Hidden states travel
uncoded, so that greedy tokens are those of the whole model.
"""

from collections import deque
from typing import Any

import numpy as np
import torch
from torch import Tensor

from swarmnode.compression.codec import Payload, get_codec
from swarmnode.domain import SlotId
from swarmnode.errors import CodecError, DataError
from swarmnode.messages import (
    Message,
)
from swarmnode.session_messages import (
    SessionClose,
    SessionFailed,
    SessionFrame,
    SessionToken,
)
from swarmnode.worker.engine.ports import Send
from swarmnode.worker.engine.setup import Setup
from swarmnode.worker.serving.sampling import sample
from swarmnode.worker.serving.sessions import SessionKey, Sessions
from swarmnode.worker.training.state import StageState

MAX_WAITING = 64
MAX_WAITING_BYTES = 256 << 20
"""Most pieces that wait for their turn, and most bytes of more than one; more are refused."""


class Conversations:
    """All sessions of one generation on one node. A unit of work is one piece at one stage."""

    def __init__(self, setup: Setup, send: Send) -> None:
        self._setup = setup
        self._send = send
        self._codec = get_codec("none")
        self._sessions: Sessions[Any] = Sessions()
        self._waiting: deque[tuple[SessionFrame | SessionClose, Payload]] = deque()

    def take(self, message: SessionFrame | SessionClose, payload: Payload) -> None:
        """Put a piece, or the end of a session, behind what waits already.

        The end of a session of which nothing waits comes at once; a second one is left out.
        """
        if isinstance(message, SessionClose):
            key = (message.session, message.target)
            waiting = [each for each, _ in self._waiting if (each.session, each.target) == key]
            if not waiting:
                self._close(message)
            elif not isinstance(waiting[-1], SessionClose):
                self._waiting.append((message, payload))
            return
        num_bytes = sum(len(waiting) for _, waiting in self._waiting)
        is_too_long = num_bytes > 0 and num_bytes + len(payload) > MAX_WAITING_BYTES
        if len(self._waiting) >= MAX_WAITING or is_too_long:
            self._fail(message, f"{len(self._waiting)} pieces wait already; try again later")
            return
        self._waiting.append((message, payload))

    def work(self) -> bool:
        """Do one unit, if there is one."""
        if not self._waiting:
            return False
        message, payload = self._waiting.popleft()
        if isinstance(message, SessionClose):
            self._close(message)
            return True
        try:
            self._run(message, payload)
        except (CodecError, DataError) as error:
            self._sessions.close(message.session, message.target.stage)
            self._fail(message, str(error))
        return True

    def _run(self, frame: SessionFrame, payload: Payload) -> None:
        setup, stage = self._setup, frame.target.stage
        state = setup.stages[stage]
        key = SessionKey(frame.session, stage)
        refusal = self._sessions.refusal(key, frame.start)
        if refusal is not None:
            reason = "has no cache here" if refusal == "gone" else "does not go on there"
            self._fail(frame, f"session {reason}: stage {stage} at position {frame.start}")
            return
        inputs = self._inputs(frame, payload, state)
        held = self._sessions.get(key) or self._sessions.add(key, state.module.new_cache())
        is_last = setup.is_last(frame.target)
        with torch.no_grad():
            output = state.module(inputs, cache=held.cache, num_logits=1 if is_last else 0)
        held.num_positions = frame.stop
        if is_last:
            self._answer(frame, output[0, -1])
        else:
            self._pass_on(frame, output.float())

    def _inputs(self, frame: SessionFrame, payload: Payload, state: StageState) -> Tensor:
        """The piece as tensor, after checking that it is what it says. Raises: DataError."""
        num_positions, num_bytes = frame.stop - frame.start, memoryview(payload).nbytes
        if num_positions < 1 or frame.stop > min(frame.max_positions, state.module.max_positions):
            raise DataError(f"positions up to {frame.stop} do not fit")
        if state.module.is_first:
            if frame.shape != (1, num_positions) or num_bytes != 8 * num_positions:
                raise DataError(f"a piece of {num_positions} tokens has another size")
            tokens = np.frombuffer(payload, dtype="<i8").astype(np.int64)
            if int(tokens.min()) < 0 or int(tokens.max()) >= state.module.vocab_size:
                raise DataError("a token is outside the vocabulary")
            return torch.from_numpy(tokens)[None].to(self._setup.device)
        if frame.shape != (1, num_positions, state.module.hidden_size):
            raise DataError(f"a piece of {num_positions} hidden states has another shape")
        hidden_BSD = self._codec.decode(payload, frame.shape, device=self._setup.device)
        return hidden_BSD.to(next(state.module.parameters()).dtype)

    def _answer(self, frame: SessionFrame, logits_V: Tensor) -> None:
        token, logprob, top = sample(logits_V, frame.sampling, frame.stop)
        answer = SessionToken(
            frame.job, frame.generation, frame.session, frame.stop, token, logprob, top
        )
        self._send(answer, b"")

    def _pass_on(self, frame: SessionFrame, hidden_BSD: Tensor) -> None:
        target = SlotId(frame.target.stage + 1, frame.target.slot)
        following = SessionFrame(
            frame.job, frame.generation, frame.session, target, frame.start, frame.stop,
            tuple(hidden_BSD.shape), frame.sampling, frame.max_positions,
        )  # fmt: skip
        self._route(following, self._codec.encode(hidden_BSD))

    def _close(self, message: SessionClose) -> None:
        self._sessions.close(message.session, message.target.stage)
        if not self._setup.is_last(message.target):
            target = SlotId(message.target.stage + 1, message.target.slot)
            following = SessionClose(message.job, message.generation, message.session, target)
            self._route(following, b"")

    def _route(self, message: SessionFrame | SessionClose, payload: Payload) -> None:
        if self._setup.is_hosted(message.target):
            self.take(message, payload)
        else:
            self._send(message, payload)

    def _fail(self, frame: SessionFrame, reason: str) -> None:
        answer: Message = SessionFailed(frame.job, frame.generation, frame.session, reason)
        self._send(answer, b"")
