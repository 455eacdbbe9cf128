"""`python -m stepbill.experiments.quality`: how well small models predict text, by their size, bits and teacher.

Trains a ladder of byte models on the same bytes, and one size of them a second time, taught by the largest; measures
each on held-out text as it is and in few bits; and writes a small JSON. quality.json beside this file is such a run:
what the drivers of cost put beside their bills. It says what happens to models of at most a few million parameters.
"""

import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from absl import flags as absl_flags

from ..profiling import render
from ..profiling.kept import write_whole
from . import command, flags, train
from .flags import UsageError
from .perplexity import Way
from .run_folder import Stopped, check_writable

if TYPE_CHECKING:
    from .data import Corpus

SCHEMA = 1
FILE = Path(__file__).with_name("quality.json")
COMMAND = "python -m stepbill.experiments.quality"
# The first is what the others are held against.
WAYS = (
    Way(),
    Way("int8"),
    Way("int4:128"),
    Way("int4:32"),
    Way(cache_dtype="int8"),
    Way("int8", "int8", "int8"),
)
# One size is trained in these ways, too: what changes of its config. The last tells how far luck alone goes.
VARIANTS: Mapping[str, Mapping[str, int]] = {
    "mqa": {"num_kv_heads": 1},
    "window": {"window": 32, "global_every": 4},
    "seed": {},
}
LAYERS = 4
DIGITS = 6  # of bits a byte that are kept: a millionth

INTRODUCTION = f"""quality: trains a ladder of small models and measures each, as it is and in few bits

  {COMMAND} --out=runs/quality --write=quality.json

Killed at any moment, the same command goes on where it was.
"""


# --- what was measured -----------------------------------------------------------------------------------------------


class Uncertain(NamedTuple):
    """A mean over batches, and its standard error: the batches' standard deviation by the root of their number."""

    value: float
    standard_error: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Uncertain":
        """ValueError where there are fewer than two values."""
        return cls(statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values)))

    def __str__(self) -> str:
        return f"{self.value:+.4f} ± {self.standard_error:.4f}"


@dataclass(frozen=True)
class Measured:
    """One model in one way.

    Attributes:
      way: how weights, cache and activations are kept. weights_bytes: as they are stored, scales included.
      bits: bits a byte of each batch of held-out text; the same batches in every row of a file.
    """

    way: Way
    weights_bytes: int
    bits: tuple[float, ...]

    @property
    def bits_per_byte(self) -> Uncertain:
        return Uncertain.of(self.bits)

    def more_than(self, other: "Measured") -> Uncertain:
        """How many bits a byte more than another one. The difference is taken batch by batch: what makes one text
        harder than another for both is no error of it."""
        return Uncertain.of([mine - theirs for mine, theirs in zip(self.bits, other.bits, strict=True)])


@dataclass(frozen=True)
class Model:
    """One model that was trained: its sizes, and its rows, the first as it is. teacher: the name of the model that
    taught it; None: nobody did."""

    name: str
    width: int
    parameters: int
    sizes: Mapping[str, int]
    teacher: str | None
    rows: tuple[Measured, ...]

    @property
    def plain(self) -> Measured:
        return self.rows[0]

    def in_way(self, way: Way) -> Measured | None:
        """The row of a way, if it was measured."""
        return next((row for row in self.rows if row.way == way), None)


