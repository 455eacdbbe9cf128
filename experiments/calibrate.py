"""`python -m stepbill.experiments.calibrate`: what this machine does at best, measured; predictions are made of it.

Microbenchmarks alone, none of them a model: products by operand type, rows and weights; kernels that copy and transpose
arrays of several sizes; arithmetic on little data; the time from one kernel to the next and of one dispatch. Each is a
program that XLA compiles, timed from outside, untraced, the median of several runs.
"""

import itertools
import json
import math
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from absl import flags as absl_flags

from ..profiling import calibration, hlo, render, targets
from ..profiling.calibration import ByteRate, Calibration, Hardware, MatmulRate, NarrowRate
from ..profiling.kept import write_whole
from ..profiling.walk import Kernel, itemize_module
from . import command, flags
from .flags import UsageError
from .run_folder import check_writable

if TYPE_CHECKING:
    import jax

INTRODUCTION = """calibrate: measures this machine, for predictions (stepbill --target=host and others)

  python -m stepbill.experiments.calibrate              saved in the user's cache folder
  python -m stepbill.experiments.calibrate --out=FILE
"""
KIB, MIB = 1 << 10, 1 << 20
ROW = 512  # numbers that are summed where a kernel only reads
MOST_RUNS = 100  # in a sample
NARROW, GROUP = (8, 4), 128  # bits of weights; inputs that share a scale, of four bits
DTYPES = {"f32": "float32", "bf16": "bfloat16", "int8": "int8", "fp8": "float8_e4m3fn"}
Report = Callable[[str], None]


@dataclass(frozen=True)
class Sizes:
    """What is measured.

    rows, sides: products [rows, side] x [side, side'] of every pair of sides. narrow_sides: of operands that are not
    the first of `precisions`. chain, chain_flops: how many products are in one program, and how much they do, at most.
    copies: bytes that one kernel touches; footprints: so many such kernels in a program, each of other arrays; moved:
    they run again and again, in one program, until they have touched so many bytes: what it takes to hand a program its
    arrays would else hide what a cache does. arithmetic: bytes that vector arithmetic is done to.
    rounds: how often each is timed, all of them in turn. sample_seconds: what a sample should take, of as many runs
    without a pause as that needs: a GPU is handed the next program while it runs this one. 0: one run.
    compilers: threads that compile products beforehand, for on a GPU that takes longest. 0: each when it first runs;
    but on a GPU each before any does.
    """

    precisions: tuple[str, ...]
    rows: tuple[int, ...]
    sides: tuple[int, ...]
    narrow_sides: tuple[int, ...]
    copies: tuple[int, ...]
    footprints: tuple[int, ...] = (1, 8, 64)
    moved: int = 1
    chain: int = 32
    chain_flops: int = 10**9
    arithmetic: int = MIB
    rounds: int = 7
    sample_seconds: float = 0.0
    compilers: int = 0
    narrow: tuple[tuple[int, int], ...] = ()
    uncached: int = 256 * MIB


SIZES = {
    "cpu": Sizes(
        ("f32", "bf16", "int8"),
        (1, 8, 64, 512),
        (64, 256, 1024, 4096),
        (256, 2048),
        (64 * KIB, MIB, 4 * MIB),
        moved=64 * MIB,
    ),
    "cuda": Sizes(
        ("bf16", "f32", "int8"),
        # While reading the weights is all, the rate grows as the rows do; an H200's up to some 170 of bf16.
        (1, 8, 128, 4096),
        (2048, 16_384),
        (4096,),
        (MIB, 8 * MIB, 64 * MIB),
        moved=2048 * MIB,
        chain_flops=10**13,
        arithmetic=256 * MIB,
        rounds=5,
        sample_seconds=0.02,
        compilers=calibration.cores(),
        narrow=((4096, 4096), (4096, 14_336), (16_384, 16_384)),
    ),
}


class Case(NamedTuple):
    """One program that does `amount` of something in `kernels` kernels, and how to run it once."""

    what: str
    amount: int
    kernels: int
    run: Callable[[], Any]


# --- what is measured ----------------------------------------------------------------------------------------------


