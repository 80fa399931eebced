"""The world fixture of the transport's conformance suite."""

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager

import pytest
from transport_worlds import WORLDS, World


@pytest.fixture(params=sorted(WORLDS))
def enter_world(request: pytest.FixtureRequest) -> Callable[[], AbstractAsyncContextManager[World]]:
    """Each test enters its world itself, so that a world begins and ends in one task."""
    return WORLDS[request.param]
