"""Text for training: a corpus as one memory-mapped file of tokens, and batches that are a function of their number.

The corpus is split by file: one in `HELD_OUT` files, told by the hash of its contents, is never trained on. Batch
number s is the same in every run with the same seed, so that a run that is resumed goes on as if it had not stopped.
"""

import glob
import hashlib
import os
import sysconfig
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

HELD_OUT = 50
# Of the standard library: not its tests, whose data are no text, nor what was installed beside it.
SKIPPED = ("test", "tests", "idle_test", "site-packages", "dist-packages", "lib2to3", "__pycache__", "ensurepip")
Tokens = np.ndarray  # [n], uint8, uint16 or uint32
Encode = Callable[[str], Sequence[int]]


@dataclass(frozen=True)
class Corpus:
    """Tokens to train on and tokens that are held out, both memory-mapped [n]; bytes of text in each."""

    train: Tokens
    held_out: Tokens
    train_bytes: int
    held_out_bytes: int
    files: int


def standard_library() -> list[Path]:
    """The source of the Python standard library that runs this, without its tests: some ten million bytes."""
    root = Path(sysconfig.get_paths()["stdlib"])
    return sorted(path for path in root.rglob("*.py") if not set(path.relative_to(root).parts) & set(SKIPPED))


def corpus(pattern: str | None, cache: Path, encode: Encode | None = None, name: str = "bytes") -> Corpus:
    """The files that match a glob, or the standard library's; read once and kept under `cache`.

    Args:
      encode: text -> tokens; by default its bytes in UTF-8. name: of the tokenizer, for the cache.
    Raises ValueError where nothing matches, or too little to hold anything out.
    """
    paths = standard_library() if pattern is None else sorted(Path(p) for p in glob.glob(pattern, recursive=True))
    paths = [path for path in paths if path.is_file()]
    if not paths:
        raise ValueError(f"data is {pattern}; it must match at least one file")
    key = hashlib.sha256(name.encode())
    for path in paths:
        stat = path.stat()
        key.update(f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    folder = cache / key.hexdigest()[:16]
    if not (folder / "sizes.npy").exists():
        _tokenize(paths, folder, encode)
    sizes = np.load(folder / "sizes.npy")
    dtype = f"uint{sizes[2]}"
    train, held_out = (np.memmap(folder / f"{part}.bin", dtype, "r") for part in ("train", "held_out"))
    return Corpus(train, held_out, int(sizes[0]), int(sizes[1]), len(paths))


def _tokenize(paths: list[Path], folder: Path, encode: Encode | None) -> None:
    parts: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    counts = [0, 0]
    for path in paths:
        raw = path.read_bytes()
        held = int.from_bytes(hashlib.sha256(raw).digest()[:8], "big") % HELD_OUT == 0
        tokens = np.frombuffer(raw, np.uint8) if encode is None else np.asarray(encode(raw.decode("utf-8", "replace")))
        parts[held].append(tokens.astype(np.uint8 if encode is None else np.uint32))
        counts[held] += len(raw)
    if not counts[1]:  # of few files perhaps none is held out: then the end of the last
        last = parts[0][-1]
        cut = len(last) - max(1, len(last) // HELD_OUT)
        parts[0][-1], held_out = last[:cut], last[cut:]
        parts[1].append(held_out)
        moved = counts[0] * len(held_out) // max(1, sum(map(len, parts[0])) + len(held_out))
        counts = [counts[0] - moved, moved]
    # Written beside and renamed, so that what is there is whole.
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as made:
        for name, tokens in zip(("train", "held_out"), parts, strict=True):
            np.concatenate(tokens).tofile(Path(made) / f"{name}.bin")
        np.save(Path(made) / "sizes.npy", np.array([*counts, 8 if encode is None else 32]))
        folder.mkdir(exist_ok=True)
        for file in ("train.bin", "held_out.bin", "sizes.npy"):
            os.replace(Path(made) / file, folder / file)


@dataclass(frozen=True)
class Batches:
    """Batch number s -> tokens [batch, context + 1], int32: windows of the corpus in an order shuffled each epoch."""

    tokens: Tokens
    batch: int
    context: int
    seed: int

    def __post_init__(self) -> None:
        if self.windows < 1:
            raise ValueError(
                f"context is {self.context}; the corpus has {len(self.tokens)} tokens, which is less than one window"
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

    def evenly(self, count: int) -> Iterator[np.ndarray]:
        """At most `count` batches, spread over the corpus and not shuffled: for measuring."""
        whole = self.windows // self.batch
        if not whole:
            yield np.stack([self._window(n) for n in range(self.windows)])
            return
        for place in range(min(count, whole)):
            first = place * whole // min(count, whole) * self.batch
            yield np.stack([self._window(first + n) for n in range(self.batch)])
