"""A process of the device suite: does one row and writes what comes of it.

    python -m stepbill.experiments.device_worker JOB        JOB: JSON, see Job; `device_suite` starts it

Others do other rows meanwhile: what is timed, or chosen by timing, is done in an exclusive turn at the device, and what
else needs the device in a shared one. It ends when its standard input is closed, that is with the process that started
it, and then nothing of it is left on the device.
"""

import gc
import glob
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..profiling import counters
from ..profiling.chips import GIB
from ..profiling.kept import write_whole
from . import device_results, device_rows, device_turns
from .device_results import Results
from .device_rows import Row

if TYPE_CHECKING:
    from ..profiling.bill import Bill
    from ..profiling.targets import Compilation
    from ..profiling.trace import Trace
    from . import calibrate
    from .measure import Measurement, Programs
    from .steps import Step

BYTES = ("counted", "hbm", "reread", "requested")  # of a component, by counters and by the bill
NCU_PLACES = ("/usr/local/cuda*/bin/ncu", "/opt/nvidia/nsight-compute/*/ncu")
# One range of a whole step, with the caches as they are; and where ncu cannot do that, the sum of its kernels.
RANGE, KERNELS = ("--replay-mode", "app-range"), ("--profile-from-start", "off")
HANG_SECONDS = 3600
CALIBRATION = "calibration.json"
# Of ceilings: sides of cubes, bytes that a copy touches, and how much work of products is put in one program.
SIDES, COPIES, CHAIN_FLOPS = (8192, 2048, 4096), (8 << 30, 1 << 30, 1 << 26), 10**13
SAMPLE_SECONDS = 0.02  # of a ceiling: long enough for the clocks to come up
UNITS = {"copy": "bytes_per_second", "launch": "per_second"}  # of ceilings that are no products
# Of the device's memory: what a ceiling takes at most, what a compiler tries kernels in, and beside a program's own.
CEILING_BYTES, COMPILER_BYTES, MARGIN_BYTES = 24 * GIB, 16 * GIB, GIB
TINY_SIDES, TINY_COPIES = (32, 64), (1 << 16, 1 << 18)


@dataclass(frozen=True)
class Job:
    """What a worker is to do.

    out: the folder of results. target: the chip, as chips.py calls it. hbm_bytes: its memory. sabotage: of tests: what
    goes wrong with the row.
    """

    out: str
    row: str
    target: str
    hbm_bytes: int
    tiny: bool = False
    sabotage: str | None = None

    def found(self) -> Row:
        """The row."""
        return next(row for row in device_rows.rows(self.hbm_bytes, self.tiny) if row.name == self.row)


class TooLarge(Exception):
    """What a row needs and the chip has not."""


def main(argv: Sequence[str] | None = None) -> int:
    """Does the job: 0."""
    (text, *counted) = sys.argv[1:] if argv is None else argv
    job = Job(**json.loads(text))
    if counted:
        _count(job)
        return 0
    threading.Thread(target=_end_with_parent, daemon=True).start()
    do(job.found(), job, Results(Path(job.out)))
    return 0


def _end_with_parent() -> None:
    """Nobody writes to standard input: it ends with whoever holds its other end."""
    # Not by sys.stdin, whose lock this thread would still hold when the interpreter ends, which kills the process.
    while os.read(0, 1):
        pass
    os.killpg(0, signal.SIGKILL)  # with ncu, if it runs


def do(row: Row, job: Job, results: Results) -> None:
    """One row, whatever goes wrong in it."""
    from ..profiling.targets import DoesNotFit

    results.begin(row, os.getpid())
    try:
        _sabotage(job.sabotage, row, results)
        results.end(row, device_results.DONE, result=RUN[row.part](row, job, results))
    except (TooLarge, DoesNotFit) as error:
        results.end(row, device_results.DOES_NOT_FIT, error=str(error))
    except Exception as error:  # what else may end a process is written down by the one that started it
        said = (str(error).strip().splitlines() or [""])[0][:300]
        detail = traceback.format_exc()[-3000:]
        results.end(row, device_results.FAILED, error=f"{type(error).__name__}: {said}", detail=detail)


