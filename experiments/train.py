"""`python -m stepbill.experiments.train`: trains a model on text, for real.

One compiled step of `steps.build`; batches that are a function of their number; checkpoints that are written beside the
training and appear whole or not at all. Killed at any moment, the same command goes on from the last checkpoint, and
ends with the bits that it would have ended with.
"""

import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags as absl_flags

from . import flags
from .flags import UsageError

if TYPE_CHECKING:
    from ..model.config import ModelConfig
    from ..model.train import Recipe
    from .data import Corpus

INTRODUCTION = """train: AdamW on text, with checkpoints, held-out perplexity and what the machine achieves

  python -m stepbill.experiments.train --out=runs/nano --steps=2000
  python -m stepbill.experiments.train --out=runs/mine --data='books/**/*.txt' --width=512 --num_layers=8 --steps=20000

The same command goes on where an interrupted run has left off.
"""
DTYPES = {"bf16": "bfloat16", "f32": "float32"}


class Diverged(Exception):
    """The loss is no number any more."""


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
    to.one_of(tuple(DTYPES), "dtype", "f32", "what is computed in; weights are kept in float32. On a chip: bf16")
    to.integer("seed", 0, "of the first weights and of the order of the data", 0)
    to.count("checkpoint_every", 200, "updates between checkpoints")
    to.count("keep", 2, "how many checkpoints are kept")
    to.count("evaluate_every", 200, "updates between measurements on held-out text")
    to.count("evaluate_batches", 16, "batches of it that are measured")
    to.string("logdir", None, "a folder for TensorBoard: loss, perplexity, tokens/s")
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
        replace(config, dtype=DTYPES[values.dtype], param_dtype="float32"),
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
class Log:
    """Figures by step: in `log.jsonl`, in TensorBoard, and, as they come, said."""

    path: Path
    summaries: Any  # a tensorboardX writer, or None

    def __call__(self, step: int, figures: dict[str, float]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **figures}) + "\n")
        if self.summaries is not None:
            for name, value in figures.items():
                self.summaries.add_scalar(name, value, step)


class Losses:
    """The losses of steps that are under way. They are read one step behind, so that the next is never waited for."""

    def __init__(self, say: Callable[[str], None]):
        self._say = say
        self._unread: list[tuple[int, Any]] = []
        self._newest: Any = math.nan

    def add(self, step: int, loss: Any) -> None:
        """The loss of the step that has just been started; waits for the one before. Raises Diverged."""
        self._read()
        self._unread.append((step, loss))
        self._newest = loss

    def last(self) -> float:
        """The newest loss, once it is there. Raises Diverged."""
        self._read()
        return float(self._newest)

    def _read(self) -> None:
        for step, loss in self._unread:
            if not math.isfinite(float(loss)):
                raise Diverged(f"the loss is {float(loss)} at step {step}")
            self._say(f"{step}: loss {float(loss):.3f}")
        self._unread = []


def train(request: Request, say: Callable[[str], None] = lambda _: None) -> dict[str, float]:
    """Trains, or goes on training, until `steps`; the last held-out figures.

    Raises UsageError before it starts where it could not end, Diverged where the loss is no number.
    """
    from orbax import checkpoint as orbax

    from . import data, steps

    corpus, config = _corpus(request, data.corpus)
    teacher = _teacher(request)
    step = steps.build(
        config, "train", batch=request.batch, context=request.context, recipe=request.recipe, teacher=teacher
    )
    taught = () if teacher is None else (teacher[1],)
    say("initialising")
    state = _first_state(step, request.seed)
    _check_room(request, state)
    _remember(request, config)
    say("compiling")
    compiled = step.lower().compile()
    evaluate = _evaluator(step, corpus, request)
    batches = data.Batches(corpus.train, request.batch, request.context, request.seed)
    tokens, flops = request.batch * request.context, _flops(step)
    options = orbax.CheckpointManagerOptions(max_to_keep=request.keep, enable_async_checkpointing=True)
    with (
        _summaries(request.logdir) as summaries,
        orbax.CheckpointManager(request.out / "checkpoints", options=options) as checkpoints,
    ):
        log, losses, figures = Log(request.out / "log.jsonl", summaries), Losses(say), {}
        done = checkpoints.latest_step() or 0
        if done:
            state = checkpoints.restore(done, args=orbax.args.StandardRestore(state))
            say(f"step {done}: going on from here")
        started, since = time.perf_counter(), done
        for number in range(done + 1, request.steps + 1):
            *state, loss = compiled(*state, batches[number - 1], *taught)
            try:
                losses.add(number, loss)
                last = number == request.steps
                if last or number % request.evaluate_every == 0:
                    figures = {"tokens": number * tokens, "loss": losses.last()}
                    seconds = (time.perf_counter() - started) / (number - since)
                    figures |= {"tokens_per_second": tokens / seconds, "flops_per_second": flops / seconds}
                    figures |= evaluate(state[0])
                    log(number, figures)
                    say(_sentence(number, figures))
                    started, since = time.perf_counter(), number
                if last or number % request.checkpoint_every == 0:
                    losses.last()  # nothing is kept that is no number
                    checkpoints.save(number, args=orbax.args.StandardSave(tuple(state)))
            except Diverged as error:
                checkpoints.wait_until_finished()
                good = checkpoints.latest_step()
                where = f"the last good checkpoint is of step {good}" if good else "there is no checkpoint yet"
                raise Diverged(f"{error}; {where}") from None
    figures = figures or evaluate(state[0])
    _export(request, config, state[0])
    return figures