@dataclass(frozen=True)
class Quality:
    """What one run measured.

    made: what its figures depend on and the command that made them, for people to read. variants: of one size of
    `models`, trained alike but for what VARIANTS says; each has its one row, as it is.
    """

    made: Mapping[str, Any]
    models: tuple[Model, ...]
    variants: tuple[Model, ...] = ()

    @property
    def ladder(self) -> tuple[Model, ...]:
        """Those that nobody taught, from the largest on."""
        return tuple(sorted((m for m in self.models if m.teacher is None), key=lambda m: -m.parameters))

    @property
    def context(self) -> int:
        """T, positions that the models were trained on and measured with."""
        return int(self.made["context"])

    @property
    def taught(self) -> Iterator[tuple[Model, Model, Model]]:
        """Each that was taught, with the same size alone and with its teacher."""
        for one in self.models:
            if one.teacher is not None:
                alone = next(m for m in self.ladder if m.parameters == one.parameters)
                yield one, alone, next(m for m in self.models if m.name == one.teacher)

    def variant(self, name: str) -> tuple[Model, Model] | None:
        """That of VARIANTS, and the same size without it; None where it was not measured."""
        found = next((one for one in self.variants if one.name.endswith(f"-{name}")), None)
        return found and (found, next(one for one in self.ladder if one.width == found.width))

    @property
    def luck(self) -> str:
        """What the same size makes of other first weights and another order of the text; "" if nobody measured it."""
        found = self.variant("seed")
        return f"; another seed alone: {found[0].plain.more_than(found[1].plain).value:+.3f}" if found else ""

    def __str__(self) -> str:
        """Where the figures are from, in half a sentence."""
        made = self.made
        return (
            f"models of up to {self.ladder[0].parameters / 1e6:.2g} million parameters, {made['tokens'] / 1e6:.2g} "
            f"million bytes of {made['text']}, seed {made['seed']}{self.luck}"
        )

    def to_json(self) -> dict[str, Any]:
        """`schema` and every attribute; means and standard errors are for people, and made again of the batches."""

        def saved(model: Model) -> dict[str, Any]:
            rows = [
                vars(row.way)
                | {"weights_bytes": row.weights_bytes}
                | {name: round(value, DIGITS) for name, value in _figures(row, model).items()}
                | {"bits": [round(value, DIGITS) for value in row.bits]}
                for row in model.rows
            ]
            return asdict(model) | {"rows": rows}

        models, variants = ([saved(one) for one in of] for of in (self.models, self.variants))
        return {"schema": SCHEMA, "made": dict(self.made), "models": models, "variants": variants}

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> "Quality":
        """What `to_json` wrote; ValueError, KeyError, TypeError or AttributeError for what it did not."""
        if saved["schema"] != SCHEMA:
            raise ValueError(f"schema is {saved['schema']}; it must be {SCHEMA}")

        def model(one: Mapping[str, Any]) -> Model:
            rows = tuple(
                Measured(
                    Way(row["weights"], row["cache_dtype"], row["activations"]),
                    int(row["weights_bytes"]),
                    tuple(map(float, row["bits"])),
                )
                for row in one["rows"]
            )
            return Model(**{name: one[name] for name in ("name", "width", "parameters", "sizes", "teacher")}, rows=rows)

        models, variants = (tuple(map(model, of)) for of in (saved["models"], saved.get("variants", ())))
        found = cls(dict(saved["made"]), models, variants)
        found.check()
        return found

    def check(self) -> None:
        """ValueError or KeyError where it is not whole: rows of other batches, a teacher that is not there, ..."""
        if self.context < 1 or len(self.ladder) < 2:
            raise ValueError("it must have a context, and at least two models that nobody taught")
        for model in (*self.models, *self.variants):
            if model.parameters < 1 or model.width < 1 or not model.rows or model.plain.way != WAYS[0]:
                raise ValueError(f"model {model.name} must have sizes, and rows of which the first is {WAYS[0]}")
            for row in model.rows:
                if len(row.bits) != len(self.models[0].plain.bits) or len(row.bits) < 2:
                    raise ValueError(
                        f"model {model.name} must have rows of the same batches as the first, two at least"
                    )
                if not all(0 < value < math.inf for value in row.bits):
                    raise ValueError(f"model {model.name} must have rows of positive numbers")
            if model.teacher is not None:
                of_teacher = [m for m in self.models if m.name == model.teacher]
                if not of_teacher or all(m.parameters != model.parameters for m in self.ladder):
                    raise ValueError(f"model {model.name} must have its teacher, and its own size alone, beside it")
        if lost := {model.width for model in self.variants} - {model.width for model in self.ladder}:
            raise ValueError(f"variants of width {min(lost)} must have their own size alone beside them")
        str(self)


def _figures(row: Measured, model: Model) -> dict[str, float]:
    mean, more = row.bits_per_byte, row.more_than(model.plain)
    return {
        "bits_per_byte": mean.value,
        "standard_error": mean.standard_error,
        "more": more.value,
        "more_standard_error": more.standard_error,
    }


def read(path: str) -> Quality:
    """The file of --quality; UsageError where it is none that this program has written."""
    try:
        return Quality.from_json(json.loads(Path(path).expanduser().read_text()))
    except OSError as error:
        problem = f"cannot read it: {(error.strerror or str(error)).lower()}"
    except KeyError as error:
        problem = f"it has no {error}"
    except (ValueError, TypeError, AttributeError) as error:
        problem = " ".join(str(error).split())
    raise UsageError(f"--quality={path}: {problem}; it must be a file that {COMMAND} writes")


def define_quality(to: flags.Definer) -> None:
    """Adds --quality, which `read` reads."""
    to.string("quality", str(FILE), f"what was measured of small models: a file that {COMMAND} writes")


