"""What fills a chip's memory when it is fullest: which buffers are alive, of which role, and who is at work then.

The compiler's own plan says it: BufferAssignmentProto, which XLA writes where it dumps a program, holds every buffer
with its size and, in the order of the schedule, when each is taken and given back. Where there is only the text of a
program, the same is worked out from its schedule; that is an estimate, for a compiler may let a result take over the
buffer of an operand where the text does not say so.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

from .attribution import ROLES, Dataflow
from .bill import apportion
from .hlo import HBM, RUNS, Computation, Instruction, Module, Shape
from .traffic import first_result

LARGEST = 10  # buffers that are named
# Beside the roles of what a program holds: its results that live in no argument's buffer; the program itself; and what
# the plan takes beyond the buffers alive at the peak: gaps between them, alignment, pointers, the compiler's scratch.
BESIDES = ("results", "code", "fragmentation")


@dataclass(frozen=True)
class Plan:
    """Bytes per chip, as the compiler assigned them. peak: most alive at once, None where the compiler does not say.

    XLA's own `peak` is not what it seems everywhere: on TPU it counts on-chip memory instead of HBM where that is
    fuller, and on a CPU leaves out all temporaries.

    constants: that are among neither arguments, temporaries nor code. buffers: a serialized BufferAssignmentProto.
    """

    arguments: int
    outputs: int
    temporaries: int
    aliased: int
    code: int
    peak: int | None
    constants: int = 0
    buffers: bytes = field(default=b"", repr=False)

    @property
    def needed(self) -> int:
        """Bytes that must be there to run: aliased outputs live in their arguments."""
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.code + self.constants


class Alive(NamedTuple):
    """A buffer that is alive: the array that is in it, and the bytes it takes."""

    value: Instruction
    leaf: int
    bytes: int


class Peak(NamedTuple):
    """Who runs when most is alive (None: no temporary is), and the temporaries alive then."""

    at: Instruction | None
    temporaries: list[Alive]


# --- the compiler's plan -------------------------------------------------------------------------------------------

# Numbers of the fields of BufferAssignmentProto and what it is made of. Source: xla/service/hlo.proto.
_BUFFERS, _ALLOCATIONS, _TRACES = 1, 3, 4
_ID, _SIZE, _DEFINED_AT, _COLOR = 1, 2, 3, 4  # of a logical buffer
_SHAPE_INDEX = 3  # of where it is defined
_ALLOCATED, _IS_CONSTANT = 2, 12  # of an allocation
_EVENTS = 1  # of a trace
_KIND, _BUFFER, _COMPUTATION, _INSTRUCTION, _CANONICAL = 1, 2, 3, 4, 5  # of an event
_ALLOC, _FREE, _SHARE = 0, 1, 2  # kinds of events


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of each field of a protobuf message: an int, or bytes. ValueError where it is none.

    Source: protobuf.dev/programming-guides/encoding.
    """
    position = 0

    def varint() -> int:
        nonlocal position
        number = shift = 0
        while True:
            byte = message[position]
            number |= (byte & 127) << shift
            position, shift = position + 1, shift + 7
            if byte < 128:
                return number

    try:
        while position < len(message):
            number, kind = divmod(varint(), 8)
            if kind == 0:
                yield number, varint()
                continue
            size = varint() if kind == 2 else {1: 8, 5: 4}[kind]
            if position + size > len(message):
                raise IndexError
            yield number, message[position : position + size]
            position += size
    except LookupError:
        raise ValueError("not a protobuf message, or cut off") from None


def _message(message: bytes) -> dict[int, Any]:
    """The last value of each field."""
    return dict(_fields(message))


def assignment_of(dump: bytes) -> bytes:
    """The BufferAssignmentProto of an HloProto; b"" where there is none. ValueError where it is no HloProto."""
    return _message(dump).get(3, b"")


def constant_bytes(assignment: bytes) -> int:
    """What the program's constants take."""
    found = (_message(value) for number, value in _fields(assignment) if number == _ALLOCATIONS)
    return sum(one.get(_ALLOCATED, 0) for one in found if one.get(_IS_CONSTANT))


