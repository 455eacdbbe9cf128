"""`python -m stepbill.experiments.advise`: what dominates the cost of given traffic, and what would make it cheaper.

    python -m stepbill.experiments.advise --scenario=chat-support --model=llama3-8b --target=h200
    python -m stepbill.experiments.advise --scenario=my_traffic.json --chips=h100,b200 --format=json

Every alternative is compiled: its decode steps and prompts make what the traffic costs in steady state
(drivers/deployment.py). They are ranked by the dollars that they save; beside each stand its latencies, and its risk to
quality with how that risk is known: `none` (the same model does the same), `measured here` (of the small models of
quality.py), `published`, or `unknown`.
"""

import difflib
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from absl.flags import FlagValues

from ..profiling import targets
from ..profiling.assumptions import Assumptions, Scenario
from . import command, flags, quality
from .assumptions import define_assume, facts
from .drivers import finding, sweep
from .drivers.deployment import Deployment, Misses, Served, serve
from .drivers.driver import again, checked, define_output, require_times
from .drivers.finding import Finding, Plot, Quantity, Table, cell
from .drivers.model_size import renamed, scaled
from .drivers.serving import AUTO
from .flags import UsageError
from .perplexity import Way
from .quality import Quality

if TYPE_CHECKING:
    from ..model.config import ModelConfig

SCHEMA = 1
MOST = 1e15  # of a number of a scenario
CHIPS = "h100,h200,b200,v5e,v6e"
MOST_TENSOR = 8  # chips of a replica that are tried for the sake of latency
SAFE = 0.001  # of the bits a byte that were measured: what counts as no loss
DRAFT = 1 / 8  # of the parameters: what a model of the same family may have to guess for it
MLA = "attention: MLA"
DRAWN = 8  # alternatives, the cheapest
WINDOW, GLOBAL_EVERY = 1024, 6  # as Gemma 3 has it
INTRODUCTION = """advise: what dominates the cost of given traffic, and what would make it cheaper

  python -m stepbill.experiments.advise --scenario=chat-support --model=llama3-8b --target=h200
  python -m stepbill.experiments.advise --scenario=FILE.json --format=json

FILE.json has all of: input_tokens, cached_tokens, output_tokens, reasoning_tokens, requests_per_second, ttft_seconds,
tpot_seconds.
"""
NONE, MEASURED, PUBLISHED, UNKNOWN = "none", "measured here", "published", "unknown"


# --- what is asked ---------------------------------------------------------------------------------------------------


def define(values: FlagValues) -> None:
    """Adds every flag."""
    to = flags.Definer(values)
    to.string("scenario", None, "the traffic: one of stepbill.experiments.assumptions --only=scenario, or a JSON file")
    flags.define_model(to)
    values.set_default("model", "llama3-8b")
    flags.define_storage(to)
    to.string("target", "h200", "the chip that it runs on now")
    to.string("mesh", AUTO, "chips of a replica, such as tensor=4; auto: the fewest that hold a few requests in time")
    to.count("batch", None, "requests in flight in a replica, at most, in the mean. Default: as many as are in time")
    to.string("chips", CHIPS, "other chips to try, with commas")
    quality.define_quality(to)
    define_assume(to)
    define_output(to, "how it is printed")


def scenario(name: str | None, known: Assumptions) -> Scenario:
    """The traffic of that name, or of a JSON file; UsageError says what is wrong with it."""
    names = known.members("scenario")
    if name in names:
        try:
            return known.record(Scenario, f"scenario.{name}")
        except ValueError as error:
            raise UsageError(f"--scenario={name}: {error}") from None
    if name is None or not (name.endswith(".json") or Path(name).exists()):
        said = "it needs a value" if name is None else "there is no such scenario"
        raise UsageError(f"--scenario{'' if name is None else f'={name}'}: {said}; {', '.join(names)}, or a JSON file")
    try:
        return _of_json(json.loads(Path(name).expanduser().read_text()))
    except OSError as error:
        problem = f"cannot read it: {(error.strerror or str(error)).lower()}"
    except json.JSONDecodeError as error:
        problem = f"it is no JSON: {error}"
    except (ValueError, RecursionError) as error:
        problem = " ".join(str(error).split())
    raise UsageError(f"--scenario={name}: {problem}")


