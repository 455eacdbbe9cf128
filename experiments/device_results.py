"""The folder that a run of the device suite fills, row by row, so that whatever ends it costs one row at most.

DIR/rows/NAME.json    one file a row, written whole or not at all: status, seconds, and its result or its error
DIR/logs              what the row's process said
DIR/bills, DIR/hlo    of each step: the bill and the optimised HLO, gzipped
DIR/traces            trimmed traces, gzipped
DIR/results.json      all of it in one object, made of the others
"""

import gzip
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..profiling.kept import write_whole
from . import device_turns
from .device_rows import Row

# What may have become of a row. Only the first two are never tried again.
DONE, DOES_NOT_FIT = "done", "does not fit"
RUNNING, FAILED, CRASHED, TIMED_OUT, INTERRUPTED = "running", "failed", "crashed", "timed out", "interrupted"
FINAL = (DONE, DOES_NOT_FIT)


def spent(entry: Mapping[str, Any]) -> tuple[float, float]:
    """(seconds of work, seconds of waiting for turns) of a row that runs."""
    now = time.time()
    waited = entry.get("waited_seconds", 0.0) + (now - since if (since := entry.get("waiting_since")) else 0.0)
    return now - entry.get("began", now) - waited, waited


@dataclass(frozen=True)
class Results:
    """What is in the folder."""

    folder: Path

    def path(self, kind: str, row: str, suffix: str) -> Path:
        """Where a row's file of one kind is: rows, bills, hlo, traces, logits."""
        return self.folder / kind / (row.replace("/", "_").replace(":", "-") + suffix)

    def read(self, row: Row) -> dict[str, Any] | None:
        """What is known of a row; None where it was never begun, or its file is no JSON."""
        return self.entry(row.name)

    def entry(self, row: str) -> dict[str, Any] | None:
        """The same, by its name."""
        try:
            return json.loads(self.path("rows", row, ".json").read_bytes())
        except (OSError, ValueError):
            return None

    def status(self, row: Row) -> str | None:
        """One of the above, or None."""
        found = self.read(row)
        return None if found is None else found.get("status")

    def begin(self, row: Row, process: int | None = None) -> None:
        """It begins; process: which does it, once that is known."""
        self._put(row, {"status": RUNNING, "process": process, "began": time.time()})

    @contextmanager
    def turn(self, row: Row, *, exclusive: bool) -> Iterator[None]:
        """A turn of this row at the device (see device_turns.py): how long it waits for it is written down."""
        self._note(row, waiting_since=time.time())
        with device_turns.turn(self.folder, exclusive=exclusive):
            _, waited = spent(self.read(row) or {})
            self._note(row, waiting_since=None, waited_seconds=waited)
            yield

    def end(self, row: Row, status: str, **more: Any) -> None:
        """How it ended: `result` of a row that is done, else `error`, one line, and `detail`."""
        found = self.read(row) or {}
        began, (seconds, waited) = found.get("began", time.time()), spent(found)
        about = {"status": status, "began": began, "seconds": round(seconds, 3), "waited_seconds": round(waited, 3)}
        self._put(row, about | more)

    def _note(self, row: Row, **more: Any) -> None:
        """Adds to what is known of a row that runs."""
        if found := self.read(row):
            self._put(row, found | more)

    def _put(self, row: Row, entry: Mapping[str, Any]) -> None:
        about = {"name": row.name, "part": row.part}
        write_whole(self.path("rows", row.name, ".json"), json.dumps(about | dict(entry), indent=1))

    def save_text(self, kind: str, row: str, suffix: str, text: str) -> None:
        """A gzipped file of a row, the same bytes for the same text."""
        write_whole(self.path(kind, row, suffix + ".gz"), gzip.compress(text.encode(), compresslevel=6, mtime=0))

    def load_text(self, kind: str, row: str, suffix: str) -> str:
        """What `save_text` wrote; FileNotFoundError."""
        return gzip.decompress(self.path(kind, row, suffix + ".gz").read_bytes()).decode()
