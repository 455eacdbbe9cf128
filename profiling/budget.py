"""A pytest plugin: what a program costs is recorded beside the test, and a test fails once it costs more.

    def test_decode_cost(cost_budget):
        cost_budget(jax.jit(decode_step), params, cache, tokens, target="h200")

`pytest --budget-update` records. From then on the test fails where FLOPs, HBM bytes by role, taxes, peak memory, bytes
on links or instructions without a cost rule grow by more than the tolerance; what falls by more is a warning, for a
budget that is too high holds nothing. Installed with stepbill (entry point pytest11); pytest itself is not required.

The budgets of tests/test_x.py are in tests/test_x.budgets.json, by test, by target and by release line of jax ("0.10"),
because another jax brings another compiler: a project that supports two of them has a budget for each. With a line that
has no budget of its own, the nearest older one holds (else the nearest newer): an upgrade that makes the program more
costly is what one wants to hear of, and one that does not needs no new budgets.
"""

import json
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from . import render
from .bill import Bill
from .itemize import itemize

SCHEMA = 1
TOLERANCE = 0.01
SMALL = 0.01  # what is a smaller share of all FLOPs or bytes is held as if it were that much: it does not matter alone
UPDATE = "--budget-update"
SUFFIX = ".budgets.json"
ROW = ("FLOPs", "HBM bytes")  # what is recorded of a row
MOST_ROWS = 12  # in a message

Entry = dict[str, Any]  # what one program costs: see `entry_of`
Key = tuple[str, str, str]  # test, target, release line of jax


class CostFell(UserWarning):
    """A program costs less than its budget, by more than the tolerance."""


# --- what is recorded ----------------------------------------------------------------------------------------------


def entry_of(bill: Bill) -> Entry:
    """`costs`, which are held to; and `rows`, which say where a cost has grown: [FLOPs, HBM bytes] of each."""
    total = bill.total
    costs = {"matmul FLOPs": total.matmul, "other FLOPs": total.elementwise + total.transcendental}
    for role in sorted({*total.hbm_read, *total.hbm_write}):
        costs[f"HBM bytes: {role}"] = total.hbm_read.get(role, 0) + total.hbm_write.get(role, 0)
    for tax in sorted({row.tax for row in bill.rows if row.tax}):
        work = bill.tax(tax)
        costs |= {f"tax: {tax}, FLOPs": work.flops, f"tax: {tax}, HBM bytes": work.hbm_bytes}
    costs["link bytes"] = total.link_bytes
    costs["host link bytes"] = total.host_link_bytes
    costs["peak memory bytes"] = bill.memory.get("peak_bytes") or 0
    costs["instructions without a cost rule"] = len(bill.unknown)
    rows = {render.row_name(row.component, row.phase, row.tax): row.work for row in bill.rows}
    rows[render.row_name(None)] = bill.unattributed
    return {
        "jax": metadata.version("jax"),
        "costs": {name: amount for name, amount in costs.items() if amount},
        "rows": {name: [work.flops, work.hbm_bytes] for name, work in rows.items() if work},
    }


def grown(before: Mapping[str, int], now: Mapping[str, int], tolerance: float) -> dict[str, tuple[int, int]]:
    """The costs that have grown by more than is allowed, as (before, now); those that have grown most come first.

    `tolerance`: of a cost, or of SMALL of all FLOPs or all HBM bytes where that is more. Without it, none may grow.
    """
    found: dict[str, tuple[int, int]] = {}
    for name in {**before, **now}:
        was, amount = before.get(name, 0), now.get(name, 0)
        if amount > was + tolerance * max(was, SMALL * _whole(before, name)):
            found[name] = was, amount

    def growth(name: str) -> float:
        was, amount = found[name]
        return (amount - was) / max(was, SMALL * _whole(before, name), 1)

    return {name: found[name] for name in sorted(found, key=growth, reverse=True)}


def _whole(costs: Mapping[str, int], name: str) -> int:
    """All that a cost is a part of."""
    if name.endswith("FLOPs"):
        return sum(costs.get(kind, 0) for kind in ("matmul FLOPs", "other FLOPs"))
    return sum(amount for kind, amount in costs.items() if kind.startswith("HBM bytes")) if "HBM bytes" in name else 0


