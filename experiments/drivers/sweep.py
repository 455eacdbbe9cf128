"""Bills of many steps: compiled in as many processes as there are cores, each once, and kept for the next time.

    bills = sweep.bills([Point(config, "decode", batch=8, context=4096, target="h200") for config in configs])

A bill is kept under a key of everything that it depends on, as soon as it is there: a sweep that was stopped, however
rudely, goes on where it was. A process compiles for one platform, for how jax starts depends on it.
"""

import base64
import hashlib
import itertools
import json
import os
import pickle
import queue
import resource
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...profiling.bill import Bill
from ...profiling.chips import CHIPS
from ...profiling.kept import folder, write_whole
from .. import flags
from ..flags import UsageError

if TYPE_CHECKING:
    from ...model.config import ModelConfig

Say = Callable[[str], None]
ROOT = Path(__file__).parents[2]
MAKERS = (
    "model/**/*.py",
    "profiling/**/*.py",
    *(f"experiments/{name}.py" for name in ("bill", "fit", "steps")),
)
# These work with bills that are there; and the facts of the world in a bill are prices, which `Driver` sets anew.
NO_MAKERS = tuple(f"profiling/{name}.py" for name in ("assumptions", "economics", "serving"))
# Whose version a bill depends on, where they are installed.
PACKAGES = ("jax", "jaxlib", "flax", "optax", "libtpu", "jax-cuda13-plugin", "jax-cuda12-plugin", "nvidia-cuda-nvcc")
# What jax reads when it starts, as it was given: preparing a target sets some of it, which must not change a key.
ENVIRONMENT = {name: os.environ.get(name) for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_PLATFORMS")}
# jax keeps what it has traced and compiled; a process that has grown so large makes room for a new one.
MOST_RESIDENT_BYTES = 3 << 30


@dataclass(frozen=True)
class Point:
    """One step to compile and bill, as `stepbill` would with flags of these names.

    Attributes:
      config: the model, in what it is stored and how it runs.
      batch: sequences over all chips; None: one (train: one a data shard). tokens: how many `generate` writes.
      mesh: "" (one chip), "data=8,tensor=4", or "auto": the smallest that fits.
      objective: what `train` is by, one of flags.OBJECTIVES.
    """

    config: "ModelConfig"
    step: str
    batch: int | None
    context: int
    target: str
    mesh: str = ""
    tokens: int = 64
    objective: str = flags.OBJECTIVES[0]

    def __str__(self) -> str:
        mesh = f", {self.mesh}" if self.mesh else ""
        return f"{self.config.name} {self.step}, batch {self.batch}, context {self.context}, {self.target}{mesh}"

    @property
    def request(self) -> flags.Request:
        """The same as `bill_step` takes it."""
        mesh = flags.AUTO if self.mesh == flags.AUTO else mesh_of(self.mesh)
        sizes = (self.context, self.target, self.batch, mesh, self.tokens)
        return flags.Request(self.config, self.step, *sizes, objective=self.objective)

    @property
    def chips(self) -> int | None:
        """How many chips it is for; None where that is to be found out."""
        mesh = self.request.mesh
        return flags.chips(mesh) if isinstance(mesh, dict) else None

    @property
    def command(self) -> str | None:
        """The `stepbill` command that makes this bill again; None where no flags say this model."""
        sizes = {name: flag for flag, (name, _) in flags.SIZES.items()}
        told = sizes | {name: name for name in (*flags.RUNS, "weights", "cache_dtype")}
        base = _published(self.config)
        if base is None:
            return None
        changed = {
            one.name: getattr(self.config, one.name)
            for one in fields(self.config)
            if one.name != "name" and getattr(self.config, one.name) != getattr(base, one.name)
        }
        if changed.keys() - told.keys():
            return None
        if changed.keys() & {"width", "num_heads"}:  # of which flags make another head width, where they are not told
            changed["head_width"] = self.config.head_width
        parts = {"model": base.name} | {told[name]: value for name, value in changed.items()} | {"step": self.step}
        parts |= {"batch": self.batch, "context": self.context, "target": self.target, "mesh": self.mesh}
        parts |= {"tokens": self.tokens} if self.step == "generate" else {}
        parts |= {"objective": self.objective} if self.objective != flags.OBJECTIVES[0] else {}
        return " ".join(
            ["stepbill", *(f"--{name}={value}" for name, value in parts.items() if value not in (None, ""))]
        )


def mesh_of(text: str) -> dict[str, int]:
    """`data=8,tensor=4` -> its sizes by axis; none of ""."""
    return {axis: int(size) for axis, _, size in (part.partition("=") for part in text.split(",") if part)}


@dataclass(frozen=True)
class Refusal:
    """Why there is no bill, in one line: the step does not fit, cannot be asked for so, or a compiler failed."""

    text: str


Outcome = Bill | Refusal


def bills(points: Iterable[Point], jobs: int | None = None, say: Say | None = None) -> dict[Point, Bill]:
    """As `sweep`, where each is needed: UsageError with the first refusal."""
    found = sweep(points, jobs, say)
    for outcome in found.values():
        if isinstance(outcome, Refusal):
            raise UsageError(outcome.text)
    return {point: outcome for point, outcome in found.items() if isinstance(outcome, Bill)}


def sweep(points: Iterable[Point], jobs: int | None = None, say: Say | None = None) -> dict[Point, Outcome]:
    """The bill of each point, in their order, or why it has none.

    jobs: processes that compile at the same time; without, one for each core that this process may use.
    say: is told what is done; without it, a bar on standard error shows it, if that is a terminal.
    """
    asked = list(dict.fromkeys(points))
    found = {point: outcome for point in asked if (outcome := kept(point)) is not None}
    missing = sorted((point for point in asked if point not in found), key=_how_jax_starts)
    if missing:
        jobs = min(jobs or cores(), len(missing))
        with _progress(len(missing), say) as tell:
            for point, outcome in _compiled(missing, jobs):
                tell(str(point))
                found[point] = outcome
    return {point: found[point] for point in asked}


def kept(point: Point) -> Outcome | None:
    """What is known of a point without compiling; None where nothing is."""
    return _read(_file(point))


def _read(path: Path) -> Outcome | None:
    try:
        saved = json.loads(path.read_text())
        return Refusal(saved["refused"]) if "refused" in saved else Bill.from_json(saved["bill"])
    except (OSError, ValueError, KeyError, TypeError):  # not there, or not whole
        return None


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# --- what a bill depends on ----------------------------------------------------------------------------------------


def _file(point: Point) -> Path:
    name = hashlib.sha256(json.dumps([_described(point), _surroundings()]).encode()).hexdigest()
    return folder() / f"{name}.json"


def _described(point: Point) -> dict[str, Any]:
    return {"kind": type(point.config).__name__} | asdict(point)


@cache
def _surroundings() -> dict[str, Any]:
    """What of this program, of its packages and of this machine can change a bill."""
    sources = hashlib.sha256()
    for path in sorted({path for pattern in MAKERS for path in ROOT.glob(pattern)}):
        if (name := path.relative_to(ROOT).as_posix()) not in NO_MAKERS:
            sources.update(name.encode() + b"\0" + path.read_bytes() + b"\0")
    versions: dict[str, str] = {}
    for package in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    devices = [name for pattern in ("nvidia[0-9]*", "accel*") for name in sorted(map(str, Path("/dev").glob(pattern)))]
    machine = [os.uname().machine, os.cpu_count(), _cpu_features(), devices]
    return {"sources": sources.hexdigest(), "versions": versions, "environment": ENVIRONMENT, "machine": machine}


def _cpu_features() -> str:
    with suppress(OSError), open("/proc/cpuinfo") as file:
        return next((line for line in file if line.startswith(("flags", "Features"))), "")
    return ""


@cache
def _published(config: "ModelConfig") -> "ModelConfig | None":
    from ...model.architectures import ARCHITECTURES, ENCODERS

    return (ARCHITECTURES | ENCODERS).get(config.name.partition("(")[0].strip())


# --- compiling -----------------------------------------------------------------------------------------------------


def _how_jax_starts(point: Point) -> tuple[str, int]:
    """What a process settles once: the platform, and on a host the number of devices."""
    platform = CHIPS[point.target].platform if point.target in CHIPS else ""
    return platform, (point.chips or 1) if platform == "cpu" else 0


def _compiled(points: Sequence[Point], jobs: int) -> Iterator[tuple[Point, Outcome]]:
    """Each point with its outcome, as they come."""
    waiting: queue.SimpleQueue[Point | None] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[Point, Outcome]] = queue.SimpleQueue()
    for point in (*points, *[None] * jobs):
        waiting.put(point)
    workers = [_Worker() for _ in range(jobs)]

    def serve(worker: _Worker) -> None:
        while (point := waiting.get()) is not None and not worker.killed:
            done.put((point, worker.ask(point)))
        worker.end()

    threads = [threading.Thread(target=serve, args=[worker], daemon=True) for worker in workers]
    try:
        for thread in threads:
            thread.start()
        for _ in points:
            yield done.get()
    finally:
        for worker in workers:
            worker.kill()


