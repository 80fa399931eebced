"""The nursery: imports torch once, then forks a worker child whenever the daemon asks.

Its standard input is a socket to the daemon: each byte that comes, with one end of a socketpair,
asks for a child on that pipe; each record that goes says that a child began or how it ended. The
end of the socket ends the nursery, and with it every child.

A fork copies one thread only: so nothing here starts another one, or touches a GPU.
"""

import gc
import os
import select
import socket
import struct
import sys
from typing import NoReturn

from swarmnode.leash import die_with_parent
from swarmnode.pipes import FD_VARIABLE, PARENT_VARIABLE

RECORD = struct.Struct("<ii")
"""Process id, 0 for a fork that failed, and its exit status as `subprocess` tells it, or BORN."""
BORN = -(1 << 30)


def main() -> None:
    """Run until the daemon closes the socket."""
    daemon = socket.socket(fileno=os.dup(0))
    gc.disable()
    from swarmnode.worker.engine import engine  # noqa: F401 - children have it by the fork

    gc.freeze()
    gc.enable()
    poll, children = select.poll(), dict[int, int]()
    poll.register(daemon, select.POLLIN)
    while True:
        for fd, _ in poll.poll():
            if fd != daemon.fileno():
                poll.unregister(fd)
                os.close(fd)
                pid, status = os.waitpid(children.pop(fd), 0)
                daemon.send(RECORD.pack(pid, os.waitstatus_to_exitcode(status)))
                continue
            asked, fds, _, _ = socket.recv_fds(daemon, 1, 1)
            if not asked or not fds:
                return
            try:
                pid = _fork(fds[0], (daemon.fileno(), *children))
            except OSError as error:  # no memory, or too many processes
                print(f"cannot fork: {error}", file=sys.stderr)
                pid = 0
            os.close(fds[0])
            if pid:
                children[pidfd := os.pidfd_open(pid)] = pid
                poll.register(pidfd, select.POLLIN)
            daemon.send(RECORD.pack(pid, BORN))


def _fork(pipe_fd: int, foreign_fds: tuple[int, ...]) -> int:
    """A child at the other end of the pipe. Returns in the nursery only."""
    nursery_pid = os.getpid()
    pid = os.fork()
    if pid == 0:
        _be_child(pipe_fd, foreign_fds, nursery_pid)
    return pid


def _be_child(pipe_fd: int, foreign_fds: tuple[int, ...], nursery_pid: int) -> NoReturn:
    """What follows the fork; never returns into the nursery's loop."""
    status = 1
    try:
        die_with_parent(nursery_pid)
        for fd in foreign_fds:
            os.close(fd)
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        os.environ |= {FD_VARIABLE: str(pipe_fd), PARENT_VARIABLE: str(nursery_pid)}
        from swarmnode.worker.engine.__main__ import main as compute

        status = compute()
    except BaseException:  # as the interpreter would: print it, end with status 1
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    main()