def nearest(lines: Iterable[str], line: str) -> str | None:
    """Of the release lines that have a budget: this one, else the nearest older one, else the nearest newer one."""

    def order(name: str) -> tuple[int, ...]:
        return tuple(map(int, name.split(".")))

    older = [one for one in lines if order(one) <= order(line)]
    newer = [one for one in lines if order(one) > order(line)]
    return max(older, key=order) if older else min(newer, key=order, default=None)


def _line() -> str:
    return ".".join(metadata.version("jax").split(".")[:2])


# --- the file beside the test --------------------------------------------------------------------------------------


def path_of(test_file: Path) -> Path:
    """tests/test_x.py -> tests/test_x.budgets.json."""
    return test_file.with_name(test_file.stem + SUFFIX)


def read(path: Path) -> dict[str, Any]:
    """test -> target -> release line -> entry. ValueError where the file is not what `write` wrote."""
    if not path.exists():
        return {}
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        if saved["schema"] != SCHEMA:
            raise ValueError(f"its schema is {saved['schema']!r}, and {SCHEMA} is wanted")
        for targets in saved["budgets"].values():
            for entries in targets.values():
                nearest(entries, "0.0")
                for entry in entries.values():
                    rows = entry["rows"].values()
                    numbers = [*entry["costs"].values(), *(number for row in rows for number in row)]
                    if any(type(number) is not int for number in numbers) or {*map(len, rows)} - {len(ROW)}:
                        raise ValueError(f"of jax {entry['jax']}, an amount is no whole number or missing")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a file of budgets ({error})") from None
    return saved["budgets"]


def write(path: Path, entries: Mapping[Key, Entry]) -> None:
    """Puts these into the file; the others in it stay."""
    budgets = read(path)
    for (test, target, line), entry in entries.items():
        budgets.setdefault(test, {}).setdefault(target, {})[line] = entry
    text = json.dumps({"schema": SCHEMA, "budgets": budgets}, indent=1, sort_keys=True)
    text = re.sub(r"\[\s+(\d+),\s+(\d+)\s+\]", r"[\1, \2]", text)  # a row a line
    path.write_text(text + "\n", encoding="utf-8")


# --- what fails ----------------------------------------------------------------------------------------------------


def _over(before: Entry, now: Entry, found: Mapping[str, tuple[int, int]]) -> list[str]:
    """What has grown, most first, and in which rows."""
    said = [f"  {name}: {_step(*amounts)}" for name, amounts in found.items()]
    rows = []
    whole = [max(1, sum(row[n] for row in now["rows"].values())) for n in range(len(ROW))]
    for name in {**before["rows"], **now["rows"]}:
        steps = list(zip(*(entry["rows"].get(name, [0, 0]) for entry in (before, now)), strict=True))
        # FLOPs and bytes have no measure in common but their share of all.
        share = max((after - was) / of for (was, after), of in zip(steps, whole, strict=True))
        more = [f"{kind} {_step(*step)}" for kind, step in zip(ROW, steps, strict=True) if step[1] > step[0]]
        if more:
            rows.append((share, f"  {name}: {', '.join(more)}"))
    rows.sort(reverse=True)
    if rows:
        said += ["in these rows, those that grew most first:", *(text for _, text in rows[:MOST_ROWS])]
    if len(rows) > MOST_ROWS:
        said.append(f"  and {len(rows) - MOST_ROWS} more")
    return said


def _step(before: int, now: int) -> str:
    change = f"{now / before - 1:+.1%}" if before else "new"
    if render.amount(before) == render.amount(now):
        return f"{before} -> {now} ({change})"
    return f"{render.amount(before)} -> {render.amount(now)} ({change})"


# --- the plugin ----------------------------------------------------------------------------------------------------

_RECORDED: pytest.StashKey[dict[Path, dict[Key, Entry]]] = pytest.StashKey()


