"""Traces: how time is shared out, what joins the program, what is told apart, and what is refused."""

import copy
import csv
import gzip
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from functools import cache
from pathlib import Path

import pytest
from capture_traces import EXECUTIONS, TRACES
from compiled import ready
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.profiler import ProfileData
from stepbill.experiments import measure
from stepbill.profiling import calibration, dumps, hlo, render, targets, trace
from stepbill.profiling.bill import Bill
from stepbill.profiling.trace import Event, Execution
from stepbill.profiling.walk import itemize_module

CAPTURED = sorted(folder.name for folder in TRACES.iterdir())
ON_CAPTURED = pytest.mark.parametrize("name", CAPTURED)

# --- how time is shared out ----------------------------------------------------------------------------------------

NAMES = ("a", "b", "c", "while", "call")
TIMES = st.tuples(*[st.integers(0, 12)] * 3).map(sorted)
EVENTS = st.lists(
    st.builds(lambda name, times: Event(name, *times, "gpu:0"), st.sampled_from(NAMES), TIMES), max_size=9
)


def slowly(events: Sequence[Event], enclosing: Sequence[str]) -> tuple[dict[str, Fraction], int, list[int]]:
    """What each name gets, the time inside loops and the gaps, picosecond by picosecond."""
    parts: dict[str, Fraction] = {}
    loop, gaps, last = 0, [], None
    for now in range(13):
        around = any(e.name in enclosing and e.start_ps <= now < e.done_ps for e in events)
        leaves = [e for e in events if e.name not in enclosing]
        begun = around or any(e.start_ps <= now < e.done_ps for e in leaves)
        running = {e.name for e in leaves if e.start_ps <= now < e.end_ps}
        running = running or {e.name for e in leaves if e.start_ps <= now < e.done_ps}
        for name in running:
            parts[name] = parts.get(name, Fraction(0)) + Fraction(1, len(running))
        if running or begun:
            last = now
        loop += bool(around and not running)
        if running:
            gaps.append(0)
        elif gaps or begun:
            gaps = gaps or [0]
            gaps[-1] += 1
    ended = 12 - last if last is not None else 0  # after the last event there is no gap
    if gaps and ended:
        gaps[-1] -= ended
    return parts, loop, [gap for gap in gaps if gap]


@given(EVENTS)
@settings(max_examples=400)
def test_the_sweep_shares_every_picosecond_as_the_slow_way_does(events):
    spent = trace.sweep(events, ("while", "call"))
    parts, loop, gaps = slowly(events, ("while", "call"))
    assert spent.by_name.keys() == parts.keys()
    assert all(abs(spent.by_name[name] - parts[name]) < 1 for name in parts)
    assert spent.busy_ps == sum(spent.by_name.values()) == sum(parts.values())
    assert (spent.loop_ps, list(spent.gaps_ps)) == (loop, gaps)
    assert spent.span_ps == spent.busy_ps + spent.idle_ps


def event(name: str, start: int, end: int, done: int = 0) -> Event:
    return Event(name, start, end, max(end, done), "cpu:0")


def test_the_rules_one_by_one():
    assert trace.sweep([event("a", 0, 6), event("a", 3, 10)]).by_name == {"a": 10}  # parallel tasks: their union
    assert trace.sweep([event("a", 0, 6), event("b", 4, 10)]).by_name == {"a": 5, "b": 5}
    waits = trace.sweep([event("copy", 0, 1, done=9), event("b", 2, 7)])
    assert waits.by_name == {"copy": 4, "b": 5}  # under way for nine, alone with that in four
    loop = trace.sweep([event("while", 0, 10), event("a", 1, 4), event("a", 6, 9)], {"while"})
    assert (dict(loop.by_name), loop.loop_ps, loop.gaps_ps) == ({"a": 6}, 4, (1, 2, 1))
    nothing = trace.sweep([])
    assert (dict(nothing.by_name), nothing.span_ps, nothing.gaps_ps) == ({}, 0, ())


