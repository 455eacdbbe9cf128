"""Driver 11: what a whole request costs, and how much of that is the model that was asked.

    python -m stepbill.experiments.drivers.request --target=h200
    python -m stepbill.experiments.drivers.request --scenario=coding-agent --tool_calls=0,10,30

Around the answer stand a gateway, moderation of what comes in and goes out, a router, retrieval (embedding, search,
reranking) and post-processing. Each model among them is a published architecture of about the assumed size, compiled
and billed as a prefill; the rest are assumptions (`request.*`). A tool call is one more call of the model, which reads
all before it again, unless a cache of prefixes holds that.
"""

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from absl.flags import FlagValues

from ...profiling import chips, targets
from ...profiling.assumptions import Assumptions, load
from ...profiling.price import SECONDS_PER_HOUR
from ...profiling.roofline import PICOSECONDS
from .. import flags
from ..assumptions import facts
from ..flags import UsageError
from . import model_call
from .driver import Bills, Driver, bill, numbers, require_times
from .finding import Finding, Plot, Quantity, Table, Value, cell, power_law
from .model_call import ModelCall, Taken
from .sweep import Point

if TYPE_CHECKING:
    from ...model.config import ModelConfig

TOOL_CALLS = "0,1,3,10"
OURS = ("nano", "small")  # architectures that nobody has published
NOISE = 0.1  # what is less than this share is noise
COUNTED = (100, 300, 1000)  # model calls whose tokens are counted, to see where the exponent goes
PASSES = (0, 1, 3)  # of moderation over each text
THOUSAND = 1000  # requests, whose dollars are a number that one can read
PICODOLLARS = 10**12
CLAIM = "The calls of the model are nearly all that a request costs; what stands around them is noise."


def _define(to: flags.Definer) -> None:
    to.one_of(load().members("scenario"), "scenario", "chat-support", "whose prompts and answers (see assumptions)")
    to.string("tool_calls", TOOL_CALLS, "how many tools a request calls, with commas")
    to.count("batch", 32, "requests that are answered together")
    to.count("side_batch", 8, "requests whose texts a moderator, router or embedder reads together")
    to.string("mesh", model_call.AUTO, "chips of the model, such as tensor=2; auto: the fewest that hold the batch")


# --- what a request is made of ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Conversation:
    """Tokens of a request, by its model calls. A call reads the prompt, and what each call and tool before it said.

    prompt: of the first call, of which a cache of prefixes knows `known` from requests before. said: by who asks, all
    of it that is new. call: what is written to ask for a tool; result: what that says; answer: what is written at last.
    """

    prompt: int
    known: int
    said: int
    call: int
    result: int
    answer: int

    @classmethod
    def of(cls, scenario: str, known: Assumptions) -> "Conversation":
        """Of a scenario's mean request; the passages that are found come on top of its prompt."""
        prompt, cached, shown, hidden = (
            known.whole(f"scenario.{scenario}.{name}_tokens") for name in ("input", "cached", "output", "reasoning")
        )
        if cached > prompt:
            name = f"scenario.{scenario}.cached_tokens"
            raise UsageError(f"--assume={name}={cached}: it must be at most the prompt's {prompt} tokens")
        passages = known.whole("request.kept_passages") * known.whole("request.passage_tokens")
        call, result = known.whole("request.tool_call_tokens"), known.whole("request.tool_result_tokens")
        return cls(prompt + passages, cached, prompt - cached, call, result, shown + hidden)

    def past(self, number: int, cached: bool) -> int:
        """How much of the prompt of call `number` (from 0) is in the cache already."""
        if not cached:
            return 0
        return self.held(number) - self.result if number else self.known

    def held(self, number: int) -> int:
        """Tokens of the prompt of call `number`."""
        return self.prompt + number * (self.call + self.result)

    def read(self, tools: int, cached: bool) -> int:
        """Tokens that the model reads in all, with so many tool calls."""
        return sum(self.held(n) - self.past(n, cached) for n in range(tools + 1))

    def written(self, number: int, tools: int) -> int:
        """By call `number`, of `tools` and one."""
        return self.answer if number == tools else self.call

    def longest(self, tools: int) -> int:
        """Positions at the end."""
        return self.held(tools) + self.answer


