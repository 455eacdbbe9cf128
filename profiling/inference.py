"""Whose work an operation is where no name says it: by the argument that it reads, or by the shape of the dataflow.

What is recognised, and by what:
  attention/core   a softmax between two products of activations: both, what lies between, and its backward products
  attention/qkv    products with weights whose results are what that softmax's products multiply
  attention/out    the product with weights that reads the result of the second
  attention/cache  an argument that a result takes the place of and that is updated by a slice; or an array of a loop,
                   which writes a slice of it and attends to it
  mlp/up, /down    two products with weights [D, F] and [F, D] and a nonlinear function between
  embed, logits    rows looked up in an argument [V, D], and their gradient; the product whose result has V columns
  norm             told by the product that it leads to: attention/norm, mlp/norm, moe/norm, final_norm; that of queries
                   and keys is attention/qkv
  loss             what is computed from the logits on the way back into the model
  sampling         what is computed from them on the way to the next token's row of the embedding
  optimizer        what makes the new value of an argument from the old one and a gradient, element by element; products
                   of gradients alone

A gradient's product belongs to the weight that it is the gradient of. What fits nothing of this stays without a name.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from .calls import epilogue
from .flops import flops
from .graph import MOVES, UPDATES, Graph, Node
from .hlo import Instruction
from .names import BARE, Name, Names, phase

if TYPE_CHECKING:
    from .attribution import Dataflow

_ELEMENTWISE = frozenset(
    "abs add and atan2 cbrt ceil clamp compare convert cosine divide erf exponential exponential-minus-one floor "
    "is-finite log log-plus-one logistic maximum minimum multiply negate not or power real remainder round-nearest-afz "
    "round-nearest-even rsqrt select sign sine sqrt subtract tan tanh xor".split()
)
_NONLINEAR = frozenset("maximum minimum exponential exponential-minus-one tanh logistic erf log-plus-one power".split())
_SCALES = MOVES | {"multiply", "divide", "select", "dynamic-update-slice"}
_REDUCES = frozenset(("reduce", "reduce-window"))
_SUMS = frozenset(("all-reduce", "all-reduce-start", "reduce-scatter", "reduce-scatter-start"))
_NO_PRODUCTS = frozenset(("loss", "optimizer", "norm", "attention/norm", "mlp/norm", "moe/norm", "final_norm"))
_AFTER_A_NORM = {
    "attention/qkv": "attention/norm",
    "attention/core": "attention/qkv",  # of queries and keys
    "mlp/up": "mlp/norm",
    "logits": "final_norm",
} | dict.fromkeys(("moe/router", "moe/experts", "moe/shared", "moe/dispatch"), "moe/norm")
# What a product may be; the FLOP rules say whether it is one.
_MAY_BE_PRODUCTS = frozenset(("dot", "convolution", "ragged-dot", "reduce", "multiply", "custom-call"))


class Found(NamedTuple):
    """What is found without names. `backward`: whether it is known to be a gradient."""

    component: str
    source: str
    backward: bool = False


def is_product(op: Instruction) -> bool:
    if op.opcode not in _MAY_BE_PRODUCTS:
        return False
    try:
        work = flops(op)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
        return False  # garbled: the bill lists it as unknown
    return work is not None and work.matmul > 0


class Inference:
    """Finds who asked for what has no name, from what has one.

    Args:
      named: what the operations' own names say; a bare one (names.BARE) is made exact where it can be.
    """

    def __init__(self, flow: "Dataflow", names: Names, named: Callable[[Instruction], Name | None]):
        self.graph = graph = Graph(flow)
        self._flow, self._named = flow, named
        self.found: dict[Instruction, Found] = {}
        self._products = [op for op in graph.ops if is_product(op)]
        self._are_products = set(self._products)
        self._core: set[Instruction] = set()
        self._merged: dict[Node, tuple[Node, ...]] = {}  # the weights that share a product with this one
        self._of_weight: dict[Node, Found] = {}
        for node, parameter in graph.arguments.items():
            said = names.of_argument(parameter.op_name)
            if said is not None and said.component not in BARE:
                self._of_weight[node] = Found(said.component, said.source)
        # A product of those is no batch but one, whose parts are added up: a GPU's, that sums over much.
        self._split = {product: sums for product in self._products if (sums := self._sums_of_parts(product))}
        self._part_sums = {op for sums in self._split.values() for op in sums}
        self._data = self._find_data()
        self._weight = {product: self._weight_of(product) for product in self._products}
        self._norms = {
            node
            for node, parameter in graph.arguments.items()
            if (said := names.of_argument(parameter.op_name)) is not None and said.component == "norm"
        }
        for product in self._products:
            name, weight = named(product), self._weight[product]
            if name is not None and weight is not None and "/" in name.component:
                self._learn(weight, Found(*name))
        self._find_attention()
        graph.caches |= self._caches_made_inside()
        self._find_feed_forward()
        self._find_vocabulary()
        self._find_products_of_gradients()
        self._find_gradients()
        self._name_products()
        self._find_backward_attention()
        self._moments: set[Node] = set()  # what else is replaced with the weights
        self._find_optimizer()
        self._find_loss()
        self._find_norms()
        self._find_cache_updates()
        self._settle()

    # -- what products read

    def _through(self, op: Instruction) -> bool:
        return op not in self._are_products

    def _multiplied(self, product: Instruction) -> list[Instruction]:
        """The two sides of a product, also where it is written as multiply and reduce."""
        if product.opcode == "reduce":
            product = product.operands[0]
            while product.opcode in MOVES and product.operands:
                product = product.operands[0]
        return list(product.operands[:2])

    def _weight_of(self, product: Instruction) -> Node | None:
        """The argument that a product multiplies with, if it does with one; not the program's input."""
        found = [node for node in self._arguments_of(product) if node not in self._data and self._may_be_weight(node)]
        return found[0] if len(found) == 1 else None

    def _arguments_of(self, product: Instruction) -> list[Node]:
        """Of each side of a product that is an argument, which one; that of a batch of products is data."""
        found: list[Node] = []
        for side, operand in enumerate(self._multiplied(product)):
            nodes = self.graph.arguments_of(self.graph.node(operand))
            batched = product.integers("lhs_batch_dims" if side == 0 else "rhs_batch_dims")
            if nodes and not (batched and not self._is_weight(nodes[0]) and product not in self._split):
                # Of several side by side, which may be of several parts, the largest has most of the product.
                largest = self._largest(nodes)
                found.append(largest)
                self._merged[largest] = tuple(dict.fromkeys((*self._merged.get(largest, ()), *nodes)))
        return found

    def _largest(self, arguments: Sequence[Node]) -> Node:
        return max(arguments, key=lambda node: self.graph.arguments[node].shape.elements)

    def _sums_of_parts(self, product: Instruction) -> list[Instruction]:
        """What adds the parts of a product up; nothing where it is a whole one."""
        parts = len(product.integers("lhs_batch_dims"))
        if not parts:
            return []
        forms, met, sums = [product], set[Instruction](), list[Instruction]()
        for form in forms:  # the same parts in other forms; a loop may hand them to itself
            for op in self._readers(form):
                if op in met:
                    continue
                met.add(op)
                if op.opcode in ("bitcast", "reshape") and op.shape.dims[:parts] == form.shape.leaves[0].dims[:parts]:
                    forms.append(op)
                elif op.opcode == "reduce" and op.integers("dimensions") == (*range(parts),):
                    sums.append(op)
                else:
                    return []
        return sums

    def _readers(self, op: Instruction) -> list[Instruction]:
        return [reader for node in self.graph.outputs[op] for reader in self.graph.readers.get(node, ())]

    def _is_elementwise(self, op: Instruction) -> bool:
        """Whether it makes each number of one of a product's, or adds the parts of a product up."""
        return (op.opcode in MOVES | _ELEMENTWISE and self._through(op)) or op in self._part_sums

    def _find_data(self) -> set[Node]:
        """Of two arguments that are multiplied with each other, those that are not the weight."""
        data: set[Node] = set()
        for pair in map(self._arguments_of, self._products):
            if len(pair) == 2:
                weights = [node for node in pair if self._is_weight(node)]
                weights = weights or [node for node in pair if node in self.graph.replaced]
                data.update(node for node in pair if len(weights) != 1 or node not in weights)
        return data

    def _is_weight(self, node: Node) -> bool:
        """Whether an argument's name says so: that it is one, or which part of a model's."""
        if self._flow.role_is_said(node):
            return self._flow.role_of(node) == "weights"
        return node in self._of_weight and self._of_weight[node].component not in _NO_PRODUCTS | {"attention/cache"}

    def _may_be_weight(self, node: Node) -> bool:
        return self._is_weight(node) or not self._flow.role_is_said(node)

    def _exact(self, op: Instruction) -> str | None:
        name = self._named(op)
        return name.component if name is not None and name.component not in BARE else None

    def _is_bare(self, op: Instruction, component: str) -> bool:
        name = self._named(op)
        return name is not None and name.component == component

    def _backward(self, op: Instruction) -> bool:
        return "transpose(" in op.op_name

    # -- the parts of a transformer

    def _find_attention(self) -> None:
        graph = self.graph
        self._softmax: set[Instruction] = set()
        self._sides: set[Node] = set()  # what is known to lead from projections to products of a softmax
        self._order = {op: n for n, op in enumerate(graph.ops)}
        first: set[Instruction] = set()  # products of softmaxes that are found
        ways: dict[Instruction, set[Instruction]] = {}  # to each exponential
        of_scores: dict[frozenset[Instruction], list[Instruction]] = {}
        for exponential in graph.ops:
            if exponential.opcode == "exponential":
                ways[exponential], scores = graph.back(graph.inputs[exponential], self._through)
                of_scores.setdefault(frozenset(op for op in scores if self._weight[op] is None), []).append(exponential)
        together = [(scores, same) for scores, same in of_scores.items() if scores]
        each = sorted(
            ((scores, [op]) for scores, same in together for op in same), key=lambda one: self._order[one[1][0]]
        )
        # A compiler may compute an exponential again for each that reads it: for the sum, and for the product.
        for scores, exponentials in (*each, *((scores, same) for scores, same in together if len(same) > 1)):
            sums = self._sums_of(exponentials)
            if len(exponentials) == 1 and scores & first:  # of the same scores, computed again
                self._softmax |= {*exponentials, *sums}
            elif len(exponentials) > 1 and scores & first:
                continue
            second, after = self._product_of_softmax(scores, exponentials, sums)
            if second is None:
                continue
            first |= scores
            self._core |= {*scores, second}
            self._softmax |= {*exponentials, *sums}
            before = set().union(*(ways[exponential] for exponential in exponentials))
            backward = any(map(self._backward, exponentials))
            for op in (*before, *exponentials, *sums, *after):
                if not self._backward(op) or backward:
                    self.found.setdefault(op, Found("attention/core", "inferred"))
            for product in (*scores, second):
                self._label_sides(product, {*scores})
            _, readers = graph.on(graph.outputs[second], self._through)
            for op in readers & self._are_products:
                self._label(op, "attention/out")

    def _sums_of(self, exponentials: list[Instruction]) -> list[Instruction]:
        nodes = [node for op in exponentials for node in self.graph.outputs[op]]
        _, readers = self.graph.on(nodes, lambda op: op.opcode in MOVES or op.opcode == "select")
        return [op for op in readers if op.opcode in _REDUCES and self._through(op) and _combiner(op) == "add"]

    def _product_of_softmax(
        self, scores: frozenset[Instruction], exponentials: list[Instruction], sums: list[Instruction]
    ) -> tuple[Instruction | None, set[Instruction]]:
        """(the product that a softmax of `scores` goes into, what lies between); None where there is none."""
        after, values = self.graph.on(
            [node for op in (*exponentials, *sums) for node in self.graph.outputs[op]],
            lambda op: op.opcode in _SCALES and self._through(op),
        )
        values &= self._are_products
        values = {op for op in values if self._weight[op] is None and op not in scores and self._is_plain(op)}
        if not sums or not values:
            return None, after
        second = min(values, key=self._order.__getitem__)
        of_loss = self._backward(second) and not any(map(self._backward, scores))  # its gradient is the softmax
        return None if of_loss else second, after

    def _caches_made_inside(self) -> set[Node]:
        """Arrays that no argument is, of which each trip of a loop writes a slice and reads what a softmax's products
        take. What one loop saves for another, as for the way back, is none."""
        graph = self.graph
        found: set[Node] = set()

        def through(op: Instruction) -> bool:
            return (op.opcode in MOVES or op.opcode == "dynamic-update-slice") and self._through(op)

        for product in self._core:
            body = graph.runs_in(product)
            if body is self._flow.module.entry:
                continue
            sides = [graph.node(side) for side in self._multiplied(product)]
            way, _ = graph.back(sides, through)
            updates = (op for op in way if op.opcode == "dynamic-update-slice" and graph.runs_in(op) is body)
            wholes = {op.operands[0].shape.elements for op in updates}
            held = (operand for op in way for operand in op.operands if operand.shape.elements in wholes)
            found.update(map(graph.node, held))
        return found - graph.arguments.keys()

    def _is_plain(self, product: Instruction) -> bool:
        """Whether nothing is scattered into what it reads, as a loss's gradient does into a softmax."""
        writers = (op for node in self.graph.inputs[product] for op in self.graph.writers.get(node, ()))
        return not any(op.opcode == "scatter" for op in writers)

    def _label_sides(self, product: Instruction, scores: set[Instruction]) -> None:
        """What attention multiplies comes from its own projections."""
        for node in map(self.graph.node, self._multiplied(product)):
            way, makers = self.graph.back([node], self._through, known=self._sides)  # many may read and write one cache
            if not makers & scores:
                self._sides.update((node, *(one for op in way for one in self.graph.inputs[op])))
                for op in makers & self._are_products:
                    self._label(op, "attention/qkv")

    def _label(self, product: Instruction, component: str) -> None:
        """What is found first stays: forward runs before backward, where everything is the other way round."""
        weight = self._weight[product]
        if weight is not None and not self._backward(product):
            self._learn(weight, Found(component, "inferred"))

    def _learn(self, weight: Node, found: Found) -> None:
        for node in self._merged[weight]:
            self._of_weight.setdefault(node, found)

    def _sizes(self, product: Instruction) -> tuple[int, int]:
        """(summed over, columns of the weight) of a product with a weight."""
        work, result = flops(product), product.shape.leaves[0]  # a library's may have room to work in beside it
        elements = result.elements
        if product in self._split:
            elements //= math.prod(result.dims[: len(product.integers("lhs_batch_dims"))])
        summed = work.matmul // (2 * elements) if work and elements else 0
        sides = [(self.graph.arguments_of(self.graph.node(o)), o.shape.elements) for o in self._multiplied(product)]
        size = next((elements for nodes, elements in sides if self._weight[product] in nodes), 0)
        return (summed, size // summed) if summed and size % summed == 0 else (0, 0)

    def _find_feed_forward(self) -> None:
        for up in self._products:
            weight = self._weight[up]
            said = None if weight is None else self._of_weight.get(weight)
            if weight is None or (said is not None and said.component != "mlp/up") or self._backward(up):
                continue
            between, ends = self.graph.on(self.graph.outputs[up], self._is_elementwise)
            if not any(op.opcode in _NONLINEAR for op in between) and not epilogue(up).nonlinear:
                continue
            width, columns = self._sizes(up)
            for down in (op for op in self._products if op in ends):
                other = self._weight[down]
                if other is None or other == weight:
                    continue
                if other in self._of_weight and self._of_weight[other].component != "mlp/down":
                    continue
                inner, outer = self._sizes(down)
                unlike = outer != inner or self._is_bare(up, "mlp")
                if width and outer == width and unlike and columns in (inner, 2 * inner):
                    self._label(up, "mlp/up")
                    self._label(down, "mlp/down")
                    self._label_gates(down, (width, inner))

    def _label_gates(self, down: Instruction, sizes: tuple[int, int]) -> None:
        """What a gated unit multiplies the nonlinear function with is a way up, too."""
        sides = [self.graph.node(operand) for operand in self._multiplied(down)]
        _, makers = self.graph.back(sides, self._is_elementwise)
        for gate in makers & self._are_products:
            if self._weight[gate] is not None and self._sizes(gate) == sizes:
                self._label(gate, "mlp/up")

    def _find_vocabulary(self) -> None:
        graph = self.graph
        tables: set[Node] = set()
        trained: dict[tuple[int, ...], Found] = {}  # by their sizes
        rows: set[int] = set()  # of them
        for op in graph.ops:
            if (
                op.opcode == "gather"
                and op.operands[0].shape.dtype[0] in "bf"
                and op.operands[1].shape.dtype[0] in "su"
            ):
                table = graph.argument_of(graph.node(op.operands[0]))
                if table is None:
                    continue
                tables.add(table)
                shape = graph.arguments[table].shape
                if len(shape.dims) == 2 and shape.dtype[0] in "bf":
                    self.found.setdefault(op, self._of_weight.get(table) or Found("embed", "inferred"))
                    rows.add(shape.dims[0])
                    self._of_weight.setdefault(table, Found("embed", "inferred"))
                    if table in graph.replaced or self._is_weight(table):
                        trained.setdefault(shape.dims, self._of_weight[table])
        for op in graph.ops:  # the gradient of the rows that were looked up
            dims = op.shape.leaves[0].dims
            adds = op.opcode == "scatter" and _combiner(op) not in ("", "parameter")
            if adds and dims in trained and self._backward(op):
                self.found.setdefault(op, trained[dims]._replace(backward=True))
        for product in self._products:
            weight = self._weight[product]
            if weight is not None and not self._backward(product):
                said = self._of_weight.get(weight)
                _, columns = self._sizes(product)
                if said is not None and said.component == "embed" and (weight in tables or columns in rows):
                    self._of_weight[weight] = Found("logits", said.source)  # of products; the lookup has its own name
                elif said is None and columns in rows:
                    self._label(product, "logits")

    # -- backward

    def _find_products_of_gradients(self) -> None:
        """Products that read what the backward pass makes and nothing else, and are not said to be of that pass, are
        an optimizer's, such as Muon's."""
        graph = self.graph
        backward = {op for op in graph.ops if self._backward(op)}
        self._of_optimizer: set[Instruction] = set()
        if not backward:
            return

        def through(op: Instruction) -> bool:
            return self._through(op) and op not in backward

        sides = {
            product: [graph.back([graph.node(side)], through) for side in self._multiplied(product)]
            for product in self._products
            if self._weight[product] is None
        }
        makers = {product: set().union(*(ends for _, ends in both)) for product, both in sides.items()}
        _grow(backward, {op: made for op, made in makers.items() if not op.op_name})
        alone = {
            product: makers[product]
            for product, both in sides.items()
            if not (self._backward(product) or product in self._core or self._exact(product))
            and all(ends for _, ends in both)
        }
        while mixed := [product for product, made in alone.items() if not made <= backward | alone.keys()]:
            for product in mixed:
                del alone[product]
        # Without a name, one with itself at least: a gradient may be made of what is computed again on the way back.
        squares = {op for op in alone if sides[op][0][1] == sides[op][-1][1]}
        self._of_optimizer = {op for op, made in alone.items() if made & backward and (op.op_name or op in squares)}
        _grow(self._of_optimizer, alone)
        for product in self._of_optimizer:
            self.found[product] = Found("optimizer", "inferred")
            for op in set().union(*(way for way, _ in sides[product])):
                if self._named(op) is None:
                    self.found.setdefault(op, Found("optimizer", "inferred"))

    def _find_gradients(self) -> None:
        """For each product of two activations, the weight that it is the gradient of, if it is one."""
        graph = self.graph
        self._gradient: dict[Instruction, Node] = {}
        weights = {node for first in self._weight.values() if first is not None for node in self._merged[first]}
        joined = _ELEMENTWISE | _SUMS | {"dynamic-update-slice"} | (MOVES - {"broadcast"})
        for product in self._products:
            if self._weight[product] is not None or product in self._core or product in self._of_optimizer:
                continue
            _, partial = graph.on(graph.outputs[product], lambda op: op.opcode in MOVES - {"broadcast"})
            sums = [op for op in partial if op.opcode == "reduce" and self._through(op)]  # of a split contraction
            starts = [node for op in (product, *sums) for node in graph.outputs[op]]
            updates, _ = graph.on(
                starts,
                lambda op: (op.opcode in joined and self._through(op)) or op in self._of_optimizer,
                over_arguments=True,
            )
            reached = [*dict.fromkeys(node for op in updates for node in (*graph.inputs[op], *graph.outputs[op]))]
            met = [argument for node in reached for argument in graph.arguments_of(node)]
            known = [node for node in met if node in self._of_weight and node in weights]
            if known:
                self._gradient[product] = self._largest(known)

    def _name_products(self) -> None:
        for product in self._products:
            exact, weight = self._exact(product), self._weight[product]
            if (exact is not None and exact not in _NO_PRODUCTS) or product in self._of_optimizer:
                continue
            if product in self._core:
                self._give(product, Found("attention/core", "inferred"))
            elif weight in self._of_weight:
                self._give(product, self._of_weight[weight])
            elif product in self._gradient:
                component, source, _ = self._of_weight[self._gradient[product]]
                self._give(product, Found(component, source, backward=True))
            elif any(map(self._is_of_cache, self._multiplied(product))):
                self._give(product, Found("attention/core", "inferred"))

    def _is_of_cache(self, operand: Instruction) -> bool:
        node = self.graph.node(operand)
        way, _ = self.graph.back([node], lambda op: op.opcode in MOVES or op.opcode in UPDATES)
        return any(one in self.graph.caches for op in way for one in self.graph.inputs[op]) or node in self.graph.caches

    def _give(self, op: Instruction, found: Found) -> None:
        """`found` to an operation, unless its own name says that it is of another part."""
        name = self._named(op)
        if name is None or name.component not in BARE[:3] or found.component.startswith(name.component + "/"):
            self.found[op] = found

    def _find_backward_attention(self) -> None:
        """Products of activations alone that read a softmax, and those whose result meets it in the next one."""
        graph = self.graph
        loose = [
            op
            for op in self._products
            if op not in self.found
            and self._weight[op] is None
            and op not in self._gradient
            and self._exact(op) is None
        ]
        reached: set[Instruction] = set()
        for product in loose:
            before, _ = graph.back(graph.inputs[product], self._through)
            if before & self._softmax:
                self._give(product, Found("attention/core", "inferred", backward=True))
                reached.add(product)
        for product in loose:
            if product not in reached:
                _, ends = graph.on(graph.outputs[product], self._through)
                if ends & reached:
                    self._give(product, Found("attention/core", "inferred", backward=True))

    def _find_optimizer(self) -> None:
        """The operations that make an argument's new value, element by element, of its old one and a gradient."""
        graph = self.graph
        for result in self.graph.results:
            sizes = {op.shape.leaves[0].elements for op in graph.writers.get(result, ())}

            def through(op: Instruction, sizes: set[int] = sizes) -> bool:
                elementwise = op.opcode in _ELEMENTWISE or op.opcode in MOVES - {"dynamic-slice", "slice"}
                same = op.shape.leaves[0].elements in sizes
                return elementwise and same and self._through(op) and not self._backward(op)

            way, ends = graph.back([result], through)
            old = {graph.argument_of(node) for op in way for node in graph.inputs[op]} - {None}
            sized = [node for node in old if node is not None and graph.arguments[node].shape.elements in sizes]
            gradient = any(map(self._is_of_gradients, ends))
            if sized and gradient and max(sizes, default=0) > 1:
                self._moments.update(node for node in sized if node in graph.replaced)
                for op in way:
                    if self._exact(op) is None and op.opcode in _ELEMENTWISE:
                        self.found[op] = Found("optimizer", "inferred")

    def _is_of_gradients(self, op: Instruction) -> bool:
        known = op in self._gradient or op in self._of_optimizer or (op in self.found and self.found[op].backward)
        return known or self._backward(op)

    def _find_loss(self) -> None:
        """What is computed from the logits: where it leads back to products, the loss; where it leads to a row of the
        embedding, as in a loop that makes one token after the other, how the next token is chosen."""
        graph = self.graph
        logits = [op for op in self._products if self._component(op) == "logits" and not self._backward(op)]
        lookups = {op for op in graph.ops if op.opcode == "gather" and self._component(op) == "embed"}
        # The next token's place, too, may be of what is chosen, and leads by a rotation to the keys.
        stops = lookups | {op for op in graph.ops if graph.writes_cache(op)}
        seen: set[Node] = set()
        for product in logits:
            if product in self._gradient or seen & set(graph.outputs[product]):
                continue
            seen.update(graph.outputs[product])
            way, ends = graph.on(
                graph.outputs[product], lambda op: self._through(op) and op not in stops, over_arguments=True
            )
            reached = {node for op in (product, *way) for node in graph.outputs[op]}
            found = Found("sampling", "inferred")
            if not any(graph.node(op.operands[1]) in reached for op in ends & lookups):
                found = Found("loss", "inferred")
                way, ends = graph.on(graph.outputs[product], self._through)
                if not ends & self._are_products or not any(op.opcode in ("exponential", "log") for op in way):
                    continue
            for op in way:
                if self._named(op) is None:
                    self.found.setdefault(op, found)

    def _component(self, op: Instruction) -> str | None:
        return self.found[op].component if op in self.found else self._exact(op)

    def _find_norms(self) -> None:
        """Norms, and what reads an argument with a name, such as a norm's scale or a bias."""
        graph = self.graph
        for op in graph.ops:
            if op in self.found or op in self._are_products or self._exact(op) is not None:
                continue
            name = self._named(op)
            if name is not None and name.component == "norm":
                self.found[op] = Found(self._norm_of(op), name.source)
            elif op.opcode in _ELEMENTWISE - MOVES:
                read = [graph.argument_of(node) for node in graph.inputs[op]]
                said = next((node for node in read if node is not None), None)
                if said in self._norms and name is None:
                    self.found[op] = Found(self._norm_of(op), "argument")
                elif said in self._of_weight:
                    self._give(op, self._of_weight[said])

    def _norm_of(self, op: Instruction) -> str:
        """Which norm an operation of one is: that before the product that it leads to, or whose gradient it is of."""
        graph, backward = self.graph, self._backward(op)
        if phase(op.op_name) == "backward":
            edges, beyond = graph.writers, graph.inputs
        else:
            edges, beyond = graph.readers, graph.outputs
        front = beyond[op]
        met = set(front)
        while front:  # step by step: a residual stream leads on along the whole model
            ops = {other for node in front for other in edges.get(node, ())}
            ops = {other for other in ops if not other.op_name or self._backward(other) == backward}
            led = {self._component(other) for other in ops & self._are_products}
            found = {norm for component, norm in _AFTER_A_NORM.items() if component in led}
            if found:
                return found.pop() if len(found) == 1 else "norm"
            front = [node for other in ops - self._are_products for node in beyond[other] if node not in met]
            front = [node for node in dict.fromkeys(front) if node not in graph.arguments]
            met.update(front)
        return "norm"

    def _find_cache_updates(self) -> None:
        for op in self.graph.ops:
            open_to = self._named(op) is None or self._is_bare(op, "attention")
            if open_to and self.graph.writes_cache(op):
                self.found[op] = Found("attention/cache", "inferred")

    def _settle(self) -> None:
        """What says its part and was not found to be a piece of it: of attention all but a product with weights is its
        core, of an mlp all but its products the function between them; else the part."""
        for op in self.graph.ops:
            name = self._named(op)
            if op in self.found or name is None or name.component not in BARE:
                continue
            component, product = name.component, op in self._are_products
            if component == "attention" and not (product and self._weight[op] is not None):
                component = "attention/core"
            elif component == "mlp" and not product:
                component = "mlp/up"
            self.found[op] = Found(component, name.source)

    @property
    def roles(self) -> dict[Node, str]:
        """Roles of arguments that nobody names, as they are used; and of caches that the program makes itself."""
        read = {node for first in self._weight.values() if first is not None for node in self._merged[first]}
        weights = read | self._of_weight.keys() | self._norms
        found: dict[Node, str] = dict.fromkeys(self._moments - weights, "optimizer")
        return found | dict.fromkeys(weights, "weights") | dict.fromkeys(self.graph.caches, "cache")


def _grow(found: set[Instruction], makers: Mapping[Instruction, set[Instruction]]) -> None:
    """Adds to `found` what is made of any of it, of that again, and so on."""
    while more := {op for op, made in makers.items() if op not in found and made & found}:
        found |= more


def _combiner(reduce: Instruction) -> str:
    return reduce.called[0].root.opcode if reduce.called else ""
