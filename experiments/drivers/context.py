"""Driver 2: what a longer context costs.

    python -m stepbill.experiments.drivers.context --target=h200

Attention's products grow with the square of a prompt, everything else with its length; the cache of a decode step grows
with the context, and so does the time to read it.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

from absl.flags import FlagValues

from ...profiling.assumptions import Assumptions
from ...profiling.bill import Bill
from .. import flags
from .driver import Bills, Driver, bill, numbers
from .finding import Finding, Plot, PowerLaw, Quantity, Table, cell, power_law
from .sweep import Point

CONTEXTS = "1024,2048,4096,8192,16384,32768,65536,131072,204800"
SHORT, LONG = 8192, 204_800  # between these, lists of API prices have their surcharge for a long context
CLAIM = (
    "Attention grows with the square of the context and overtakes the MLP, the cache grows in proportion to it, and a "
    "token of a long prompt costs more than one of a short prompt."
)


def _define(to: flags.Definer) -> None:
    to.string("contexts", CONTEXTS, "positions, with commas")
    to.string("mesh", flags.AUTO, "data=N,tensor=N, or auto: for each step the smallest that fits")


def _points(values: FlagValues) -> list[Point]:
    config = flags.model_config(values, "prefill")
    return [
        Point(
            replace(config, max_context=max(context, config.max_context)), step, 1, context, values.target, values.mesh
        )
        for context in numbers("contexts", values.contexts)
        for step in ("prefill", "decode")
    ]


def _find(values: FlagValues, bills: Bills, known: Assumptions) -> Finding:
    del known
    points = _points(values)
    prefill = {point.context: bill(bills, point) for point in points if point.step == "prefill"}
    decode = {point.context: bill(bills, point) for point in points if point.step == "decode"}
    contexts = list(prefill)
    chips = {context: prefill[context].program["chips"] for context in contexts}
    core = [(context, _whole(prefill[context], "attention/core")) for context in contexts]
    attention = [(context, _of_attention(prefill[context])) for context in contexts]
    mlp = [(context, prefill[context].group("mlp").matmul * chips[context]) for context in contexts]
    cache = [
        (context, decode[context].group("cache").hbm_bytes * decode[context].program["chips"]) for context in contexts
    ]
    fits = {"attention/core FLOPs of a prompt": power_law(core), "cache bytes of a decode step": power_law(cache)}
    if len(contexts) > 2:
        fits |= {
            "attention FLOPs, shortest two contexts": power_law(attention[:2]),
            "attention FLOPs, longest two contexts": power_law(attention[-2:]),
        }
    meet = _meet(attention, mlp)
    surcharge = _surcharge(prefill, contexts[0], contexts[-1])
    holds = _is_near(fits["attention/core FLOPs of a prompt"], 2) and _is_near(fits["cache bytes of a decode step"], 1)
    holds = holds and meet is not None and surcharge is not None and surcharge > 1
    met = (
        f"attention overtakes the MLP at {meet:,.0f} positions" if meet else "attention does not overtake the MLP here"
    )
    evidence = (
        f"Attention's products: {fits['attention/core FLOPs of a prompt']}; the cache: "
        f"{fits['cache bytes of a decode step']}; {met}; a prompt token at {contexts[-1]:,} costs "
        f"{cell(surcharge, 'x')} times one at {contexts[0]:,}."
    )
    return Finding(
        "context",
        CONTEXT.question,
        values.target,
        CLAIM,
        holds,
        evidence,
        CONTEXT.command(values),
        tables=(_table(prefill, decode, points), *_listed(prefill)),
        plots=_plots(contexts, prefill, decode, attention, mlp),
        fits=fits,
        notes=(
            "seconds and dollars are at the roofline: a lower bound",
            "positions beyond those that the model was trained for cost what any others do",
        ),
        headline=f"a prompt token at {contexts[-1]:,} costs {cell(surcharge, 'x')} times one at {contexts[0]:,}",
        factor=None if surcharge is None else max(surcharge, 1.0),
    )


def _whole(found: Bill, component: str) -> int:
    """Matmul FLOPs of all chips, those that are masked away included."""
    return found.component(component).matmul * found.program["chips"]


def _of_attention(found: Bill) -> int:
    return found.group("attention").matmul * found.program["chips"]


def _per_token(prefill: dict[int, Bill], context: int) -> float | None:
    """Dollars for a million tokens of a prompt; at chips of unknown price, roofline chip-seconds a token."""
    found = prefill[context]
    dollars = found.price.get("dollars_per_million_tokens")
    return found.total.seconds * found.program["chips"] / context or None if dollars is None else dollars


def _is_near(law: PowerLaw, exponent: float) -> bool:
    """Within 5 %, the points on one line."""
    return abs(law.exponent - exponent) <= 0.05 * exponent and law.r_squared > 0.99


def _meet(first: Sequence[tuple[int, int]], second: Sequence[tuple[int, int]]) -> float | None:
    """Where the first begins to be more than the second, in logarithms between two points; None where it does not."""
    if first[0][1] >= second[0][1]:
        return first[0][0]
    for ((x0, a0), (x1, a1)), ((_, b0), (_, b1)) in zip(pairwise(first), pairwise(second), strict=True):
        if a0 < b0 and a1 >= b1:
            ratio0, ratio1 = a0 / b0, a1 / b1
            law = power_law([(x0, ratio0), (x1, ratio1)])
            return (1 / law.factor) ** (1 / law.exponent)
    return None


def _table(prefill: dict[int, Bill], decode: dict[int, Bill], points: Sequence[Point]) -> Table:
    columns = (
        *(Quantity("context"), Quantity("chips")),
        *(Quantity("prompt", "s"), Quantity("attention of its FLOPs", "%"), Quantity("prompt, $ / M tokens", "$")),
        *(Quantity("cache", "B"), Quantity("decode step", "s"), Quantity("decode, $ / M tokens", "$")),
    )
    rows = []
    for context, prompt in prefill.items():
        step = decode[context]
        rows.append(
            (
                *(context, prompt.program["chips"]),
                *(prompt.total.seconds, prompt.group("attention").matmul / prompt.total.matmul),
                prompt.price.get("dollars_per_million_tokens"),
                step.group("cache").hbm_read_bytes * step.program["chips"],
                *(step.total.seconds, step.price.get("dollars_per_million_tokens")),
            )
        )
    commands = tuple(point.command for point in points if point.step == "prefill")
    return Table("One prompt, and one token after it", columns, tuple(rows), commands)


def _surcharge(prefill: dict[int, Bill], short: int, long: int) -> float | None:
    """How many times as much a prompt token costs at one context as at another."""
    costs = _per_token(prefill, long), _per_token(prefill, short)
    return costs[0] / costs[1] if costs[0] and costs[1] else None


def _listed(prefill: dict[int, Bill]) -> tuple[Table, ...]:
    """The same at the two contexts that price lists tell apart."""
    if not {SHORT, LONG} <= prefill.keys():
        return ()
    columns = (Quantity("from"), Quantity("to"), Quantity("a prompt token costs", "x"))
    return (Table("Surcharge of a long prompt", columns, ((SHORT, LONG, _surcharge(prefill, SHORT, LONG)),)),)


def _plots(
    contexts: Sequence[int],
    prefill: dict[int, Bill],
    decode: dict[int, Bill],
    attention: Sequence[tuple[int, int]],
    mlp: Sequence[tuple[int, int]],
) -> tuple[Plot, ...]:
    x = Quantity("context")
    flops = {"attention": tuple(attention), "MLP": tuple(mlp)}
    plots = [Plot("Matmul FLOPs of a prompt", x, Quantity("FLOPs"), flops)]
    if all(found.total.seconds for found in (*prefill.values(), *decode.values())):
        times = {
            "a prompt": tuple((context, prefill[context].total.seconds) for context in contexts),
            "one token after it": tuple((context, decode[context].total.seconds) for context in contexts),
        }
        plots.append(Plot("Time at the roofline", x, Quantity("time", "s"), times))
    return tuple(plots)


CONTEXT = Driver("context", "What does a longer context cost?", _define, _points, _find, "llama3-8b")
main = CONTEXT.main

if __name__ == "__main__":
    sys.exit(main())
