"""How long a bill takes, against the size of the program: `python -m stepbill.experiments.bench_bill`.

Unrolled layers make a program longer: `--layers_list`. What no compiler makes in reasonable time is a program repeated,
`--megabytes_list=1,3,10,30,100`: as many copies of each of its computations and instructions, for the same arguments.

One process compiles a program and another bills its text, so that each point has the bill's own peak memory and none
profits from what came before. Seconds of the bill are of CPU time, which is all of one core's on a quiet machine.
"""

import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import Any

from absl.flags import FlagValues

from ..profiling import calibration, dumps, hlo, render, targets
from ..profiling.walk import itemize_module
from . import command, flags
from .flags import UsageError

LAYERS = "1,2,4,8,16,32,64,126"
PROGRAM = ("model", "target", "batch", "context")  # flags
NOTHING = "HloModule nothing\n\nENTRY %main () -> f32[] {\n  ROOT %zero = f32[] constant(0)\n}\n"
INTRODUCTION = """bench_bill: how long a bill takes, against the size of the program

  python -m stepbill.experiments.bench_bill --layers_list=1,2,4,8 --megabytes_list=1,3,10
"""


@dataclass(frozen=True)
class Compiled:
    """A program: seconds of tracing and lowering, and of XLA's compilation."""

    num_layers: int
    lower_seconds: float
    compile_seconds: float


@dataclass(frozen=True)
class Point:
    """A text: CPU seconds of reading and parsing, attributing, printing; peak of RSS, and its part from before."""

    program: Compiled
    copies: int
    hlo_bytes: int
    instructions: int
    parse_seconds: float
    bill_seconds: float
    render_seconds: float
    peak_bytes: int
    base_bytes: int

    @property
    def own_seconds(self) -> float:
        """stepbill's own: from text to printed bill."""
        return self.parse_seconds + self.bill_seconds + self.render_seconds

    @property
    def share(self) -> float | None:
        """Own seconds as a part of compiling; None of a text that was not compiled as it is."""
        return self.own_seconds / self.program.compile_seconds if self.copies == 1 else None


@dataclass(frozen=True)
class Fit:
    """seconds = intercept + slope * bytes, by least squares; r_squared: how much of the variance that explains.

    Exponents: of size, in seconds and in bytes of memory, by least squares of the logarithms: 1 is linear growth.
    """

    seconds_per_megabyte: float
    intercept_seconds: float
    r_squared: float
    seconds_exponent: float
    memory_exponent: float


def fit(points: Sequence[Point]) -> Fit | None:
    """Of own seconds and memory against HLO bytes; None for less than three points."""
    import numpy as np

    if len(points) < 3:
        return None
    megabytes = np.array([point.hlo_bytes / 1e6 for point in points])
    own = np.array([point.own_seconds for point in points])
    memory = np.array([max(1, point.peak_bytes - point.base_bytes) for point in points])
    slope, intercept = np.polyfit(megabytes, own, 1)
    variance = float(np.sum((own - own.mean()) ** 2))
    left = float(np.sum((own - (intercept + slope * megabytes)) ** 2))
    exponents = [float(np.polyfit(np.log(megabytes), np.log(of), 1)[0]) for of in (own, memory)]
    return Fit(float(slope), float(intercept), 1 - left / variance if variance else 1.0, *exponents)


def repeated(text: str, copies: int) -> str:
    """A program that does what `text` does so many times, with the same arguments: every other name is numbered."""
    header, *blocks = re.split(r"\n\n(?=(?:ENTRY )?%)", text.rstrip())
    entry = next(block for block in blocks if block.startswith("ENTRY "))
    bodies = [block for block in blocks if block is not entry]
    title, *lines = re.split(r"\n(?=  (?:ROOT )?%|\})", entry)[:-1]
    arguments = [line for line in lines if re.match(r"  (?:ROOT )?%\S+ = \S+ parameter\(", line)]
    kept = {line.split("%", 1)[1].split(" ", 1)[0] for line in arguments}

    def numbered(line: str, copy: int) -> str:
        return re.sub(r"%([\w.\-]+)", lambda name: name[0] if name[1] in kept else f"{name[0]}.c{copy}", line)

    made = [header]
    for copy in range(copies):
        made += [re.sub(r"%([\w.\-]+)", rf"%\1.c{copy}", body) for body in bodies]
    body = [title, *arguments]
    for copy in range(copies):
        last = copy == copies - 1
        own = (line for line in lines if line not in arguments)
        body += [numbered(line if last else line.replace("  ROOT ", "  ", 1), copy) for line in own]
    return "\n\n".join([*made, "\n".join([*body, "}"])]) + "\n"


