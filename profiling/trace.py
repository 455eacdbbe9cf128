"""Device traces: the xplane that jax.profiler writes -> picoseconds of each instruction in one execution of a program.

A trace names what ran and when, and not what it belongs to; the compiled HLO beside it does, and both join on the names
of instructions. Time is shared out by one sweep over it, in integers that add up to the time the device was busy:

- Parallel tasks of one instruction count once: their union.
- Of several instructions that run at once, each gets an equal share of that moment.
- What is under way without running on the core (an asynchronous copy between its start and its end; on a CPU a thunk
  whose tasks wait in the thread pool) has a moment only where nothing runs.
- A while, call or conditional encloses what runs inside it and has no time of its own. Moments inside one in which
  nothing runs are idle, and told apart.
- An event whose name no instruction has keeps that name: on the bill it is nobody's, never dropped.

Formats: XSpace (tsl/profiler/protobuf/xplane.proto). Names of planes and lines: tsl/profiler/utils/xplane_schema.cc.
"""

import gzip
import math
import re
import statistics
import zlib
from bisect import bisect_right
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from .bill import Bill, apportion
from .chips import Chip
from .harmless import visible
from .hlo import Instruction, Module
from .roofline import PICOSECONDS
from .targets import quiet

ENCLOSING = frozenset(("while", "call", "conditional"))
SUFFIXES = (".xplane.pb", ".xplane.pb.gz")
RUNS_FOLDER = Path("plugins") / "profile"  # below the folder that jax.profiler was given
NO_COMMAND_BUFFERS = "XLA_FLAGS=--xla_gpu_enable_command_buffer="


class TraceError(ValueError):
    """What is wrong with a trace, in one line."""


class Event(NamedTuple):
    """One event of a device, in picoseconds since the trace began (ProfileData counts whole nanoseconds).

    name: of the instruction, or the event's own where it says none. end_ps: until when it ran; done_ps: until when it
      was under way, at least end_ps.
    device: cpu:0, gpu:0, tpu:0, ... module, program, run: which program and which execution of it, as far as it says.
    """

    name: str
    start_ps: int
    end_ps: int
    done_ps: int
    device: str
    module: str | None = None
    program: int | None = None
    run: int | None = None


# --- one sweep over time -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spent:
    """Where the time of one execution went, in picoseconds.

    by_name: sums to busy_ps exactly. span_ps: from the first event to the end of the last: busy and idle.
    gaps_ps: each stretch in which nothing ran. loop_ps: of these, what is inside loops, calls and conditionals.
    """

    by_name: Mapping[str, int]
    busy_ps: int
    span_ps: int
    loop_ps: int
    gaps_ps: tuple[int, ...]

    @property
    def idle_ps(self) -> int:
        """Nothing ran."""
        return sum(self.gaps_ps)


