"""This model against Hugging Face transformers on torch: `python -m stepbill.experiments.bench_peers`.

Both are given the same weights, those of a random Llama, and the same cores, and must agree before anything is timed.
For each program each has a process of its own, and they take turns: while one runs, the other waits to be asked.
"""

import importlib.util
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import flags as absl_flags

from ..profiling import render, targets
from . import command, flags
from .bench_bill import environment
from .flags import UsageError

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from ..model.config import ModelConfig

INTRODUCTION = """bench_peers: this model against Hugging Face transformers on torch, on the same cores

  python -m stepbill.experiments.bench_peers
  python -m stepbill.experiments.bench_peers --model=nano --repeats=3 --format=json
"""
PROGRAMS = ("train", "prefill", "decode")
LOSSES = 3  # updates whose losses are held against each other
LOGITS, LOSS = 1e-4, 1e-4  # how far apart logits may be, and losses as a part of themselves


class Disagreement(Exception):
    """The two do not compute the same; one line that says where and by how much."""


@dataclass(frozen=True)
class Work:
    """What both do, in float32.

    config: the model, as JSON has it, so that the peer's process need not import jax. folder: where its weights are.
    rows, context: of what is trained on. prompt, tokens: how many are read, and then written, in one row.
    learning_rate, weight_decay: of AdamW with betas 0.9 and 0.95. compile: torch.compile for the peer.
    """

    config: dict[str, Any]
    folder: Path
    rows: int
    context: int
    prompt: int
    tokens: int
    learning_rate: float
    weight_decay: float
    cores: int
    compile: bool = False

    def text(self) -> np.ndarray:
        """Random tokens to train on, [rows, context + 1]."""
        return self._random(self.rows, self.context + 1)

    def prompt_text(self) -> np.ndarray:
        """Random tokens to read, [1, prompt]."""
        return self._random(1, self.prompt)

    def _random(self, *shape: int) -> np.ndarray:
        return np.random.default_rng(0).integers(0, self.config["vocabulary"], shape)

    def tokens_in(self, program: str) -> int:
        """How many tokens one run of it takes through the model."""
        return {"train": self.rows * self.context, "prefill": self.prompt, "decode": self.tokens}[program]


# --- the two sides ---------------------------------------------------------------------------------------------------


Program = Callable[[], Any]  # runs once, to the end: the loss before the update, the logits [V], or the tokens written


class Ours:
    """The steps of `steps.build`. Written is in one dispatch, by the loop of `decode.decode`."""

    name, packages = "stepbill", ("jax", "flax")

    def __init__(self, work: Work):
        os.environ["JAX_PLATFORMS"] = "cpu"
        import jax

        from ..model import checkpoint
        from ..model.config import ModelConfig
        from . import steps

        jax.devices()  # starts the backend
        self.work, self.config = work, ModelConfig.from_json(work.config)
        self._read, self._build = checkpoint.read, steps.build

    def settings(self) -> str:
        """How it runs."""
        config = self._build(self.config, "train", batch=1, context=1).config
        return f"training with layers={config.layers} and remat={config.remat}; tokens written in one dispatch"

    def _compiled(self, name: str, **sizes: Any) -> tuple[Any, Any, Any]:
        """The step, its program, and the parameters that this takes."""
        step = self._build(self.config, name, **sizes)
        compiled = step.lower().compile(compiler_options=step.compiler_options("cpu") or None)
        _, params = self._read(self.work.folder, dtype="float32", layers=step.config.layers)
        return step, compiled, params

    def train(self) -> Program:
        """A step on one batch, again and again."""
        import jax
        import jax.numpy as jnp

        step, compiled, params = self._compiled("train", batch=self.work.rows, context=self.work.context)
        # AdamW's state starts with nothing but zeros.
        state = [params, jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), step.arguments[1])]
        del params  # whose memory the first step takes over
        tokens = jnp.asarray(self.work.text(), jnp.int32)

        def run() -> float:
            nonlocal state
            *state, loss = compiled(*state, tokens)
            return float(jax.block_until_ready((state, loss))[1])

        return run

    def prefill(self) -> Program:
        """Reads the prompt into a cache, the same each time."""
        import jax
        import jax.numpy as jnp

        from ..model.cache import KVCache

        _, compiled, params = self._compiled("prefill", batch=1, context=self.work.prompt)
        tokens = jnp.asarray(self.work.prompt_text(), jnp.int32)
        self.cache = KVCache.init(self.config, 1, self.work.prompt)

        def run() -> np.ndarray:
            logits, self.cache = jax.block_until_ready(compiled(params, tokens, self.cache))
            return np.asarray(logits)[0]

        return run

    def decode(self) -> Program:
        """Writes on after the prompt, which is read once."""
        import jax
        import jax.numpy as jnp

        first = jnp.asarray([self.prefill()().argmax()], jnp.int32)
        length, count = self.work.prompt + self.work.tokens, self.work.tokens
        _, compiled, params = self._compiled("generate", batch=1, context=length, count=count)
        self.cache = self.cache.grown(self.config, length)

        def run() -> np.ndarray:
            written, cache = jax.block_until_ready(compiled(params, first, self.cache))
            self.cache = cache.at(self.work.prompt)
            return np.asarray(written)[0]

        return run


