"""Runs a step on the device of this machine: untraced for its production speed, traced for where the time goes."""

import gzip
import json
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ..profiling import targets, trace
from .bench_bill import environment

if TYPE_CHECKING:
    import jax

    from .steps import Step

Result = TypeVar("Result")
REPEATS, TRACED = 5, 3
SAMPLE_SECONDS, MOST_IN_A_SAMPLE = 0.05, 20  # what an untraced sample should take, for the clock's sake
HLO_SUFFIX, SAYS = ".hlo.txt.gz", "stepbill.json"  # what is left beside the trace
LOOP = 32  # decode steps in one program
LONG = 5 * 10**13  # FLOPs of a step that takes any GPU so long that launching its kernels is hidden behind it
# Kernels that a GPU launches from a recorded graph do not say in a trace which instruction they are.
NAMED_KERNELS = {"xla_gpu_enable_command_buffer": ""}


@dataclass(frozen=True)
class Programs:
    """What is compiled to measure a step on `target`: each program when it is first asked for, or all by `compile`.

    step: its arguments may be abstract. at_hand: the step compiled with `options`, where it was already.
    """

    step: "Step" = field(repr=False)
    target: str
    at_hand: targets.Compilation | None = field(default=None, repr=False)
    say: Callable[[str], None] = field(default=lambda _: None, repr=False)

    @cached_property
    def lowered(self) -> "tuple[jax.stages.Lowered, float]":
        """The step, and the seconds that this took."""
        start = time.perf_counter()
        return self.step.lower(), time.perf_counter() - start

    @cached_property
    def lowered_loop(self) -> "jax.stages.Lowered | None":
        """LOOP steps in one program, of a step that is timed so."""
        from . import steps

        it = self.step
        if not _is_timed_in_a_loop(it, self._platform):
            return None
        return steps.build(it.config, "generate", batch=it.batch, context=it.context, mesh=it.mesh, count=LOOP).lower()

    @cached_property
    def first(self) -> targets.Compilation:
        """The step with `options`."""
        if self.at_hand is not None:
            return self.at_hand
        lowered, seconds = self.lowered
        self.say(f"compiling {self.step.name}")
        compiled = targets.compile(lowered, self.target, options=options(self.step, self._platform))
        return replace(compiled, lower_seconds=seconds)

    @cached_property
    def loop(self) -> targets.Compilation | None:
        """`lowered_loop`, with the options of a step in production."""
        if self.lowered_loop is None:
            return None
        self.say(f"compiling a loop of {LOOP} steps")
        return targets.compile(self.lowered_loop, self.target, options=self.step.compiler_options(self._platform))

    @cached_property
    def traced(self) -> targets.Compilation:
        """The step whose kernels have names in a trace."""
        named = options(self.step, self._platform) | (NAMED_KERNELS if self._platform == "cuda" else {})
        if named == options(self.step, self._platform):
            return self.first
        self.say(f"compiling {self.step.name} without command buffers")
        return targets.compile(self.lowered[0], self.target, options=named)

    @property
    def needed_bytes(self) -> int:
        """Of the device's memory, by the program that needs most."""
        plans = (one.memory for one in (self.first, self.loop, self.traced) if one is not None)
        return max((plan.needed for plan in plans if plan is not None), default=0)

    def lower(self) -> None:
        """Has all of them traced and lowered, which needs no device's time."""
        _ = self.lowered, self.lowered_loop

    def compile(self) -> None:
        """Has all of them compiled."""
        _ = self.first, self.loop, self.traced

    @property
    def _platform(self) -> str:
        return targets.chip(self.target).platform


@dataclass(frozen=True)
class Measurement:
    """A step that was run here.

    step: with real arguments, as they are after the last run. compilation: of the program that was traced, whose HLO
      joins the trace.
    untraced_seconds: of one execution, by the clock: each the mean of a few that follow each other without a pause.
    traced_seconds: by the clock, one execution each.
    folder: where the trace is; None: it was not traced. device: what it ran on, and how: how it was timed, for people.
    """

    step: "Step" = field(repr=False)
    compilation: targets.Compilation = field(repr=False)
    untraced_seconds: tuple[float, ...]
    traced_seconds: tuple[float, ...]
    folder: Path | None
    device: str
    how: str

    @cached_property
    def traced(self) -> trace.Trace | None:
        """The trace, read, which takes seconds and no device; None without one. TraceError."""
        return None if self.folder is None else trace.read(self.folder)

    @property
    def median_seconds(self) -> float:
        """Of one untraced execution: production speed."""
        return statistics.median(self.untraced_seconds)

    @property
    def says(self) -> dict[str, Any]:
        """What the trace itself does not know; saved beside it as JSON."""
        times = {name: list(getattr(self, name)) for name in ("untraced_seconds", "traced_seconds")}
        return {"device": self.device, "how": self.how, **times}


