"""`python -m stepbill.experiments.published`: figures that others have published, and what comes out here.

The figures, with source and convention, are in published.csv; how each is made again is in `OURS`, by the same name.
"""

import csv
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags as absl_flags

from ..model.architectures import get
from ..model.config import ModelConfig
from ..profiling import chips, closed_form, economics, media, price, render
from ..profiling.assumptions import ApiPrice, TrainingRun, load
from . import command, flags
from .drivers import sweep
from .drivers.sweep import Point

if TYPE_CHECKING:
    from ..profiling.bill import Bill

INTRODUCTION = """published: figures that others have published, beside what comes out here

  python -m stepbill.experiments.published
  python -m stepbill.experiments.published --bills     also those read from a program compiled for an H200
"""
CASES = Path(__file__).with_name("published.csv")
EXACT = 1e-12  # of figures that must be equal: what adding in floating point may do
BILL = "bill"  # how a figure is made that needs a compiled program


@dataclass(frozen=True)
class Case:
    """A published figure.

    Attributes:
      tolerance: "0.5%" of the figure, "0.001" in its own unit, or "exact".
      by: what makes it again here: the closed form, price or media arithmetic, or a bill.
      convention: how it was counted. checked: what of the source was read again.
      unmatched: why it can not be met, if it can not.
    """

    name: str
    quantity: str
    published: float
    tolerance: str
    by: str
    source: str
    convention: str
    checked: str
    unmatched: str

    @property
    def allowed(self) -> float:
        """The largest difference that counts as equal."""
        if self.tolerance == "exact":
            return EXACT * self.published
        if self.tolerance.endswith("%"):
            return float(self.tolerance[:-1]) / 100 * self.published
        return float(self.tolerance)

    def agrees(self, ours: float) -> bool:
        """Whether `ours` is the published figure, as far as that goes."""
        return abs(ours - self.published) <= self.allowed


def cases() -> list[Case]:
    """All published figures, in the order of the file."""
    with CASES.open(newline="") as file:
        lines = list(csv.reader(file))[1:]
    return [Case(name, quantity, float(figure), *rest) for name, quantity, figure, *rest in lines]


# --- what comes out here -------------------------------------------------------------------------------------------


