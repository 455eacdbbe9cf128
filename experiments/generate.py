"""`python -m stepbill.experiments.generate`: continues prompts with a model, and says how near memory's limit it got.

The text goes to standard output as it is written, some tokens a dispatch. Standard error then has the rates: tokens a
second, and these times the least bytes that a decode step must move (the ideal of its own bill) as GB/s, against the
bandwidth of the chip.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags as absl_flags

from . import command, flags
from .flags import UsageError

if TYPE_CHECKING:
    from ..model.config import ModelConfig
    from ..model.decode import Sampling
    from ..model.tokenizer import Tokenizer
    from ..model.transformer import Params

INTRODUCTION = """generate: continues prompts with a model, and says how fast

  python -m stepbill.experiments.generate --checkpoint=DIR --prompt='def main(' --tokens=200 --temperature=0.8
  python -m stepbill.experiments.generate --checkpoint=DIR --prompt=One --prompt='A longer one' --weights=int8
  python -m stepbill.experiments.generate --model=small --prompt=x          random weights: for the rates alone
"""
RUNS = ("layers", "attention", "activations")  # what may be changed of a checkpoint's config
STREAM = 16  # tokens a dispatch; BUILD_NOTES.md has the rates of other numbers
STOPS = ("generation_config.json", "config.json")  # which files of a checkpoint say what ends a text
COPY_BYTES = 1 << 28  # far beyond caches


@dataclass(frozen=True)
class Request:
    """A validated command line.

    Attributes:
      config: the model, of random weights; None: as `checkpoint` has it, with `changes`.
      batch: how often each prompt is continued. stop: texts of one token; None: as the checkpoint says.
      chunk: positions of the prompt that are read at a time; 0: all.
    """

    config: "ModelConfig | None"
    checkpoint: Path | None
    changes: dict[str, Any]
    prompts: tuple[str, ...]
    sampling: "Sampling"
    tokens: int = 128
    batch: int = 1
    seed: int = 0
    stop: tuple[str, ...] | None = None
    chunk: int = 0
    format: str = "text"


@dataclass(frozen=True)
class Rates:
    """What was achieved.

    Attributes:
      compile_seconds, prefill_seconds, decode_seconds: of wall clock, apart from each other.
      prompt_tokens, written_tokens: without what pads them; written: those of decode_seconds alone.
      tokens_per_second: over all sequences.
      bytes_per_step: the least that a decode step moves (ideal of its bill); steps: of them in decode_seconds.
      ceiling_bytes_per_second: the bandwidth of memory; ceiling: how it is known. What a host's caches hold
        can be read faster than that.
    """

    compile_seconds: float
    prefill_seconds: float
    decode_seconds: float
    prompt_tokens: int
    written_tokens: int
    steps: int
    bytes_per_step: int
    ceiling_bytes_per_second: float
    ceiling: str

    @property
    def tokens_per_second(self) -> float:
        return self.written_tokens / self.decode_seconds if self.steps else 0.0

    @property
    def bytes_per_second(self) -> float:
        return self.bytes_per_step * self.steps / self.decode_seconds if self.steps else 0.0

    def to_json(self) -> dict[str, Any]:
        """All of them."""
        derived = {"tokens_per_second": self.tokens_per_second, "bytes_per_second": self.bytes_per_second}
        return asdict(self) | derived | {"share_of_ceiling": self.bytes_per_second / self.ceiling_bytes_per_second}

    def __str__(self) -> str:
        from ..profiling.render import amount, seconds

        share = f"{self.bytes_per_second / self.ceiling_bytes_per_second:.1%}"
        return "\n".join(
            (
                f"compile  {seconds(self.compile_seconds)}",
                f"prefill  {self.prompt_tokens:,} tokens in {seconds(self.prefill_seconds)}: "
                f"{self.prompt_tokens / self.prefill_seconds:,.0f} tokens/s",
                f"decode   {self.written_tokens:,} tokens in {seconds(self.decode_seconds)}: "
                f"{self.tokens_per_second:,.1f} tokens/s; {amount(self.bytes_per_step, 'B')} a step, "
                f"{amount(self.bytes_per_second, 'B')}/s, {share} of {amount(self.ceiling_bytes_per_second, 'B')}/s "
                f"({self.ceiling})",
            )
        )


# --- the command line ------------------------------------------------------------------------------------------------


def define(values: absl_flags.FlagValues) -> None:
    """Adds every flag."""
    to = flags.Definer(values)
    to.string("checkpoint", None, "a folder with a model: ours, or Hugging Face's safetensors")
    flags.define_model(to)
    to.strings("prompt", "what is continued (-: what standard input has); given several times, all are, together")
    to.count("tokens", 128, "how many tokens are written at most, for each prompt")
    to.count("batch", 1, "how often each prompt is continued")
    to.number("temperature", 0.0, "of drawing; 0: always the likeliest token")
    to.integer("top_k", 0, "draw from the likeliest k tokens alone; 0: from all")
    to.number("top_p", 1.0, "draw from the likeliest tokens that together have this probability alone")
    to.number("min_p", 0.0, "draw from tokens of this share of the likeliest one's probability, or more, alone")
    to.integer("seed", 0, "of drawing (and of random weights): the same seed writes the same", 0)
    to.strings("stop", "text of one token that ends a sequence. Default: what the checkpoint's config says")
    to.count("prefill_chunk", None, "positions of the prompts read at a time, for less memory. Default: all")
    flags.define_storage(to)
    to.one_of(tuple(flags.DTYPES), "dtype", None, "what is computed in: bf16 or f32. Default: as stored")
    to.one_of(("text", "json"), "format", "text", "what standard output carries: text as it comes, or json at the end")
    flags.define_help(to)


def request(values: absl_flags.FlagValues) -> Request:
    """The validated request; UsageError names the flag that is wrong."""
    from ..model.decode import Sampling

    given = flags.given_flags(values)
    if not values.prompt:
        raise UsageError("--prompt: it needs a value, the text to continue")
    prompts = tuple(sys.stdin.read() if prompt == "-" else prompt for prompt in values.prompt)
    if not all(prompts):
        raise UsageError("--prompt=: it must have at least one character")
    changes = {name: getattr(values, name) for name in RUNS if getattr(values, name) is not None}
    if values.cache_dtype != flags.BF16:
        changes["cache_dtype"] = values.cache_dtype
    if values.dtype is not None:
        changes["dtype"] = flags.DTYPES[values.dtype]
    if values.checkpoint is None:
        if values.model is None:
            raise UsageError("--checkpoint: it needs a value, a folder with a model (or give --model: random weights)")
        config = flags.model_config(values, "decode")
        config = replace(config, dtype=changes.get("dtype", config.dtype))
    else:
        config = None
        if alien := sorted({"model", "dispatch", "remat", *flags.SIZES} & set(given)):
            raise UsageError(f"--{alien[0]}={given[alien[0]]}: it cannot be given with --checkpoint, which is a model")
        if values.weights != flags.BF16:
            changes["weights"] = values.weights
    try:
        sampling = Sampling(values.temperature, values.top_k, values.top_p, values.min_p)
    except ValueError as error:
        raise flags.as_usage(error, given) from None
    return Request(
        config,
        None if values.checkpoint is None else Path(values.checkpoint).expanduser(),
        changes,
        prompts,
        sampling,
        values.tokens,
        values.batch,
        values.seed,
        tuple(values.stop) if values.stop else None,
        values.prefill_chunk or 0,
        values.format,
    )


# --- what is asked for -----------------------------------------------------------------------------------------------


def model_of(asked: Request) -> "tuple[ModelConfig, Params]":
    """The config, with everything decided, and the parameters; UsageError."""
    import jax

    from ..model import checkpoint
    from .steps import first_params

    if asked.config is not None:
        config = asked.config.resolve()
        return config, jax.jit(first_params(config, asked.seed))()
    try:
        config, params = checkpoint.read(asked.checkpoint, **asked.changes)  # pyright: ignore[reportArgumentType]
    except (OSError, ValueError) as error:
        raise UsageError(f"--checkpoint={asked.checkpoint}: {error}") from None
    return config.resolve(), params


def tokenizer_of(asked: Request) -> "Tokenizer":
    """That of the checkpoint; bytes where it has none."""
    from ..model.tokenizer import Tokenizer

    try:
        return Tokenizer.read(asked.checkpoint) if asked.checkpoint else Tokenizer()
    except ValueError as error:
        raise UsageError(f"--checkpoint={asked.checkpoint}: {error}") from None


def stops_of(asked: Request, tokenizer: "Tokenizer") -> tuple[int, ...]:
    """The tokens that end a sequence: of --stop, else those that the checkpoint names; UsageError."""
    if asked.stop is None:
        return named_stops(asked.checkpoint) if asked.checkpoint else ()
    try:
        return tuple(map(tokenizer.token, asked.stop))
    except ValueError as error:
        raise flags.as_usage(error) from None


def named_stops(folder: Path) -> tuple[int, ...]:
    """The tokens that a checkpoint says end a sequence; UsageError where what says so cannot be read."""
    for name in STOPS:
        path = folder / name
        if not path.exists():
            continue
        try:
            found = json.loads(path.read_text()).get("eos_token_id")
        except (AttributeError, ValueError) as error:
            raise UsageError(f"--checkpoint={folder}: {path}: no JSON object: {error}") from None
        if found is not None:
            return tuple(found) if isinstance(found, list) else (found,)
    return ()


def prompts_of(asked: Request, tokenizer: "Tokenizer", config: "ModelConfig") -> list[list[int]]:
    """Each prompt's tokens, each prompt `batch` times; UsageError."""
    prompts = [tokenizer.encode(prompt) for prompt in asked.prompts for _ in range(asked.batch)]
    if not all(prompts):
        raise UsageError("--prompt: it has no tokens")
    if worst := [token for prompt in prompts for token in prompt if token >= config.vocabulary]:
        raise UsageError(
            f"--prompt: it has the token {worst[0]}; {config.name} has a vocabulary of {config.vocabulary}"
        )
    if (longest := max(map(len, prompts))) + asked.tokens - 1 > config.max_context:
        raise UsageError(
            f"--tokens={asked.tokens}: after a prompt of {longest} tokens {config.name} writes at most "
            f"{config.max_context - longest + 1}"
        )
    return prompts