def measure(
    step: "Step",
    target: str,
    folder: Path | None,
    *,
    programs: Programs | None = None,
    repeats: int = REPEATS,
    traced: int = TRACED,
    say: Callable[[str], None] = lambda _: None,
) -> Measurement:
    """Runs `step`, which must have been built with real arguments, on `target`, which must be this machine's.

    folder: where jax.profiler writes its trace (plugins/profile/TIME/...), with the HLO and `says` beside it; None: it
      is not traced.
    programs: of the same step, where they are made already.
    repeats, traced: how many untraced samples, and how many traced executions.

    What the step donates is its own results from then on: nothing is copied between executions, but for the position
    of a cache, which is set back so that every execution does the same.
    One decode step on a GPU is timed as it is in production, many of them in one loop that is compiled: from step to
    step of such a loop every array stays where it is. Else XLA records its graph of kernels again for each execution,
    which took an H200's host longer than the step (9.0 ms beside 3.2 of an 8B model in int8; BUILD_NOTES.md, stop 9).
    A step that is long (`LONG`) is compiled once, without such graphs, which would save it nothing.
    """

    platform, name = targets.chip(target).platform, step.name
    if platform == "cpu":
        targets.keep_memory()
    programs = programs or Programs(step, target, say=say)
    first, loop = programs.first, programs.loop
    say(f"running {name}")
    if loop is not None:
        step, untraced, count = _in_a_loop(step, loop.compiled, repeats)
        runner = Runner(step, programs.traced.compiled)
    else:
        runner = Runner(step, first.compiled)
        untraced, count = runner.samples(repeats, SAMPLE_SECONDS)
        runner.run = programs.traced.compiled
    graphs = platform == "cuda" and (loop is not None or programs.traced is not first)
    how = (
        f"untraced {repeats} x {count} executions{f' of {LOOP} steps in one loop' * (loop is not None)}, each {count} "
        f"without a pause{', command buffers on' * graphs}"
    )
    timed: tuple[float, ...] = ()
    if folder is not None:
        runner.seconds(1)
        say(f"running {name}, traced")
        timed = tuple(traced_runs(folder, traced, lambda: runner.seconds(1)))
        off = f", {'compiled' if graphs else 'both compiled'} with command buffers off" * (platform == "cuda")
        how += f"; traced {traced} executions one by one{off}"
    ran = replace(step, arguments=tuple(runner.arguments))
    found = Measurement(ran, programs.traced, untraced, timed, folder, _device(), how)
    _save(found)
    return found


def options(step: "Step", platform: str) -> dict[str, Any]:
    """The compiler options with which a step is first run: its own; and those with which a trace names kernels, where
    it is itself only traced, as one that is timed in a loop, or takes so long that they make no difference."""
    as_traced = platform == "cuda" and (_is_timed_in_a_loop(step, platform) or _is_long(step))
    return step.compiler_options(platform) | (NAMED_KERNELS if as_traced else {})


def _is_long(step: "Step") -> bool:
    a_token = (6 if step.name == "train" else 2) * step.config.active_parameters
    return step.tokens_on_a_chip * a_token >= LONG


def _is_timed_in_a_loop(step: "Step", platform: str) -> bool:
    return platform == "cuda" and step.name == "decode" and step.context > LOOP


def _in_a_loop(step: "Step", run: Callable[..., Any], repeats: int) -> tuple["Step", tuple[float, ...], int]:
    """Times a decode step by a program that takes LOOP of them: the step, with the cache that is left, the seconds of
    one of them in each sample, and how often the program runs in a sample."""
    import jax
    import numpy as np

    params, tokens, cache = step.arguments
    last, place = np.asarray(cache.position), cache.position.sharding
    begun = replace(cache, position=jax.device_put(last + 1 - LOOP, place))
    runner = Runner(replace(step, arguments=(params, tokens, begun)), run)
    times, count = runner.samples(repeats, SAMPLE_SECONDS)
    left = replace(runner.arguments[2], position=jax.device_put(last, place))
    return replace(step, arguments=(params, tokens, left)), tuple(seconds / LOOP for seconds in times), count


