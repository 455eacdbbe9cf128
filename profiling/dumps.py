"""Files of HLO text: plain, gzipped, or a folder that XLA dumped its modules to."""

import gzip
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

from . import hlo
from .harmless import visible
from .hlo import HloError

CHUNK_BYTES = 1 << 24
# As XLA calls the text of what it made of a module, such as module_0007.jit_f.sm_9.0_gpu_after_optimizations.txt.
OPTIMISED = ("*after_optimizations.txt", "*after_optimizations.txt.gz")
MOST_NAMED = 10


class Found(NamedTuple):
    """The file to read; and what is to be said of the others, "" where there are none."""

    path: Path
    note: str


def find(path: str | Path) -> Found:
    """The file meant by `path`: itself or, of a folder that XLA dumped to, its largest optimised module.

    A run dumps every module it compiles, nearly all of them a few instructions long; the step is the largest. The note
    names the others, so that one of them can be asked for instead. Of equally large ones the last to be compiled is it.

    Raises:
      HloError: the folder holds no optimised module as text, or cannot be read.
    """
    path = Path(path)
    try:
        if not path.is_dir():
            return Found(path, "")
        sizes = {file: file.stat().st_size for pattern in OPTIMISED for file in path.glob(pattern)}
    except OSError as error:
        raise HloError(f"{visible(str(path))}: {error.strerror or error}") from error
    if not sizes:
        hint = "XLA_FLAGS=--xla_dump_to=DIR dumps one for each module that is compiled"
        raise HloError(f"{visible(str(path))} holds no {OPTIMISED[0]}: {hint}")
    largest, *others = sorted(sizes, key=lambda file: (sizes[file], file.name), reverse=True)
    if not others:
        return Found(largest, "")
    named = [f"{visible(file.name)} ({_size(sizes[file])})" for file in others[:MOST_NAMED]]
    more = f" and {len(others) - MOST_NAMED} more" if len(others) > MOST_NAMED else ""
    which = f"{visible(largest.name)} ({_size(sizes[largest])}), the largest of {len(sizes)} optimised modules"
    return Found(largest, f"{which}; the others: {', '.join(named)}{more}")


def _size(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"


def read(path: str | Path) -> str:
    """HLO text of a file, plain or .gz. Bytes that are not UTF-8 are read as U+FFFD: they can only be in names.

    Neither what is not HLO nor what is too long is read to its end; what is too long and not compressed, not at all.

    Raises:
      HloError: the file cannot be read, is no HLO text, or holds more than hlo.MAX_CHARACTERS.
    """
    path = Path(path)
    try:
        with _open(path) as file:
            if path.suffix != ".gz" and (size := path.stat().st_size) > hlo.MAX_CHARACTERS:
                raise HloError(hlo.too_long(size))
            pieces = list(_pieces(file))
    except (OSError, EOFError, zlib.error) as error:
        said = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise HloError(f"{visible(str(path))}: {said}") from error
    except HloError as error:
        raise HloError(f"{visible(str(path))}: {error}") from None
    return b"".join(pieces).decode(errors="replace")


def _open(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path)) if path.suffix == ".gz" else path.open("rb")


def _pieces(file: BinaryIO) -> Sequence[bytes]:
    head = file.read(hlo.HEAD_CHARACTERS)
    if b"HloModule " not in head:
        begin = ascii(head[:40])[2:-1]
        raise HloError(
            f"no HloModule line in its first {len(head)} bytes, which begin '{begin}'"
            if head
            else "no HloModule line: it is empty"
        )
    pieces, length = [head], len(head)
    while piece := file.read(CHUNK_BYTES):
        pieces.append(piece)
        length += len(piece)
        if length > hlo.MAX_CHARACTERS:
            raise HloError(hlo.too_long())
    return pieces