def _of_json(given: Any) -> Scenario:
    """ValueError names the field that is wrong."""
    types = get_type_hints(Scenario)
    if not isinstance(given, dict):
        raise ValueError(f"it must be an object with {', '.join(types)}")
    for name in given.keys() - types.keys():
        near = difflib.get_close_matches(name, types, n=1)
        raise ValueError(f"there is no field {name!r}; {f'did you mean {near[0]}?' if near else ', '.join(types)}")
    for name, kind in types.items():
        if name not in given:
            raise ValueError(f"it has no {name}; it must have all of {', '.join(types)}")
        value, least = given[name], 0 if name in ("cached_tokens", "reasoning_tokens") else 1
        # Python's JSON reads NaN and Infinity, too; and true is 1.
        number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < MOST
        if kind is int and not (number and value == int(value) and value >= least):
            raise ValueError(f"{name} is {value!r}; it must be a whole number from {least} on")
        if kind is float and not (number and value > 0):
            raise ValueError(f"{name} is {value!r}; it must be a positive number")
    return Scenario(**{name: kind(given[name]) for name, kind in types.items()})


@dataclass(frozen=True)
class Request:
    """A validated command line. now: what is deployed, not yet placed. chips: others to try. command: that it was."""

    name: str
    now: Deployment
    chips: tuple[str, ...]
    trained: Quality
    known: Assumptions
    command: str
    jobs: int | None = None

    @property
    def is_auto(self) -> bool:
        return self.now.mesh == AUTO


def request(values: FlagValues) -> Request:
    """UsageError names the flag that is wrong."""
    checked(values)
    require_times(values.target)
    known = facts(values)
    traffic = scenario(values.scenario, known)
    if values.mesh != AUTO and not re.fullmatch(r"(tensor=[1-9]\d*)?", values.mesh):
        raise UsageError(f"--mesh={values.mesh}: it must be tensor=N or auto")
    config = flags.model_config(values, "decode")
    now = Deployment(traffic, config, values.target, values.mesh, batch=values.batch)
    if config.positions == "learned" and now.longest > config.max_context:
        raise UsageError(
            f"--scenario={values.scenario}: a request takes {now.longest} positions; {config.name} has "
            f"{config.max_context}"
        )
    others = [name for name in dict.fromkeys(values.chips.split(",")) if name not in ("", values.target)]
    for name in others:
        try:
            require_times(name)
        except (ValueError, UsageError) as error:
            raise UsageError(f"--chips={values.chips}: {error}") from None
    name = Path(values.scenario).stem
    return Request(name, now, tuple(others), quality.read(values.quality), known, again("advise", values), values.jobs)


# --- what could be changed -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Risk:
    """To quality. known: how it is. text: what is known. loss: share of the bits a byte that were lost, measured."""

    known: str
    text: str
    loss: float | None = None

    @property
    def is_exact(self) -> bool:
        return self.known == NONE

    @property
    def is_safe(self) -> bool:
        """Whether nothing was lost, by construction or as far as was measured."""
        return self.is_exact or (self.loss is not None and self.loss <= SAFE)


SAME = Risk(NONE, "the same model does the same, but for rounding")


@dataclass(frozen=True)
class Wanted:
    """A deployment before it is placed, and how many times as many chips a replica of it shall have."""

    deployment: Deployment
    times: float = 1.0

    def placed(self) -> Deployment:
        """UsageError where no mesh will do."""
        found = self.deployment.placed()
        tensor = sweep.mesh_of(found.mesh).get("tensor", 1) * self.times
        if self.times == 1:
            return found
        if tensor < 1 or found.config.num_heads % tensor or found.config.mlp_width % tensor:
            raise UsageError(f"{found.config.name} cannot be split over {tensor:g} chips")
        return replace(found, mesh=f"tensor={tensor:.0f}" if tensor > 1 else "")


@dataclass(frozen=True)
class Change:
    """One way to make it cheaper.

    Attributes:
      part: what of a deployment it changes; a combination has at most one change of each. "": it is in none.
      needs: what must be so besides; "": nothing that is not in our hands today.
    """

    name: str
    part: str
    apply: Callable[[Wanted], Wanted]
    risk: Risk
    needs: str = ""


