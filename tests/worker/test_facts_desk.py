"""What was asked of a model once is not asked again: the child that knows takes seconds."""

import sys
from pathlib import Path

import pytest

from swarmnode.errors import ChildError
from swarmnode.worker.models.tool import FactsDesk
from tests.processes.conftest import TINY_LLAMA


async def test_a_question_is_asked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    desk = FactsDesk(tmp_path / "tool.log")
    facts = await desk.ask(TINY_LLAMA, 2)
    assert (facts.num_layers, facts.hidden_size) == (4, 64)
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    assert await desk.ask(dict(reversed(TINY_LLAMA.items())), 2) == facts
    with pytest.raises(ChildError):
        await desk.ask({**TINY_LLAMA, "hidden_size": 32}, 2)
    with pytest.raises(ChildError):
        await desk.ask(TINY_LLAMA, 2, ("lm_head.weight",))