@dataclass
class _Worker:
    """A process that compiles: started when it is needed, and again where jax must start differently."""

    process: subprocess.Popen[str] | None = None
    started_for: tuple[str, int] | None = None
    killed: bool = False
    said: Any = field(default=None)

    def ask(self, point: Point) -> Outcome:
        if self.process is None or self.started_for != _how_jax_starts(point):
            self._start(point)
        assert self.process is not None and self.process.stdin is not None and self.process.stdout is not None
        with suppress(BrokenPipeError):
            self.process.stdin.write(base64.b64encode(pickle.dumps(point)).decode() + "\n")
            self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            return self._crashed(point)
        says = json.loads(answer)
        if says["resident_bytes"] > MOST_RESIDENT_BYTES:
            self.end()
        return _outcome(point, says)

    def _start(self, point: Point) -> None:
        self.end()
        self.said = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by `end`
        # In a group of its own: Ctrl-C is for the parent, which ends it.
        command = [sys.executable, "-c", f"import {__name__} as sweep; sweep.serve()"]
        pipe = subprocess.PIPE
        given = {name: value for name, value in ENVIRONMENT.items() if value is not None}
        environment = {name: value for name, value in os.environ.items() if name not in ENVIRONMENT} | given
        self.process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=self.said, text=True, process_group=0, env=environment
        )
        self.started_for = _how_jax_starts(point)
        if self.killed:
            self.process.kill()

    def _crashed(self, point: Point) -> Refusal:
        assert self.process is not None
        status = self.process.wait()
        self.said.seek(0)
        lines = [line.strip() for line in self.said.read().splitlines() if line.strip()]
        self.end()
        return Refusal(f"{point}: the compiler crashed (status {status}): {lines[-1] if lines else 'it said nothing'}")

    def end(self) -> None:
        """Has it finish; it reads that there is no more to do."""
        if self.process is not None:
            self.process.communicate()
            self.said.close()
        self.process = None

    def kill(self) -> None:
        self.killed = True
        if (process := self.process) is not None:
            process.kill()


