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
# Seconds that rows took on an H200, most of them compiling.
CEILING_SECONDS = {"copy": 7, "bf16": 12, "launch": 3, "int8": 20, "fp8": 30, "calibration": 75}
STEP_SECONDS = {"decode": 25, "prefill": 20, "train": 65}
PEER_SECONDS = {"gpt_fast": 75, "transformers": 60, "torch": 65}
PEERS = ("gpt_fast", "transformers", "torch")
CONTEXTS = {"1k": 1024, "2k": 2048, "8k": 8192}
TINY_CONTEXTS = {"1k": 32, "2k": 32, "8k": 64}
ROOMY_BYTES = 100 * 10**9  # of memory, above which training takes twice the batch


@dataclass(frozen=True)
class Work:
    """One step: of which model, how stored, how large. batch: sequences. remat, attention: as ModelConfig has them."""

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
        how = {"weights": weights, "remat": self.remat, "attention": self.attention, "layers": "unroll"}
        return replace(config_of(self.model, self.tiny), **how)

    @property
    def tokens(self) -> int:
        """How many tokens one run takes through the model."""
        return self.batch * (1 if self.step == "decode" else self.context)


@dataclass(frozen=True)
class Row:
    """One measurement.

    name: its place in the results. kind: what is done: a ceiling's name, `step`, `range` or `kernels` (counters), or a
    peer's name. seconds: what it is guessed to take; limit_seconds: after which it is stopped.
    """

    name: str
    part: str
    kind: str
    seconds: float
    work: Work | None = None
    limit_seconds: float = field(default=150.0)

    @property
    def of_step(self) -> str:
        """The name of the row that measures the same step of ours."""
        return self.name.split("/", 1)[1].split(f":{self.kind}")[0] if self.part in ("counters", "peers") else self.name

    @property
    def process(self) -> str:
        """Rows that follow each other in one process have this in common."""
        return self.name if self.part == "peers" else self.part


def config_of(model: str, tiny: bool = False) -> "ModelConfig":
    """The models of the suite: Llama 3 8B, two of the sizes of Llama 3.2, and a mixture of 8 experts of some 1B.

    tiny: of the same make with two narrow layers, to run the suite itself on a CPU.
    """
    from ..model import architectures
    from ..model.config import Experts

    llama = architectures.get("llama3-8b")
    half = {"num_heads": 32, "num_kv_heads": 8, "head_width": 64}
    found = {
        "8b": llama,
        "3b": replace(
            llama, name="llama-3b", num_layers=28, width=3072, num_heads=24, num_kv_heads=8, mlp_width=8192, tied=True
        ),
        "1b": replace(llama, name="llama-1b", num_layers=16, width=2048, mlp_width=8192, tied=True, **half),
        "moe": replace(
            architectures.get("mixtral-8x7b"),
            **{"name": "moe-8x1b", "num_layers": 16, "width": 2048, "mlp_width": 8192},
            **{"experts": Experts(8, 2, 8192)},
            **half,
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
    yield from (first, "decode/8b/int8/b1/1k", "decode/8b/int4:128/b1/1k", "train/3b/none", "prefill/8b/8k")
    yield from (CALIBRATION, "torch/prefill/8b/8k", "train/1b/none", "torch/train/1b/none")
    yield from (f"gpt_fast/{first}", f"transformers/{first}", "train/3b/full", "torch/train/3b/full")
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
    if kind == "ceilings":
        seconds = CEILING_SECONDS[rest]
        return Row(name, "ceilings", rest, 2 if tiny else seconds, limit_seconds=300 if tiny else 30 + 2 * seconds)
    if kind in ("range", "kernels"):
        return Row(f"counters/{rest}:{kind}", "counters", kind, 20 if tiny else 25, _work(rest, hbm_bytes, tiny))
    if kind in PEERS:
        seconds = 10 if tiny else PEER_SECONDS[kind]
        return Row(f"peers/{rest}:{kind}", "peers", kind, seconds, _work(rest, hbm_bytes, tiny), 240)
    work = _work(name, hbm_bytes, tiny)
    seconds = STEP_SECONDS[work.step] * (0.7 if work.model == "1b" else 1)
    return Row(name, "steps", "step", 5 if tiny else seconds, work, 240)


def _work(name: str, hbm_bytes: int, tiny: bool) -> Work:
    """`decode/8b/int4:128/b1/1k`, `prefill/8b/8k` or `train/3b/full`."""
    step, model, *rest = name.split("/")
    contexts = TINY_CONTEXTS if tiny else CONTEXTS
    if step == "train":
        (remat,) = rest
        # Of 3B a larger batch fits without rematerialisation, too; torch has to take the same of 1B.
        batch = {"3b": 4, "1b": 8 if remat == "full" else 4}[model] * (2 if hbm_bytes > ROOMY_BYTES else 1)
        return Work(model, step, 2 if tiny else batch, contexts["2k"], remat=remat, tiny=tiny)
    if step == "prefill":
        (context,) = rest
        return Work(model, step, 1, contexts[context], tiny=tiny)
    weights, batch, context = rest
    return Work(model, step, int(batch[1:]), contexts[context], weights.replace(":128", ":32") if tiny else weights,
                tiny=tiny)  # fmt: skip


def chosen(all_rows: Iterable[Row], parts: Iterable[str], pattern: str | None) -> list[Row]:
    """Those of these parts whose names have a match of the regular expression in them."""
    return [row for row in all_rows if row.part in parts and (pattern is None or re.search(pattern, row.name))]
