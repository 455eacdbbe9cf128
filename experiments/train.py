"""`python -m stepbill.experiments.train`: trains a model on text, for real.

One compiled step of `steps.build`; batches that are a function of their number; checkpoints that are written beside the
training and appear whole or not at all. Killed at any moment, the same command goes on from the last checkpoint, and
ends with the bits that it would have ended with.
"""

import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags as absl_flags

from ..profiling import calibration, render
from ..profiling.kept import write_whole
from ..profiling.roofline import PICOSECONDS
from . import command, flags
from .flags import UsageError
from .run_folder import Checkpoints, Log, Stopped, alone, check_room, check_writable, remember

if TYPE_CHECKING:
    from ..model.config import ModelConfig
    from ..model.tokenizer import Tokenizer
    from ..model.train import Recipe
    from ..profiling.calibration import Calibration
    from ..profiling.chips import Chip
    from .data import Batches, Corpus
    from .steps import Step

INTRODUCTION = """train: AdamW on text, with checkpoints, held-out perplexity and what the machine achieves

  python -m stepbill.experiments.train --out=runs/nano --steps=2000
  python -m stepbill.experiments.train --out=runs/mine --data='books/**/*.txt' --width=512 --num_layers=8 --steps=20000

The same command goes on where an interrupted run has left off.
"""
OTHERS = ("objective", "near", "ratio")  # fields of a recipe that say how to train by preferences or rewards


@dataclass(frozen=True)
class Request:
    """A validated command line: what to train, on what, how long, and where to."""

    config: "ModelConfig"
    recipe: "Recipe"
    out: Path
    batch: int
    context: int
    steps: int
    cache: Path
    seed: int = 0
    data: str | None = None
    tokenizer: str | None = None
    checkpoint_every: int = 200
    keep: int = 2
    evaluate_every: int = 200
    evaluate_batches: int = 16
    logdir: Path | None = None
    teacher: Path | None = None


# --- the command line ------------------------------------------------------------------------------------------------


def define(values: absl_flags.FlagValues) -> None:
    """Adds every flag."""
    to = flags.Definer(values)
    flags.define_model(to)
    to.string("out", None, "the folder of the run: its checkpoints, its log, at the end the model")
    to.string("data", None, "which files to train on, a glob. Default: the source of Python's standard library")
    to.string("tokenizer", None, "a tokenizer.json; without it, tokens are bytes")
    to.count("batch", 8, "sequences in an update")
    to.count("context", 256, "positions in a sequence")
    to.count("steps", 1000, "updates in all")
    to.count("accumulate", 1, "pieces that a batch is cut into, one after the other")
    to.number("learning_rate", 1e-3, "the highest", 0.0)
    to.integer("warmup", 100, "updates over which the learning rate rises; a cosine takes it down after that", 0)
    to.number("weight_decay", 0.1, "of matrices", 0.0)
    to.number("clip", 1.0, "the gradient's norm is cut to this; 0: it is not", 0.0)
    to.number("balance_loss", 0.01, "of a model with experts: how much of the loss is that of their imbalance", 0.0)
    to.one_of(tuple(flags.DTYPES), "dtype", "f32", "what is computed in; weights are kept in float32. On a chip: bf16")
    to.integer("seed", 0, "of the first weights and of the order of the data", 0)
    to.count("checkpoint_every", 200, "updates between checkpoints")
    to.count("keep", 2, "how many checkpoints are kept")
    to.count("evaluate_every", 200, "updates between measurements on held-out text")
    to.count("evaluate_batches", 16, "batches of it that are measured")
    to.string("logdir", None, "a folder for TensorBoard: loss, perplexity, tokens/s, MFU, seconds of a step")
    to.string("cache", "~/.cache/stepbill", "where the tokens of a corpus are kept")
    to.string("teacher", None, "a checkpoint to learn from, too: distillation")
    to.number("distill", 0.5, "with --teacher: how much of the loss is the divergence from it", 0.0)
    to.number("temperature", 2.0, "with --teacher: softens both probabilities", 0.0)
    flags.define_help(to)