# --- measuring -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    """A validated command line. argv: of `train`, the same for every model."""

    out: Path
    write: Path
    widths: tuple[int, ...]
    student: int
    learning_rate: float
    argv: tuple[str, ...]
    batches: int | None
    text: str
    given: Mapping[str, Any] = field(default_factory=dict)

    def training(self, width: int, teacher: Path | None = None, variant: str = "") -> train.Request:
        """How a model is trained: LAYERS layers of two or three heads, F = 8/3 D up to the next multiple of 64.

        Narrower models learn faster, in inverse proportion to their width (Yang et al., 2022, table 3: Adam).
        """
        heads = 3 if width % 3 == 0 else 2
        suffix = f"-{variant}" if variant else "" if teacher is None else "-taught"
        sizes = {
            "out": self.out / f"width-{width}{suffix}",
            "num_layers": LAYERS,
            "width": width,
            "heads": heads,
            "kv_heads": heads,
            "head_width": width // heads,
            "mlp_width": math.ceil(width * 8 // 3 / 64) * 64,
            "learning_rate": self.learning_rate * self.widths[0] / width,
        }
        if teacher is not None:
            sizes["teacher"] = teacher
        argv = [*(f"--{name}={value}" for name, value in sizes.items()), *self.argv]
        asked = train.request(flags.parse(argv, train.define))
        if not variant:
            return asked
        config = replace(asked.config, **VARIANTS[variant])  # pyright: ignore[reportArgumentType]
        return replace(asked, config=config, seed=asked.seed + (variant == "seed"))


def define(values: absl_flags.FlagValues) -> None:
    """Adds every flag."""
    to = flags.Definer(values)
    to.string("out", None, "the folder of the runs, one in it for each model")
    to.string("write", None, "the JSON file to write")
    to.string("widths", "192,128,96,64", "D of each model, multiples of 4 or 6, with commas")
    to.count("student", 96, "which of them is trained a second time, taught by the largest; and once for each variant")
    to.string("data", None, "which files to train on, a glob. Default: the source of Python's standard library")
    to.count("batch", 8, "sequences in an update")
    to.count("context", 256, "positions in a sequence")
    to.count("steps", 400, "updates of each model")
    to.integer("warmup", 50, "updates over which the learning rate rises; a cosine takes it down after that", 0)
    to.number("learning_rate", 2e-3, "the highest, of the largest model; in inverse proportion to the width", 0.0)
    to.integer("seed", 0, "of the first weights and of the order of the data", 0)
    to.count("batches", None, "of held-out text that are measured, spread over it. Default: all there are")
    to.string("cache", "~/.cache/stepbill", "where the tokens of a corpus are kept")
    flags.define_help(to)


def request(values: absl_flags.FlagValues) -> Request:
    """The validated request; UsageError names the flag that is wrong."""
    for name, what in (("out", "the folder of the runs"), ("write", "the JSON file to write")):
        if getattr(values, name) is None:
            raise UsageError(f"--{name}: it needs a value, {what}")
    try:
        widths = sorted({int(part) for part in values.widths.split(",")}, reverse=True)
    except ValueError:
        widths = []
    if len(widths) < 2 or widths[-1] < 4 or any(width % 4 and width % 6 for width in widths):
        raise UsageError(f"--widths={values.widths}: it must be two or more multiples of 4 or 6, with commas between")
    if values.student not in widths[1:]:
        smaller = " or ".join(map(str, widths[1:]))
        raise UsageError(f"--student={values.student}: it must be one of --widths below the largest, {smaller}")
    given = flags.given_flags(values)
    shared = ("batch", "context", "steps", "warmup", "seed", "cache", "data")
    argv = [f"--{name}={value}" for name in shared if (value := getattr(values, name)) is not None]
    python = ".".join(map(str, sys.version_info[:3]))
    asked = Request(
        Path(values.out).expanduser().absolute(),
        Path(values.write).expanduser().absolute(),
        tuple(widths),
        values.student,
        values.learning_rate,
        # Held-out text is measured here, not while training.
        (*argv, f"--evaluate_every={values.steps}", "--evaluate_batches=1", "--checkpoint_every=100", "--keep=1"),
        values.batches,
        values.data or f"the standard library of Python {python}",
        given,
    )
    asked.training(asked.student)
    return asked


def measure(asked: Request, say: Callable[[str], None] = lambda _: None) -> Quality:
    """Trains what is not trained yet, and measures all. UsageError, Stopped."""
    from ..model.tokenizer import Tokenizer

    about: dict[str, Any] = {}

    def made(width: int, teacher: Path | None = None, variant: str = "") -> Model:
        todo = asked.training(width, teacher, variant)
        name = todo.out.name
        figures = train.train(todo, lambda text, step: say(f"{name}: step {step}: {text}"))
        say(f"{name}: measuring")
        corpus = train.read_corpus(todo.data, todo.cache, Tokenizer(), todo.config)
        rows = tuple(_rows(todo, corpus, asked.batches, WAYS[:1] if variant else WAYS))
        sizes = {flag: getattr(todo.config, name) for flag, (name, _) in flags.SIZES.items()}
        if not variant:
            about.update(_about(asked, todo, corpus, figures, len(rows[0].bits)))
        return Model(name, width, todo.config.parameters, sizes, teacher and teacher.parent.name, rows)

    models = [made(width) for width in asked.widths]
    models.append(made(asked.student, asked.out / models[0].name / "model"))
    found = Quality(about, tuple(models), tuple(made(asked.student, variant=name) for name in VARIANTS))
    found.check()
    return found


def _rows(todo: train.Request, corpus: "Corpus", count: int | None, ways: Sequence[Way]) -> Iterator[Measured]:
    """A trained model in each of these ways, computed in bfloat16, as a chip does."""
    import jax

    from ..model import checkpoint

    for way in ways:
        config, params = checkpoint.read(todo.out / "model", dtype="bfloat16", **way.changes)  # pyright: ignore[reportArgumentType]
        cached = way.cache_dtype != flags.BF16
        try:
            losses = train.held_out_losses(config.resolve(), corpus, todo.batch, todo.context, count, cached)(params)
        except ValueError as error:
            raise flags.as_usage(error) from None
        if len(losses) < 2:
            raise UsageError(f"--batches={count}: {len(losses)} batch was measured; a standard error takes two")
        stored = sum(leaf.size * jax.dtypes.itemsize_bits(leaf.dtype) for leaf in jax.tree.leaves(params)) // 8
        yield Measured(way, stored, tuple(round(corpus.bits_per_byte(nats), DIGITS) for nats in losses))


def _about(
    asked: Request, todo: train.Request, corpus: "Corpus", figures: Mapping[str, Any], batches: int
) -> dict[str, Any]:
    """What the figures depend on, and the command that makes them again."""
    from .bench_bill import environment

    apart = ("out", "write", "cache")
    given = [f"--{name}={value}" for name, value in asked.given.items() if name not in apart]
    return {
        "command": " ".join([COMMAND, "--out=DIR", "--write=FILE", *given]),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "hardware": environment(),
        "text": asked.text,
        "corpus": corpus.digest,
        "held_out_bytes": corpus.held_out_bytes,
        "measured": f"{batches} batches of {todo.batch} x {todo.context} bytes of it, computed in bfloat16",
        **{name: getattr(todo, name) for name in ("steps", "batch", "context", "seed")},
        "tokens": figures["tokens"],
        "learning_rate": f"{asked.learning_rate:g} at width {asked.widths[0]}, in inverse proportion to the width",
        "recipe": {name: value for name, value in asdict(todo.recipe).items() if name != "learning_rate"},
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Runs it: 0; 2 where the flags are wrong; 1 where training had to stop."""
    return command.run(_run, define, INTRODUCTION, argv, (Stopped,))


def _run(values: absl_flags.FlagValues) -> None:
    from ..profiling import targets

    asked = request(values)
    for folder, flag in ((asked.out, "out"), (asked.write.parent, "write")):
        check_writable(folder, flag)
    targets.prepare(targets.here())
    with command.status() as say:
        found = measure(asked, say)
    write_whole(asked.write, _compact(found.to_json()))
    print(_table(found), end="")


def _compact(saved: Any) -> str:
    """JSON with a line for each row."""
    text = json.dumps(saved, indent=1)
    for row in (row for model in (*saved["models"], *saved["variants"]) for row in model["rows"]):
        text = text.replace(json.dumps(row, indent=1).replace("\n", "\n    "), json.dumps(row))
    return text + "\n"


def _table(found: Quality) -> str:
    rows = []
    for model in (*found.models, *found.variants):
        for row in model.rows:
            mean = row.bits_per_byte
            rows.append(
                {
                    "model": model.name,
                    "parameters": f"{model.parameters:,}",
                    **vars(row.way),
                    "MB": f"{row.weights_bytes / 1e6:.3f}",
                    "bits a byte": f"{mean.value:.4f} ± {mean.standard_error:.4f}",
                    "more than bf16": "" if row is model.plain else str(row.more_than(model.plain)),
                }
            )
    steps = [
        f"{small.name} against {large.name}: {small.plain.more_than(large.plain)} bits a byte"
        for large, small in pairwise(found.ladder)
    ]
    taught = [
        f"{one.name} against {alone.name}: {one.plain.more_than(alone.plain)} bits a byte"
        for one, alone, _ in found.taught
    ]
    pairs = filter(None, map(found.variant, VARIANTS))
    varied = [f"{one.name} against {base.name}: {one.plain.more_than(base.plain)} bits a byte" for one, base in pairs]
    return render.columns(rows) + "\n" + "\n".join([*steps, *taught, *varied]) + "\n"


if __name__ == "__main__":
    sys.exit(main())
