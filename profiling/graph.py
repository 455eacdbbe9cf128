"""Who makes and who reads each array of a module, fusions seen through: what `inference` walks over."""

from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from .hlo import RUNS, Computation, Instruction
from .traffic import first_result

if TYPE_CHECKING:
    from .attribution import Dataflow

Node = int | Instruction  # a buffer of Dataflow, or a value that never leaves a fusion

# Operations whose result is a copy or a part of an operand, or several of them side by side.
MOVES = frozenset(
    "bitcast copy transpose convert reshape slice dynamic-slice broadcast copy-start slice-start concatenate pad "
    "reverse reduce-precision all-gather all-gather-start collective-permute collective-permute-start".split()
)
UPDATES = frozenset(("dynamic-update-slice", "scatter"))
_INDICES = frozenset("s32 u32 s64 u64".split())  # tokens and their places: a list of them is no cache
_HANDS_ON = RUNS | frozenset("parameter tuple get-tuple-element constant async-update call-update".split())
_DEEPEST = 200  # how far a value is followed to the argument that it is a copy of


class Graph:
    """Every operation of a module in the order it runs, with fusions written out and loops and tuples seen through.

    Attributes:
      ops: the operations. inputs, outputs: the nodes that each reads and writes.
      writers, readers: of each node.
      arguments: node -> entry parameter. caches: those of them that are updated by a slice, in place, and what else is
        found to be a cache.
    """

    def __init__(self, flow: "Dataflow"):
        self.flow = flow
        self._caller: dict[Computation, Instruction] = {}
        self.ops: list[Instruction] = []
        fusions: list[Instruction] = []
        for i in self._in_order(flow.module.entry):
            if i.is_fusion:
                fusions.append(i)
            elif i.opcode not in _HANDS_ON and not i.opcode.endswith("-done"):
                self.ops.append(i)
        self.inputs: dict[Instruction, list[Node]] = {}
        self.outputs: dict[Instruction, list[Node]] = {}
        self.writers: dict[Node, list[Instruction]] = {}
        self.readers: dict[Node, list[Instruction]] = {}
        for op in self.ops:
            leaves = ((operand, leaf) for operand in op.operands for leaf in range(len(operand.shape.leaves)))
            self.inputs[op] = list(dict.fromkeys(self.node(*one) for one in leaves))
            for node in self.inputs[op]:
                self.readers.setdefault(node, []).append(op)
            if not flow.runs(op):
                self.outputs[op] = [op]
            else:
                self.outputs[op] = list(dict.fromkeys(self.node(op, n) for n in range(len(op.shape.leaves))))
        for fusion in fusions:
            for leaf, result in enumerate(_results(fusion), start=first_result(fusion)):
                made = self.node(result)
                if made in self.outputs and flow.runs(fusion) and leaf < len(fusion.shape.leaves):
                    self.outputs[made].append(self.node(fusion, leaf))
        for op, nodes in self.outputs.items():
            for node in nodes:
                self.writers.setdefault(node, []).append(op)
        self.arguments: dict[Node, Instruction] = {
            flow.node(parameter, leaf): parameter
            for parameter in flow.module.entry.parameters
            for leaf in range(len(parameter.shape.leaves))
        }
        root = flow.module.entry.root
        self.results: list[Node] = [flow.node(root, leaf) for leaf in range(len(root.shape.leaves))]
        self.replaced = {self.results[leaf] for leaf in flow.module.aliases if leaf < len(self.results)}
        self.caches: set[Node] = set()
        self._copies: dict[Node, tuple[Node, ...]] = {}
        self._updated: dict[Instruction, Node | None] = {}  # the argument that a slice is written to, or to a copy of
        self.caches = self._caches()
        self._copies.clear()  # a cache is none

    def _in_order(self, entry: Computation) -> Iterator[Instruction]:
        seen = {entry}
        stack = [iter(entry.instructions)]
        while stack:
            i = next(stack[-1], None)
            if i is None:
                stack.pop()
                continue
            yield i
            if i.is_fusion or i.opcode in RUNS:
                for called in reversed(i.called):
                    if called not in seen:
                        seen.add(called)
                        self._caller[called] = i
                        stack.append(iter(called.instructions))

    def node(self, i: Instruction, leaf: int = 0) -> Node:
        """Where an array is: equal for equal buffers, and inside a fusion for equal values."""
        while not self.flow.runs(i):
            if i.opcode == "parameter":
                caller = self._caller.get(i.computation)
                if caller is None or i.number >= len(caller.operands):
                    return i  # garbled
                i = caller.operands[i.number]
            elif i.opcode == "get-tuple-element":
                leaf += i.operands[0].shape.starts[i.number]
                i = i.operands[0]
            elif i.is_fusion:
                i, leaf = _results(i)[leaf], 0
            elif i.opcode == "tuple":
                for operand in i.operands:
                    if leaf < len(operand.shape.leaves):
                        i = operand
                        break
                    leaf -= len(operand.shape.leaves)
            else:
                return i
        return self.flow.node(i, leaf)

    def runs_in(self, op: Instruction) -> Computation:
        """The program, or the body of a loop, in which an operation runs, inside a fusion or by itself."""
        while op.computation.fused:
            op = self._caller[op.computation]
        return op.computation

    def _caches(self) -> set[Node]:
        """Arguments that are caches by name; and those that a result takes the place of and a slice is written to,
        where no name says what they are."""
        by_name = {node for node in self.arguments if self.flow.role_of(node) == "cache"}
        updated: set[Node] = set()
        for op in self.ops:
            if op.opcode in UPDATES and op.operands[-1].shape.elements:
                piece = op.operands[1 if op.opcode == "dynamic-update-slice" else -1].shape.elements
                combines = op.opcode == "scatter" and any(len(c.instructions) > len(c.parameters) for c in op.called)
                node = self._updated[op] = self.argument_of(self.node(op.operands[0]))
                if (
                    piece < op.operands[0].shape.elements
                    and not combines
                    and op.shape.leaves[0].dtype not in _INDICES
                    and node is not None
                    and node in self.replaced
                ):
                    updated.add(node)
        return by_name | {node for node in updated if not self.flow.role_is_said(node)}

    def writes_cache(self, op: Instruction) -> bool:
        """Whether it writes a slice to a cache, or to a copy of one."""
        if op.opcode not in UPDATES:
            return False
        return self.node(op.operands[0]) in self.caches or self._updated.get(op) in self.caches

    # -- walks

    def _stops(self, node: Node) -> bool:
        return node in self.arguments and node not in self.caches

    def back(
        self, nodes: Iterable[Node], through: Callable[[Instruction], bool], known: Container[Node] = ()
    ) -> tuple[set[Instruction], ...]:
        """(those on the way, those that end it): what made `nodes`, as far as `through` lets one pass.

        known: nodes beyond which nobody looks again.
        """
        return self._walk(
            [node for node in nodes if node not in known], self.writers, self.inputs, through, known=known
        )

    def on(
        self, nodes: Iterable[Node], through: Callable[[Instruction], bool], over_arguments: bool = False
    ) -> tuple[set[Instruction], ...]:
        """(those on the way, those that end it): what is made of `nodes`, as far as `through` lets one pass.

        over_arguments: also by the arguments whose place a result takes.
        """
        return self._walk(nodes, self.readers, self.outputs, through, over_arguments)

    def _walk(
        self,
        nodes: Iterable[Node],
        edges: Mapping[Node, list[Instruction]],
        beyond: Mapping[Instruction, list[Node]],
        through: Callable[[Instruction], bool],
        over_arguments: bool = False,
        known: Container[Node] = (),
    ) -> tuple[set[Instruction], ...]:
        passed: set[Instruction] = set()
        ends: set[Instruction] = set()
        queue = list(nodes)
        met = set(queue)
        while queue:
            for op in edges.get(queue.pop(), ()):
                if op in passed or op in ends:
                    continue
                if not through(op):
                    ends.add(op)
                    continue
                passed.add(op)
                fresh = [node for node in beyond[op] if node not in met and node not in known]
                fresh = [node for node in fresh if over_arguments or not self._stops(node)]
                met.update(fresh)
                queue += fresh
        return passed, ends

    def argument_of(self, node: Node) -> Node | None:
        """The argument that a value is a copy, a part or (dequantised) a product of; None where it is none."""
        return next(iter(self.arguments_of(node)), None)

    def arguments_of(self, node: Node, depth: int = 0) -> tuple[Node, ...]:
        """The same; several where they are put side by side, for one product with all of them."""
        if node in self.caches or depth > _DEEPEST:
            return ()
        if node in self.arguments:
            return (node,)
        if node not in self._copies:
            self._copies[node] = ()  # where a loop leads back
            for op in self.writers.get(node, ()):
                joined = op.opcode == "concatenate" or op.custom_call_target == "ConcatBitcast"
                if op.opcode in MOVES or joined:
                    sides = op.operands if joined else op.operands[:1]
                    parts = [self.arguments_of(self.node(side), depth + 1) for side in sides]
                    self._copies[node] = tuple(one for part in parts for one in part) if all(parts) else ()
                elif op.opcode in ("multiply", "subtract"):  # by constants and other arguments, such as scales
                    sides = sorted(op.operands, key=lambda operand: -operand.shape.elements)
                    parts = [self.arguments_of(self.node(side), depth + 1) for side in sides]
                    constant = [self.node(side) not in self.writers for side in sides]
                    if all(part or fixed for part, fixed in zip(parts, constant, strict=True)):
                        self._copies[node] = next((part for part in parts if part), ())
        return self._copies[node]


def _results(fusion: Instruction) -> list[Instruction]:
    """What makes each of its results: one operation may make several, as an argmax does, the number and where it is."""
    root = fusion.called[0].root
    return list(root.operands) if root.opcode == "tuple" else [root] * max(1, len(root.shape.leaves))
