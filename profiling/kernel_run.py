"""Runs the code of a kernel, written in MLIR, for all programs of its grid at once, as far as it steers: what whole
numbers it computes, how often its loops turn, which branches it takes. All else is counted and not done.

A lane is a program of the grid; in a loop whose turns differ, a turn of it. A number is known of each lane, of all of
them alike, or, where it comes from data, of none. To add an operation that computes whole numbers: `_WHOLE`; one that
multiplies: `_product`.
"""

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from .flops import Flops

MAX_LANES = 1 << 20  # programs, or turns of loops in them, that are looked at one by one
Number = np.ndarray | int | None  # of each lane, of all of them, or not known


class Unreadable(Exception):
    """Says why the code of a kernel does not tell what it does."""


class Frame:
    """Where in the code the lanes are: programs of the grid, or turns of a loop in each of them.

    times: how often each lane is there.
    """

    def __init__(self, times: np.ndarray, outer: "Frame | None" = None, lane: np.ndarray | None = None) -> None:
        self.times, self.outer, self.lane = times, outer, lane
        self.values: dict[Any, Number] = {}

    def where(self, condition: np.ndarray | int) -> "Frame":
        """The lanes that go on; what is known of values stays."""
        frame = Frame(self.times * (np.asarray(condition) != 0), self.outer, self.lane)
        frame.values = self.values
        return frame

    def often(self, turns: np.ndarray | int) -> "Frame":
        """All turns of a loop at once: what differs from turn to turn is not known."""
        return Frame(self.times * turns, self, np.arange(len(self.times)))

    def turn_by_turn(self, turns: np.ndarray) -> "Frame":
        """A lane for each turn of a loop."""
        lane = np.repeat(np.arange(len(self.times)), turns)
        return Frame(self.times[lane], self, lane)

    def given(self, value: Any) -> tuple[bool, Number]:
        """(whether it is known, here or further out, what it is; and that)."""
        if value in self.values:
            return True, self.values[value]
        if self.outer is None:
            return False, None
        known, found = self.outer.given(value)
        if known and isinstance(found, np.ndarray):
            found = found[self.lane]
        return known, found


