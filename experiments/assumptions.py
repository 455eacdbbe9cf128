"""`python -m stepbill.experiments.assumptions`: every fact about the world that results rest on, with source and date.

And what a command needs to take other values for them by flag, and to print those that it used.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags as absl_flags

from ..profiling import render
from ..profiling.assumptions import Assumption, Assumptions, Value, load
from . import command, flags

INTRODUCTION = """assumptions: prices, power, rules of tokenisation, published runs and what is merely assumed

  python -m stepbill.experiments.assumptions
  python -m stepbill.experiments.assumptions --only=power --assume=power.pue=1.1 --format=json
"""


class _Assume(absl_flags.ArgumentParser[Any]):
    """`power.pue=1.1` -> ("power.pue", 1.1)."""

    syntactic_help = "NAME=VALUE, such as power.pue=1.1"

    def parse(self, argument: Any) -> tuple[str, Value]:
        name, equals, value = (part.strip() for part in str(argument).partition("="))
        if not equals:
            raise ValueError(f"it must be {self.syntactic_help}")
        return name, load().entry(name).instead(value).value


def define_assume(to: flags.Definer) -> None:
    """Adds --assume, which `facts` reads."""
    to.several(
        _Assume(),
        "assume",
        "NAME=VALUE instead of what stepbill.experiments.assumptions prints; several times, each",
    )


def facts(values: absl_flags.FlagValues) -> Assumptions:
    """All facts, with those of --assume in their place (of one that is given twice, the latter); none used yet."""
    return load(dict(values.assume))


def as_json(entries: Sequence[Assumption], oldest_price: Assumption | None) -> dict[str, Any]:
    """The facts, and the date of the price that is the oldest of them."""
    oldest = oldest_price and {"name": oldest_price.name, "date": oldest_price.date}
    return {"schema": 1, "oldest_price": oldest, "assumptions": [entry.to_json() for entry in entries]}


def text(entries: Sequence[Assumption], oldest_price: Assumption | None) -> str:
    """The same as a table, each source once below it, and then what is to be said of single ones."""
    if not entries:
        return "no assumption was used\n"
    sources = {source: n for n, source in enumerate(dict.fromkeys(e.source for e in entries if e.source), 1)}
    rows = [_row(entry, sources) for entry in entries]
    lines = [f"[{n}] {source}" for source, n in sources.items()]
    lines += ["", *(f"{entry.name}: {entry.note}" for entry in entries if entry.note)]
    if oldest_price:
        lines += ["", f"oldest price: {oldest_price.name}, {oldest_price.date}"]
    return render.columns(rows) + "\n" + "\n".join(lines) + "\n"


def _row(entry: Assumption, sources: Mapping[str, int]) -> dict[str, str]:
    said = "-" if entry.low is None or entry.high is None else f"{_number(entry.low)} to {_number(entry.high)}"
    instead = f", instead of {_number(entry.default)}" if entry.default is not None else ""
    return {
        "name": entry.name,
        "value": _number(entry.value),
        "unit": entry.unit,
        "range": said,
        "status": entry.status + instead,
        "date": entry.date or "-",
        "source": f"[{sources[entry.source]}]" if entry.source else "-",
    }


def _number(value: Value) -> str:
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:g}"


def define(values: absl_flags.FlagValues) -> None:
    """Adds every flag."""
    to = flags.Definer(values)
    to.string("only", None, "those of one table alone, such as api or scenario.coding-agent")
    define_assume(to)
    to.one_of(("table", "json"), "format", "table", "how to print: table or json")
    flags.define_help(to)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs it: 0; 2 where the flags are wrong."""
    return command.run(_run, define, INTRODUCTION, argv)


def _run(values: absl_flags.FlagValues) -> None:
    everything = facts(values)
    within = f"{values.only}." if values.only else ""
    for name in everything.entries:
        if f"{name}.".startswith(within):
            everything.entry(name)
    if not everything.used:
        tables = sorted({entry.path[0] for entry in everything.entries.values()})
        raise flags.UsageError(f"--only={values.only}: there is no such table; the first parts are {', '.join(tables)}")
    if values.format == "json":
        sys.stdout.write(json.dumps(as_json(everything.used, everything.oldest_price), indent=1) + "\n")
    else:
        sys.stdout.write(text(everything.used, everything.oldest_price))


if __name__ == "__main__":
    sys.exit(main())
