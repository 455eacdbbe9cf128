"""How often everything runs: the walk over a module's executed computations, and the trip counts of its loops."""

import re
from collections.abc import Callable, Iterator, Sequence

from .hlo import MAX_SIZE, RUNS, Computation, Instruction

Runs = list[tuple[Computation, int]]  # computations and how often


def executed(
    entry: Computation, trips: Callable[[Instruction], int | None], branch: Callable[[Instruction], int]
) -> Iterator[tuple[Instruction, int]]:
    """Every top-level instruction that runs when `entry` runs once, with how many times in all.

    In the order of the text, what an instruction runs after it; what several run, after the first of them.

    Args:
      trips: iterations of a while; None where they cannot be known (then one is taken).
      branch: which branch of a conditional is billed.
    """

    runs: dict[Instruction, Runs] = {}  # what each instruction runs, and how often
    times = dict.fromkeys(_callers_first(entry, trips, branch, runs), 0)
    times[entry] = 1
    for computation in times:
        for i in computation.instructions:
            for called, count in runs.get(i, ()):
                times[called] += times[computation] * count
    met = {entry}
    stack = [iter(entry.instructions)]
    while stack:
        for i in stack[-1]:
            yield i, times[i.computation]
            new = [called for called, _ in runs.get(i, ()) if called not in met]
            if new:
                met.update(new)
                stack += [iter(called.instructions) for called in reversed(new)]
                break
        else:
            stack.pop()


def _callers_first(
    entry: Computation,
    trips: Callable[[Instruction], int | None],
    branch: Callable[[Instruction], int],
    runs: dict[Instruction, Runs],
) -> list[Computation]:
    """The computations that run, each after all that run it; fills `runs` for each instruction that runs any."""
    called_first: list[Computation] = []
    done: set[Computation] = set()
    stack = [(entry, False)]
    while stack:
        computation, are_done = stack.pop()
        if are_done:
            called_first.append(computation)
        elif computation not in done:
            done.add(computation)
            stack.append((computation, True))
            for i in computation.instructions:
                if i.opcode in RUNS:
                    runs[i] = _runs(i, trips, branch)
                    stack += [(called, False) for called, _ in runs[i]]
    return called_first[::-1]


def _runs(i: Instruction, trips: Callable[[Instruction], int | None], branch: Callable[[Instruction], int]) -> Runs:
    if i.opcode == "while":
        count = trips(i)
        count = 1 if count is None else count
        body, condition = while_parts(i)
        return [(body, count), (condition, count + 1)]
    if i.opcode == "conditional":
        return [(i.called[branch(i)], 1)]
    return [(called, 1) for called in i.called]


def while_parts(loop: Instruction) -> tuple[Computation, Computation]:
    """(body, condition) of a while."""
    names = {key: (loop.attribute(key) or "").lstrip("%") for key in ("body", "condition")}
    by_name = {called.name: called for called in loop.called}
    return by_name[names["body"]], by_name[names["condition"]]


def _resolve(value: Instruction, arguments: Sequence[Instruction] = ()) -> Instruction:
    """Follows renaming, copies and fusion parameters to what a scalar is."""
    bound = list(arguments)
    while True:
        if value.opcode in ("copy", "bitcast", "reshape", "convert", "copy-done", "copy-start") and value.operands:
            value = value.operands[0]
        elif value.opcode == "parameter" and bound:
            value, bound = bound[value.number], []
        else:
            return value


def trip_count(loop: Instruction) -> int | None:
    """How often a while runs: from backend_config where the compiler says it, else from its induction variable.

    TPU text has no known_trip_count: the condition compares a carried counter with a constant, the body adds a
    constant to it, and the initial value is a constant. None where it is not of that form.
    """
    known = re.search(r'"known_trip_count":\{"n":"(\d{1,18})"', loop.backend_config)
    if known:
        return int(known[1])
    body, condition = while_parts(loop)
    initial = _unpack(loop.operands[0])
    if initial is None:
        return None
    stepped = _unpack(body.root)
    if stepped is None:
        return None
    compare, arguments = _scalar_root(condition.root)
    if compare.opcode != "compare" or len(compare.operands) != 2:
        return None
    direction = compare.attribute("direction")
    sides = [_resolve(operand, arguments) for operand in compare.operands]
    for counter, bound, flip in ((sides[0], sides[1], False), (sides[1], sides[0], True)):
        number = _carried(counter)
        limit = _constant(bound, initial, stepped)
        if number is None or limit is None:
            continue
        start, step = _constant(_resolve(initial[number]), initial, stepped), _step(stepped[number], number)
        if start is None or not step:
            continue
        if flip:
            direction = {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE"}.get(direction or "", direction)
        span = {"LT": limit - start, "LE": limit - start + 1, "GT": start - limit, "GE": start - limit + 1}
        span["NE"] = abs(limit - start)
        if direction not in span:
            return None
        return max(0, -(-span[direction] // abs(step)))
    return None


def _unpack(value: Instruction) -> Sequence[Instruction] | None:
    value = _resolve(value)
    return value.operands if value.opcode == "tuple" else None


def _scalar_root(root: Instruction) -> tuple[Instruction, Sequence[Instruction]]:
    """The instruction that decides, and the operands its fusion binds."""
    if root.is_fusion:
        return _resolve(root.called[0].root), root.operands
    return _resolve(root), ()


def _carried(value: Instruction) -> int | None:
    """Which element of the loop's tuple a value is."""
    if value.opcode == "get-tuple-element" and value.operands[0].opcode == "parameter":
        return value.number
    return None


def _integer(constant: Instruction) -> int | None:
    """The value of a constant, where it is a whole number that a loop can count with."""
    try:
        number = int(constant.arguments)
    except ValueError:
        return None
    return number if abs(number) <= MAX_SIZE else None


def _constant(value: Instruction, initial: Sequence[Instruction], stepped: Sequence[Instruction]) -> int | None:
    """A scalar's number: a constant, or an element of the loop's tuple that starts as one and never changes."""
    if value.opcode == "constant":
        return _integer(value)
    number = _carried(value)
    if number is not None and number < len(stepped) and _carried(_resolve(stepped[number])) == number:
        start = _resolve(initial[number])
        return _constant(start, initial, stepped) if start.opcode == "constant" else None
    return None


def _step(value: Instruction, number: int) -> int | None:
    """The constant that the body adds to element `number`."""
    value = _resolve(value)
    add, arguments = _scalar_root(value)
    if add.opcode == "tuple":
        return None
    if add.opcode not in ("add", "subtract") or len(add.operands) != 2:
        return None
    a, b = (_resolve(operand, arguments) for operand in add.operands)
    if _carried(b) == number and add.opcode == "add":
        a, b = b, a
    if _carried(a) != number or b.opcode != "constant":
        return None
    step = _integer(b)
    return step if step is None or add.opcode == "add" else -step
