"""Optimised HLO text -> Module, Computation, Instruction, Shape. Pure syntax: nothing here knows what anything costs.

The grammar is the one that `compiled.as_text()` and XLA dumps print, on CPU, GPU and TPU: one instruction a line,
`[ROOT] %name = shape opcode(operands), attribute=value, ..., metadata={...}, backend_config={...}`, grouped in
computations, one of them the ENTRY. Attributes are kept as text and read on demand, because a bill of a large program
needs few of them and has to be quick.
"""

import gzip
import math
import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

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
HBM = 0  # the memory space of a layout without S(n)


class HloError(ValueError):
    """The text is not HLO that can be read: says where and what."""


class Shape:
    """An array's type and layout, or a tuple of shapes.

    Attributes:
      dtype: element type as HLO names it ("bf16"), or "tuple".
      dims: sizes, outermost first as written (logical order).
      minor_to_major: the layout, fastest-varying dimension first; () where the text gives none.
      tiles: TPU tiling, e.g. ((8, 128), (2, 1)).
      space: memory space S(n); 0 is HBM.
      bits: bits an element takes in memory.
      leaves: the arrays of a tuple, flattened; of an array, itself.
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
        "space",
        "tiles",
    )

    def __init__(self, dtype: str, dims: tuple[int, ...] = (), layout: str = "", parts: tuple["Shape", ...] = ()):
        self.dtype, self.dims, self.parts = dtype, dims, parts
        self.minor_to_major: tuple[int, ...] = ()
        self.tiles: tuple[tuple[int, ...], ...] = ()
        self.space = HBM
        self.bits = BITS.get(dtype, 0)
        if dtype == "tuple":
            self.leaves = tuple(leaf for part in parts for leaf in part.leaves)
            self.elements = 0
            self.bytes = sum(part.bytes for part in parts)
            self.padded_bytes = sum(part.padded_bytes for part in parts)
            return
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
        self.leaves = (self,)
        self.elements = math.prod(dims)
        self.bytes = (self.elements * self.bits + 7) // 8
        self.padded_bytes = (self._padded_elements() * self.bits + 7) // 8 if self.tiles and dims else self.bytes

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


def parse_shape(text: str, cache: dict[str, Shape] | None = None) -> Shape:
    """The Shape written as `text`, an array or a tuple of any depth; `cache` shares equal ones."""
    if cache is not None and text in cache:
        return cache[text]
    if text.startswith("("):
        shape = Shape("tuple", parts=tuple(parse_shape(part, cache) for part in _split(text[1:-1])))
    else:
        match = _ARRAY.match(text)
        if match is None:
            shape = Shape(text)  # token[] and opaque[] match above; anything else has no size we know
        else:
            dims = tuple(int(d.lstrip("<=")) for d in match[2].split(",") if d)
            shape = Shape(match[1], dims, match[3] or "")
    if cache is not None:
        cache[text] = shape
    return shape


def _split(text: str) -> list[str]:
    """Splits at top-level commas, leaving out `/*index=5*/` comments."""
    if "/*" in text:
        text = re.sub(r"/\*.*?\*/", "", text)
    parts, depth, start = [], 0, 0
    for index, char in enumerate(text):
        if char in "([{":
            depth += 1
        elif char in ")]}":
            depth -= 1
        elif char == "," and depth == 0:
            parts.append(text[start:index].strip())
            start = index + 1
    tail = text[start:].strip()
    return [*parts, tail] if tail else parts


class Instruction:
    """One line of HLO.

    Attributes:
      name, opcode, shape: as written; index: position in its computation (the schedule, where the module has one).
      operands: the instructions it reads, in order; users: those that read it.
      arguments: the text between the parentheses (a parameter's number, a constant's value).
      attributes: the text after them, metadata and backend_config cut off; read it through `attribute`.
      op_name: where the source program made it, e.g. "jit(f)/attention/qkv/dot_general"; "" where unknown.
      backend_config: raw text, "" where none.
      called: computations named by calls=, to_apply=, body=, condition=, branch_computations=.
    """

    __slots__ = (
        "arguments",
        "attributes",
        "backend_config",
        "called",
        "computation",
        "index",
        "name",
        "op_name",
        "opcode",
        "operands",
        "shape",
        "users",
    )

    def __init__(self, name: str, opcode: str, shape: Shape, arguments: str, attributes: str, index: int):
        self.name, self.opcode, self.shape, self.arguments, self.index = name, opcode, shape, arguments, index
        self.operands: list[Instruction] = []
        self.users: list[Instruction] = []
        self.called: list[Computation] = []
        self.computation: Computation
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
    def is_fusion(self) -> bool:
        """Whether it runs a fused computation, asynchronously or not."""
        return self.opcode in ("fusion", "fusion-start")

    @property
    def custom_call_target(self) -> str:
        match = re.search(r'custom_call_target="([^"]*)"', self.attributes)
        return match[1] if match else ""

    @property
    def parameter_number(self) -> int:
        return int(self.arguments)

    def __repr__(self) -> str:
        return f"%{self.name} = {self.shape!r} {self.opcode}({', '.join('%' + o.name for o in self.operands)})"


class Computation:
    """A named list of instructions with one root; parameters in order of their number.

    Attributes:
      fused: whether it is the body of a fusion, so that nothing in it touches memory by itself.
      kept: numbers of the parameters whose buffers it may not overwrite (arguments of the program not donated).
    """

    __slots__ = ("by_name", "fused", "instructions", "kept", "name", "parameters", "root")

    def __init__(self, name: str):
        self.name = name
        self.instructions: list[Instruction] = []
        self.by_name: dict[str, Instruction] = {}
        self.parameters: list[Instruction] = []
        self.root: Instruction
        self.fused = False
        self.kept: frozenset[int] = frozenset()

    def __iter__(self) -> Iterator[Instruction]:
        return iter(self.instructions)

    def __repr__(self) -> str:
        return f"{self.name} ({len(self.instructions)} instructions)"


class Module:
    """A whole program: `entry` and every computation by name.

    Attributes:
      name: as in the HloModule line; header: that line, whole.
      computations: by name; entry: the one that runs.
    """

    def __init__(self, name: str, header: str, computations: dict[str, Computation], entry: Computation):
        self.name, self.header, self.computations, self.entry = name, header, computations, entry

    @cached_property
    def aliases(self) -> dict[int, int]:
        """Donated buffers: flattened output leaf -> entry parameter number."""
        start = self.header.find("input_output_alias={")
        if start < 0:
            return {}
        text = self.header[start : self.header.find("entry_computation_layout")]
        offsets = [0]
        for part in self.entry.root.shape.parts or (self.entry.root.shape,):
            offsets.append(offsets[-1] + len(part.leaves))
        found: dict[int, int] = {}
        for path, parameter in re.findall(r"\{([\d, ]*)\}: \((\d+),", text):
            index = [int(n) for n in path.split(",") if n.strip()]
            if len(index) <= 1:  # jitted programs return flat tuples; deeper paths have no donated argument
                found[offsets[index[0]] if index else 0] = int(parameter)
        return found

    @cached_property
    def num_partitions(self) -> int:
        match = re.search(r"num_partitions=(\d+)", self.header)
        return int(match[1]) if match else 1


# Names after these keys are computations that the instruction runs.
_CALLED = re.compile(
    r"\b(?:calls|to_apply|body|condition|true_computation|false_computation|branch_computations|called_computations"
    r"|async_wrapped|comparator|scatter|select)=(?:%?([\w.\-]+)|\{([^}]*)\})"
)
_NAME = re.compile(r"%([\w.\-]+)")
# What a Pallas kernel for TPU says of itself is printed over several lines.
_KERNEL_METADATA = re.compile(r"kernel_metadata=\{\n.*?\n\}", re.DOTALL)
_HEAD = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = ")


def parse(text: str) -> Module:
    """Reads the text of one optimised HLO module. Linear in its length.

    Raises:
      HloError: no module, no entry, a line that cannot be read or an operand that is not defined.
    """
    start = text.find("HloModule ")
    if start < 0:
        raise HloError(f"no HloModule line in {len(text)} characters that begin {text[:40]!r}")
    lines = _KERNEL_METADATA.sub(lambda found: found[0].replace("\n", ""), text[start:]).splitlines()
    header = lines[0]
    name = header[len("HloModule ") :].split(",")[0].strip()
    shapes: dict[str, Shape] = {}
    computations: dict[str, Computation] = {}
    entry = None
    current: Computation | None = None
    pending: list[tuple[Instruction, str]] = []
    for number, line in enumerate(lines[1:], start=2):
        if not line:
            continue
        if current is None:
            if line.endswith("{") and "->" in line:
                is_entry = line.startswith("ENTRY ")
                title = line[6:] if is_entry else line
                current = Computation(title.split(None, 1)[0].split("(")[0].lstrip("%"))
                computations[current.name] = current
                if is_entry:
                    entry = current
            continue  # header tables (FileNames, StackFrames, ...) between computations
        if line.startswith("}"):
            _finish(current)
            current = None
            continue
        _read_line(line, number, current, shapes, pending)
    if current is not None:
        raise HloError(f"computation {current.name} is not closed: the text is cut off")
    if entry is None:
        raise HloError(f"module {name} has no ENTRY computation")
    for instruction, called in pending:
        for one, several in _CALLED.findall(called):
            for target in [one] if one else [n.strip().lstrip("%") for n in several.split(",") if n.strip()]:
                if target in computations:
                    instruction.called.append(computations[target])
                    if instruction.is_fusion:
                        computations[target].fused = True
    module = Module(name, header, computations, entry)
    entry.kept = frozenset(range(len(entry.parameters))) - frozenset(module.aliases.values())
    return module


def _read_line(
    line: str,
    number: int,
    computation: Computation,
    shapes: dict[str, Shape],
    pending: list[tuple[Instruction, str]],
) -> None:
    head = _HEAD.match(line)
    if head is None:
        raise HloError(f"line {number} is not an instruction: {line.strip()[:80]!r}")
    position = head.end()
    end = _closing(line, position) + 1 if line.startswith("(", position) else line.find(" ", position)
    opening = line.find("(", end)
    if end <= position or opening < 0:
        raise HloError(f"line {number} has no shape and opcode: {line.strip()[:80]!r}")
    shape_text = line[position:end]
    shape = shapes.get(shape_text) or parse_shape(shape_text, shapes)
    opcode = line[end + 1 : opening]
    if opcode == "constant":
        closing = _constant_end(line, opening)
    else:
        closing = line.find(")", opening)
        if line.find("(", opening + 1, closing) >= 0:  # operands written with their tiled shapes
            closing = _closing(line, opening)
    arguments = line[opening + 1 : closing]
    instruction = Instruction(head[2], opcode, shape, arguments, line[closing + 2 :], len(computation.instructions))
    instruction.computation = computation
    computation.instructions.append(instruction)
    computation.by_name[instruction.name] = instruction
    if head[1]:
        computation.root = instruction
    if opcode == "parameter":
        computation.parameters.append(instruction)
    elif opcode not in ("constant", "iota"):
        names = _NAME.findall(arguments) if "%" in arguments else [a.split()[-1] for a in _split(arguments)]
        for operand_name in names:
            operand = computation.by_name.get(operand_name)
            if operand is None:
                raise HloError(f"line {number}: operand %{operand_name} of %{instruction.name} is not defined")
            instruction.operands.append(operand)
            operand.users.append(instruction)
        if "=" in instruction.attributes:
            pending.append((instruction, instruction.attributes))


def _closing(line: str, opening: int) -> int:
    depth = 0
    for index in range(opening, len(line)):
        char = line[index]
        if char == "(":
            depth += 1
        elif char == ")":
            depth -= 1
            if depth == 0:
                return index
    raise HloError(f"unbalanced parenthesis in {line.strip()[:80]!r}")


def _constant_end(line: str, opening: int) -> int:
    """The end of a literal: it may hold braces, comments and quoted text, never an unquoted parenthesis but complex."""
    end = line.find("), ", opening)
    return end if end >= 0 else len(line) - 1


def _finish(computation: Computation) -> None:
    if not computation.instructions:
        raise HloError(f"computation {computation.name} is empty")
    if not hasattr(computation, "root"):
        computation.root = computation.instructions[-1]
    computation.parameters.sort(key=lambda parameter: parameter.parameter_number)


def read(path: str | Path) -> str:
    """HLO text of a file, plain or .gz.

    Raises:
      HloError: the file cannot be read or is not text.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
        return (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise HloError(f"{path}: {error}") from error
