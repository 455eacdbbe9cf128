"""Optimised HLO text -> Module, Computation, Instruction, Shape. Pure syntax: nothing here knows what anything costs.

The grammar is the one that `compiled.as_text()` and XLA dumps print, on CPU, GPU and TPU: one instruction a line,
`[ROOT] %name = shape opcode(operands), attribute=value, ..., metadata={...}, backend_config={...}`, grouped in
computations, one of them the ENTRY. Attributes are kept as text and read on demand, because a bill of a large program
needs few of them and has to be quick.
"""

import gc
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import accumulate
from typing import NoReturn

from .harmless import visible

# Bits of one element as it lies in memory. pred takes a byte; sub-byte integers and floats are packed (XLA prints
# `E(4)` in the layout of a packed array, see Shape.bits).
BITS = {
    "pred": 8,
    **{f"{kind}{bits}": bits for kind in "su" for bits in (1, 2, 4, 8, 16, 32, 64)},
    **{"bf16": 16, "f16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128},
    **dict.fromkeys(("f8e5m2", "f8e4m3", "f8e4m3fn", "f8e4m3b11fnuz", "f8e4m3fnuz", "f8e5m2fnuz", "f8e3m4"), 8),
    **{"f8e8m0fnu": 8, "f4e2m1fn": 4, "token": 0, "opaque": 0},
}

# Opcodes that run other computations, which are executed in their own right (a fusion's is part of its kernel).
RUNS = frozenset(("while", "call", "call-start", "async-start", "conditional"))
HBM, HOST = 0, 5  # memory spaces: of a layout without S(n), and the host's memory (XLA's Layout::kHostMemorySpace)

# What is read at most. A character of text takes some 7 bytes of memory, a megabyte some 0.1 s on one core.
MAX_CHARACTERS = 500_000_000
HEAD_CHARACTERS = 1 << 20  # the HloModule line begins within these, or there is none
MAX_NESTING = 100  # of tuples in tuples, and of computations that run computations; compilers use fewer than ten
MAX_RANK, MAX_TILES = 64, 32
MAX_SIZE = (1 << 63) - 1  # of one dimension, as in XLA
# Compilers give each fusion a body of its own. Where a text shares bodies instead, nested in one another, a fusion may
# stand for more instructions than can be read: on average each is read this often at most.
MAX_SHARING = 100


class HloError(ValueError):
    """The text is not HLO that can be read: what was found, what was expected and where.

    line, column: the place, counted from 1; None where there is none to name.
    """

    def __init__(self, message: str, line: int | None = None, column: int | None = None):
        self.line, self.column = line, column
        super().__init__(message if line is None else f"line {line}, column {column}: {message}")


@contextmanager
def collection_paused() -> Iterator[None]:
    """No garbage is collected meanwhile: where millions of objects are made and none is dropped, looking for garbage
    among them takes a third of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class Shape:
    """An array's type and layout, or a tuple of shapes.

    Attributes:
      dtype: element type as HLO names it ("bf16"), or "tuple".
      dims: sizes, outermost first as written (logical order).
      minor_to_major: the layout, fastest-varying dimension first; () where the text gives none.
      tiles: TPU tiling, e.g. ((8, 128), (2, 1)).
      space: memory space S(n); 0 is HBM.
      bits: bits an element takes in memory.
      leaves: the arrays of a tuple, flattened; of an array, itself. starts: of each part of a tuple, its first leaf.
      sized: whether it is known how many bytes it takes; if not, they count as none.
      elements, bytes: logical size; padded_bytes: what the tiled layout occupies.
    """

    __slots__ = (
        "bits",
        "bytes",
        "dims",
        "dtype",
        "elements",
        "leaves",
        "minor_to_major",
        "padded_bytes",
        "parts",
        "sized",
        "space",
        "starts",
        "tiles",
    )

    def __init__(self, dtype: str, dims: tuple[int, ...] = (), layout: str = "", parts: tuple["Shape", ...] = ()):
        self.dtype, self.dims, self.parts = dtype, dims, parts
        self.minor_to_major: tuple[int, ...] = ()
        self.tiles: tuple[tuple[int, ...], ...] = ()
        self.space = HBM
        self.bits = BITS.get(dtype, 0)
        self.starts: tuple[int, ...] = ()
        if dtype == "tuple":
            self.starts = tuple(accumulate((len(part.leaves) for part in parts[:-1]), initial=0)) if parts else ()
            self.sized = all(part.sized for part in parts)
            self.leaves = tuple(leaf for part in parts for leaf in part.leaves)
            self.elements = 0
            self.bytes = sum(part.bytes for part in parts)
            self.padded_bytes = sum(part.padded_bytes for part in parts)
            return
        self.sized = dtype in BITS
        if layout:
            order, _, rest = layout.partition(":")
            self.minor_to_major = tuple(int(d) for d in order.split(",") if d)
            for key, value in re.findall(r"([A-Z#]*)\(([^()]*)\)", rest):
                if key in ("T", ""):
                    self.tiles += (tuple(-1 if d == "*" else int(d) for d in value.split(",") if d),)
                elif key == "S":
                    self.space = int(value)
                elif key == "E":
                    self.bits = int(value)
                    self.sized = True
            self._check_layout()
        self.leaves = (self,)
        self.elements = math.prod(dims)
        self.bytes = (self.elements * self.bits + 7) // 8
        self.padded_bytes = (self._padded_elements() * self.bits + 7) // 8 if self.tiles and dims else self.bytes

    def _check_layout(self) -> None:
        """ValueError where a layout is none of these dimensions."""
        if self.minor_to_major and sorted(self.minor_to_major) != list(range(len(self.dims))):
            raise ValueError(f"a layout of {len(self.dims)} dimensions names each once")
        if len(self.tiles) > MAX_TILES or any(len(tile) > MAX_RANK for tile in self.tiles):
            raise ValueError(f"a layout has at most {MAX_TILES} tiles of at most {MAX_RANK} dimensions")
        sizes = [size for tile in self.tiles for size in tile]
        if any(size != -1 and not 1 <= size <= MAX_SIZE for size in sizes) or not 0 <= self.bits <= MAX_SIZE:
            raise ValueError("tiles and elements have sizes of at least one")

    def _padded_elements(self) -> int:
        """Elements after every tile of the layout has rounded up the dimensions it covers.

        A tile splits the trailing dimensions into (number of tiles, tile); the next tile splits what that leaves.
        Source: XLA documentation, "Tiled layout".
        """
        sizes = [self.dims[d] for d in reversed(self.minor_to_major)] if self.minor_to_major else list(self.dims)
        for tile in self.tiles:
            if len(tile) > len(sizes):
                sizes = [1] * (len(tile) - len(sizes)) + sizes
            keep, covered = sizes[: len(sizes) - len(tile)], sizes[len(sizes) - len(tile) :]
            # T(*): this dimension is not cut but merged whole into the tile.
            tile = tuple(size if t == -1 else t for t, size in zip(tile, covered, strict=True))
            sizes = keep + [-(-size // t) for size, t in zip(covered, tile, strict=True)] + list(tile)
        return math.prod(sizes)

    def __repr__(self) -> str:
        if self.dtype == "tuple":
            return f"({', '.join(map(repr, self.parts))})"
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


_ARRAY = re.compile(r"([a-z]\w*)\[([^\]]*)\](?:\{([^}]*)\})?")
_COMMENT = re.compile(r"/\*.*?\*/")


def parse_shape(text: str, cache: dict[str, Shape] | None = None, nesting: int = 0) -> Shape:
    """The Shape written as `text`, an array or a tuple of any depth; `cache` shares equal ones.

    Raises:
      HloError: it is none. (How deep tuples are nested in one another counts `nesting`.)
    """
    if cache is not None and text in cache:
        return cache[text]
    if nesting > MAX_NESTING:
        raise HloError(f"tuples are nested more than {MAX_NESTING} deep")
    if text.startswith("(") and text.endswith(")"):
        shape = Shape("tuple", parts=tuple(parse_shape(part, cache, nesting + 1) for part in _split(text[1:-1])))
    else:
        match = _ARRAY.fullmatch(text)
        if match is None:
            raise HloError(f"expected a shape such as f32[2,3]{{1,0}}, found {_quoted(text)}")
        try:
            shape = _array(match[1], match[2].split(",") if match[2] else [], match[3] or "")
        except ValueError as error:
            raise HloError(f"{_quoted(text)} is no shape: {error}") from None
    if cache is not None:
        cache[text] = shape
    return shape


def _array(dtype: str, sizes: Sequence[str], layout: str) -> Shape:
    """An array of at most so many elements: `<=8` is a size that may be less when it runs; of `?` nobody knows it."""
    if len(sizes) > MAX_RANK:
        raise ValueError(f"it has {len(sizes)} dimensions; at most {MAX_RANK} are read")
    dims = tuple(1 if size.endswith("?") else int(size.removeprefix("<=")) for size in sizes)
    if any(not 0 <= size <= MAX_SIZE for size in dims):
        raise ValueError("a dimension is from 0 to 2^63 - 1")
    shape = Shape(dtype, dims, layout)
    shape.sized = shape.sized and not any(size.endswith("?") for size in sizes)
    return shape


def _split(text: str) -> list[str]:
    """Splits at top-level commas, leaving out `/*index=5*/` comments. Within arrays commas have no space after them."""
    if "/*" in text:
        text = _COMMENT.sub("", text)
    if not text.strip():
        return []
    parts: list[str] = []
    open_part, depth = [], 0
    for piece in text.split(", "):
        depth += piece.count("(") - piece.count(")")
        open_part.append(piece.strip())
        if depth <= 0:
            parts.append(", ".join(open_part))
            open_part, depth = [], 0
    return [*parts, ", ".join(open_part)] if open_part else parts


def _quoted(text: str, most: int = 60) -> str:
    """For a message: in quotes, harmless to print, and not too long."""
    return f"'{visible(text[:most])}{'...' if len(text) > most else ''}'"


class Instruction:
    """One line of HLO.

    Attributes:
      name, opcode, shape: as written; index: position in its computation (the schedule, where the module has one).
      operands: the instructions it reads, in order; users: those that read it.
      number: of a parameter, which one it is; of a get-tuple-element, which element it takes; else 0.
      arguments: the text between the parentheses (a parameter's number, a constant's value).
      attributes: the text after them, metadata and backend_config cut off; read it through `attribute`.
      op_name: where the source program made it, e.g. "jit(f)/attention/qkv/dot_general"; "" where unknown.
      backend_config: raw text, "" where none.
      called: computations named by calls=, to_apply=, body=, condition=, branch_computations=.
      is_fusion: whether it runs a fused computation, asynchronously or not.
    """

    __slots__ = (
        "arguments",
        "attributes",
        "backend_config",
        "called",
        "computation",
        "index",
        "is_fusion",
        "name",
        "number",
        "op_name",
        "opcode",
        "operands",
        "shape",
        "users",
    )

    def __init__(
        self, computation: "Computation", name: str, opcode: str, shape: Shape, arguments: str, attributes: str
    ):
        self.computation, self.index = computation, len(computation.instructions)
        self.name, self.opcode, self.shape, self.arguments = name, opcode, shape, arguments
        self.is_fusion = opcode in _FUSIONS
        self.operands: Sequence[Instruction] = ()
        self.users: list[Instruction] = []
        self.called: Sequence[Computation] = ()
        self.number = 0
        self.op_name = self.backend_config = ""
        start = attributes.find(" metadata={")
        if start >= 0:
            op_name = attributes.find('op_name="', start)
            if op_name >= 0:
                end = attributes.find('"', op_name + 9)
                while attributes[end - 1] == "\\" and end > 0:
                    end = attributes.find('"', end + 1)
                self.op_name = attributes[op_name + 9 : end].replace("\\'", "'")
        config = attributes.find("backend_config=")
        if config >= 0:
            self.backend_config = attributes[config + 15 :]
            start = config if start < 0 else min(start, config)
        self.attributes = attributes if start < 0 else attributes[:start]

    def attribute(self, key: str) -> str | None:
        """The text of attribute `key`, braces included where it has them; None where there is none."""
        if key not in self.attributes:
            return None
        match = re.search(rf"(?:^|[,\s]){re.escape(key)}=", self.attributes)
        if match is None:
            return None
        depth = 0
        for index in range(match.end(), len(self.attributes)):
            char = self.attributes[index]
            if char in "{([":
                depth += 1
            elif char in "})]":
                depth -= 1
            elif depth == 0 and char in ", ":
                # Lists such as window={...} are braced; a bare value ends at the comma.
                return self.attributes[match.end() : index]
        return self.attributes[match.end() :]

    def integers(self, key: str) -> tuple[int, ...]:
        """Attribute `key={1,0}` as numbers; () where there is none."""
        text = self.attribute(key)
        return tuple(int(n) for n in re.findall(r"-?\d+", text)) if text else ()

    @property
    def custom_call_target(self) -> str:
        match = re.search(r'custom_call_target="([^"]*)"', self.attributes)
        return match[1] if match else ""

    def __repr__(self) -> str:
        return f"%{self.name} = {self.shape!r} {self.opcode}({', '.join('%' + o.name for o in self.operands)})"


_FUSIONS = frozenset(["fusion", "fusion-start"])


class Computation:
    """A named list of instructions with one root; parameters in order of their number, each number once from 0.

    Attributes:
      fused: whether it is the body of a fusion, so that nothing in it touches memory by itself.
      fusion: the one whose body it is, if it is of one alone.
      written_out: see traffic.inside.
      kept: numbers of the parameters whose buffers it may not overwrite (arguments of the program not donated).
    """

    __slots__ = ("by_name", "fused", "fusion", "instructions", "kept", "name", "parameters", "root", "written_out")

    def __init__(self, name: str):
        self.name = name
        self.instructions: list[Instruction] = []
        self.by_name: dict[str, Instruction] = {}
        self.parameters: list[Instruction] = []
        self.root: Instruction
        self.fused = False
        self.fusion: Instruction | None = None
        self.kept: frozenset[int] = frozenset()
        self.written_out: Sequence[Instruction] | None = None

    def __iter__(self) -> Iterator[Instruction]:
        return iter(self.instructions)

    def __repr__(self) -> str:
        return f"{self.name} ({len(self.instructions)} instructions)"


class Module:
    """A whole program: `entry` and every computation by name.

    Attributes:
      name: as in the HloModule line; header: that line, whole.
      computations: by name; entry: the one that runs.
      sized: whether all of its shapes are.
    """

    def __init__(
        self, name: str, header: str, computations: dict[str, Computation], entry: Computation, sized: bool = True
    ):
        self.name, self.header, self.computations, self.entry = name, header, computations, entry
        self.sized = sized

    @cached_property
    def instructions(self) -> dict[str, Instruction]:
        """Every instruction of every computation, by name."""
        return {i.name: i for computation in self.computations.values() for i in computation.instructions}

    @cached_property
    def aliases(self) -> dict[int, int]:
        """Donated buffers: flattened output leaf -> entry parameter number."""
        start = self.header.find("input_output_alias={")
        if start < 0:
            return {}
        text = self.header[start : self.header.find("entry_computation_layout", start)]
        root = self.entry.root.shape
        starts = root.starts or (0,)
        found: dict[int, int] = {}
        for path, parameter in re.findall(r"\{([\d, ]{0,99})\}: \((\d{1,18}),", text):
            index = [int(n) for n in path.split(",") if n.strip()]
            if index[:1] >= [len(starts)] or int(parameter) >= len(self.entry.parameters):
                has = f"{len(starts)} results and {len(self.entry.parameters)} parameters"
                raise HloError(f"input_output_alias={{ {{{path}}}: ({parameter}, ...) }}: the program has {has}")
            if len(index) <= 1:  # jitted programs return flat tuples; deeper paths have no donated argument
                found[starts[index[0]] if index else 0] = int(parameter)
        return found

    @cached_property
    def num_partitions(self) -> int:
        match = re.search(r"num_partitions=(\d{1,9})\b", self.header)
        return int(match[1]) if match else 1


# Names after these keys are computations that the instruction runs.
_CALLED = re.compile(
    r"\b(?:calls|to_apply|body|condition|true_computation|false_computation|branch_computations|called_computations"
    r"|async_wrapped|comparator|scatter|select)=(%?[\w.\-]+|\{[^}]*\})"
)
_HEAD = r"[ \t]+(ROOT )?%?([\w.\-]+) = ([^\s(]\S*|\([^\n]*?\)) ([a-z][\w\-]*)\("
# A line as nearly all are: no parenthesis among the operands.
_LINE = re.compile(_HEAD + r"([^()\n]*)\)(?:,([^\n]*))?\n")
_INSTRUCTION = re.compile(_HEAD)
# The same piece by piece, to say where a line stops being one.
_PIECES = (
    (re.compile(r"[ \t]+(?:ROOT )?%?[\w.\-]+ = "), "expected `%name = `"),
    (re.compile(r"(?:[^\s(]\S*|\([^\n]*?\)) (?=[a-z])"), "expected a shape, such as f32[2]{0}, and an opcode"),
    (re.compile(r"[a-z][\w\-]*\("), "expected an opcode and its operands, such as add(%a, %b)"),
)
_TITLE = re.compile(r"(ENTRY )?(%?)([\w.\-]+)")
_OPERAND = re.compile(r"(?:.* )?%?([\w.\-]+)", re.DOTALL)
_NUMBER = re.compile(r"\d{1,9}")
_LITERALS = frozenset(["constant", "iota"])
_CALLERS = RUNS | _FUSIONS
# How many operands are looked at, of instructions that are read as more than a list of them.
_LEAST_OPERANDS = dict.fromkeys(
    "bitcast reshape convert copy transpose opt-barrier optimization-barrier add-dependency domain while copy-start "
    "slice-start async-update call-update get-tuple-element".split(), 1
) | dict.fromkeys(
    "dynamic-update-slice dot convolution multiply reduce".split(), 2
) | {"scatter": 3, "ragged-dot": 3}  # fmt: skip


def parse(text: str) -> Module:
    """Reads the text of one optimised HLO module. Time and memory are linear in its length.

    Raises:
      HloError: no module, no entry, a line that cannot be read, a name that is not defined, computations that call
        themselves, or more text than is read. The message has line and column.
    """
    if len(text) > MAX_CHARACTERS:
        raise HloError(too_long(len(text)))
    with collection_paused():
        return _Parser(text).module()


def too_long(length: int | None = None) -> str:
    """What is said of a text of more than MAX_CHARACTERS."""
    found = f"{length / 1e6:,.0f} MB" if length else "more"
    return (
        f"at most {MAX_CHARACTERS / 1e6:,.0f} MB of HLO text are read, found {found}: bill fewer layers or the program "
        "scanned over them; or, with memory for 7 times the text, raise stepbill.profiling.hlo.MAX_CHARACTERS"
    )


class _Parser:
    """Reads one text from front to back; names of computations are looked up when all have been read."""

    def __init__(self, text: str):
        self.text = text.replace("\r\n", "\n") if "\r\n" in text[:HEAD_CHARACTERS] else text
        self.shapes: dict[str, Shape] = {}
        self.names: dict[str, str] = {}
        self.computations: dict[str, Computation] = {}
        self.places: dict[Computation, int] = {}  # where each begins
        self.entry: Computation | None = None
        self.callers: list[tuple[Instruction, int]] = []  # and where their lines begin

    def fail(self, position: int, message: str) -> NoReturn:
        """HloError at a place of the text."""
        line = self.text.count("\n", 0, position) + 1
        raise HloError(message, line, position - self.text.rfind("\n", 0, position))

    def fail_at(self, piece: str, start: int, message: str) -> NoReturn:
        """HloError at the first `piece` of the line that begins at `start`."""
        self.fail(max(start, self.text.find(piece, start, self._line_end(start))), message)

    def found(self, position: int) -> str:
        """What is at a place, for a message."""
        end = self._line_end(position)
        return f"found {_quoted(self.text[position:end])}" if end > position else "found the end of the line"

    def _line_end(self, position: int) -> int:
        end = self.text.find("\n", position)
        return len(self.text) if end < 0 else end

    def module(self) -> Module:
        text = self.text
        start = text.find("HloModule ", 0, HEAD_CHARACTERS)
        if start < 0:
            begin = f"{len(text)} characters that begin {_quoted(text, 40)}" if text else "no text"
            self.fail(0, f"expected a line `HloModule name, ...`, found {begin}")
        position = self._line_end(start)
        header = text[start:position]
        name = header[len("HloModule ") :].split(",")[0].strip()
        while position < len(text):
            position += 1
            end = self._line_end(position)
            if text.startswith("{", end - 1) and not text.startswith((" ", "\t"), position):
                end = self._computation(position, end)
            elif text.startswith((" ", "\t"), position) and _INSTRUCTION.match(text, position):
                self.fail(position, f"expected a computation before its instructions, {self.found(position)}")
            elif text.startswith("}", position):
                self.fail(position, "expected a computation, found the end of one")
            elif text.startswith("HloModule ", position):
                self.fail(position, "expected one module, found another: bill them one at a time")
            position = end  # else a table (FileNames, StackFrames, ...), or nothing
        if self.entry is None:
            self.fail(len(text), f"the text is cut off: module {visible(name)} has no ENTRY computation")
        self._resolve()
        self._check_calls()
        sized = all(shape.sized for shape in self.shapes.values())
        module = Module(name, header, self.computations, self.entry, sized)
        try:
            donated = frozenset(module.aliases.values())
        except HloError as error:
            self.fail(start, str(error))
        self.entry.kept = frozenset(range(len(self.entry.parameters))) - donated
        return module

    def _computation(self, position: int, end: int) -> int:
        """Reads the computation whose title is the line at `position`; where the line of its closing brace ends."""
        title = _TITLE.match(self.text, position)
        if title is None:
            self.fail(position, f"expected the name of a computation, {self.found(position)}")
        computation = Computation(title[3])
        if computation.name in self.computations:
            self.fail(title.start(3), f"a second computation %{visible(computation.name)}")
        if title[1] and self.entry is not None:
            self.fail(position, f"a second ENTRY computation; the first is %{visible(self.entry.name)}")
        self.computations[computation.name] = computation
        self.places[computation] = position
        if title[1]:
            self.entry = computation
        position = self._instructions(computation, end + 1, marked=bool(title[2]))
        if not computation.instructions:
            self.fail(self.places[computation], f"computation %{visible(computation.name)} is empty")
        if not hasattr(computation, "root"):
            computation.root = computation.instructions[-1]
        computation.parameters.sort(key=lambda parameter: parameter.number)
        for number, parameter in enumerate(computation.parameters):
            if parameter.number != number:
                found = f"found %{parameter.name} = parameter({parameter.number})"
                self.fail(
                    self.places[computation], f"%{visible(computation.name)}: expected parameter({number}), {found}"
                )
        return self._line_end(position)

    def _instructions(self, computation: Computation, position: int, marked: bool) -> int:
        """Reads the lines from `position` to a closing brace; where that is. `marked`: names have a percent sign."""
        text, shapes, names, by_name = self.text, self.shapes, self.names, computation.by_name
        match, instructions, least = _LINE.match, computation.instructions, _LEAST_OPERANDS.get
        while True:
            start = position
            line = match(text, position)
            if line is not None:
                root, name, shape_text, opcode, arguments, tail = line.groups("")
                position = line.end()
            elif text.startswith("}", position):
                return position
            elif blank := self._blank(computation, position):
                position = blank
                continue
            else:
                root, name, shape_text, opcode, arguments, tail, position = self._long_line(position)
            shape = shapes.get(shape_text) or self._shape(shape_text, start)
            if name in by_name:
                self.fail_at(name, start, f"a second instruction %{name} in computation %{visible(computation.name)}")
            if tail[-1:] == "{":  # what a Pallas kernel for TPU says of itself is printed over several lines
                end = self._line_end(max(text.find("\n}", position - 1), position) + 1)
                tail, position = tail + text[position:end].replace("\n", ""), end + 1
            instruction = Instruction(computation, name, opcode, shape, arguments, tail)
            instructions.append(instruction)
            if op_name := instruction.op_name:
                instruction.op_name = names.setdefault(op_name, op_name)
            if root:
                if hasattr(computation, "root"):
                    self.fail(start, f"a second ROOT in computation %{visible(computation.name)}")
                computation.root = instruction
            if opcode == "parameter":
                instruction.number = self._number(arguments, start, "a parameter's number")
                computation.parameters.append(instruction)
            elif opcode not in _LITERALS:
                try:  # as they are nearly always written: "%a, %b"
                    operands = [by_name[one] for one in arguments[1:].split(", %")] if arguments[:1] == "%" else None
                except KeyError:
                    operands = None
                if operands is None:
                    operands = self._operands(instruction, start)
                if len(operands) < least(opcode, 0):
                    expected = f"expected {least(opcode)} or more"
                    self.fail_at(f" {opcode}(", start, f"{len(operands)} operands of {opcode}; {expected}")
                instruction.operands = operands
                for operand in operands:
                    operand.users.append(instruction)
                if opcode in _CALLERS or ("%" if marked else "=") in instruction.attributes:
                    self.callers.append((instruction, start))
                if opcode == "get-tuple-element":
                    self._take(instruction, start)
                elif opcode == "tuple" and [len(p.leaves) for p in shape.parts] != [
                    len(o.shape.leaves) for o in operands
                ]:
                    self.fail_at(shape_text, start, f"a tuple of {len(operands)} operands; expected their shapes")
            by_name[name] = instruction

    def _blank(self, computation: Computation, position: int) -> int:
        """Where the next line begins, if this one is blank; 0 if it is not."""
        if position >= len(self.text):
            begins = f"begins in line {self.text.count(chr(10), 0, self.places[computation]) + 1}"
            end = f"the end of computation %{visible(computation.name)}, which {begins}"
            self.fail(len(self.text), f"the text is cut off: expected `}}` at {end}")
        end = self._line_end(position)
        return 0 if self.text[position:end].strip() else end + 1

    def _long_line(self, position: int) -> tuple[str, str, str, str, str, str, int]:
        """What _LINE reads, and where the next line begins, of a line with parentheses among its operands, as tiled
        shapes and complex numbers have; or what makes it no instruction."""
        text, end = self.text, self._line_end(position)
        head = _INSTRUCTION.match(text, position)
        if head is None:
            for piece, expected in _PIECES:
                found = piece.match(text, position)
                if found is None:
                    self.fail(position, f"{expected}, {self.found(position)}")
                position = found.end()
        assert head is not None, "its pieces are all there"
        root, name, shape, opcode = head.groups("")
        opening = head.end()
        if opcode == "constant":  # it may hold braces, comments and quoted text
            closing = text.find("), ", opening, end)
            closing = text.rfind(")", opening, end) if closing < 0 else closing
        else:
            closing = _closing(text, opening, end)
        if closing < 0:
            self.fail(end, "the text is cut off: expected `)` after the operands, found the end of the line")
        return root, name, shape, opcode, text[opening:closing], text[closing + 2 : end], end + 1

    def _shape(self, text: str, start: int) -> Shape:
        try:
            return parse_shape(text, self.shapes)
        except HloError as error:
            self.fail_at(text, start, str(error))

    def _number(self, text: str, start: int, what: str) -> int:
        if _NUMBER.fullmatch(text) is None:
            self.fail_at(text, start, f"expected {what}, found {_quoted(text)}")
        return int(text)

    def _operands(self, instruction: Instruction, start: int) -> list[Instruction]:
        """Operands as they may be written: with shapes, comments, or without a percent sign."""
        operands = []
        for part in _split(instruction.arguments):
            name = _OPERAND.fullmatch(part)
            operand = instruction.computation.by_name.get(name[1]) if name else None
            if operand is None:
                self.fail_at(part, start, f"operand {_quoted(part)} of %{instruction.name} is not defined above it")
            operands.append(operand)
        return operands

    def _take(self, instruction: Instruction, start: int) -> None:
        """The number of the element that a get-tuple-element takes."""
        parts = instruction.operands[0].shape.parts
        number = self._number(instruction.attribute("index") or "", start, "index=number")
        if number >= len(parts) or len(parts[number].leaves) != len(instruction.shape.leaves):
            of = f"%{instruction.operands[0].name}, which has {len(parts)}"
            self.fail(start, f"%{instruction.name} takes element {number} of {of}, as {instruction.shape!r}"[:300])
        instruction.number = number

    # -- what calls what

    def _resolve(self) -> None:
        """Finds the computations that instructions name, and holds each call against what it calls."""
        for instruction, start in self.callers:
            called: list[Computation] = []
            for found in _CALLED.finditer(instruction.attributes):
                for target in found[1].strip("{}").split(","):
                    target = target.strip()
                    computation = self.computations.get(target.removeprefix("%"))
                    if computation is not None:
                        called.append(computation)
                    elif target.startswith("%"):
                        self.fail_at(found[0], start, f"computation {_quoted(target)} is not defined")
            if called:
                instruction.called = called
            if problem := _call_problem(instruction):
                self.fail(start, f"{instruction.opcode} %{instruction.name}: {problem}")
            if instruction.is_fusion:
                called[0].fusion = None if called[0].fused else instruction
                called[0].fused = True

    def _check_calls(self) -> None:
        """HloError where computations call themselves, calls are nested too deep, or fusions stand for too much."""
        calls: dict[Computation, list[Instruction]] = {}
        for instruction, _ in self.callers:
            if instruction.called:
                calls.setdefault(instruction.computation, []).append(instruction)
        depth: dict[Computation, int] = {}
        size: dict[Computation, int] = {}  # with the bodies of its fusions and reductions written out
        path: set[Computation] = set()
        for first in self.computations.values():
            stack = [first]
            while stack:
                current = stack[-1]
                called = [one for i in calls.get(current, ()) for one in i.called]
                if current not in depth and current not in path:
                    path.add(current)
                    for one in called:
                        if one in path:
                            self.fail(self.places[one], f"computation %{visible(one.name)} calls itself")
                    stack += [one for one in called if one not in depth]
                    continue
                stack.pop()
                if current in depth:
                    continue
                path.remove(current)
                depth[current] = 1 + max((depth[one] for one in called), default=0)
                inside = sum(size[one] for i in calls.get(current, ()) if i.opcode not in RUNS for one in i.called)
                size[current] = len(current.instructions) + inside
                if depth[current] > MAX_NESTING:
                    self.fail(self.places[current], f"computations are nested more than {MAX_NESTING} deep")
        written = sum(len(computation.instructions) for computation in self.computations.values())
        read = sum(size[one] for one in self.computations.values() if not one.fused)
        if read > MAX_SHARING * written:
            much = f"{written} of them stand for {read}, more than {MAX_SHARING} times as many"
            self.fail(min(self.places.values()), f"instructions share what they run: {much}")


def _closing(text: str, opening: int, end: int) -> int:
    """Where, before `end`, the parenthesis closes inside which `opening` is; -1 if nowhere."""
    depth = 1
    for found in re.finditer(r"[()]", text[opening:end]):
        depth += 1 if found[0] == "(" else -1
        if not depth:
            return opening + found.start()
    return -1


def _call_problem(instruction: Instruction) -> str | None:
    """What is wrong with a fusion or a call, or nothing."""
    opcode, called, leaves = instruction.opcode, instruction.called, len(instruction.shape.leaves)
    if opcode in _CALLERS and not called:
        return "expected the computation that it runs"
    if instruction.is_fusion:
        parameters = len(called[0].parameters)
        if parameters > len(instruction.operands):
            return f"{len(instruction.operands)} operands; %{visible(called[0].name)} has {parameters} parameters"
        results = len(called[0].root.shape.leaves)
        if results > leaves or (opcode == "fusion" and results != leaves):
            return f"{leaves} results; %{visible(called[0].name)} has {results}"
    if opcode == "while":
        names = [(instruction.attribute(key) or "").removeprefix("%") for key in ("body", "condition")]
        body, condition = (next((one for one in called if one.name == name), None) for name in names)
        if body is None or condition is None:
            return "expected a body and a condition"
        carried = [
            instruction.operands[0].shape,
            body.root.shape,
            *(p.shape for p in (*body.parameters, *condition.parameters)),
        ]
        if any(len(shape.leaves) != leaves or len(shape.parts) != len(instruction.shape.parts) for shape in carried):
            return "expected a body that takes and gives what the loop carries"
    return None
