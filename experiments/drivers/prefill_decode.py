"""Driver 4: why an output token costs more than an input token, and what a cache of prompts saves.

    python -m stepbill.experiments.drivers.prefill_decode --target=h200

A prompt is read at once, so that a weight that comes from memory serves all of its tokens; a token is written with the
weights, and the cache, read for it and for the others of its batch alone. FLOPs per byte of HBM (arithmetic intensity;
Williams et al., Roofline, 2009) tell which of the two bounds a step: below the chip's ridge point it is memory.
"""

import statistics
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from absl.flags import FlagValues

from ...profiling import chips, price, targets
from ...profiling.assumptions import HISTORY, Assumptions
from ...profiling.bill import Bill
from .. import flags
from ..flags import UsageError
from .driver import Bills, Driver, bill, numbers, require_times
from .finding import Finding, Plot, Quantity, Table, cell
from .serving import AUTO, BATCHES, Replica, fewest_chips, held
from .sweep import Point

if TYPE_CHECKING:
    from ...model.config import ModelConfig

BESIDE = "qwen3-0.6b,qwen3-32b"
CACHED = (1 / 4, 1 / 2, 3 / 4, 15 / 16)  # shares of a prompt that are found in a cache of prompts
SEVERAL = 2  # times an input token that an output token costs at least, where the claim holds
CLAIM = (
    "Reading a prompt is bound by compute and writing by memory, at any batch, so that an output token costs several "
    "times as much as an input token."
)


def _define(to: flags.Definer) -> None:
    flags.define_storage(to)
    to.string("beside", BESIDE, "further architectures, with commas; nothing for none")
    to.string("batches", ",".join(map(str, BATCHES)), "sequences that are decoded together, with commas")
    to.count("context", 4096, "tokens of a prompt, and positions in the cache of a decode step")
    to.count("prompt", 16_384, "tokens of the prompt of which a part is cached")
    to.string("mesh", AUTO, "chips, such as tensor=2; auto: for each model the fewest that hold the largest batch")


# --- the steps -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """The steps of one model: decode of each batch that may fit, and a prompt as long as their context."""

    config: "ModelConfig"
    decode: tuple[Point, ...]
    prefill: Point

    @classmethod
    def of(cls, config: "ModelConfig", values: FlagValues) -> "Plan":
        batches, roomy = numbers("batches", values.batches), _roomy(config, values.context)
        mesh = values.mesh
        if mesh == AUTO:
            mesh = _mesh(roomy, values, batches)
        beside, each = held(roomy, values.context, mesh)
        capacity = targets.chip(values.target).usable_hbm_bytes or 0
        fitting = [batch for batch in batches if batch == batches[0] or beside + batch * each <= capacity]
        decode = [Point(roomy, "decode", batch, values.context, values.target, mesh) for batch in fitting]
        return cls(config, tuple(decode), replace(decode[0], step="prefill", batch=1))

    def prompt(self, tokens: int) -> Point:
        """The step that reads so many."""
        return replace(self.prefill, config=_roomy(self.config, tokens), context=tokens)


def _mesh(config: "ModelConfig", values: FlagValues, batches: Sequence[int]) -> str:
    """The fewest chips that hold the largest batch, of those that any can hold; UsageError where none is."""
    for batch in reversed(batches[1:]):
        with suppress(UsageError):
            return fewest_chips(config, values.target, batch, values.context)
    return fewest_chips(config, values.target, batches[0], values.context)


def _roomy(config: "ModelConfig", context: int) -> "ModelConfig":
    return replace(config, max_context=max(context, config.max_context))


def _plans(values: FlagValues) -> list[Plan]:
    """Of the model, and of those beside it, stored alike."""
    require_times(values.target)
    if values.prompt < 16:
        raise UsageError(f"--prompt={values.prompt}: it must be at least 16, of which a sixteenth is new")
    configs = [flags.model_config(values, "decode")]
    for name in filter(None, values.beside.split(",")):
        stored = [f"--model={name}", f"--weights={values.weights}", f"--cache_dtype={values.cache_dtype}"]
        try:
            configs.append(flags.model_config(flags.parse(stored), "decode"))
        except UsageError as error:
            raise UsageError(f"--beside={values.beside}: {error}") from None
    return [Plan.of(config, values) for config in configs]


def _parts(values: FlagValues) -> list[tuple[float, int, int]]:
    """(share, past, new): of the prompt's tokens, `past` are cached."""
    return [(share, past := int(values.prompt * share), values.prompt - past) for share in CACHED]


def _prompts(values: FlagValues, plan: Plan) -> list[Point]:
    """Prompts whose times tell what a cached part saves."""
    lengths = {values.prompt} | {length for _, past, new in _parts(values) for length in (past, new)}
    return [plan.prompt(length) for length in sorted(lengths)]


def _points(values: FlagValues) -> list[Point]:
    plans = _plans(values)
    own = [point for plan in plans for point in (*plan.decode, plan.prefill)]
    return list(dict.fromkeys([*own, *_prompts(values, plans[0])]))


