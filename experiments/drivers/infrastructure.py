"""Driver 12: from an hour of a chip to the price of a million input, cached and output tokens, line by line.

    python -m stepbill.experiments.drivers.infrastructure --target=h200
    python -m stepbill.experiments.drivers.infrastructure --assume=redundancy.utilisation=0.8 --assume=business.margin=0

What a token takes of a busy chip is in the bills. What an hour of that chip costs, owned or rented, and what is put on
top (idle and spare capacity, engineering, margin), is in profiling/economics.py. All of it rests on assumptions; each
is put at its low and at its high, to see which moves the price most.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from absl.flags import FlagValues

from ...profiling import economics
from ...profiling.assumptions import Assumptions
from ...profiling.bill import Bill
from ...profiling.economics import Itemised
from .. import flags
from ..flags import UsageError
from .driver import Bills, Driver, bill, require_times
from .finding import Finding, Plot, Quantity, Table, Value, cell
from .serving import AUTO, fewest_chips
from .sweep import Point

if TYPE_CHECKING:
    from ...model.config import ModelConfig

KINDS = ("input", "cached", "output")
SHARE = "serving.roofline_share"
FEW = 8  # sequences of the smaller batch, at the low end of what moves the price
LIKE = 2.0  # times as many parameters or as few that a model of like size has
MOST = 0.5  # of the price, that is most of it
PHYSICAL = ("chip", "power")
CLAIM = "Chips and their electricity are most of what a token is sold for."


def _define(to: flags.Definer) -> None:
    flags.define_storage(to)
    to.count("batch", 128, "sequences that are decoded together")
    to.count("context", 4096, "tokens of a prompt, and positions in the cache of a decode step")
    to.number("cached", 0.75, "the share of the prompt that is found in a cache of prompts", low=0.0)
    to.string("mesh", AUTO, "chips of one replica, such as tensor=2; auto: the fewest that hold the batch")


# --- the steps -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """decode, few: of the batch, and of a smaller one. whole, past, new: a prompt, its cached part, and its other."""

    decode: Point
    few: Point
    whole: Point
    past: Point
    new: Point

    @classmethod
    def of(cls, values: FlagValues) -> "Plan":
        require_times(values.target)
        past = int(values.context * values.cached)
        if not 0 < past < values.context:
            raise UsageError(f"--cached={values.cached:g}: it must leave a cached and a new token of {values.context}")
        config = flags.model_config(values, "decode")
        roomy: ModelConfig = replace(config, max_context=max(values.context, config.max_context))
        mesh = values.mesh
        if mesh == AUTO:
            mesh = fewest_chips(roomy, values.target, values.batch, values.context)
        decode = Point(roomy, "decode", values.batch, values.context, values.target, mesh)
        whole, before, after = (
            replace(decode, step="prefill", batch=1, context=tokens)
            for tokens in (values.context, past, values.context - past)
        )
        return cls(decode, replace(decode, batch=min(FEW, values.batch)), whole, before, after)

    @property
    def points(self) -> list[Point]:
        return list(dict.fromkeys((self.decode, self.few, self.whole, self.past, self.new)))


def _points(values: FlagValues) -> list[Point]:
    return Plan.of(values).points


def chip_seconds(plan: Plan, bills: Bills, decode: Point) -> dict[str, float]:
    """What one token of each kind takes of one chip that is busy at the roofline.

    A cached token is not read again, but what is new attends to it: the whole prompt less both of its parts.
    """
    found = {point: bill(bills, point) for point in (decode, plan.whole, plan.past, plan.new)}
    if not all(one.timed for one in found.values()):
        raise UsageError(f"--target={decode.target}: its step times are not known")

    def taken(point: Point) -> float:
        return found[point].total.seconds * found[point].program["chips"]

    attended = taken(plan.whole) - taken(plan.past) - taken(plan.new)
    return {
        "input": taken(plan.whole) / plan.whole.context,
        "cached": max(0.0, attended) / plan.past.context,
        "output": taken(decode) / (decode.batch or 1),
    }


# --- the finding ---------------------------------------------------------------------------------------------------


def prices(target: str, seconds: Mapping[str, float], known: Assumptions, rent: bool) -> dict[str, Itemised]:
    """The price of a million tokens of each kind, at the share of the roofline that a server reaches."""
    share = known.number(SHARE)
    try:
        return economics.per_million_tokens(target, {kind: s / share for kind, s in seconds.items()}, known, rent)
    except ValueError as error:
        raise flags.as_usage(error) from None


def _find(values: FlagValues, bills: Bills, known: Assumptions) -> Finding:
    plan = Plan.of(values)
    seconds = chip_seconds(plan, bills, plan.decode)
    owned, rented = (prices(values.target, seconds, known, rent) for rent in (False, True))
    own = owned["output"]
    physical = sum(own[name].picodollars for name in PHYSICAL) / own.picodollars
    shares = {item.name: item.picodollars / own.picodollars for item in own.items}
    largest = sorted(shares, key=lambda name: -shares[name])[:3]
    tornado = _tornado(values, plan, bills, known, seconds)
    moved, low, high = tornado.rows[0][0], tornado.rows[0][3], tornado.rows[0][4]
    lists = _lists(plan, known, owned, rented)
    hour = economics.built_up(values.target, 1, known).dollars
    raw = economics.running(values.target, 1, known).dollars
    evidence = (
        f"Of a token on owned chips {shares['chip']:.1%} is the chip and {shares['power']:.1%} its electricity; "
        f"the most is {', '.join(f'{name} {shares[name]:.0%}' for name in largest)}. An hour of a busy chip costs "
        f"${cell(raw, '$')} to run and must be sold for ${cell(hour, '$')}. A million tokens are "
        f"{_per_kind(owned)} owned, {_per_kind(rented)} rented. What moves the price most is {moved}: "
        f"${cell(low, '$')} to ${cell(high, '$')} a million output tokens."
    )
    return Finding(
        "infrastructure",
        INFRASTRUCTURE.question,
        values.target,
        CLAIM,
        physical >= MOST,
        evidence,
        INFRASTRUCTURE.command(values),
        (
            _hour(values.target, known),
            _price_table("owned", owned),
            _price_table("rented", rented),
            _taken(plan, bills, seconds),
            tornado,
            *lists,
        ),
        _plots(owned, rented),
        notes=(
            f"at {known.number(SHARE):.0%} of the roofline's speed ({SHARE}); 100 % is a lower bound of chip-time",
            "a cached token is priced by the attention to it; the memory that holds it is not in its price",
            f"a list's price is for any context and in whatever bits, ours for {values.context:,} positions as stored",
            "a line is a share of all lines above it, and the margin one of the price; lines add up to the picodollar",
        ),
        headline=f"{physical:.0%} of the price is chips and electricity",
        factor=max(hour / raw, 1.0),
    )


def _per_kind(priced: Mapping[str, Itemised]) -> str:
    return ", ".join(f"${cell(whole.dollars, '$')} {kind}" for kind, whole in priced.items())


def _hour(target: str, known: Assumptions) -> Table:
    """An hour of one busy chip, owned and rented."""
    both = [economics.built_up(target, 1, known, rent) for rent in (False, True)]
    ways = [{item.name: item for item in whole.items} for whole in both]
    rows: list[tuple[Value, ...]] = []
    for name in dict.fromkeys(("rent", *ways[0])):
        how = next(way[name].how for way in ways if name in way)
        rows.append((name, *(way[name].dollars if name in way else None for way in ways), how))
    rows.append(("price", *(whole.dollars for whole in both), "all of the above"))
    columns = (Quantity("line"), Quantity("owned", "$/h"), Quantity("rented", "$/h"), Quantity("how"))
    return Table("An hour of a busy chip", columns, tuple(rows))


def _price_table(way: str, priced: Mapping[str, Itemised]) -> Table:
    columns = (
        *(Quantity("line"), *(Quantity(f"{kind}, $ / M tokens", "$") for kind in KINDS)),
        Quantity("of the price", "%"),
    )
    output = priced["output"]
    rows = [
        (item.name, *(priced[kind][item.name].dollars for kind in KINDS), item.picodollars / output.picodollars)
        for item in output.items
    ]
    rows.append(("price", *(priced[kind].dollars for kind in KINDS), 1.0))
    return Table(f"From raw compute to a price, {way}", columns, tuple(rows))


def _taken(plan: Plan, bills: Bills, seconds: Mapping[str, float]) -> Table:
    columns = (
        *(Quantity("token"), Quantity("step"), Quantity("batch"), Quantity("context"), Quantity("chips")),
        *(Quantity("step", "s"), Quantity("chip-time of a token", "s")),
    )
    rows, commands = [], []
    for kind, point in (("input", plan.whole), ("cached", plan.past), ("output", plan.decode)):
        found = bill(bills, point)
        chips = found.program["chips"]
        rows.append((kind, point.step, point.batch, point.context, chips, found.total.seconds, seconds[kind]))
        commands.append(point.command)
    return Table("What a token takes, at the roofline", columns, tuple(rows), tuple(commands))


def _tornado(values: FlagValues, plan: Plan, bills: Bills, known: Assumptions, seconds: Mapping[str, float]) -> Table:
    """A million output tokens on owned chips with each assumption at its low and its high, all others as they are; what
    moves the price most first."""
    output = {"output": seconds["output"]}
    fresh = Assumptions(known.entries)

    def price(facts: Assumptions, of: Mapping[str, float] = output) -> float:
        return prices(values.target, of, facts, rent=False)["output"].dollars

    usual = price(fresh)  # and now `fresh` knows what it rests on
    rows: list[tuple[str, float, float, float, float, float]] = []

    def add(name: str, low: float, high: float, at_low: float, at_high: float) -> None:
        swing = max(at_low, at_high, usual) / min(at_low, at_high, usual)
        rows.append((name, float(low), float(high), at_low, at_high, swing))

    for entry in fresh.used:
        if entry.low is not None and entry.high is not None:
            ends = (price(known.but(entry.name, end)) for end in (entry.low, entry.high))
            add(entry.name, entry.low, entry.high, *ends)
    if plan.few != plan.decode and isinstance(bills[plan.few], Bill):
        add("batch", plan.few.batch or 1, values.batch, price(known, chip_seconds(plan, bills, plan.few)), usual)
    columns = (
        *(Quantity("assumption"), Quantity("low"), Quantity("high")),
        *(Quantity("price at low", "$"), Quantity("price at high", "$"), Quantity("dearest / cheapest", "x")),
    )
    title = f"A million output tokens, owned: ${cell(usual, '$')}, and with one assumption at its low and at its high"
    rows.sort(key=lambda row: -row[5])
    return Table(title, columns, tuple(rows))


def _lists(
    plan: Plan, known: Assumptions, owned: Mapping[str, Itemised], rented: Mapping[str, Itemised]
) -> tuple[Table, ...]:
    """What hosts charge for models of like size, and our price over it; nothing where there is none."""
    size = plan.decode.config.parameters
    rows = []
    for name in known.members("hosted"):
        if not 1 / LIKE <= known.entries[f"hosted.{name}.parameters"].value / size <= LIKE:  # pyright: ignore[reportOperatorIssue]
            continue
        for kind in ("input", "output"):
            entry = known.entry(f"hosted.{name}.{kind}")
            listed = known.number(entry.name)
            ours = owned[kind].dollars, rented[kind].dollars
            rows.append((name, kind, entry.low, listed, entry.high, *ours, ours[0] / listed if listed else None))
    columns = (
        *(Quantity("model"), Quantity("tokens"), Quantity("cheapest host", "$"), Quantity("median host", "$")),
        *(Quantity("dearest host", "$"), Quantity("ours, owned", "$"), Quantity("ours, rented", "$")),
        Quantity("owned / median", "x"),
    )
    return (Table("Beside list prices of a like model, $ / M tokens", columns, tuple(rows)),) * bool(rows)


def _plots(owned: Mapping[str, Itemised], rented: Mapping[str, Itemised]) -> tuple[Plot, ...]:
    """How the price of an output token is built up, line after line."""
    lines = {}
    for way, priced in (("owned", owned), ("rented", rented)):
        so_far, drawn = 0, []
        for number, item in enumerate(priced["output"].items, 1):
            so_far += item.picodollars
            drawn.append((number, so_far / economics.PICO))
        lines[way] = tuple(drawn)
    x, y = Quantity("lines added up"), Quantity("$ / M output tokens", "$")
    return (Plot("From raw compute to a price", x, y, lines, log_x=False, log_y=False),)


INFRASTRUCTURE = Driver(
    "infrastructure",
    "What is between a chip and the price of a token?",
    _define,
    _points,
    _find,
    "llama3-8b",
)
main = INFRASTRUCTURE.main

if __name__ == "__main__":
    sys.exit(main())