def _sentence(step: int, figures: dict[str, float]) -> str:
    return (
        f"step {step}: loss {figures['loss']:.3f}, held-out perplexity {figures['perplexity']:.3f} "
        f"({figures['bits_per_byte']:.3f} bits a byte), {figures['tokens_per_second']:,.0f} tokens/s, "
        f"{_achieved(figures['flops_per_second'])}"
    )


def _achieved(flops_per_second: float) -> str:
    """How fast that is: against the chip's peak, where one is known (MFU, Chowdhery et al., 2022, appendix B)."""
    from ..profiling import targets

    peak = targets.chip(targets.here()).peak_flops.get("bf16")
    share = f", MFU {flops_per_second / peak:.1%}" if peak else ""
    return f"{flops_per_second / 1e9:,.1f} GFLOP/s{share}"


def _corpus(request: Request, read: Callable[..., "Corpus"]) -> "tuple[Corpus, ModelConfig]":
    config, encode, name = request.config, None, "bytes"
    if request.tokenizer is not None:
        from ..model.tokenizer import Tokenizer

        try:
            tokenizer = Tokenizer.read(Path(request.tokenizer))
        except (OSError, ValueError) as error:
            raise UsageError(f"--tokenizer={request.tokenizer}: {error}") from None
        encode, name = tokenizer.encode, request.tokenizer
        needed = tokenizer.vocabulary
    else:
        needed = 256
    if config.vocabulary < needed:
        raise UsageError(f"--vocabulary={config.vocabulary}: the tokenizer has {needed} tokens")
    try:
        return read(request.data, request.cache / "corpora", encode, name), config
    except ValueError as error:
        raise flags.as_usage(error) from None
    except OSError as error:
        raise UsageError(f"--cache={request.cache}: {error.strerror or error}") from None


def _teacher(request: Request) -> Any:
    if request.teacher is None:
        return None
    from ..model import checkpoint
    from ..model.transformer import graph_of

    try:
        config, params = checkpoint.read(request.teacher, dtype=request.config.dtype)
    except (OSError, ValueError) as error:
        raise UsageError(f"--teacher={request.teacher}: {error}") from None
    if config.vocabulary != request.config.vocabulary:
        raise UsageError(
            f"--teacher={request.teacher}: its vocabulary is {config.vocabulary}, the student's "
            f"{request.config.vocabulary}"
        )
    return graph_of(config), params


def _first_state(step: Any, seed: int) -> tuple[Any, Any]:
    import jax
    from flax import nnx

    from ..model import train as training
    from ..model.transformer import Transformer, logical_axes, split

    model = nnx.eval_shape(lambda: Transformer(step.config, nnx.Rngs(0)))
    params = jax.jit(lambda: split(Transformer(step.config, nnx.Rngs(seed)))[1])()
    return params, training.make_optimizer(logical_axes(model), step.recipe).init(params)