def test_the_typical_execution_is_one_of_them_whole():
    executions = [Execution("cpu:0", [event("a", 0, span)], {}) for span in (5, 1, 9, 7)]
    assert trace.typical(executions).spent.span_ps == 5
    assert trace.typical(executions[:3]).spent.span_ps == 5


# --- traces of this project's own steps on a CPU ------------------------------------------------------------------


@cache
def captured(name: str) -> tuple[trace.Trace, hlo.Module]:
    read = trace.read(TRACES / name)
    path, _ = measure.saved(read)
    assert path is not None
    return read, hlo.parse(dumps.read(path))


def billed(name: str, target: str = "host") -> Bill:
    read, module = captured(name)
    executions = read.executions(module)
    spent = trace.typical(executions).spent
    bill = itemize_module(module, targets.chip(target), measured=spent.by_name)
    bill.measured = trace.facts(bill, executions, targets.chip(target))
    return bill


def union(spans: list[tuple[int, int]]) -> int:
    total, last = 0, 0
    for start, end in sorted(spans):
        total, last = total + max(0, end - max(start, last)), max(last, end)
    return total


@ON_CAPTURED
def test_captured_traces_join_their_program_and_nothing_is_lost(name):
    read, module = captured(name)
    opcode = {i.name: i.opcode for computation in module.computations.values() for i in computation.instructions}
    executions = read.executions(module)
    assert len(executions) == EXECUTIONS
    ours = [event for event in read.events if event.module == module.name]
    assert len(ours) == sum(len(one.events) for one in executions) and not any(one.unjoined for one in executions)
    for one in executions:
        leaves = [event for event in one.events if opcode[event.name] not in trace.ENCLOSING]
        spent = one.spent
        assert spent.by_name.keys() == {event.name for event in leaves if event.done_ps > event.start_ps}
        assert spent.busy_ps == union([(event.start_ps, event.done_ps) for event in leaves])
        loops = [(e.start_ps, e.done_ps) for e in one.events if opcode[e.name] in trace.ENCLOSING]
        assert bool(loops) == ("decode" not in name) and spent.loop_ps <= union(loops)
        assert spent.loop_ps == union([(e.start_ps, e.done_ps) for e in one.events]) - spent.busy_ps
    starts = [min(event.start_ps for event in one.events) for one in executions]
    assert starts == sorted(starts)


@ON_CAPTURED
def test_thunks_of_a_cpu_are_under_way_until_they_end(name):
    """Without the events that say so, a loop would seem to end before what it runs."""
    read, module = captured(name)
    for one in read.executions(module):
        loops = [e for e in one.events if one.instructions[e.name].opcode == "while"]
        bodies = {i.name for i in module.computations.values() if i is not module.entry for i in i.instructions}
        inside = [e for e in one.events if e.name in bodies and e not in loops]
        assert all(any(w.start_ps <= e.start_ps and e.end_ps <= w.done_ps for w in loops) for e in inside)
        assert bool(inside) == bool(loops)


@ON_CAPTURED
def test_the_bill_of_a_trace_adds_up_and_names_nearly_all_of_it(name):
    bill = billed(name)
    bill.check()
    facts = bill.measured
    assert facts is not None
    spent = trace.typical(captured(name)[0].executions(captured(name)[1])).spent
    assert bill.total.measured_picoseconds == spent.busy_ps == round(facts["busy_seconds"] * 1e12)
    assert facts["steps"] == EXECUTIONS == len(facts["traced_seconds"]) and facts["joined"] == 1
    assert facts["coverage"] > 0.99  # 0.9999 and more when these were captured
    assert facts["gaps"]["count"] == len(spent.gaps_ps)
    assert (facts["mfu"], facts["mbu"], facts["untraced_seconds"]) == (None, None, None)
    assert bill.component("mlp").measured_picoseconds > bill.component("embed").measured_picoseconds