def request(values: absl_flags.FlagValues) -> Request:
    """The validated request; UsageError names the flag that is wrong."""
    from ..model.train import Recipe

    if values.out is None:
        raise UsageError("--out: it needs a value, the folder of the run")
    if values.batch % values.accumulate:
        raise UsageError(f"--accumulate={values.accumulate}: it must divide --batch, {values.batch}")
    config = flags.model_config(values, "train")
    if values.context > config.max_context:
        raise UsageError(f"--context={values.context}: {config.name} takes 1 to {config.max_context} positions")
    given = flags.given_flags(values)
    if config.activations != "full":
        raise UsageError(f"--activations={config.activations}: in training no weights are int8; it must be full")
    if config.experts is not None:
        config = replace(config, experts=replace(config.experts, balance_loss=values.balance_loss))
    elif "balance_loss" in given:
        raise UsageError(f"--balance_loss={values.balance_loss}: {config.name} has no experts")
    if values.teacher is None and (alien := {"distill", "temperature"} & set(given)):
        raise UsageError(f"--{min(alien)}={given[min(alien)]}: it goes with --teacher")
    try:
        recipe = Recipe(
            values.learning_rate,
            values.warmup,
            values.steps,
            values.weight_decay,
            values.clip,
            values.accumulate,
            *((values.distill, values.temperature) if values.teacher else ()),
        )
    except ValueError as error:
        raise flags.as_usage(error, given) from None

    def folder(name: str | None) -> Path | None:
        return None if name is None else Path(name).expanduser().absolute()

    return Request(
        replace(config, dtype=flags.DTYPES[values.dtype], param_dtype="float32"),
        recipe,
        Path(values.out).expanduser().absolute(),
        values.batch,
        values.context,
        values.steps,
        Path(values.cache).expanduser().absolute(),
        values.seed,
        values.data,
        values.tokenizer,
        values.checkpoint_every,
        values.keep,
        values.evaluate_every,
        values.evaluate_batches,
        folder(values.logdir),
        folder(values.teacher),
    )


# --- training --------------------------------------------------------------------------------------------------------


@dataclass
class Pace:
    """How fast steps are made, and how fast they might be.

    tokens: of one. flops: matmul FLOPs that one cannot do without, by the closed form. peak: FLOP/s of the chip, and
    predicted_seconds: of one step, by its bill; None where it is not known.
    """

    tokens: int
    flops: int
    peak: int | None
    predicted_seconds: float | None
    since: int
    started: float = field(default_factory=time.perf_counter)

    def restart(self, step: int) -> None:
        """Counts from the end of this step on."""
        self.since, self.started = step, time.perf_counter()

    def at(self, step: int) -> dict[str, float | None]:
        """Rates up to the end of this step, and seconds of one; what is not known is None.

        mfu: model FLOPs utilisation (Chowdhery et al., 2022, appendix B): `flops` a second over the peak, however many
        the program does besides. measured_over_predicted: of the seconds of a step; a run that slows down has more.
        """
        seconds = (time.perf_counter() - self.started) / (step - self.since)
        flops_per_second = self.flops / seconds
        predicted = self.predicted_seconds
        return {
            "tokens_per_second": self.tokens / seconds,
            "flops_per_second": flops_per_second,
            "mfu": flops_per_second / self.peak if self.peak else None,
            "step_seconds": seconds,
            "predicted_step_seconds": predicted,
            "measured_over_predicted": seconds / predicted if predicted else None,
        }


class Losses:
    """The losses of steps that are under way. They are read one step behind, so that the next is never waited for."""

    def __init__(self) -> None:
        self._unread: list[tuple[int, Any]] = []
        self.newest = math.nan  # of those that have been read

    def add(self, step: int, loss: Any) -> None:
        """The loss of the step that has just been started; waits for the one before. Raises Stopped."""
        self.last()
        self._unread.append((step, loss))

    def last(self) -> float:
        """The newest loss, once it is there. Raises Stopped."""
        for step, loss in self._unread:
            self.newest = float(loss)
            if not math.isfinite(self.newest):
                raise Stopped(step, f"the loss is {self.newest} at step {step}")
        self._unread = []
        return self.newest