def traced_runs(folder: Path, count: int, run: Callable[[], Result]) -> list[Result]:
    """What `run` gives each of so many times, while jax.profiler writes to `folder` what devices do; and not what
    Python does, which would take longer."""
    import jax

    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    found: list[Result] = []
    with jax.profiler.trace(str(folder), profiler_options=options):
        for number in range(count):
            # Without a mark for each, the overview of TensorBoard's Profile tab knows no step, and is all zeros.
            with jax.profiler.StepTraceAnnotation("step", step_num=number):
                found.append(run())
    return found


class Runner:
    """Executes a step again and again; what it donates comes from the execution before."""

    def __init__(self, step: "Step", run: Callable[..., Any]):
        import numpy as np

        self.step, self.run, self.arguments = step, run, list(step.arguments)
        self._start: tuple[Any, Any] | None = None
        self._results: Any = None  # of a step that donates nothing
        if step.donate and step.name != "train":
            position = step.arguments[step.donate[0]].position
            self._start = np.asarray(position), position.sharding

    def seconds(self, count: int) -> float:
        """How long one of `count` executions took that follow each other without a pause, by the clock."""
        import jax

        # Made before the clock runs: to hand a number to a device takes as long as a small kernel or longer.
        positions = [self._position() for _ in range(count)]
        jax.block_until_ready((self.arguments, positions))
        start = time.perf_counter()
        for position in positions:
            self._keep(self.run(*self.arguments), position)
        jax.block_until_ready((self.arguments, self._results))
        return (time.perf_counter() - start) / count

    def samples(self, repeats: int, sample_seconds: float) -> tuple[tuple[float, ...], int]:
        """(seconds of one execution, in each of so many samples; executions in a sample, to take about so long)."""
        once = min(self.seconds(1) for _ in range(2))  # the first also warms up
        count = max(1, min(MOST_IN_A_SAMPLE, round(sample_seconds / once)))
        return tuple(self.seconds(count) for _ in range(repeats)), count

    def first(self) -> Any:
        """One execution, and what it gave."""
        import jax

        results = jax.block_until_ready(self.run(*self.arguments))
        self._keep(results, self._position())
        return results

    def _position(self) -> "jax.Array | None":
        """Where the cache began, for one execution to use up; None where nothing counts."""
        import jax

        return None if self._start is None else jax.device_put(*self._start)

    def _keep(self, results: Any, position: "jax.Array | None") -> None:
        """Takes back what was donated: (params, opt_state, loss) of training, (logits or tokens, cache) of the rest."""
        if not self.step.donate:
            self._results = results
        elif self._start is None:
            self.arguments[:2] = results[:2]
        else:
            self.arguments[self.step.donate[0]] = replace(results[1], position=position)


def _device() -> str:
    """`NVIDIA H200`, or the CPU's model and cores."""
    import jax

    about, device = environment(), jax.devices()[0]
    return device.device_kind if device.platform != "cpu" else f"{about['cpu']}, {about['cores']} cores"


def _save(found: Measurement) -> None:
    if found.folder is None:
        return
    folder = trace.find(found.folder)[0].parent
    text = found.compilation.text
    named = re.search(r"HloModule ([\w.\-]+)", text)
    path = folder / f"{named[1] if named else found.step.name}{HLO_SUFFIX}"
    path.write_bytes(gzip.compress(text.encode(), mtime=0))
    (folder / SAYS).write_text(json.dumps(found.says, indent=1) + "\n")


def saved(traced: trace.Trace) -> tuple[Path | None, dict[str, Any]]:
    """What `measure` left beside a trace: the HLO's path, None where there is none or more than one; and `says`."""
    folder = traced.path.parent
    texts = list(folder.glob(f"*{HLO_SUFFIX}"))
    try:
        says = json.loads((folder / SAYS).read_text())
    except (OSError, ValueError):
        says = {}
    return (texts[0] if len(texts) == 1 else None), says if isinstance(says, dict) else {}
