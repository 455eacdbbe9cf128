"""What can be made again and is kept meanwhile: the folder for it, and the kernels of GPUs that are not there."""

import os
import shutil
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


@contextmanager
def kernels(name: str) -> Iterator[Path]:
    """A file for one compilation, in which XLA finds the kernels that it has made under this name and puts new ones.

    Programs of one model have most kernels in common, and to make them is most of a GPU compiler's work, which nothing
    in the bill depends on. XLA's own writing is not made for two processes: each works on a copy, which takes the place
    of what is kept as a whole; what two make at the same moment is kept of one. Where nothing can be kept, nothing is.
    """
    path = folder() / f"kernels-{name}.pb"
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / "kernels.pb"
        with suppress(OSError):
            if path.stat().st_size <= MOST_KERNEL_BYTES:
                shutil.copyfile(path, copy)
        before = _changed(copy)
        yield copy
        if _changed(copy) == before:
            return
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            beside = path.with_suffix(f".{os.getpid()}")
            shutil.copyfile(copy, beside)
            beside.replace(path)


def _changed(path: Path) -> int | None:
    return path.stat().st_mtime_ns if path.exists() else None
