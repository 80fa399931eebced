"""Shows a job while it works: a live panel in a terminal, plain lines anywhere else."""

import time
from collections import deque
from types import TracebackType
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

from swarmnode.cli.show import job_line, job_panel
from swarmnode.http.api import JobView

LINE_S = 5.0
"""Without a terminal: seconds between two lines while nothing special happens."""
_NUM_NOTES = 8


class Display:
    """Notes of what happens now, and the newest view of a job."""

    def __init__(self, console: Console, title: str) -> None:
        self._console = console
        self._title = title
        self._notes: deque[str] = deque(maxlen=_NUM_NOTES)
        self._view: JobView | None = None
        self._line_at_s = 0.0
        self._started_s = time.monotonic()
        self._live: Live | None = None
        if console.is_terminal:
            self._live = Live(console=console, refresh_per_second=4, get_renderable=self._render)

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def note(self, text: str) -> None:
        """Say what happens now."""
        line = f"[{time.monotonic() - self._started_s:5.1f} s] {text}"
        if self._live is None:
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)
        else:
            self._notes.append(line)

    def show(self, view: JobView) -> None:
        """Show the job as it is now."""
        before, self._view = self._view, view
        if self._live is not None:
            return
        now_s = time.monotonic()
        turned = before is None or (before.phase, before.generation, before.recoveries) != (
            view.phase, view.generation, view.recoveries,
        )  # fmt: skip
        if turned or (now_s - self._line_at_s >= LINE_S and before != view):
            self._line_at_s = now_s
            self.note(job_line(view))

    def _render(self) -> Panel:
        parts = [job_panel(self._view)] if self._view is not None else []
        return Panel(Group(*parts, *(Text(line) for line in self._notes)), title=self._title)
