"""What a kernel written in Pallas does, counted in its own code, which the program carries: Triton's IR for a GPU's,
Mosaic's for a TPU's.

HLO shows of such a kernel what goes in and what comes out. Its code is run here for all programs of the grid at once,
but only what steers it: the numbers of programs, the bounds of loops, conditions. Of the arrays in it the sizes alone
are looked at. So a kernel that skips what a mask hides is billed for what it does not skip, to the last product. Where
data steers it, nothing is known of it here.

FLOPs are of floating-point numbers, and products of whole numbers; what computes addresses is none.
"""

import base64
import binascii
import math
import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from .flops import Flops
from .hlo import Instruction

MAX_LANES = 1 << 20  # programs, or turns of loops in them, that are looked at one by one


class Unreadable(Exception):
    """Says why the code of a kernel does not tell what it does."""


class Code(NamedTuple):
    """What a kernel does: its FLOPs, and how many elements of each operand it asks memory for.

    reads: of a TPU what its grid fetches, more than the operand has where some is fetched again. Of a GPU at most all,
      once, for programs that run beside each other share it in the L2. () where that cannot be told.
    """

    flops: Flops
    reads: tuple[int, ...]


def counted(call: Instruction) -> Code | None:
    """What the kernel of a custom call does; None if it is no kernel of Pallas.

    Raises:
      Unreadable: data decides that, or its code is of another version.
    """
    shapes = tuple((operand.shape.dims, operand.shape.bits) for operand in call.operands)
    found = _counted(call.custom_call_target, call.backend_config, shapes)
    if isinstance(found, str):
        raise Unreadable(found)
    return found


_Shapes = tuple[tuple[tuple[int, ...], int], ...]  # of operands: dimensions, and the bits of an element


# Layers have the same kernel.
@lru_cache(maxsize=256)
def _counted(target: str, config: str, operands: _Shapes) -> Code | str | None:
    try:
        if target == "__gpu$xla.gpu.triton":
            return _triton(config, operands)
        if target == "tpu_custom_call":
            return _mosaic(config, operands)
    except Unreadable as error:
        return str(error)
    return None


# --- the code of the two kinds of kernel --------------------------------------------------------------------------