def compile_to(path: Path, model: str, target: str, num_layers: int, batch: int, context: int) -> Compiled:
    """Compiles one decode step of `num_layers` unrolled layers; its text is in `path`."""
    targets.prepare(target)
    from ..model import architectures
    from . import steps

    config = replace(architectures.get(model), num_layers=num_layers, layers="unroll")
    step = steps.build(config, "decode", batch=batch, context=context, mesh=targets.mesh(target, {}))
    start = time.perf_counter()
    lowered = step.lower()
    lower_seconds = time.perf_counter() - start
    compilation = targets.compile(lowered, target, runs=False)
    path.write_text(compilation.text)
    return Compiled(num_layers, lower_seconds, compilation.compile_seconds)


def measure(path: Path, target: str, program: Compiled, copies: int) -> Point:
    """Bills the text in `path`, in this process."""
    render.to_text(itemize_module(hlo.parse(NOTHING), targets.chip(target)))  # imports what a bill needs
    base = _peak_bytes()
    clock = [time.process_time()]
    module = hlo.parse(dumps.read(path))
    clock.append(time.process_time())
    bill = itemize_module(module, targets.chip(target))
    clock.append(time.process_time())
    render.to_text(bill)
    clock.append(time.process_time())
    instructions = sum(len(computation.instructions) for computation in module.computations.values())
    parse, billing, printing = (after - before for before, after in pairwise(clock))
    size = path.stat().st_size
    return Point(program, copies, size, instructions, parse, billing, printing, _peak_bytes(), base)


