"""From an hour of a chip to the price of a million tokens, and from FLOPs to the bill of a training run: line by line.

Amounts are whole picodollars, so that lines add up exactly, whatever they are multiplied with afterwards.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from . import price
from .assumptions import Assumptions

PICO = 1_000_000_000_000
MILLION = 1_000_000
HOURS_PER_YEAR = 8766
HOURS_PER_MONTH = HOURS_PER_YEAR / 12


@dataclass(frozen=True)
class Item:
    """One line. how: the arithmetic, in words."""

    name: str
    picodollars: int
    how: str

    @property
    def dollars(self) -> float:
        return self.picodollars / PICO


@dataclass(frozen=True)
class Itemised:
    """Lines, of which each one may be a share of those above it; their sum is the whole."""

    items: tuple[Item, ...]

    @property
    def picodollars(self) -> int:
        return sum(item.picodollars for item in self.items)

    @property
    def dollars(self) -> float:
        return self.picodollars / PICO

    def __getitem__(self, name: str) -> Item:
        return next(item for item in self.items if item.name == name)


def _item(name: str, dollars: float, how: str) -> Item:
    return Item(name, round(dollars * PICO), how)


def amortised(dollars: float, years: float, interest: float) -> float:
    """Dollars an hour that pay back `dollars` within `years`, in equal parts, at that interest a year (an annuity).

    Without interest a straight line: dollars / years.
    """
    a_year = dollars * interest / (1 - (1 + interest) ** -years) if interest else dollars / years
    return a_year / HOURS_PER_YEAR


def running(chip: str, hours: float, facts: Assumptions) -> Itemised:
    """What `hours` hours of one owned chip cost, its parts of host, network, building and power with it."""
    years, interest = facts.number("capital.years"), facts.number("capital.interest")
    watts = facts.number(f"chip.watts.{chip}") + facts.number("power.host_watts")
    pue, load = facts.number("power.pue"), facts.number("power.load")
    per_kilowatt = facts.number("capital.facility_dollars_per_kilowatt_month")
    per_kilowatt_hour = facts.number("power.dollars_per_kilowatt_hour")

    def bought(name: str, dollars: float) -> Item:
        how = f"${dollars:,.0f} over {years:g} years at {interest:.0%} interest"
        return _item(name, hours * amortised(dollars, years, interest), how)

    return Itemised(
        (
            bought("chip", facts.number(f"capital.chip.{chip}")),
            bought("host", facts.number("capital.host")),
            bought("network", facts.number("capital.network")),
            _item(
                "building",
                hours * watts / 1000 * per_kilowatt / HOURS_PER_MONTH,
                f"{watts:g} W at ${per_kilowatt:g} a kilowatt-month",
            ),
            _item(
                "power",
                hours * watts * load * pue / 1000 * per_kilowatt_hour,
                f"{watts:g} W x {load:g} x PUE {pue:g} at ${per_kilowatt_hour:g} a kilowatt-hour",
            ),
        )
    )


def rented(chip: str, hours: float, facts: Assumptions) -> Itemised:
    """What `hours` hours of one rented chip cost: host, network, building and power are in its price."""
    hourly = facts.number(f"chip.dollars_per_hour.{chip}")
    return Itemised((_item("rent", hours * hourly, f"${hourly:g} an hour"),))


def built_up(chip: str, hours: float, facts: Assumptions, rent: bool = False) -> Itemised:
    """From the raw cost of `hours` busy chip-hours to their price: idle and spare capacity, engineering, margin.

    Each of those is a share of all lines above it; the margin is a share of the price, itself included.
    """
    if chip not in facts.members("capital.chip"):
        raise ValueError(f"target is {chip}; it must be one with a price: {', '.join(facts.members('capital.chip'))}")
    raw = rented(chip, hours, facts) if rent else running(chip, hours, facts)
    items = list(raw.items)

    def add(name: str, share: float, how: str) -> None:
        so_far = sum(item.picodollars for item in items)
        items.append(Item(name, round(so_far * share), how))

    utilisation, margin = facts.number("redundancy.utilisation"), facts.number("business.margin")
    units, regions = facts.whole("redundancy.spared_units"), facts.whole("redundancy.regions")
    engineering = facts.number("business.engineering")
    add("idle", 1 / utilisation - 1, f"traffic is {utilisation:.1%} of what the capacity is for")
    add("spare", 1 / units, f"one unit stands by for {units}")
    add("regions", 1 / (regions - 1) if regions > 1 else 0, f"any of {regions} may be lost" if regions > 1 else "one")
    add("engineering", engineering, f"{engineering:.0%} of the above")
    add("margin", margin / (1 - margin), f"{margin:.1%} of the price")
    return Itemised(tuple(items))


def per_million_tokens(
    chip: str, chip_seconds: Mapping[str, float], facts: Assumptions, rent: bool = False
) -> dict[str, Itemised]:
    """The price of a million tokens of each kind, such as input, cached and output.

    chip_seconds: what one token of the kind takes of one busy chip; of a step of several chips, theirs together.
    """
    return {
        kind: built_up(chip, seconds * MILLION / price.SECONDS_PER_HOUR, facts, rent)
        for kind, seconds in chip_seconds.items()
    }


# --- training --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Training:
    """What a run takes.

    Attributes:
      chip_hours: of the useful steps alone. wall_hours: from start to end, on all chips, with what failures cost.
      failure_hours: mean time between failures of all chips together. interval_seconds: between checkpoints.
      cost: dollars, line by line.
    """

    chip_hours: float
    wall_hours: float
    failure_hours: float
    interval_seconds: float
    cost: Itemised


def chip_hours(flops: float, peak_flops: float, mfu: float) -> float:
    """Hours of one chip (or of many together) for so many FLOPs, at that share of the peak (FLOP/s)."""
    return flops / (peak_flops * mfu) / price.SECONDS_PER_HOUR


def mfu(flops: float, peak_flops: float, chip_hours: float) -> float:
    """The share of the peak (FLOP/s) at which so many FLOPs were done in so many hours of a chip."""
    return flops / (peak_flops * chip_hours * price.SECONDS_PER_HOUR)


def failure_hours(chips: int, facts: Assumptions) -> float:
    """Mean time between failures of so many chips together, of which each fails as often as those that were counted."""
    counted = facts.number("failure.days") * 24 / facts.whole("failure.interruptions")
    return counted * facts.whole("failure.chips") / chips


def training(
    flops: float,
    tokens: float,
    chips: int,
    peak_flops: float,
    dollars_per_chip_hour: float,
    facts: Assumptions,
    mfu: float | None = None,
) -> Training:
    """The bill of a training run of so many FLOPs over so many tokens on `chips` chips of peak_flops FLOP/s each.

    mfu: the share of the peak that is reached; None: training.mfu.

    The interval between checkpoints is Young's, and what is lost is counted to first order, as shares of the useful
    time (see price.checkpoint_overhead): true while they are small; ValueError where failures leave no time to work.
    """
    useful = chip_hours(flops, peak_flops, facts.number("training.mfu") if mfu is None else mfu)
    writing, restarting = facts.number("failure.checkpoint_seconds"), facts.number("failure.restart_seconds")
    between = failure_hours(chips, facts)
    between_seconds = between * price.SECONDS_PER_HOUR
    interval = price.checkpoint_interval(writing, between_seconds)
    lost = {
        "checkpoints": (writing / interval, f"{writing:g} s each {interval / 60:.1f} minutes"),
        "lost work": (interval / (2 * between_seconds), f"half of that at each failure, one in {between:.3g} hours"),
        "restarts": (restarting / between_seconds, f"{restarting:g} s at each failure"),
    }
    overhead = sum(share for share, _ in lost.values())
    if overhead >= 1:
        raise ValueError(
            f"chips is {chips}; it must be less: one fails each {between_seconds:.3g} s, and no work is done"
        )

    def items() -> Iterator[Item]:
        yield _item("training", useful * dollars_per_chip_hour, f"{useful:,.0f} chip-hours")
        for name, (share, how) in lost.items():
            yield _item(name, useful * share * dollars_per_chip_hour, how)
        for name in ("experiments", "evaluation"):
            share = facts.number(f"training.{name}")
            yield _item(name, useful * share * dollars_per_chip_hour, f"{share:g} of the training")
        trillions = tokens / 1e12
        data = facts.number("training.data_dollars_per_trillion_tokens")
        yield _item("data", trillions * data, f"{trillions:.3g} trillion tokens at ${data:,.0f}")

    return Training(useful, useful * (1 + overhead) / chips, between, interval, Itemised(tuple(items())))


# --- tokens that are guessed -----------------------------------------------------------------------------------------


def tokens_per_check(accepted: float, drafted: int) -> float:
    """Tokens that a step of the model yields which checks `drafted` guesses, each right with probability `accepted`.

    Source: Leviathan et al., Fast Inference from Transformers via Speculative Decoding (2023), equation 1.
    """
    return sum(accepted**n for n in range(drafted + 1))


def speculative_speedup(accepted: float, drafted: int, draft_cost: float) -> float:
    """How many times as fast that is. draft_cost: of one guess, as a share of a step of the model.

    Source: the same, theorem 3.8: true while a step that checks takes no longer than one that writes a single token.
    """
    return tokens_per_check(accepted, drafted) / (1 + drafted * draft_cost)