def test_utilisation_is_the_least_work_over_the_peaks():
    bill, h200 = billed(CAPTURED[0], "h200"), targets.chip("h200")
    facts = bill.measured
    assert facts is not None and bill.ideal_flops and bill.ideal_hbm_bytes and h200.hbm_bytes_per_second
    assert facts["seconds"] == facts["traced_median_seconds"]
    assert facts["mfu"] == pytest.approx(bill.ideal_flops / facts["seconds"] / h200.peak_flops["bf16"])
    assert facts["mbu"] == pytest.approx(bill.ideal_hbm_bytes / facts["seconds"] / h200.hbm_bytes_per_second)
    assert facts["flops_per_second"] == pytest.approx(bill.total.matmul / facts["seconds"])
    entry = bill.to_json()["rows"][0]
    assert entry["over_roofline"] == pytest.approx(entry["seconds"]["measured"] / entry["seconds"]["roofline"])
    assert "measured" in str(bill) and "roofline" in str(bill)


def test_production_speed_is_of_untraced_runs_where_they_are_known():
    read, module = captured(CAPTURED[0])
    says = {"device": "a chip", "how": "so", "untraced_seconds": [1.0, 4.0, 2.0], "traced_seconds": [5.0]}
    bill = itemize_module(module, targets.chip("host"), measured={})
    facts = trace.facts(bill, read.executions(module), targets.chip("host"), says)
    assert (facts["seconds"], facts["untraced_median_seconds"], facts["traced_clock_median_seconds"]) == (2.0, 2.0, 5.0)
    assert facts["device"] == "a chip"


# --- traces of a GPU and of a TPU, made in their format ------------------------------------------------------------

PROGRAM = """HloModule jit_f

%body (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %inner.1 = f32[8]{0} negate(%p)
}

%condition (q: f32[8]) -> pred[] {
  %q = f32[8]{0} parameter(0)
  ROOT %more = pred[] constant(true)
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  %first.1 = f32[8]{0} negate(%a)
  %loop.1 = f32[8]{0} while(%first.1), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"2"}}
  %copy-start.1 = (f32[8]{0}, f32[8]{0}, u32[]) copy-start(%loop.1)
  %twice.1 = f32[8]{0} exponential(%loop.1)
  ROOT %last.1 = f32[8]{0} add(%twice.1, %loop.1)
}
"""
Stats = dict[str, str | int]
Line = list[tuple[str, int, int, Stats]]  # name, start and duration in ns, stats


def xplane(path: Path, planes: dict[str, dict[str, Line]]) -> Path:
    """A file in the format of tsl/profiler/protobuf/xplane.proto."""
    text = []
    for plane, lines in planes.items():
        events, stats = {}, {}
        body = []
        for number, (line, of_line) in enumerate(lines.items()):
            said = []
            for name, start, duration, about in of_line:
                values = []
                for key, value in about.items():
                    kind = "str_value" if isinstance(value, str) else "uint64_value"
                    values.append(
                        f"stats {{ metadata_id: {stats.setdefault(key, len(stats) + 1)} {kind}: {json.dumps(value)} }}"
                    )
                which = events.setdefault(name, len(events) + 1)
                said.append(
                    f"events {{ metadata_id: {which} offset_ps: {start}000 duration_ps: {duration}000 "
                    f"{' '.join(values)} }}"
                )
            body.append(f"lines {{ id: {number} name: {json.dumps(line)} {' '.join(said)} }}")
        for kind, known in (("event", events), ("stat", stats)):
            for name, key in known.items():
                body.append(f"{kind}_metadata {{ key: {key} value {{ id: {key} name: {json.dumps(name)} }} }}")
        text.append(f"planes {{ name: {json.dumps(plane)} {' '.join(body)} }}")
    path.write_bytes(ProfileData.text_proto_to_serialized_xspace("\n".join(text)))
    return path