def _peak_bytes() -> int:
    """Most memory that this process had so far. On Linux of its own address space: `ru_maxrss` is handed down by the
    process that started it."""
    import resource

    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    if found:
        return 1024 * int(found[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def environment() -> dict[str, Any]:
    """What the numbers depend on."""
    try:
        own = metadata.version("stepbill")
    except metadata.PackageNotFoundError:  # run from its sources
        own = "not installed"
    return {
        "python": platform.python_version(),
        "jax": metadata.version("jax"),
        "stepbill": own,
        "cpu": calibration.processor(),
        "cores": os.cpu_count(),
    }


def _define(values: FlagValues) -> None:
    to = flags.Definer(values)
    to.string("model", "llama3-8b", "which architecture")
    to.string("target", "h200", "what to compile for")
    to.string("layers_list", LAYERS, "how many layers, one program each")
    to.count("batch", 8, "sequences")
    to.count("context", 4096, "positions in the cache")
    to.string("megabytes_list", None, "bill the largest program also repeated to these sizes")
    to.one_of(("table", "json"), "format", "table", "what to print")
    to.string("text", None, "of a child process: the file of HLO text")
    to.count("compile", None, "of a child process: compile so many layers")
    flags.define_help(to)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark: 0; 2 where the flags are wrong."""
    return command.run(_run, _define, INTRODUCTION, argv)


def _run(values: FlagValues) -> None:
    if values.text:
        print(json.dumps(asdict(_child(values, Path(values.text)))))
        return
    points = list(_children(values))
    if values.format == "json":
        fitted = fit(points)
        about = {name: getattr(values, name) for name in PROGRAM}
        result = {"environment": environment(), "program": about, "points": [asdict(point) for point in points]}
        print(json.dumps(result | {"fit": asdict(fitted) if fitted else None}, indent=1))
    else:
        _print(values, points)


def _child(values: FlagValues, path: Path) -> Compiled | Point:
    """What this process was started for."""
    if values.compile:
        return compile_to(path, values.model, values.target, values.compile, values.batch, values.context)
    return measure(path, values.target, Compiled(0, 0.0, 0.0), 1)


def _children(values: FlagValues) -> Iterator[Point]:
    from .drivers.driver import checked, numbers  # not in a child, whose memory is measured

    checked(values)
    layers = numbers("layers_list", values.layers_list)
    sizes = numbers("megabytes_list", values.megabytes_list) if values.megabytes_list else []
    with tempfile.TemporaryDirectory() as folder:
        path, long = Path(folder, "program.hlo"), Path(folder, "repeated.hlo")
        program = Compiled(0, 0.0, 0.0)
        for count in layers:
            program = Compiled(**_told(values, f"{count} layers", path, f"--compile={count}"))
            yield _point(values, f"{count} layers", path, program, 1)
        for size in sizes:
            copies = max(1, round(size * 1e6 / path.stat().st_size))
            long.write_text(repeated(path.read_text(), copies))
            yield _point(values, f"{size} MB", long, program, copies)
    if sys.stderr.isatty():
        print("\r", end="", file=sys.stderr)


def _point(values: FlagValues, what: str, path: Path, program: Compiled, copies: int) -> Point:
    return Point(**(_told(values, what, path) | {"program": program, "copies": copies}))


def _told(values: FlagValues, what: str, path: Path, *more: str) -> dict[str, Any]:
    """What a child process says."""
    if sys.stderr.isatty():
        print(f"\r{what} ...   ", end="", file=sys.stderr, flush=True)
    argv = [sys.executable, "-m", "stepbill.experiments.bench_bill", f"--text={path}", *more]
    argv += [f"--{name}={getattr(values, name)}" for name in PROGRAM]
    ran = subprocess.run(argv, capture_output=True, text=True)
    if ran.returncode:
        raise UsageError(f"{what}: {(ran.stderr.strip().splitlines() or ['no message'])[-1]}")
    return json.loads(ran.stdout.splitlines()[-1])


def _print(values: FlagValues, points: Sequence[Point]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else render.WIDTH, highlight=False)
    where = environment()
    console.print(f"[bold]{values.model} decode[/], layers unrolled, batch {values.batch}, context {values.context}, "
                  f"compiled for {values.target}")  # fmt: skip
    versions = ", ".join(f"{name} {where[name]}" for name in ("python", "jax", "stepbill"))
    console.print(f"{versions}; {where['cores']} cores of {where['cpu']}\n")
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False, show_edge=False)
    headings = (
        "layers",
        "HLO",
        "instructions",
        "lower",
        "compile",
        "parse",
        "attribute",
        "print",
        "own/compile",
        "peak RSS",
    )
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for p in points:
        made = ("", "") if p.copies > 1 else map(render.seconds, (p.program.lower_seconds, p.program.compile_seconds))
        times = map(render.seconds, (p.parse_seconds, p.bill_seconds, p.render_seconds))
        layers = f"{p.copies} x {p.program.num_layers}" if p.copies > 1 else str(p.program.num_layers)
        share = "" if p.share is None else f"{p.share:.1%}"
        size, peak = render.amount(p.hlo_bytes, "B"), render.amount(p.peak_bytes, "B")
        table.add_row(layers, size, f"{p.instructions:,}", *made, *times, share, peak)
    console.print(table)
    if fitted := fit(points):
        console.print(
            f"\nparse + attribute + print = {render.seconds(fitted.intercept_seconds)} + "
            f"{render.seconds(fitted.seconds_per_megabyte)} a MB of HLO (R² {fitted.r_squared:.3f}); "
            f"CPU time grows with size to the power of {fitted.seconds_exponent:.2f}, "
            f"memory {fitted.memory_exponent:.2f}"
        )


if __name__ == "__main__":
    sys.exit(main())
