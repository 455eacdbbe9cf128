"""Random jax programs, and how many matmul FLOPs their jaxprs say: what the bill of any program is held against.

    python tests/random_programs.py --minutes=10 [--seed=0] [--target=h200]

A program is a `Block`, drawn by choices (of hypothesis or of a random number generator) and then run like any function:
matmuls of several forms, loops, branches, gathers, slices, rematerialisation, vmap and grad, nested in one another.
Compilers remove work whose result is not used or was computed before, so each value is used, whole, and no two
operations have the same operands.
"""

import argparse
import json
import math
import random
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from compiled import ready
from jax import lax
from jax.interpreters import partial_eval
from stepbill.model.scopes import COMPONENTS
from stepbill.profiling import render, targets
from stepbill.profiling.bill import Bill, Work
from stepbill.profiling.flops import flops
from stepbill.profiling.hlo import Computation, Instruction, Module, parse
from stepbill.profiling.loops import executed, trip_count
from stepbill.profiling.traffic import inside
from stepbill.profiling.walk import itemize_module

Choose = Callable[[int], int]  # choose(n): one of 0, ..., n - 1
SIZES = (8, 16, 24, 33, 64, 1)  # of dimensions; the first are chosen most
MOST_ELEMENTS = 1 << 13  # of a value; larger ones are summed up
TOLERANCE = 0.001


class Step(NamedTuple):
    """One operation: what, two numbers that say on what and how large, its component, and what it runs, if it runs
    something."""

    kind: str
    which: int
    size: int
    component: str
    inner: "Block | None" = None


class Block(NamedTuple):
    """A function of one array: steps that add to a list of values, which begins with that array."""

    steps: tuple[Step, ...]


class Program(NamedTuple):
    """A block, the array it begins with, whether it is trained (its weights' gradients taken, the weights updated), and
    whether what it updates is donated."""

    block: Block
    rows: int
    width: int
    trained: bool
    donated: bool


# --- drawing -------------------------------------------------------------------------------------------------------

MATMULS = ("linear", "linear", "linear", "pair", "batched", "two axes", "narrow")
PLAIN = (
    *MATMULS,
    "gather",
    "look up",
    "dynamic slice",
    "update slice",
    "softmax",
    "transpose",
    "split",
    "cast",
    "concat",
)
NESTED = ("scan", "shared scan", "while", "unknown while", "cond", "remat", "vmap", "grad", "jit")
NOT_IN_GRAD = ("while", "unknown while", "narrow")  # they have no gradient, or none that is not zero


def draw(choose: Choose) -> Program:
    """A program of a few steps."""
    trained = choose(3) == 2
    block = _draw_block(choose, depth=0, smooth=trained)
    return Program(block, SIZES[choose(5)], SIZES[choose(5)], trained, choose(2) == 1)


def _draw_block(choose: Choose, depth: int, smooth: bool) -> Block:
    """smooth: it is differentiated."""
    steps = []
    for _ in range(2 + choose(5) if depth == 0 else 1 + choose(3)):
        nested = depth < 3 and choose(3) == 0
        kinds = [kind for kind in (NESTED if nested else PLAIN) if not (smooth and kind in NOT_IN_GRAD)]
        kind = kinds[choose(len(kinds))]
        inner = _draw_block(choose, depth + 1, smooth or kind == "grad") if nested else None
        component = COMPONENTS[choose(len(COMPONENTS))]
        steps.append(Step(kind, choose(64), choose(64), component, inner))
    return Block(tuple(steps))


# --- running -------------------------------------------------------------------------------------------------------

Spec = tuple[tuple[int, ...], Any]  # shape and type
Weights = Callable[[tuple[int, ...], Any], jax.Array]  # gives the next argument, of this shape and type