def kernel(
    name: str, start: int, duration: int, op: str | None = None, module: str = "jit_f"
) -> tuple[str, int, int, Stats]:
    return name, start, duration, {} if op is None else {"hlo_op": op, "hlo_module": module, "program_id": 3}


def gpu(start: int) -> dict[str, Line]:
    """One execution: two kernels are of one instruction, one says nothing, and two streams overlap."""
    return {
        "Stream #1(Compute)": [
            kernel("negate", start, 100, "first.1"),
            kernel("negate", start + 100, 50, "inner.1"),
            kernel("negate", start + 200, 50, "inner.1"),
            kernel("gemm", start + 300, 100, "twice.1"),
            kernel("gemm_reduce", start + 400, 20, "twice.1"),
            kernel("in_a_graph", start + 450, 30),
            kernel("add", start + 500, 10, "last.1"),
        ],
        "Stream #2(MemcpyD2D)": [kernel("MemcpyD2D", start + 350, 100, "copy-start.1")],
        "Stream #3(MemcpyH2D)": [kernel("MemcpyH2D", start - 90, 80)],
        "XLA Ops": [kernel("derived", start, 1000, "first.1")],
    }


def nanoseconds(by_name: Mapping[str, int]) -> dict[str, float]:
    return {name: time / 1000 for name, time in by_name.items()}


def joined(*runs: dict[str, Line]) -> dict[str, Line]:
    return {line: [event for run in runs for event in run[line]] for line in runs[0]}


GPU_NAMES = {"first.1": 100, "inner.1": 100, "twice.1": 85, "copy-start.1": 65, "in_a_graph": 30, "last.1": 10}


def test_kernels_of_a_gpu(tmp_path):
    lines = joined(gpu(1000), gpu(3000), gpu(5000))
    lines["Stream #1(Compute)"] += [kernel("copy", 1800, 500, "copy.1", "jit_copy"), kernel("other", 2350, 5)]
    read = trace.read(xplane(tmp_path / "a.xplane.pb", {"/device:GPU:0": lines}))
    executions = read.executions(hlo.parse(PROGRAM))
    assert [nanoseconds(one.spent.by_name) for one in executions] == [GPU_NAMES] * 3
    assert [one.spent.span_ps for one in executions] == [510_000] * 3
    assert all(set(one.unjoined) == {"in_a_graph"} for one in executions) and read.lost_names()