def llama_config(transformers: Any, fields: dict[str, Any]) -> Any:
    """A config of this project, as JSON has it, as that of the same Llama in transformers."""
    return transformers.LlamaConfig(
        vocab_size=fields["vocabulary"],
        hidden_size=fields["width"],
        intermediate_size=fields["mlp_width"],
        num_hidden_layers=fields["num_layers"],
        num_attention_heads=fields["num_heads"],
        num_key_value_heads=fields["num_kv_heads"],
        head_dim=fields["head_width"],
        tie_word_embeddings=fields["tied"],
        rms_norm_eps=fields["norm_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": fields["rope_theta"]},
        max_position_embeddings=fields["max_context"],
    )


class Peer:
    """`LlamaForCausalLM` with what was found fastest here: scaled_dot_product_attention, the cache that grows, and a
    loop that does nothing but call the model (its `generate` is slower)."""

    name, packages = "transformers", ("torch", "transformers")
    cache: Any  # of the prompt

    def __init__(self, work: Work):
        os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
        import torch
        import transformers

        transformers.utils.logging.disable_progress_bar()
        torch.set_num_threads(work.cores)
        torch.manual_seed(0)
        self.work, self.torch, self.transformers = work, torch, transformers

    def settings(self) -> str:
        """How it runs."""
        compiled = "torch.compile" if self.work.compile else "eager"
        return (
            f"{compiled}, {self.torch.get_num_threads()} threads, OMP_WAIT_POLICY={os.environ['OMP_WAIT_POLICY']}, "
            "inference_mode, sdpa, DynamicCache, fused AdamW; a greedy loop around forward()"
        )

    def save(self) -> None:
        """Writes a model with random weights."""
        config = llama_config(self.transformers, self.work.config)
        self.transformers.LlamaForCausalLM(config).save_pretrained(self.work.folder)

    def _model(self) -> tuple[Any, Any]:
        """The model, and what to call."""
        model = self.transformers.LlamaForCausalLM.from_pretrained(
            self.work.folder, dtype=self.torch.float32, attn_implementation="sdpa"
        )
        return model, self.torch.compile(model) if self.work.compile else model

    def train(self) -> Program:
        """A step on one batch, again and again."""
        torch = self.torch
        model, call = self._model()
        model.train()
        matrices, others = ([p for p in model.parameters() if (p.ndim > 1) == decays] for decays in (True, False))
        groups = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(
            groups, self.work.learning_rate, (0.9, 0.95), weight_decay=self.work.weight_decay, fused=True
        )
        text = torch.from_numpy(self.work.text())
        inputs, targets = text[:, :-1], text[:, 1:].reshape(-1)

        def run() -> float:
            optimizer.zero_grad(set_to_none=True)
            logits = call(inputs, use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(logits.reshape(len(targets), -1), targets)
            loss.backward()
            optimizer.step()
            return loss.item()

        return run

    def prefill(self) -> Program:
        """Reads the prompt into a new cache."""
        torch = self.torch
        model, call = self._model()
        model.eval()
        prompt = torch.from_numpy(self.work.prompt_text())

        @torch.inference_mode()
        def run() -> np.ndarray:
            self.cache = self.transformers.DynamicCache(config=model.config)
            return call(prompt, past_key_values=self.cache, use_cache=True, logits_to_keep=1).logits[0, -1].numpy()

        self.call = call
        return run

    def decode(self) -> Program:
        """Writes on after the prompt, which is read once."""
        torch = self.torch
        first = torch.tensor([[int(self.prefill()().argmax())]])

        @torch.inference_mode()
        def run() -> np.ndarray:
            more = self.cache.get_seq_length() - self.work.prompt
            if more:
                self.cache.crop(-more)
            token, written = first, []
            for _ in range(self.work.tokens):
                logits = self.call(token, past_key_values=self.cache, use_cache=True).logits
                token = logits[:, -1].argmax(-1, keepdim=True)
                written.append(token)
            return torch.cat(written, 1)[0].numpy()

        return run


SIDES = {side.name: side for side in (Ours, Peer)}


# --- processes -------------------------------------------------------------------------------------------------------


class Worker:
    """One side in a process of its own, which does what it is asked and nothing else."""

    def __init__(self, name: str, work: Work):
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, name, work), daemon=True)
        self._process.start()
        theirs.close()
        self.imports_bytes: int = self._answer()

    def ask(self, what: str) -> Any:
        """The side's own method, or `run`: a program, ready from then on. RuntimeError with what went wrong there."""
        self._pipe.send(what)
        return self._answer()

    def _answer(self) -> Any:
        try:
            answer, failed = self._pipe.recv()
        except EOFError:
            self._process.join()
            raise RuntimeError(f"a process ended with status {self._process.exitcode}; out of memory?") from None
        if failed:
            raise RuntimeError(failed)
        return answer

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self._pipe.close()
        self._process.join()