def planned(module: Module, assignment: bytes, space: int = HBM) -> Peak:
    """The peak of one memory as the compiler's plan has it. ValueError, LookupError: no BufferAssignmentProto.

    A trace is the compiler's simulation of one memory, or of several; events of the others are left out.
    """
    buffers: Buffers = {}
    traces: list[list[Event]] = []
    for number, value in _fields(assignment):
        if number == _BUFFERS:
            one = _message(value)
            index = _message(one.get(_DEFINED_AT, b"")).get(_SHAPE_INDEX, ())
            buffers[one.get(_ID, 0)] = one.get(_SIZE, 0), one.get(_COLOR, HBM), tuple(index)
        elif number == _TRACES:
            events = (_message(event) for kind, event in _fields(value) if kind == _EVENTS)
            traces.append([one for one in events if buffers[one.get(_BUFFER, 0)][1] == space])
    held, _, at = max(
        (_fullest(events, buffers) for events in traces), key=lambda found: found[1], default=({}, 0, None)
    )
    return Peak(_instruction(module, at) if at else None, list(_arrays(module, held, buffers)))


Event = dict[int, Any]
Buffers = dict[int, tuple[int, int, tuple[int, ...]]]  # bytes, memory and place in its instruction's shape, by id
Held = dict[int, tuple[Event, int]]  # who is in the buffer, and its bytes, by the id of who was first


def _fullest(events: list[Event], buffers: Buffers) -> tuple[Held, int, Event | None]:
    """What is alive when most is; how many bytes; and the event that makes it so."""
    most, at = 0, -1
    for number, (_, taken) in enumerate(_simulated(events, buffers)):
        if taken > most:
            most, at = taken, number
    if at < 0:
        return {}, 0, None
    held, _ = next(islice(_simulated(events, buffers), at, None))
    return held, most, events[at]


def _simulated(events: list[Event], buffers: Buffers) -> Iterator[tuple[Held, int]]:
    """After each event: what is alive, and bytes in all.

    A buffer that shares takes over from the one it shares with, which may be given back before or after.
    """
    alive: Held = {}
    first: dict[int, int] = {}
    shared: dict[int, int] = {}
    taken = 0
    for event in events:
        kind, buffer = event.get(_KIND, _ALLOC), event.get(_BUFFER, 0)
        if kind == _FREE:
            home = first.pop(buffer)
            shared[home] -= 1
            if not shared[home]:
                taken -= alive.pop(home)[1]
        else:
            owner: int = event[_CANONICAL] if kind == _SHARE else buffer
            home = first.get(owner, owner)
            size = buffers[home][0]
            taken += 0 if home in alive else size
            first[buffer] = home
            shared[home] = shared.get(home, 0) + 1
            alive[home] = event, size
        yield alive, taken


def _instruction(module: Module, event: Event) -> Instruction | None:
    """The instruction of an event. None where the text has it written out in another."""
    computation = module.computations.get(event.get(_COMPUTATION, b"").decode(errors="replace"))
    return computation and computation.by_name.get(event.get(_INSTRUCTION, b"").decode(errors="replace"))


def _arrays(module: Module, held: Held, buffers: Buffers) -> Iterator[Alive]:
    for event, size in held.values():
        value = _instruction(module, event)
        leaf = None if value is None else _leaf(value.shape, buffers[event.get(_BUFFER, 0)][2])
        if value is not None and leaf is not None:
            yield Alive(value, leaf, size)


def _leaf(shape: Shape, index: tuple[int, ...]) -> int | None:
    """Which leaf of a shape the index of a part leads to; None where it is a tuple, which holds only pointers."""
    leaf = 0
    for number in index:
        if number >= len(shape.parts):
            return None
        leaf, shape = leaf + shape.starts[number], shape.parts[number]
    return None if shape.dtype == "tuple" else leaf


# --- the schedule --------------------------------------------------------------------------------------------------


class Span(NamedTuple):
    """Moments of a schedule, first and last among them."""

    first: int
    last: int


