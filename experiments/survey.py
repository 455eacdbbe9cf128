"""`python -m stepbill.experiments.survey`: every architecture's every step, billed, a line each.

The question is which parts of which models cost what; and the answer holds only as far as the bills do, so that each
line says what could not be attributed. A line that is there already is not computed again.
"""

import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags as absl_flags

from . import command, flags
from .flags import UsageError

if TYPE_CHECKING:
    from ..profiling.bill import Bill

INTRODUCTION = """survey: every architecture's train, prefill and decode step, billed

  python -m stepbill.experiments.survey --target=h200 --out=survey.jsonl
  python -m stepbill.experiments.survey --target=v5e --models=gemma-2b,gemma3-4b --steps=decode
"""
STEPS = ("train", "prefill", "decode")
OURS = ("nano", "small")  # not published
COLUMNS = {
    **{"model": "model", "step": "step", "mesh": "mesh", "total_over_ideal": "HBM/ideal", "flops": "FLOPs"},
    **{"hbm_bytes": "HBM bytes", "peak_bytes": "peak memory", "roofline_seconds": "roofline"},
    **{"attention": "attention", "mlp": "mlp", "cache": "cache", "unattributed_flops": "FLOPs?"},
    **{"unattributed_bytes": "bytes?", "unknown": "unknown", "seconds": "took"},
}
UNITS = {"flops": "", "hbm_bytes": "B", "peak_bytes": "B"}
SECONDS = ("roofline_seconds", "seconds")
SHARES = ("attention", "mlp", "cache", "unattributed_flops", "unattributed_bytes")


def define(values: absl_flags.FlagValues) -> None:
    """Adds every flag."""
    to = flags.Definer(values)
    to.string("models", None, "which, by name, with commas. Default: every published one")
    to.string("steps", ",".join(STEPS), "which, with commas")
    to.string("target", "h200", "the chip; as many of them as each step needs")
    to.count("batch", 8, "sequences of a decode step; prefill has one, training one for each data shard")
    to.count("context", 4096, "positions; fewer where a model takes fewer")
    to.string("out", None, "a file of lines of JSON, which is added to, and whose lines are not computed again")
    flags.define_help(to)


def requests(values: absl_flags.FlagValues) -> Iterator[flags.Request]:
    """One for each model and step; UsageError names the flag that is wrong."""
    from ..model.architectures import ARCHITECTURES

    names = values.models.split(",") if values.models else [name for name in ARCHITECTURES if name not in OURS]
    for step in values.steps.split(","):
        if step not in STEPS:
            raise UsageError(f"--steps={values.steps}: {step!r} must be one of {', '.join(STEPS)}")
    for name in names:
        if name not in ARCHITECTURES:
            raise UsageError(f"--models={values.models}: {name!r} must be one of {', '.join(ARCHITECTURES)}")
        for step in values.steps.split(","):
            context = min(values.context, ARCHITECTURES[name].max_context)
            line = [f"--model={name}", f"--step={step}", f"--target={values.target}", f"--context={context}"]
            line += {"train": ["--remat=full"], "prefill": ["--batch=1"], "decode": [f"--batch={values.batch}"]}[step]
            yield flags.request(flags.parse([*line, "--mesh=auto"]))


def line(bill: "Bill", seconds: float) -> dict[str, Any]:
    """What is kept of a bill; parts are of its roofline seconds, what is unattributed of FLOPs and of bytes."""
    total, mesh = bill.total, bill.program["mesh"]
    groups = {name: bill.group(name).seconds / total.seconds for name in ("attention", "mlp", "cache")}
    return {
        **{name: bill.program[name] for name in ("model", "step", "batch", "context", "target", "jax")},
        "attends": bill.program["attention"],
        "mesh": flags.mesh_name(mesh) or "1 chip",
        "total_over_ideal": bill.efficiency,
        "flops": total.flops,
        "hbm_bytes": total.hbm_bytes,
        "peak_bytes": bill.memory.get("peak_bytes"),
        "roofline_seconds": total.seconds,
        **groups,
        "unattributed_flops": bill.unattributed.flops / total.flops,
        "unattributed_bytes": bill.unattributed.hbm_bytes / total.hbm_bytes,
        "unknown": len(bill.unknown),
        "differences": bill.differences,
        "seconds": round(seconds, 1),
    }


def survey(values: absl_flags.FlagValues, say: Any) -> list[dict[str, Any]]:
    """Every line, those that were there first."""
    from .bill import bill_step

    asked = list(requests(values))
    out = Path(values.out) if values.out else None
    try:
        lines = [json.loads(text) for text in out.read_text().splitlines()] if out and out.exists() else []
    except (OSError, ValueError) as error:
        raise UsageError(f"--out={values.out}: it must be a file of lines of JSON ({error})") from None
    done = {(one["model"], one["step"], one["target"], one["context"]) for one in lines}
    for request in asked:
        assert request.config is not None
        if (request.config.name, request.step, request.target, request.context) in done:
            continue
        say(f"{request.config.name} {request.step}")
        start = time.perf_counter()
        try:
            bill = bill_step(request)
        except UsageError as error:
            print(f"stepbill: {request.config.name} {request.step}: {error}", file=sys.stderr)
            continue
        bill.check()
        lines.append(line(bill, time.perf_counter() - start))
        if out:
            with out.open("a") as file:
                file.write(json.dumps(lines[-1]) + "\n")
    return lines


def table(lines: Sequence[dict[str, Any]]) -> str:
    """A row a line; amounts are a chip's, shares those of roofline seconds, and what is behind ? is unattributed."""
    from ..profiling import render

    def cell(one: dict[str, Any], name: str) -> str:
        value = one[name]
        if value is None or isinstance(value, str):
            return value or "-"
        if name in UNITS:
            return render.amount(value, UNITS[name])
        if name in SECONDS:
            return render.seconds(value)
        return f"{value:.1%}" if name in SHARES else render.digits(value)

    return render.columns([{title: cell(one, name) for name, title in COLUMNS.items()} for one in lines])


def main(argv: Sequence[str] | None = None) -> int:
    """Runs it: 0; 2 where the flags are wrong."""
    return command.run(_run, define, INTRODUCTION, argv)


def _run(values: absl_flags.FlagValues) -> None:
    with command.status() as say:
        lines = survey(values, say)
    sys.stdout.write(table(lines))


if __name__ == "__main__":
    sys.exit(main())
