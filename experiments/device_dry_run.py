"""The rows of the device suite without the device: what each is, what it needs, and whether the chip has it."""

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from ..profiling import render, targets
from ..profiling.chips import Chip
from .device_rows import Row, Work


def show(rows: Sequence[Row], target: str, compiles: bool, form: str) -> None:
    """Prints them; compiles: with what the compiler says of each step of ours, a few seconds to a minute each."""
    targets.prepare(target)
    chip = targets.chip(target)
    found = []
    for row in rows:
        entry: dict[str, Any] = {"name": row.name, "part": row.part, "guess_seconds": row.seconds}
        entry |= {"guess_exclusive_seconds": row.exclusive_seconds, "limit_seconds": row.limit_seconds}
        if row.work is not None:
            entry |= {"work": asdict(row.work)} | sizes(row.work, chip)
            if compiles and row.part == "steps" and entry["fits"]:
                entry |= compiled(row.work, target)
        found.append(entry)
        if form == "table":
            print(_line(entry), flush=True)
    if form == "json":
        print(json.dumps({"schema": 1, "target": target, "rows": found}, indent=1))
    else:
        alone = sum(row.exclusive_seconds for row in rows) / 60
        print(
            f"{len(found)} rows; by guess they have the device for themselves for {alone:.0f} minutes", file=sys.stderr
        )


def sizes(work: Work, chip: Chip) -> dict[str, Any]:
    """The parameters, and the least bytes that the step needs, by estimate."""
    from . import fit

    config = work.config()
    needs = fit.estimate(config, work.step, work.batch, work.context, {})
    return {
        "parameters": config.parameters,
        "needs_bytes": needs,
        "fits": chip.usable_hbm_bytes is None or needs <= chip.usable_hbm_bytes,
        "by": "estimate",
    }


def compiled(work: Work, target: str) -> dict[str, Any]:
    """The same as the compiler plans it, and the bill's time, for a chip that need not be here."""
    from . import steps
    from .bill import bill_of

    step = steps.build(work.config(), work.step, batch=work.batch, context=work.context, mesh=targets.mesh(target, {}))
    options = step.compiler_options(targets.chip(target).platform)
    try:
        compilation = targets.compile(step.lower(), target, options=options)
    except targets.DoesNotFit as error:
        return {"needs_bytes": error.needs_bytes, "fits": False, "by": "compiler"}
    except targets.CompileError as error:
        return {"fits": None, "by": "compiler", "error": str(error).splitlines()[0]}
    bill = bill_of(step, compilation, target)
    return {
        "needs_bytes": bill.memory["peak_bytes"],
        "by": "compiler",
        "compile_seconds": compilation.compile_seconds,
        "roofline_seconds": bill.total.picoseconds / 1e12,
        "hbm_bytes": bill.total.hbm_bytes,
        "requested_bytes": bill.total.requested_bytes,
        "ideal": {"flops": bill.ideal_flops, "hbm_bytes": bill.ideal_hbm_bytes},
        "matmul_flops": bill.total.matmul,
        "unknown": len(bill.unknown),
        "how": compilation.how,
    }


def _line(entry: dict[str, Any]) -> str:
    """One row of the table."""
    seconds = f"~{entry['guess_exclusive_seconds']:g} of {entry['guess_seconds']:g} s"
    parts: Iterable[str] = [f"{entry['name']:<44}", seconds.rjust(15)]
    if "work" in entry:
        fits = {True: "fits", False: "DOES NOT FIT", None: "not compiled"}[entry["fits"]]
        needs = render.amount(entry.get("needs_bytes"), "B", 4) if entry.get("needs_bytes") else "?"
        parts = [*parts, f"batch {entry['work']['batch']}".rjust(9), f"context {entry['work']['context']}".rjust(13)]
        parts = [*parts, f"{needs:>9} by {entry['by']}: {fits}"]
    if "roofline_seconds" in entry:
        ratio = entry["hbm_bytes"] / entry["ideal"]["hbm_bytes"] if entry["ideal"]["hbm_bytes"] else None
        parts = [
            *parts,
            f"roofline {render.seconds(entry['roofline_seconds'])}",
            f"HBM/ideal {ratio:.2f}" * bool(ratio),
        ]
        parts = [*parts, f"compiled in {entry['compile_seconds']:.0f} s"]
    if "error" in entry:
        parts = [*parts, entry["error"]]
    return "  ".join(parts).rstrip()