# --- the finding ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """A step and its bill. tokens: that it reads or writes, on all chips together."""

    point: Point
    bill: Bill

    @property
    def tokens(self) -> int:
        return self.point.context if self.point.step == "prefill" else self.point.batch or 1

    @property
    def intensity(self) -> float:
        """FLOPs of products for each byte of HBM."""
        return self.bill.total.matmul / self.bill.total.hbm_bytes

    @property
    def chip_seconds(self) -> float:
        """Of one token."""
        return self.bill.total.seconds * self.bill.program["chips"] / self.tokens


@dataclass(frozen=True)
class Model:
    """The steps of one model that have a bill, decode in order of the batch."""

    name: str
    prefill: Step
    decode: tuple[Step, ...]

    @classmethod
    def of(cls, plan: Plan, bills: Bills) -> "Model":
        bill(bills, plan.decode[0])  # which must be there
        decode = [Step(point, found) for point in plan.decode if isinstance(found := bills[point], Bill)]
        found = cls(plan.config.name, Step(plan.prefill, bill(bills, plan.prefill)), tuple(decode))
        if not all(step.bill.timed for step in (found.prefill, *decode)):
            raise UsageError(f"--target={plan.prefill.target}: its step times are not known")
        return found

    @property
    def ratios(self) -> tuple[float, ...]:
        """How many times as much as an input token an output token costs, for each batch."""
        return tuple(step.chip_seconds / self.prefill.chip_seconds for step in self.decode)


def _find(values: FlagValues, bills: Bills, known: Assumptions) -> Finding:
    plans = _plans(values)
    models = [Model.of(plan, bills) for plan in plans]
    chip = chips.priced(targets.chip(values.target), known)
    assert chip.hbm_bytes_per_second is not None  # or no step would be timed
    ridge = chip.peak_flops["bf16"] / chip.hbm_bytes_per_second
    replica = Replica.of([*plans[0].decode, *_prompts(values, plans[0])], bills)
    lists = _lists(known)
    listed = [output for _, output, _ in lists]
    least, most = min(listed), max(listed)
    fewest, mostly = (end(cached for _, _, cached in lists) for end in (min, max))
    decode = [step.intensity for model in models for step in model.decode]
    prefill = [model.prefill.intensity for model in models]
    ratios = [ratio for model in models for ratio in model.ratios]
    holds = min(prefill) > ridge > max(decode) and min(ratios) >= SEVERAL
    first = models[0]
    last = first.decode[-1].point.batch
    cached = _cached(values, replica, chip)
    share, past, _, _, saved, _, kept, _, attended = cached.rows[-1]
    evidence = (
        f"FLOPs per byte: prompts {min(prefill):,.0f} to {max(prefill):,.0f}, decode {min(decode):.3g} to "
        f"{max(decode):.3g}, ridge point {ridge:.0f}. An output token of {first.name} costs {first.ratios[0]:,.0f} "
        f"input tokens at batch {first.decode[0].point.batch}, {first.ratios[-1]:,.1f} at batch {last}"
        + "".join(f", of {other.name} {other.ratios[-1]:,.1f} at its largest" for other in models[1:])
        + f"; lists charge {least:.3g} to {most:.3g}. With {cell(share, '%')} of a prompt cached {cell(saved, '%')} of "
        f"it is saved, and a cached token costs {cell(attended, '%')} of a new one (lists: {cell(fewest, '%')} to "
        f"{cell(mostly, '%')}); keeping those {past:,} positions in HBM pays if they are read again within "
        f"{cell(kept, 's')}."
    )
    return Finding(
        "prefill_decode",
        PREFILL_DECODE.question,
        values.target,
        CLAIM,
        holds,
        evidence,
        PREFILL_DECODE.command(values),
        (_intensities(models, ridge), _beside(models), _list_table(lists), cached),
        _plots(models, least, most),
        notes=(
            *replica.notes,
            "seconds and dollars are at the roofline: a lower bound; memory is as the compiler plans it",
            "the ridge point is that of bfloat16 products; whole steps are compared with it, parts of them may differ",
            "a cached prompt still is attended to; that, and room for it, is what a vendor pays for a cached token",
        ),
        headline=f"an output token costs {first.ratios[-1]:.1f} input tokens at batch {last}",
        factor=max(first.ratios[-1], 1.0),
    )


def _lists(known: Assumptions) -> list[tuple[str, float, float]]:
    """Of each list of API prices that is in force: its model, output over input, cached over input."""
    names = [name for name in known.members("api") if known.entries[f"api.{name}.input"].status != HISTORY]
    of = {name: [known.number(f"api.{name}.{kind}") for kind in ("input", "cached", "output")] for name in names}
    return [(name, output / new, cached / new) for name, (new, cached, output) in of.items() if new]