def serve(pipe: "Connection", name: str, work: Work) -> None:
    """What a worker's process does: answers until nobody asks.

    `train`, `prefill`, `decode` make a program ready; `run` runs it: its seconds, and what came of it.
    """
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: work.cores])
    targets.keep_memory()  # for either side alike: what it saves is the system's work, not theirs
    side = SIDES[name](work)
    pipe.send((peak_bytes(), None))
    program: Program | None = None

    def answer(what: str) -> Any:
        nonlocal program
        if what in PROGRAMS:
            program = None
            program = getattr(side, what)()
        elif what == "run":
            assert program is not None, "a program is made ready first"
            begin = time.perf_counter()
            result = program()
            return time.perf_counter() - begin, result
        else:
            return peak_bytes() if what == "peak" else getattr(side, what)()

    while True:
        try:
            what = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((answer(what), None))
        except Exception:  # whatever it is, the other process is told
            pipe.send((None, f"{name}, {what}: {traceback.format_exc()}"))


def peak_bytes() -> int:
    """The most memory that this process has had, resident."""
    try:
        # Not getrusage: on Linux that also remembers the process before exec, which was the parent.
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# --- the benchmark ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """One program. By side: seconds of each run, in the order of the turns; bytes of memory at the peak, and after the
    imports alone. `apart`: how far apart what they computed is, as `check` says it."""

    program: str
    tokens: int
    apart: float
    seconds: dict[str, list[float]]
    peak_bytes: dict[str, int]
    imports_bytes: dict[str, int]

    @property
    def ratios(self) -> list[float]:
        """How many times as fast we are, in each turn."""
        return [theirs / ours for ours, theirs in zip(*(self.seconds[name] for name in SIDES), strict=True)]

    @property
    def speed_ratio(self) -> float:
        """The median of them."""
        return statistics.median(self.ratios)

    @property
    def memory_ratio(self) -> float:
        """The peer's memory over ours, each without its imports."""
        own = {name: self.peak_bytes[name] - self.imports_bytes[name] for name in SIDES}
        return own[Peer.name] / own[Ours.name]

    def tokens_per_second(self, name: str) -> float:
        """At the median."""
        return self.tokens / statistics.median(self.seconds[name])

    def to_json(self) -> dict[str, Any]:
        """All of it."""
        derived = {
            "tokens_per_second": {name: self.tokens_per_second(name) for name in SIDES},
            "speed_ratio": self.speed_ratio,
            "memory_ratio": self.memory_ratio,
        }
        return vars(self) | derived


