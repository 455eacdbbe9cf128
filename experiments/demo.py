"""`stepbill` without flags: a small model trained, prompted and decoded on this machine; each program billed, and its
rows measured in a trace."""

import json
import statistics
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..profiling import render, targets, trace
from ..profiling.bill import SCHEMA, Bill
from .bill import bill_of
from .measure import traced_runs

if TYPE_CHECKING:
    import numpy as np

    from .steps import Step

Report = Callable[[str, int], None]  # what is going on, and how many more units of `steps_in_all` are done
Keep = Callable[[Bill, trace.Trace, str], object]  # takes a bill's trace, whose files are gone afterwards, and HLO text

TEXT_BYTES = 2_000_000
TRAIN_STEPS = 8
TRAIN_BATCH, TRAIN_CONTEXT = 4, 256
PROMPT, TOKENS = 448, 64
LEARNING_RATE = 1e-4  # without a warm-up, more makes the first losses rise
REPEATS = 5
TRACED = 2

NEXT = (
    (
        "the same step on a chip that is not here",
        "pip install 'stepbill[cuda]' && "
        "stepbill --model=llama3-8b --step=decode --batch=8 --context=4096 --target=h200",
    ),
    (
        "what it takes to train: the smallest mesh that fits, and the bytes on its links",
        "pip install 'stepbill[tpu]' && "
        "stepbill --model=llama3-8b --step=train --remat=full --context=8192 --target=v5p --mesh=auto",
    ),
    ("a model of your own, as JSON", "stepbill --model=small --width=1024 --heads=16 --step=prefill --format=json"),
)


@dataclass(frozen=True)
class Timed:
    """One program of the demonstration.

    name: of its column. measured_seconds: the median of several runs, untraced. tokens: handled in one run. said: what
      it did.
    """

    name: str
    bill: Bill
    measured_seconds: float
    tokens: int
    said: str

    @property
    def rates(self) -> dict[str, float]:
        """What was measured, by name."""
        return {
            "measured_seconds": self.measured_seconds,
            "measured_tokens_per_second": self.tokens / self.measured_seconds,
        }


def corpus(size: int = TEXT_BYTES) -> bytes:
    """Real text that every machine has: the standard library's own modules, in the order of their names."""
    text = b""
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        text += path.read_bytes()
        if len(text) >= size:
            break
    return text[:size]


def windows(text: bytes, batch: int, length: int, count: int) -> "list[np.ndarray]":
    """`count` arrays [batch, length] of bytes, from places spread evenly over the text."""
    import numpy as np

    tokens = np.frombuffer(text, np.uint8).astype(np.int32)
    starts = np.linspace(0, len(tokens) - length, count * batch).astype(int)
    rows = np.stack([tokens[start : start + length] for start in starts])
    # Neighbouring places go to different batches, so that each batch is a sample of the whole text.
    return [rows[n::count] for n in range(count)]


def steps_in_all() -> int:
    """How many units `run` reports as done."""
    return 6 + TRAIN_STEPS + 2 * REPEATS


def run(report: Report, keep: Keep) -> list[Timed]:
    """Trains `nano` on real text, lets it read a prompt and write on; each program billed, timed and traced."""
    targets.prepare("host")
    targets.keep_memory()
    text = corpus()
    params, trained = _train(text, report, keep)
    cache, prefilled = _prefill(text, params, report, keep)
    return [trained, prefilled, _decode(params, cache, report, keep)]


def _compile(step: "Step", report: Report) -> targets.Compilation:
    report(f"{step.name}: compiling", 0)
    compilation = targets.compile(step.lower(), "host")
    report(f"{step.name}: running", 1)
    return compilation


def _bill(
    step: "Step",
    compilation: targets.Compilation,
    times: list[float],
    run: Callable[[], Any],
    report: Report,
    keep: Keep,
) -> Bill:
    """The bill, with what its rows take in a trace of `run`. times: what one took without."""
    report(f"{step.name}: tracing", 0)
    with tempfile.TemporaryDirectory() as folder:
        traced_runs(Path(folder), TRACED, run)
        traced = trace.read(folder)
        how = f"untraced {len(times)}, traced {TRACED} executions one by one"
        says = {"device": "this host's CPU", "how": how, "untraced_seconds": times}
        bill = bill_of(step, compilation, "host", tokens=TOKENS, traced=traced, says=says)
        keep(bill, traced, compilation.text)
    report(f"{step.name}: billed", 1)
    return bill


def _train(text: bytes, report: Report, keep: Keep) -> tuple[Any, Timed]:
    """-> (the trained parameters, as decode wants them; the bill)."""
    import jax
    import jax.numpy as jnp

    from ..model import architectures
    from ..model.train import Recipe
    from ..model.transformer import unstack
    from . import steps

    config = architectures.get("nano")
    report("train: initialising", 0)
    step = steps.build(
        config, "train", batch=TRAIN_BATCH, context=TRAIN_CONTEXT, real=True, recipe=Recipe(LEARNING_RATE)
    )
    compilation = _compile(step, report)
    params, opt_state, _ = step.arguments
    batches = [jnp.asarray(tokens) for tokens in windows(text, TRAIN_BATCH, TRAIN_CONTEXT + 1, TRAIN_STEPS)]

    def run(tokens: jax.Array) -> float:
        nonlocal params, opt_state
        params, opt_state, loss = jax.block_until_ready(compilation.compiled(params, opt_state, tokens))
        return float(loss)

    losses, times = [], []
    for tokens in batches:
        start = time.perf_counter()
        losses.append(run(tokens))
        times.append(time.perf_counter() - start)
        report(f"train: loss {losses[-1]:.2f}", 1)
    bill = _bill(step, compilation, times[1:], lambda: run(batches[0]), report, keep)
    said = f"{TRAIN_STEPS} steps on Python's own standard library, as bytes: loss " + ", ".join(
        f"{x:.2f}" for x in losses
    )
    timed = Timed("train", bill, statistics.median(times[1:]), TRAIN_BATCH * TRAIN_CONTEXT, said)
    # Training keeps float32; decode reads the compute type.
    return unstack(config, jax.tree.map(lambda x: x.astype(config.dtype), params)), timed


