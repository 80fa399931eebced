"""The solver child: answers one request on its pipe and ends. Only here does a clock cut it."""

import contextlib
import os
import time
from pathlib import Path

from pydantic import ValidationError

from swarmnode.coordinator.objective import Effort
from swarmnode.coordinator.solver.live import answer, warm_up
from swarmnode.coordinator.solver.request import Answer, Refused
from swarmnode.coordinator.solving import ANSWERS, REQUESTS
from swarmnode.errors import ChildError, SwarmError
from swarmnode.pipes import ChildPipe

SEARCH_S = 4.0
"""Computing for one answer; the rest of the machine has work to do."""
NICENESS = 19


def main() -> None:
    """Answer one request."""
    _yield_to_all()
    pipe = ChildPipe.inherit()
    try:
        request = REQUESTS.validate_json(bytes(pipe.receive()))
    except ValidationError as error:
        raise ChildError(f"solver: a request that is none: {error}") from None
    warm_up()
    until_s = time.process_time() + SEARCH_S
    reply: Answer
    try:
        reply = answer(request, Effort(should_stop=lambda: time.process_time() > until_s))
    except SwarmError as error:
        reply = Refused(str(error))
    pipe.send(ANSWERS.dump_json(reply))
    pipe.close()


def _yield_to_all() -> None:
    """Niceness counts within a session where Linux groups tasks by sessions, as it does by default:
    so the solver has one of its own, which is nice to the others."""
    os.nice(NICENESS)
    with contextlib.suppress(OSError):
        os.setsid()
        Path("/proc/self/autogroup").write_text(str(NICENESS), encoding="ascii")


if __name__ == "__main__":
    main()