class CostBudget:
    """The fixture: call it with a program, and with its arguments where it is a function."""

    def __init__(self, request: pytest.FixtureRequest):
        self._config, self._nodeid, self._path = request.config, request.node.nodeid, path_of(request.path)
        self._used: set[tuple[str, str]] = set()

    def __call__(
        self,
        program: Any,
        *args: Any,
        target: str | None = None,
        tolerance: float = TOLERANCE,
        name: str = "",
        **options: Any,
    ) -> Bill:
        """Holds a program to its budget, or records it; returns its bill.

        Args:
          program: a function (jitted or not), or whatever else `itemize` takes; or a Bill.
          target: what it is compiled for; by default "host", or what the bill is of.
          tolerance: the share by which a cost may grow.
          name: tells the programs of one test apart, where there are several for one target.
          options: as of `itemize`.
        """
        __tracebackhide__ = True
        if tolerance < 0:
            raise ValueError(f"tolerance is {tolerance}; it must be 0 or more")
        if not isinstance(program, Bill):
            program = itemize(_jitted(program), *args, target=target or "host", **options)
        elif args or options:
            raise TypeError("a Bill is given; it goes without arguments and options of a program")
        target = target or str(program.program.get("target", "host"))
        if (name, target) in self._used:
            raise ValueError(f"cost_budget is called twice for {target}; give each program a name")
        self._used.add((name, target))
        test = self._nodeid.partition("::")[2] + (f" {name}" if name else "")
        now = entry_of(program)
        update = f"pytest {UPDATE} '{self._nodeid}'"
        try:
            budgets = read(self._path)
        except ValueError as error:
            pytest.fail(f"{error}. To record all of it again, delete it and: pytest {UPDATE}", pytrace=False)
        if self._config.getoption(UPDATE):
            self._config.stash[_RECORDED].setdefault(self._path, {})[test, target, _line()] = now
            return program
        entries = budgets.get(test, {}).get(target, {})
        line = nearest(entries, _line())
        if line is None:
            where = f"{test} has no budget for {target} in {self._path.name}"
            pytest.fail(f"{where}. To record what it costs now:\n  {update}", pytrace=False)
        before = entries[line]
        of = "" if line == _line() else f" of jax {before['jax']} (this is {now['jax']})"
        if found := grown(before["costs"], now["costs"], tolerance):
            head = f"{test} costs more for {target} than its budget{of}:"
            said = [head, *_over(before, now, found), f"If that is meant:\n  {update}"]
            pytest.fail("\n".join(said), pytrace=False)
        if fell := grown(now["costs"], before["costs"], tolerance):
            said = "; ".join(f"{name}: {_step(was, amount)}" for name, (amount, was) in fell.items())
            warnings.warn(
                CostFell(f"{test} costs less for {target} than its budget{of}: {said}. To hold it there: {update}"),
                stacklevel=2,
            )
        return program


def _jitted(program: Any) -> Any:
    """A plain function is compiled as `jax.jit` would."""
    if callable(program) and not hasattr(program, "lower") and not hasattr(program, "as_text"):
        import jax

        return jax.jit(program)
    return program


@pytest.fixture
def cost_budget(request: pytest.FixtureRequest) -> Callable[..., Bill]:
    """Holds what a program costs to what is recorded beside the test: `cost_budget(fn, *args, target="h200")`."""
    return CostBudget(request)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.getgroup("stepbill").addoption(
        UPDATE, action="store_true", help=f"record what the programs of cost_budget cost now, in test_x{SUFFIX}"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_RECORDED] = {}


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Writes what was recorded, in one process: of pytest-xdist's workers, each sends its own home."""
    recorded = session.config.stash[_RECORDED]
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["stepbill_budgets"] = [
            (str(path), *key, entry) for path, found in recorded.items() for key, entry in found.items()
        ]
        return
    for path, entries in recorded.items():
        write(path, entries)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Takes in what a worker of pytest-xdist has recorded."""
    for path, *key, entry in getattr(node, "workeroutput", {}).get("stepbill_budgets", ()):
        node.config.stash[_RECORDED].setdefault(Path(path), {})[tuple(key)] = entry


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    for path, entries in config.stash[_RECORDED].items():
        terminalreporter.write_line(f"stepbill: {len(entries)} budgets recorded in {path}")