def scheduled(dataflow: Dataflow) -> Peak:
    """The peak by the order of the text: each buffer is alive from the first instruction that touches it to the last.

    What is carried by a loop is alive as long as the loop runs; buffers that are one by construction (tuples, loop
    carries, updates in place; see Dataflow) count once. Arguments, results and constants are no temporaries, nor is
    what fits into a donated argument's buffer after the argument is read for the last time.
    """
    module = dataflow.module
    lasting = {
        dataflow.node(value, leaf)
        for value in (*module.entry.parameters, module.entry.root)
        for leaf in range(len(value.shape.leaves))
    }
    donated = {dataflow.node(module.entry.parameters[number]) for number in module.aliases.values()}
    spans: dict[int, Span] = {}
    holds: dict[int, Alive] = {}
    idle: list[tuple[int, Span]] = []
    moments = list(_in_order(module.entry, set()))
    for moment, (i, is_done) in enumerate(moments):
        made = [(i, leaf) for leaf in _own_leaves(i)]
        read = [] if is_done else [(o, leaf) for o in i.operands for leaf in _own_leaves(o)]
        if donated and i.computation is module.entry:
            overwritten = {dataflow.node(*one) for one in made} - {dataflow.node(*one) for one in read}
            idle += [
                (holds[node].bytes, Span(spans[node].last + 1, moment - 1))
                for node in donated & overwritten & spans.keys()
            ]
        for value, leaf in made if i.opcode in ("get-tuple-element", "tuple") else made + read:
            shape = value.shape.leaves[leaf]
            node = dataflow.node(value, leaf)
            if value.opcode == "constant":
                lasting.add(node)
            if shape.space != HBM:
                continue
            spans[node] = Span(spans[node].first if node in spans else moment, moment)
            if node not in holds or holds[node].bytes < shape.padded_bytes:
                holds[node] = Alive(value, leaf, shape.padded_bytes)
    alive = _not_lodged({holds[node]: spans[node] for node in holds if node not in lasting}, idle)
    changes = [0] * (len(moments) + 1)
    for one, span in alive.items():
        changes[span.first] += one.bytes
        changes[span.last + 1] -= one.bytes
    most = taken = 0
    at = None
    for moment, change in enumerate(changes):
        taken += change
        if taken > most:
            most, at = taken, moment
    if at is None:
        return Peak(None, [])
    return Peak(moments[at][0], [one for one, span in alive.items() if span.first <= at <= span.last])


def _not_lodged(alive: dict[Alive, Span], idle: list[tuple[int, Span]]) -> dict[Alive, Span]:
    """Without those that the compiler lays into buffers (bytes, while idle) that are there in any case.

    As XLA does it: the largest chooses first, the tightest buffer that holds it, of equals the latest, which nobody
    else is in meanwhile.
    """
    # Most donated buffers are written as soon as they have been read, and have room for nobody.
    vacant = [(size, span) for size, span in idle if span.first <= span.last]
    free = sorted(vacant, key=lambda one: one[0], reverse=True)[::-1]
    guests: list[list[Span]] = [[] for _ in free]

    def is_lodged(one: Alive, span: Span) -> bool:
        for (size, (first, last)), others in zip(free, guests, strict=True):
            fits = one.bytes <= size and first <= span.first and span.last <= last
            if fits and all(span.last < other.first or other.last < span.first for other in others):
                others.append(span)
                return True
        return False

    by_size = sorted(alive.items(), key=lambda item: item[0].bytes, reverse=True)
    return {one: span for one, span in by_size if not is_lodged(one, span)}


def _own_leaves(i: Instruction) -> Iterable[int]:
    """The leaves of its shape that are not its operands again, as most asynchronous starts have them."""
    return range(1) if i.opcode == "copy-start" else range(first_result(i), len(i.shape.leaves))


def _in_order(computation: Computation, met: set[Computation]) -> Iterator[tuple[Instruction, bool]]:
    """Each instruction as it runs, what it runs after it, and then itself again, done. All are gone through once."""
    met.add(computation)
    for i in computation.instructions:
        yield i, False
        if i.opcode in RUNS:
            for called in i.called:
                if called not in met:
                    yield from _in_order(called, met)
            yield i, True