def _triton(config: str, operands: _Shapes) -> Code | None:
    written = re.search(r'\bir = "((?:[^"\\]|\\.)*)"', config)
    sizes = [re.search(rf"\bgrid_{axis} = (\d+)", config) for axis in "xyz"]
    if written is None:
        return None
    module = _parsed(_bytes(written[1]))  # whose blocks are there as long as it is
    main = _main(module, "tt.func")
    run = _Run([int(size[1]) if size else 1 for size in sizes])
    run.block(main, run.frame)
    if run.lost_reads:
        return Code(run.flops, ())
    asked = (run.read.get(n, 0) // bits for n, (_, bits) in enumerate(operands))
    return Code(run.flops, tuple(min(n, math.prod(dims)) for n, (dims, _) in zip(asked, operands, strict=True)))


def _mosaic(config: str, operands: _Shapes) -> Code | None:
    written = re.search(r'"body": ?"([^"]*)"', config)
    if written is None:
        return None
    try:
        module = _parsed(base64.b64decode(written[1], validate=True), serialized=True)
    except binascii.Error:
        raise Unreadable("whose code is garbled") from None
    main = _main(module, "func.func")
    said = main.owner.attributes
    grid: list[int] = list(said["iteration_bounds"]) if "iteration_bounds" in said else []
    if any(size < 0 for size in grid):
        raise Unreadable("of which data says how many programs there are")
    run = _Run(grid)
    run.arguments(main, len(grid))
    run.block(main, run.frame)
    windows = list(said["window_params"]) if "window_params" in said else []
    prefetched = said["scalar_prefetch"].value if "scalar_prefetch" in said else 0

    def asked(n: int, dims: tuple[int, ...], bits: int) -> int | None:
        """Elements of an operand: by the grid, or by copies that the code starts itself; else it is there at once."""
        window = windows[n - prefetched] if prefetched <= n < prefetched + len(windows) else {}
        if "transform_indices" in window:
            return _fetched(module, window, main, dims, run)
        return None if run.lost_reads else run.read.get(len(grid) + n, math.prod(dims) * bits) // bits

    reads = [asked(n, *operand) for n, operand in enumerate(operands)]
    return Code(run.flops, tuple(n for n in reads if n is not None) if None not in reads else ())


def _fetched(module: Any, window: Any, main: Any, dims: tuple[int, ...], run: "_Run") -> int | None:
    """Elements of an operand that a TPU's grid fetches: a block whenever it is another than that of the program before.
    None where data says which."""
    name = window["transform_indices"].value
    block = next(op.regions[0].blocks[0] for op in module.body.operations if _name_of(op) == name)
    numbers = _Frame(run.frame.times)
    for argument, own in zip(block.arguments, main.arguments, strict=False):
        numbers.values[argument] = run.frame.values.get(own)
    ends = [run.value(index, numbers) for index in list(block.operations)[-1].operands]
    if any(index is None for index in ends):
        return None
    sizes = [int(size) for size in window["window_bounds"]]
    if len(sizes) != len(dims) or len(ends) != len(dims) or not ends:
        return None
    at = np.stack([np.broadcast_to(np.asarray(index), len(run.frame.times)) for index in ends])
    moved = np.append(True, np.any(at[:, 1:] != at[:, :-1], axis=0))
    # A block that ends beyond the array is fetched as far as there is an array.
    there = [np.clip(dim - index * size, 0, size) for dim, index, size in zip(dims, at[:, moved], sizes, strict=True)]
    return int(np.sum(np.prod(np.stack(there), axis=0, dtype=np.int64)))


def _parsed(code: bytes, serialized: bool = False) -> Any:
    """The MLIR module. jaxlib brings the parser and both dialects."""
    from jaxlib.mlir import ir
    from jaxlib.mlir.passmanager import PassManager
    from jaxlib.mosaic.python import tpu
    from jaxlib.triton import dialect as triton

    context = ir.Context()
    context.allow_unregistered_dialects = True
    try:
        (tpu if serialized else triton).register_dialect(context)
        module = ir.Module.parse(code, context)
        if "stable_mosaic.version" in module.operation.attributes:
            with context:
                PassManager.parse("builtin.module(mosaic-serde{serialize=false})").run(module.operation)
    except (ir.MLIRError, ValueError, RuntimeError):
        raise Unreadable("whose code this version of jax does not read") from None
    return module


def _bytes(text: str) -> bytes:
    """What MLIR wrote as a string: a backslash stands before two hexadecimal digits, or before itself."""
    raw = text.encode("utf-8", "surrogateescape")
    return re.sub(rb"\\([0-9A-Fa-f]{2}|\\)", lambda m: b"\\" if m[1] == b"\\" else bytes([int(m[1], 16)]), raw)


def _main(module: Any, kind: str) -> Any:
    """The body of a module's first function."""
    for op in module.body.operations:
        if op.operation.name == kind and op.regions and len(op.regions[0].blocks) == 1:
            return op.regions[0].blocks[0]
    raise Unreadable("whose code has jumps")


def _name_of(op: Any) -> str:
    return op.attributes["sym_name"].value if "sym_name" in op.attributes else ""


# --- running it ---------------------------------------------------------------------------------------------------

_Number = np.ndarray | int | None  # of each lane, of all of them, or not known


class _Frame:
    """Where in the code the lanes are: programs of the grid, or turns of a loop in each of them.

    times: how often each lane is there. numbers: of each lane of the grid that is one program, its place on each axis.
    """

    def __init__(self, times: np.ndarray, outer: "_Frame | None" = None, lane: np.ndarray | None = None) -> None:
        self.times, self.outer, self.lane = times, outer, lane
        self.values: dict[Any, _Number] = {}
        self.numbers: list[np.ndarray] | None = None

    def where(self, condition: np.ndarray | int) -> "_Frame":
        """The lanes that go on; what is known of values stays."""
        frame = _Frame(self.times * (np.asarray(condition) != 0), self.outer, self.lane)
        frame.values, frame.numbers = self.values, self.numbers
        return frame

    def often(self, turns: np.ndarray | int) -> "_Frame":
        """All turns of a loop at once: what differs from turn to turn is not known."""
        frame = _Frame(self.times * turns, self, np.arange(len(self.times)))
        return frame

    def turn_by_turn(self, turns: np.ndarray) -> "_Frame":
        """A lane for each turn of a loop."""
        lane = np.repeat(np.arange(len(self.times)), turns)
        return _Frame(self.times[lane], self, lane)

    def given(self, value: Any) -> tuple[bool, _Number]:
        """(whether it was set, here or further out; what it is)."""
        if value in self.values:
            return True, self.values[value]
        if self.outer is None:
            return False, None
        known, found = self.outer.given(value)
        if known and isinstance(found, np.ndarray):
            found = found[self.lane]
        return known, found

    def place(self, axis: int) -> _Number:
        """The number of the program along an axis of a GPU's grid."""
        if self.outer is None:
            return None if self.numbers is None else self.numbers[axis]
        found = self.outer.place(axis)
        return found[self.lane] if isinstance(found, np.ndarray) else found


class _Run:
    """Counts what the code of a kernel does in all programs of its grid, the last axis the fastest."""

    def __init__(self, grid: list[int]) -> None:
        self.grid, programs = grid, math.prod(grid)
        if programs <= MAX_LANES:
            self.frame = _Frame(np.ones(programs, np.int64))
            places = np.unravel_index(np.arange(programs), grid) if grid else ()
            self.frame.numbers = [place.astype(np.int64) for place in places]
        else:  # no program is told from another
            self.frame = _Frame(np.array([programs], np.int64))
        self.matmul: dict[str, int] = {}
        self.elementwise = self.transcendental = 0
        self.read: dict[int, int] = {}  # bits of each argument
        self.lost_reads = False

    @property
    def flops(self) -> Flops:
        """In all; of the class of operands that most products are of."""
        most = max(self.matmul, key=lambda precision: self.matmul[precision], default="bf16")
        return Flops(sum(self.matmul.values()), self.elementwise, self.transcendental, most)

    def arguments(self, main: Any, axes: int) -> None:
        """A TPU's code has the number of its program as arguments."""
        for axis, argument in zip(range(axes), main.arguments, strict=False):
            self.frame.values[argument] = None if self.frame.numbers is None else self.frame.numbers[axis]

    def block(self, block: Any, frame: _Frame, times: int = 1) -> None:
        """Counts the operations of a block, each `times` times in every lane."""
        often = int(np.sum(frame.times)) * times
        if not often:
            return
        for op in block.operations:
            op = op.operation
            if op.name == "scf.for":
                self._loop(op, frame)
            elif op.name == "scf.if":
                self._branch(op, frame)
            elif op.name in _COMBINING:
                self.block(op.regions[0].blocks[0], frame, times * _elements(op.operands[0].type))
            elif op.name in _CALLING or len(op.regions):
                self._other(op, frame)
            else:
                self._count(op, often)

    def _loop(self, op: Any, frame: _Frame) -> None:
        first, end, step, *_ = (self.value(bound, frame) for bound in op.operands)
        body = op.regions[0].blocks[0]
        if first is None or end is None or step is None or not np.all(np.asarray(step) > 0):
            raise Unreadable("with a loop of which data says how often it turns")
        turns = np.maximum(0, -(-(np.asarray(end) - first) // step))
        many = np.broadcast_to(turns, len(frame.times))
        steered = any(inner.operation.name.startswith("scf.") and len(inner.regions) for inner in body.operations)
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

    def _branch(self, op: Any, frame: _Frame) -> None:
        condition, regions = self.value(op.operands[0], frame), [r for r in op.regions if len(r.blocks)]
        if condition is None:
            return self._other(op, frame)
        for region, taken in zip(regions, (condition, np.asarray(condition) == 0), strict=False):
            self.block(region.blocks[0], frame.where(taken))

    def _other(self, op: Any, frame: _Frame) -> None:
        """What nobody knows how often, or whether, it is done: no matter, if it does nothing that counts."""
        if op.name in _CALLING:
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

    def _count(self, op: Any, often: int) -> None:
        if op.name in _PRODUCTS:
            left, result = op.operands[0].type, op.results[0].type
            pairs = _elements(result) * _PRODUCTS[op.name](op)
            precision = _precision(left)
            self.matmul[precision] = self.matmul.get(precision, 0) + 2 * pairs * often
        elif op.name in _LOADS:
            self._load(op, often)
        elif _NO_WORD.search(op.name):
            raise Unreadable(f"with an operation of which nothing is known, {op.name}")
        elif any(_is_float(value.type) for value in (*op.operands, *op.results)):
            values = max((_elements(value.type) for value in (*op.operands, *op.results)), default=1)
            elementwise, transcendental = _arithmetic(op)
            self.elementwise += elementwise * values * often
            self.transcendental += transcendental * values * often

    def _load(self, op: Any, often: int) -> None:
        """Of memory: Triton's loads, and copies that a TPU's kernel starts itself."""
        source = op.operands[0]
        moved = op.results[0].type if len(op.results) else source.type
        argument = _argument(source)
        if argument is None:
            self.lost_reads = True
        else:
            self.read[argument] = self.read.get(argument, 0) + _elements(moved) * _bits(moved) * often

    def value(self, value: Any, frame: _Frame) -> _Number:
        """A whole number that the code computes, of each lane; None where it is of data."""
        known, found = frame.given(value)
        if known:
            return found
        op = _maker(value)
        found = None if op is None else self._computed(op, value, frame)
        frame.values[value] = found
        return found

    def _computed(self, op: Any, value: Any, frame: _Frame) -> _Number:
        if op.name == "arith.constant":
            said = op.attributes["value"]
            return int(said.value) if type(said).__name__ in ("IntegerAttr", "BoolAttr") else None
        if op.name in ("tt.get_program_id", "tt.get_num_programs"):
            axis = op.attributes["axis"].value
            return frame.place(axis) if op.name == "tt.get_program_id" else self.grid[axis]
        if op.name == "scf.if":
            return self._chosen(op, value, frame)
        rule = _cmpi(op) if op.name == "arith.cmpi" else _WHOLE.get(op.name)
        if rule is None:
            return None
        operands = [self.value(operand, frame) for operand in op.operands]
        if any(operand is None for operand in operands):
            return None
        with np.errstate(divide="ignore"):
            return rule(*(np.asarray(operand) for operand in operands))

    def _chosen(self, op: Any, value: Any, frame: _Frame) -> _Number:
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
}
_COMPARISONS = (np.equal, np.not_equal, *(np.less, np.less_equal, np.greater, np.greater_equal) * 2)


def _cmpi(op: Any) -> Callable[..., Any]:
    compare = _COMPARISONS[op.attributes["predicate"].value]
    return lambda a, b: compare(a, b).astype(np.int64)


def _of_dot(op: Any) -> int:
    """What is summed over of tt.dot: [.., M, K] x [.., K, N]."""
    return _dims(op.operands[0].type)[-1]


def _of_matmul(op: Any) -> int:
    """Likewise of tpu.matmul, which names the dimensions of its left operand first."""
    named = re.search(r"<\[([\d, ]*)\]", str(op.attributes["dimension_numbers"]))
    dims = _dims(op.operands[0].type)
    return math.prod(dims[int(d)] for d in named[1].split(",") if d.strip()) if named else dims[-1]


_PRODUCTS = {"tt.dot": _of_dot, "tpu.matmul": _of_matmul}
_NO_WORD = re.compile(r"dot|matmul|contract|mma|conv")  # products, by their names, without a rule
_LOADS = ("tt.load", "tpu.enqueue_dma")
_COMBINING = ("tt.reduce", "tt.scan")  # with a region for each two values
_CALLING = ("tt.call", "func.call", "cf.br", "cf.cond_br")
_ELEMENTWISE = re.compile(
    r"arith\.(add|sub|mul|div|rem|neg|cmp|max|min|maximum|minimum|maxnum|minnum)f|arith\.select|math\.(abs|copysign)f"
    r"|math\.(ceil|floor|round|roundeven|trunc)|vector\.(multi_)?reduction|tt\.elementwise_inline_asm|tt\.clampf"
    r"|tpu\.(all_reduce|reduce_index)"
)
_SPECIAL = re.compile(r"\b(ex2|lg2|tanh|sin|cos|rsqrt|sqrt|rcp)\.")  # instructions of a GPU
_INSIDE = re.compile(r"__nv_(f?abs|ceil|floor|round|rint|trunc|fmin|fmax|copysign)f?")


def _arithmetic(op: Any) -> tuple[int, int]:
    """(elementwise, transcendental) FLOPs of each value."""
    if op.name in ("math.fma", "vector.fma"):
        return 2, 0
    if op.name == "tt.extern_elementwise":
        return (1, 0) if _INSIDE.fullmatch(op.attributes["symbol"].value) else (0, 1)
    if op.name == "tt.elementwise_inline_asm" and _SPECIAL.search(op.attributes["asm_string"].value):
        return 0, 1
    if _ELEMENTWISE.fullmatch(op.name):
        return 1, 0
    return 0, int(op.name.startswith("math."))


# What a pointer, or a part of a TPU's array, is made of.
_PARTS = re.compile(r"tt\.(addptr|splat|broadcast|expand_dims|reshape|bitcast)|tpu\.memref_\w+|memref\.\w*cast")


def _argument(value: Any) -> int | None:
    """The number of the kernel's argument that a pointer points into; None where that is not known."""
    while (op := _maker(value)) is not None:
        if not _PARTS.fullmatch(op.name):
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


def _precision(type_: Any) -> str:
    """As `flops.precision` of the operand of a product."""
    element = _element(type_)
    wide = {"f32": "f32", "f64": "f32"}.get(element)
    narrow = {"i8": "int8", "i4": "int8"}.get(element)
    return wide or narrow or ("fp8" if element.startswith("f8") else "fp4" if element.startswith("f4") else "bf16")