def check(program: str, ours: Any, theirs: Any) -> float:
    """How far apart they are: logits at most, a loss as a part of itself, and of the written tokens how many.

    Disagreement where that is more than rounding.
    """
    if program == "decode":
        apart = int(np.sum(ours != theirs))
        if apart:
            first = int(np.argmax(ours != theirs))
            raise Disagreement(f"decode: token {first} is {ours[first]} here, and {theirs[first]} of the peer")
        return apart
    apart = float(np.max(np.abs(ours - theirs)))
    bound = LOGITS
    if program == "train":
        apart, bound = apart / abs(theirs), LOSS
    if not apart <= bound:
        raise Disagreement(f"{program}: what comes out is {apart:.2e} apart; it must be at most {bound:g}")
    return apart


def bench(
    work: Work, programs: Sequence[str], repeats: int, say: Callable[[str], None]
) -> tuple[list[Result], dict[str, str]]:
    """What came of each program, and the settings of each side. Raises RuntimeError, Disagreement."""
    say("writing the weights")
    with Worker(Peer.name, work) as peer:
        peer.ask("save")
    results, settings = [], {}
    for program in programs:
        with Worker(Ours.name, work) as ours, Worker(Peer.name, work) as peer:
            workers = {Ours.name: ours, Peer.name: peer}
            for name, worker in workers.items():
                say(f"{program}: making {name} ready")
                worker.ask(program)
                settings[name] = worker.ask("settings")
            say(f"{program}: comparing results")
            apart = 0.0
            for _ in range(LOSSES if program == "train" else 1):
                apart = max(apart, check(program, *(worker.ask("run")[1] for worker in workers.values())))
            seconds: dict[str, list[float]] = {name: [] for name in workers}
            for turn in range(repeats):
                for name, worker in workers.items():
                    say(f"{program}: turn {turn + 1} of {repeats}, {name}")
                    seconds[name].append(worker.ask("run")[0])
            peak = {name: worker.ask("peak") for name, worker in workers.items()}
            imports = {name: worker.imports_bytes for name, worker in workers.items()}
            results.append(Result(program, work.tokens_in(program), apart, seconds, peak, imports))
    return results, settings


# --- the command -----------------------------------------------------------------------------------------------------


def define(values: absl_flags.FlagValues) -> None:
    """Adds every flag."""
    to = flags.Definer(values)
    flags.define_model(to)
    to.strings("program", "train, prefill or decode; given several times, all of them. Default: all three")
    to.count("rows", 4, "sequences to train on")
    to.count("context", 256, "positions of each of them")
    to.count("prompt", 512, "tokens that are read (prefill), in one sequence")
    to.count("tokens", 64, "tokens that are then written (decode)")
    to.count("repeats", 7, "how often each program is run by each side, in turns")
    to.count("cores", None, "that both may use. Default: all that this process may")
    to.boolean("compile", "torch.compile for the peer")
    to.one_of(("table", "json"), "format", "table", "what standard output carries: table or json")
    flags.define_help(to)


