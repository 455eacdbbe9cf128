"""What the device suite measures: its rows, what each is about and how long it may take. Imports no jax."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..model.config import ModelConfig

PARTS = ("ceilings", "steps", "counters", "peers")
CEILINGS = ("copy", "bf16", "launch", "int8", "fp8")
CALIBRATION = "ceilings/calibration"  # all that predictions are made of: takes longer than the others together
# Seconds for which a row has the device for itself, as they were on an H200; most of it compilers try kernels out.
CEILING_SECONDS = {"copy": 5, "bf16": 12, "launch": 3, "int8": 20, "fp8": 30, "calibration": 60}
STEP_SECONDS = {"decode": 14, "prefill": 14, "train": 45}
ONE_TOKEN_SECONDS = 5  # of a decode step of one sequence, which is compiled beside others
PEER_SECONDS = {"gpt_fast": 70, "transformers": 50, "torch": 55}
COUNTER_SECONDS = 30
BESIDE_SECONDS = {"ceilings": 8, "steps": 20, "counters": 5, "peers": 10}  # of it not: to start, trace and bill
CUDNN = "/cudnn"  # at the end of a row's name
PEERS = ("gpt_fast", "transformers", "torch")
CONTEXTS = {"1k": 1024, "2k": 2048, "8k": 8192}
TINY_CONTEXTS = {"1k": 32, "2k": 32, "8k": 64}
ROOMY_BYTES = 100 * 10**9  # of memory, above which training takes twice the batch


@dataclass(frozen=True)
class Work:
    """One step: of which model, how stored, how large. batch: sequences. remat, attention: as ModelConfig has them,
    but that a tiny model, which no GPU runs, has no cuDNN."""

    model: str
    step: str
    batch: int
    context: int
    weights: str = "bf16"
    remat: str = "none"
    attention: str = "auto"
    tiny: bool = False

    def config(self) -> "ModelConfig":
        """The model, as it runs: in training, too, layer by layer, because a loop over stacked layers copies what it
        keeps for the way back into stacks and out of them (BUILD_NOTES.md, stop 10)."""
        weights = "full" if self.weights == "bf16" else self.weights
        attention = "auto" if self.tiny else self.attention
        how = {"weights": weights, "remat": self.remat, "attention": attention, "layers": "unroll"}
        return replace(config_of(self.model, self.tiny), **how)

    @property
    def tokens(self) -> int:
        """How many tokens one run takes through the model."""
        return self.batch * (1 if self.step == "decode" else self.context)

    @property
    def is_compiled_aside(self) -> bool:
        """Whether its compiler times no kernels to choose among them, and so may work while others do: of one token."""
        return self.tokens == 1


@dataclass(frozen=True)
class Row:
    """One measurement.

    name: its place in the results. kind: what is done: a ceiling's name, `step`, `range` or `kernels` (counters), or a
    peer's name. exclusive_seconds: for which it is guessed to have the device for itself; seconds: these and all else
    that it does; limit_seconds: of work, after which it is stopped.
    """

    name: str
    part: str
    kind: str
    exclusive_seconds: float
    seconds: float
    work: Work | None = None
    limit_seconds: float = field(default=150.0)

    @property
    def of_steps(self) -> tuple[str, ...]:
        """Those that measure the same step of ours, one way or another; () of a row that is held against none."""
        return () if self.of_step == self.name else (self.of_step, self.of_step + CUDNN)

    @property
    def of_step(self) -> str:
        """The name of the row that measures the same step of ours."""
        return self.name.split("/", 1)[1].split(f":{self.kind}")[0] if self.part in ("counters", "peers") else self.name


def config_of(model: str, tiny: bool = False) -> "ModelConfig":
    """The models of the suite: Llama 3 8B, two of the sizes of Llama 3.2, and a mixture of 8 experts of some 1B.

    tiny: of the same make with two narrow layers, to run the suite itself on a CPU.
    """
    from ..model import architectures
    from ..model.config import Experts

    llama = architectures.get("llama3-8b")
    # Without the scaling of frequencies, which costs nothing and which torch's would have to do as well.
    plain = {"rope_scaling": llama.rope_scaling, "max_context": llama.max_context}
    found = {
        "8b": llama,
        "3b": replace(architectures.get("llama3.2-3b"), name="llama-3b", **plain),
        "1b": replace(architectures.get("llama3.2-1b"), name="llama-1b", **plain),
        "moe": replace(
            architectures.get("mixtral-8x7b"),
            **{"name": "moe-8x1b", "num_layers": 16, "width": 2048, "mlp_width": 8192},
            **{"num_heads": 32, "num_kv_heads": 8, "head_width": 64, "experts": Experts(8, 2, 8192)},
        ),
    }[model]
    if not tiny:
        return found
    small = {"num_layers": 2, "width": 128, "num_heads": 4, "num_kv_heads": 2, "head_width": 32, "mlp_width": 256}
    experts = replace(found.experts, width=64) if found.experts else None
    return replace(found, name=f"tiny-{found.name}", vocabulary=256, experts=experts, **small)


def rows(hbm_bytes: int, tiny: bool = False) -> list[Row]:
    """All rows, the most important first. hbm_bytes: of the chip."""
    ordered = dict.fromkeys(_names())
    return [_row(name, hbm_bytes, tiny) for name in ordered if not (tiny and name == CALIBRATION)]


def _names() -> Iterator[str]:
    """One of each kind before many of one."""
    yield from (f"ceilings/{name}" for name in CEILINGS)
    first = "decode/8b/bf16/b1/1k"
    yield from (first, "decode/8b/int8/b1/1k", "decode/8b/int4:128/b1/1k", "train/3b/none/cudnn", "prefill/8b/8k/cudnn")
    yield from (CALIBRATION, "prefill/8b/8k", "torch/prefill/8b/8k", "train/1b/none/cudnn", "train/1b/none")
    yield from ("torch/train/1b/none", f"gpt_fast/{first}", f"transformers/{first}", "train/3b/none")
    yield from ("train/3b/full", "torch/train/3b/full")
    yield from (f"range/{first}", "range/train/3b/full", "range/prefill/8b/8k", f"kernels/{first}")
    yield from ("decode/8b/bf16/b8/1k", "decode/8b/bf16/b64/1k", "decode/moe/bf16/b1/1k", "decode/8b/bf16/b1/8k")
    yield from ("prefill/8b/2k", "decode/8b/int8/b64/1k", "decode/8b/int4:128/b64/1k", "gpt_fast/decode/8b/int8/b1/1k")
    yield from ("gpt_fast/decode/8b/int4:128/b1/1k", "gpt_fast/decode/8b/bf16/b64/1k")
    yield from ("range/decode/8b/int8/b1/1k", "range/decode/8b/bf16/b64/1k", "kernels/prefill/8b/8k")
    yield from ("train/1b/full", "decode/moe/bf16/b8/1k", "decode/moe/bf16/b64/1k")
    for model in ("8b", "3b", "1b"):
        for context in ("8k", "1k"):
            for batch in (1, 8, 64):
                yield from (f"decode/{model}/{weights}/b{batch}/{context}" for weights in ("bf16", "int8", "int4:128"))
    yield from (f"prefill/{model}/{context}" for model in ("3b", "1b", "moe") for context in ("8k", "2k"))
    yield from (f"gpt_fast/decode/{model}/bf16/b1/1k" for model in ("3b", "1b"))
    yield from ("gpt_fast/decode/8b/bf16/b8/1k", "gpt_fast/decode/8b/bf16/b1/8k", "torch/prefill/8b/2k")
    yield from ("transformers/decode/8b/bf16/b8/1k", "transformers/prefill/8b/8k")


def _row(name: str, hbm_bytes: int, tiny: bool) -> Row:
    kind, _, rest = name.partition("/")
    work, limit_seconds = None, 240.0
    if kind == "ceilings":
        part, kind, seconds = "ceilings", rest, CEILING_SECONDS[rest]
        limit_seconds = 300.0 if tiny else 30.0 + 2 * seconds
    elif kind in ("range", "kernels"):
        part, seconds, work = "counters", COUNTER_SECONDS, _work(rest, hbm_bytes, tiny)
        name, limit_seconds = f"counters/{rest}:{kind}", 150.0
    elif kind in PEERS:
        part, seconds, work = "peers", PEER_SECONDS[kind], _work(rest, hbm_bytes, tiny)
        name = f"peers/{rest}:{kind}"
    else:
        part, kind, work = "steps", "step", _work(name, hbm_bytes, tiny)
        seconds = ONE_TOKEN_SECONDS if work.is_compiled_aside else STEP_SECONDS[work.step]
        seconds *= 0.7 if work.model == "1b" else 1
    guess = (1.0, 5.0) if tiny else (seconds, seconds + BESIDE_SECONDS[part])
    return Row(name, part, kind, *guess, work, limit_seconds)


def _work(name: str, hbm_bytes: int, tiny: bool) -> Work:
    """`decode/8b/int4:128/b1/1k`, `prefill/8b/8k` or `train/3b/full`; with `/cudnn`, by its kernels of attention."""
    plain = name.removesuffix(CUDNN)
    step, model, *rest = plain.split("/")
    attention = "auto" if plain == name else "cudnn"
    contexts = TINY_CONTEXTS if tiny else CONTEXTS
    if step == "train":
        (remat,) = rest
        # Of 3B a larger batch fits without rematerialisation, too; torch has to take the same of 1B.
        batch = {"3b": 4, "1b": 8 if remat == "full" else 4}[model] * (2 if hbm_bytes > ROOMY_BYTES else 1)
        return Work(model, step, 2 if tiny else batch, contexts["2k"], remat=remat, attention=attention, tiny=tiny)
    if step == "prefill":
        (context,) = rest
        return Work(model, step, 1, contexts[context], attention=attention, tiny=tiny)
    weights, batch, context = rest
    return Work(model, step, int(batch[1:]), contexts[context], weights.replace(":128", ":32") if tiny else weights,
                tiny=tiny)  # fmt: skip


def chosen(all_rows: Iterable[Row], parts: Iterable[str], pattern: str | None) -> list[Row]:
    """Those of these parts whose names have a match of the regular expression in them."""
    return [row for row in all_rows if row.part in parts and (pattern is None or re.search(pattern, row.name))]