def _gpt(name: str, L: int, D: int, N: int, V: int = 50_257, context: int = 2048) -> ModelConfig:
    """GPT-3 and MPT: as GPT-2, with other sizes. Which layers of GPT-3 attend locally changes no parameter."""
    sizes = {"num_layers": L, "width": D, "num_heads": N, "num_kv_heads": N, "head_width": D // N, "mlp_width": 4 * D}
    return replace(get("gpt2-small"), name=name, vocabulary=V, max_context=context, **sizes)


GPT3 = {
    "125m": _gpt("gpt3-125m", 12, 768, 12),
    "1.3b": _gpt("gpt3-1.3b", 24, 2048, 16),  # the paper's 24 heads of 128 would not give its 1.3e9 parameters
    "6.7b": _gpt("gpt3-6.7b", 32, 4096, 32),
    "175b": _gpt("gpt3-175b", 96, 12_288, 96),
}
MPT_70B = _gpt("mpt-70b", 80, 8192, 64, 50_368)
MPT_7B = _gpt("mpt-7b", 32, 4096, 32, 50_368)
MPT_7B_LONG = replace(MPT_7B, max_context=65_536)
# Chowdhery et al., 2022, table 1: queries of 48 heads, one of keys and values, and attention beside the feed-forward.
PALM = ModelConfig("palm-540b", 118, 18_432, 48, 1, 73_728, 256_000, head_width=256, tied=True, max_context=2048)
H100_PEAK = 989.5e12  # as llm-foundry has it
FACTS = load()
# Figures by a bill, and the step that is compiled for each: `of_bill` reads it.
BILLED = {
    "gpt-fast-llama2-7b-bill": Point(get("llama2-7b"), "decode", 1, 208, "h200"),
    "gpt-fast-llama3.1-8b-bill": Point(get("llama3-8b"), "decode", 1, 208, "h200"),
}


def _of(name: str) -> TrainingRun:
    return FACTS.record(TrainingRun, f"run.{name}")


def _products(name: str, context: int, causal_half: bool) -> float:
    """FLOPs of training a token in a sequence of `context`, those of products alone."""
    config = replace(get(name), attention="xla", remat="none")
    if causal_half:
        return closed_form.ideal_flops(config, "train", 1, context) / context
    return sum(closed_form.matmul_flops(config, "train", 1, context).values()) / context


def _counted(config: ModelConfig, context: int, attention: bool = True) -> float:
    """FLOPs of training a token as model FLOPs utilisation counts them."""
    forward = closed_form.matmul_flops(replace(config, attention="xla"), "prefill", 1, context)["attention/core"]
    return closed_form.training_flops(config.parameters, 1, forward / context if attention else 0)


def _mpt(config: ModelConfig, tokens_per_second: float, passes: int = 3) -> float:
    """Utilisation of an H100, with `passes` forwards' worth of FLOPs: 4 with all of it computed again."""
    return _counted(config, config.max_context) * passes / 3 * tokens_per_second / H100_PEAK


def _palm(attention: bool) -> float:
    run, peak = _of("palm-540b"), chips.chip("v4").peak_flops["bf16"]
    assert run.hours is not None
    return economics.mfu(_counted(PALM, PALM.max_context, attention) * run.tokens, peak, run.hours)


def _decode(name: str) -> float:
    """Bytes that a decode step of one sequence must read, with a cache of 208 positions."""
    config = get(name)
    weights = closed_form.weights_bytes(config, config.parameters, batch=1, element_bytes=2)
    return weights + closed_form.cache_bytes(config, "decode", 1, 208, element_bytes=2)[0]


def of_bill(bill: "Bill") -> float:
    """The same of the program that was compiled."""
    return bill.total.hbm_read["weights"] + bill.total.hbm_read["cache"]


def _billed(point: Point) -> float:
    return of_bill(sweep.bills([point])[point])


def _cache(element_bytes: int, **stored: Any) -> float:
    """Bytes of one position of Llama 3 70B's cache."""
    config = replace(get("llama3-70b"), **stored)
    return closed_form.cache_bytes(config, "prefill", 1, 1, element_bytes)[1]


def _failure_hours() -> float:
    return economics.failure_hours(FACTS.whole("failure.chips"), FACTS)


def _young() -> tuple[float, float]:
    """Seconds of a checkpoint and between failures."""
    return FACTS.number("failure.checkpoint_seconds"), _failure_hours() * price.SECONDS_PER_HOUR


def _day() -> float:
    """Dollars of DeepSeek's day of serving."""
    day = FACTS.number
    chips = day("day.nodes") * day("day.chips_per_node")
    return chips * day("day.hours") * day("day.dollars_per_hour")


def _sold() -> float:
    """What its tokens would have brought at its list price."""
    day = FACTS.whole
    cached = day("day.cached_tokens")
    listed = FACTS.record(ApiPrice, "api.deepseek-r1")
    return listed.dollars(day("day.uncached_tokens") + cached, day("day.output_tokens"), cached)


def _trained(name: str) -> float:
    """Dollars of a run, by its hours and its price of one."""
    run = _of(name)
    assert run.hours is not None and run.dollars_per_hour is not None
    return run.hours * run.dollars_per_hour


OURS: Mapping[str, Callable[[], float]] = {
    **{
        f"gpt3-{size}-train": lambda N=config.parameters: closed_form.training_flops(N, _of("gpt3-175b").tokens)
        for size, config in GPT3.items()
    },
    "llama3.1-405b-train": lambda: closed_form.training_flops(get("llama3-405b").parameters, _of("llama3-405b").tokens),
    "palm-540b-token": lambda: _counted(PALM, PALM.max_context),
    "palm-540b-mfu": lambda: _palm(attention=True),
    "palm-540b-mfu-without-attention": lambda: _palm(attention=False),
    "maxtext-llama3.1-8b-8k": lambda: _products("llama3-8b", 8192, causal_half=False),
    "maxtext-llama3.1-70b-8k": lambda: _products("llama3-70b", 8192, causal_half=False),
    "maxtext-llama3.1-405b-8k": lambda: _products("llama3-405b", 8192, causal_half=True),
    "maxtext-llama3.1-70b-128k": lambda: _products("llama3-70b", 131_072, causal_half=True),
    "maxtext-deepseek-v3-4k": lambda: _products("deepseek-v3", 4096, causal_half=True),
    "maxtext-qwen3-235b-a22b-4k": lambda: _products("qwen3-235b-a22b", 4096, causal_half=True),
    "mpt-70b-mfu": lambda: _mpt(MPT_70B, 1007),
    "mpt-70b-hfu": lambda: _mpt(MPT_70B, 1007, passes=4),
    "mpt-7b-2k-mfu": lambda: _mpt(MPT_7B, 10_643),
    "mpt-7b-64k-mfu": lambda: _mpt(MPT_7B_LONG, 1956),
    "mpt-7b-64k-hfu": lambda: _mpt(MPT_7B_LONG, 1956, passes=4),
    "mpt-7b-64k-parameters": lambda: MPT_7B_LONG.parameters,
    "gpt-fast-llama2-7b": lambda: _decode("llama2-7b"),
    "gpt-fast-llama3.1-8b": lambda: _decode("llama3-8b"),
    **{name: lambda point=point: _billed(point) for name, point in BILLED.items()},
    "llama3-70b-cache": lambda: _cache(1),
    "llama3-70b-cache-as-stored": lambda: _cache(2, cache_dtype="int8"),
    "llama1-65b-hours": lambda: _of("llama1-65b").hours or 0.0,
    "deepseek-v3-dollars": lambda: _trained("deepseek-v3"),
    "deepseek-serving-cost": _day,
    "deepseek-serving-revenue": _sold,
    "llama3-405b-mtbf": _failure_hours,
    "llama3-405b-interval": lambda: price.checkpoint_interval(*_young()) / 60,
    "llama3-405b-overhead": lambda: price.checkpoint_overhead(*_young(), price.checkpoint_interval(*_young())),
    "gpt-4o-1024x1024": lambda: media.image_tokens("gpt-4o", 1024, 1024),
    "gpt-4o-2048x4096": lambda: media.image_tokens("gpt-4o", 2048, 4096),
    "gemma3-image": lambda: media.image_tokens("gemma3", 896, 896),
    "whisper-30s": lambda: media.audio_tokens("whisper", 30),
}


# --- the command ---------------------------------------------------------------------------------------------------


def define(values: absl_flags.FlagValues) -> None:
    """Adds every flag."""
    to = flags.Definer(values)
    to.boolean("bills", "also the figures that are read from a compiled program (of 7 and 8 billion parameters)")
    to.one_of(flags.FORMATS, "format", "table", "how to print: " + ", ".join(flags.FORMATS))
    flags.define_help(to)


def verdict(case: Case, ours: float) -> str:
    """Whether they agree, and whether they should."""
    if case.agrees(ours):
        return "agrees"
    return "differs, explained" if case.unmatched else "DIFFERS"


def text(found: Sequence[tuple[Case, float]], form: str) -> str:
    """Published, ours, difference, a line each; below a table, why a figure can not be met."""
    if form == "json":
        rows = [asdict(case) | {"ours": ours, "verdict": verdict(case, ours)} for case, ours in found]
        return json.dumps({"schema": 1, "figures": rows}, indent=1) + "\n"
    exact = form == "csv"
    rows = [
        {
            "figure": case.name,
            "quantity": case.quantity,
            "published": str(case.published) if exact else f"{case.published:.6g}",
            "ours": str(ours) if exact else f"{ours:.6g}",
            "difference": f"{ours / case.published - 1:+.3%}",
            "tolerance": case.tolerance,
            "by": case.by,
            "verdict": verdict(case, ours),
        }
        for case, ours in found
    ]
    reasons = "".join(f"\n{case.name}: {case.unmatched}\n" for case, _ in found if case.unmatched and not exact)
    return render.columns(rows, separated="," if exact else None) + reasons


def main(argv: Sequence[str] | None = None) -> int:
    """Runs it: 0; 1 where a figure differs that should not; 2 where the flags are wrong."""
    return command.run(_run, define, INTRODUCTION, argv)


def _run(values: absl_flags.FlagValues) -> int:
    found = []
    with command.status() as say:
        for case in cases():
            if case.by != BILL or values.bills:
                say(case.name)
                found.append((case, OURS[case.name]()))
    sys.stdout.write(text(found, values.format))
    return int(any(not case.agrees(ours) and not case.unmatched for case, ours in found))


if __name__ == "__main__":
    sys.exit(main())
