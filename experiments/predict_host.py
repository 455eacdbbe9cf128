"""`python -m stepbill.experiments.predict_host`: predicted against measured, over steps of many sizes, on this CPU.

Each program is run as in production: compiled once, untraced, one execution after the other. After each comes a round
of the microbenchmarks of `calibrate`, none of which is a model, and all programs are predicted by the medians of those:
a machine that others use, too, may have a third less to give in one minute than in the next, and both see it alike.
"""

import gc
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from absl import flags as absl_flags

from ..profiling import calibration, render, targets
from ..profiling.memory import Plan
from ..profiling.walk import itemize_text
from . import calibrate, command, flags
from .command import Say
from .flags import UsageError

if TYPE_CHECKING:
    from ..model.config import ModelConfig

INTRODUCTION = """predict_host: how long steps take on this CPU, predicted and measured

  python -m stepbill.experiments.predict_host                   about ten minutes
  python -m stepbill.experiments.predict_host --step=decode
  python -m stepbill.experiments.predict_host --set=heldout     programs that the prediction was not made on
"""
STEPS = ("decode", "prefill", "train", "generate")
COMMAND = "python -m stepbill.experiments.predict_host"
REPEATS, SAMPLE_SECONDS = 7, 0.1
Program = tuple[str, int, int]  # model, batch, context; each model is of `configs`
# How the prediction works was chosen while looking at the development set. The held-out one was chosen after that,
# before any of it was measured, and nothing may be tuned to it: no model and no pair of batch and context is in both.
SETS: dict[str, dict[str, tuple[Program, ...]]] = {
    "development": {
        "decode": (
            *(("1m", 1, 64), ("1m", 16, 512), ("10m", 1, 512), ("10m", 8, 1024), ("30m", 1, 256), ("30m", 16, 2048)),
            *(("100m", 1, 1024), ("100m", 4, 512), ("300m", 1, 256), ("300m", 8, 1024)),
            *(("moe-15m", 1, 256), ("moe-15m", 8, 512), ("moe-200m", 1, 512)),
        ),
        "prefill": (
            *(("1m", 1, 64), ("1m", 16, 128), ("10m", 1, 512), ("10m", 4, 256), ("30m", 1, 1024), ("100m", 1, 512)),
            *(("300m", 1, 256), ("moe-15m", 1, 512), ("moe-200m", 1, 256)),
        ),
        "train": (("1m", 8, 128), ("10m", 4, 256), ("30m", 2, 256), ("100m", 1, 256), ("moe-15m", 2, 256)),
    },
    "heldout": {
        "decode": (
            *(("mqa-2m", 4, 128), ("gpt-5m", 1, 384), ("gpt-5m", 32, 768), ("deep-15m", 2, 1536)),
            *(("wide-70m", 1, 192), ("gpt2-small", 3, 640), ("235m", 2, 384)),
            *(("moe-5m", 4, 192), ("moe-120m", 4, 768)),
        ),
        "prefill": (
            *(("mqa-2m", 8, 96), ("gpt-5m", 1, 768), ("deep-15m", 2, 384), ("local-45m", 1, 640)),
            *(("wide-70m", 1, 128), ("235m", 1, 192), ("moe-5m", 2, 320), ("moe-120m", 1, 384)),
        ),
        "train": (
            *(("mqa-2m", 4, 192), ("gpt-5m", 6, 160), ("deep-15m", 1, 320), ("wide-70m", 2, 96)),
            ("moe-5m", 3, 128),
        ),
        "generate": (("gpt-5m", 2, 224), ("local-45m", 1, 448), ("moe-5m", 1, 352)),
    },
}