def _sabotage(how: str | None, row: Row, results: Results) -> None:
    if how == "raise":
        raise RuntimeError("as a test asked for")
    if how == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if how == "hang":
        time.sleep(HANG_SECONDS)
    if how == "hold":
        with results.turn(row, exclusive=True):
            time.sleep(HANG_SECONDS)


def start(row: Row, job: Job, results: Results) -> None:
    """Has jax start on the device, which times nothing, but takes memory and the driver's attention."""
    import jax

    from ..profiling import targets

    targets.prepare(job.target)
    with results.turn(row, exclusive=False):
        jax.devices()


def make_room(needs: int) -> None:
    """Waits until the GPU has so much memory free, and a little more, and has jax take it in one piece.

    Else jax takes pieces, each twice the one before, in which a large array may find no room though there is enough of
    it; and what it once took it keeps (XLA's BFCAllocator::Extend).
    """
    import jax
    import jax.numpy as jnp

    stats, needs = jax.devices()[0].memory_stats(), needs + MARGIN_BYTES
    if not stats or stats.get("largest_free_block_bytes", 0) >= needs:
        return
    piece = min(needs, stats["bytes_limit"] - stats.get("pool_bytes", 0))
    device_turns.wait_for_memory(piece)
    with suppress(jax.errors.JaxRuntimeError):  # the row tells what it cannot get
        jax.block_until_ready(jnp.zeros((piece >> 20, 1 << 20), jnp.int8)).delete()


# --- steps -----------------------------------------------------------------------------------------------------------


def run_step(row: Row, job: Job, results: Results) -> dict[str, Any]:
    """A step of ours; where our own kernel of attention fails, with XLA's instead, and it says so."""
    from ..profiling.targets import DoesNotFit

    assert row.work is not None
    try:
        return measured_step(row, job, results)
    except (TooLarge, DoesNotFit):
        raise
    except Exception as error:
        if row.work.step == "decode" or row.work.attention != "auto" or job.target == "host":
            raise
        because = f"{type(error).__name__}: {str(error)[:1000]}"
    gc.collect()
    plain = replace(row, work=replace(row.work, attention="xla"))
    return measured_step(plain, job, results) | {"instead": {"attention": "xla", "because": because}}


def measured_step(row: Row, job: Job, results: Results) -> dict[str, Any]:
    """A step of ours: compiled, run untraced and traced, billed."""
    from . import measure

    assert row.work is not None
    start(row, job, results)
    programs = measure.Programs(built(row, job), job.target)
    programs.lower()
    if row.work.is_compiled_aside:
        with results.turn(row, exclusive=False):
            programs.compile()
    folder = results.folder / "profile" / row.name.replace("/", "_")
    shutil.rmtree(folder, ignore_errors=True)
    with results.turn(row, exclusive=True):
        if not row.work.is_compiled_aside:
            if job.target != "host":
                device_turns.wait_for_memory(COMPILER_BYTES)
            programs.compile()
        make_room(programs.needed_bytes)
        measured, said = _measured(row, job, results, programs, folder)
        gc.collect()  # of what it ran on nothing is left
    bill, more = _billed(measured, row, job, results)
    results.save_text("hlo", row.name, ".hlo.txt", measured.compilation.text)
    results.save_text("bills", row.name, ".json", bill.dumps())
    said |= more | {"work": asdict(row.work), "how": measured.how, "device": measured.device}
    said["untraced_seconds"], said["traced_seconds"] = measured.untraced_seconds, measured.traced_seconds
    said["lower_seconds"], said["compile_seconds"] = programs.lowered[1], programs.first.compile_seconds
    shutil.rmtree(folder, ignore_errors=True)
    return said | summary(bill, measured.median_seconds, row, job)


def _measured(
    row: Row, job: Job, results: Results, programs: "Programs", folder: Path
) -> tuple["Measurement", dict[str, Any]]:
    """The step, run on arguments that are not kept; and what it says beside."""
    from . import measure

    begin = time.perf_counter()
    step = _filled(programs.step)
    said: dict[str, Any] = {"fill_seconds": time.perf_counter() - begin}
    step, first = _first_run(step, programs.first.compiled)
    _save_first(results, row, step, first)
    timed_from, measured = time.time(), None
    try:
        measured = measure.measure(step, job.target, folder, programs=programs, repeats=10)
    except Exception as error:
        said |= _untraced(error)
    if measured is None:  # without a trace there is still the clock
        del step
        gc.collect()
        measured = measure.measure(_filled(programs.step), job.target, None, programs=programs, repeats=10)
    said["timed_between"] = [timed_from, time.time()]
    return replace(measured, step=programs.step), said