def _prefill(text: bytes, params: Any, report: Report, keep: Keep) -> tuple[Any, Timed]:
    """-> (the cache with the prompt in it, and room for what is to be written; the bill)."""
    import jax
    import jax.numpy as jnp

    from ..model import architectures
    from ..model.cache import KVCache
    from . import steps

    config = architectures.get("nano")
    step = steps.build(config, "prefill", batch=1, context=PROMPT)
    compilation = _compile(step, report)
    (tokens,) = map(jnp.asarray, windows(text, 1, PROMPT, 1))
    cache, times = KVCache.init(config, 1, PROMPT), []

    def run() -> None:
        nonlocal cache
        _, cache = jax.block_until_ready(compilation.compiled(params, tokens, cache))

    for _ in range(REPEATS):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
        report("prefill: running", 1)
    bill = _bill(step, compilation, times, run, report, keep)
    longer = cache.grown(config, PROMPT + TOKENS)
    return longer, Timed("prefill", bill, statistics.median(times), PROMPT, f"a prompt of {PROMPT} bytes, read at once")


def _decode(params: Any, cache: Any, report: Report, keep: Keep) -> Timed:
    import jax
    import jax.numpy as jnp

    from ..model import architectures
    from . import steps

    step = steps.build(architectures.get("nano"), "generate", batch=1, context=PROMPT + TOKENS, count=TOKENS)
    compilation = _compile(step, report)
    times = []

    def run() -> float:
        donated = jax.block_until_ready(jax.tree.map(jnp.copy, cache))
        start = time.perf_counter()
        jax.block_until_ready(compilation.compiled(params, jnp.zeros(1, jnp.int32), donated))
        return time.perf_counter() - start

    for _ in range(REPEATS):
        times.append(run())
        report("decode: running", 1)
    bill = _bill(step, compilation, times, run, report, keep)
    said = f"{TOKENS} bytes written after it, one by one, in a single dispatch"
    return Timed(f"decode {TOKENS}", bill, statistics.median(times), TOKENS, said)


# --- printing ------------------------------------------------------------------------------------------------------


def main(form: str, keep: Keep) -> list[Timed]:
    """Runs the demonstration and prints its bills, side by side (table), in full (json) or row by row (csv); them."""
    done = _with_progress(keep)
    if form == "json":
        print(json.dumps({"schema": SCHEMA, "bills": [one.bill.to_json() for one in done]}, indent=1))
    elif form == "csv":
        for n, one in enumerate(done):
            header, *lines = render.to_csv(one.bill).splitlines()
            print(
                "\n".join(([f"step,{header}"] if n == 0 else []) + [f"{one.bill.program['step']},{x}" for x in lines])
            )
    else:
        _print_table(done)
    return done


def _with_progress(keep: Keep) -> list[Timed]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("importing jax", total=steps_in_all())
        return run(lambda text, done: progress.update(task, description=f"{text:<24}", advance=done), keep)


def _coverage(bill: Bill) -> str:
    measured = bill.measured
    return f"{measured['coverage']:.1%} of the traced time has a name" if measured and measured["coverage"] else ""


def _print_table(done: list[Timed]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else render.WIDTH, highlight=False, emoji=False)
    first = done[0].bill
    size = render.parameters(first.program["parameters"])
    console.print(f"[bold cyan]{first.program['model']} ({size}), trained, prompted and decoded on this machine")
    for one in done:
        console.print(f"  [bold]{one.name:<10}[/] {one.said}")
    console.print()
    console.print(render.side_by_side({one.name: one.bill for one in done}))
    console.print()
    took = Table.grid(padding=(0, 2))
    for one in done:
        work, seconds = one.bill.total, one.measured_seconds
        rates = f"{one.tokens / seconds:,.0f} tokens/s, {render.amount(work.matmul / seconds, 'FLOP/s')} of matmul"
        took.add_row(f"[bold]{one.name}", f"measured {render.seconds(seconds)}", rates, _coverage(one.bill))
    console.print(took)
    console.print("[dim]Measured time of the rows is by a trace; of the whole, without one.")
    console.print("[dim]Bytes are what the compiled program moves on this CPU, which is no proxy for a chip's HBM.")
    console.print("\n[bold]What to try next")
    console.print("  # the whole bill of one of them\n  stepbill --step=train", soft_wrap=True)
    for why, command in NEXT:
        console.print(f"  [dim]# {why}[/]\n  {command.replace('[', chr(92) + '[')}", soft_wrap=True)