# --- writing ---------------------------------------------------------------------------------------------------------


class Writer:
    """A model compiled for one batch of prompts: it reads them, then writes `size` tokens a dispatch.

    What it writes does not depend on `size`: it is what `decode.generate` writes for the same seed.
    """

    def __init__(
        self,
        config: "ModelConfig",
        params: "Params",
        prompts: list[list[int]],
        *,
        count: int,
        sampling: "Sampling",
        stop: tuple[int, ...] = (),
        seed: int = 0,
        chunk: int = 0,
        size: int = STREAM,
    ):
        import jax
        from flax import nnx

        from ..model import decode
        from ..model.cache import KVCache
        from ..model.transformer import graph_of
        from ..profiling import targets
        from . import steps

        self.params, self.count, self.size, self.stop = params, count, size, stop
        self.tokens, start = decode.pad_left(prompts)
        self.start = start if start.any() else None  # prompts of one length need no mask of their own
        B, T = self.tokens.shape
        # Of the last dispatch some tokens may be too many: they need a place, or are NO_TOKEN past max_context.
        self.length = min(config.max_context, T + -(-(count - 1) // size) * size) if count > 1 else T
        self.step = steps.build(config, "decode", batch=B, context=self.length)
        first, rest = jax.random.split(jax.random.key(seed))
        self._keys = jax.random.split(rest, -(-max(count - 1, 1) // size) * size)
        graph = graph_of(config)

        def read(params: Any, tokens: Any, start: Any) -> Any:
            cache = KVCache.init(config, B, self.length)
            logits, cache = decode.prefill(nnx.merge(graph, params), tokens, cache, start, chunk)
            return decode.sample(logits, sampling, first), cache

        def write(params: Any, tokens: Any, cache: Any, keys: Any) -> Any:
            written, cache = decode.decode(nnx.merge(graph, params), tokens, cache, size, sampling, keys, stop)
            return written, written[:, -1], cache

        begin = time.perf_counter()
        self.target = targets.here()
        options = self.step.compiler_options(targets.chip(self.target).platform)
        reading = jax.jit(read)
        self._read: Any = reading.lower(params, self.tokens, self.start).compile()
        token, cache = jax.eval_shape(reading, params, self.tokens, self.start)
        if count > 1:
            writing = jax.jit(write, donate_argnums=2)
            lowered = writing.lower(params, token, cache, jax.eval_shape(lambda: self._keys[:size]))
            self._write: Any = lowered.compile(compiler_options=options or None)
        self.compile_seconds = time.perf_counter() - begin
        self.prefill_seconds = self.decode_seconds = 0.0
        self.steps = self.written = 0

    def __iter__(self) -> "Iterator[list[list[int]]]":
        """The new tokens of each row, as they come: without what stops it, and empty after that."""
        import jax
        import numpy as np

        from ..model.decode import finished

        begin = time.perf_counter()
        token, cache = jax.block_until_ready(self._read(self.params, self.tokens, self.start))
        self.prefill_seconds = time.perf_counter() - begin
        yield [self._without_stop(row) for row in np.asarray(token)[:, None]]
        done = 1
        while done < self.count and not (self.stop and finished(token, self.stop).all()):
            begin, before = time.perf_counter(), int(cache.position)
            keys = self._keys[done - 1 : done - 1 + self.size]
            written, token, cache = jax.block_until_ready(self._write(self.params, token, cache, keys))
            self.decode_seconds += time.perf_counter() - begin
            self.steps += int(cache.position) - before
            rows = np.asarray(written)
            self.written += int((rows >= 0).sum())
            yield [self._without_stop(row) for row in rows[:, : self.count - done]]
            done += self.size

    def _without_stop(self, row: "Any") -> list[int]:
        return [int(token) for token in row if token >= 0 and token not in self.stop]

    def rates(self) -> Rates:
        """Of what has been written; bills a decode step, and measures the host's bandwidth where it is one."""
        from ..profiling import targets
        from .bill import bill_of

        padding = 0 if self.start is None else int(self.start.sum())
        options = self.step.compiler_options(targets.chip(self.target).platform)
        compilation = targets.compile(self.step.lower(), self.target, options=options, runs=False)
        ideal = bill_of(self.step, compilation, self.target).ideal_hbm_bytes
        assert ideal is not None, "every step of our own has an ideal"
        known = targets.chip(self.target).hbm_bytes_per_second
        return Rates(
            self.compile_seconds,
            self.prefill_seconds,
            self.decode_seconds,
            self.tokens.size - padding,
            self.written,
            self.steps,
            ideal,
            known or copy_bytes_per_second(),
            targets.chip(self.target).title if known else "a copy in this host's memory, measured",
        )


def copy_bytes_per_second(repeats: int = 5) -> float:
    """Bytes read and written a second by an elementwise operation in place, on more than any cache holds."""
    import jax
    import jax.numpy as jnp

    x = jnp.ones(COPY_BYTES // 4, jnp.float32)
    negative = jax.jit(jnp.negative, donate_argnums=0).lower(x).compile()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        x = jax.block_until_ready(negative(x))
        times.append(time.perf_counter() - begin)
    return 2 * x.nbytes / statistics.median(times)


def generate(asked: Request, show: Callable[[str], None], say: Callable[[str], None]) -> tuple[list[str], Rates]:
    """What each row has written, and how fast; `show` is given text as it comes, `say` what is going on."""
    from ..model.tokenizer import Stream

    say("reading the model")
    config, params = model_of(asked)
    tokenizer = tokenizer_of(asked)
    stop = stops_of(asked, tokenizer)
    prompts = prompts_of(asked, tokenizer, config)
    say("compiling")
    try:
        writer = Writer(
            config,
            params,
            prompts,
            count=asked.tokens,
            sampling=asked.sampling,
            stop=stop,
            seed=asked.seed,
            chunk=asked.chunk,
        )
    except ValueError as error:  # how it is to run does not go here
        raise flags.as_usage(error) from None
    say("")
    streams, texts = [Stream(tokenizer, prompt) for prompt in prompts], ["" for _ in prompts]

    def add(rows: Sequence[Sequence[int]], last: bool) -> None:
        for n, row in enumerate(rows):
            new = streams[n](row, last)
            texts[n] += new
            if len(rows) == 1:
                show(new)

    if len(prompts) == 1:
        show(asked.prompts[0])
    for rows in writer:
        add(rows, last=False)
    add([[] for _ in prompts], last=True)
    if len(prompts) > 1:  # lines that are written at once cannot be read at once
        whole = [asked.prompts[n // asked.batch] + one for n, one in enumerate(texts)]
        show("\n\n".join(whole))
    show("\n")
    return texts, writer.rates()


# --- the command -----------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Runs it: 0; 2 where the flags are wrong."""
    return command.run(_run, define, INTRODUCTION, argv)


def _run(values: absl_flags.FlagValues) -> None:
    from ..profiling import targets

    asked = request(values)
    targets.prepare(targets.here())
    targets.keep_memory()
    _print(asked)


def _print(asked: Request) -> None:
    def show(text: str) -> None:
        if asked.format == "text":
            print(text, end="", flush=True)

    def say(text: str) -> None:
        if sys.stderr.isatty():
            print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)

    texts, rates = generate(asked, show, say)
    if asked.format == "json":
        prompts = [prompt for prompt in asked.prompts for _ in range(asked.batch)]
        written = [{"prompt": prompt, "text": text} for prompt, text in zip(prompts, texts, strict=True)]
        print(json.dumps({"written": written, "rates": rates.to_json()}, indent=1))
    if asked.config is not None:
        print(f"{asked.config.name} with random weights", file=sys.stderr)
    print(rates, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
