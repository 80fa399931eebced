"""numba's compiler behind a typed door: a function that it compiles keeps its signature."""

from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import numba

P = ParamSpec("P")
R = TypeVar("R")


def compiled(function: Callable[P, R]) -> Callable[P, R]:
    """Compile `function` at its first call; the machine code is kept on disk for later runs."""
    kernel: Any = numba.njit(cache=True, nogil=True)(function)
    return kernel  # type: ignore[no-any-return]


def inlined(function: Callable[P, R]) -> Callable[P, R]:
    """Compile `function` into each of its callers: for what is called at every move."""
    kernel: Any = numba.njit(cache=True, nogil=True, inline="always")(function)
    return kernel  # type: ignore[no-any-return]
