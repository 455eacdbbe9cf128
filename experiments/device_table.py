"""What a run of the device suite came to: the aims beside what was reached, and a short table."""

import io
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ..profiling import render
from ..profiling.chips import CHIPS
from .device_results import DONE
from .device_rows import CUDNN

FIRST = "decode/8b/bf16/b1/1k"
NO_TIME = "there was no time for it"
LEAST_COMPONENT = 0.01  # of a step's bytes: components with less are not held to the aim
# Of logits in bfloat16, and of a loss: above it, a peer computes something else. After 32 layers either is 0.03 from
# float32 and 0.04 from the other (a CPU; 0.06 on an H200); a step with one of them left out is 0.19 off.
AGREEMENT = 0.1


def _done(said: Mapping[str, Any]) -> dict[str, Any]:
    """name -> result of the rows that are done."""
    return {row["name"]: row["result"] for row in said["rows"] if row["status"] == DONE}


def _fastest(done: Mapping[str, Any], name: str) -> str | None:
    """Of our rows that do one step, by our own kernels of attention or by cuDNN's: the fastest; None: none is done."""
    return min((one for one in (name, name + CUDNN) if one in done), key=lambda one: done[one]["seconds"], default=None)


def copy_bytes_per_second(said: Mapping[str, Any]) -> float | None:
    """The most that a copy was measured to move, read and written together."""
    found = _done(said).get("ceilings/copy")
    return max(found["bytes_per_second"].values()) if found else None


def speed_ratios(said: Mapping[str, Any]) -> dict[str, float]:
    """By row of a peer that computes the same: how many times as fast ours is."""
    done, ratios = _done(said), {}
    for name, result in done.items():
        ours = _fastest(done, name.split("/", 1)[1].rsplit(":", 1)[0]) if name.startswith("peers/") else None
        if ours is not None and agrees(result):
            ratios[name] = result["seconds"] / done[ours]["seconds"]
    return ratios


def agrees(result: Mapping[str, Any]) -> bool:
    """Whether a peer computes what ours does."""
    return result["apart"] is not None and result["apart"] <= AGREEMENT


def byte_errors(said: Mapping[str, Any]) -> dict[str, float]:
    """By row of counters: (bill - counted) / counted, of the HBM bytes of a step, with what is read again."""
    return {
        name: _billed(result["bill"]) / (result["read_bytes"] + result["write_bytes"]) - 1
        for name, result in _done(said).items()
        if name.startswith("counters/") and result["read_bytes"] + result["write_bytes"]
    }


def _billed(of: Mapping[str, int]) -> int:
    """HBM bytes, each array once, and what large products read again."""
    return of["hbm_bytes"] + of.get("reread_bytes", 0)


def component_errors(said: Mapping[str, Any]) -> dict[str, float]:
    """By row of counters and component, of those with any weight: (bill - counted) / counted."""
    found = {}
    for name, result in _done(said).items():
        components = result.get("components", {}) if name.startswith("counters/") else {}
        whole = sum(one["counted_bytes"] for one in components.values())
        for component, one in components.items():
            if one["counted_bytes"] > LEAST_COMPONENT * whole:
                found[f"{name} {component}"] = _billed(one) / one["counted_bytes"] - 1
    return found


def time_errors(said: Mapping[str, Any]) -> dict[str, float]:
    """By step: (predicted - measured) / measured."""
    return {
        name: result["predicted_seconds"] / result["seconds"] - 1
        for name, result in _done(said).items()
        if result.get("predicted_seconds") and "seconds" in result and not name.startswith(("peers/", "counters/"))
    }