class _Run:
    """What all blocks of one run share.

    barriers: whether compilers are kept from looking past an operation (but not from dropping what nobody uses).
    """

    def __init__(self, barriers: bool):
        self.barriers = barriers
        self.numbers = 0

    def distinct(self, value: jax.Array) -> jax.Array:
        """sin(c value), c unlike all others: no operation on it is another one's twin."""
        self.numbers += 1
        return jnp.sin(value.astype(jnp.float32) * (1 + self.numbers / 1024)).astype(value.dtype)

    def block(self, block: Block, x: jax.Array, weights: Weights) -> jax.Array:
        """The block of x [..., D]: its last value and, as a scalar added to it, all that no other step read whole."""
        values, unread = [x], {0}
        for step in block.steps:
            with jax.named_scope(step.component):
                made, read = _RULES[step.kind](self, step, values, weights)
                made = _bounded(made)
                if self.barriers:
                    made = lax.optimization_barrier(made)
            unread -= read
            unread.add(len(values))
            values.append(made)
        last = values.pop()
        for number in sorted(unread - {len(values)}):
            last = last + _scalar(self.distinct(values[number])).astype(last.dtype)
        return last

    def specs(self, block: Block, x: jax.ShapeDtypeStruct | jax.Array) -> list[Spec]:
        """The arguments that the block asks for."""
        asked: list[Spec] = []

        def ask(shape: tuple[int, ...], dtype: Any) -> jax.Array:
            asked.append((shape, dtype))
            return jnp.zeros(shape, dtype)

        numbers = self.numbers
        jax.eval_shape(lambda x: self.block(block, x, ask), jax.ShapeDtypeStruct(x.shape, x.dtype))
        self.numbers = numbers
        return asked

    def inner(self, block: Block | None, x: jax.Array, weights: Weights) -> tuple[Callable[..., jax.Array], list[Any]]:
        """(function of x and arguments, arguments): the block as jax's transformations want it."""
        assert block is not None
        arguments = [weights(*spec) for spec in self.specs(block, x)]
        return lambda x, arguments: self.block(block, x, given(arguments)), arguments


def given(arguments: Sequence[jax.Array]) -> Weights:
    """Hands these out in turn."""
    left = iter(arguments)

    def next_one(shape: tuple[int, ...], dtype: Any) -> jax.Array:
        array = next(left)
        assert (array.shape, array.dtype) == (shape, dtype)
        return array

    return next_one


def _scalar(value: jax.Array) -> jax.Array:
    return jnp.tanh(jnp.mean(value.astype(jnp.float32)))


def _like(x: jax.Array, made: jax.Array, run: _Run) -> jax.Array:
    """`made` in the shape and type of x, all of both used."""
    if made.shape == x.shape:
        return jnp.tanh(made).astype(x.dtype) + jnp.sin(x)
    return jnp.sin(x) + _scalar(run.distinct(made)).astype(x.dtype)


def _bounded(value: jax.Array) -> jax.Array:
    """Summed up along the first axis where there is too much of it."""
    if value.size <= MOST_ELEMENTS:
        return value
    return jnp.mean(jnp.sin(value), axis=0, keepdims=value.ndim == 2)


Made = tuple[jax.Array, set[int]]  # a value, and which of those before it were read whole
Rule = Callable[[_Run, Step, list[jax.Array], Weights], Made]


def _pick(step: Step, values: Sequence[jax.Array]) -> int:
    return step.which % len(values)


def _partner(step: Step, values: Sequence[jax.Array]) -> int | None:
    """Another matrix of the width of the picked one, if that is a matrix."""
    it = _pick(step, values)
    fits = [n for n, v in enumerate(values) if n != it and v.ndim == 2 and v.shape[-1] == values[it].shape[-1]]
    return fits[step.size % len(fits)] if fits and values[it].ndim == 2 else None


def _linear(run: _Run, step: Step, values: list[jax.Array], weights: Weights) -> Made:
    it = _pick(step, values)
    x = values[it]
    w = weights((x.shape[-1], SIZES[step.size % len(SIZES)]), x.dtype)
    return jnp.einsum("...k,kn->...n", run.distinct(x), w), {it}


def _pair(run: _Run, step: Step, values: list[jax.Array], weights: Weights) -> Made:
    it, other = _pick(step, values), _partner(step, values)
    if other is None:
        return _linear(run, step, values, weights)
    x, y = run.distinct(values[it]), run.distinct(values[other]).astype(values[it].dtype)
    return jnp.einsum("mk,nk->mn", x, y), {it, other}


def _batched(run: _Run, step: Step, values: list[jax.Array], weights: Weights) -> Made:
    it = _pick(step, values)
    x = values[it]
    if x.ndim != 3:
        return _linear(run, step, values, weights)
    w = weights((x.shape[0], x.shape[2], SIZES[step.size % len(SIZES)]), x.dtype)
    return jnp.einsum("bmk,bkn->bmn", run.distinct(x), w), {it}