def configs() -> "dict[str, ModelConfig]":
    """Models of 1 to 300 million parameters, dense and with experts; those of the held-out set come last."""
    from ..model import architectures
    from ..model.config import Experts, ModelConfig

    def config(name: str, L: int, D: int, N: int, K: int, F: int, V: int, **fields: Any) -> ModelConfig:
        all_fields: dict[str, Any] = {"max_context": 4096} | fields
        return ModelConfig(name, L, D, N, K, F, V, **all_fields)

    gpt = {"activation": "gelu", "norm": "layer", "positions": "learned", "tied": True, "max_context": 1024}
    gpt |= dict.fromkeys(("qkv_bias", "output_bias", "mlp_bias"), True)
    local = {"head_width": 128, "activation": "geglu", "tied": True, "qk_norm": True, "window": 96, "global_every": 4}
    return {
        "1m": config("1m", 2, 128, 4, 2, 512, 2048),
        "10m": architectures.get("nano"),
        "30m": config("30m", 6, 512, 8, 4, 1536, 8192),
        "100m": architectures.get("small"),
        "300m": config("300m", 16, 1024, 16, 4, 4096, 32_768),
        "moe-15m": config("moe-15m", 4, 256, 8, 4, 512, 4096, experts=Experts(8, 2, 512)),
        "moe-200m": config("moe-200m", 8, 512, 8, 4, 1024, 8192, experts=Experts(16, 2, 1024)),
        "mqa-2m": config("mqa-2m", 3, 160, 5, 1, 448, 4096),
        "gpt-5m": config("gpt-5m", 4, 256, 4, 4, 1024, 8192, **gpt),
        "deep-15m": config("deep-15m", 16, 256, 8, 2, 768, 6000),
        "local-45m": config("local-45m", 8, 576, 4, 1, 2304, 12_000, **local),
        "wide-70m": config("wide-70m", 3, 1024, 16, 16, 2816, 16_000),
        "gpt2-small": architectures.get("gpt2-small"),
        "235m": config("235m", 10, 1280, 20, 5, 3456, 24_000),
        "moe-5m": config("moe-5m", 3, 192, 6, 3, 384, 3072, experts=Experts(6, 1, 320)),
        "moe-120m": config("moe-120m", 6, 384, 6, 2, 1024, 10_000, experts=Experts(32, 4, 480, shared=768)),
    }


@dataclass(frozen=True)
class Point:
    """One program: what was predicted, and the untraced samples, in seconds."""

    step: str
    model: str
    parameters: int
    batch: int
    context: int
    kernels: int
    predicted_seconds: float
    samples: tuple[float, ...]

    @property
    def measured_seconds(self) -> float:
        return statistics.median(self.samples)

    @property
    def ratio(self) -> float:
        """Predicted over measured."""
        return self.predicted_seconds / self.measured_seconds

    @property
    def error(self) -> float:
        """Of the prediction, without its sign, as a part of what was measured."""
        return abs(self.ratio - 1)

    def to_json(self) -> dict[str, Any]:
        """All of it."""
        return asdict(self) | {"measured_seconds": self.measured_seconds, "ratio": self.ratio}


@dataclass(frozen=True)
class Timed:
    """One program that has been run: its optimised HLO, roles of its arguments, its plan; and samples, in seconds."""

    step: str
    config: "ModelConfig"
    batch: int
    context: int
    text: str
    roles: Mapping[str, str]
    plan: Plan | None
    samples: tuple[float, ...]

    def predicted(self, rates: calibration.Calibration) -> Point:
        """By what this machine was measured to do."""
        bill = itemize_text(self.text, targets.chip("host"), roles=self.roles, plan=self.plan, calibration=rates)
        assert bill.predicted is not None, "a calibration was given"
        return Point(
            *(self.step, self.config.name, self.config.parameters, self.batch, self.context),
            *(bill.predicted["kernels"], bill.total.predicted_picoseconds * 1e-12, self.samples),
        )