@dataclass(frozen=True)
class Side:
    """A small model beside the one that was asked: `texts` of `tokens` each are read in one step, for `requests`."""

    name: str
    wanted: int  # parameters
    tokens: int
    texts: int
    requests: int

    @property
    def config(self) -> "ModelConfig":
        """The published dense architecture that takes such texts and is nearest in parameters, by their ratio."""
        from ...model.architectures import ARCHITECTURES

        fitting = [
            config
            for config in ARCHITECTURES.values()
            if config.name not in OURS and config.experts is None and config.max_context >= self.tokens
        ]
        if not fitting:
            raise UsageError(f"{self.name} reads {self.tokens} tokens at once, which no architecture here takes")
        return min(fitting, key=lambda config: abs(math.log(config.parameters / self.wanted)))

    def point(self, target: str) -> Point:
        return Point(self.config, "prefill", self.texts, self.tokens, target)


@dataclass(frozen=True)
class Plan:
    """Everything to compile for one command line, and the assumptions it rests on."""

    target: str
    conversation: Conversation
    tools: tuple[int, ...]
    sides: Mapping[str, Side]
    model: tuple[Point, ...]

    @property
    def points(self) -> list[Point]:
        return [*self.model, *(side.point(self.target) for side in self.sides.values())]


def _plan(values: FlagValues, known: Assumptions) -> Plan:
    require_times(values.target)
    tools = numbers("tool_calls", values.tool_calls, least=0)
    usual = known.whole("request.tool_calls")
    talk = Conversation.of(values.scenario, known)
    sides = _sides(talk, known, values.side_batch, any((*tools, usual)))
    longest = max(*tools, usual)
    config = flags.model_config(values, "decode")
    model = model_call.points(
        *(config, values.target, values.mesh, values.batch),
        prompt=talk.held(longest),
        longest=talk.longest(longest),
    )
    return Plan(values.target, talk, tuple(tools), sides, tuple(model))


def _sides(talk: Conversation, known: Assumptions, batch: int, has_tools: bool) -> dict[str, Side]:
    """What is read by which small model; a text without tokens is read by none."""

    def size(name: str) -> int:
        return known.whole(f"request.{name}_parameters")

    question, passages = known.whole("request.embedding_tokens"), known.whole("request.rerank_passages")
    moderated = {"prompt": talk.said, "answer": talk.answer}
    moderated |= {"result": talk.result, "call": talk.call} if has_tools else {}
    sides = {text: Side("moderation", size("moderation"), n, batch, batch) for text, n in moderated.items() if n}
    if n := known.whole("request.router_tokens"):
        sides["router"] = Side("router", size("router"), n, batch, batch)
    if question and passages:
        sides["embedding"] = Side("embedding", size("embedding"), question, batch, batch)
        pair = question + known.whole("request.passage_tokens")
        sides["rerank"] = Side("rerank", size("rerank"), pair, passages, 1)
    return sides


@dataclass(frozen=True)
class Line:
    """Of a request. stage: what begins with the same number runs at one time; picodollars: so that lines add up."""

    stage: str
    name: str
    what: str
    picoseconds: int
    picodollars: int
    command: str | None = None

    @property
    def dollars(self) -> float:
        return self.picodollars / PICODOLLARS

    @property
    def is_model(self) -> bool:
        return self.name.startswith("model")


@dataclass(frozen=True)
class Whole:
    """A request, line by line. first_picoseconds: until the model has written its first token."""

    lines: tuple[Line, ...]
    first_picoseconds: int

    @property
    def picodollars(self) -> int:
        return sum(line.picodollars for line in self.lines)

    @property
    def dollars(self) -> float:
        return self.picodollars / PICODOLLARS

    @property
    def picoseconds(self) -> int:
        """From its arrival to its end: of the lines of stage 2, which run at once, the slowest branch alone."""
        branches: dict[str, int] = {}
        for line in self.lines:
            if line.stage.startswith("2"):
                branches[line.stage] = branches.get(line.stage, 0) + line.picoseconds
        series = sum(line.picoseconds for line in self.lines if not line.stage.startswith("2"))
        return series + max(branches.values(), default=0)

    @property
    def model_share(self) -> float:
        """Of its dollars, the calls of the model."""
        return sum(line.picodollars for line in self.lines if line.is_model) / self.picodollars