def _two_axes(run: _Run, step: Step, values: list[jax.Array], weights: Weights) -> Made:
    it = _pick(step, values)
    x = values[it]
    if x.ndim != 3:
        return _linear(run, step, values, weights)
    w = weights((*x.shape[1:], SIZES[step.size % len(SIZES)]), x.dtype)
    return jnp.einsum("bmk,mkn->bn", run.distinct(x), w), {it}


def _narrow(run: _Run, step: Step, values: list[jax.Array], weights: Weights) -> Made:
    """int8 by int8."""
    it = _pick(step, values)
    x = values[it]
    w = weights((x.shape[-1], SIZES[step.size % len(SIZES)]), jnp.int8)
    narrow = jnp.round(100 * run.distinct(x).astype(jnp.float32)).astype(jnp.int8)
    product = jnp.einsum("...k,kn->...n", narrow, w, preferred_element_type=jnp.int32)
    return product.astype(jnp.float32) / 12345, {it}


def _gather(run: _Run, step: Step, values: list[jax.Array], weights: Weights) -> Made:
    rows = weights((SIZES[step.size % len(SIZES)],), jnp.int32)
    return jnp.take(values[_pick(step, values)], rows, axis=0, mode="clip"), set()


def _look_up(run: _Run, step: Step, values: list[jax.Array], weights: Weights) -> Made:
    rows = weights((SIZES[step.size % len(SIZES)],), jnp.int32)
    table = weights((100, values[-1].shape[-1]), jnp.float32)
    used = _scalar(run.distinct(values[-1]))  # in a loop, something of each trip
    return jnp.take(table, rows, axis=0, mode="clip") + used, {len(values) - 1}


