"""The folder of a training run. It is whole whenever the program is killed: files are replaced, never rewritten.

run.json has what determines the run's bits, log.jsonl figures by step, checkpoints/ parameters and optimizer state by
step, model/ (which `train` writes at the end) the result.
"""

import fcntl
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from itertools import chain, count
from pathlib import Path
from typing import Any

from ..profiling.kept import write_whole
from .flags import UsageError

EVENTS = "events.*"  # what summaries are called


class Stopped(Exception):
    """A run cannot go on: something is no number any more, or cannot be kept. What is from before `step` is good."""

    def __init__(self, step: int, what: str):
        super().__init__(what)
        self.step = step


def check_writable(folder: Path, flag: str) -> None:
    """Makes the folder; UsageError where nothing can be written to it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x")
    except OSError as error:
        raise UsageError(f"--{flag}={folder}: cannot write there: {error.strerror or error}") from None


def check_room(out: Path, state: tuple[Any, ...], keep: int) -> None:
    """UsageError where `keep` checkpoints of a state, and its parameters once more, would not fit on the disk.

    Abstract arrays will do. While a checkpoint is written, the oldest is still there.
    """
    there = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    needed = (keep + 1) * _bytes(state) + _bytes(state[0]) - there
    if (free := shutil.disk_usage(out).free) < needed:
        raise UsageError(
            f"--out={out}: {keep} checkpoints and the model need {needed / 1e9:.3g} GB more, and "
            f"{free / 1e9:.3g} GB are free"
        )


def _bytes(tree: Any) -> int:
    import jax

    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """UsageError where another process trains in the folder; it counts as ended however it ends."""
    with (out / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"--out={out}: another process is training there") from None
        yield


def remember(out: Path, about: dict[str, Any]) -> None:
    """Writes what determines the run; UsageError where the folder holds another run."""
    path = out / "run.json"
    text = json.dumps(about, indent=1)
    if not path.exists():
        write_whole(path, text)
        return
    before, now = _flat(json.loads(path.read_text())), _flat(json.loads(text))
    for name, value in now.items():
        if before.get(name) != value:
            raise UsageError(
                f"--out={out}: it holds a run whose {name} is {before.get(name)}, and not {value}; "
                "choose another folder"
            )


def _flat(fields: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in fields.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


class Log:
    """Figures by step, each step once: in `log.jsonl`, and in TensorBoard where a folder for that is given."""

    def __init__(self, out: Path, done: int, logdir: Path | None = None):
        """Goes on after step `done`: what an interrupted run has logged beyond it will be logged again."""
        self._path = out / "log.jsonl"
        lines = self._path.read_text().splitlines(keepends=True) if self._path.exists() else []
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= done]
        write_whole(self._path, "".join(kept))
        self.last: dict[str, Any] = json.loads(kept[-1]) if kept else {}
        self._summaries = None
        if logdir is not None:
            from tensorboardX import SummaryWriter

            self._summaries = SummaryWriter(str(_board(logdir, out)), purge_step=done + 1, filename_suffix=f".{done}")

    def __call__(self, step: int, figures: dict[str, Any]) -> None:
        self.last = {"step": step, **figures}
        with self._path.open("a") as file:
            file.write(json.dumps(self.last) + "\n")
        for name, value in figures.items():
            if self._summaries is not None and value is not None:
                self._summaries.add_scalar(name, value, step)

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *error: object) -> None:
        if self._summaries is not None:
            self._summaries.close()


def _board(logdir: Path, out: Path) -> Path:
    """Where the run's curves are: the log's folder or, where that has another run's, one in it, of the run's name. In
    one folder, a run would void what TensorBoard shows of the run before."""
    said = out / "board.txt"  # a run that goes on goes on there
    if said.exists() and (folder := Path(said.read_text())) in (logdir, *logdir.glob("*/")):
        return folder
    names = (out.name if number == 1 else f"{out.name}-{number}" for number in count(1))
    folder = next(
        folder for folder in chain([logdir], (logdir / name for name in names)) if not any(folder.glob(EVENTS))
    )
    write_whole(said, str(folder))
    return folder


@contextmanager
def _written(step: int) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:  # ValueError: what tensorstore raises, whatever it is that went wrong
        raise Stopped(
            step, f"a checkpoint could not be written by step {step}: {' '.join(str(error).split())}"
        ) from None


class Checkpoints:
    """Parameters and optimizer state by step, written beside the training; each appears whole or not at all."""

    def __init__(self, out: Path, keep: int):
        from orbax import checkpoint as orbax

        self._folder, self._orbax = out / "checkpoints", orbax
        options = orbax.CheckpointManagerOptions(
            max_to_keep=keep, enable_async_checkpointing=True, cleanup_tmp_directories=True
        )
        self._manager = orbax.CheckpointManager(self._folder, options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *error: object) -> None:
        self._manager.close()  # what is being written gets finished

    def save(self, step: int, state: tuple[Any, Any]) -> None:
        """Starts to write the state, once the one before is there.

        Raises Stopped where a number of it is none, or the one before could not be written.
        """
        self.check(step, state)
        with _written(step):
            self._manager.save(step, args=self._orbax.args.StandardSave(state))

    def wait(self, step: int) -> None:
        """Until all is written, up to this step. Raises Stopped where it could not be."""
        with _written(step):
            self._manager.wait_until_finished()

    def check(self, step: int, state: tuple[Any, Any]) -> None:
        """Raises Stopped where a number of the state after `step` is none: the loss is of the parameters before it."""
        if not self._finite(state):
            raise Stopped(step, f"step {step} has made parameters that are no numbers")

    def restore(self, abstract: tuple[Any, Any]) -> tuple[int, Any]:
        """The last step that was saved and its state, of these shapes; 0 and None where there is none.

        Raises Stopped where a number of it is none.
        """
        import jax

        step = self._manager.latest_step()
        if step is None:
            return 0, None
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), abstract)
        state = self._manager.restore(step, args=self._orbax.args.StandardRestore(like))
        if not self._finite(state):
            raise Stopped(step, f"the checkpoint of step {step} has numbers that are none")
        return step, state

    def last_before(self, step: int) -> str:
        """Which one there is from before a step, once all are written: half a sentence."""
        with suppress(Stopped):
            self.wait(step)
        self._manager.reload()
        good = max((found for found in self._manager.all_steps() if found < step), default=None)
        if good is None:
            return "there is no checkpoint from before it"
        return f"the last good checkpoint is of step {good}: {self._folder / str(good)}"

    @cached_property
    def _finite(self) -> Any:
        import jax
        import jax.numpy as jnp

        return jax.jit(lambda tree: jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all())
