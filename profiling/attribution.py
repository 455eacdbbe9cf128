"""Who caused it: the component and phase of an instruction, the role of a value, the tax on a copy.

Component and phase come from `op_name`, the path that jax writes for each operation. What has no name inherits along
the dataflow: inside a fusion from its users, a copy from its consumer, else its producer. Roles start at the program's
arguments and its donated outputs and follow the data through loops, tuples, slices, copies and updates in place.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

from .hlo import HBM, HOST, RUNS, Computation, Instruction, Module
from .inference import Found, Inference, is_product
from .names import BARE, NORMS, Name, Names, phase
from .traffic import first_result, fused_results, fusion_readers, inside

ROLES = ("weights", "cache", "activations", "gradients", "optimizer", "inputs", "constants")
PHASES = ("forward", "recompute", "backward", "update")
TAXES = ("layout", "slice", "convert", "dequantize", "padding", "masked")
# Values that outlive a step; a copy of one is work that no line of the model asked for.
PERSISTENT = frozenset(("weights", "cache", "optimizer"))


class Blame(NamedTuple):
    """Whose work it is. `component` is None where nothing names one: the unattributed row. `source`: one of
    names.SOURCES, what names it."""

    component: str | None
    phase: str
    source: str = "scope"


NOBODY = Blame(None, "forward")


class Origin(NamedTuple):
    """What a value is: its role and, where it is a copy that a tax made, that tax."""

    role: str
    tax: str | None = None


# --- component and phase by name -----------------------------------------------------------------------------------


def name_blame(op_name: str, names: Names) -> Blame:
    """Component and phase that an op_name path says. Where `a;b` joins two sources, the first with a component.

    The innermost component counts (`loss/logits/dot_general` is logits).
    """
    for name in op_name.split(";"):
        found = names.of_operation(name)
        if found is not None:
            return Blame(found.component, _phase(name, found.component), found.source)
    return Blame(None, _phase(op_name, None))


def _phase(name: str, component: str | None) -> str:
    return "update" if component == "optimizer" else phase(name)


# --- roles of arguments --------------------------------------------------------------------------------------------

# What an argument's path says where the caller does not. First match wins; the path is lower case.
_ROLE_NAMES = (
    ("optimizer", r"opt_state|optimizer|\bmu\b|\bnu\b|moment|\bopt\b"),
    ("cache", r"cache|\bkv\b|past_key|key_values"),
    ("weights", r"param|weight|kernel|embedding|\bmodel\b|\bw\d*\b|scale|bias"),
)


def argument_role(path: str, roles: Mapping[str, str]) -> str | None:
    """The role of an entry parameter whose op_name is `path`, such as `params['layers'][0]['wq']`; None: not said.

    Args:
      roles: argument name -> role, as the caller knows it; the longest matching prefix wins.
    """
    best = max((name for name in roles if re.match(re.escape(name) + r"(?!\w)", path)), key=len, default=None)
    if best is not None:
        return roles[best]
    lower = path.lower()
    return next((role for role, pattern in _ROLE_NAMES if re.search(pattern, lower)), None)


def _role_by_own_name(parameter: Instruction, roles: Mapping[str, str]) -> str | None:
    """Of a parameter without an op_name, which may be called as in the program; compilers say `param.1`, `Arg_0.2`."""
    if parameter.op_name or re.fullmatch(r"(param|parameter|arg|p)[_.\d]*", parameter.name, re.IGNORECASE):
        return None
    return argument_role(parameter.name, roles)


# --- the taxes of kernels that only move data ------------------------------------------------------------------------

_RENAMING = frozenset("parameter constant tuple get-tuple-element bitcast reshape broadcast iota".split())
_COPYING = frozenset(["copy", "transpose"])
_SLICING = frozenset(["dynamic-slice", "slice"])
_NARROW = frozenset("s8 u8 s4 u4 s2 u2 f8e4m3fn f8e5m2 f4e2m1fn f8e4m3".split())


def movement_tax(kernel: Instruction) -> str | None:
    """The tax on a kernel that only moves data or changes its type; None for one that does work.

    "layout": copies and transposes. "slice": copies a part out of a stack. "convert": the same numbers in another
    float type. "dequantize": narrow numbers written out in a wide type, scales applied or not.
    """
    if any(leaf.space == HOST for value in (kernel, *kernel.operands) for leaf in value.shape.leaves):
        return None  # offloading and fetching: the model asks for it
    instructions = inside(kernel)
    result = kernel.called[0].root if kernel.is_fusion else kernel
    opcodes = {i.opcode for i in instructions if i.shape.elements > 1 or i.opcode in _SLICING} - _RENAMING
    if not opcodes:
        return None
    if opcodes <= _COPYING:
        source, target = instructions[0].operands[0].shape if instructions[0].operands else result.shape, result.shape
        # A copy between memories (HBM to VMEM) is how a chip reads, not a tax; unless it comes back in another order.
        reordered = source.minor_to_major != target.minor_to_major
        return "layout" if source.space == target.space or (target.space == HBM and reordered) else None
    if opcodes <= _COPYING | _SLICING and "dynamic-slice" in opcodes:
        return "slice"
    if "convert" not in opcodes:
        return None
    narrow = any(i.opcode == "parameter" and i.shape.dtype in _NARROW for i in instructions) or (
        result.opcode == "convert" and result.operands[0].shape.dtype in _NARROW
    )
    wide = any(leaf.dtype[0] in "fb" and leaf.dtype not in _NARROW for leaf in result.shape.leaves)
    if narrow and wide and opcodes <= _COPYING | _SLICING | {"convert", "multiply", "subtract"}:
        return "dequantize"
    floats = all(i.shape.dtype[0] in "fb" for i in instructions if i.opcode == "convert")
    return "convert" if floats and opcodes <= _COPYING | _SLICING | {"convert"} else None


# These hand values on, of several components at once: nothing is inherited through them.
_CARRIERS = RUNS | frozenset("tuple parameter async-update call-update async-done call-done".split())

# What they fetch is still what it was; what an all-reduce-start makes is new.
_HANDING_ON = frozenset(
    f"{opcode}-start" for opcode in ("copy", "slice", "dynamic-slice", "all-gather", "collective-permute")
)


# --- dataflow ------------------------------------------------------------------------------------------------------


class Dataflow:
    """Which values of a module are one buffer, and where each comes from.

    A value is one array of one top-level instruction. Values that share a buffer by construction (tuples, loop
    carries, calls, updates in place) are united; a copy, slice or gathered shard of a value remembers its source.
    """

    def __init__(self, module: Module, roles: Mapping[str, str], names: Names | None = None):
        self.module = module
        self._written_names = names or Names()
        self._base: dict[Instruction, int] = {}
        self._parent: list[int] = []
        self._sources: list[tuple[int, int, str | None]] = []
        self._blame: dict[Instruction, Blame] = {}
        self._names: dict[str, Blame] = {"": NOBODY}
        self._found: dict[Instruction, Found] = {}
        self._scoped = True  # whether the program opens scopes of ours, so that a product too is of what surrounds it
        self._moves: dict[Instruction, str | None] = {}
        self.computations: list[Computation] = []
        self._visit(module.entry)
        for computation in self.computations:
            for instruction in computation.instructions:
                self._unite_instruction(instruction)
        for leaf, number in module.aliases.items():
            self._unite(self._id(module.entry.root, leaf), self._id(module.entry.parameters[number]))
        self._role: dict[int, str] = {}
        self._said: set[int] = set()
        for parameter in module.entry.parameters:
            role = argument_role(parameter.op_name, roles)
            for leaf in range(len(parameter.shape.leaves)):
                node = self.node(parameter, leaf)
                self._role.setdefault(node, role or _role_by_own_name(parameter, roles) or "inputs")
                if role is not None:
                    self._said.add(node)
        self._source: dict[int, list[tuple[int, str | None]]] = {}
        for target, source, tax in self._sources:
            target, source = self._find(target), self._find(source)
            if target != source:
                self._source.setdefault(target, []).append((source, tax))
        self._infer()
        self._name_everything()
        self._origin: dict[int, Origin] = {}
        self._find_gradients()

    # -- building

    def _visit(self, computation: Computation) -> None:
        """Lists the executed computations, callers before what they call; fusions' bodies are not among them."""
        seen: set[Computation] = set()
        stack = [computation]
        while stack:
            current = stack.pop()
            if current in seen:
                continue
            seen.add(current)
            self.computations.append(current)
            for instruction in current.instructions:
                self._base[instruction] = len(self._parent)
                self._parent.extend(range(len(self._parent), len(self._parent) + max(1, len(instruction.shape.leaves))))
                if instruction.opcode in RUNS:
                    stack.extend(instruction.called)

    def _id(self, instruction: Instruction, leaf: int = 0) -> int:
        return self._base[instruction] + leaf

    def _find(self, node: int) -> int:
        parent = self._parent
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    def _unite(self, a: int, b: int) -> None:
        a, b = self._find(a), self._find(b)
        if a != b:
            self._parent[max(a, b)] = min(a, b)

    def _unite_values(self, a: Instruction, b: Instruction, a_leaf: int = 0, b_leaf: int = 0) -> None:
        for n in range(min(len(a.shape.leaves) - a_leaf, len(b.shape.leaves) - b_leaf)):
            self._unite(self._id(a, a_leaf + n), self._id(b, b_leaf + n))

    def _unite_instruction(self, i: Instruction) -> None:
        opcode = i.opcode
        if opcode == "tuple":
            leaf = 0
            for operand in i.operands:
                self._unite_values(i, operand, leaf)
                leaf += len(operand.shape.leaves)
        elif opcode == "get-tuple-element":
            self._unite_values(i, i.operands[0], 0, i.operands[0].shape.starts[i.number])
        elif opcode in ("bitcast", "reshape", "opt-barrier", "optimization-barrier", "add-dependency", "domain"):
            self._unite_values(i, i.operands[0])
        elif opcode == "while":
            for called in i.called:
                if called.parameters:
                    self._unite_values(i, called.parameters[0])
                if len(called.root.shape.leaves) == len(i.shape.leaves) and called.root.shape.parts:
                    self._unite_values(i, called.root)
            self._unite_values(i, i.operands[0])
        elif opcode in ("call", "call-start", "async-start", "conditional"):
            self._unite_called(i)
        elif opcode in ("dynamic-update-slice", "dynamic-update-slice-start", "scatter"):
            self._unite_values(i, i.operands[0], first_result(i))
        elif i.is_fusion:
            self._unite_fusion(i)
        elif opcode.endswith("-done") and i.operands:
            self._unite_done(i, i.operands[0])
        elif opcode == "custom-call":
            if i.custom_call_target == "ConcatBitcast":
                for operand in i.operands:
                    self._unite_values(i, operand)
            self._unite_aliased(i)
        elif opcode.endswith("-start"):
            if opcode in _HANDING_ON:
                first = first_result(i)
                for n, operand in enumerate(i.operands[: len(i.shape.leaves) - first]):
                    self._sources.append((self._id(i, first + n), self._id(operand), None))
        elif i.operands and not i.operands[0].shape.parts:
            if opcode in ("all-gather", "collective-permute", "slice"):
                for n, operand in enumerate(i.operands[: len(i.shape.leaves)]):
                    self._sources.append((self._id(i, n), self._id(operand), None))
            elif (tax := self.movement_tax(i)) or opcode == "copy":
                self._sources.append((self._id(i), self._id(i.operands[0]), tax))

    def _unite_called(self, i: Instruction) -> None:
        for number, called in enumerate(i.called):
            operands = i.operands[number + 1 : number + 2] if i.opcode == "conditional" else i.operands
            for parameter, operand in zip(called.parameters, operands, strict=False):
                self._unite_values(parameter, operand)
            self._unite_values(i, called.root, first_result(i))

    def _unite_done(self, done: Instruction, start: Instruction) -> None:
        origin = start
        while origin.opcode in ("async-update", "call-update"):
            origin = origin.operands[0]
        first = first_result(origin) if origin.opcode.endswith("-start") else 0
        for n in range(min(len(done.shape.leaves), len(start.shape.leaves) - first)):
            self._unite(self._id(done, n), self._id(start, first + n))

    def _unite_aliased(self, i: Instruction) -> None:
        text = i.attribute("output_to_operand_aliasing")
        for path, number in re.findall(r"\{([\d, ]*)\}: \((\d+),", text or ""):
            leaf = int(path.split(",")[0]) if path.strip() else 0
            if leaf < len(i.shape.leaves) and int(number) < len(i.operands):
                self._unite(self._id(i, leaf), self._id(i.operands[int(number)]))

    def _unite_fusion(self, i: Instruction) -> None:
        first = first_result(i)
        results = fused_results(i)[: len(i.shape.leaves) - first]
        for leaf, result in enumerate(results, start=first):
            same, by = result.updates, result.by
            if by.opcode == "parameter":
                same = i.operands[by.number]
            elif "AsyncCollectiveDone" in by.attributes and [o.opcode for o in by.operands[1:2]] == ["parameter"]:
                same = i.operands[by.operands[1].number]
            elif "AsyncCollectiveStart" in by.attributes and i.operands and leaf + 1 < len(i.shape.leaves):
                same = i.operands[0]
                self._sources.append((self._id(i, leaf + 1), self._id(same), None))
            if same is not None and not same.shape.parts:
                self._unite(self._id(i, leaf), self._id(same))
        self._unite_aliased(i)
        if i.operands and len(results) == 1 and (tax := self.movement_tax(i)):
            source = max(i.operands, key=lambda operand: operand.shape.elements)
            if not source.shape.parts:
                self._sources.append((self._id(i, first), self._id(source), tax))

    def movement_tax(self, kernel: Instruction) -> str | None:
        """`movement_tax`, remembered."""
        if kernel not in self._moves:
            self._moves[kernel] = movement_tax(kernel)
        return self._moves[kernel]

    # -- names

    def role_of(self, node: object) -> str | None:
        """The role of the buffer of an argument; and whether somebody says so, the argument's name or the caller."""
        return self._role.get(node) if isinstance(node, int) else None

    def role_is_said(self, node: object) -> bool:
        return node in self._said

    def _infer(self) -> None:
        """Where the names do not tell everything, finds what the arguments' names and the dataflow do."""
        names = self._written_names
        if not names.infers:
            return
        everything = [one for i in self._base for one in ([*inside(i), i] if i.is_fusion else [i])]

        def named(i: Instruction) -> Name | None:
            blame = self._name_blame(i.op_name)
            return None if blame.component is None else Name(blame.component, blame.source)

        def is_open(i: Instruction) -> bool:
            component = self._name_blame(i.op_name).component
            return component in BARE if component is not None else is_product(i)

        blames = (self._name_blame(i.op_name) for i in everything)
        self._scoped = any(blame.source == "scope" and "/" in (blame.component or "") for blame in blames)
        if any(map(is_open, everything)):
            inference = Inference(self, names, named)
            self._found = inference.found
            if self._scoped:  # then what is near by says more than the shape does, but for a softmax between products
                self._found = {
                    i: found
                    for i, found in self._found.items()
                    if found.source != "inferred" or found.component == "attention/core"
                }
            for node, role in inference.roles.items():
                if isinstance(node, int) and node not in self._said:
                    self._role[node] = role

    def _own_blame(self, i: Instruction) -> Blame:
        """What an instruction's own name says of it, or what is found without."""
        blame = self._name_blame(i.op_name)
        found = self._found.get(i)
        if found is None:
            return blame
        phase = "backward" if found.backward and not i.op_name else blame.phase
        return Blame(found.component, "update" if found.component == "optimizer" else phase, found.source)

    def _name_everything(self) -> None:
        """Blames every top-level instruction: by its own name, its fusion's body, its consumer, its producer."""
        nameless: list[Instruction] = []
        for computation in self.computations:
            for i in computation.instructions:
                blame = self._own_blame(i)
                if i.is_fusion:
                    blame = self._exact(blame, self._fusion_blame(i))
                self._blame[i] = blame
                if blame.component is None:
                    nameless.append(i)
        readers: dict[int, tuple[Instruction, Instruction]] = {}

        def reads(i: Instruction) -> None:
            if i.opcode == "get-tuple-element":
                return  # looks at a tuple, reads none of it
            for operand in i.operands:
                for leaf in range(len(operand.shape.leaves)):
                    readers.setdefault(self.node(operand, leaf), (operand, i))

        for i in self._base:
            if i.opcode not in _CARRIERS and self._blame[i].component is not None:
                reads(i)
        for i in reversed(nameless):  # what loops run before the loops, consumers before producers
            if self._inherits(i):
                pairs = [(i, user) for user in i.users if user.opcode not in _CARRIERS]
                # Through a tuple into a loop: whoever reads the buffer there.
                nodes = (self.node(i, leaf) for leaf in range(len(i.shape.leaves)))
                pairs += [readers[node] for node in nodes if node in readers]
                users = (self._user_blame(value, user) for value, user in pairs)
                self._blame[i] = next((blame for blame in users if blame.component is not None), NOBODY)
                if self._blame[i].component is not None:
                    reads(i)
        # What is handed to a loop, such as the zeros that a stack of saved activations starts as, belongs to whoever
        # writes the same buffer inside; all else to its largest operand's maker.
        writers: dict[int, Blame] = {}
        for i, blame in self._blame.items():
            if blame.component is not None and i in self._base and i.opcode not in _CARRIERS:
                for leaf in range(len(i.shape.leaves)):
                    writers.setdefault(self.node(i, leaf), blame)
        for i in nameless:
            if self._blame[i].component is None and self._inherits(i):
                makers = (o for o in sorted(i.operands, key=lambda o: -o.shape.bytes) if o.opcode not in _CARRIERS)
                named = (self._blame[o] for o in makers if self._blame[o].component is not None)
                self._blame[i] = writers.get(self.node(i)) or next(named, self._blame[i])

    def _inherits(self, i: Instruction) -> bool:
        """Whether an instruction without a name is of those around it: of a foreign program, no product is."""
        return i.opcode not in _CARRIERS and (self._scoped or not any(map(is_product, inside(i))))

    def _name_blame(self, op_name: str) -> Blame:
        """`name_blame`, remembered: in an unrolled program every layer has the same names."""
        blame = self._names.get(op_name)
        if blame is None:
            blame = self._names[op_name] = name_blame(op_name, self._written_names)
        return blame

    def _user_blame(self, value: Instruction, user: Instruction) -> Blame:
        """Who in `user` reads `value`: a fusion may serve several components."""
        if user.is_fusion:
            for reader in fusion_readers(user, value):
                if self.blame(reader, user).component is not None:
                    return self.blame(reader, user)
        return self._blame[user]

    def _fusion_blame(self, fusion: Instruction) -> Blame:
        """Blames the inside of a fusion, and says what the whole inherits: its result's component, else any inside."""
        computation = fusion.called[0]
        named = NOBODY
        for i in reversed(computation.instructions):
            blame = self._own_blame(i)
            if i.is_fusion:
                blame = self._exact(blame, self._fusion_blame(i))
            if blame.component is None and (self._scoped or not is_product(i)):
                users = (self._blame.get(user) for user in i.users)
                blame = next((b for b in users if b is not None and b.component is not None), blame)
            if i.is_fusion and blame.component is not None:
                for inner in i.called[0].instructions:
                    if self._blame[inner].component is None and (self._scoped or not is_product(inner)):
                        self._blame[inner] = blame
            self._blame[i] = blame
            named = self._exact(named, blame)
        return named

    def _exact(self, blame: Blame, inner: Blame) -> Blame:
        """What a fusion's name says; or an operation in it does, where the name says nothing, or only the part of which
        that is found to be a piece."""
        part, piece = blame.component, inner.component
        if part is not None and part in BARE and piece is not None and self._written_names.infers:
            return inner if piece.startswith(part + "/") or (part == "norm" and piece in NORMS) else blame
        return inner if part is None and piece is not None else blame

    def blame(self, instruction: Instruction, kernel: Instruction | None = None) -> Blame:
        """The component and phase of an instruction; what has none inside a fusion has those of the kernel."""
        found = self._blame.get(instruction)
        if (found is None or found.component is None) and kernel is not None and kernel is not instruction:
            return NOBODY if not self._scoped and is_product(instruction) else self._blame[kernel]
        return found or NOBODY

    # -- roles

    def runs(self, instruction: Instruction) -> bool:
        """Whether it is a kernel or hands on what kernels make, and not inside of one."""
        return instruction in self._base

    def node(self, value: Instruction, leaf: int = 0) -> int:
        """The buffer an array is in: equal for equal buffers."""
        return self._find(self._id(value, leaf))

    def origin(self, value: Instruction, leaf: int = 0) -> Origin:
        """The role of an array, and the tax that made it where it is a taxed copy of a persistent one."""
        node = self.node(value, leaf)
        if node not in self._origin:
            self._find_origin(node, Origin("constants" if value.opcode in ("constant", "iota") else "activations"))
        return self._origin[node]

    def _find_origin(self, node: int, otherwise: Origin) -> None:
        """Follows the sources of `node`, first things first, to a value that has a role; all on the way have it too."""
        met = {node}  # a loop may lead back
        path = [node]
        taxes: list[str | None] = []  # of each step of the path
        untried = [iter(self._source.get(node, ()))]
        while path:
            here = path[-1]
            if here in self._role:
                self._origin[here] = Origin(self._role[here])
            found = self._origin.get(here)
            if found is not None and found.role != "activations":
                while taxes:  # back to where it was asked
                    path.pop()
                    tax = taxes.pop()
                    if tax is not None:
                        found = Origin(found.role, tax if found.role in PERSISTENT else None)
                    self._origin[path[-1]] = found
                return
            step = None if found else next((step for step in untried[-1] if step[0] not in met), None)
            if step is None:
                path.pop()
                untried.pop()
                del taxes[-1:]
            else:
                met.add(step[0])
                path.append(step[0])
                taxes.append(step[1])
                untried.append(iter(self._source.get(step[0], ())))
        for one in met:  # all that leads here has been looked at
            self._origin.setdefault(one, otherwise)

    def _find_gradients(self) -> None:
        """Marks what the backward pass hands to the optimizer, back through copies, collectives and loop stacks."""
        producers: dict[int, list[Instruction]] = {}
        queue: list[int] = []
        for computation in self.computations:
            for i in computation.instructions:
                for leaf in range(len(i.shape.leaves)):
                    producers.setdefault(self.node(i, leaf), []).append(i)
                if self._blame[i].phase == "update" and i.opcode not in ("tuple", "get-tuple-element", "while"):
                    for operand in i.operands:
                        if self._blame[operand].phase != "update" or operand.opcode == "get-tuple-element":
                            leaves = enumerate(operand.shape.leaves)
                            queue += [self.node(operand, n) for n, leaf in leaves if leaf.elements > 1]
        seen: set[int] = set()
        while queue:
            node = queue.pop()
            if node in seen or node in self._role:
                continue
            seen.add(node)
            made_by = producers.get(node, [])
            if not any(self._blame[i].phase == "backward" for i in made_by):
                continue
            self._role[node] = "gradients"
            for i in made_by:
                carries = i.opcode in ("copy", "convert", "transpose", "all-reduce", "reduce-scatter", "all-to-all")
                updates = i.opcode == "dynamic-update-slice" or (
                    i.is_fusion and any(r.updates is not None for r in fused_results(i))
                )
                if carries or updates or (i.is_fusion and self.movement_tax(i)):
                    # Of an update, the piece: the largest operand that is not the stack itself.
                    pieces = [o for o in i.operands if o.shape.elements > 1 and not o.shape.parts]
                    if updates and pieces:
                        pieces = [o for o in pieces if self.node(o) != node]
                    queue += [self.node(o) for o in pieces if self._blame[o].phase == "backward"]
