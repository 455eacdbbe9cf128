"""Text for training: a corpus as one memory-mapped file of tokens, and batches that are a function of their number.

The corpus is split by file: one in `HELD_OUT`, told by the hash of its contents, is never trained on. Batch
number s is the same in every run with the same seed, so that a run that is resumed goes on as if it had not stopped.
"""

import glob
import hashlib
import json
import math
import sysconfig
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

HELD_OUT = 50
# Of the standard library: not its tests, whose data are no text, nor what was installed beside it.
SKIPPED = ("test", "tests", "idle_test", "site-packages", "dist-packages", "lib2to3", "__pycache__", "ensurepip")
PARTS, ABOUT = ("train.bin", "held_out.bin"), "about.json"
Tokens = np.ndarray  # [n], uint8 or uint32
Encode = Callable[[str], Sequence[int]]


@dataclass(frozen=True)
class Corpus:
    """Tokens to train on and tokens that are held out, both memory-mapped [n]; bytes of text in each.

    digest: of the text and of what made tokens of it: the same tokens have the same.
    """

    train: Tokens
    held_out: Tokens
    train_bytes: int
    held_out_bytes: int
    digest: str

    def bits_per_byte(self, nats: float) -> float:
        """Of held-out text, from nats a token."""
        return nats / math.log(2) * len(self.held_out) / self.held_out_bytes


class Piece(NamedTuple):
    """Bytes `start` to `end` of a file; whether they are held out."""

    path: Path
    start: int
    end: int
    held: bool


def standard_library() -> list[Path]:
    """The source of the Python standard library that runs this, without its tests: some ten million bytes."""
    root = Path(sysconfig.get_paths()["stdlib"])
    return sorted(path for path in root.rglob("*.py") if not set(path.relative_to(root).parts) & set(SKIPPED))


def corpus(pattern: str | None, cache: Path, encode: Encode | None = None, name: str = "bytes") -> Corpus:
    """The files that match a glob, or the standard library's; made into tokens once, and kept under `cache`.

    Args:
      encode: text -> tokens; by default its bytes in UTF-8. name: what tells it from other tokenizers.
    Raises ValueError where nothing matches, or too little to hold anything out; OSError where a file cannot be read, or
    the tokens not be written.
    """
    paths = standard_library() if pattern is None else sorted(Path(p) for p in glob.glob(pattern, recursive=True))
    files: dict[bytes, tuple[Path, int]] = {}  # each content once: else a copy of what is held out were trained on
    for path in filter(Path.is_file, paths):
        text = path.read_bytes()
        files.setdefault(hashlib.sha256(text).digest(), (path, len(text)))
    if not files:
        raise ValueError(f"data is {pattern}; it must match at least one file")
    if (size := sum(size for _, size in files.values())) < 2 * HELD_OUT:
        raise ValueError(f"data is {pattern}; it has {size} bytes, too little to hold some of it out")
    digest = hashlib.sha256(b"".join([name.encode(), *files])).hexdigest()
    folder = cache / digest[:32]
    if not folder.exists():
        _tokenize(_pieces(files), folder, encode)
    about = json.loads((folder / ABOUT).read_text())
    train, held_out = (np.memmap(folder / part, about["dtype"], "r") for part in PARTS)
    train_bytes, held_out_bytes = about["bytes"]
    return Corpus(train, held_out, train_bytes, held_out_bytes, digest)


def _pieces(files: dict[bytes, tuple[Path, int]]) -> list[Piece]:
    """Held out are the files with certain digests; where these are hardly any bytes or many, as may be of few files,
    the end of all."""
    pieces = [
        Piece(path, 0, size, int.from_bytes(digest[:8], "big") % HELD_OUT == 0)
        for digest, (path, size) in files.items()
    ]
    whole = sum(piece.end for piece in pieces)
    if 1 / 2 <= HELD_OUT / whole * sum(piece.end for piece in pieces if piece.held) <= 5:
        return pieces
    cut, begin, found = whole - whole // HELD_OUT, 0, []
    for path, _, size, _ in pieces:
        here = min(max(cut - begin, 0), size)
        found += [Piece(path, 0, here, held=False), Piece(path, here, size, held=True)]
        begin += size
    return [piece for piece in found if piece.start < piece.end]


def _tokenize(pieces: list[Piece], folder: Path, encode: Encode | None) -> None:
    """Writes the tokens, one piece of text in memory at a time; the folder appears whole or not at all."""
    dtype = np.uint8 if encode is None else np.uint32
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as beside:
        made, sizes = Path(beside) / "made", [0, 0]
        made.mkdir()
        with (made / PARTS[0]).open("wb") as train, (made / PARTS[1]).open("wb") as held_out:
            for path, start, end, held in pieces:
                text = path.read_bytes()[start:end]
                tokens = np.frombuffer(text, dtype) if encode is None else encode(text.decode("utf-8", "replace"))
                (held_out if held else train).write(np.asarray(tokens, dtype).tobytes())
                sizes[held] += len(text)
        (made / ABOUT).write_text(json.dumps({"dtype": np.dtype(dtype).name, "bytes": sizes}))
        try:
            made.rename(folder)
        except OSError:
            if not folder.exists():  # else another run has made the same at the same time
                raise


@dataclass(frozen=True)
class Batches:
    """Batch number s -> tokens [batch, context + 1], int32: windows of the corpus in an order shuffled each epoch."""

    tokens: Tokens
    batch: int
    context: int
    seed: int = 0
    name: str = "text"

    def __post_init__(self) -> None:
        if self.windows < 1:
            raise ValueError(
                f"context is {self.context}; the {self.name} has {len(self.tokens)} tokens, less than one window of "
                f"{self.context + 1}"
            )

    @property
    def windows(self) -> int:
        """How many windows there are in an epoch; they share their first and last token."""
        return (len(self.tokens) - 1) // self.context

    def __getitem__(self, number: int) -> np.ndarray:
        rows = []
        for n in range(number * self.batch, (number + 1) * self.batch):
            epoch, place = divmod(n, self.windows)
            rows.append(self._window(int(self._order(epoch)[place])))
        return np.stack(rows)

    def _order(self, epoch: int) -> np.ndarray:
        cached = self.__dict__.get("_cached")
        if cached is None or cached[0] != epoch:
            order = np.random.Generator(np.random.Philox(key=[self.seed, epoch])).permutation(self.windows)
            cached = (epoch, order)
            self.__dict__["_cached"] = cached
        return cached[1]

    def _window(self, number: int) -> np.ndarray:
        start = number * self.context
        return np.asarray(self.tokens[start : start + self.context + 1], np.int32)

    def evenly(self, count: int | None) -> Iterator[np.ndarray]:
        """At most `count` batches (None: all there are), spread over the corpus and not shuffled: for measuring."""
        whole = self.windows // self.batch
        if not whole:
            yield np.stack([self._window(n) for n in range(self.windows)])
            return
        count = min(count or whole, whole)
        for place in range(count):
            first = place * whole // count * self.batch
            yield np.stack([self._window(first + n) for n in range(self.batch)])
