"""Whether the tokenizer of somebody else's job can be loaded: tried by a child, since the library
may end the whole process at one that is damaged on purpose."""

import asyncio
import tempfile
from pathlib import Path

from swarmnode.children import ChildPipe, python_module, spawn_child
from swarmnode.coordinator.submission import unpack_folder
from swarmnode.errors import ChildError, DataError
from swarmnode.tokenizer import load_tokenizer

TIMEOUT_S = 60.0


async def check_tokenizer(blob: bytes) -> None:
    """Raises: DataError if the tokenizer in `blob` is not one that can be loaded here."""
    try:
        child = spawn_child(python_module(__name__), name="tokenizer check")
        try:
            async with asyncio.timeout(TIMEOUT_S):
                await child.send(blob)
                reason = (await child.receive()).decode()
        finally:
            await child.stop()
    except (ChildError, TimeoutError) as error:
        raise DataError(f"a tokenizer that cannot be loaded: {error}") from None
    if reason:
        raise DataError(reason)


def main() -> None:
    """Load what comes over the pipe; answer what is wrong with it, if anything is."""
    pipe, reason = ChildPipe.inherit(), ""
    with tempfile.TemporaryDirectory() as folder:
        try:
            unpack_folder(bytes(pipe.receive()), Path(folder))
            load_tokenizer(Path(folder))
        except DataError as error:
            reason = str(error)
    pipe.send(reason.encode())


if __name__ == "__main__":
    main()