@dataclass(frozen=True)
class Pricer:
    """Lines of one plan, from its bills."""

    plan: Plan
    call: ModelCall
    bills: Bills
    known: Assumptions
    dollars_per_hour: float

    def request(self, tools: int, cached: bool, passes: int | None = None) -> Whole:
        """With so many tool calls, and with or without a cache of prefixes. passes: of moderation; None: as assumed."""
        talk, known = self.plan.conversation, self.known
        reads = [self.call.read(talk.held(n) - talk.past(n, cached), talk.past(n, cached)) for n in range(tools + 1)]
        writes = [self.call.write(talk.written(n, tools), talk.held(n)) for n in range(tools + 1)]
        passes_in, passes_out = (
            known.whole(f"request.moderation_passes_{way}") if passes is None else passes for way in ("in", "out")
        )
        model = self.plan.model[0].config.name
        read, wrote = talk.read(tools, cached), sum(talk.written(n, tools) for n in range(tools + 1))
        lines = [
            self._assumed("1", "gateway", "gateway"),
            self._side("2a", "moderation of the prompt", "prompt", passes_in),
            self._side("2b", "router", "router"),
            self._side("2c", "embedding", "embedding"),
            self._assumed("2c", "vector search", "vector_search"),
            self._side("2c", "rerank", "rerank"),
            self._model("model: reading", f"{model}, {read:,} tokens in {_counted(tools + 1, 'call')}", reads),
            self._model("model: writing", f"{model}, {wrote:,} tokens", writes),
        ]
        if tools:
            lines += [
                self._side("3", "moderation of what asks for tools", "call", passes_out, tools),
                self._assumed("3", "tools", "tool", tools),
                self._side("3", "moderation of what tools say", "result", passes_in, tools),
            ]
        lines += [
            self._side("4", "moderation of the answer", "answer", passes_out),
            self._assumed("5", "post-processing", "post_processing"),
        ]
        found = tuple(line for line in lines if line)
        before = Whole(tuple(line for line in found if line.stage[0] in "12"), 0).picoseconds
        return Whole(found, before + reads[0].picoseconds)

    def _model(self, name: str, what: str, parts: Sequence[Taken]) -> Line:
        taken = sum(parts, Taken())
        return Line("3", name, what, taken.picoseconds, self._picodollars(taken.chip_picoseconds))

    def _side(self, stage: str, name: str, key: str, passes: int = 1, times: int = 1) -> Line | None:
        """Passes of one text run at once, each on a chip; each of the `times` after the one before."""
        side = self.plan.sides.get(key)
        if side is None or not passes:
            return None
        found = bill(self.bills, point := side.point(self.plan.target)).total.picoseconds
        count = "" if passes * times == 1 else f"{passes * times} x "
        texts = "" if side.requests > 1 else f"{side.texts} texts of "
        what = f"{count}{side.config.name}, {texts}{side.tokens} tokens"
        cost = self._picodollars(round(found * passes * times / side.requests))
        return Line(stage, name, what, found * times, cost, point.command)

    def _assumed(self, stage: str, name: str, fact: str, times: int = 1) -> Line:
        seconds = self.known.number(f"request.{fact}_seconds")
        dollars = self.known.number(f"request.{fact}_dollars")
        what = "assumed" if times == 1 else f"{times} x, assumed"
        return Line(stage, name, what, round(seconds * PICOSECONDS) * times, round(dollars * PICODOLLARS) * times)

    def _picodollars(self, chip_picoseconds: int) -> int:
        return round(chip_picoseconds * self.dollars_per_hour / SECONDS_PER_HOUR)

    @cached_property
    def by_tools(self) -> dict[tuple[int, bool], Whole]:
        """(tool calls, whether with a cache of prefixes) -> the request."""
        return {(n, cached): self.request(n, cached) for n in self.plan.tools for cached in (True, False)}


