"""Bills in TensorBoard: `tensorboard --logdir=DIR` shows them as Scalars, HParams, Images and Text.

Each bill is a run: a folder below DIR named after what was billed. The same bill made again is the next step of its
run, so that a program that gets dearer is a line that rises. A trace goes to where the Profile tab (of xprof) looks for
it, RUN/plugins/profile/.

Written by tensorboardX (MIT licence); the pictures need matplotlib. Nothing here listens to any network.
"""

import gzip
import hashlib
import json
import re
import shutil
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import util
from operator import itemgetter
from pathlib import Path
from typing import Any

from . import calibration, plots, render
from .attribution import Dataflow
from .bill import GROUPS, Bill, Work
from .chips import CHIPS, Chip
from .compare import Comparison
from .harmless import visible
from .hlo import Module
from .names import Names
from .trace import ENCLOSING, RUNS_FOLDER, SUFFIXES, Execution, Trace

EXTRA = "board"  # of setup.cfg
LONGEST_NAME = 150  # characters of a run's folder; file systems take 255 bytes
_OWN_PLANE = 1 << 20  # an id that no plane of a profiler has
COMPARISON = "comparison"  # the run that has several bills side by side

# What a bill was made of, in this order: the hyperparameters of a sweep, each with the letter it is given in names.
_HYPERPARAMETERS = {
    **{"model": "", "step": "", "batch": "b", "context": "c", "tokens": "t", "target": "", "mesh": "", "weights": ""},
    **{"cache_dtype": "cache=", "layers": "", "remat": "remat=", "attention": ""},
}
_NO_HYPERPARAMETERS = ("hlo", "trace", "measure", "components", "format")
# Flags that change the name of the model themselves.
_IN_THE_MODEL = ("num_layers", "width", "heads", "kv_heads", "head_width", "mlp_width", "vocabulary")
_IN_EVERY_NAME = ("model", "step", "batch", "context", "tokens", "target", "mesh")


class MissingExtra(Exception):
    """matplotlib is not installed; the text is one line with the pip command."""


def require() -> None:
    """Raises MissingExtra where what draws the pictures is not installed. Imports nothing of it."""
    if util.find_spec("matplotlib") is None:
        raise MissingExtra(f"its pictures need matplotlib: pip install 'stepbill[{EXTRA}]'")


@dataclass(frozen=True)
class Run:
    """A bill to be shown. more: further totals by name, such as the time of the whole step on a clock."""

    bill: Bill
    more: Mapping[str, float] = field(default_factory=dict)


def run_name(program: Mapping[str, Any]) -> str:
    """The folder of a bill's run, such as `llama3-8b_decode_b8_c4096_h200_weights=int8`; harmless as a path."""
    about, given = hyperparameters(program), _given(program)
    parts = [f"{_HYPERPARAMETERS[key]}{about[key]}" for key in _IN_EVERY_NAME if about.get(key)]
    parts += [f"{key}={given[key]}" for key in given if key not in _IN_EVERY_NAME + _IN_THE_MODEL]
    name = re.sub(r"[^\w.,=()+-]+", "_", "_".join(parts), flags=re.ASCII).lstrip(".") or "bill"
    if len(name) > LONGEST_NAME:
        name = f"{name[:LONGEST_NAME]}_{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return name


def keep_trace(logdir: Path, program: Mapping[str, Any], traced: Trace, module: Module, names: Names) -> None:
    """Copies the trace of a module to where the Profile tab finds it, in the run of the program's bill.

    The viewer there knows instructions and kernels by their own names; so the copy has, besides, a line for each
    component: when something of it ran, or was under way while nothing ran, as the bill charges it.
    names: how the module's parts are called.

    Raises:
      OSError: the trace cannot be read, or nothing can be written there.
    """
    xplane = traced.path
    folder = logdir / run_name(program) / RUNS_FOLDER / (xplane.parent.name or "trace")
    folder.mkdir(parents=True, exist_ok=True)
    opened = gzip.open if xplane.suffix == ".gz" else open
    name = xplane.name.removesuffix(".gz").removesuffix(SUFFIXES[0]) + SUFFIXES[0]
    with opened(xplane, "rb") as old, (folder / name).open("wb") as new:
        shutil.copyfileobj(old, new)
        new.write(_components_plane(traced.executions(module), Dataflow(module, {}, names)))