def _filled(step: "Step") -> "Step":
    import jax

    from . import known_weights

    return replace(step, arguments=jax.block_until_ready(known_weights.arguments(step)))


def _billed(measured: "Measurement", row: Row, job: Job, results: Results) -> tuple["Bill", dict[str, Any]]:
    """The bill, with what was measured where the trace can be read; and what is kept of the trace."""
    from .bill import bill_of

    step, compilation, said = measured.step, measured.compilation, dict[str, Any]()
    try:
        if traced := measured.traced:
            bill = bill_of(step, compilation, job.target, traced=traced, says=measured.says)
            return bill, _of_trace(measured, traced, row, results)
    except Exception as error:
        said = _untraced(error)
    return bill_of(step, compilation, job.target), said


def _untraced(error: Exception) -> dict[str, str]:
    """Why there is no trace; within the `except` that has the error."""
    said = f"{type(error).__name__}: {str(error)[:300]}"
    return {"trace_error": said, "trace_detail": traceback.format_exc()[-2000:]}


def built(row: Row, job: Job) -> "Step":
    """The step of a row, with abstract arguments; TooLarge where these alone are too much."""
    from ..profiling import targets
    from . import fit, steps

    assert row.work is not None
    config, work = row.work.config(), row.work
    capacity = targets.chip(job.target).usable_hbm_bytes
    needs = fit.estimate(config, work.step, work.batch, work.context, {})
    if capacity and needs > capacity:
        raise TooLarge(
            f"it needs at least {needs / GIB:.1f} GiB by estimate; {job.target} has {capacity / GIB:.1f} GiB"
        )
    return steps.build(config, work.step, batch=work.batch, context=work.context)


def _first_run(step: "Step", compiled: Any) -> tuple["Step", Any]:
    """One execution on the arguments as they were made: what came out, and the step as it can be run again."""
    import numpy as np

    from .measure import Runner

    runner = Runner(step, compiled)
    results = runner.first()
    first = np.asarray(results[2] if step.name == "train" else results[0], np.float32)
    return replace(step, arguments=tuple(runner.arguments)), first


def _save_first(results: Results, row: Row, step: "Step", first: Any) -> None:
    """What the peers must come to as well: the loss before the first update, or the logits of the first sequence."""
    import io

    import numpy as np

    if not np.all(np.isfinite(first)):
        raise ArithmeticError(f"{step.name} computes {int(np.sum(~np.isfinite(first)))} numbers that are not finite")
    buffer = io.BytesIO()
    np.save(buffer, first if step.name == "train" else first[0])
    write_whole(results.path("logits", row.name, ".npy"), buffer.getvalue())


def summary(bill: "Bill", seconds: float, row: Row, job: Job) -> dict[str, Any]:
    """What the table and the aims are made of; all else is in the bill."""
    from ..profiling import targets

    chip, total = targets.chip(job.target), bill.total
    assert row.work is not None
    peak, bandwidth = chip.peak_flops.get("bf16"), chip.hbm_bytes_per_second
    rows = [
        {
            "component": one.component,
            "phase": one.phase,
            "tax": one.tax,
            "hbm_bytes": one.work.hbm_bytes,
            "roofline_seconds": one.work.picoseconds / 1e12 if bill.timed else None,
            "measured_seconds": one.work.measured_picoseconds / 1e12 if bill.measured is not None else None,
        }
        for one in bill.rows
    ]
    return {
        "program": {key: bill.program[key] for key in ("model", "parameters", "active_parameters", "attention")},
        "seconds": seconds,
        "tokens_per_second": row.work.tokens / seconds,
        "roofline_seconds": total.picoseconds / 1e12 if bill.timed else None,
        "predicted_seconds": total.predicted_picoseconds / 1e12 if bill.predicted else None,
        "predicted_by": bill.predicted,
        "ideal": {"flops": bill.ideal_flops, "hbm_bytes": bill.ideal_hbm_bytes},
        "matmul_flops": total.matmul,
        "hbm_bytes": total.hbm_bytes,
        "requested_bytes": total.requested_bytes,
        "unattributed_hbm_bytes": bill.unattributed.hbm_bytes,
        "unknown": len(bill.unknown),
        "peak_bytes": bill.memory.get("peak_bytes"),
        "mfu": None if not peak or bill.ideal_flops is None else bill.ideal_flops / seconds / peak,
        "mbu": None if not bandwidth or not bill.ideal_hbm_bytes else bill.ideal_hbm_bytes / seconds / bandwidth,
        "rows": rows,
    }