def test_a_gpu_without_any_name_is_nobodys_and_not_dropped(tmp_path):
    lines = {"Stream #1(Compute)": [kernel("in_a_graph", 10, 30), kernel("another", 50, 5)]}
    read = trace.read(xplane(tmp_path / "a.xplane.pb", {"/device:GPU:0": lines}))
    (one,) = read.executions(hlo.parse(PROGRAM))
    bill = itemize_module(hlo.parse(PROGRAM), targets.chip("h200"), measured=one.spent.by_name)
    assert bill.unattributed.measured_picoseconds == bill.total.measured_picoseconds == 35_000


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_executions_are_told_apart_without_being_numbered(data):
    """Whatever runs once in each, as long as most of it is one kernel; loops may turn as often as they like."""
    count = data.draw(st.integers(1, 5))
    entry = [f"e{n}" for n in range(data.draw(st.integers(1, 6)))]
    double = set(data.draw(st.permutations(entry))[: (len(entry) - 1) // 2])  # fewer than half
    now, truth, events = 0, [], []
    for run in range(count):
        names = [name for name in entry for _ in range(1 + (name in double))]
        for _ in range(data.draw(st.integers(0, 3))):
            names.insert(data.draw(st.integers(1, len(names))), "inner")
        for name in names:
            now += data.draw(st.integers(1, 9))
            events.append(Event(name, now, now + 1, now + 1, "gpu:0", "jit_f", 3))
            truth.append(run)
    runs = trace._runs(events, "jit_f", 3, set(entry))
    assert runs == [[event for event, of in zip(events, truth, strict=True) if of == run] for run in range(count)]


def tpu(start: int) -> dict[str, Line]:
    """One execution: names are texts of instructions, a loop encloses its children, a copy is under way beside."""

    def op(text: str, offset: int, duration: int) -> tuple[str, int, int, Stats]:
        return (text, start + offset, duration, {"device_offset_ps": offset})

    return {
        "Steps": [op("7", 0, 600)],
        "XLA Modules": [op("jit_f(123)", 0, 600)],
        "XLA Ops": [
            op("%first.1 = f32[8]{0} negate(f32[8]{0} %a)", 0, 100),
            op("%loop.1 = f32[8]{0} while(f32[8]{0} %first.1)", 100, 200),
            op("%inner.1 = f32[8]{0} negate(f32[8]{0} %p)", 110, 80),
            op("%inner.1 = f32[8]{0} negate(f32[8]{0} %p)", 200, 90),
            op("%twice.1 = f32[8]{0} exponential(f32[8]{0} %loop.1)", 300, 100),
            op("%last.1 = f32[8]{0} add(f32[8]{0} %twice.1, f32[8]{0} %loop.1)", 450, 50),
        ],
        "Async XLA Ops": [op("copy-start.1", 390, 40)],
    }


def test_ops_of_a_tpu(tmp_path):
    lines = joined(tpu(1000), tpu(2000))
    lines["XLA Modules"].append(("jit_g(4)", 5000, 100, {}))
    lines["XLA Ops"].append(("%first.1 = f32[] negate()", 5000, 100, {}))
    both = {"/device:TPU:0": lines, "/device:TPU:1": tpu(1000), "/device:TPU:0 SparseCore 0": tpu(0)}
    read = trace.read(xplane(tmp_path / "a.xplane.pb", both))
    executions = read.executions(hlo.parse(PROGRAM))
    expected = {"first.1": 100, "inner.1": 170, "twice.1": 100, "last.1": 50, "copy-start.1": 30}
    assert [nanoseconds(one.spent.by_name) for one in executions] == [expected] * 2
    assert {one.device for one in executions} == {"tpu:0"}
    assert [(one.spent.loop_ps, one.spent.gaps_ps) for one in executions] == [
        (30_000, (10_000, 10_000, 10_000, 20_000))
    ] * 2
    with pytest.raises(trace.TraceError, match="has no execution of jit_h: it has jit_f, jit_g"):
        read.executions(hlo.parse(PROGRAM.replace("jit_f", "jit_h")))


# --- what is refused -----------------------------------------------------------------------------------------------

WHOLE = gzip.decompress((TRACES / CAPTURED[0] / "host.xplane.pb.gz").read_bytes())
HOSTILE = {
    "empty": (b"", "has no event of a device: it is empty"),
    "foreign": (b"hello, this is no trace", "is no xplane, or a truncated one: 23 bytes that do not parse"),
    "truncated": (WHOLE[: len(WHOLE) // 2], r"is no xplane, or a truncated one: \d+ bytes that do not parse"),
    "zeros": (bytes(1000), "is no xplane, or a truncated one: 1000 bytes that do not parse"),
    "cut gzip": (gzip.compress(WHOLE)[:1000], "Compressed file ended .*"),
    "broken gzip": (b"\x1f\x8b garbage", ".*Unknown compression method"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_no_trace_ends_in_one_line_and_status_2(stepbill, tmp_path, name):
    data, said = HOSTILE[name]
    path = tmp_path / "a.xplane.pb"
    path.write_bytes(data)
    status, out, err = stepbill(f"--trace={path}")
    assert (status, out) == (2, "")
    assert re.fullmatch(rf"stepbill: --trace={path}: {path}:? {said}\n", err), err


def other_program(folder: Path) -> str:
    """The HLO of a program of the same name that has no instruction in common."""
    _, module = captured(CAPTURED[0])
    path = folder / "other.hlo"
    path.write_text(PROGRAM.replace("jit_f", module.name))
    return str(path)


@pytest.mark.parametrize(
    "argv,said",
    [
        ("--trace=/no/such", "--trace=/no/such: /no/such: cannot read it: no such file or directory"),
        ("--trace={tmp}", r"--trace={tmp}: {tmp} holds no \*\.xplane\.pb: jax.profiler.trace\(DIR\) writes one"),
        ("--trace={first} --hlo={other}", "--trace={first}: .* is of another program than the HLO: .* no name in .*"),
        ("--trace={first} --hlo={hlo}", "--trace={first}: .* has no execution of jit_f: it has jit_.*"),
        ("--trace={bare}", r"--trace={bare}: it needs .* by --hlo=FILE: .* \*\.hlo\.txt\.gz, as --measure saves it"),
        ("--trace={first} --batch=2", "--batch=2: it cannot be given with --trace without --measure, .*"),
        ("--hlo={hlo} --measure", "--measure=True: it cannot be given with --hlo, which is a program already"),
    ],
)
def test_wrong_traces_and_flags_end_in_one_line_and_status_2(stepbill, tmp_path, argv, said):
    bare = tmp_path / "bare" / "a.xplane.pb"
    bare.parent.mkdir()
    bare.write_bytes(WHOLE)
    (tmp_path / "f.hlo").write_text(PROGRAM)
    nothing = tmp_path / "nothing"
    nothing.mkdir()
    places = {"tmp": nothing, "first": TRACES / CAPTURED[0], "bare": bare, "hlo": tmp_path / "f.hlo"}
    places["other"] = Path(other_program(tmp_path))
    for place, path in places.items():
        argv, said = argv.replace(f"{{{place}}}", str(path)), said.replace(f"{{{place}}}", re.escape(str(path)))
    status, out, err = stepbill(*argv.split())
    assert (status, out) == (2, "")
    assert re.fullmatch(f"stepbill: {said}\n", err), err


def test_measuring_needs_the_chip(stepbill):
    ready("h200")
    status, out, err = stepbill("--measure", "--target=h200", "--context=32")
    assert (status, out) == (2, "")
    assert err == (
        "stepbill: --measure: there is no 1 x NVIDIA H200 at hand to run --target=h200 on; "
        "--target=host is this machine\n"
    )


def test_of_several_runs_the_newest_is_read_and_the_note_says_so(tmp_path):
    for run in ("2026_01_01_10_00_00", "2026_01_02_09_00_00", "2025_12_31_23_59_59"):
        folder = tmp_path / "plugins" / "profile" / run
        folder.mkdir(parents=True)
        (folder / "vm.xplane.pb").write_bytes(WHOLE)
    path, (note,) = trace.find(tmp_path)
    assert path.parent.name == "2026_01_02_09_00_00"
    assert "of 3 traces" in note and "2026_01_02_09_00_00" in note


def pieces(data: st.DataObject, whole: bytes) -> Iterator[bytes]:
    """`whole`, with a few bytes written over, left out or put in between."""
    start = 0
    for place in sorted(data.draw(st.lists(st.integers(0, len(whole) - 1), min_size=1, max_size=4))):
        yield whole[start:place]
        yield data.draw(st.binary(max_size=2))
        start = place + data.draw(st.integers(0, 3))
    yield whole[start:]


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_garbled_traces_are_refused_or_read(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp()
    planes = {"/device:GPU:0": gpu(1000), "/device:TPU:0": tpu(1000)}
    planes["/host:CPU"] = {"t": [("first.1", 5, 9, {"hlo_op": "first.1", "hlo_module": "jit_f", "run_id": 4, "_p": 8})]}
    path = folder / "whole.xplane.pb"
    if not path.exists():
        xplane(path, planes)
    garbled = folder / "garbled.xplane.pb"
    garbled.write_bytes(b"".join(pieces(data, path.read_bytes())))
    try:
        spent = [one.spent for one in trace.read(garbled).executions(hlo.parse(PROGRAM))]
    except trace.TraceError:
        return
    assert all(sum(one.by_name.values()) == one.busy_ps for one in spent)


# --- the command ---------------------------------------------------------------------------------------------------


def test_a_trace_of_another_machine_is_read_with_its_hlo(stepbill, tmp_path):
    folder = TRACES / CAPTURED[0]
    status, out, err = stepbill(f"--trace={folder}", "--format=json")
    assert (status, err) == (0, "")
    by_folder = json.loads(out)
    assert by_folder["measured"]["steps"] == EXECUTIONS and by_folder["total"]["seconds"]["measured"] > 0
    (text,) = folder.glob("*.hlo.txt.gz")
    status, out, err = stepbill(f"--trace={folder}/host.xplane.pb.gz", f"--hlo={text}", "--format=json")
    assert json.loads(out)["rows"] == by_folder["rows"]
    status, out, err = stepbill(f"--trace={folder}", "--format=csv")
    rows = {row["component"]: row for row in csv.DictReader(io.StringIO(out))}
    assert int(rows["total"]["measured_picoseconds"]) == by_folder["total"]["measured_picoseconds"]
    status, out, err = stepbill(f"--trace={folder}", "--target=h200")
    assert (status, err) == (0, "")
    headings = out.split("───")[0]
    assert "measured" in headings and "times" in headings and max(map(len, out.splitlines())) <= render.WIDTH
    assert re.search(r"\nmeasured +cpu:0; 3 executions in a trace\n", out)
    # What it is held against is no such device.
    assert "the trace is of a CPU and h200 is none: give --target" in out
    assert not any("the trace is of" in note for note in by_folder["notes"])


def test_utilisation_of_a_host_is_of_the_highest_rates_that_were_measured_on_it(stepbill, tmp_path, monkeypatch):
    argv = (f"--trace={TRACES / CAPTURED[0]}",)
    assert "MFU -, MBU - of the chip's peaks" in stepbill(*argv)[1]
    products = tuple(calibration.MatmulRate("f32", rows, 64, 64, 10**10) for rows in (1, 64))
    moved = (calibration.ByteRate(1 << 12, 1 << 20, 10**9),)
    rates = calibration.Calibration(
        calibration.host(), "0", "2026-01-01", "by hand", products, moved, moved, 10**9, 10**8, 1e-6, 1e-4
    )
    (tmp_path / "calibration.json").write_text(json.dumps(rates.to_json()))
    monkeypatch.setenv("STEPBILL_CALIBRATION", str(tmp_path / "calibration.json"))
    said = json.loads(stepbill(*argv, "--format=json")[1])
    facts = said["measured"]
    assert facts["mfu"] == pytest.approx(said["ideal"]["flops"] / facts["seconds"] / 10**10)
    assert facts["mbu"] == pytest.approx(said["ideal"]["hbm_bytes"] / facts["seconds"] / 10**9)
    percent = f"MFU {facts['mfu']:.1%}, MBU {facts['mbu']:.1%}"
    text = " ".join(stepbill(*argv)[1].split())
    assert f"{percent} of the highest rates that were measured on it" in text


def test_a_kernel_in_a_command_buffer_is_noted_with_the_flag_that_names_it(stepbill, tmp_path):
    path = xplane(tmp_path / "a.xplane.pb", {"/device:GPU:0": joined(gpu(1000), gpu(2000))})
    (tmp_path / "f.hlo").write_text(PROGRAM)
    status, out, err = stepbill(f"--trace={path}", f"--hlo={tmp_path}/f.hlo", "--target=h200", "--format=json")
    assert (status, err) == (0, "")
    said = json.loads(out)
    assert any("xla_gpu_enable_command_buffer=" in note for note in said["notes"])
    assert said["measured"]["unjoined"] == {"in_a_graph": pytest.approx(30e-9)}
    assert said["unattributed"]["measured_picoseconds"] >= 30_000


TINY_FLAGS = ("--num_layers=1", "--width=64", "--heads=2", "--kv_heads=1", "--mlp_width=64", "--context=32")


def test_measure_runs_the_step_and_says_both_speeds(stepbill, tmp_path):
    status, out, err = stepbill(*TINY_FLAGS, "--measure", f"--trace={tmp_path}", "--format=json")
    assert (status, err) == (0, "")
    said = json.loads(out)
    facts = said["measured"]
    assert len(facts["untraced_seconds"]) == measure.REPEATS and facts["seconds"] == facts["untraced_median_seconds"]
    assert facts["steps"] == len(facts["traced_clock_seconds"]) == measure.TRACED
    assert facts["coverage"] > 0.9 and facts["joined"] == 1
    entries = [*said["rows"], said["unattributed"]]
    assert sum(entry["measured_picoseconds"] for entry in entries) == said["total"]["measured_picoseconds"] > 0
    bill = Bill.from_json(said)
    assert bill.to_json()["measured"] == facts
    assert "untraced" in str(bill) and "traced" in str(bill)
    # What it kept can be read again, without another flag.
    status, out, err = stepbill(f"--trace={tmp_path}", "--format=json")
    again = json.loads(out)
    assert (status, err) == (0, "") and again["total"]["measured_picoseconds"] == said["total"]["measured_picoseconds"]
    assert again["measured"]["untraced_seconds"] == facts["untraced_seconds"]
    # Each execution is a step of the profiler, whose overview knows of no other; none of the steps is on the bill.
    read = trace.read(tmp_path)
    data = ProfileData.from_file(str(read.path))
    marks = [e for plane in data.planes for line in plane.lines for e in line.events if "step_num" in dict(e.stats)]
    module = hlo.parse(dumps.read(measure.saved(read)[0] or ""))
    runs = [[(e.start_ps, e.done_ps) for e in one.events] for one in read.executions(module)]
    assert sorted(dict(mark.stats)["step_num"] for mark in marks) == [0, 1, 2] == [*range(len(runs))]
    for mark, spans in zip(sorted(marks, key=lambda mark: mark.start_ns), runs, strict=True):
        assert all(mark.start_ns <= start / 1000 and end / 1000 <= mark.end_ns for start, end in spans)


def test_weights_of_4_bits_are_measured_too(stepbill):
    """jax 0.10 refuses arrays of int4 that it was told the place of."""
    status, out, err = stepbill(*TINY_FLAGS, "--weights=int4:32", "--measure", "--format=json")
    assert (status, err) == (0, "") and json.loads(out)["measured"]["joined"] == 1


# --- saved bills ---------------------------------------------------------------------------------------------------

JSON = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.lists(st.integers(), max_size=2)
)


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_garbled_facts_of_a_run_are_refused_or_can_be_shown(data):
    saved = copy.deepcopy(saved_bill())
    inside = saved["measured"]
    key = data.draw(st.sampled_from(sorted(inside)))
    if isinstance(inside[key], dict) and inside[key] and data.draw(st.booleans()):
        inside, key = inside[key], data.draw(st.sampled_from(sorted(inside[key])))
    if data.draw(st.booleans()):
        inside[key] = data.draw(JSON)
    else:
        del inside[key]
    try:
        bill = Bill.from_json(saved)
    except ValueError:
        return
    str(bill)


@cache
def saved_bill() -> dict:
    bill = billed(next(name for name in CAPTURED if name.startswith("decode")))
    assert bill.measured is not None
    bill.measured |= {"untraced_seconds": [1.0], "untraced_median_seconds": 1.0, "unjoined": {"x": 1.0}}
    return json.loads(bill.dumps())