def request(values: absl_flags.FlagValues, folder: Path) -> Work:
    """The validated work; UsageError names the flag that is wrong."""
    from ..model.train import PLAIN

    values.model = values.model or "small"
    values.layers = values.layers or "unroll"  # a scan copies weights out of stacks, and their gradients into them
    config = flags.model_config(values, "train")
    for name, sizes in (("context", values.context), ("prompt", values.prompt + values.tokens)):
        if sizes > config.max_context:
            raise UsageError(
                f"--{name}={getattr(values, name)}: {config.name} takes 1 to {config.max_context} positions"
            )
    if not _is_llama(config):
        raise UsageError(f"--model={values.model}: it must be of the Llama family, which the peer is built as")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if values.cores and values.cores > cores:
        raise UsageError(f"--cores={values.cores}: this process may use {cores}")
    if missing := [package for package in Peer.packages if importlib.util.find_spec(package) is None]:
        raise UsageError(f"{missing[0]} is not installed: pip install {' '.join(Peer.packages)}")
    config = replace(config, dtype="float32", param_dtype="float32")
    return Work(
        config.to_json(),
        folder,
        values.rows,
        values.context,
        values.prompt,
        values.tokens,
        PLAIN.learning_rate,
        PLAIN.weight_decay,
        values.cores or cores,
        values.compile,
    )


def _is_llama(config: "ModelConfig") -> bool:
    """Whether nothing about it but sizes, and how it runs, is not as in Llama."""
    from ..model.config import ModelConfig

    free = [field for field, _ in flags.SIZES.values()] + ["tied", "norm_epsilon", "rope_theta", "max_context"]
    return config == ModelConfig(**{name: getattr(config, name) for name in ("name", *free, *flags.RUNS)})


def main(argv: Sequence[str] | None = None) -> int:
    """Runs it: 0; 2 where the flags are wrong; 1 where the two do not agree, or one of them failed."""
    # Threads of OpenMP that spin where they wait make torch many times slower on a machine that does anything else.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    return command.run(_run, define, INTRODUCTION, argv, (Disagreement, RuntimeError))


def _run(values: absl_flags.FlagValues) -> None:
    with tempfile.TemporaryDirectory(prefix="bench-peers-") as folder, command.status() as say:
        work = request(values, Path(folder))
        results, settings = bench(work, values.program or PROGRAMS, values.repeats, say)
    about = environment() | {"cores": work.cores}
    about |= {package: metadata.version(package) for side in SIDES.values() for package in side.packages}
    if values.format == "json":
        said = {"environment": about, "settings": settings, "model": work.config, "repeats": values.repeats}
        print(json.dumps(said | {"programs": [result.to_json() for result in results]}, indent=1))
    else:
        _print(work, values.repeats, about, settings, results)


def _print(
    work: Work, repeats: int, about: dict[str, Any], settings: dict[str, str], results: Sequence[Result]
) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from ..model.config import ModelConfig

    config = ModelConfig.from_json(work.config)
    console = Console(width=None if sys.stdout.isatty() else render.WIDTH, highlight=False)
    sizes = ", ".join(f"{text[0]} {getattr(config, field)}" for field, text in flags.SIZES.values())
    versions = ", ".join(f"{name} {about[name]}" for name in ("python", *Ours.packages, *Peer.packages))
    console.print(f"[bold]{config.name}[/], {render.parameters(config.parameters)} in float32: {sizes}")
    console.print(f"{about['cores']} cores of {about['cpu']}; {versions}")
    for name, text in settings.items():
        console.print(f"{name}: {text}")
    console.print(f"medians of {repeats} turns; a ratio above 1 is in favour of {Ours.name}\n")
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False, show_edge=False)
    for heading in ("", *(f"{name}\ntokens/s" for name in SIDES), "\nratio", "of turns\nfrom to"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for heading in (*(f"{name}\npeak (imports)" for name in SIDES), "less imports\nratio"):
        table.add_column(heading, justify="right", no_wrap=True)
    for result in results:
        turns = sorted(result.ratios)
        table.add_row(
            f"{result.program}, {result.tokens} tokens",
            *(render.digits(result.tokens_per_second(name)) for name in SIDES),
            f"[bold]{result.speed_ratio:.2f}x",
            f"{turns[0]:.2f} {turns[-1]:.2f}",
            *(
                f"{render.amount(result.peak_bytes[name], 'B')} ({render.amount(result.imports_bytes[name], 'B')})"
                for name in SIDES
            ),
            f"[bold]{result.memory_ratio:.2f}x",
        )
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