def sweep(events: Iterable[Event], enclosing: Collection[str] = ()) -> Spent:
    """Shares out the time of `events`, all of one device; `enclosing` names those that only count through others."""
    running, waiting, around = range(3)
    edges: list[tuple[int, int, int, str]] = []  # when, +1 or -1, into which of the three, whose
    for event in events:
        kind = around if event.name in enclosing else running
        spans = [(kind, event.start_ps, event.done_ps if kind == around else event.end_ps)]
        if kind == running:
            spans.append((waiting, event.start_ps, event.done_ps))
        for kind, start, end in spans:
            if end > start:
                edges += [(start, 1, kind, event.name), (end, -1, kind, event.name)]
    edges.sort()
    active: tuple[dict[str, int], ...] = ({}, {}, {})  # name -> how many events of it
    shared: dict[str, dict[int, int]] = {}  # name -> with how many others it shared how much time
    loop, gap, gaps, now = 0, 0, [], edges[0][0] if edges else 0
    start = now
    for when, change, kind, name in edges:
        if when > now:
            at_work = active[running] or active[waiting]
            for one in at_work:
                among = shared.setdefault(one, {})
                among[len(at_work)] = among.get(len(at_work), 0) + when - now
            if at_work:
                gaps += [gap] if gap else []
                gap = 0
            else:
                gap += when - now
                loop += when - now if active[around] else 0
            now = when
        count = active[kind].get(name, 0) + change
        if count:
            active[kind][name] = count
        else:
            del active[kind][name]
    gaps += [gap] if gap else []
    busy = now - start - sum(gaps)
    # Exactly: in units of which every share is a whole number, then rounded once.
    unit = math.lcm(*{count for among in shared.values() for count in among})
    weights = [sum(time * unit // count for count, time in among.items()) for among in shared.values()]
    by_name = dict(zip(shared, apportion(busy, weights), strict=True))
    return Spent(by_name, busy, now - start, loop, tuple(gaps))


# --- executions of one program -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Execution:
    """What one device did in one execution of a program."""

    device: str
    events: Sequence[Event] = field(repr=False)
    instructions: Mapping[str, Instruction] = field(repr=False)

    @cached_property
    def spent(self) -> Spent:
        """Its time, shared out."""
        return sweep(self.events, {name for name, i in self.instructions.items() if i.opcode in ENCLOSING})

    @property
    def unjoined(self) -> dict[str, int]:
        """The time of what no instruction is called."""
        return {name: time for name, time in self.spent.by_name.items() if name not in self.instructions}


@dataclass(frozen=True)
class Trace:
    """All that devices did. notes: what a reader must know of how it was read."""

    path: Path
    events: Sequence[Event] = field(repr=False)
    notes: tuple[str, ...] = ()

    def executions(self, module: Module) -> list[Execution]:
        """Every execution of `module` on one device, in order: of several devices, the one that was busiest with it.

        Where several programs have the module's name, it is the one whose names join best. Events that say no execution
        (those of a GPU) are told apart by how often what runs once in each comes.

        Raises:
          TraceError: the trace has no execution of it, or none of their names is an instruction of it.
        """
        instructions = module.instructions
        joined: dict[tuple[bool, int | None], int] = {}
        for event in self.events:
            if event.module == module.name:
                program = (not event.device.startswith("cpu"), event.program)
                time = event.done_ps - event.start_ps if event.name in instructions else 0
                joined[program] = joined.get(program, 0) + time
        if not joined and all(event.module is None for event in self.events):
            joined[True, None] = 1  # nothing says a name: all of it is nobody's
        if not joined:
            raise TraceError(f"{self._where} has no execution of {visible(module.name)}: {self._has()}")
        on_chip, program = max(joined, key=lambda one: joined[one])
        if not joined[on_chip, program]:
            raise TraceError(
                f"{self._where} is of another program than the HLO: it has executions of {visible(module.name)}, but "
                f"no name in them is an instruction's"
            )
        by_device: dict[str, list[Event]] = {}
        for event in self.events:
            if on_chip != event.device.startswith("cpu"):
                by_device.setdefault(event.device, []).append(event)
        once = {i.name for i in module.entry.instructions}
        found = [
            [
                Execution(device, run, instructions)
                for run in _runs(_unwrapped(events, module), module.name, program, once)
            ]
            for device, events in by_device.items()
        ]
        return max(found, key=lambda runs: sum(run.spent.busy_ps for run in runs))

    @property
    def _where(self) -> str:
        return visible(str(self.path))

    def _has(self) -> str:
        """What it has instead."""
        modules = sorted({event.module for event in self.events if event.module is not None})
        has = f"it has {', '.join(map(visible, modules[:5]))}{', ...' if len(modules) > 5 else ''}"
        return has + self.lost_names() * f", and kernels without names; with {NO_COMMAND_BUFFERS} they have them"

    def lost_names(self) -> bool:
        """Whether kernels of a GPU say no instruction, as they do inside command buffers."""
        return any(event.module is None and event.device.startswith("gpu") for event in self.events)


def _unwrapped(events: Sequence[Event], module: Module) -> Sequence[Event]:
    """The events of a device, with those of fusions that run beside others under the names that the HLO has for them.

    A GPU's trace calls what lies between a fusion-start and its fusion-done by the name of the fusion inside, and the
    text of the HLO does not show that one. Both say the kind (`fused_dynamic_slice.1.clone` is a
    `loop_dynamic_slice_fusion.4`), and of a kind the first to begin is the first of the program. Where there are not as
    many of both, names stay as they are.
    """
    instructions, starts, inner = module.instructions, dict[str, list[str]](), dict[str, list[str]]()
    for instruction in instructions.values():
        if instruction.opcode == "fusion-start" and (
            kind := re.match(r"fused_(\w+?)(?:\.|$)", instruction.called[0].name)
        ):
            starts.setdefault(kind[1], []).append(instruction.name)
    if not starts:
        return events
    for event in sorted(events, key=lambda event: event.start_ps):
        if event.module == module.name and event.name not in instructions:
            kind = re.match(r"[a-z]+_(\w+)_fusion(?:\.|$)", event.name)
            names = inner.setdefault(kind[1], []) if kind else []
            if event.name not in names:
                names.append(event.name)
    known = {
        name: start
        for kind, names in inner.items()
        if len(names) == len(starts.get(kind, ()))
        for name, start in zip(names, starts[kind], strict=True)
    }
    return [event._replace(name=known.get(event.name, event.name)) for event in events]


def typical(executions: Sequence[Execution]) -> Execution:
    """The one of median span (of an even number, the shorter of the middle two): whole, so that its parts add up."""
    return sorted(executions, key=lambda one: one.spent.span_ps)[(len(executions) - 1) // 2]


def _runs(events: Sequence[Event], module: str, program: int | None, once: Collection[str]) -> list[list[Event]]:
    """The events of one device by execution of one program, in order of their starts.

    once: names of instructions that an execution comes by once.
    """
    ours = [event for event in events if event.module == module and event.program == program]
    others = [event for event in events if event.module not in (module, None) or event.program != program]
    nameless = [event for event in events if event.module is None]
    if not ours:
        return [nameless] if nameless else []
    if all(event.run is not None for event in ours):
        runs: dict[Any, list[Event]] = {}
        for event in ours:
            runs.setdefault(event.run, []).append(event)
    else:
        starts = _starts(ours, once)
        runs = {}
        for event in ours:
            runs.setdefault(max(0, bisect_right(starts, event.start_ps) - 1), []).append(event)
    # A kernel without a name is of whatever was begun last before it.
    marks = [(event.start_ps, run) for run, of_run in runs.items() for event in of_run]
    marks += [(event.start_ps, None) for event in others if event.module is not None]
    if nameless:
        marks.sort(key=lambda mark: mark[0])
        times = [time for time, _ in marks]
        for event in nameless:
            _, run = marks[max(0, bisect_right(times, event.start_ps) - 1)]
            if run in runs:
                runs[run].append(event)
    return sorted(runs.values(), key=lambda run: min(event.start_ps for event in run))


def _starts(events: Sequence[Event], once: Collection[str]) -> list[int]:
    """When each execution began, where events do not say of which they are.

    Most instructions of the entry have one event an execution, so the commonest number of events is that of
    executions. Of those that have several in each, every so many-th is the first of its execution.
    """
    times: dict[str, list[int]] = {}
    for event in events:
        if event.name in once:
            times.setdefault(event.name, []).append(event.start_ps)
    if not times:
        return [min(event.start_ps for event in events)]
    count = min(statistics.multimode(len(of_one) for of_one in times.values()))
    firsts = [sorted(of_one)[:: len(of_one) // count] for of_one in times.values() if len(of_one) % count == 0]
    return sorted(min(nth) for nth in zip(*firsts, strict=True))


# --- on the bill ---------------------------------------------------------------------------------------------------

SPLIT = "time inside one fusion cannot be measured: it is split by the fusion's roofline shares"
MOST_UNJOINED = 10


def facts(
    bill: Bill, executions: Sequence[Execution], chip: Chip, says: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """What `Bill.measured` holds: a run as a whole. The rows of the bill are to be of `typical(executions)`.

    says: what is known beside the trace: device, how, untraced_seconds and traced_seconds by the clock.

    Keys, all JSON values; null is unknown:
      device; how: it was timed; split: how time inside a fusion is.
      steps: executions traced. traced_seconds: of each, on the device from its first event to the end of its last;
        traced_clock_seconds: of each, by the clock of the host; untraced_seconds: likewise, of executions that were not
        traced, which is production speed. *_median_seconds: their medians.
      busy_seconds, idle_seconds: of the typical execution; loop_seconds: of the idle ones, those inside loops.
      gaps: {count, largest_seconds}: stretches in which nothing ran.
      joined: share of busy time whose name is an instruction of the HLO; unjoined: the longest of the others, by name.
      coverage: share of busy time that a component is named for.
      seconds: what the rates are by: the untraced median or, without one, the traced.
      flops_per_second: of matmul; hbm_bytes_per_second: as the bill counts them.
      mfu: the least FLOPs (Bill.ideal_flops) per second over the chip's bf16 peak. mbu: the least HBM bytes
        (Bill.ideal_hbm_bytes) per second over its peak.
    """
    says = dict(says or {})
    spent = typical(executions).spent
    spans = [one.spent.span_ps / PICOSECONDS for one in executions]
    clock, untraced = says.get("traced_seconds"), says.get("untraced_seconds")
    seconds = statistics.median(untraced or spans)
    attributed = bill.total.measured_picoseconds - bill.unattributed.measured_picoseconds
    unjoined = dict(sorted(typical(executions).unjoined.items(), key=lambda one: -one[1]))

    def per_second(amount: int | None) -> float | None:
        return None if amount is None or not seconds else amount / seconds

    def over(rate: float | None, peak: int | None) -> float | None:
        return None if rate is None or peak is None else rate / peak

    return {
        "device": says.get("device") or executions[0].device,
        "how": says.get("how") or f"{len(executions)} executions in a trace",
        "split": SPLIT,
        "steps": len(executions),
        "traced_seconds": spans,
        "traced_median_seconds": statistics.median(spans),
        "traced_clock_seconds": clock,
        "traced_clock_median_seconds": statistics.median(clock) if clock else None,
        "untraced_seconds": untraced,
        "untraced_median_seconds": statistics.median(untraced) if untraced else None,
        "busy_seconds": spent.busy_ps / PICOSECONDS,
        "idle_seconds": spent.idle_ps / PICOSECONDS,
        "loop_seconds": spent.loop_ps / PICOSECONDS,
        "gaps": {"count": len(spent.gaps_ps), "largest_seconds": max(spent.gaps_ps, default=0) / PICOSECONDS},
        "joined": 1 - sum(unjoined.values()) / spent.busy_ps if spent.busy_ps else None,
        "unjoined": {name: unjoined[name] / PICOSECONDS for name in [*unjoined][:MOST_UNJOINED]},
        "coverage": attributed / spent.busy_ps if spent.busy_ps else None,
        "seconds": seconds,
        "flops_per_second": per_second(bill.total.matmul),
        "hbm_bytes_per_second": per_second(bill.total.hbm_bytes),
        "mfu": over(per_second(bill.ideal_flops), chip.peak_flops.get("bf16")),
        "mbu": over(per_second(bill.ideal_hbm_bytes), chip.hbm_bytes_per_second),
    }


# --- reading -------------------------------------------------------------------------------------------------------


def read(path: str | Path) -> Trace:
    """The trace in a file (*.xplane.pb, or gzipped), or the newest in a folder that jax.profiler wrote to.

    Raises:
      TraceError: there is none, it cannot be read, or it has no event of a device.
    """
    file, notes = find(path)
    where = visible(str(file))
    try:
        data = file.read_bytes()
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        said = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise TraceError(f"{where}: {said}") from None
    from jax.profiler import ProfileData  # not at the top: bills without a trace need no jax

    try:
        with quiet():
            events = list(_events(ProfileData.from_serialized_xspace(data)))
    except (RuntimeError, UnicodeDecodeError):
        raise TraceError(f"{where} is no xplane, or a truncated one: {len(data)} bytes that do not parse") from None
    if not events:
        raise TraceError(f"{where} has no event of a device" + (": it is empty" if not data else ""))
    return Trace(file, events, notes)


def find(path: str | Path) -> tuple[Path, tuple[str, ...]]:
    """The file meant by `path`: itself or, of a folder, the newest; and a note that names the others, if any."""
    path = Path(path)
    try:
        if not path.is_dir():
            path.open("rb").close()
            return path, ()
        files = [file for file in path.rglob("*") if file.name.endswith(SUFFIXES)]
    except OSError as error:
        raise TraceError(f"{visible(str(path))}: cannot read it: {(error.strerror or str(error)).lower()}") from None
    if not files:
        raise TraceError(f"{visible(str(path))} holds no *{SUFFIXES[0]}: jax.profiler.trace(DIR) writes one")
    # jax calls the folder of a run by its time.
    newest, *others = sorted(files, key=lambda file: (file.parent.name, file.name), reverse=True)
    if not others:
        return newest, ()
    named = visible(str(newest.relative_to(path)))
    return newest, (f"of {len(files)} traces in {visible(str(path))} the newest, {named}",)


def _events(data: Any) -> Iterator[Event]:
    for plane in data.planes:
        device = re.fullmatch(r"/device:(GPU|TPU):(\d{1,9})", plane.name)
        if device and device[1] == "GPU":
            yield from _gpu_events(plane, f"gpu:{device[2]}")
        elif device:
            yield from _tpu_events(plane, f"tpu:{device[2]}")
        elif plane.name == "/host:CPU":
            yield from _cpu_events(plane)


def _picoseconds(event: Any) -> tuple[int, int]:
    start = round(event.start_ns * 1000)
    return start, start + max(0, round(event.duration_ns * 1000))


def _cpu_events(plane: Any) -> Iterator[Event]:
    """A thunk's event ends when it has handed its tasks to the thread pool; `end: NAME`, which it is linked to, comes
    when they are done."""
    begun: dict[Any, Event] = {}
    ends: list[tuple[Any, int]] = []
    for line in plane.lines:
        for event in line.events:
            name = event.name
            if name.startswith("$"):  # of the tracer of Python, by far most of what there is
                continue
            stats = dict(event.stats)
            if name.startswith("end: "):
                ends.append((stats.get("_c"), _picoseconds(event)[0]))
            elif isinstance(called := stats.get("hlo_op"), str):
                start, end = _picoseconds(event)
                device = f"cpu:{stats.get('device_ordinal', 0)}"
                one = Event(called, start, end, end, device, *_program(stats))
                begun[stats.get("_p", len(begun))] = one
    for link, time in ends:
        if link in begun and time > begun[link].done_ps:
            begun[link] = begun[link]._replace(done_ps=time)
    yield from begun.values()


def _program(stats: Mapping[str, Any]) -> tuple[str | None, int | None, int | None]:
    module, *numbers = (stats.get(name) for name in ("hlo_module", "program_id", "run_id"))
    program, run = (number if isinstance(number, int) else None for number in numbers)
    return module if isinstance(module, str) else None, program, run


def _gpu_events(plane: Any, device: str) -> Iterator[Event]:
    """Kernels, copies and fills on every stream, without the transfers that are no instruction's."""
    for line in plane.lines:
        if not line.name.startswith("Stream"):
            continue
        for event in line.events:
            stats = dict(event.stats)
            called = stats.get("hlo_op")
            if called is None and re.match("Memcpy(H2D|D2H)", event.name, re.IGNORECASE):
                continue
            start, end = _picoseconds(event)
            yield Event(called if isinstance(called, str) else event.name, start, end, end, device, *_program(stats))


def _tpu_events(plane: Any, device: str) -> Iterator[Event]:
    """What the core runs, and the copies under way beside it. An event's name is the instruction's text; of which
    program it is, the line of modules says, by time."""
    lines = {line.name: list(line.events) for line in plane.lines}
    modules = sorted((*_picoseconds(event), event.name) for event in lines.get("XLA Modules", ()))
    starts = [start for start, _, _ in modules]
    for name, runs in (("XLA Ops", True), ("Async XLA Ops", False)):
        for event in lines.get(name, ()):
            start, end = _picoseconds(event)
            run = bisect_right(starts, start) - 1
            of: tuple[Any, ...] = ()
            if run >= 0 and start < modules[run][1]:
                called, _, program = modules[run][2].rstrip(")").partition("(")
                of = (called, int(program) if program.isdecimal() else None, run)
            yield Event(_instruction_name(event.name), start, end if runs else start, end, device, *of)


def _instruction_name(text: str) -> str:
    """`%fusion.1 = f32[8]{0} fusion(%p)` or `fusion.1` -> `fusion.1`."""
    return text.split(" = ", 1)[0].lstrip("%")