def aims(said: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each aim: what is wanted, what was reached (None: not measured), and whether that is enough."""
    done, copy = _done(said), copy_bytes_per_second(said)

    def speed(name: str) -> float | None:
        return done[name]["tokens_per_second"] if name in done else None

    def over(a: float | None, b: float | None) -> float | None:
        return a / b if a and b else None

    def median(errors: Mapping[str, float]) -> float | None:
        return statistics.median(map(abs, errors.values())) if errors else None

    first = done.get(FIRST)
    moved = first["ideal"]["hbm_bytes"] / first["seconds"] if first and first["ideal"]["hbm_bytes"] else None
    peers, components = speed_ratios(said), component_errors(said)
    mfu = max((done[name]["mfu"] for name in done if name.startswith("train/3b/") and done[name]["mfu"]), default=None)
    rows: list[tuple[str, float, float | None, bool]] = [
        ("decode 8b bf16 batch 1: ideal bytes/s over copy bytes/s", 0.85, over(moved, copy), True),
        ("int8 over bf16, tokens/s, batch 1", 1.8, over(speed("decode/8b/int8/b1/1k"), speed(FIRST)), True),
        ("int4:128 over bf16, tokens/s, batch 1", 3.2, over(speed("decode/8b/int4:128/b1/1k"), speed(FIRST)), True),
        (f"over torch, least of {len(peers)} rows", 1.0, min(peers.values(), default=None), True),
        ("train 3b: MFU of the datasheet's bf16", 0.60, mfu, True),
        ("hbm bytes against counters, median error", 0.05, median(byte_errors(said)), False),
        ("  the worst component", 0.10, max(map(abs, components.values()), default=None), False),
        ("predicted against measured time, median error", 0.10, median(time_errors(said)), False),
    ]
    return [
        {
            "aim": text.strip(),
            "wanted": wanted,
            "at_least": at_least,
            "reached": reached,
            "met": None if reached is None else (reached >= wanted if at_least else reached <= wanted),
        }
        for text, wanted, reached, at_least in rows
    ]


# --- the table -------------------------------------------------------------------------------------------------------


def text(said: Mapping[str, Any]) -> str:
    """All of it on two screens."""
    from rich.console import Console

    out = io.StringIO()
    console = Console(file=out, width=render.WIDTH, highlight=False, emoji=False, markup=False)
    chip = CHIPS[said["target"]]
    smi = said["machine"].get("nvidia_smi") or {}
    versions = ", ".join(f"{name} {version}" for name, version in said["machine"]["versions"].items())
    driver = f", driver {smi['driver_version']}, at most {smi['power.limit']}" if smi else ""
    console.print(f"{chip.title}{driver}; {versions}")
    if said["tiny"]:
        console.print("TINY MODELS ON A CPU: the suite tries itself out, and no number here says anything")
    for title, head, rows in (
        ("ceilings", ("", "measured", "of datasheet"), _ceilings(said)),
        (
            "steps of ours",
            ("", "measured", "device busy", "predicted", "roofline", "tokens/s", "MFU", "MBU", "HBM/ideal"),
            _steps(said),
        ),
        ("DRAM counters", ("", "counted", "bill: hbm", "read again", "differs", "bill: requested"), _counters(said)),
        ("torch, same weights", ("", "measured", "tokens/s", "ours is", "apart"), _peers(said)),
        ("aims", ("", "wanted", "reached", ""), _aims(said["aims"])),
    ):
        if rows:
            console.print()
            console.print(_grid(title, head, rows))
    for status in dict.fromkeys(row["status"] for row in said["rows"] if row["status"] != DONE):
        console.print()
        for row in said["rows"]:
            if row["status"] == status:
                console.print(f"{status}: {row['name']}: {row.get('error', 'nothing more is known')}")
    if missing := [row["name"] for row in said["not_run"] if row["reason"] == NO_TIME]:
        console.print(f"\nnot run, {NO_TIME}: {', '.join(missing)}")
    return out.getvalue()


def _grid(title: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False, show_edge=False)
    for column in (title, *head[1:]):
        table.add_column(column, justify="left" if column == title else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def _or_dash(value: float | None, form: Callable[[float], str]) -> str:
    return "-" if value is None else form(value)


def _percent(value: float | None) -> str:
    return _or_dash(value, lambda it: f"{it:.1%}")


def _seconds(value: float | None) -> str:
    return _or_dash(value, render.seconds)


def _bytes(value: float | None) -> str:
    return _or_dash(value, lambda it: render.amount(it, "B"))


def _ceilings(said: Mapping[str, Any]) -> list[Sequence[str]]:
    chip, rows = CHIPS[said["target"]], []
    for name, result in _done(said).items():
        if not name.startswith("ceilings/"):
            continue
        short = name.removeprefix("ceilings/")
        for size, rate in result.get("flops_per_second", {}).items():
            peak = chip.peak_flops.get(short)
            rows.append((f"{short} {size}^3", render.amount(rate, "FLOP/s"), _percent(peak and rate / peak)))
        for size, rate in result.get("bytes_per_second", {}).items():
            peak = chip.hbm_bytes_per_second
            rows.append((f"copy, {_bytes(int(size))}", render.amount(rate, "B/s"), _percent(peak and rate / peak)))
        for what, rate in result.get("per_second", {}).items():
            rows.append((f"one of {what}", _seconds(1 / rate), ""))
    return rows


def _steps(said: Mapping[str, Any]) -> list[Sequence[str]]:
    rows = []
    for name, result in _done(said).items():
        if name.startswith(("ceilings/", "counters/", "peers/")):
            continue
        ideal = result["ideal"]["hbm_bytes"]
        rows.append(
            (
                name + " (xla attention: own kernel failed)" * ("instead" in result),
                _seconds(result["seconds"]),
                _seconds(result.get("device_busy_seconds")),
                _seconds(result.get("predicted_seconds")),
                _seconds(result["roofline_seconds"]),
                render.digits(result["tokens_per_second"]),
                _percent(result["mfu"]),
                _percent(result["mbu"]),
                f"{result['hbm_bytes'] / ideal:.2f}x" if ideal else "-",
            )
        )
    return rows


def _counters(said: Mapping[str, Any]) -> list[Sequence[str]]:
    errors, rows = byte_errors(said), []
    for name, result in _done(said).items():
        if name.startswith("counters/"):
            bill, counted = result["bill"], result["read_bytes"] + result["write_bytes"]
            differs = f"{errors[name]:+.1%}" if name in errors else "-"
            again, requested = _bytes(bill.get("reread_bytes")), _bytes(bill["requested_bytes"])
            billed = _bytes(bill["hbm_bytes"])
            rows.append((name.removeprefix("counters/"), _bytes(counted), billed, again, differs, requested))
    return rows


def _peers(said: Mapping[str, Any]) -> list[Sequence[str]]:
    ratios, rows = speed_ratios(said), []
    for name, result in _done(said).items():
        if name.startswith("peers/"):
            ratio = f"{ratios[name]:.2f}x" if name in ratios else "-"
            wrong = "" if result["apart"] is None or agrees(result) else " (computes something else)"
            apart = _or_dash(result["apart"], lambda it: f"{it:.1e}") + wrong
            speed = render.digits(result["tokens_per_second"])
            rows.append((name.removeprefix("peers/"), _seconds(result["seconds"]), speed, ratio, apart))
    return rows


def _aims(found: Iterable[Mapping[str, Any]]) -> list[Sequence[str]]:
    rows = []
    for aim in found:
        form: Callable[[float], str] = (lambda it: f"{it:.2f}") if aim["at_least"] else (lambda it: f"{it:.1%}")
        verdict = {None: "not measured", True: "met", False: "missed"}[aim["met"]]
        sign = ">=" if aim["at_least"] else "<="
        rows.append((aim["aim"], f"{sign} {form(aim['wanted'])}", _or_dash(aim["reached"], form), verdict))
    return rows