def _components_plane(executions: Sequence[Execution], dataflow: Dataflow) -> bytes:
    """An XSpace (tsl/profiler/protobuf/xplane.proto) of one plane; behind those of another, it is one of theirs."""
    from jax.profiler import ProfileData

    spans: dict[str, list[tuple[int, int]]] = {}
    for execution in executions:
        leaves = []
        for event in execution.events:
            instruction = execution.instructions.get(event.name)
            if event.done_ps > event.start_ps and (instruction is None or instruction.opcode not in ENCLOSING):
                name = dataflow.blame(instruction).component if instruction else None
                leaves.append((spans.setdefault(name or plots.UNATTRIBUTED, []), event))
        running = _united((event.start_ps, event.end_ps) for _, event in leaves)
        for own, event in leaves:
            own += [(event.start_ps, event.end_ps), *_between(running, event.end_ps, event.done_ps)]
    start_ns = min((start for of in spans.values() for start, _ in of), default=0) // 1000
    text = f'planes {{ id: {_OWN_PLANE} name: "/device:CUSTOM:components"\n'
    for n, name in enumerate(sorted(spans, key=plots.place), 1):
        quoted = json.dumps(visible(name), ensure_ascii=False)
        text += f"event_metadata {{ key: {n} value {{ id: {n} name: {quoted} }} }}\n"
        text += f"lines {{ id: {n} name: {quoted} timestamp_ns: {start_ns}\n"
        for start, end in _united(spans[name]):
            text += f"events {{ metadata_id: {n} offset_ps: {start - start_ns * 1000} duration_ps: {end - start} }}\n"
        text += "}\n"
    return ProfileData.text_proto_to_serialized_xspace(text + "}")


