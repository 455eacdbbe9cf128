"""`python -m stepbill.experiments.device_suite --out=DIR`: what one NVIDIA GPU does, beside what the bill says of it.

Ceilings of the device; steps, measured and predicted; DRAM counters; the same steps by torch. Rows are in the order of
their importance, and those that do not fit into --minutes are named. Every row is written when it is done, so the same
command goes on where it was ended, however that was. Each row runs in a process of its own with a time limit: what it
does to its process costs no other row. Several run at once, for most of a row is work of the CPU, and take turns at the
device (device_turns.py).
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from absl import flags as absl_flags

from ..profiling import calibration
from ..profiling.calibration import Calibration
from ..profiling.chips import CHIPS, GIB, Chip
from ..profiling.kept import write_whole
from . import command, device_dry_run, device_results, device_rows, device_table, device_turns, flags
from .device_results import FINAL, Results
from .device_rows import Row
from .device_worker import CALIBRATION, Job
from .flags import UsageError

INTRODUCTION = """device_suite: what one NVIDIA GPU does, beside what the bill says of it and what torch does

  python -m stepbill.experiments.device_suite --out=DIR              at most 8 minutes; the same again goes on
  python -m stepbill.experiments.device_suite --out=DIR --parts=ceilings,steps --rows='decode/8b'
  python -m stepbill.experiments.device_suite --dry_run              the rows, and whether they fit; needs no GPU
