"""What can be made again and is kept meanwhile: the folder for it, and the kernels of GPUs that are not there."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

MOST_KERNEL_BYTES = 32 << 20  # XLA reads and writes all of them with each program


def user_folder() -> Path:
    """Where this user's programs keep such things: of $XDG_CACHE_HOME, or of ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "stepbill"


def folder() -> Path:
    """Where bills and kernels are kept: $STEPBILL_CACHE, or else the user's folder."""
    chosen = os.environ.get("STEPBILL_CACHE")
    return Path(chosen).expanduser() if chosen else user_folder()


def write_whole(path: Path, data: str | bytes) -> None:
    """The file has all of the data, or stays as it was, whenever the program ends. Its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")  # of this process: another may write the same file
    with beside.open("wb") as file:
        file.write(data.encode() if isinstance(data, str) else data)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


@contextmanager
def kernels(name: str) -> Iterator[Path]:
    """A file for one compilation, in which XLA finds the kernels that it has made under this name and puts new ones.

    Programs of one model have most kernels in common, and to make them is most of a GPU compiler's work, which nothing
    in the bill depends on. XLA's own writing is not made for two processes: each works on a copy, which takes the place
    of what is kept as a whole; what two make at the same moment is kept of one. Where nothing can be kept, nothing is.
    """
    path = folder() / f"kernels-{name}.pb"
    before = b""
    with suppress(OSError):
        if path.stat().st_size <= MOST_KERNEL_BYTES:
            before = path.read_bytes()
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / "kernels.pb"
        if before:
            copy.write_bytes(before)
        yield copy
        with suppress(OSError):
            if (after := copy.read_bytes()) != before:
                write_whole(path, after)