def _config(**changes: Any) -> Callable[[Wanted], Wanted]:
    """Changes the model, or how it is stored."""

    def apply(one: Wanted) -> Wanted:
        return replace(one, deployment=replace(one.deployment, config=replace(one.deployment.config, **changes)))

    return apply


def _deployed(**changes: Any) -> Callable[[Wanted], Wanted]:
    return lambda one: replace(one, deployment=replace(one.deployment, **changes))


def _traffic(**changes: Any) -> Callable[[Wanted], Wanted]:
    return lambda one: replace(
        one, deployment=replace(one.deployment, traffic=replace(one.deployment.traffic, **changes))
    )


def _on(chip: str) -> Callable[[Wanted], Wanted]:
    """With a mesh of its own: how many chips hold a model depends on their memory."""
    return lambda one: Wanted(replace(one.deployment, target=chip, mesh=AUTO))


def changes(asked: Request) -> Iterator[Change]:
    """Those that do not depend on what it comes to today."""
    config, known = asked.now.config, asked.known
    yield from _storage(config, asked.trained, known)
    yield from _architectures(config)
    yield from _smaller(config, asked.trained, known)
    for chip in asked.chips:
        yield Change(f"chip: {chip}", "chip", _on(chip), SAME)
    yield from _prefix(asked.now.traffic)
    if (draft := _draft(config)) is not None:
        accepted, drafted = known.number("speculation.accepted"), known.whole("speculation.drafted")
        model, needs = draft
        text = "guesses are checked, so that the distribution stays (Leviathan et al., 2023)"
        exact = Risk(NONE, f"{text}; {accepted:.0%} of them are assumed to be right")
        name = f"speculation: {drafted} guesses of {model.name}"
        yield Change(name, "draft", _deployed(draft=model, drafted=drafted), exact, needs)
    if (hidden := asked.now.traffic.reasoning_tokens) > 0:
        risk = Risk(UNKNOWN, "models that think less solve fewer hard tasks; how many of these is not known")
        yield Change("half of the reasoning tokens", "", _traffic(reasoning_tokens=hidden // 2), risk)
        yield Change("no reasoning tokens", "", _traffic(reasoning_tokens=0), risk)


def _storage(config: "ModelConfig", trained: Quality, known: Assumptions) -> Iterator[Change]:
    """Weights, cache and activations in fewer bits."""
    if config.weights != "full" or config.cache_dtype != "full":
        return  # what was measured is against all of them in bfloat16

    def measured(*ways: Way) -> Risk:
        largest = trained.ladder[0]
        rows = [largest.in_way(way) for way in ways]
        if any(row is None for row in rows):
            return Risk(UNKNOWN, "not among the ways that were measured")
        plain = largest.plain.bits_per_byte.value
        more = [row.more_than(largest.plain) for row in rows if row is not None]
        lost = sum(one.value for one in more)
        size = f"{largest.parameters / 1e6:.2g} M parameters"
        apart = " (apart)" if len(more) > 1 else ""
        said = " and ".join(f"{one.value:+.5f} ± {one.standard_error:.5f}" for one in more)
        return Risk(MEASURED, f"{said} of {plain:.2f} bits a byte{apart}, on {largest.name}, {size}", lost / plain)

    int8, int4, cache, all8 = Way("int8"), Way("int4:128"), Way(cache_dtype="int8"), Way("int8", "int8", "int8")
    four = measured(int4)
    f16, q4 = known.number("quality.open_llama_3b.f16"), known.number("quality.open_llama_3b.q4_0")
    four = replace(four, text=f"{four.text}; published: perplexity {q4 / f16 - 1:+.1%} (OpenLLaMA 3B, q4_0)")
    for name, way, risk in (
        ("weights in int8", int8, measured(int8)),
        ("weights in int4:128", int4, four),
        ("cache in int8", cache, measured(cache)),
        ("weights and cache in int8", Way("int8", "int8"), measured(int8, cache)),
        ("weights, cache, activations in int8", all8, measured(all8)),
    ):
        yield Change(name, "storage", _config(**way.changes), risk)


def _architectures(config: "ModelConfig") -> Iterator[Change]:
    """Attention with a smaller cache, where the model has not got it already."""
    from ..model.config import Latent

    if config.latent is not None:
        return
    N, K, H = config.num_heads, config.num_kv_heads, config.head_width
    needs = "training it so"

    def change(name: str, text: str, **sizes: Any) -> Change:
        sizes["name"] = f"{config.name} ({name})"
        return Change(f"attention: {name}", "", _config(**sizes), Risk(PUBLISHED, text), needs)

    if K == N and N % 4 == 0:
        text = "close to a head for each (Ainslie et al., 2023)"
        yield change(f"GQA, {N // 4} heads", text, num_kv_heads=N // 4)
    if K > 1:
        yield change("MQA", "some loss, and GQA is the compromise (Ainslie et al., 2023)", num_kv_heads=1)
    if not (config.window or config.qk_norm or config.qkv_bias or config.sinks):
        text = "no loss or a gain at 16 and 250 billion parameters (DeepSeek-V2, 2024; from memory)"
        # In the proportions of DeepSeek-V2 and V3.
        latent = Latent(kv_rank=4 * H, rope_width=H // 2, value_width=H)
        yield change(MLA.removeprefix("attention: "), text, num_kv_heads=N, latent=latent)
    if not config.window:
        text = "next to no loss of perplexity; long inputs less sure (Gemma 3, 2025; from memory)"
        name = f"window {WINDOW}, 1 in {GLOBAL_EVERY} global"
        yield change(name, text, window=WINDOW, global_every=GLOBAL_EVERY)


def family(config: "ModelConfig") -> "list[ModelConfig]":
    """Those of its family that read the same tokens and are smaller in every way, from the largest on."""
    from ..model.architectures import ARCHITECTURES

    def stem(name: str) -> str:
        return name.partition("-")[0]

    found = [
        replace(one, weights=config.weights, cache_dtype=config.cache_dtype)
        for one in ARCHITECTURES.values()
        if (stem(one.name), one.vocabulary) == (stem(config.name), config.vocabulary)
        and one.parameters < config.parameters
        and one.active_parameters < config.active_parameters
    ]
    return sorted(found, key=lambda one: -one.active_parameters)


def _smaller(config: "ModelConfig", trained: Quality, known: Assumptions) -> Iterator[Change]:
    """The next of its family; without one, a model of half the width, as one of those that were trained here."""
    for small in family(config)[:1]:
        factor, exponent = known.number("quality.law.factor"), known.number("quality.law.exponent")
        more = factor * (small.active_parameters**-exponent - config.active_parameters**-exponent)
        text = f"{more:+.3f} nats a token by the law of Hoffmann et al. (2022), for as many tokens of training"
        yield Change(f"smaller model: {small.name}", "", _deployed(config=small), Risk(PUBLISHED, text))
        return
    if config.experts is not None or config.latent is not None:
        return
    half, (largest, *others) = scaled(config, 0.5), trained.ladder
    if half.parameters >= config.parameters:
        return
    near = next((one for one in others if one.width * 2 == largest.width), None)
    risk = Risk(UNKNOWN, "no model of half the width was measured")
    if near is not None:
        more = near.plain.more_than(largest.plain)
        plain = largest.plain.bits_per_byte.value
        sizes = f"{largest.parameters / 1e6:.2g} and {near.parameters / 1e6:.2g} M parameters"
        text = f"{more.value:+.3f} ± {more.standard_error:.3f} of {plain:.2f} bits a byte, {sizes}"
        risk = Risk(MEASURED, text, more.value / plain)
    yield Change("smaller model: half the width", "", _deployed(config=half), risk, "training it")


def _draft(config: "ModelConfig") -> "tuple[ModelConfig, str] | None":
    """A model that guesses for it, and what it takes to have one: the largest of its family of an eighth or less, or
    one of half its width and half its layers; None where there is none."""
    small = [one for one in family(config) if one.active_parameters <= DRAFT * config.active_parameters]
    if small:
        return small[0], ""
    if config.experts is not None or config.latent is not None or config.num_layers < 2:
        return None
    half = scaled(config, 0.5)
    draft = renamed(replace(half, name=config.name), "half width, layers", num_layers=config.num_layers // 2)
    return (draft, "training the draft") if draft.parameters < config.parameters / 2 else None


def _prefix(traffic: Scenario) -> Iterator[Change]:
    """More of the prompt found in a cache of prompts, and none."""
    new = traffic.input_tokens - traffic.cached_tokens
    if new > 1:
        found = traffic.cached_tokens + new // 2
        name = f"prefix cache: {found / traffic.input_tokens:.0%} of each prompt"
        needs = f"prompts of which the first {found:,} tokens came before"
        yield Change(name, "", _traffic(cached_tokens=found), SAME, needs)
    if traffic.cached_tokens:
        name = f"no prefix cache (now {traffic.cached_tokens / traffic.input_tokens:.0%})"
        yield Change(name, "", _traffic(cached_tokens=0), SAME)


def _batches(asked: Request, now: Served) -> Iterator[Change]:
    """Of the same steps: fewer requests in flight, as many as are in time, and as many as memory holds."""
    if asked.now.batch is not None:
        yield Change("batch: as large as is in time", "batch", _deployed(batch=None), SAME)
    if now.batch > 2:
        yield Change(f"batch: half, {now.batch / 2:.3g}", "", _deployed(batch=now.batch / 2), SAME)
    if not now.missed:
        yield Change("batch: all that memory holds", "", _deployed(batch=None, in_time=False), SAME)


def _meshes(now: Wanted, chips: int) -> Iterator[Change]:
    """Twice and half as many chips a replica."""

    def times(factor: float) -> Callable[[Wanted], Wanted]:
        return lambda one: replace(one, times=now.times * factor)

    yield Change("twice the chips a replica", "mesh", times(2.0), SAME)
    if chips > 1:
        yield Change("half the chips a replica", "mesh", times(0.5), SAME)


# --- what it comes to ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What a deployment comes to; None with the reason where it does not run."""

    served: Served | None
    reason: str = ""


@dataclass
class Compiler:
    """Compiles what deployments need, each step once."""

    known: Assumptions
    jobs: int | None = None
    bills: dict[sweep.Point, sweep.Outcome] = field(default_factory=dict)

    def outcomes(self, wanted: Sequence[Wanted], tries: Sequence[int]) -> list[Outcome]:
        """Of each, on as few chips as hold it; and where these are too slow, on twice as many, so often as `tries`
        of it say."""
        found: dict[int, Outcome] = {}
        todo = dict(enumerate(wanted))
        left = list(tries)
        while todo:
            placed: dict[int, Deployment] = {}
            for n, one in todo.items():
                try:
                    targets.require(one.deployment.target)
                    placed[n] = one.placed()
                except (UsageError, targets.MissingExtra) as error:
                    found.setdefault(n, Outcome(None, _plain(str(error))))  # or as late as fewer chips are
            missing = [p for one in placed.values() for p in one.points() if p not in self.bills]
            self.bills |= sweep.sweep(missing, self.jobs)
            again = {}
            for n, one in placed.items():
                found[n] = outcome = self._outcome(one)
                chips = sweep.mesh_of(one.mesh).get("tensor", 1)
                late = outcome.served is not None and outcome.served.missed and one.in_time
                if late and left[n] and chips < MOST_TENSOR:
                    left[n] -= 1
                    again[n] = replace(todo[n], times=todo[n].times * 2)
            todo = again
        return [found[n] for n in range(len(wanted))]

    def _outcome(self, placed: Deployment) -> Outcome:
        try:
            return Outcome(serve(placed, self.bills, self.known))
        except Misses as error:
            late = serve(replace(placed, in_time=False), self.bills, self.known)
            return Outcome(replace(late, deployment=placed, missed=str(error)))
        except UsageError as error:
            return Outcome(None, _plain(str(error)))


def _plain(error: str) -> str:
    """An error of flags, of what nobody gave as one."""
    return re.sub(r"^--\w+=\S*: ", "", error)


@dataclass(frozen=True)
class Alternative:
    """A change and what it comes to, against now."""

    change: Change
    outcome: Outcome
    now: Served

    @property
    def served(self) -> Served | None:
        return self.outcome.served

    @property
    def in_time(self) -> bool:
        return self.served is not None and not self.served.missed

    @property
    def reason(self) -> str:
        """Why it does not run, or why it is late; "" where it does and is not."""
        return self.outcome.reason if self.served is None else self.served.missed

    @property
    def saved(self) -> float | None:
        """The share of the dollars that it saves; negative where it is dearer; None where that cannot be told."""
        before = self.now.dollars_per_request
        after = self.served.dollars_per_request if self.served else None
        return None if not before or after is None else 1 - after / before

    @property
    def saved_per_month(self) -> float | None:
        """Dollars."""
        before, after = self.now.dollars_per_month, self.served.dollars_per_month if self.served else None
        return None if before is None or after is None else before - after

    @property
    def is_exact(self) -> bool:
        """Whether it is in time, saves, and quality stays as it is, with nothing that we have not got."""
        return self.in_time and (self.saved or 0) > 0 and self.change.risk.is_exact

    def to_json(self) -> dict[str, Any]:
        """Keys stay; numbers are null where it does not run."""
        change, one = self.change, self.served
        return {
            "name": change.name,
            "runs": one is not None,
            "keeps_targets": self.in_time,
            "reason": self.reason,
            **_amounts(one),
            "saved_share": self.saved,
            "saved_dollars_per_month": self.saved_per_month,
            "risk": {"known": change.risk.known, "text": change.risk.text, "loss_share": change.risk.loss},
            "needs": change.needs,
        }


def _amounts(one: Served | None) -> dict[str, Any]:
    names = ("dollars_per_request", "dollars_per_month", "dollars_per_million_tokens", "ttft_seconds", "tpot_seconds")
    found: dict[str, Any] = {name: one and getattr(one, name) for name in names}
    mesh = one and (one.deployment.mesh or "tensor=1")
    return found | {
        "target": one and one.deployment.target,
        "mesh": mesh,
        "chips_per_replica": one and one.chips,
        "replicas": one and one.replicas,
        "chips": one and one.whole_chips,
        "requests_in_flight": one and one.batch,
    }


# --- the advice ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """A part of what a request costs: its phase, what it goes to, and the share of the whole."""

    phase: str
    group: str
    share: float
    dollars_per_month: float | None


@dataclass(frozen=True)
class Advice:
    """What was found. alternatives: from the one on that saves most; those that are late, and those that do not run,
    last."""

    asked: Request
    now: Served
    lines: tuple[Line, ...]
    alternatives: tuple[Alternative, ...]

    @property
    def dominates(self) -> str:
        """In one sentence."""
        by_phase = {
            phase: sum(one.share for one in self.lines if one.phase == phase) for phase in ("prefill", "decode")
        }
        phase = max(by_phase, key=by_phase.__getitem__)
        first = max(self.lines, key=lambda one: one.share)
        what = {"prefill": "reading prompts", "decode": "writing answers"}[phase]
        largest = f"{first.phase}, {first.group}: {first.share:.0%}"
        return f"{what} is {by_phase[phase]:.0%} of the cost; the largest part is {largest}"

    @property
    def best(self) -> Alternative | None:
        """The cheapest that keeps quality exactly."""
        return next((one for one in self.alternatives if one.is_exact and not one.change.needs), None)

    @property
    def exact(self) -> str:
        """In one sentence."""
        start = "the cheapest change that keeps quality exactly"
        if self.best is None or self.best.saved is None:
            return f"{start}: none of these saves anything"
        month = cell(self.best.saved_per_month, "$")
        return f"{start}: {self.best.change.name} saves {self.best.saved:.0%} (${month} a month)"

    def to_json(self) -> dict[str, Any]:
        """`schema` and the rest; keys may be added, none is renamed."""
        asked = self.asked
        return {
            "schema": SCHEMA,
            "scenario": {"name": asked.name} | asdict(asked.now.traffic),
            "model": asked.now.config.name,
            "target": asked.now.target,
            "dominates": self.dominates,
            "exact": self.exact,
            "now": _amounts(self.now) | {"keeps_targets": not self.now.missed, "reason": self.now.missed},
            "drivers": [asdict(one) for one in self.lines],
            "alternatives": [one.to_json() for one in self.alternatives],
            "assumptions": [one.to_json() for one in asked.known.used],
            "notes": list(self.notes),
            "command": asked.command,
        }

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader must know."""
        config, longest = self.asked.now.config, self.now.deployment.longest
        said = [
            "step times are the roofline's: a lower bound",
            "dollars are of busy chips, in the mean: a fleet shares what is left of the last replica; chips are those "
            "of whole replicas, if nothing else runs on them",
            "latencies are what 99 of 100 requests keep; prompts are read one by one while those that decode wait",
            "a cached prompt takes memory while its request runs, and no time to be found; keeping it is not counted",
        ]
        if any(one.change.name == MLA for one in self.alternatives):
            said.append("without a kernel of its own a latent vector is read twice, for scores and for values")
        if longest > config.max_context:
            said.append(f"{config.name} is for {config.max_context:,} positions, and a request takes {longest:,}")
        return (*said, *self.now.notes)

    @property
    def finding(self) -> Finding:
        """The same as tables, as drivers of cost have them."""
        asked, saved = self.asked, self.best.saved if self.best else None
        return Finding(
            f"advise-{asked.name}",
            f"What dominates the cost of {asked.name} with {asked.now.config.name}, and what would be cheaper?",
            asked.now.target,
            "Half of the cost or more can be saved without any loss of quality.",
            None if not self.now.dollars_per_request else (saved or 0) >= 0.5,
            f"{self.exact}; {self.dominates}.",
            asked.command,
            (self._drivers(), self._alternatives(), self._risks(), *self._reasons()),
            (self._plot(),),
            assumptions=tuple(one.to_json() for one in asked.known.used),
            notes=self.notes,
            headline=self.exact,
            factor=None if saved is None or saved >= 1 else 1 / (1 - saved),
        )

    def _drivers(self) -> Table:
        columns = (Quantity("phase"), Quantity("goes to"), Quantity("of the cost", "%"), Quantity("a month", "$"))
        rows = tuple((one.phase, one.group, one.share, one.dollars_per_month) for one in self.lines)
        return Table("Where it goes", columns, rows)

    def _alternatives(self) -> Table:
        columns = (
            *(Quantity("alternative"), Quantity("per 1k", "$"), Quantity("saved", "%"), Quantity("a month", "$")),
            *(Quantity("TTFT", "s"), Quantity("TPOT", "s"), Quantity("chips"), Quantity("batch")),
            *(Quantity("in time"), Quantity("risk")),
        )

        def row(name: str, one: Served | None, *rest: Any) -> tuple[Any, ...]:
            *saved, risk = rest
            if one is None:
                return (name, *[None] * 7, "-", risk)
            each = one.dollars_per_request
            chips = f"{one.whole_chips // one.chips} x {one.chips}"
            amounts = (None if each is None else 1000 * each, *saved, one.ttft_seconds, one.tpot_seconds)
            return (name, *amounts, chips, round(one.batch, 1), "late" if one.missed else "yes", risk)

        rows = [row("now", self.now, None, None, "-")]
        for one in self.alternatives:
            risk = one.change.risk.known.removesuffix(" here")
            rows.append(row(one.change.name, one.served, one.saved, one.saved_per_month, risk))
        return Table(
            "Alternatives: dollars for 1,000 requests, and saved a month; replicas x chips; requests in flight",
            columns,
            tuple(rows),
        )

    def _risks(self) -> Table:
        columns = (Quantity("alternative"), Quantity("risk to quality"), Quantity("what is known"), Quantity("needs"))
        rows = tuple(
            (one.change.name, one.change.risk.known, one.change.risk.text, one.change.needs or "-")
            for one in self.alternatives
            if one.change.risk is not SAME or one.change.needs
        )
        return Table("Risk to quality, and how it is known", columns, rows)

    def _reasons(self) -> Iterator[Table]:
        rows = [(one.change.name, one.reason) for one in self.alternatives if one.reason]
        rows = [*([("now", self.now.missed)] if self.now.missed else []), *rows]
        if rows:
            yield Table("What does not run, or not in time", (Quantity("alternative"), Quantity("why")), tuple(rows))

    def _plot(self) -> Plot:
        shown = {"now": self.now}
        shown |= {one.change.name: one.served for one in self.alternatives if one.served and one.in_time}
        lines = {
            name: ((one.tpot_seconds, 1000 * (one.dollars_per_request or 0)),)
            for name, one in list(shown.items())[: DRAWN + 1]
        }
        return Plot("Cost against latency", Quantity("TPOT", "s"), Quantity("1k requests", "$"), lines, False, False)


def _lines(now: Served) -> tuple[Line, ...]:
    """Where a request's time goes, the largest part first: of each phase reading weights apart, whichever component
    does it, and of each component the rest."""
    amounts: dict[tuple[str, str], int] = {}
    for part in now.parts:
        phase, _, group = part.name.partition(": ")
        reading = part.reading_weights or 0
        for name, amount in (("reading weights", reading), (group, part.picoseconds - reading)):
            amounts[phase, name] = amounts.get((phase, name), 0) + amount
    month, whole = now.dollars_per_month, now.picoseconds
    shares = {key: amount / whole for key, amount in amounts.items() if amount}
    return tuple(
        Line(*key, share, None if month is None else month * share)
        for key, share in sorted(shares.items(), key=lambda one: -one[1])
    )


def advise(asked: Request) -> Advice:
    """Compiles everything that it takes. UsageError where it does not run, or nothing keeps its latencies."""
    compiler = Compiler(asked.known, asked.jobs)
    wanted = Wanted(asked.now)
    tries = 3 if asked.is_auto else 0
    (first,) = compiler.outcomes([wanted], [tries])
    now = first.served
    if now is None:
        raise UsageError(f"--mesh={asked.now.mesh}: {first.reason}")
    fewest = asked.now.placed()
    chips = sweep.mesh_of(fewest.mesh).get("tensor", 1)
    wanted = replace(wanted, times=now.chips / chips)
    listed = [*changes(asked), *_meshes(wanted, now.chips), *_batches(asked, now)]
    found = _applied(compiler, wanted, listed, now, asked)
    combined = list(_combinations(found))
    found += _applied(compiler, wanted, combined, now, asked)
    if now.missed and not any(one.in_time for one in found):
        raise UsageError(f"--scenario={asked.name}: {now.missed}; none of {len(found)} alternatives is in time")
    return Advice(asked, now, _lines(now), tuple(sorted(found, key=_rank)))


def _applied(
    compiler: Compiler, wanted: Wanted, listed: Sequence[Change], now: Served, asked: Request
) -> list[Alternative]:
    starts = [one.apply(wanted) for one in listed]
    tries = [2 if one.deployment.target != asked.now.target else 0 for one in starts]
    outcomes = compiler.outcomes(starts, tries)
    return [Alternative(change, outcome, now) for change, outcome in zip(listed, outcomes, strict=True)]


def _rank(one: Alternative) -> tuple[int, float]:
    return (2 if one.served is None else 0 if one.in_time else 1, -(one.saved or 0.0))


def _combinations(found: Sequence[Alternative]) -> Iterator[Change]:
    """The best of each part together: of those that keep quality exactly, and of those that are safe."""
    for name, is_in in (("exact", lambda risk: risk.is_exact), ("safe", lambda risk: risk.is_safe)):
        best: dict[str, Change] = {}
        for one in sorted(found, key=_rank):
            saves = one.in_time and (one.saved or 0) > 0 and is_in(one.change.risk)
            if saves and one.change.part:
                best.setdefault(one.change.part, one.change)
        if name == "safe" and all(one.risk.is_exact for one in best.values()):
            return  # the same again
        # A draft saves least where the batch is large, which others make it: with and without.
        for parts in dict.fromkeys((tuple(best), tuple(part for part in best if part != "draft"))):
            if len(parts) > 1:
                yield _together(name, [best[part] for part in sorted(parts)])  # a chip before the mesh of it


def _together(name: str, several: Sequence[Change]) -> Change:
    losses = [one.risk.loss for one in several if one.risk.loss is not None]
    worst = next((one.risk for one in several if not one.risk.is_exact), None)
    risk = SAME if worst is None else replace(worst, loss=sum(losses))
    needs = "; ".join(one.needs for one in several if one.needs)
    title = " + ".join(one.name for one in several)
    return Change(
        f"together, {name}: {title}", "", lambda one: reduce(lambda so, c: c.apply(so), several, one), risk, needs
    )


# --- the command -----------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Runs it: 0; 2 where what is given is wrong."""
    return command.run(_run, define, INTRODUCTION, argv)


def _run(values: FlagValues) -> None:
    asked = request(values)
    logdir = flags.logdir(values.logdir)
    found = advise(asked)
    if logdir is not None:
        finding.write(logdir, found.finding)
    if values.format == "json":
        print(json.dumps(found.to_json(), indent=1))
    else:
        finding.show(found.finding, values.format)


if __name__ == "__main__":
    sys.exit(main())