# --- the finding -----------------------------------------------------------------------------------------------------


def _points(values: FlagValues) -> list[Point]:
    return _plan(values, facts(values)).points


def _find(values: FlagValues, bills: Bills, known: Assumptions) -> Finding:
    plan = _plan(values, known)
    hourly = chips.priced(targets.chip(values.target), known).dollars_per_hour
    if hourly is None:
        raise UsageError(f"--target={values.target}: it has no price, and what stands around the model has one only")
    pricer = Pricer(plan, ModelCall.of(plan.model, bills), bills, known, hourly)
    usual = pricer.request(known.whole("request.tool_calls"), cached=True)
    by_tools = pricer.by_tools
    shares = {key: whole.model_share for key, whole in by_tools.items()}
    holds = min((usual.model_share, *shares.values())) >= 1 - NOISE
    fewest, most = plan.tools[0], plan.tools[-1]
    around = max((line for line in usual.lines if not line.is_model), key=lambda line: line.picodollars)
    search = known.number("request.web_search_dollars")
    seconds = sum(line.picoseconds for line in usual.lines if line.is_model) / usual.picoseconds
    evidence = (
        f"Of the {cell(THOUSAND * usual.dollars, '$')} $ of 1,000 requests {usual.model_share:.0%} are calls of the "
        f"model, though they are {seconds:.0%} of the time; of the rest {around.name} is most, "
        f"{around.picodollars / usual.picodollars:.0%} of it all. With {most} tool calls instead of {fewest} a request "
        f"costs {_ratio(by_tools, most, fewest, True):.1f} times as much with a cache of prefixes and "
        f"{_ratio(by_tools, most, fewest, False):.1f} times without, where the model is {shares[most, False]:.0%} of "
        f"it. One search of the web that is bought ({search:g} $) costs as much as {search / usual.dollars:.0f} whole "
        "requests."
    )
    lengths = [(n + 1, plan.conversation.read(n, cached=False)) for n in plan.tools]
    counted = {
        f"tokens read, {COUNTED[0]} to {COUNTED[-1]} model calls, {'with' if cached else 'without'} a cache": power_law(
            [(n, plan.conversation.read(n - 1, cached)) for n in COUNTED]
        )
        for cached in (False, True)
    }
    near = f"tokens read, {lengths[0][0]} to {lengths[-1][0]} model calls, without a cache"
    fits = ({near: power_law(lengths)} if len(lengths) > 1 else {}) | counted
    return Finding(
        REQUEST.name,
        REQUEST.question,
        values.target,
        CLAIM,
        holds,
        evidence,
        REQUEST.command(values),
        (_lines(usual), _tools(pricer), _passes(pricer), _models(plan, bills)),
        _plots(pricer),
        fits,
        notes=(
            "times and dollars of models are the roofline's, a lower bound; their chips are taken to be always busy",
            f"the model answers {values.batch} requests at a time on {_counted(pricer.call.chips, 'chip')} and reads "
            f"each prompt alone; moderators, router and embedder read {values.side_batch} texts in one step, the "
            "reranker one request's passages",
            "stages follow each other; 2a, 2b and 2c run at one time, and of these the slowest counts; passes of "
            "moderation over one text run at one time; with tools, stage 3 is a loop; the first token is there before "
            "the answer is moderated",
            "what the cache of prefixes keeps while a tool runs is taken to cost nothing",
            f"tokens of {COUNTED[0]} calls and more are counted, not compiled",
        ),
        headline=f"{1 - usual.model_share:.0%} of a request is not its model's calls",
    )


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" + "s" * (number != 1)


def _ratio(by_tools: Mapping[tuple[int, bool], Whole], most: int, fewest: int, cached: bool) -> float:
    return by_tools[most, cached].picodollars / by_tools[fewest, cached].picodollars


