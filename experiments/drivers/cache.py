"""Driver 3: what the KV cache costs, by the kind of attention.

    python -m stepbill.experiments.drivers.cache --target=h200

One model with its attention exchanged: a key/value head for each query head (MHA; Vaswani et al., 2017), for a group of
them (GQA; Ainslie et al., 2023) or for all (MQA; Shazeer, 2019); one short vector for all heads (MLA; DeepSeek-V2,
2024); a window over the last positions in all layers but every sixth (as Gemma 3 has it, 2025); and GQA in int8.
"""

import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from absl.flags import FlagValues

from ...profiling import targets
from ...profiling.assumptions import Assumptions
from ...profiling.bill import Bill
from .. import flags
from ..flags import UsageError
from .driver import Bills, Driver, bill, numbers
from .finding import Finding, Plot, Quantity, Table, cell
from .sweep import Point

if TYPE_CHECKING:
    from ...model.config import ModelConfig

CONTEXTS = "1024,8192,32768"
WINDOW, GLOBAL_EVERY = 1024, 6
CLAIM = (
    "What a chip can serve at once is bounded by the KV cache: sharing key/value heads, one latent vector, a window or "
    "int8 each let several times as many requests on a chip, and make each token cheaper the longer the context."
)


def _define(to: flags.Definer) -> None:
    to.string("contexts", CONTEXTS, "positions in the cache, with commas")
    to.count("batch", 4, "sequences of the step that is priced")