def _united(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same time in spans apart from each other, in order."""
    out: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if out and start <= out[-1][1]:
            out[-1] = out[-1][0], max(end, out[-1][1])
        elif end > start:
            out.append((start, end))
    return out


def _between(spans: list[tuple[int, int]], start: int, end: int) -> Iterator[tuple[int, int]]:
    """What of the time from start to end is in none of the spans, which are apart and in order."""
    for first, last in spans[bisect_right(spans, start, key=itemgetter(1)) :]:
        if first >= end:
            break
        if start < first:
            yield start, first
        start = last
    if start < end:
        yield start, end


def write(logdir: Path, runs: Sequence[Run]) -> list[Path]:
    """Writes each bill to its run folder below `logdir`; the folders.

    Raises:
      OSError: nothing can be written there.
    """
    hyper, metrics = [hyperparameters(run.bill.program) for run in runs], [totals(run) for run in runs]
    # TensorBoard takes the columns of its table from any one run, so each has those of all.
    columns = _columns(hyper), dict.fromkeys(key for one in metrics for key in one)
    folders: list[Path] = []
    for run, about, of_run in zip(runs, hyper, metrics, strict=True):
        name = run_name(run.bill.program)
        alike = sum(run_name(other.bill.program) == name for other in runs[: len(folders)])
        folders.append(logdir / (f"{name}-{alike + 1}" if alike else name))
        with Writer(folders[-1]) as writer:
            writer.hyperparameters(about, columns)
            writer.scalars(of_run | components(run.bill))
            writer.text("bill", render.to_text(run.bill))
            for name, figure in plots.figures(run.bill, _chip(run.bill)).items():
                writer.image(f"bill/{name}", *plots.png(figure))
    return folders


def _chip(bill: Bill) -> Chip | None:
    """Whose ceilings a bill's roofline has: its target's, or what its calibration measured, if that is still here."""
    chip = CHIPS.get(str(bill.program.get("target")))
    if chip is None or chip.peak_flops or not bill.predicted:
        return chip
    with suppress(calibration.CalibrationError):
        found = calibration.of(chip)
        if found and {"device": found.hardware.device, "date": found.date}.items() <= _measured_on(bill).items():
            return found.fastest(chip)
    return chip


def _measured_on(bill: Bill) -> Mapping[str, Any]:
    found = (bill.predicted or {}).get("measured_on")
    return found if isinstance(found, Mapping) else {}


def write_comparison(logdir: Path, comparison: Comparison) -> list[Path]:
    """Writes the bills as `write` does, and what differs as text of a run of its own."""
    folders = write(logdir, [Run(bill) for bill in comparison.bills.values()])
    with Writer(logdir / COMPARISON) as writer:
        writer.text("comparison", render.comparison_text(comparison))
    return folders


# --- what is shown -------------------------------------------------------------------------------------------------


def hyperparameters(program: Mapping[str, Any]) -> dict[str, str | float]:
    """What a bill is the bill of: as the program says, then all other flags as they were given."""
    about: dict[str, str | float] = {}
    for key in _HYPERPARAMETERS:
        value = program.get(key)
        if isinstance(value, Mapping):
            value = ",".join(f"{axis}={size}" for axis, size in value.items())
        if isinstance(value, int | float):
            about[key] = value
        elif value is not None:
            about[key] = visible(str(value))
    return about | {key: value for key, value in _given(program).items() if key not in about}


def _given(program: Mapping[str, Any]) -> dict[str, str]:
    """The flags of the command line that say what was billed."""
    flags = program.get("flags") or {}
    return {visible(key): visible(str(value)) for key, value in flags.items() if key not in _NO_HYPERPARAMETERS}


def _columns(runs: Sequence[Mapping[str, str | float]]) -> dict[str, str | float]:
    """The hyperparameters that a table of these runs has columns for, each with an example: those in which they differ;
    of one run, what names it."""
    examples = {key: value for about in runs for key, value in about.items()}
    if len(runs) == 1:
        # A sweep may be made bill by bill. What comes before `model` in the alphabet would be shown in its stead.
        always = (*_IN_EVERY_NAME, "weights")
        return {key: value for key, value in examples.items() if key in always or key not in _HYPERPARAMETERS}
    return {key: value for key, value in examples.items() if len({about.get(key) for about in runs}) > 1}


def totals(run: Run) -> dict[str, float]:
    """The whole program in a few numbers, tag -> value; without what is not known."""
    bill = run.bill
    total = bill.total
    measured = bill.measured or {}
    known: dict[str, Any] = {
        **{f"measured_{name}": measured.get(name) for name in ("seconds", "busy_seconds", "coverage")},
        **{name: measured.get(name) for name in ("mfu", "mbu")},
        **run.more,
        "predicted_seconds": None if bill.predicted is None else total.predicted_picoseconds * 1e-12,
        "roofline_seconds": total.seconds if bill.timed and total.picoseconds else None,
        "tokens_per_second": bill.price.get("tokens_per_second"),
        "dollars_per_million_tokens": bill.price.get("dollars_per_million_tokens"),
        "hbm_bytes": total.hbm_bytes,
        "hbm_bytes_over_ideal": bill.efficiency,
        "matmul_flops": total.matmul,
        "peak_memory_bytes": bill.memory.get("peak_bytes"),
        "link_bytes": total.link_bytes or None,
    }
    return {f"bill/{name}": value for name, value in known.items() if isinstance(value, int | float)}


def components(bill: Bill) -> dict[str, float]:
    """Amounts of each component, all its phases and taxes together; then of the unattributed row, groups and taxes.

    Tags are QUANTITY/COMPONENT, by which TensorBoard groups them, or QUANTITY/COMPONENT/ROLE. What is zero is left out,
    but not of the unattributed row.
    """
    works: dict[str, Work] = {}
    for row in bill.rows:
        works.setdefault(row.component, Work()).add(row.work)
    works[plots.UNATTRIBUTED] = bill.unattributed
    out: dict[str, float] = {}
    for component, work in works.items():
        always = component == plots.UNATTRIBUTED
        for quantity, value in _quantities(bill, work).items():
            if value or always:
                out[f"{quantity}/{component}"] = value
        for side, moved in (("hbm_read_bytes", work.hbm_read), ("hbm_write_bytes", work.hbm_write)):
            out |= {f"{side}/{component}/{role}": amount for role, amount in moved.items() if amount}
    parts = {f"group_{name}": bill.group(name) for name in GROUPS}
    parts |= {f"tax_{row.tax}": bill.tax(row.tax) for row in bill.rows if row.tax}
    for name, work in parts.items():
        out |= {f"{name}/{quantity}": value for quantity, value in _quantities(bill, work).items() if value}
    return out


def _quantities(bill: Bill, work: Work) -> dict[str, float]:
    """All that is one number of some work, as far as it is known."""
    known: dict[str, float] = {
        "matmul_flops": work.matmul,
        "other_flops": work.elementwise + work.transcendental,
        "hbm_bytes": work.hbm_bytes,
        "link_bytes": work.link_bytes,
    }
    if bill.timed and bill.total.picoseconds:
        known["roofline_seconds"] = work.seconds
        dollars = bill.price.get("dollars_per_million_tokens")
        if dollars is not None:
            known["dollars_per_million_tokens"] = dollars * work.picoseconds / bill.total.picoseconds
    if bill.measured is not None:
        known["measured_seconds"] = work.measured_picoseconds * 1e-12
    if bill.predicted is not None:
        known["predicted_seconds"] = work.predicted_picoseconds * 1e-12
    return known


# --- how it is written ---------------------------------------------------------------------------------------------


class Writer:
    """One step of a run: the first, or the one after those that its folder has. A context manager."""

    def __init__(self, folder: Path):
        from tensorboardX import SummaryWriter

        self._step = len(list(folder.glob("events.out.tfevents.*")))
        # The writer itself would fail in a thread of its own, unseen.
        folder.mkdir(parents=True, exist_ok=True)
        self._writer = SummaryWriter(str(folder), filename_suffix=f".{self._step}")

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *error: object) -> None:
        self._writer.close()

    def scalars(self, values: Mapping[str, float]) -> None:
        """tag -> value, as float32."""
        self._add(*({"tag": visible(tag), "simple_value": value} for tag, value in values.items()))

    def image(self, tag: str, png: bytes, width: int, height: int) -> None:
        """A PNG image."""
        picture = {"width": width, "height": height, "colorspace": 4, "encoded_image_string": png}
        self._add({"tag": tag, "image": picture})

    def text(self, tag: str, text: str) -> None:
        """Text as it stands: TensorBoard takes it for Markdown, in which indented lines are code, whatever they say."""
        lines = (f"    {visible(line)}" for line in text.split("\n"))
        self._writer.add_text(tag, "\n".join(lines), self._step)

    def hyperparameters(
        self, about: Mapping[str, str | float], columns: tuple[Mapping[str, Any], Iterable[str]]
    ) -> None:
        """What this run was made of; columns: hyperparameters, each with an example, and metrics of the whole table."""
        from tensorboardX.summary import hparams

        experiment, _, _ = hparams(dict(columns[0]), dict.fromkeys(columns[1], 0.0))
        _, start, end = hparams(dict(about), {})
        for summary in (experiment, start, end):
            self._writer.file_writer.add_summary(summary)  # pyright: ignore[reportOptionalMemberAccess]

    def _add(self, *values: dict[str, Any]) -> None:
        from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]

        summary = Summary(value=[Summary.Value(**value) for value in values])
        self._writer.file_writer.add_summary(summary, self._step)  # pyright: ignore[reportOptionalMemberAccess]