"""
SCHEMA = 1
NO_TIME = device_table.NO_TIME
PROBE_SECONDS, POLL_SECONDS = 120, 0.1
MOST_WORKERS, TINY_WORKERS = 8, 2
MEMORY_FRACTION = "0.92"  # of the device's, that jax takes at most: by default it is less than models need
TINY_HBM_BYTES = 4 * GIB
PROBE = """
import json, jax
device = jax.devices()[0]
print(json.dumps({"platform": device.platform, "kind": device.device_kind, "memory": device.memory_stats() or {}}))
"""
SMI = ("name", "driver_version", "vbios_version", "memory.total", "power.limit", "clocks.max.sm", "clocks.max.memory")
SMI_OFTEN = ("timestamp", "clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")
PACKAGES = (
    *("jax", "jaxlib", "jax-cuda13-plugin", "flax", "optax", "numpy"),
    *("torch", "triton", "transformers", "stepbill"),
)


# --- the machine -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Machine:
    """Where it runs: the chip as chips.py calls it, its memory, and what nvidia-smi and the packages say."""

    target: str
    hbm_bytes: int
    about: Mapping[str, Any]


def machine(platform: str) -> Machine:
    """What is here; UsageError where it is not what is needed."""
    smi = shutil.which("nvidia-smi")
    if platform == "gpu" and smi is None and not os.path.exists("/dev/nvidiactl"):
        raise UsageError("there is no NVIDIA GPU on this machine, and it takes one; --dry_run lists the rows without")
    about: dict[str, Any] = {"host": _host(), "versions": _versions(), "nvidia_smi": _smi()}
    about["environment"] = {name: value for name, value in os.environ.items() if name.startswith(("XLA_", "JAX_"))}
    if platform == "cpu":
        return Machine("host", TINY_HBM_BYTES, about)
    try:
        ran = subprocess.run(
            [sys.executable, "-c", PROBE],
            env=os.environ | {"JAX_PLATFORMS": "cuda", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PROBE_SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise UsageError(f"jax did not start on the GPU within {PROBE_SECONDS} seconds") from None
    try:
        found = json.loads(ran.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        last = (ran.stderr.strip().splitlines() or ["it said nothing"])[-1][:300]
        raise UsageError(f"jax cannot use an NVIDIA GPU here: {last}") from None
    chip = next((chip for chip in CHIPS.values() if found["kind"] in chip.kinds), None)
    if chip is None or chip.platform != "cuda":
        known = ", ".join(chip.title for chip in CHIPS.values() if chip.platform == "cuda")
        raise UsageError(f"the device is {found['kind']!r}, whose peaks are not known; known are {known}")
    return Machine(chip.name, _memory(chip), about | {"device": found})


def _memory(chip: Chip) -> int:
    return chip.usable_hbm_bytes or chip.hbm_bytes or 0


def _host() -> dict[str, Any]:
    from .bench_bill import environment

    return environment()


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _smi() -> dict[str, str] | None:
    values = device_turns.ask_smi(SMI)
    return dict(zip(SMI, values, strict=True)) if values else None


@contextmanager
def clocks_watched(path: Path) -> Iterator[None]:
    """Meanwhile nvidia-smi, where there is one, adds a line of clocks, power and temperature four times a second."""
    smi = shutil.which("nvidia-smi")
    if smi is None:
        yield
        return
    query = [smi, f"--query-gpu={','.join(SMI_OFTEN)}", "--format=csv,noheader,nounits", "--id=0", "--loop-ms=250"]
    with path.open("ab") as file:
        watching = subprocess.Popen(query, stdout=file, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL)
        try:
            yield
        finally:
            watching.kill()
            watching.wait()


def clocks_between(lines: Sequence[str], begin: float, end: float) -> dict[str, float] | None:
    """Of nvidia-smi's lines between two moments (seconds since 1970): median and extremes; None where there is none."""
    found: list[tuple[float, ...]] = []
    for line in lines:
        stamp, *values = (part.strip() for part in line.split(","))
        try:
            when = datetime.strptime(stamp, "%Y/%m/%d %H:%M:%S.%f").timestamp()
            if begin <= when <= end:
                found.append(tuple(float(value) for value in values))
        except ValueError:  # a line cut short; what a card does not say
            continue
    if not found:
        return None
    sm, memory, watts, celsius = ([one[n] for one in found] for n in range(4))
    return {
        "samples": len(found),
        "sm_mhz_median": sorted(sm)[len(sm) // 2],
        "sm_mhz_least": min(sm),
        "memory_mhz_median": sorted(memory)[len(memory) // 2],
        "watts_most": max(watts),
        "celsius_most": max(celsius),
    }


# --- running rows ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Worker:
    """The process that does a row."""

    row: Row
    process: "subprocess.Popen[bytes]"


class Supervisor:
    """Runs rows, each in a worker, so many at once, and writes down what became of each."""

    def __init__(
        self,
        results: Results,
        found: Machine,
        deadline: float,
        tiny: bool,
        changed: Callable[[str], None],
        sabotage: Mapping[str, str],
        workers: int,
    ):
        self.results, self.machine, self.deadline, self.tiny = results, found, deadline, tiny
        self.changed, self.sabotage, self.workers = changed, dict(sabotage), workers

    def run(self, rows: Sequence[Row]) -> None:
        """All that fit into the time: those never tried first, then those that once failed."""
        pending = [row for row in rows if self.results.status(row) is None]
        pending += [row for row in rows if self.results.status(row) not in (None, *FINAL)]
        running: list[Worker] = []
        try:
            while True:
                running = [worker for worker in running if not self._has_ended(worker)]
                while len(running) < self.workers and (row := self._next(pending, [one.row for one in running])):
                    pending.remove(row)
                    running.append(self._begun(row))
                if not running:
                    return
                time.sleep(POLL_SECONDS)
        finally:
            for worker in running:
                _kill(worker.process)

    def _next(self, pending: Sequence[Row], running: Sequence[Row]) -> Row | None:
        """The first that can end in time, and is not held against a row of which it is not known yet what it comes to.

        Before it can have the device for itself, those that run may all have had it.
        """
        unknown = {row.name for row in (*pending, *running)}
        ahead = sum(row.exclusive_seconds for row in running)
        for row in pending:
            is_known = unknown.isdisjoint(row.of_steps)
            if is_known and time.time() + max(row.seconds, ahead + row.exclusive_seconds) <= self.deadline:
                return row
        return None

    def _begun(self, row: Row) -> Worker:
        job = Job(
            *(str(self.results.folder), row.name, self.machine.target, self.machine.hbm_bytes, self.tiny),
            sabotage=self.sabotage.get(row.name),
        )
        self.results.begin(row)
        with self._log(row).open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", "stepbill.experiments.device_worker", json.dumps(asdict(job))],
                stdin=subprocess.PIPE,
                stdout=file,
                stderr=file,
                env=self._environment(row),
                start_new_session=True,
            )
        return Worker(row, process)

    def _has_ended(self, worker: Worker) -> bool:
        """Whether it has ended, or must and is; then it is written down how, where it did not do that itself."""
        row, stopped = worker.row, None
        if worker.process.poll() is None:
            stopped = self._must_stop(row)
            if stopped is None:
                return False
        _kill(worker.process)
        if self.results.status(row) == device_results.RUNNING:
            status, why = stopped or (device_results.CRASHED, _ending(worker.process.returncode))
            tail = self._log(row).read_bytes()[-3000:].decode(errors="replace")
            self.results.end(row, status, error=why, detail=tail)
        self.changed(f"{row.name}: {self.results.status(row)}")
        return True

    def _must_stop(self, row: Row) -> tuple[str, str] | None:
        """What becomes of it then, and why. To wait for a turn at the device is not held against it."""
        if time.time() > self.deadline:
            return device_results.INTERRUPTED, "the time for the suite ended before it did"
        seconds, _ = device_results.spent(self.results.read(row) or {})
        if seconds > row.limit_seconds:
            return device_results.TIMED_OUT, f"it took more than {row.limit_seconds:g} seconds"
        return None

    def _log(self, row: Row) -> Path:
        path = self.results.path("logs", row.name, ".txt")
        path.parent.mkdir(exist_ok=True)
        return path

    def _environment(self, row: Row) -> dict[str, str]:
        """Of a worker: jax on the one device, with what it compiles kept for the next process; but where the device is
        torch's, jax has none of it."""
        of_jax = self.machine.target != "host" and row.part != "peers"
        more = {"PYTHONUNBUFFERED": "1", "JAX_PLATFORMS": "cuda,cpu" if of_jax else "cpu"}
        if (rates := self.results.folder / CALIBRATION).exists():
            more["STEPBILL_CALIBRATION"] = str(rates)
        if of_jax:
            more |= {
                "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # others have memory of the device as well
                "XLA_PYTHON_CLIENT_MEM_FRACTION": MEMORY_FRACTION,
                "JAX_COMPILATION_CACHE_DIR": str(self.results.folder / "compiled"),
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            }
        return os.environ | more


def how_many_workers(tiny: bool) -> int:
    """At once: half of the cores are left to their compilers' threads."""
    return TINY_WORKERS if tiny else max(1, min(MOST_WORKERS, calibration.cores() // 2))


def _kill(worker: "subprocess.Popen[bytes]") -> None:
    if worker.poll() is None:
        os.killpg(worker.pid, signal.SIGKILL)
    worker.wait()
    if worker.stdin:
        worker.stdin.close()


def _ending(status: int) -> str:
    if status < 0:
        return f"its process was ended by signal {-status} ({signal.Signals(-status).name})"
    return f"its process ended with status {status}"


# --- results ---------------------------------------------------------------------------------------------------------


def collect(
    results: Results, rows: Sequence[Row], asked: Sequence[Row], found: Machine, runs: Sequence[Any], tiny: bool
) -> dict[str, Any]:
    """All that is known, as results.json has it. asked: the rows that this run was to do."""
    clocks = results.folder / "clocks.csv"
    lines = clocks.read_text(errors="replace").splitlines() if clocks.exists() else []
    entries, missing, names = [], [], {row.name for row in asked}
    for row in rows:
        entry = results.read(row)
        if entry is None:
            reason = NO_TIME if row.name in names else "not asked for in the last run"
            missing.append({"name": row.name, "part": row.part, "reason": reason})
            continue
        if between := entry.get("result", {}).get("timed_between"):
            entry["clocks"] = clocks_between(lines, *between)
        entries.append(entry | ({} if row.work is None else {"work": asdict(row.work)}))
    said = {
        "schema": SCHEMA,
        "suite": "stepbill.experiments.device_suite",
        "tiny": tiny,
        "target": found.target,
        "machine": found.about,
        "runs": list(runs),
        "rows": entries,
        "not_run": missing,
    }
    return said | {"aims": device_table.aims(said)}


# --- the command -----------------------------------------------------------------------------------------------------


def define(values: absl_flags.FlagValues) -> None:
    """Adds every flag."""
    to = flags.Definer(values)
    to.string("out", None, "the folder of results; a second run goes on with what the first has left")
    to.string("parts", ",".join(device_rows.PARTS), "which parts, with commas between")
    to.string("rows", None, "only rows whose names have a match of this regular expression")
    to.number("minutes", 8.0, "how long it may take in all", low=0.0)
    to.one_of(("table", "json"), "format", "table", "what standard output carries: table or json")
    to.boolean("dry_run", "list the rows, their sizes and whether they fit, and stop; needs no GPU")
    to.string("target", "h200", "with --dry_run: the chip")
    to.boolean("compile", "with --dry_run: compile each of our steps for the chip, which need not be here")
    to.boolean("predict", "predict what --out has measured by the calibration that it has by now; needs no GPU")
    to.one_of(("gpu", "cpu"), "platform", "gpu", "cpu, together with --tiny, tries the suite itself out")
    to.boolean("tiny", "models of two narrow layers: nothing that it measures says anything")
    to.strings("sabotage", "of tests: ROW=raise, crash, hang, or hold the device")
    flags.define_help(to)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs it: 0; 1 where no row is done; 2 where the flags are wrong, or there is no GPU."""
    begin, given = time.time(), sys.argv[1:] if argv is None else argv
    return command.run(lambda values: _run(values, given, begin), define, INTRODUCTION, given)


def _run(values: absl_flags.FlagValues, argv: Sequence[str], begin: float) -> int:
    if values.dry_run:
        rows = _chosen(values, _memory(_chip(values.target)))
        device_dry_run.show(rows, values.target, values.compile, values.format)
        return 0
    if values.predict:
        return _predict_again(values)
    if values.out is None:
        raise UsageError("--out: it must be given: the folder of results")
    if (values.platform == "cpu") != values.tiny:
        raise UsageError("--tiny: it goes with --platform=cpu, and neither without the other")
    _chosen(values, 0)  # wrong names are found before anything starts
    found = machine(values.platform)
    everything = device_rows.rows(found.hbm_bytes, values.tiny)
    rows = _chosen(values, found.hbm_bytes)
    results = Results(Path(values.out).resolve())
    try:
        results.folder.mkdir(parents=True, exist_ok=True)
        runs = _earlier(results, found, values)
    except OSError as error:
        raise UsageError(f"--out={values.out}: {(error.strerror or str(error)).lower()}") from None
    this = {"command": ["device_suite", *argv], "began": datetime.now(UTC).isoformat(timespec="seconds")}
    runs.append(this | {"minutes": values.minutes})

    def save() -> Any:
        runs[-1]["seconds"] = round(time.time() - begin, 1)
        said = collect(results, everything, rows, found, runs, values.tiny)
        write_whole(results.folder / "results.json", json.dumps(said, indent=1))
        return said

    def changed(text: str) -> None:
        print(f"{time.time() - begin:6.1f} s  {text}", file=sys.stderr, flush=True)
        save()

    save()  # that it began, whatever ends it
    with clocks_watched(results.folder / "clocks.csv"):
        deadline = begin + 60 * values.minutes
        sabotage = dict(one.rsplit("=", 1) for one in values.sabotage)
        workers = how_many_workers(values.tiny)
        Supervisor(results, found, deadline, values.tiny, changed, sabotage, workers).run(rows)
    if (results.folder / CALIBRATION).exists():  # rows may have been billed before it was there
        predict_again(results, everything, found.target, calibration.read(results.folder / CALIBRATION), of_others=True)
    said = save()
    _finish(results, said, values.format)
    return int(not any(row["status"] == device_results.DONE for row in said["rows"]))


def _predict_again(values: absl_flags.FlagValues) -> int:
    """Predicts the measured steps by the calibration that the folder has by now."""
    results = Results(Path(values.out or "."))
    try:
        said = json.loads((results.folder / "results.json").read_bytes())
        rates = calibration.read(results.folder / CALIBRATION)
    except (OSError, ValueError) as error:
        raise UsageError(f"--out={values.out}: it must be a folder of results with {CALIBRATION}: {error}") from None
    found = Machine(said["target"], CHIPS[said["target"]].usable_hbm_bytes or TINY_HBM_BYTES, said["machine"])
    rows = device_rows.rows(found.hbm_bytes, said["tiny"])
    predict_again(results, rows, found.target, rates)
    _finish(results, collect(results, rows, [], found, said["runs"], said["tiny"]), values.format)
    return 0


def predict_again(
    results: Results, rows: Sequence[Row], target: str, rates: Calibration, of_others: bool = False
) -> None:
    """Predicts the measured steps by a calibration; of_others: only those that are predicted by something else."""
    from ..profiling import hlo
    from ..profiling.walk import itemize_module

    for row in rows:
        entry = results.read(row)
        if row.part != "steps" or not entry or entry["status"] != device_results.DONE:
            continue
        by = (entry["result"]["predicted_by"] or {}).get("measured_on") or {}
        if of_others and by.get("date") == rates.date:
            continue
        module = hlo.parse(results.load_text("hlo", row.name, ".hlo.txt"))
        bill = itemize_module(module, CHIPS[target], calibration=rates)
        seconds = bill.total.predicted_picoseconds / 1e12 if bill.predicted else None
        entry["result"] |= {"predicted_seconds": seconds, "predicted_by": bill.predicted}
        write_whole(results.path("rows", row.name, ".json"), json.dumps(entry, indent=1))


def _finish(results: Results, said: Mapping[str, Any], form: str) -> None:
    """Writes all of it, and prints it."""
    text = device_table.text(said)
    write_whole(results.folder / "results.json", json.dumps(said, indent=1))
    write_whole(results.folder / "table.txt", text)
    sys.stdout.write(json.dumps(said, indent=1) + "\n" if form == "json" else text)


def _earlier(results: Results, found: Machine, values: absl_flags.FlagValues) -> list[dict[str, Any]]:
    """The runs that have filled the folder so far; UsageError where they were of another device."""
    try:
        said = json.loads((results.folder / "results.json").read_bytes())
    except (FileNotFoundError, ValueError):
        return []
    if (said["target"], said["tiny"]) != (found.target, values.tiny):
        raise UsageError(
            f"--out={values.out}: it has results of {said['target']}{', tiny' * said['tiny']}; this is {found.target}"
        )
    return list(said["runs"])


def _chip(target: str) -> Chip:
    chip = CHIPS.get(target)
    if chip is None or chip.platform != "cuda":
        known = ", ".join(name for name, chip in CHIPS.items() if chip.platform == "cuda")
        raise UsageError(f"--target={target}: it must be one of {known}")
    return chip


def _chosen(values: absl_flags.FlagValues, hbm_bytes: int) -> list[Row]:
    import re

    parts = values.parts.split(",")
    if wrong := [part for part in parts if part not in device_rows.PARTS]:
        raise UsageError(f"--parts={values.parts}: {wrong[0]!r} is not one of {', '.join(device_rows.PARTS)}")
    everything = device_rows.rows(hbm_bytes, values.tiny)
    try:
        rows = device_rows.chosen(everything, parts, values.rows)
    except re.error as error:
        raise UsageError(f"--rows={values.rows}: it must be a regular expression: {error}") from None
    if not rows:
        raise UsageError(f"--rows={values.rows}: no row of {values.parts} has that in its name; --dry_run lists them")
    names = {row.name for row in everything}
    for one in values.sabotage:
        name, _, how = one.rpartition("=")
        if name not in names or how not in ("raise", "crash", "hang", "hold"):
            raise UsageError(f"--sabotage={one}: it must be ROW=raise, ROW=crash, ROW=hang or ROW=hold")
    return rows


if __name__ == "__main__":
    sys.exit(main())