@dataclass(frozen=True)
class Job:
    """A request that can be carried out: its step, what the step is given beside its state, and how it is measured."""

    step: "Step"
    batches: "Batches"
    taught: tuple[Any, ...]
    evaluate: Callable[[Any], dict[str, float]]
    tokenizer: "Tokenizer"
    about: dict[str, Any]  # all that the bits of the run depend on


def train(
    request: Request, show: Callable[[str, int], None] = lambda *_: None, report: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """Trains, or goes on training, until `steps`; the last line of the log.

    show: is told what is going on, and at which step. report: what is to be kept of it, line by line.
    Raises UsageError before it starts where it could not end, Stopped where it cannot go on.
    """
    check_writable(request.out, "out")
    with alone(request.out):
        show("reading the corpus", 0)
        job = prepare(request)
        remember(request.out, job.about)
        show("compiling", 0)
        with Checkpoints(request.out, request.keep) as checkpoints:
            try:
                params, figures = _carry_out(request, job, checkpoints, show, report)
            except Stopped as error:
                raise Stopped(error.step, f"{error}; {checkpoints.last_before(error.step)}") from None
        _export(request.out, job, params)
    return figures


def _carry_out(
    request: Request,
    job: Job,
    checkpoints: Checkpoints,
    show: Callable[[str, int], None],
    report: Callable[[str], None],
) -> tuple[Any, dict[str, Any]]:
    """The parameters after the last step, and the last line of the log."""
    step = job.step
    compiled = step.lower().compile()
    show("predicting how long a step takes", 0)
    predicted = _predicted_seconds(compiled)
    if predicted is None:
        report(f"no peaks known for this host, so no prediction of a step: run {calibration.COMMAND}")
    done, state = checkpoints.restore(_state(step))
    state = state or _first_state(step, request.seed)
    if done:
        report(f"step {done}: going on from here")
    losses = Losses()
    with Log(request.out, done, request.logdir) as log:
        pace = Pace(step.batch * step.context, _flops(step), _peak(step.config.dtype), predicted, done)
        for number in range(done + 1, request.steps + 1):
            params, opt_state, loss = compiled(*state, job.batches[number - 1], *job.taught)
            state = params, opt_state
            losses.add(number, loss)
            show(f"loss {losses.newest:.3f}, {_rates(pace.at(number))}", number)
            last = number == request.steps
            if last or number % request.evaluate_every == 0:
                figures = {"tokens": number * pace.tokens, "loss": losses.last(), **pace.at(number)}
                checkpoints.check(number, state)
                log(number, figures | job.evaluate(params))
                report(_sentence(log.last))
                pace.restart(number)
            if last or number % request.checkpoint_every == 0:
                losses.last()
                checkpoints.save(number, state)
        checkpoints.wait(request.steps + 1)
        return state[0], log.last


def _sentence(figures: dict[str, Any]) -> str:
    return (
        f"step {figures['step']}: loss {figures['loss']:.3f}, held-out perplexity {figures['perplexity']:.3f} "
        f"({figures['bits_per_byte']:.3f} bits a byte), {_rates(figures)}"
    )


def _rates(figures: dict[str, Any]) -> str:
    mfu = "unknown" if figures["mfu"] is None else f"{figures['mfu']:.1%}"
    text = (
        f"{figures['tokens_per_second']:,.0f} tokens/s, {figures['flops_per_second'] / 1e9:,.1f} GFLOP/s (MFU {mfu}), "
        f"{render.seconds(figures['step_seconds'])} a step"
    )
    if (over := figures["measured_over_predicted"]) is not None:
        text += f", {over:.2f} times the predicted {render.seconds(figures['predicted_step_seconds'])}"
    return text


def _calibrated() -> "tuple[Chip, Calibration | None]":
    """The chip at hand, and what was measured of it."""
    from ..profiling import targets

    chip = targets.chip(targets.here())
    try:
        return chip, calibration.of(chip)
    except calibration.CalibrationError as error:
        raise UsageError(str(error)) from None


def _peak(dtype: str) -> int | None:
    """FLOP/s of the chip at hand with operands of this type: by its datasheet, else (on a host) the highest that was
    measured on it; None where neither is known."""
    chip, measured = _calibrated()
    if measured is not None and not chip.peak_flops:
        chip = measured.fastest(chip)
    return chip.peak_flops.get("f32" if dtype == "float32" and chip.platform != "tpu" else "bf16")


def _predicted_seconds(compiled: Any) -> float | None:
    """Seconds that the bill predicts for a compiled step (see roofline.py); None where no peaks are known."""
    from ..profiling import hlo
    from ..profiling.walk import itemize_module

    chip, measured = _calibrated()
    if measured is None and not chip.peak_flops:
        return None
    with hlo.collection_paused():
        bill = itemize_module(hlo.parse(compiled.as_text()), chip, calibration=measured)
    return bill.total.predicted_picoseconds / PICOSECONDS or None


# --- what it needs ---------------------------------------------------------------------------------------------------


def prepare(request: Request) -> Job:
    """Reads what a request needs; UsageError where it has not got it, or could not keep what it makes."""
    from . import steps
    from .data import Batches

    config, tokenizer = request.config, _tokenizer(request.tokenizer)
    if request.logdir is not None:
        check_writable(request.logdir, "logdir")
    _calibrated()  # a calibration that is none is told of now
    teacher = _teacher(request, tokenizer)
    batch, context = request.batch, request.context
    try:
        step = steps.build(config, "train", batch=batch, context=context, recipe=request.recipe, teacher=teacher)
        check_room(request.out, _state(step), request.keep)
        corpus = read_corpus(request.data, request.cache, tokenizer, config)
        batches = Batches(corpus.train, batch, context, request.seed)
        evaluate = evaluator(step.config, corpus, batch, context, request.evaluate_batches)
    except ValueError as error:
        raise flags.as_usage(error) from None
    about = {
        "config": {name: value for name, value in config.to_json().items() if name != "name"},
        # It trains by tokens: what is of other objectives alone would only keep older runs from going on.
        "recipe": {name: value for name, value in asdict(request.recipe).items() if name not in OTHERS},
        **{name: getattr(request, name) for name in ("batch", "context", "seed")},
        "teacher": str(request.teacher) if request.teacher else None,
        "corpus": corpus.digest,
    }
    return Job(step, batches, () if teacher is None else teacher[1:], evaluate, tokenizer, about)


def _state(step: "Step") -> tuple[Any, Any]:
    """Abstract parameters and optimizer state."""
    return step.arguments[:2]


def _tokenizer(path: str | None) -> "Tokenizer":
    from ..model.tokenizer import Tokenizer

    try:
        return Tokenizer() if path is None else Tokenizer.read(Path(path).expanduser())
    except ValueError as error:
        raise UsageError(f"--tokenizer={path}: {error}") from None


def read_corpus(data: str | None, cache: Path, tokenizer: "Tokenizer", config: "ModelConfig") -> "Corpus":
    """The corpus as tokens; UsageError where there is none, it cannot be kept, or the vocabulary does not hold it."""
    from .data import corpus

    if config.vocabulary < tokenizer.vocabulary:
        raise UsageError(f"--vocabulary={config.vocabulary}: the tokenizer has {tokenizer.vocabulary} tokens")
    encode = None if tokenizer.library is None else tokenizer.encode
    try:
        return corpus(data, cache / "corpora", encode, tokenizer.digest)
    except ValueError as error:
        raise flags.as_usage(error) from None
    except OSError as error:
        raise UsageError(f"--cache={cache}: {error}") from None


def _teacher(request: Request, tokenizer: "Tokenizer") -> Any:
    """The graph and the parameters of the model to learn from; None where there is none, UsageError where none could
    be learnt from it."""
    if request.teacher is None:
        return None
    from ..model import checkpoint
    from ..model.tokenizer import Tokenizer
    from ..model.transformer import graph_of

    try:
        config, params = checkpoint.read(request.teacher, dtype=request.config.dtype)
        theirs = Tokenizer.read(request.teacher)
    except (OSError, ValueError) as error:
        raise UsageError(f"--teacher={request.teacher}: {error}") from None
    wrong = ""
    if config.vocabulary != request.config.vocabulary:
        wrong = f"its vocabulary is {config.vocabulary}, the student's {request.config.vocabulary}"
    elif config.max_context < request.context:
        wrong = f"it takes 1 to {config.max_context} positions, and --context={request.context}"
    elif theirs.digest != tokenizer.digest:
        wrong = "its tokens are others than the student's: " + (
            "it has none but bytes" if theirs.library is None else f"give --tokenizer={request.teacher}"
        )
    if wrong:
        raise UsageError(f"--teacher={request.teacher}: {wrong}")
    return graph_of(config), params


def _first_state(step: "Step", seed: int) -> tuple[Any, Any]:
    import jax

    from ..model.train import make_optimizer
    from .steps import first_params, outline

    _, _, axes = outline(step.config)
    params = jax.jit(first_params(step.config, seed))()
    return params, jax.jit(make_optimizer(axes, step.recipe).init)(params)


def evaluator(
    config: "ModelConfig", corpus: "Corpus", batch: int, context: int, count: int | None = None, cached: bool = False
) -> Callable[[Any], dict[str, float]]:
    """A function of parameters: the held-out loss in nats a token, its perplexity, and bits a byte of text.

    Otherwise as `held_out_losses`, whose mean it takes.
    """
    losses = held_out_losses(config, corpus, batch, context, count, cached)

    def evaluate(params: Any) -> dict[str, float]:
        values = losses(params)
        nats = sum(values) / len(values)
        # Of a loss that is beyond all sense, too.
        return {
            "held_out_loss": nats,
            "perplexity": math.exp(min(nats, 700)),
            "bits_per_byte": corpus.bits_per_byte(nats),
        }

    return evaluate


def held_out_losses(
    config: "ModelConfig", corpus: "Corpus", batch: int, context: int, count: int | None = None, cached: bool = False
) -> Callable[[Any], list[float]]:
    """A function of parameters: nats a token of each batch of held-out text, the same batches for each model.

    count: of batches, spread over the held-out text; None: all of it. cached: keys and values are read from a cache, as
    a decode step reads them, which matters where it rounds them.
    Raises ValueError where the held-out text is shorter than one window.
    """
    import jax
    from flax import nnx

    from ..model import train as training
    from ..model.cache import KVCache
    from ..model.transformer import graph_of
    from .data import Batches

    graph = graph_of(config)
    held_out = Batches(corpus.held_out, batch, context, name="held-out text")

    @jax.jit
    def entropy(params: Any, tokens: Any) -> Any:
        model = nnx.merge(graph, params)
        if not cached:
            return training.losses(model, tokens)[1]
        x, _, _ = model.hidden(tokens[:, :-1], KVCache.init(config, len(tokens), context), continues=True)
        return training.cross_entropy(model.logits(x), tokens[:, 1:])

    return lambda params: [float(entropy(params, tokens)) for tokens in held_out.evenly(count)]


def _flops(step: "Step") -> int:
    """Matmul FLOPs of an update, by the closed form: the causal half of attention, nothing counted twice."""
    from ..profiling import closed_form

    return closed_form.ideal_flops(step.config, "train", step.batch, step.context)


def _export(out: Path, job: Job, params: Any) -> None:
    """Writes the model as generate, quantize and perplexity read it."""
    from ..model import checkpoint
    from ..model.tokenizer import FILE

    checkpoint.write(out / "model", job.step.config, params)
    if job.tokenizer.library is not None:
        write_whole(out / "model" / FILE, job.tokenizer.library.to_str())


@contextmanager
def _screen(steps: int) -> Iterator[tuple[Callable[[str, int], None], Callable[[str], None]]]:
    """`show` and `report` on standard error: a bar where it is a terminal, and above it lines that stay."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True, highlight=False)
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("starting", total=steps)
        yield (
            lambda text, step: progress.update(task, description=text, completed=step),
            lambda text: console.print(text, soft_wrap=True, markup=False),
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs it: 0; 2 where the flags are wrong; 1 where it had to stop."""
    return command.run(_run, define, INTRODUCTION, argv, (Stopped,))


def _run(values: absl_flags.FlagValues) -> None:
    from ..profiling import targets

    asked = request(values)
    targets.prepare(targets.here())
    targets.keep_memory()
    with _screen(asked.steps) as (show, report):
        figures = train(asked, show, report)
    print(json.dumps({"out": str(asked.out), **figures}))


if __name__ == "__main__":
    sys.exit(main())
