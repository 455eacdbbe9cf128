"""`python -m stepbill.experiments.perplexity`: how well a checkpoint predicts held-out text, as it is and quantised.

The text is what `train` holds out of the same `--data`, so that a model is measured on what it was not trained on.
"""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from absl import flags as absl_flags

from . import command, flags
from .flags import UsageError
from .train import evaluator, read_corpus

INTRODUCTION = """perplexity: of held-out text, of a checkpoint as it is and in few bits

  python -m stepbill.experiments.perplexity --checkpoint=runs/nano/model
  python -m stepbill.experiments.perplexity --checkpoint=runs/nano/model --weights=int8 --weights=int4
"""


@dataclass(frozen=True)
class Way:
    """How a checkpoint is measured: the weights and the cache as they are (bf16), or in few bits."""

    weights: str = flags.BF16
    cache_dtype: str = flags.BF16
    activations: str = "full"

    @property
    def changes(self) -> dict[str, str]:
        """What of the config is not as it is stored."""
        return {name: value for name, value in vars(self).items() if value not in (flags.BF16, "full")}


@dataclass(frozen=True)
class Request:
    """A validated command line. ways: the first is what the others are held against. count: of batches; None: all."""

    checkpoint: Path
    ways: tuple[Way, ...]
    cache: Path
    data: str | None = None
    dtype: str = "bfloat16"
    batch: int = 8
    context: int = 256
    count: int | None = None


def define(values: absl_flags.FlagValues) -> None:
    """Adds every flag."""
    to = flags.Definer(values)
    to.string("checkpoint", None, "a folder with a model: ours, or Hugging Face's safetensors")
    to.string("data", None, "a glob, as it was given to train. Default: the source of Python's standard library")
    flags.define_storage(to, several=True)
    to.one_of(("full", "int8"), "activations", "full", "int8: rounded for products with int8 weights; full: not")
    to.one_of(tuple(flags.DTYPES), "dtype", "bf16", "what is computed in")
    to.count("batch", 8, "sequences at a time")
    to.count("context", 256, "positions in a sequence")
    to.count("batches", None, "how many batches, spread over the held-out text. Default: all of it")
    to.string("cache", "~/.cache/stepbill", "where the tokens of a corpus are kept")
    to.one_of(("table", "json"), "format", "table", "what standard output carries")
    flags.define_help(to)


def request(values: absl_flags.FlagValues) -> Request:
    """The validated request; UsageError names the flag that is wrong."""
    if values.checkpoint is None:
        raise UsageError("--checkpoint: it needs a value, a folder with a model")
    asked = [Way(weights, values.cache_dtype, values.activations) for weights in values.weights or [flags.BF16]]
    return Request(
        Path(values.checkpoint).expanduser(),
        tuple(dict.fromkeys([Way(), *asked])),
        Path(values.cache).expanduser().absolute(),
        values.data,
        flags.DTYPES[values.dtype],
        values.batch,
        values.context,
        values.batches,
    )


def measure(asked: Request, say: Callable[[str], None] = lambda _: None) -> Iterator[dict[str, Any]]:
    """A row for each way: its held-out figures, and how much higher its perplexity is than that of the first."""
    from ..model import checkpoint
    from ..model.tokenizer import Tokenizer

    first = None
    for way in asked.ways:
        say(f"reading, {way.weights}")
        try:
            config, params = checkpoint.read(asked.checkpoint, dtype=asked.dtype, **way.changes)  # pyright: ignore[reportArgumentType]
            tokenizer = Tokenizer.read(asked.checkpoint)
        except (OSError, ValueError) as error:
            raise UsageError(f"--checkpoint={asked.checkpoint}: {error}") from None
        if asked.context > config.max_context:
            raise UsageError(f"--context={asked.context}: {config.name} takes 1 to {config.max_context} positions")
        corpus = read_corpus(asked.data, asked.cache, tokenizer, config)
        say(f"measuring, {way.weights}")
        try:
            cached = way.cache_dtype != flags.BF16
            evaluate = evaluator(config.resolve(), corpus, asked.batch, asked.context, asked.count, cached)
        except ValueError as error:
            raise flags.as_usage(error) from None
        figures = evaluate(params)
        first = first or figures["perplexity"]
        stored = config.weights if config.weights != "full" else flags.BF16
        yield (
            {"weights": stored, "cache": way.cache_dtype, "activations": way.activations}
            | figures
            | {"change": figures["perplexity"] / first - 1}
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs it: 0; 2 where the flags are wrong."""
    return command.run(_run, define, INTRODUCTION, argv)


def _run(values: absl_flags.FlagValues) -> None:
    from ..profiling import targets

    asked = request(values)
    targets.prepare(targets.here())
    with command.status() as say:
        rows = list(measure(asked, say))
    if values.format == "json":
        print(json.dumps({"checkpoint": str(asked.checkpoint), "dtype": asked.dtype, "rows": rows}, indent=1))
    else:
        print(_table(rows), end="")


def _table(rows: list[dict[str, Any]]) -> str:
    from ..profiling import render

    return render.columns(
        [
            row
            | {name: f"{row[name]:.4f}" for name in ("held_out_loss", "perplexity", "bits_per_byte")}
            | {"change": f"{row['change']:+.2%}"}
            for row in rows
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
