"""Runs a program that the kernel kills when its parent dies: `leash.py PARENT_PID PROGRAM ARG...`.

A file of its own, run with `python -I -S`: it replaces itself by the program (same pid), so the
parent needs no code of its own between fork and exec, which is unsafe in a threaded process.
Where prctl is missing the program has to notice the end of its pipe instead.
"""

import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent_pid: int) -> None:
    """Ask the kernel to kill this process, and what it execs, with the thread that started it.

    Exits at once if the parent is dead already: then no signal would ever come.
    """
    if sys.platform == "linux":
        import ctypes

        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent_pid:
        os._exit(1)


def main() -> None:
    die_with_parent(int(sys.argv[1]))
    try:
        os.execvp(sys.argv[2], sys.argv[2:])  # noqa: S606 - no shell is the point
    except OSError as error:
        sys.exit(f"cannot run {sys.argv[2]}: {error.strerror}")


if __name__ == "__main__":
    main()