def _variants(config: "ModelConfig") -> "dict[str, ModelConfig]":
    """Name -> the model with another attention; the head width stays."""
    from ...model.config import Latent

    if config.latent is not None:
        raise UsageError(f"--model={config.name}: it must be one whose heads have keys and values of their own")
    N, H = config.num_heads, config.head_width
    groups = next(k for k in range(max(1, N // 4), N + 1) if N % k == 0)
    shared = config.num_kv_heads if 1 < config.num_kv_heads < N else groups
    gqa = replace(config, num_kv_heads=shared, window=0, global_every=0)
    latent = Latent(kv_rank=4 * H, rope_width=H // 2, value_width=H)  # in the proportions of DeepSeek-V2 and V3
    return {
        "MHA": replace(gqa, num_kv_heads=N),
        f"GQA, {shared} heads": gqa,
        "MQA": replace(gqa, num_kv_heads=1),
        "MLA": replace(gqa, num_kv_heads=N, latent=latent),
        f"GQA, window {WINDOW}": replace(gqa, window=WINDOW, global_every=GLOBAL_EVERY),
        "GQA, int8 cache": replace(gqa, cache_dtype="int8"),
    }


def _points(values: FlagValues) -> list[Point]:
    return [point for points in _by_variant(values).values() for pair in points.values() for point in pair]


def _by_variant(values: FlagValues) -> dict[str, dict[int, tuple[Point, Point]]]:
    """Variant -> context -> the steps with one sequence and with --batch of them."""
    if values.batch < 2:
        raise UsageError(f"--batch={values.batch}: it must be at least 2, to tell what one more request takes")
    contexts = numbers("contexts", values.contexts)
    found: dict[str, dict[int, tuple[Point, Point]]] = {}
    for name, config in _variants(flags.model_config(values, "decode")).items():
        config = replace(config, name=f"{config.name} ({name})", max_context=max(*contexts, config.max_context))

        def point(batch: int, context: int, config: "ModelConfig" = config) -> Point:
            return Point(config, "decode", batch, context, values.target)

        found[name] = {context: (point(1, context), point(values.batch, context)) for context in contexts}
    return found


def _find(values: FlagValues, bills: Bills, known: Assumptions) -> Finding:
    del known
    chip = targets.chip(values.target)
    rows, commands, lines = [], [], {}
    fits: dict[tuple[str, int], int | None] = {}
    costs: dict[tuple[str, int], float | None] = {}
    for name, by_context in _by_variant(values).items():
        for context, (one, several) in by_context.items():
            first, found = bill(bills, one), bill(bills, several)
            moved = found.group("cache")
            fits[name, context] = _requests(first, found, values.batch, chip.usable_hbm_bytes)
            price = found.price.get("dollars_per_million_tokens")
            of_cache = moved.picoseconds / found.total.picoseconds if found.total.picoseconds else None
            costs[name, context] = price
            per_position = moved.hbm_read.get("cache", 0) / values.batch / context
            dollars = None if price is None or of_cache is None else price * of_cache
            rows.append((name, context, per_position, fits[name, context], of_cache, price, dollars))
            commands.append(several.command)
        drawn = [(context, fits[name, context]) for context in by_context]
        lines[name] = tuple((context, count) for context, count in drawn if count)
    columns = (
        *(Quantity("attention"), Quantity("context"), Quantity("read of the cache per position", "B")),
        *(Quantity("requests on a chip"), Quantity("cache of the time", "%")),
        *(Quantity("$ / M tokens", "$"), Quantity("of it the cache", "$")),
    )
    contexts = numbers("contexts", values.contexts)
    holds, evidence = _verdict(list(lines), contexts, fits, costs)
    prices = {name: price for name in lines if (price := costs[name, contexts[-1]])}
    dearest, cheapest = (by(prices, key=lambda name: prices[name], default="") for by in (max, min))
    factor = prices[dearest] / prices[cheapest] if prices else None
    plots = (Plot("Requests that fit on a chip", Quantity("context"), Quantity("requests"), lines),) * any(
        lines.values()
    )
    return Finding(
        "cache",
        CACHE.question,
        values.target,
        CLAIM,
        holds,
        evidence,
        CACHE.command(values),
        tables=(Table(f"A decode step of {values.batch} sequences", columns, tuple(rows), tuple(commands)),),
        plots=plots,
        notes=(
            "requests: what the compiler plans for one and for several sequences, and what the chip has for the rest",
            "a window or a latent vector is another model, which must be trained so: this is cost, not quality",
            "without a kernel of its own a latent vector is read twice, for scores and for values",
        ),
        headline=f"at {contexts[-1]:,} positions a token with {dearest} costs {factor:.1f} times one with {cheapest}"
        if factor
        else "",
        factor=factor,
    )


def _requests(one: Bill, several: Bill, batch: int, capacity: int | None) -> int | None:
    """How many sequences fit on a chip, if each takes as much more memory as one of `several` does."""
    if capacity is None:
        return None
    peaks = one.memory["peak_bytes"], several.memory["peak_bytes"]
    each = (peaks[1] - peaks[0]) / (batch - 1)
    return max(0, int((capacity - peaks[0] + each) // each))


def _verdict(
    names: list[str],
    contexts: list[int],
    fits: Mapping[tuple[str, int], int | None],
    costs: Mapping[tuple[str, int], float | None],
) -> tuple[bool | None, str]:
    """Whether each takes more requests than MHA, and a token of each is cheaper, the more so the longer the context."""
    first, last = contexts[0], contexts[-1]
    most = fits["MHA", last]
    if not most:
        return None, f"How much memory the chip has is not known, or no request of {last:,} positions fits with MHA."
    more = {name: (fits[name, last] or 0) / most for name in names[1:]}
    cheaper: dict[str, tuple[float, float]] = {}
    for name in names[1:]:
        pairs = [(costs["MHA", context], costs[name, context]) for context in (first, last)]
        ratios = [whole / ours for whole, ours in pairs if whole and ours]
        if len(ratios) == 2:
            cheaper[name] = ratios[0], ratios[1]
    evidence = f"Beside MHA's {most:,} requests of {last:,} positions: " + ", ".join(
        f"{name} {cell(ratio, 'x')} times as many" for name, ratio in more.items()
    )
    if cheaper:
        evidence += f"; a token is cheaper (at {first:,}, at {last:,}): " + ", ".join(
            f"{name} {cell(short, 'x')}, {cell(long, 'x')}" for name, (short, long) in cheaper.items()
        )
    holds = all(ratio > 1.5 for ratio in more.values())
    return holds and all(short <= long and long > 1 for short, long in cheaper.values()), evidence + "."


CACHE = Driver("cache", "What does the KV cache cost?", _define, _points, _find, "llama3-8b")
main = CACHE.main

if __name__ == "__main__":
    sys.exit(main())