def _lines(whole: Whole) -> Table:
    columns = (
        *(Quantity("stage"), Quantity("line"), Quantity("what")),
        *(Quantity("time", "s"), Quantity("1,000 requests", "$"), Quantity("of the cost", "%")),
    )
    rows: list[tuple[Value, ...]] = [
        (
            *(line.stage, line.name, line.what, line.picoseconds * 1e-12, THOUSAND * line.dollars),
            line.picodollars / whole.picodollars,
        )
        for line in whole.lines
    ]
    rows.append(
        ("", "the request", "from its arrival to its end", whole.picoseconds * 1e-12, THOUSAND * whole.dollars, 1.0)
    )
    return Table(
        "One request, with a cache of prefixes", columns, tuple(rows), (*(line.command for line in whole.lines), None)
    )


def _tools(pricer: Pricer) -> Table:
    columns = (
        *(
            Quantity("tool calls"),
            Quantity("cache of prefixes"),
            Quantity("tokens read"),
            Quantity("1,000 requests", "$"),
        ),
        *(Quantity("the model's calls", "%"), Quantity("beside the first row", "x")),
        *(Quantity("to the first token", "s"), Quantity("to the end", "s")),
    )
    first = next(iter(pricer.by_tools.values()))
    rows = tuple(
        (
            *(tools, "yes" if cached else "no", pricer.plan.conversation.read(tools, cached), THOUSAND * whole.dollars),
            *(whole.model_share, whole.picodollars / first.picodollars),
            *(whole.first_picoseconds * 1e-12, whole.picoseconds * 1e-12),
        )
        for (tools, cached), whole in pricer.by_tools.items()
    )
    return Table("Tool calls: each is one more call of the model", columns, rows)


def _passes(pricer: Pricer) -> Table:
    columns = (
        *(Quantity("passes"), Quantity("tool calls"), Quantity("1,000 requests", "$")),
        *(Quantity("moderation of the cost", "%"), Quantity("moderation of the time", "s")),
    )
    rows = []
    for tools in dict.fromkeys((pricer.plan.tools[0], pricer.plan.tools[-1])):
        for passes in PASSES:
            whole = pricer.request(tools, True, passes)
            safety = [line for line in whole.lines if line.name.startswith("moderation")]
            share = sum(line.picodollars for line in safety) / whole.picodollars
            seconds = sum(line.picoseconds for line in safety) * 1e-12
            rows.append((passes, tools, THOUSAND * whole.dollars, share, seconds))
    return Table("Passes of moderation over each text, with a cache of prefixes", columns, tuple(rows))


def _models(plan: Plan, bills: Bills) -> Table:
    columns = (
        *(Quantity("model"), Quantity("reads"), Quantity("stands for, parameters"), Quantity("is")),
        *(Quantity("parameters"), Quantity("texts in a step"), Quantity("tokens of each"), Quantity("a step", "s")),
    )
    rows = tuple(
        (
            *(side.name, key if side.name == "moderation" else "", side.wanted, side.config.name),
            *(side.config.parameters, side.texts, side.tokens, bill(bills, side.point(plan.target)).total.seconds),
        )
        for key, side in plan.sides.items()
    )
    commands = tuple(side.point(plan.target).command for side in plan.sides.values())
    return Table("The small models around it", columns, rows, commands)


def _plots(pricer: Pricer) -> tuple[Plot, ...]:
    x = Quantity("calls of the model")
    named = {True: "with a cache of prefixes", False: "without"}

    def drawn(amount: "dict[tuple[int, bool], float]") -> dict[str, tuple[tuple[float, float], ...]]:
        return {
            name: tuple((tools + 1, amount[tools, cached]) for tools in pricer.plan.tools)
            for cached, name in named.items()
        }

    tokens = {key: float(pricer.plan.conversation.read(*key)) for key in pricer.by_tools}
    dollars = {key: whole.dollars for key, whole in pricer.by_tools.items()}
    return (
        Plot("Tokens that the model reads for one request", x, Quantity("tokens"), drawn(tokens)),
        Plot("Cost of one request", x, Quantity("cost", "$"), drawn(dollars)),
    )


REQUEST = Driver(
    "request", "What does a whole request cost beside the model's answer?", _define, _points, _find, "llama3-8b"
)
main = REQUEST.main

if __name__ == "__main__":
    sys.exit(main())