# --- traces ----------------------------------------------------------------------------------------------------------


def _of_trace(measured: "Measurement", traced: "Trace", row: Row, results: Results) -> dict[str, Any]:
    """What is kept of a trace: the device's part of it, and which kernel was launched for which instruction."""
    from ..profiling import hlo
    from ..profiling.trace import typical

    data = traced.path.read_bytes()
    execution = typical(traced.executions(hlo.parse(measured.compilation.text)))
    begin = min(event.start_ps for event in execution.events)
    end = max(event.end_ps for event in execution.events)
    launched = [(kernel, owner) for start, kernel, owner in launches(data) if begin <= start <= end]
    results.save_text("launches", row.name, ".json", json.dumps(launched))
    write_whole(results.path("traces", row.name, ".xplane.pb.gz"), _gzipped(trimmed(data)))
    return {"kernels_launched": len(launched), "device_busy_seconds": execution.spent.busy_ps / 1e12}


def _gzipped(data: bytes) -> bytes:
    import gzip

    return gzip.compress(data, compresslevel=6, mtime=0)


def launches(xspace: bytes) -> list[tuple[int, str, str]]:
    """(picoseconds, kernel, instruction) of what a GPU ran, in its order: a serialised XSpace holds it by stream."""
    from jax.profiler import ProfileData

    warnings.filterwarnings("ignore", "builtin type event_stats", DeprecationWarning)  # of jax 0.11 on Python 3.12
    found = []
    for plane in ProfileData.from_serialized_xspace(xspace).planes:
        if plane.name == "/device:GPU:0":
            for line in plane.lines:
                for event in line.events if line.name.startswith("Stream") else ():
                    owner = dict(event.stats).get("hlo_op")
                    if owner is not None and not event.name.lower().startswith(("memcpy", "memset")):
                        found.append((round(event.start_ns * 1000), event.name, str(owner)))
    return sorted(found)


def trimmed(xspace: bytes) -> bytes:
    """A serialised XSpace without the planes that say nothing of a device, but for the CPU's where it is the device.

    XSpace has its planes in field 1, and a plane its name in field 2 (tsl/profiler/protobuf/xplane.proto).
    """
    planes = [(field, whole, value) for field, whole, value in _fields(xspace)]
    names = [
        next((bytes(name).decode(errors="replace") for field, _, name in _fields(value) if field == 2), "")
        if field == 1
        else None
        for field, _, value in planes
    ]
    wanted = r"/device:(GPU|TPU).*" if any(name and name.startswith("/device:GPU") for name in names) else r"/host:CPU"
    kept = (
        whole
        for (_, whole, _), name in zip(planes, names, strict=True)
        if name is not None and re.fullmatch(wanted, name)
    )
    return b"".join(kept)


def _fields(message: Any) -> Iterator[tuple[int, bytes, Any]]:
    """(number, the field as it is written, what it holds) of a protobuf message, in order."""
    view, at = memoryview(message), 0
    while at < len(view):
        start = at
        tag, at = _varint(view, at)
        kind, value = tag & 7, view[:0]
        if kind == 0:
            _, at = _varint(view, at)
        elif kind == 2:
            size, at = _varint(view, at)
            value, at = view[at : at + size], at + size
        elif kind in (1, 5):
            at += 8 if kind == 1 else 4
        else:
            raise ValueError(f"wire type {kind} at byte {start} is none of protobuf's")
        yield tag >> 3, bytes(view[start:at]), value


def _varint(view: memoryview, at: int) -> tuple[int, int]:
    number = shift = 0
    while True:
        byte, at = view[at], at + 1
        number |= (byte & 127) << shift
        if byte < 128:
            return number, at
        shift += 7


# --- counters --------------------------------------------------------------------------------------------------------


