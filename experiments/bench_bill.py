"""How long a bill takes, against the size of the program: `python -m stepbill.experiments.bench_bill`.

One child process a point, so that each has its own peak memory and none profits from what another has compiled.
"""

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from itertools import pairwise
from typing import Any

from absl import flags as absl_flags

from ..profiling import hlo, render, targets
from ..profiling.bill import itemize_module
from . import flags
from .flags import UsageError

LAYERS = "1,2,4,8,16,32,64,126"


@dataclass(frozen=True)
class Point:
    """One program. Seconds of: tracing and lowering, XLA's compilation, parsing, attributing, printing. Peak of RSS."""

    num_layers: int
    hlo_bytes: int
    instructions: int
    lower_seconds: float
    compile_seconds: float
    parse_seconds: float
    bill_seconds: float
    render_seconds: float
    peak_bytes: int

    @property
    def own_seconds(self) -> float:
        """stepbill's own: from text to printed bill."""
        return self.parse_seconds + self.bill_seconds + self.render_seconds

    @property
    def share(self) -> float:
        """Own seconds as a part of compiling."""
        return self.own_seconds / self.compile_seconds


@dataclass(frozen=True)
class Fit:
    """seconds = intercept + slope * bytes, by least squares; r_squared: how much of the variance that explains."""

    seconds_per_megabyte: float
    intercept_seconds: float
    r_squared: float


def fit(points: Sequence[Point]) -> Fit | None:
    """Of own seconds against HLO bytes; None for less than three points."""
    import numpy as np

    if len(points) < 3:
        return None
    megabytes = np.array([point.hlo_bytes / 1e6 for point in points])
    own = np.array([point.own_seconds for point in points])
    slope, intercept = np.polyfit(megabytes, own, 1)
    variance = float(np.sum((own - own.mean()) ** 2))
    left = float(np.sum((own - (intercept + slope * megabytes)) ** 2))
    return Fit(float(slope), float(intercept), 1 - left / variance if variance else 1.0)


def measure(model: str, target: str, num_layers: int, batch: int, context: int) -> Point:
    """Lowers, compiles and bills one decode step of `num_layers` unrolled layers, in this process."""
    import resource

    targets.prepare(target)
    from ..model import architectures
    from . import steps

    config = replace(architectures.get(model), num_layers=num_layers, layers="unroll")
    step = steps.build(config, "decode", batch=batch, context=context, mesh=targets.mesh(target, {}))
    clock = [time.perf_counter()]
    lowered = step.lower()
    clock.append(time.perf_counter())
    compilation = targets.compile(lowered, target)
    clock.append(time.perf_counter())
    module = hlo.parse(compilation.text)
    clock.append(time.perf_counter())
    bill = itemize_module(module, targets.chip(target), roles=step.argument_roles)
    clock.append(time.perf_counter())
    render.to_text(bill)
    clock.append(time.perf_counter())
    lower, _, parse, billing, printing = (after - before for before, after in pairwise(clock))
    instructions = sum(len(computation.instructions) for computation in module.computations.values())
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    size = len(compilation.text.encode())
    return Point(
        num_layers, size, instructions, lower, compilation.compile_seconds, parse, billing, printing, peak
    )  # fmt: skip


def environment() -> dict[str, Any]:
    """What the numbers depend on."""
    processor = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as file:
            processor = next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return {
        "python": platform.python_version(),
        "jax": metadata.version("jax"),
        "stepbill": metadata.version("stepbill"),
        "cpu": processor,
        "cores": os.cpu_count(),
    }


def _define(values: absl_flags.FlagValues) -> None:
    absl_flags.DEFINE_string("model", "llama3-8b", "which architecture", flag_values=values)
    absl_flags.DEFINE_string("target", "h200", "what to compile for", flag_values=values)
    absl_flags.DEFINE_string("layers_list", LAYERS, "how many layers, one program each", flag_values=values)
    absl_flags.DEFINE_integer("batch", 8, "sequences", lower_bound=1, flag_values=values)
    absl_flags.DEFINE_integer("context", 4096, "positions in the cache", lower_bound=1, flag_values=values)
    absl_flags.DEFINE_enum("format", "table", ["table", "json"], "what to print", flag_values=values)
    absl_flags.DEFINE_integer("point", None, "measure this many layers here and print JSON", flag_values=values)


def _layers(text: str) -> list[int]:
    try:
        layers = [int(part) for part in text.split(",")]
    except ValueError:
        layers = []
    if not layers or min(layers) < 1:
        raise UsageError(f"--layers_list={text}: it must be whole numbers of at least 1, such as {LAYERS}")
    return layers


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark: 0; 2 where the flags are wrong."""
    argv = sys.argv[1:] if argv is None else argv
    values = absl_flags.FlagValues()
    _define(values)
    try:
        try:
            values(["bench_bill", *argv])
            targets.chip(values.target)
            targets.require(values.target)
        except (absl_flags.Error, ValueError, targets.MissingExtra) as error:
            raise flags.as_usage(error) from None
        if values.point:
            point = measure(values.model, values.target, values.point, values.batch, values.context)
            print(json.dumps(asdict(point)))
            return 0
        points = list(_children(values))
    except UsageError as error:
        print(f"bench_bill: {error}", file=sys.stderr)
        return 2
    if values.format == "json":
        fitted = fit(points)
        about = {"model": values.model, "target": values.target, "batch": values.batch, "context": values.context}
        result = {"environment": environment(), "program": about, "points": [asdict(point) for point in points]}
        print(json.dumps(result | {"fit": asdict(fitted) if fitted else None}, indent=1))
    else:
        _print(values, points)
    return 0


def _children(values: absl_flags.FlagValues) -> list[Point]:
    points = []
    for layers in _layers(values.layers_list):
        if sys.stderr.isatty():
            print(f"\r{layers} layers ...", end="", file=sys.stderr, flush=True)
        command = [sys.executable, "-m", "stepbill.experiments.bench_bill"]
        command += [f"--{name}={getattr(values, name)}" for name in ("model", "target", "batch", "context")]
        ran = subprocess.run([*command, f"--point={layers}"], capture_output=True, text=True)
        if ran.returncode:
            raise UsageError(f"{layers} layers: {(ran.stderr.strip().splitlines() or ['no message'])[-1]}")
        points.append(Point(**json.loads(ran.stdout.splitlines()[-1])))
    if sys.stderr.isatty():
        print("\r", end="", file=sys.stderr)
    return points


def _print(values: absl_flags.FlagValues, points: Sequence[Point]) -> None:
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
        times = (p.lower_seconds, p.compile_seconds, p.parse_seconds, p.bill_seconds, p.render_seconds)
        cells = (render.amount(p.hlo_bytes, "B"), f"{p.instructions:,}", *map(render.seconds, times), f"{p.share:.1%}")
        table.add_row(str(p.num_layers), *cells, render.amount(p.peak_bytes, "B"))
    console.print(table)
    if fitted := fit(points):
        console.print(
            f"\nparse + attribute + print = {render.seconds(fitted.intercept_seconds)} + "
            f"{render.seconds(fitted.seconds_per_megabyte)} a MB of HLO (R² {fitted.r_squared:.3f})"
        )


if __name__ == "__main__":
    sys.exit(main())
