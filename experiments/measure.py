"""Runs a step on the device of this machine: untraced for its production speed, traced for where the time goes."""

import gzip
import json
import re
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..profiling import targets, trace
from .bench_bill import environment

if TYPE_CHECKING:
    import jax

    from .steps import Step

REPEATS, TRACED = 5, 3
SAMPLE_SECONDS, MOST_IN_A_SAMPLE = 0.05, 20  # what an untraced sample should take, for the clock's sake
HLO_SUFFIX, SAYS = ".hlo.txt.gz", "stepbill.json"  # what is left beside the trace
LOOP = 32  # decode steps in one program
LONG = 5 * 10**13  # FLOPs of a step that takes any GPU so long that launching its kernels is hidden behind it
# Kernels that a GPU launches from a recorded graph do not say in a trace which instruction they are.
NAMED_KERNELS = {"xla_gpu_enable_command_buffer": ""}


@dataclass(frozen=True)
class Measurement:
    """A step that was run here.

    step: with real arguments, as they are after the last run. compilation: of the program that was traced, whose HLO
      joins the trace.
    untraced_seconds: of one execution, by the clock: each the mean of a few that follow each other without a pause.
    traced_seconds: by the clock, one execution each.
    traced: the trace, read. device: what it ran on, and how: how it was timed, for people.
    """

    step: "Step" = field(repr=False)
    compilation: targets.Compilation = field(repr=False)
    untraced_seconds: tuple[float, ...]
    traced_seconds: tuple[float, ...]
    traced: trace.Trace
    device: str
    how: str

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
    folder: Path,
    *,
    compilation: targets.Compilation | None = None,
    repeats: int = REPEATS,
    traced: int = TRACED,
    say: Callable[[str], None] = lambda _: None,
) -> Measurement:
    """Runs `step`, which must have been built with real arguments, on `target`, which must be this machine's.

    folder: where jax.profiler writes its trace (plugins/profile/TIME/...), with the HLO and `says` beside it.
    compilation: of the step with `options`, where it is at hand.
    repeats, traced: how many untraced samples, and how many traced executions.

    What the step donates is its own results from then on: nothing is copied between executions, but for the position
    of a cache, which is set back so that every execution does the same.
    One decode step on a GPU is timed as it is in production, many of them in one loop that is compiled: from step to
    step of such a loop every array stays where it is. Else XLA records its graph of kernels again for each execution,
    which took an H200's host longer than the step (9.0 ms beside 3.2 of an 8B model in int8; BUILD_NOTES.md, stop 9).
    A step that is long (`LONG`) is compiled once, without such graphs, which would save it nothing.
    """

    platform = targets.chip(target).platform
    if platform == "cpu":
        targets.keep_memory()
    in_loop, graphs = _is_timed_in_a_loop(step, platform), platform == "cuda" and not _is_long(step)
    if compilation is None:
        say(f"compiling {step.name}")
        compilation = targets.compile(step.lower(), target, options=options(step, platform))
    if in_loop:
        step, untraced, count = _in_a_loop(step, target, repeats, say)
        runner = Runner(step, compilation.compiled)
    else:
        runner = Runner(step, compilation.compiled)
        say(f"running {step.name}")
        untraced, count = runner.samples(repeats, SAMPLE_SECONDS)
        if graphs:
            say(f"compiling {step.name} without command buffers")
            named = options(step, platform) | NAMED_KERNELS
            compilation = targets.compile(step.lower(), target, options=named)
            runner.run = compilation.compiled
    runner.seconds(1)
    say(f"running {step.name}, traced")
    with tracing(folder):
        timed = tuple(runner.seconds(1) for _ in range(traced))
    on, off = ", command buffers on" * (graphs or in_loop), ", compiled with command buffers off" * (platform == "cuda")
    how = (
        f"untraced {repeats} x {count} executions{f' of {LOOP} steps in one loop' * in_loop}, each {count} without a "
        f"pause{on}; traced {traced} executions one by one{off if on else off.replace('compiled', 'both compiled')}"
    )
    found = Measurement(
        replace(step, arguments=tuple(runner.arguments)),
        compilation,
        untraced,
        timed,
        trace.read(folder),
        _device(),
        how,
    )
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


def _in_a_loop(
    step: "Step", target: str, repeats: int, say: Callable[[str], None]
) -> tuple["Step", tuple[float, ...], int]:
    """Times a decode step within a program that takes LOOP of them: the step, with the cache that is left, the seconds
    of one of them in each sample, and how often the program runs in a sample."""
    import jax
    import numpy as np

    from . import steps

    say(f"compiling a loop of {LOOP} steps")
    loop = steps.build(step.config, "generate", batch=step.batch, context=step.context, mesh=step.mesh, count=LOOP)
    params, tokens, cache = step.arguments
    last, place = np.asarray(cache.position), cache.position.sharding
    begun = replace(cache, position=jax.device_put(last + 1 - LOOP, place))
    loop = replace(loop, arguments=(params, tokens, begun))
    options = loop.compiler_options(targets.chip(target).platform)
    runner = Runner(loop, targets.compile(loop.lower(), target, options=options).compiled)
    say("running it")
    times, count = runner.samples(repeats, SAMPLE_SECONDS)
    left = replace(runner.arguments[2], position=jax.device_put(last, place))
    return replace(step, arguments=(params, tokens, left)), tuple(seconds / LOOP for seconds in times), count


@contextmanager
def tracing(folder: Path) -> Iterator[None]:
    """Has jax.profiler write to `folder` what devices do meanwhile, and not what Python does: it would take longer."""
    import jax

    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with jax.profiler.trace(str(folder), profiler_options=options):
        yield


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
    folder = found.traced.path.parent
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