def serve() -> None:
    """The life of a worker: a point a line on standard input; its bill to where it is kept; a line on standard output
    when that is done."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever compilers print is not an answer
    for line in sys.stdin:
        says = _compile_and_keep(pickle.loads(base64.b64decode(line)))
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        answers.write(json.dumps(says | {"resident_bytes": resident}) + "\n")
        answers.flush()


def _compile_and_keep(point: Point) -> dict[str, str]:
    """Compiles a point in this process: where what was found is kept, or why nothing is."""
    from ...profiling import targets
    from ..bill import bill_step

    try:
        return {"kept": _keep(point, {"bill": bill_step(point.request).to_json()})}
    except UsageError as error:
        return {"kept": _keep(point, {"refused": str(error)})}
    except targets.CompileError as error:  # which memory or the disk may have caused: tried again next time
        return {"failed": " ".join(str(error).split())}


def _outcome(point: Point, says: Mapping[str, Any]) -> Outcome:
    """What `_compile_and_keep` says, read back."""
    if "failed" in says:
        return Refusal(f"{point}: the compiler gave up: {says['failed']}")
    outcome = _read(Path(says["kept"]))  # under its own key, should sources have changed meanwhile
    return Refusal(f"{point}: its bill cannot be read back from {says['kept']}") if outcome is None else outcome


def _keep(point: Point, found: dict[str, Any]) -> str:
    """Writes it in one move, so that nobody reads half of it; -> where."""
    path = _file(point)
    write_whole(path, json.dumps({"point": _described(point), "made": _surroundings()} | found))
    return str(path)


@contextmanager
def _progress(total: int, say: Say | None) -> Iterator[Say]:
    """Counts what is done, to `say` or as a bar."""
    numbers = itertools.count(1)
    if say is not None:
        yield lambda text: say(f"{next(numbers)} of {total} compiled: {text}")
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (TextColumn("compiling"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.description}"), console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total)
        yield lambda text: bar.update(task, advance=1, description=text)