# --- what the bill says --------------------------------------------------------------------------------------------


def picture(dataflow: Dataflow, plan: Plan | None, capacity: int | None) -> dict[str, Any]:
    """The bill's `memory`, in bytes on one chip; see the README.

    `by_role` adds up to `peak_bytes` exactly. With the compiler's `plan` that is what it takes in all, and what no
    buffer accounts for is "fragmentation"; without one, what is alive at once by the schedule.
    """
    module = dataflow.module
    peak = _compilers_peak(module, plan)
    says = "compiler" if peak else "schedule"
    peak = peak or scheduled(dataflow)
    arguments = list(_arrays_of(module.entry.parameters))
    results = [one for one in _arrays_of([module.entry.root]) if one.leaf not in module.aliases]
    alive = [(one, dataflow.origin(one.value, one.leaf).role) for one in (*arguments, *peak.temporaries)]
    alive += [(one, "results") for one in results]
    held: dict[str, int] = dict.fromkeys(("weights", "cache"), 0)
    for one, role in alive[: len(arguments)]:
        held[role] = held.get(role, 0) + one.bytes
    by_role: dict[str, int] = dict.fromkeys((*ROLES, *BESIDES), 0)
    for one, role in alive:
        by_role[role] += one.bytes
    if plan is not None and says == "schedule":
        # Where the text has more alive than the compiler needs room for, it has found room that the text does not show.
        temporary: dict[str, int] = {}
        for one, role in alive[len(arguments) : len(alive) - len(results)]:
            temporary[role] = temporary.get(role, 0) + one.bytes
        room = min(sum(temporary.values()), plan.temporaries)
        for role, share in zip(temporary, apportion(room, [*temporary.values()]), strict=True):
            by_role[role] += share - temporary[role]
    beside = {"temp": sum(one.bytes for one in peak.temporaries), "results": by_role["results"]}
    if plan is not None:
        beside = {"temp": plan.temporaries, "results": plan.outputs - plan.aliased, "code": plan.code}
        constants = constant_bytes(plan.buffers) if says == "compiler" else plan.constants
        by_role["constants"] += constants
        by_role["code"] = plan.code - (constants - plan.constants)
        by_role["fragmentation"] = plan.needed - sum(by_role.values())
    return {
        "peak_bytes": sum(by_role.values()),
        "capacity_bytes": capacity,
        **held,
        "activations": by_role["activations"],
        **beside,
        "by_role": {role: amount for role, amount in by_role.items() if amount},
        "plan": says,
        "peak_at": peak.at and _moment(dataflow, peak.at),
        "largest": [
            _entry(dataflow, *pair) for pair in sorted(alive, key=lambda pair: pair[0].bytes, reverse=True)[:LARGEST]
        ],
    }


def _compilers_peak(module: Module, plan: Plan | None) -> Peak | None:
    """The peak as the compiler has it; None where it does not say, or says it in another way than is known here."""
    if plan is None or not plan.buffers:
        return None
    try:
        return planned(module, plan.buffers)
    except (ValueError, LookupError, AttributeError, TypeError):
        return None


def _arrays_of(values: Sequence[Instruction]) -> Iterator[Alive]:
    """The arrays in HBM that these values are made of."""
    for value in values:
        for leaf, shape in enumerate(value.shape.leaves):
            if shape.space == HBM:
                yield Alive(value, leaf, shape.padded_bytes)


def _moment(dataflow: Dataflow, at: Instruction) -> dict[str, Any]:
    blame = dataflow.blame(at)
    return {"instruction": at.name, "component": blame.component, "phase": blame.phase}


def _entry(dataflow: Dataflow, one: Alive, role: str) -> dict[str, Any]:
    """What is said of one of the largest buffers."""
    maker = one.value
    if maker.opcode == "tuple" and len(maker.operands) == len(maker.shape.leaves):
        maker = maker.operands[one.leaf]
    shape = one.value.shape.leaves[one.leaf]
    component = dataflow.blame(maker).component
    return {"name": maker.name, "shape": repr(shape), "bytes": one.bytes, "role": role, "component": component}