def _dynamic_slice(run: _Run, step: Step, values: list[jax.Array], weights: Weights) -> Made:
    x = values[_pick(step, values)]
    axis = step.size % x.ndim
    start = weights((), jnp.int32)
    return lax.dynamic_slice_in_dim(x, start, -(-x.shape[axis] // 2), axis), set()


def _update_slice(run: _Run, step: Step, values: list[jax.Array], weights: Weights) -> Made:
    x = values[_pick(step, values)]
    part = run.distinct(x[: -(-x.shape[0] // 2)])
    return lax.dynamic_update_slice_in_dim(x, part, weights((), jnp.int32), 0), set()


def _softmax(run: _Run, step: Step, values: list[jax.Array], weights: Weights) -> Made:
    it = _pick(step, values)
    return jax.nn.softmax(run.distinct(values[it])), {it}


def _transpose(run: _Run, step: Step, values: list[jax.Array], weights: Weights) -> Made:
    it = _pick(step, values)
    return jnp.swapaxes(run.distinct(values[it]), -1, -2), {it}


def _split(run: _Run, step: Step, values: list[jax.Array], weights: Weights) -> Made:
    """[2 M, D] as [2, M, D] and back."""
    it = _pick(step, values)
    x = run.distinct(values[it])
    if x.ndim == 3:
        return x.reshape(-1, x.shape[-1]), {it}
    return (x if x.shape[0] % 2 else x.reshape(2, -1, x.shape[-1])), {it}


def _cast(run: _Run, step: Step, values: list[jax.Array], weights: Weights) -> Made:
    it = _pick(step, values)
    x = run.distinct(values[it])
    return x.astype(jnp.float32 if x.dtype == jnp.bfloat16 else jnp.bfloat16), {it}


def _concat(run: _Run, step: Step, values: list[jax.Array], weights: Weights) -> Made:
    it, other = _pick(step, values), _partner(step, values)
    if other is None:
        return run.distinct(values[it]), {it}
    return jnp.concatenate([values[it], run.distinct(values[other]).astype(values[it].dtype)]), {it, other}


def _trips(step: Step) -> int:
    return 2 + step.size % 3


def _scan(run: _Run, step: Step, values: list[jax.Array], weights: Weights) -> Made:
    """Each trip has weights of its own."""
    it = _pick(step, values)
    assert step.inner is not None
    specs = run.specs(step.inner, values[it])
    stacks = [weights((_trips(step), *shape), dtype) for shape, dtype in specs]

    def body(x: jax.Array, arguments: list[jax.Array]) -> tuple[jax.Array, None]:
        assert step.inner is not None
        return _like(x, run.block(step.inner, x, given(arguments)), run), None

    return lax.scan(body, values[it], stacks, length=_trips(step))[0], {it}


def _shared_scan(run: _Run, step: Step, values: list[jax.Array], weights: Weights) -> Made:
    """All trips have the same weights; what a trip makes is also kept."""
    it = _pick(step, values)
    function, arguments = run.inner(step.inner, values[it], weights)

    def body(x: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        x = _like(x, function(x, arguments), run)
        return x, jnp.sin(x)

    x, kept = lax.scan(body, values[it], None, length=_trips(step))
    return jnp.concatenate([x[None], kept]).reshape(-1, *x.shape[1:])[: 2 * len(x)] + jnp.mean(kept), {it}


def _while(run: _Run, step: Step, values: list[jax.Array], weights: Weights) -> Made:
    return _loop(run, step, values, weights, _trips(step))


def _unknown_while(run: _Run, step: Step, values: list[jax.Array], weights: Weights) -> Made:
    """An argument says how often."""
    return _loop(run, step, values, weights, weights((), jnp.int32))


def _loop(run: _Run, step: Step, values: list[jax.Array], weights: Weights, trips: int | jax.Array) -> Made:
    it = _pick(step, values)
    function, arguments = run.inner(step.inner, values[it], weights)

    def body(state: tuple[Any, jax.Array]) -> tuple[Any, jax.Array]:
        count, x = state
        return count + 1, _like(x, function(x, arguments), run)

    return lax.while_loop(lambda state: state[0] < trips, body, (0, values[it]))[1], {it}


def _cond(run: _Run, step: Step, values: list[jax.Array], weights: Weights) -> Made:
    """The block or, for far fewer FLOPs, nothing much."""
    it = _pick(step, values)
    function, arguments = run.inner(step.inner, values[it], weights)
    which = weights((), jnp.int32)
    made = lax.cond(which > 0, lambda x: _like(x, function(x, arguments), run), jnp.cos, values[it])
    return made, {it}


def _remat(run: _Run, step: Step, values: list[jax.Array], weights: Weights) -> Made:
    it = _pick(step, values)
    function, arguments = run.inner(step.inner, values[it], weights)
    return jax.checkpoint(function)(values[it], arguments), {it}


def _jit(run: _Run, step: Step, values: list[jax.Array], weights: Weights) -> Made:
    it = _pick(step, values)
    function, arguments = run.inner(step.inner, values[it], weights)
    return jax.jit(function)(values[it], arguments), {it}


def _vmap(run: _Run, step: Step, values: list[jax.Array], weights: Weights) -> Made:
    it = _pick(step, values)
    x = values[it] if values[it].ndim == 3 else jnp.stack([run.distinct(values[it]) for _ in range(2)])
    function, arguments = run.inner(step.inner, x[0], weights)
    made = jax.vmap(function, in_axes=(0, None))(x, arguments)
    return (made if made.ndim < 4 else made.reshape(-1, *made.shape[2:])), {it}


def _grad(run: _Run, step: Step, values: list[jax.Array], weights: Weights) -> Made:
    it = _pick(step, values)
    function, arguments = run.inner(step.inner, values[it], weights)

    def scalar(x: jax.Array) -> jax.Array:
        return _scalar(run.distinct(function(x, arguments)))

    return run.distinct(values[it]) + jax.grad(scalar)(values[it]), {it}


_RULES: dict[str, Rule] = {
    **{"linear": _linear, "pair": _pair, "batched": _batched, "two axes": _two_axes, "narrow": _narrow},
    **{"gather": _gather, "look up": _look_up, "dynamic slice": _dynamic_slice, "update slice": _update_slice},
    **{"softmax": _softmax, "transpose": _transpose, "split": _split, "cast": _cast, "concat": _concat},
    **{"scan": _scan, "shared scan": _shared_scan, "while": _while, "unknown while": _unknown_while, "cond": _cond},
    **{"remat": _remat, "vmap": _vmap, "grad": _grad, "jit": _jit},
}


def function_of(program: Program, barriers: bool = False) -> tuple[Callable[..., Any], list[jax.ShapeDtypeStruct]]:
    """(function of x and its other arguments, all of them)."""
    x = jax.ShapeDtypeStruct((program.rows, program.width), jnp.float32)
    arguments = [x, *(jax.ShapeDtypeStruct(*spec) for spec in _Run(barriers).specs(program.block, x))]

    def forward(*arrays: jax.Array) -> jax.Array:
        return _Run(barriers).block(program.block, arrays[0], given(arrays[1:]))

    def train(*arrays: jax.Array) -> list[jax.Array]:
        smooth = [n for n, array in enumerate(arrays) if jnp.issubdtype(array.dtype, jnp.floating)]

        def loss(weights: list[jax.Array]) -> jax.Array:
            placed = dict(zip(smooth, weights, strict=True))
            return _scalar(jnp.sin(forward(*(placed.get(n, array) for n, array in enumerate(arrays)))))

        value, gradients = jax.value_and_grad(loss)([arrays[n] for n in smooth])
        return [value, *(arrays[n] - jnp.sin(gradient) for n, gradient in zip(smooth, gradients, strict=True))]

    return (train if program.trained else forward), arguments


# --- counting ------------------------------------------------------------------------------------------------------


class Products(NamedTuple):
    """FLOPs of matmuls; apart from them those of outer products, which sum over one element: to a compiler they are
    elementwise, and each kernel that reads one may make it again rather than read it."""

    inner: int
    outer: int

    def __add__(self, other: "Products") -> "Products":  # pyright: ignore[reportIncompatibleMethodOverride]
        return Products(self.inner + other.inner, self.outer + other.outer)

    def times(self, count: int) -> "Products":
        return Products(self.inner * count, self.outer * count)


NONE = Products(0, 0)


def counted(function: Callable[..., Any], arguments: Sequence[jax.ShapeDtypeStruct]) -> Products:
    """2 FLOPs a multiply-add of each dot_general whose result is used, times the trips of the loops around it.

    A loop runs once where its trips are not in the program; of branches the costliest runs.
    """
    jaxpr = _open(jax.make_jaxpr(function)(*arguments))
    used, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return _count(used)


def _open(jaxpr: Any) -> Any:
    return getattr(jaxpr, "jaxpr", jaxpr)


def _count(jaxpr: Any) -> Products:
    return sum(map(_count_one, jaxpr.eqns), NONE)


def _count_one(equation: Any) -> Products:
    name, said = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = said["dimension_numbers"]
        length = math.prod(equation.invars[0].aval.shape[d] for d in contracted)
        work = 2 * math.prod(equation.outvars[0].aval.shape) * length
        return Products(0, work) if length == 1 else Products(work, 0)
    assert "dot" not in name and "conv_" not in name, f"no count of {name}"
    if name == "cond":
        return max(_count(_open(branch)) for branch in said["branches"])
    inner = {key: _open(value) for key, value in said.items() if hasattr(_open(value), "eqns")}
    if name == "scan":
        return _count(inner["jaxpr"]).times(said["length"])
    if name == "while":
        trips = _while_trips(inner["cond_jaxpr"])
        return _count(inner["body_jaxpr"]).times(trips) + _count(inner["cond_jaxpr"]).times(trips + 1)
    return sum(map(_count, inner.values()), NONE)


def _while_trips(condition: Any) -> int:
    """The literal that the counter, which starts at 0 and grows by 1, is compared with."""
    compare = next(equation for equation in condition.eqns if equation.primitive.name == "lt")
    return int(getattr(compare.invars[1], "val", 1))


def billed_outer(module: Module) -> int:
    """What a bill charges for products whose result has an element for each multiply-add: outer products, and the first
    halves of such as are summed elsewhere."""

    return sum(one for one, elements in _products(module.entry) if one == 2 * elements)


def _products(computation: Computation) -> Iterator[tuple[int, int]]:
    """(FLOPs in all, result's elements times how often) of each matmul that runs; of branches in the costliest."""

    def branch(conditional: Instruction) -> int:
        work = [sum(one for one, _ in _products(called)) for called in conditional.called]
        return work.index(max(work))

    for kernel, times in executed(computation, trip_count, branch):
        for one in inside(kernel):
            work = flops(one)
            if work and work.matmul:
                yield times * work.matmul, times * one.shape.elements


# --- checking ------------------------------------------------------------------------------------------------------


def check(program: Program, target: str) -> str:
    """AssertionError or whatever goes wrong; else what became of it: "equal", or what the compiler did.

    "not compiled": an error inside the compiler (XLA for GPUs finds no tiles for some odd sizes).

    A compiler may do less than the jaxpr says (of a product of which a part is used, that part; of what is to be
    rematerialised, nothing) or more (make again what it could have kept). Then the same program with barriers between
    its operations must come to what its jaxpr says, with rematerialisation or without: the rules count right, and the
    difference is the compiler's.
    """
    try:
        found, said = found_and_said(program, target)
    except targets.CompileError:
        return "not compiled"
    if is_near(sum(found), sum(said)):
        return "equal"
    if is_near(found.inner, said.inner):
        return "outer products made again" if found.outer > said.outer else "outer products removed"
    kept = program._replace(block=without_remat(program.block))
    least = counted(*function_of(kept))
    if least.inner <= found.inner < said.inner:
        return "rematerialisation removed"
    barred, barred_said = found_and_said(program, target, barriers=True)
    least = counted(*function_of(kept, barriers=True))
    equal = is_near(sum(barred), sum(barred_said)) or is_near(barred.inner, barred_said.inner)
    assert equal or least.inner <= barred.inner < barred_said.inner, (
        f"jaxpr: {said}, bill: {found}; with barriers, jaxpr: {barred_said}, without remat {least}, bill: {barred}"
    )
    return "removed" if sum(found) < sum(said) else "made again"


def without_remat(block: Block) -> Block:
    """The same values, each computed once."""
    steps = (step._replace(kind="jit") if step.kind == "remat" else step for step in block.steps)
    return Block(tuple(step._replace(inner=without_remat(step.inner)) if step.inner else step for step in steps))


def found_and_said(program: Program, target: str, barriers: bool = False) -> tuple[Products, Products]:
    """Of the program compiled for one chip, what its bill, which is held to be sound, and what its jaxpr come to."""
    function, arguments = function_of(program, barriers)
    smooth = tuple(n for n, array in enumerate(arguments) if jnp.issubdtype(array.dtype, jnp.floating))
    donate = smooth if program.donated and program.trained else ()
    module = parse(targets.compile(jax.jit(function, donate_argnums=donate), target, *arguments, runs=False).text)
    bill = itemize_module(module, targets.chip(target))
    assert_sound(bill)
    assert_known(bill, program)
    outer = billed_outer(module)
    return Products(bill.total.matmul - outer, outer), counted(function, arguments)


def is_near(found: int, expected: int) -> bool:
    return abs(found - expected) <= TOLERANCE * expected


def assert_sound(bill: Bill) -> None:
    """It adds up, nothing is negative, and it survives being saved and printed."""
    bill.check()
    works: list[Work] = [bill.unattributed, bill.total, *(row.work for row in bill.rows)]
    for work in works:
        amounts = (work.matmul, work.elementwise, work.transcendental, work.link_bytes, work.picoseconds)
        assert min(*amounts, *work.hbm_read.values(), *work.hbm_write.values()) >= 0, "a negative amount"
    saved = bill.dumps()
    assert Bill.from_json(json.loads(saved)).dumps() == saved
    assert str(bill) and render.to_csv(bill)


def kinds(block: Block) -> set[str]:
    """All kinds of steps in it."""
    return {step.kind for step in block.steps}.union(*(kinds(step.inner) for step in block.steps if step.inner))


def assert_known(bill: Bill, program: Program) -> None:
    """Nothing is unknown but what the program does not say."""
    allowed = {"unknown while": "trip count not known", "cond": "2 branches"}
    said = tuple(allowed[kind] for kind in kinds(program.block) & allowed.keys())
    for one in bill.unknown:
        assert one.reason.startswith(said), f"unknown: {one}"


# --- long runs -----------------------------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(description="bills random programs and counts their jaxprs; 1 if any goes wrong")
    parser.add_argument("--minutes", type=float, default=10, help="of CPU time, which a busy machine does not shorten")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", default="host")
    given_flags = parser.parse_args()
    ready(given_flags.target)
    end, outcomes, seed = time.process_time() + 60 * given_flags.minutes, Counter[str](), given_flags.seed * 1_000_000
    while time.process_time() < end:
        program = draw(random.Random(seed).randrange)
        try:
            outcome = check(program, given_flags.target)
        except Exception as error:
            outcome = "failed"
            print(f"{seed}: {traceback.format_exc() if not isinstance(error, AssertionError) else error}", flush=True)
        if outcome != "equal":
            print(f"{seed}: {outcome}", flush=True)
        outcomes[outcome] += 1
        seed += 1
    said = ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items()))
    print(f"{given_flags.target}, seed {given_flags.seed}, {given_flags.minutes:g} minutes: {said}")
    return 1 if outcomes["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