def run_counters(row: Row, job: Job, results: Results) -> dict[str, Any]:
    """DRAM bytes of one step by Nsight Compute, beside those of its bill."""
    from ..profiling.bill import Bill

    ncu = find_ncu()
    try:
        bill = Bill.from_json(json.loads(results.load_text("bills", row.of_step, ".json")))
    except FileNotFoundError:
        raise counters.CountersError(f"{row.of_step} has no bill to hold counters against: run it first") from None
    replays = (RANGE, KERNELS) if row.kind == "range" else (KERNELS,)
    reasons = []
    start(row, job, results)
    with results.turn(row, exclusive=True):
        _counted_program(job)  # ncu's process finds it compiled: under ncu, autotuning takes minutes
        device_turns.wait_for_memory((bill.memory["peak_bytes"] or 0) + MARGIN_BYTES)
        for replay in replays:
            command = ncu_command(ncu, replay, results.folder / "ncu.log", job, row)
            try:
                counted = _counted(command, results.folder / "ncu.log")
                break
            except counters.CountersError as error:
                reasons.append(f"{' '.join(replay)}: {error}")
        else:
            raise counters.CountersError("; ".join(reasons))
    total = bill.total
    said = {
        "command": command,
        "replay": " ".join(replay),
        "not_by": reasons,
        "kernels": len(counted),
        "read_bytes": sum(one.read_bytes for one in counted),
        "write_bytes": sum(one.write_bytes for one in counted),
        "bill": {
            "read_bytes": sum(total.hbm_read.values()),
            "write_bytes": sum(total.hbm_write.values()),
            "hbm_bytes": total.hbm_bytes,
            "reread_bytes": total.reread_bytes,
            "requested_bytes": total.requested_bytes,
        },
    }
    traced = results.path("launches", row.of_step, ".json.gz").exists()
    return said | (by_component(row, counted, job, results) if replay == KERNELS and traced else {})


def by_component(row: Row, counted: Sequence[counters.Counted], job: Job, results: Results) -> dict[str, Any]:
    """Counted bytes of each component beside the bill's: those of a kernel are split as its roofline time is."""
    from ..profiling import hlo, targets
    from ..profiling.walk import itemize_module

    launched = [(kernel, owner) for kernel, owner in json.loads(results.load_text("launches", row.of_step, ".json"))]
    measured, nobodys = counters.by_instruction(counted, launched)
    module = hlo.parse(results.load_text("hlo", row.of_step, ".hlo.txt"))
    # The walk shares out what each instruction was measured to take, be it time or bytes.
    bill = itemize_module(module, targets.chip(job.target), measured=measured)
    components: dict[str, dict[str, int]] = {}
    for one in bill.rows:
        of = components.setdefault(one.component, {f"{what}_bytes": 0 for what in BYTES})
        of["counted_bytes"] += one.work.measured_picoseconds
        of["hbm_bytes"] += one.work.hbm_bytes
        of["reread_bytes"] += one.work.reread_bytes
        of["requested_bytes"] += one.work.requested_bytes
    return {"components": components, "bytes_of_kernels_without_an_instruction": nobodys}


def find_ncu() -> str:
    """Where Nsight Compute is; CountersError."""
    found = [shutil.which("ncu"), *(path for place in NCU_PLACES for path in sorted(glob.glob(place), reverse=True))]
    ncu = next((path for path in found if path), None)
    if ncu is None:
        raise counters.CountersError("ncu (Nsight Compute) is not installed here")
    return ncu


def ncu_command(ncu: str, replay: Sequence[str], log: Path, job: Job, row: Row) -> list[str]:
    """ncu around one step in a process of its own. Clocks stay as they are, and so do caches between kernels."""
    metrics = f"{counters.READ},{counters.WRITE}"
    return [
        *(ncu, "--clock-control", "none", "--cache-control", "none", "--metrics", metrics, *replay),
        *("--csv", "--print-units", "base", "--force-overwrite", "--log-file", str(log)),
        *(sys.executable, "-m", "stepbill.experiments.device_worker"),
        *(json.dumps(asdict(replace(job, row=row.name))), "counted"),
    ]


def _counted(command: Sequence[str], log: Path) -> list[counters.Counted]:
    log.unlink(missing_ok=True)
    ran = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
    text = log.read_text(errors="replace") if log.exists() else ""
    try:
        return counters.parse(text)
    except counters.CountersError as error:
        last = (ran.stderr.strip().splitlines() or ["it said nothing"])[-1][:200]
        more = "" if ran.returncode == 0 else f" (status {ran.returncode}: {last})"
        raise counters.CountersError(f"{error}{more}") from None