def run(
    step: str, config: "ModelConfig", batch: int, context: int, say: Say = lambda _: None, repeats: int = REPEATS
) -> Timed:
    """Compiles and runs one program."""
    from . import steps
    from .measure import Runner

    say(f"{config.name} {step}: compiling")
    made = steps.build(config, step, batch=batch, context=context, real=True)
    compilation = targets.compile(made.lower(), "host", options=made.compiler_options("cpu"))
    say(f"{config.name} {step}: running")
    samples, _ = Runner(made, compilation.compiled).samples(repeats, SAMPLE_SECONDS)
    return Timed(step, config, batch, context, compilation.text, made.argument_roles, compilation.memory, samples)


def predict(
    programs: Mapping[str, Sequence[Program]], sizes: calibrate.Sizes, say: Say
) -> tuple[list[Point], calibration.Calibration]:
    """Every program of each step, and what they were predicted by: a round of microbenchmarks after each program, and
    as many more as a calibration takes."""
    models, bench, timed = configs(), calibrate.Bench(sizes), list[Timed]()
    for step, of_step in programs.items():
        for model, batch, context in of_step:
            timed.append(run(step, models[model], batch, context, say))
            gc.collect()
            bench.round(say)
    while bench.rounds < sizes.rounds:
        bench.round(say)
    found = bench.found(calibration.host(), COMMAND)
    say("predicting")
    return [one.predicted(found) for one in timed], found


def medians(points: Sequence[Point]) -> dict[str, float]:
    """The median error of each step, and of all."""
    found = {
        step: statistics.median(point.error for point in points if point.step == step)
        for step in dict.fromkeys(point.step for point in points)
    }
    return found | {"all": statistics.median(point.error for point in points)}


def define(values: absl_flags.FlagValues) -> None:
    """Adds every flag."""
    to = flags.Definer(values)
    to.one_of(
        tuple(SETS), "set", "development", "which programs: development, that the prediction was made on; heldout"
    )
    to.one_of(("all", *STEPS), "step", "all", "which of them")
    to.one_of(flags.FORMATS, "format", "table", "what standard output carries: table, json or csv")
    flags.define_help(to)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs it: 0; 2 where the flags are wrong."""
    return command.run(_run, define, INTRODUCTION, argv)


def _run(values: absl_flags.FlagValues) -> None:
    from .bench_bill import environment

    programs = {step: some for step, some in SETS[values.set].items() if values.step in ("all", step)}
    if not programs:
        raise UsageError(f"--step={values.step}: the {values.set} set has none; it has {', '.join(SETS[values.set])}")
    targets.prepare("host")
    targets.keep_memory()
    with command.status() as say:
        points, found = predict(programs, calibrate.SIZES["cpu"], say)
    about = environment() | {"calibrated": found.date, "set": values.set}
    if values.format == "json":
        rows = [point.to_json() for point in points]
        print(json.dumps({"environment": about, "programs": rows, "median_error": medians(points)}, indent=1))
    elif values.format == "csv":
        rows = [{key: value for key, value in point.to_json().items() if key != "samples"} for point in points]
        sys.stdout.write(render.columns(rows, separated=","))
    else:
        _print(points, about)


def _print(points: Sequence[Point], about: dict[str, Any]) -> None:
    rows = [
        {
            "step": point.step,
            "model": point.model,
            "parameters": render.amount(point.parameters),
            "batch": point.batch,
            "context": point.context,
            "kernels": point.kernels,
            "predicted": render.seconds(point.predicted_seconds),
            "measured": render.seconds(point.measured_seconds),
            "fastest": render.seconds(min(point.samples)),
            "slowest": render.seconds(max(point.samples)),
            "ratio": f"{point.ratio:.2f}",
        }
        for point in points
    ]
    print(", ".join(f"{name} {value}" for name, value in about.items()), end="\n\n")
    print(render.columns(rows))
    said = ", ".join(f"{step} {error:.1%}" for step, error in medians(points).items())
    print(f"median error, without sign: {said} ({len(points)} programs)")


if __name__ == "__main__":
    sys.exit(main())