def _intensities(models: Sequence[Model], ridge: float) -> Table:
    columns = (
        *(Quantity("model"), Quantity("step"), Quantity("chips"), Quantity("batch"), Quantity("FLOPs", "FLOP")),
        *(Quantity("HBM", "B"), Quantity("intensity", "FLOP/B"), Quantity("over the ridge point", "x")),
        *(Quantity("tokens/s"), Quantity("$ / M tokens", "$")),
    )
    rows, commands = [], []
    for model in models:
        for step in (model.prefill, *model.decode):
            work, point = step.bill.total, step.point
            speed = price.tokens_per_second(work.seconds, step.tokens)
            dollars = step.bill.price.get("dollars_per_million_tokens")
            rows.append(
                (
                    *(model.name, point.step, step.bill.program["chips"], point.batch, work.matmul),
                    *(work.hbm_bytes, step.intensity, step.intensity / ridge, speed, dollars),
                )
            )
            commands.append(point.command)
    return Table(f"A chip's work: ridge point {ridge:.0f} FLOP/B", columns, tuple(rows), tuple(commands))


def _beside(models: Sequence[Model]) -> Table:
    columns = (
        *(Quantity("model"), Quantity("batch"), Quantity("an input token, chip-time", "s")),
        *(Quantity("an output token, chip-time", "s"), Quantity("output / input", "x")),
    )
    rows, commands = [], []
    for model in models:
        for step, ratio in zip(model.decode, model.ratios, strict=True):
            rows.append((model.name, step.point.batch, model.prefill.chip_seconds, step.chip_seconds, ratio))
            commands.append(step.point.command)
    return Table("An output token beside an input token", columns, tuple(rows), tuple(commands))


def _list_table(lists: Sequence[tuple[str, float, float]]) -> Table:
    columns = (Quantity("list price of"), Quantity("output / input", "x"), Quantity("cached / input", "%"))
    _, outputs, cached = zip(*lists, strict=True)
    middle = ("median", statistics.median(outputs), statistics.median(cached))
    return Table("What API lists charge", columns, (*lists, middle))


def _cached(values: FlagValues, replica: Replica, chip: chips.Chip) -> Table:
    """What is saved where the beginning of a prompt is cached.

    Kept: for how long its room in HBM costs as much of a chip as reading it anew does. Loaded: from the memory of the
    host, over half of the link that goes both ways. A cached token: what is new attends to it, over what a token of the
    prompt takes without a cache.
    """
    columns = (
        *(Quantity("cached", "%"), Quantity("of it tokens"), Quantity("prompt", "s"), Quantity("1,000 of them", "$")),
        *(Quantity("saved", "%"), Quantity("takes of each chip", "B"), Quantity("worth keeping in HBM for", "s")),
        *(Quantity("loading it from the host", "s"), Quantity("a cached token, of a new one", "%")),
    )
    whole = replica.times.prefill(values.prompt)
    capacity = chip.usable_hbm_bytes or 0
    rows = []
    for share, past, new in [(0.0, 0, values.prompt), *_parts(values)]:
        time = replica.times.prefill(new, past)
        seconds, saved = time * 1e-12, (whole - time) * 1e-12
        room = replica.bytes_per_position * past
        kept = saved / (room / capacity) if room and capacity else None
        loading = 2 * room / chip.host_bytes_per_second if chip.host_bytes_per_second else None
        dollars = price.dollars(chip, replica.chips, 1000 * seconds)
        attended = (time - replica.times.prefill(new)) / past if past else None
        of_new = None if attended is None else attended / (whole / values.prompt)
        rows.append((share, past, seconds, dollars, 1 - time / whole, room, kept, loading, of_new))
    return Table(f"A prompt of {values.prompt:,} tokens, a part of it cached", columns, tuple(rows))


def _plots(models: Sequence[Model], least: float, most: float) -> tuple[Plot, ...]:
    batches = [step.point.batch or 1 for model in models for step in model.decode]
    ends = min(batches), max(batches)
    reached = {
        model.name: tuple(sorted((step.intensity, step.bill.total.matmul / step.bill.total.seconds) for step in steps))
        for model in models
        if (steps := (*model.decode, model.prefill))
    }
    ratios = {
        model.name: tuple(
            (step.point.batch or 1, ratio) for step, ratio in zip(model.decode, model.ratios, strict=True)
        )
        for model in models
    }
    for name, ratio in (("lowest of the lists", least), ("highest of the lists", most)):
        ratios[name] = tuple((batch, ratio) for batch in dict.fromkeys(ends))
    return (
        Plot("Decode by batch, and the prompt", Quantity("intensity", "FLOP/B"), Quantity("a chip", "FLOP/s"), reached),
        Plot("An output token beside an input token", Quantity("batch"), Quantity("output / input", "x"), ratios),
    )


PREFILL_DECODE = Driver(
    "prefill_decode",
    "Why does an output token cost more than an input token?",
    _define,
    _points,
    _find,
    "llama3-8b",
)
main = PREFILL_DECODE.main

if __name__ == "__main__":
    sys.exit(main())