def _counted_program(job: Job) -> tuple["Step", "Compilation"]:
    """The step that is counted, compiled, or found among what this run has compiled."""
    from ..profiling import targets
    from .measure import NAMED_KERNELS

    step = built(job.found(), job)
    options = step.compiler_options(targets.chip(job.target).platform) | NAMED_KERNELS
    return step, targets.compile(step.lower(), job.target, options=options)


def _count(job: Job) -> None:
    """Runs one step between the profiler's start and stop: the process that ncu is around."""
    from ..profiling import targets
    from .measure import Runner

    targets.prepare(job.target)
    step, compilation = _counted_program(job)
    make_room(compilation.memory.needed if compilation.memory else 0)
    runner = Runner(_filled(step), compilation.compiled)
    runner.seconds(2)
    with _profiled():
        runner.seconds(1)


@contextmanager
def _profiled() -> Iterator[None]:
    """Between start and stop of CUDA's profiler, on the context that all of this process shares."""
    import ctypes

    cuda, context = ctypes.CDLL("libcuda.so.1"), ctypes.c_void_p()

    def call(name: str, *arguments: Any) -> None:
        if status := getattr(cuda, name)(*arguments):
            raise RuntimeError(f"{name} failed with CUDA error {status}")

    call("cuInit", 0)
    call("cuDevicePrimaryCtxRetain", ctypes.byref(context), 0)
    call("cuCtxSetCurrent", context)
    call("cuProfilerStart")
    try:
        yield
    finally:
        call("cuProfilerStop")


# --- the other parts -------------------------------------------------------------------------------------------------


def run_ceiling(row: Row, job: Job, results: Results) -> dict[str, Any]:
    """What this device does at best: cubes of one class of operands, copies, or launches."""
    start(row, job, results)
    with results.turn(row, exclusive=True):
        make_room(CEILING_BYTES)
        begin = time.time()
        said = _calibrated(results) if row.kind == "calibration" else _rates(row.kind, job.tiny)
        return said | {"timed_between": [begin, time.time()]}


def _calibrated(results: Results) -> dict[str, Any]:
    from . import calibrate

    path = results.folder / CALIBRATION
    if status := calibrate.main([f"--out={path}"]):
        raise RuntimeError(f"calibrate ended with status {status}")
    return {"file": path.name}


def _rates(kind: str, tiny: bool) -> dict[str, Any]:
    from . import calibrate

    cases = _cases(kind, tiny)
    seconds = calibrate.timed(list(cases.values()), 3 if tiny else 9, 0.0 if tiny else SAMPLE_SECONDS)
    rates = {size: case.amount / of_case for (size, case), of_case in zip(cases.items(), seconds, strict=True)}
    return {UNITS.get(kind, "flops_per_second"): rates}


def _cases(kind: str, tiny: bool) -> dict[str, "calibrate.Case"]:
    """By size, what is timed."""
    from . import calibrate

    if kind == "launch":
        return {"launches": calibrate.launches(), "dispatches": calibrate.dispatches()}
    sides, copies, flops = (TINY_SIDES, TINY_COPIES, 10**7) if tiny else (SIDES, COPIES, CHAIN_FLOPS)
    if kind == "copy":
        sizes = calibrate.Sizes((), (), (), (), copies, footprints=(1,))
        return {str(size): case for (size, _), case in calibrate.copies(sizes, "copies")}
    cubes = (calibrate.Sizes((kind,), (n,), (n,), (n,), (), chain_flops=flops) for n in sides)
    return {str(m): case for sizes in cubes for (_, m, _, _), case in calibrate.matmuls(sizes)}


def run_peer(row: Row, job: Job, results: Results) -> dict[str, Any]:
    """The same step by torch."""
    from . import device_peers

    return device_peers.run(row, job.target, results)


RUN: dict[str, Callable[[Row, Job, Results], dict[str, Any]]] = {
    "ceilings": run_ceiling,
    "steps": run_step,
    "counters": run_counters,
    "peers": run_peer,
}


if __name__ == "__main__":
    sys.exit(main())