def dispatches() -> Case:
    """A program with one kernel that does next to nothing, so many times that a clock can tell."""
    import jax
    import jax.numpy as jnp

    add, x = jax.jit(lambda x: x + 1), jnp.zeros(8)

    def run() -> Any:
        y = x
        for _ in range(100):
            y = add(y)
        return y

    return Case("dispatches", 100, 0, run)


def launches() -> Case:
    """A chain of products of 8 x 8 numbers."""
    import jax
    import jax.numpy as jnp

    x = jnp.eye(8)
    compiled = jax.jit(_chain).lower(x, [x] * 200).compile()
    return Case("launches", _kernels(compiled), 0, lambda: compiled(x, [x] * 200))


def matmuls(sizes: Sizes) -> Iterator[tuple[tuple[str, int, int, int], Case]]:
    """(precision, m, n, k) and products one after the other, each of the one before: [m, k] x [k, n] and [m, n] x
    [n, k] in turn. The two weights stay where the caches have them, if there is room: what it takes to bring them there
    is for `copies` to say.

    Raises targets.CompileError where the device cannot multiply the first of the types.
    """
    import jax

    platform = _platform()
    program = jax.jit(partial(_chain, platform=platform))
    found: list[tuple[tuple[str, int, int, int], Any, Any]] = []  # sizes, a program and what it is given
    for number, precision in enumerate(sizes.precisions):
        dtype = jnp_dtype(precision)
        sides = sizes.narrow_sides if number else sizes.sides
        for place, k in enumerate(sides):
            for n in sides[place:]:
                key = jax.random.key(0)
                weights = [_operand(key, shape, dtype) for shape in ((k, n), (n, k))]
                for m in sizes.rows:
                    pairs = max(1, min(sizes.chain // 2, sizes.chain_flops // (4 * m * n * k)))
                    arguments = _operand(key, (m, k), dtype), weights * pairs
                    found.append(((precision, m, n, k), program, arguments))
    # Many rows after each other: a GPU at full power slows down within a tenth of a second, as it does in a step.
    found.sort(key=lambda one: one[0][1])
    if platform == "cuda" or sizes.compilers:
        found = _ready(found, sizes.precisions[0], max(1, sizes.compilers), partial(options, platform))
    for (precision, m, n, k), run, (x, weights) in found:
        what, count = f"products of {precision}, {m} x {k} x {n}", len(weights)
        # On a GPU a product of few rows is two kernels: products of parts of its sum, and what adds these.
        kernels = _kernels(run) if platform == "cuda" else count
        yield (precision, m, n, k), Case(what, 2 * count * m * n * k, kernels, partial(run, x, weights))


def narrow_products(sizes: Sizes) -> Iterator[tuple[tuple[int, int], Case]]:
    """(bits, bytes that one kernel reads) and products of a single row with weights in few bits, each of the one
    before, by the model's own kernel: XLA has none. There are more weights than a cache has room for."""
    import jax

    from ..model.vector import Columns

    platform = _platform()
    program = jax.jit(partial(_narrow_chain, interpret=platform != "cuda"))

    def made(bits: int, shape: tuple[int, int], number: int) -> Columns:
        key, largest = jax.random.key(number), 2 ** (bits - 1)
        values = jax.random.randint(key, shape, -largest, largest, "int8").astype(f"int{bits}")
        grouped = shape[0] // GROUP, shape[1]
        return Columns(values, jax.random.uniform(key, grouped, minval=0.5, maxval=1.5) if bits == 4 else None)

    found: list[tuple[tuple[int, int], Any]] = []
    for bits, (k, n) in itertools.product(NARROW, sizes.narrow):
        size = k * n * bits // 8 + (k * n // GROUP * 4 if bits == 4 else 0)
        pairs = range(max(1, -(-sizes.uncached // (2 * size))))
        weights = [made(bits, shape, number) for number in pairs for shape in ((k, n), (n, k))]
        found.append(((bits, size), (jax.random.normal(jax.random.key(1), (1, 1, k), "bfloat16"), weights)))
    with ThreadPoolExecutor(max(1, sizes.compilers)) as pool:
        compiled = [*pool.map(lambda one: _compiled(program, one[1], {}), found)]
    for ((bits, size), given), run in zip(found, compiled, strict=True):
        if isinstance(run, Exception):
            raise targets.CompileError(f"a single row times int{bits} cannot be measured on this device") from run
        what = f"a row times int{bits}, {size // KIB} KiB"
        yield (bits, size), Case(what, len(given[1]) * size, _kernels(run), partial(run, *given))


def _narrow_chain(x: Any, weights: Sequence[Any], interpret: bool) -> Any:
    """x [1,1,D] times each of the weights."""
    from ..model import vector

    for weight in weights:
        expression = ["BTD,DF->BTF"]
        how = vector.shared(expression, x, [weight])
        assert how is not None
        (y,) = vector.einsums(how, x, [weight], interpret=interpret)
        x = (y / (x.shape[-1] * 8)).astype(x.dtype)
    return x


def options(platform: str, precision: str) -> dict[str, Any]:
    """XLA's, with which the products are compiled: on a GPU one of a single row stays a product, as in decode; but not
    of int8, for then XLA writes the weights out in int32 first."""
    from . import steps

    return steps.ROWS_STAY_PRODUCTS if platform == "cuda" and precision != "int8" else {}


def _ready(
    found: Sequence[tuple[Any, Any, Any]], first: str, threads: int, options: Callable[[str], Mapping[str, Any]]
) -> list[Any]:
    """The same with programs compiled and run once, without those of a type that the device cannot multiply at some
    size: that of the next wider counts. But without the `first` type there is nothing to count."""
    with ThreadPoolExecutor(threads) as pool:
        compiled = [*pool.map(lambda one: _compiled(one[1], one[2], options(one[0][0])), found)]
    lost: set[str] = set()
    for ((precision, m, n, k), _, _), made in zip(found, compiled, strict=True):
        if isinstance(made, Exception):
            if precision == first:
                said = f"products of {precision}, {m} x {k} x {n}, cannot be measured on this device"
                raise targets.CompileError(f"{said}: {str(made).partition(chr(10))[0]}") from made
            lost.add(precision)
    return [(at, made, given) for (at, _, given), made in zip(found, compiled, strict=True) if at[0] not in lost]


def _compiled(program: Any, given: Any, options: Mapping[str, Any]) -> Any:
    """The program, ready; the error where compiler or device do not take it."""
    import jax

    try:
        compiled = program.lower(*given).compile(compiler_options={**options} or None)
        jax.block_until_ready(compiled(*given))
    except jax.errors.JaxRuntimeError as error:
        return error
    return compiled


def copies(sizes: Sizes, kind: str) -> Iterator[tuple[tuple[int, int], Case]]:
    """(bytes of one kernel, bytes of all) and kernels that each read one array and write another, as `turns` says."""
    for size in sizes.copies:
        for count in sizes.footprints:
            trips = max(1, sizes.moved // (size * count))
            compiled, arrays, results = turns(size, count, trips, kind)
            run = _again(compiled, arrays, results)
            # On a CPU a kernel of a loop starts in a tenth of the time that one of a list takes: that stays in its
            # rate. On a GPU each is launched, and so is what counts the trips.
            kernels = count if trips == 1 else 0
            if _platform() == "cuda":
                kernels = _kernels(compiled.lower(arrays, results).compile())
            what = f"{kind} of {size // KIB} KiB, {count} of them"
            yield (size, size * count), Case(what, size * count * trips, kernels, run)


def turns(size: int, count: int, trips: int, kind: str) -> tuple[Any, list[Any], list[Any]]:
    """A program of so many kernels that run one after the other, and all again for `trips` times; what they read; and
    arrays whose place is taken by what they write.

    kind: "copies" write what they read, "transposes" in another order, "reads" only the sum of each row. The arrays are
    lists of numbers, for of a matrix the compiler would choose a layout in which there is nothing to transpose.
    """
    import jax
    import jax.numpy as jnp

    def turned(x: Any, number: Any) -> Any:
        more = (number + 1).astype(x.dtype)
        if kind == "reads":
            return jnp.sum(x.reshape(-1, ROW) * more, axis=1)
        if kind == "transposes":
            side = math.isqrt(x.size)
            x = x.reshape(side, side).T.reshape(-1)
        return x + more

    def each(arrays: list[Any], results: list[Any]) -> list[Any]:
        def trip(number: Any, results: list[Any]) -> list[Any]:
            del results
            return [turned(x, number) for x in arrays]

        return jax.lax.fori_loop(0, trips, trip, results)

    # Of an odd count of numbers a GPU's kernel would load one at a time: an H200 copied those at 1.7 TB/s, not 4.2.
    count_of = {"copies": size // 8, "reads": size // 4 // ROW * ROW}
    line = _square(size // 2).reshape(-1) if kind == "transposes" else jnp.linspace(0.5, 1.5, count_of[kind])
    arrays = [line + 0 for _ in range(count)]
    results = [jnp.zeros(x.size // ROW, x.dtype) if kind == "reads" else x + 1 for x in arrays]
    return jax.jit(each, donate_argnums=1, keep_unused=True), arrays, results


def _again(compiled: Callable[..., Any], arrays: list[Any], results: list[Any]) -> Callable[[], Any]:
    def run() -> Any:
        nonlocal results
        results = compiled(arrays, results)
        return results

    return run


def elementwise(function: Callable[[Any], Any], what: str, flops: int, size: int) -> Case:
    """A function of `size` bytes, of its own result a few times."""
    import jax

    count = 8
    x = _square(size)

    def chain(x: Any) -> Any:
        for _ in range(count):
            x = function(x)
        return x

    return Case(what, x.size * count * flops, 1, partial(jax.jit(chain), x))


def _chain(x: Any, weights: Sequence[Any], platform: str = "cpu") -> Any:
    """x times each of the weights, as the type of x; in the hardware accumulated in float32 (int8: int32).

    A GPU's product gives the type of x itself, as a model's does (layers.einsum): with a conversion after it XLA takes
    a kernel of its own in which both are fused, where a model has the library's, faster by a fifth on an H200. A CPU
    would convert the operands instead, in kernels beside, and multiply float32: nothing of bfloat16 were measured.
    """
    import jax.numpy as jnp

    wide = jnp.int32 if x.dtype == jnp.int8 else x.dtype if platform == "cuda" else jnp.float32
    for weight in weights:
        x = jnp.matmul(x, weight, preferred_element_type=wide).astype(x.dtype)
    return x


def _kernels(compiled: Any) -> int:
    """How many kernels run in a program."""
    kernels: list[Kernel] = []
    itemize_module(hlo.parse(compiled.as_text()), targets.chip("host"), kernels=kernels)
    return sum(kernel.times for kernel in kernels)


def _platform() -> str:
    """Of what is measured: "cpu" or "cuda"."""
    return targets.chip(targets.here()).platform


def jnp_dtype(precision: str) -> Any:
    """The numpy type of a class of operands."""
    import jax.numpy as jnp

    return jnp.dtype(DTYPES[precision])


def _operand(key: Any, shape: tuple[int, int], dtype: Any) -> "jax.Array":
    """Random numbers whose products neither grow nor vanish along the chain."""
    import jax
    import jax.numpy as jnp

    if dtype == jnp.int8:
        return jax.random.randint(key, shape, -127, 128, jnp.int8)
    return (jax.random.normal(key, shape) / math.sqrt(shape[0])).astype(dtype)


def _square(size: int) -> "jax.Array":
    """float32[n, n] of about `size` bytes, each number its own, none of them 0."""
    import jax.numpy as jnp

    side = math.isqrt(size // 4)
    side -= side % 2  # so that there are four numbers for every load
    return jnp.linspace(0.5, 1.5, side * side).reshape(side, side)


def timed(
    cases: Sequence[Case], rounds: int, sample_seconds: float = 0.0, report: Report = lambda _: None
) -> list[float]:
    """Median seconds of each case. All of them are run in turn, round after round, so that what else the machine does
    for a while disturbs few samples of many cases rather than all samples of few."""
    samples: list[list[float]] = [[] for _ in cases]
    for number in range(rounds):
        for case, of_case in zip(cases, samples, strict=True):
            report(f"round {number + 1} of {rounds}: {case.what}")
            of_case.append(_sample(case, sample_seconds))
    return [statistics.median(of_case) for of_case in samples]


def _sample(case: Case, sample_seconds: float) -> float:
    """Seconds of a run after another, as a step is run again and again: of as many as `Sizes` says."""
    import jax

    def seconds(count: int) -> float:
        start = time.perf_counter()
        for _ in range(count - 1):
            case.run()
        jax.block_until_ready(case.run())
        return (time.perf_counter() - start) / count

    jax.block_until_ready(case.run())
    once = seconds(1)
    count = min(MOST_RUNS, math.ceil(sample_seconds / once))
    return seconds(count) if count > 1 else once


class Bench:
    """The microbenchmarks of the device that jax has, in rounds: whatever else is timed may lie between two of them."""

    def __init__(self, sizes: Sizes):
        import jax.numpy as jnp

        self._products = [*matmuls(sizes)]
        self._straight, self._turned = [*copies(sizes, "copies")], [*copies(sizes, "transposes")]
        # A CPU's cores read no faster than they copy, or by what else they do to what they read.
        self._read = [*copies(sizes, "reads")] if _platform() == "cuda" else []
        self._narrow = [*narrow_products(sizes)]
        self._dispatch, self._launch = dispatches(), launches()
        size, self._sample_seconds = sizes.arithmetic, sizes.sample_seconds
        self._vector = elementwise(lambda x: sum(x * (n + 0.5) for n in range(16)) / 128, "vector arithmetic", 33, size)
        self._exponentials = elementwise(
            lambda x: sum(jnp.exp(-n * x) for n in range(1, 9)) / 8, "exponentials", 8, size
        )
        self._samples: dict[int, list[float]] = {}
        self.rounds = 0

    def round(self, report: Report = lambda _: None) -> None:
        """One sample more of each."""
        few = (self._dispatch, self._launch, self._vector, self._exponentials)
        grids = (self._products, self._straight, self._turned, self._read, self._narrow)
        for case in (*few, *(case for grid in grids for _, case in grid)):
            report(case.what)
            self._samples.setdefault(id(case), []).append(_sample(case, self._sample_seconds))
        self.rounds += 1

    def found(self, hardware: Hardware, command: str) -> Calibration:
        """What the medians of all rounds say."""
        seconds = {case: statistics.median(samples) for case, samples in self._samples.items()}
        dispatch, launch = (seconds[id(case)] / case.amount for case in (self._dispatch, self._launch))
        waited = 0.0 if self._sample_seconds else dispatch  # of runs without a pause the next is handed over meanwhile

        def rate(case: Case) -> int:
            """Of its amount a second, without what it takes to start; at least half of the time is its own."""
            whole = seconds[id(case)]
            return max(1, round(case.amount / max(whole - waited - case.kernels * launch, whole / 2)))

        return Calibration(
            hardware=hardware,
            jax=metadata.version("jax"),
            date=datetime.now(UTC).isoformat(timespec="seconds"),
            command=command,
            launch_seconds=launch,
            dispatch_seconds=dispatch,
            matmuls=tuple(MatmulRate(*at, rate(case)) for at, case in self._products),
            copies=tuple(ByteRate(*at, rate(case)) for at, case in self._straight),
            transposes=tuple(ByteRate(*at, rate(case)) for at, case in self._turned),
            reads=tuple(ByteRate(*at, rate(case)) for at, case in self._read),
            narrow=tuple(NarrowRate(*at, rate(case)) for at, case in self._narrow),
            vector_flops_per_second=rate(self._vector),
            transcendentals_per_second=rate(self._exponentials),
        )


def measure(sizes: Sizes, hardware: Hardware, command: str, report: Report = lambda _: None) -> Calibration:
    """The calibration of the device that jax has."""
    bench = Bench(sizes)
    for number in range(sizes.rounds):
        bench.round(lambda what, number=number: report(f"round {number + 1} of {sizes.rounds}: {what}"))
    return bench.found(hardware, command)


# --- the command ---------------------------------------------------------------------------------------------------


def define(values: absl_flags.FlagValues) -> None:
    """Adds every flag."""
    to = flags.Definer(values)
    to.string("out", None, "the file to write. Default: $STEPBILL_CALIBRATION, or one in the user's cache folder")
    to.one_of(("table", "json"), "format", "table", "what standard output carries: table or json")
    flags.define_help(to)


def hardware(target: str) -> Hardware:
    """The device that is measured: this machine's chip, or its CPU."""
    if targets.chip(target).platform == "cpu":
        return calibration.host()
    import jax

    path = Path("/proc/driver/nvidia/version")
    version = driver(path.read_text()) if path.exists() else None
    kind = jax.local_devices()[0].device_kind
    return Hardware("cuda", kind, memory_bytes=targets.chip(target).hbm_bytes, driver=version)


def driver(said: str) -> str | None:
    """The version of an NVIDIA driver, of its own words: `NVRM version: NVIDIA UNIX Open Kernel Module for x86_64
    580.159.04  Release Build ...`."""
    found = re.search(r"Kernel Module\b.*?\s(\d+(?:\.\d+)+)", said)
    return found[1] if found else None


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and saves: 0; 1 where the device cannot do what is measured, 2 where the flags are wrong."""
    return command.run(_run, define, INTRODUCTION, argv, failures=(targets.CompileError,))


def _run(values: absl_flags.FlagValues) -> None:
    target = targets.here()
    platform = targets.chip(target).platform
    if platform not in SIZES:
        raise UsageError(f"this machine's chip is a {target}; what can be measured is a CPU or an NVIDIA GPU")
    out = Path(values.out) if values.out else calibration.default_path(platform)
    check_writable(out.parent, "out")
    if out.is_dir():
        raise UsageError(f"--out={out}: it is a folder; it must be a file, such as {out / 'calibration.json'}")
    targets.prepare(target)
    targets.keep_memory()
    called = " ".join([calibration.COMMAND, *([f"--out={out}"] if values.out else [])])
    with command.status() as say:
        found = measure(SIZES[platform], hardware(target), called, say)
    saved = json.dumps(found.to_json(), indent=1)
    write_whole(out, saved + "\n")
    print(saved if values.format == "json" else _text(found, out), end="\n" if values.format == "json" else "")


def _text(found: Calibration, out: Path) -> str:
    of = found.hardware
    where = f"{of.device}, {of.cores} cores" if of.cores else f"{of.device}, driver {of.driver}"
    parts = [f"{where}, jax {found.jax}, {found.date}: {out}\n"]
    for precision in dict.fromkeys(rate.precision for rate in found.matmuls):
        parts.append(f"products of {precision}, FLOP/s: rows of m by weights of k x n\n" + _products(found, precision))
    for name, rates in (("copies", found.copies), ("transposes", found.transposes), ("reads", found.reads)):
        if rates:
            parts.append(f"{name}, B/s: bytes of a kernel by bytes of the program\n" + _bytes(rates))
    if found.narrow:
        rows: list[dict[str, str]] = []
        for one in found.narrow:
            rate, size = render.amount(one.bytes_per_second), f"{one.bytes / MIB:.1f} MiB"
            rows.append({"bits": str(one.bits), "a kernel": size, "B/s": rate})
        parts.append("a row times weights of few bits, from memory\n" + render.columns(rows))
    parts.append(
        f"vector {render.amount(found.vector_flops_per_second, 'FLOP/s')}, "
        f"exponentials {render.amount(found.transcendentals_per_second, '/s')}, "
        f"launch {render.seconds(found.launch_seconds)}, dispatch {render.seconds(found.dispatch_seconds)}\n"
    )
    return "\n".join(parts)


def _products(found: Calibration, precision: str) -> str:
    rows: dict[int, dict[str, str]] = {}
    for rate in found.matmuls:
        if rate.precision == precision:
            row = rows.setdefault(rate.m, {"m": str(rate.m)})
            row[f"{rate.k}x{rate.n}"] = render.amount(rate.flops_per_second)
    return render.columns([*rows.values()])


def _bytes(rates: Sequence[ByteRate]) -> str:
    rows: dict[int, dict[str, str]] = {}
    for rate in rates:
        row = rows.setdefault(rate.bytes, {"a kernel": f"{rate.bytes / MIB:g} MiB"})
        row[f"of {rate.footprint_bytes // rate.bytes}"] = render.amount(rate.bytes_per_second)
    return render.columns([*rows.values()])


if __name__ == "__main__":
    sys.exit(main())
