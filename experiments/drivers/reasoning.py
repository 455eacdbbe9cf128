"""Driver 8: what tokens cost that are thought and not shown.

    python -m stepbill.experiments.drivers.reasoning --target=h200
    python -m stepbill.experiments.drivers.reasoning --assume=reasoning.hidden_per_visible=10

An answer of so many visible tokens is written after as many hidden ones as models were seen to write (`reasoning.*`).
All of them are decode steps, each with the cache of all before it: a later token reads more of it than an earlier one.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from absl.flags import FlagValues

from ...profiling import chips, targets
from ...profiling.assumptions import ApiPrice, Assumptions
from ...profiling.price import SECONDS_PER_HOUR
from ...profiling.roofline import PICOSECONDS
from .. import flags
from ..assumptions import facts
from . import model_call
from .driver import Bills, Driver, require_times
from .finding import Finding, Plot, Quantity, Table, cell, power_law
from .model_call import ModelCall
from .sweep import Point

NONE, USUAL = "none", "basic questions"
APIS = ("gpt-5", "claude-sonnet-5.5", "gemini-2.5-pro", "deepseek-r1")  # of models that reason
KEPT = (1.0, 0.5, 0.25, 0.0)  # of the hidden tokens
NEAR = 0.1
MILLION = 1_000_000
CLAIM = "With h hidden tokens for each visible one, an answer costs 1 + h times as much and takes 1 + h times as long."


def _define(to: flags.Definer) -> None:
    to.count("prompt_tokens", 1024, "of the question")
    to.count("visible_tokens", 256, "of the answer that is shown")
    to.count("batch", 32, "requests that are answered together")
    to.string("mesh", model_call.AUTO, "chips of the model, such as tensor=2; auto: the fewest that hold the batch")


def _ratios(known: Assumptions) -> dict[str, float]:
    """Kind of question -> hidden tokens for each visible one."""
    puzzles = known.entry("reasoning.hidden_per_visible_puzzles")
    found = {
        NONE: 0.0,
        "mathematics": known.number("reasoning.hidden_per_visible_math"),
        USUAL: known.number("reasoning.hidden_per_visible"),
        "puzzles": known.number("reasoning.hidden_per_visible_puzzles"),
    }
    return found if puzzles.high is None else found | {"puzzles, 90th percentile": puzzles.high}


def _longer(hidden: float, known: Assumptions) -> float:
    """Hidden tokens for each visible one, of a model with open weights where a closed one takes `hidden`."""
    return known.number("reasoning.open_over_closed") * (1 + hidden) - 1


@dataclass(frozen=True)
class Answer:
    """With its hidden tokens, `ratio` for each visible one.

    chip_picoseconds: of one busy chip, `writing` of them in decode steps. fit: how many caches of that length there is
    room for.
    """

    ratio: float
    hidden: int
    visible: int
    chip_picoseconds: int
    writing: int
    first_seconds: float
    seconds: float
    fit: int

    @classmethod
    def of(cls, ratio: float, visible: int, prompt: int, call: ModelCall) -> "Answer":
        hidden = round(ratio * visible)
        read, wrote = call.read(prompt), call.write(hidden + visible, prompt)
        first = read + call.write(hidden + 1, prompt)
        whole = read + wrote
        return cls(
            *(ratio, hidden, visible, whole.chip_picoseconds, wrote.chip_picoseconds, first.seconds, whole.seconds),
            call.positions // (prompt + hidden + visible),
        )

    def dollars(self, hourly: float | None) -> float | None:
        """Of the answer."""
        return None if hourly is None else self.chip_picoseconds / PICOSECONDS * hourly / SECONDS_PER_HOUR

    def per_million(self, hourly: float | None) -> float | None:
        """Dollars for a million visible tokens."""
        dollars = self.dollars(hourly)
        return None if dollars is None else dollars / self.visible * MILLION


def _points(values: FlagValues) -> list[Point]:
    require_times(values.target)
    known = facts(values)
    ratios = _ratios(known)
    most = max(*ratios.values(), _longer(ratios[USUAL], known))
    longest = values.prompt_tokens + values.visible_tokens + round(most * values.visible_tokens)
    config = flags.model_config(values, "decode")
    return model_call.points(config, values.target, values.mesh, values.batch, values.prompt_tokens, longest)


def _find(values: FlagValues, bills: Bills, known: Assumptions) -> Finding:
    call = ModelCall.of(_points(values), bills)
    hourly = chips.priced(targets.chip(values.target), known).dollars_per_hour
    ratios = _ratios(known)

    def answer(ratio: float) -> Answer:
        return Answer.of(ratio, values.visible_tokens, values.prompt_tokens, call)

    answers = {kind: answer(ratio) for kind, ratio in ratios.items()}
    none, usual, most = answers[NONE], answers[USUAL], max(answers.values(), key=lambda one: one.ratio)
    shorter = {f"{kept:.0%} of them": answer(kept * usual.ratio) for kept in KEPT}
    shorter["open weights, same questions"] = answer(_longer(usual.ratio, known))
    written = [(one.hidden + one.visible, one.writing) for one in answers.values()]
    law = power_law(written) if len({tokens for tokens, _ in written}) > 1 and min(written)[1] else None
    wrong = [_beside(one, none) for one in answers.values() if one.hidden]
    holds = None
    if wrong and none.writing:
        holds = all(abs(cost - 1) <= NEAR and abs(late - 1) <= NEAR for cost, late in wrong)
    return Finding(
        REASONING.name,
        REASONING.question,
        values.target,
        CLAIM,
        holds,
        _evidence(none, usual, most) if none.writing else "An answer of one token cannot tell.",
        REASONING.command(values),
        (
            _answers("Hidden tokens", answers, none, hourly),
            _positions(call, values.prompt_tokens, hourly),
            _answers(f"Shorter reasoning, from {usual.ratio:g} hidden tokens a visible one", shorter, usual, hourly),
            _listed(values, known, usual.ratio, none, usual, hourly),
        ),
        _plots(answers, call),
        {"cost of writing, by tokens written": law} if law else {},
        notes=(
            f"an answer of {values.visible_tokens} visible tokens to a prompt of {values.prompt_tokens}; "
            f"{values.batch} of them at a time on {call.chips} x {values.target}, prompts read one by one",
            "times and dollars are the roofline's, a lower bound, of chips that are always busy",
            "list prices are of other, larger models; what can be compared is how they grow",
            "with fewer hidden tokens answers may be worse: how much is not told here",
        ),
        headline=f"{usual.ratio:g} hidden tokens a visible one: {_cost(usual, none):.1f} times the cost",
        factor=max(1.0, _cost(usual, none)),
    )


def _evidence(none: Answer, usual: Answer, most: Answer) -> str:
    return (
        f"With {usual.ratio:g} hidden tokens a visible one ({USUAL}) an answer costs {_cost(usual, none):.1f} times as "
        f"much and takes {usual.seconds / none.seconds:.1f} times as long; with {most.ratio:g} "
        f"{_cost(most, none):.1f} times, not {1 + most.ratio:.0f}: the prompt is read once either way, but writing "
        f"alone costs {most.writing / none.writing:.1f} times, for later tokens read a longer cache. The first visible "
        f"token comes after {cell(usual.first_seconds, 's')} instead of {cell(none.first_seconds, 's')}, "
        f"{usual.first_seconds / none.first_seconds:.0f} times as late."
    )


def _cost(one: Answer, other: Answer) -> float:
    return one.chip_picoseconds / other.chip_picoseconds


def _beside(one: Answer, none: Answer) -> tuple[float, float]:
    """(cost, time) of an answer over 1 + h times those of one without hidden tokens."""
    times = 1 + one.ratio
    return _cost(one, none) / times, one.seconds / none.seconds / times


def _answers(title: str, answers: Mapping[str, Answer], beside: Answer, hourly: float | None) -> Table:
    columns = (
        *(Quantity("questions"), Quantity("hidden a visible one"), Quantity("hidden tokens")),
        *(Quantity("1 M visible tokens", "$"), Quantity("cost", "x"), Quantity("cost of writing", "x")),
        *(Quantity("to the first visible", "s"), Quantity("to the end", "s"), Quantity("answers that fit at once")),
    )
    rows = tuple(
        (
            *(kind, one.ratio, one.hidden, one.per_million(hourly), _cost(one, beside)),
            one.writing / beside.writing if beside.writing else None,
            *(one.first_seconds, one.seconds, one.fit),
        )
        for kind, one in answers.items()
    )
    return Table(title, columns, rows)


def _positions(call: ModelCall, prompt: int, hourly: float | None) -> Table:
    """What the next token takes, by how many positions are there."""
    columns = (
        *(Quantity("positions before it"), Quantity("a token", "s"), Quantity("1 M tokens", "$")),
        Quantity("beside the first", "x"),
    )
    at = [prompt, *(context for context in call.grid.contexts if context > prompt)]
    first = _next(call, prompt)
    rows = []
    for position in at:
        time = _next(call, position)
        dollars = None if hourly is None else time * call.chips / call.batch * hourly / SECONDS_PER_HOUR * MILLION
        rows.append((position, time, dollars, time / first))
    return Table(f"The next token, {call.batch} requests at a time", columns, tuple(rows))


def _next(call: ModelCall, position: int) -> float:
    """Seconds of the decode step with so many positions in each cache."""
    return call.grid.decode(call.batch, call.batch * position) / PICOSECONDS


def _listed(
    values: FlagValues, known: Assumptions, ratio: float, none: Answer, usual: Answer, hourly: float | None
) -> Table:
    columns = (
        Quantity("price list"),
        Quantity("1 M visible tokens, none hidden", "$"),
        Quantity(f"with {ratio:g} hidden each", "$"),
        Quantity("times", "x"),
    )
    rows: list[tuple[str, float | None, float | None, float]] = [
        ("the bills here", none.per_million(hourly), usual.per_million(hourly), _cost(usual, none))
    ]
    for name in APIS:
        price = known.record(ApiPrice, f"api.{name}")
        without, thought = (
            price.dollars(values.prompt_tokens, one.visible + one.hidden) / one.visible * MILLION
            for one in (none, usual)
        )
        rows.append((name, without, thought, thought / without))
    return Table("Beside lists of prices, where hidden tokens are sold as output", columns, tuple(rows))


def _plots(answers: Mapping[str, Answer], call: ModelCall) -> tuple[Plot, ...]:
    ordered = sorted(answers.values(), key=lambda one: one.ratio)
    times: dict[str, Sequence[tuple[float, float]]] = {
        "to the first visible token": [(1 + one.ratio, one.first_seconds) for one in ordered],
        "to the end": [(1 + one.ratio, one.seconds) for one in ordered],
    }
    curve = tuple((position, _next(call, position)) for position in call.grid.contexts)
    return (
        Plot(
            "Seconds until an answer is seen",
            Quantity("tokens written for each visible one"),
            Quantity("time", "s"),
            {name: tuple(points) for name, points in times.items()},
        ),
        Plot(
            "Time of one more token",
            Quantity("positions before it"),
            Quantity("time", "s"),
            {f"{call.batch} at a time": curve},
            log_y=False,
        ),
    )


REASONING = Driver(
    "reasoning", "What do tokens cost that are thought and not shown?", _define, _points, _find, "llama3-8b"
)
main = REASONING.main

if __name__ == "__main__":
    sys.exit(main())