def _check_room(request: Request, state: Any) -> None:
    """UsageError where a checkpoint could not be written, before hours are spent on what it would hold."""
    import jax

    try:
        request.out.mkdir(parents=True, exist_ok=True)
        probe = request.out / f".probe-{os.getpid()}"
        probe.write_bytes(b"x")
        probe.unlink()
        free = shutil.disk_usage(request.out).free
    except OSError as error:
        raise UsageError(f"--out={request.out}: cannot write there: {error.strerror or error}") from None
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    params = sum(leaf.nbytes for leaf in jax.tree.leaves(state[0]))
    needed = (request.keep + 1) * size + params  # while one is written the oldest is still there; then the model
    if free < needed:
        raise UsageError(
            f"--out={request.out}: {request.keep} checkpoints and the model need {needed / 1e9:.1f} GB, "
            f"and {free / 1e9:.1f} GB are free"
        )


def _remember(request: Request, config: "ModelConfig") -> None:
    """Writes what the run is; UsageError where the folder holds another."""
    about = {
        "config": config.to_json(),
        "recipe": asdict(request.recipe),
        **{name: getattr(request, name) for name in ("batch", "context", "seed", "data", "tokenizer")},
        "teacher": str(request.teacher) if request.teacher else None,
    }
    path = request.out / "run.json"
    if path.exists():
        before = json.loads(path.read_text())
        for name, value in about.items():
            if before.get(name) != value:
                raise UsageError(f"--out={request.out}: it holds a run with another {name}; choose another folder")
        return
    path.write_text(json.dumps(about, indent=1))


def _evaluator(step: Any, corpus: "Corpus", request: Request) -> Callable[[Any], dict[str, float]]:
    import jax
    from flax import nnx

    from ..model import train as training
    from ..model.transformer import graph_of
    from .data import Batches

    graph = graph_of(step.config)
    entropy = jax.jit(lambda params, tokens: training.losses(nnx.merge(graph, params), tokens)[1])
    held_out = Batches(corpus.held_out, request.batch, request.context, request.seed)
    tokens_a_byte = len(corpus.held_out) / corpus.held_out_bytes

    def evaluate(params: Any) -> dict[str, float]:
        values = [float(entropy(params, tokens)) for tokens in held_out.evenly(request.evaluate_batches)]
        nats = sum(values) / len(values)
        bits = nats / math.log(2) * tokens_a_byte
        return {"held_out_loss": nats, "perplexity": math.exp(nats), "bits_per_byte": bits}

    return evaluate


def _flops(step: Any) -> int:
    """Matmul FLOPs of an update, by the closed form: the causal half of attention, nothing counted twice."""
    from ..profiling import closed_form

    return closed_form.ideal_flops(step.config, "train", step.batch, step.context)


@contextmanager
def _summaries(logdir: Path | None) -> Iterator[Any]:
    if logdir is None:
        yield None
        return
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise UsageError("--logdir: pip install 'stepbill[train]'") from None
    with SummaryWriter(str(logdir)) as writer:
        yield writer


def _export(request: Request, config: "ModelConfig", params: Any) -> None:
    """The model as generate and quantize read it."""
    from ..model import checkpoint

    checkpoint.write(request.out / "model", config, params)
    if request.tokenizer is not None:
        shutil.copy(request.tokenizer, request.out / "model" / "tokenizer.json")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs it: 0; 2 where the flags are wrong; 1 where the loss is no number."""
    from ..profiling import targets
    from .bill import _status

    try:
        values = flags.parse(sys.argv[1:] if argv is None else argv, define)
        if values.help:
            print(flags.usage(values, INTRODUCTION))
            return 0
        asked = request(values)
        targets.prepare(targets.here())
        with _status() as status:
            figures = train(asked, lambda text: _report(text, status))
        print(json.dumps({"out": str(asked.out), "steps": asked.steps, **figures}))
    except UsageError as error:
        print(f"stepbill: {error}", file=sys.stderr)
        return 2
    except Diverged as error:
        print(f"stepbill: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _report(text: str, status: Callable[[str], None]) -> None:
    """Measurements stay on standard error, line by line; what lies between them passes by."""
    if text.startswith("step "):
        print(text, file=sys.stderr, flush=True)
    status(text)


if __name__ == "__main__":
    sys.exit(main())