class Run:
    """Counts what the code of a kernel does in all programs of its grid.

    grid: sizes along its axes, the last one the fastest. threads: that do each operation, of arrays each of its own; 1
      where the code speaks of what they do together.
    places: what operations that ask for it are told, "gpu.block_id x": the place along an axis, or a size.
    """

    def __init__(self, grid: list[int], threads: int = 1) -> None:
        programs = math.prod(grid)
        self.threads = threads
        self.numbers: list[Number] = [None] * len(grid)
        if programs <= MAX_LANES:
            self.frame = Frame(np.ones(programs, np.int64))
            if grid:
                self.numbers = [n.astype(np.int64) for n in np.unravel_index(np.arange(programs), grid)]
        else:  # no program is told from another
            self.frame = Frame(np.array([programs], np.int64))
        self.places: dict[str, Number] = {}
        self.matmul: dict[str, int] = {}
        self.elementwise = self.transcendental = 0
        self.read: dict[int, int] = {}  # bits of each argument
        self.lost_reads = False

    @property
    def flops(self) -> Flops:
        """In all; of the class of operands that most products are of."""
        most = max(self.matmul, key=lambda precision: self.matmul[precision], default="bf16")
        return Flops(sum(self.matmul.values()), self.elementwise, self.transcendental, most)

    def block(self, block: Any, frame: Frame, times: int = 1) -> None:
        """Counts the operations of a block, each `times` times in every lane."""
        often = int(np.sum(frame.times)) * times
        if not often:
            return
        for op in block.operations:
            op = op.operation
            name = name_of(op)
            if name == "scf.for":
                self._loop(op, frame)
            elif name in ("scf.if", "scf.index_switch"):
                self._branch(op, frame)
            elif name in _COMBINING:
                self.block(op.regions[0].blocks[0], frame, times * _elements(op.operands[0].type))
            elif name in _CALLING or len(op.regions):
                self._other(op, frame)
            else:
                self._count(op, name, often)

    def _loop(self, op: Any, frame: Frame) -> None:
        first, end, step = (self.value(bound, frame) for bound in list(op.operands)[:3])
        body = op.regions[0].blocks[0]
        if first is None or end is None or step is None or not np.all(np.asarray(step) > 0):
            raise Unreadable("with a loop of which data says how often it turns")
        turns = np.maximum(0, -(-(np.asarray(end) - first) // step))
        many = np.broadcast_to(turns, len(frame.times))
        steered = any(name_of(inner.operation).startswith("scf.") and len(inner.regions) for inner in body.operations)
        if steered and np.sum(many) <= MAX_LANES:
            inside = frame.turn_by_turn(many)
            within = np.arange(len(inside.times)) - np.repeat(np.cumsum(many) - many, many)
            starts, steps = (np.broadcast_to(x, len(frame.times))[inside.lane] for x in (first, step))
            inside.values[body.arguments[0]] = starts + within * steps
        else:
            inside = frame.often(turns)
            inside.values[body.arguments[0]] = None
        for carried in list(body.arguments)[1:]:
            inside.values[carried] = None
        self.block(body, inside)

    def _branch(self, op: Any, frame: Frame) -> None:
        chosen = self.value(op.operands[0], frame)
        if chosen is None:
            return self._other(op, frame)
        for region, taken in zip(op.regions, _taken(op, np.asarray(chosen)), strict=True):
            if len(region.blocks):
                self.block(region.blocks[0], frame.where(taken))

    def _other(self, op: Any, frame: Frame) -> None:
        """What nobody knows how often, or whether, it is done: no matter, if it does nothing that counts."""
        if name_of(op) in _CALLING:
            raise Unreadable("that calls other code")
        before = self._amounts
        for region in op.regions:
            for block in region.blocks:
                self.block(block, frame)
        if self._amounts != before:
            raise Unreadable("where data says what is done")

    @property
    def _amounts(self) -> tuple[Any, ...]:
        return dict(self.matmul), self.elementwise, self.transcendental, dict(self.read), self.lost_reads

    def _count(self, op: Any, name: str, often: int) -> None:
        said = op.attributes["asm_string"].value if name == "llvm.inline_asm" else name
        if product := _product(op, name, said):
            pairs, precision = product
            self.matmul[precision] = self.matmul.get(precision, 0) + 2 * pairs * often
        elif name in _LOADS:
            self._load(op, often)
        elif _NO_WORD.search(said):
            raise Unreadable(f"with an operation of which nothing is known, {said.split()[0]}")
        else:
            elementwise, transcendental = _arithmetic(op, name)
            types = [value.type for value in (*op.operands, *op.results)] if elementwise or transcendental else []
            values = max(map(_elements, types)) * self.threads * often if any(map(_is_float, types)) else 0
            self.elementwise += elementwise * values
            self.transcendental += transcendental * values

    def _load(self, op: Any, often: int) -> None:
        """Of memory: Triton's loads, and copies that a TPU's kernel starts itself."""
        source = op.operands[0]
        moved = op.results[0].type if len(op.results) else source.type
        argument = _argument(source)
        if argument is None:
            self.lost_reads = True
        else:
            self.read[argument] = self.read.get(argument, 0) + _elements(moved) * _bits(moved) * often

    def value(self, value: Any, frame: Frame) -> Number:
        """A whole number that the code computes, of each lane; None where it is of data."""
        known, found = frame.given(value)
        if known:
            return found
        op = _maker(value)
        found = None if op is None else self._computed(op, value, frame)
        frame.values[value] = found
        return found

    def _computed(self, op: Any, value: Any, frame: Frame) -> Number:
        name = name_of(op)
        if name in ("arith.constant", "llvm.mlir.constant"):
            said = op.attributes["value"]
            return int(said.value) if type(said).__name__ in ("IntegerAttr", "BoolAttr") else None
        if axis := _axis(op):
            return self._place(f"{name} {axis}", frame)
        if name == "scf.if":
            return self._chosen(op, value, frame)
        if name == "nvvm.shfl.sync":  # of what all threads have alike
            return self.value(op.operands[1], frame) if "idx" in str(op.attributes["kind"]) else None
        rule = _cmpi(op) if name == "arith.cmpi" else _WHOLE.get(name)
        if rule is None:
            return None
        operands = [self.value(operand, frame) for operand in op.operands]
        if any(operand is None for operand in operands):
            return None
        with np.errstate(divide="ignore"):
            return rule(*(np.asarray(operand) for operand in operands))

    def _place(self, asked: str, frame: Frame) -> Number:
        found, lane = self.places.get(asked), None
        while frame.outer is not None and frame.lane is not None:
            lane = frame.lane if lane is None else frame.lane[lane]
            frame = frame.outer
        return found[lane] if lane is not None and isinstance(found, np.ndarray) else found

    def _chosen(self, op: Any, value: Any, frame: Frame) -> Number:
        """A result of a branch."""
        condition, number = self.value(op.operands[0], frame), list(op.results).index(value)
        ends = [list(region.blocks[0].operations)[-1].operands[number] for region in op.regions]
        if condition is None or len(ends) != 2:
            return None
        taken, other = (self.value(end, frame) for end in ends)
        return None if taken is None or other is None else np.where(np.asarray(condition) != 0, taken, other)


# --- operations of MLIR -------------------------------------------------------------------------------------------


def _toward_zero(a: Any, b: Any) -> Any:
    return np.sign(a) * np.sign(b) * (np.abs(a) // np.maximum(1, np.abs(b)))


# Of whole numbers; those without a sign are those with one, which no size or place is large enough to differ from.
_WHOLE: dict[str, Callable[..., Any]] = {
    "arith.addi": np.add,
    "arith.subi": np.subtract,
    "arith.muli": np.multiply,
    "arith.divsi": _toward_zero,
    "arith.divui": _toward_zero,
    "arith.floordivsi": lambda a, b: a // np.where(b == 0, 1, b),
    "arith.ceildivsi": lambda a, b: -(-a // np.where(b == 0, 1, b)),
    "arith.ceildivui": lambda a, b: -(-a // np.where(b == 0, 1, b)),
    "arith.remsi": lambda a, b: a - b * _toward_zero(a, b),
    "arith.remui": lambda a, b: a - b * _toward_zero(a, b),
    "arith.minsi": np.minimum,
    "arith.minui": np.minimum,
    "arith.maxsi": np.maximum,
    "arith.maxui": np.maximum,
    "arith.andi": np.bitwise_and,
    "arith.ori": np.bitwise_or,
    "arith.xori": np.bitwise_xor,
    "arith.shli": np.left_shift,
    "arith.shrsi": np.right_shift,
    "arith.shrui": np.right_shift,
    "arith.select": lambda condition, a, b: np.where(condition != 0, a, b),
    "arith.extui": lambda a: a,
    "arith.extsi": lambda a: a,
    "arith.trunci": lambda a: a,
    "arith.index_cast": lambda a: a,
    "arith.index_castui": lambda a: a,
    "tpu.assume_multiple": lambda a: a,
    "builtin.unrealized_conversion_cast": lambda a: a,
}
_COMPARISONS = (np.equal, np.not_equal, *(np.less, np.less_equal, np.greater, np.greater_equal) * 2)


def _cmpi(op: Any) -> Callable[..., Any]:
    compare = _COMPARISONS[op.attributes["predicate"].value]
    return lambda a, b: compare(a, b).astype(np.int64)


def name_of(op: Any) -> str:
    """Of an operation. What a Mosaic kernel for GPUs carries has all dialects in one, which stands for its version."""
    return op.name.removeprefix("stable_mosaic_gpu.")


def _axis(op: Any) -> str | None:
    """Along which axis an operation asks where it is, or how much there is."""
    if op.name.startswith("tt.get_"):
        return str(op.attributes["axis"].value)
    if not name_of(op).startswith("gpu.") or "dimension" not in op.attributes:
        return None
    named = re.search(r"dim<?\s*([xyz])", str(op.attributes["dimension"]))
    return named and named[1]


def _taken(op: Any, chosen: np.ndarray) -> list[np.ndarray]:
    """Of each region of a branch, where it is taken."""
    if name_of(op) == "scf.if":
        return [chosen != 0, chosen == 0]
    cases = [chosen == case for case in op.attributes["cases"]]
    return [~np.any(np.stack(cases), axis=0), *cases] if cases else [np.ones_like(chosen)]


def _product(op: Any, name: str, said: str) -> tuple[int, str] | None:
    """(pairs that are multiplied, the class of operands) of an operation that is a product."""
    if name == "tt.dot":  # [.., M, K] x [.., K, N]
        left = op.operands[0].type
        return _elements(op.results[0].type) * _dims(left)[-1], _precision(_element(left))
    if name == "tpu.matmul":  # which names the dimensions of its left operand first
        named = re.search(r"<\[([\d, ]*)\]", str(op.attributes["dimension_numbers"]))
        left = op.operands[0].type
        summed = [int(d) for d in named[1].split(",") if d.strip()] if named else [-1]
        return _elements(op.results[0].type) * math.prod(_dims(left)[d] for d in summed), _precision(_element(left))
    if warpgroup := re.search(r"\bwgmma\.mma_async\.\S*?\bm(\d+)n(\d+)k(\d+)\.\w+\.(\w+)", said):
        kind = {"tf32": "f32", "s8": "i8", "u8": "i8", "e4m3": "f8", "e5m2": "f8"}.get(warpgroup[4], warpgroup[4])
        return math.prod(int(warpgroup[n]) for n in (1, 2, 3)), _precision(kind)
    return None


_NO_WORD = re.compile(r"dot|matmul|contract|convolution|\bmma")  # products, by their names, without a rule
_LOADS = ("tt.load", "tpu.enqueue_dma")
_COMBINING = ("tt.reduce", "tt.scan")  # with a region for each two values
_CALLING = ("tt.call", "func.call", "cf.br", "cf.cond_br")
_ELEMENTWISE = re.compile(
    r"arith\.(add|sub|mul|div|rem|neg|cmp|max|min|maximum|minimum|maxnum|minnum)f|arith\.select|math\.(abs|copysign)f"
    r"|math\.(ceil|floor|round|roundeven|trunc)|vector\.(multi_)?reduction|tt\.clampf"
    r"|tpu\.(all_reduce|reduce_index)"
)
_SPECIAL = re.compile(r"\b(ex2|lg2|tanh|sin|cos|rsqrt|sqrt|rcp)\.")  # instructions of a GPU
_INSIDE = re.compile(r"__nv_(f?abs|ceil|floor|round|rint|trunc|fmin|fmax|copysign)f?")


def _arithmetic(op: Any, name: str) -> tuple[int, int]:
    """(elementwise, transcendental) FLOPs of each value."""
    if name in ("math.fma", "vector.fma"):
        return 2, 0
    if name == "tt.extern_elementwise":
        return (1, 0) if _INSIDE.fullmatch(op.attributes["symbol"].value) else (0, 1)
    if name in ("tt.elementwise_inline_asm", "llvm.inline_asm"):
        return (0, 1) if _SPECIAL.search(op.attributes["asm_string"].value) else (1, 0)
    if _ELEMENTWISE.fullmatch(name):
        return 1, 0
    return 0, int(name.startswith("math."))


# What a pointer, or a part of a TPU's array, is made of.
_PARTS = re.compile(r"tt\.(addptr|splat|broadcast|expand_dims|reshape|bitcast)|tpu\.memref_\w+|memref\.\w*cast")


def _argument(value: Any) -> int | None:
    """The number of the kernel's argument that a pointer points into; None where that is not known."""
    while (op := _maker(value)) is not None:
        if not _PARTS.fullmatch(name_of(op)):
            return None
        value = op.operands[0]
    block, number = value.owner, value.arg_number
    op = block.owner.operation
    if op.name == "scf.for":  # carried along within the same array
        return _argument(op.operands[2 + number]) if number else None
    return number if op.name.endswith(".func") else None


def _maker(value: Any) -> Any:
    """The operation whose result a value is; None of an argument."""
    owner = value.owner
    return owner.operation if hasattr(owner, "operation") or hasattr(owner, "operands") else None


def _dims(type_: Any) -> tuple[int, ...]:
    """() of a scalar."""
    return tuple(getattr(type_, "shape", ()))


def _elements(type_: Any) -> int:
    return math.prod(_dims(type_))


def _element(type_: Any) -> str:
    """The type of an element, as MLIR writes it; of pointers, of what they point to."""
    text = str(getattr(type_, "element_type", type_))
    pointed = re.fullmatch(r"!tt\.ptr<(\w+).*>", text)
    return pointed[1] if pointed else text


def _is_float(type_: Any) -> bool:
    return re.fullmatch(r"b?f\d\w*|tf32", _element(type_)) is not None


def _bits(type_: Any) -> int:
    width = re.match(r"[a-z]+(\d+)", _element(type_))
    return int(width[1]) if width else 32


def _precision(element: str) -> str:
    """As `flops.precision`, by the type of an operand of a product."""
    wide = {"f32": "f32", "f64": "f32"}.get(element)
    narrow = {"i8": "int8", "i4": "int8"}.get(element)
    return wide or narrow or ("fp8" if element.startswith("f8") else "fp4" if element.startswith("f4") else "bf16")
