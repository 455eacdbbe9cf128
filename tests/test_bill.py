"""The bill adds up: rows + unattributed = total, in integers, for every quantity, whatever the program."""

import json
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from functools import cache

import capture
import jax
import jax.numpy as jnp
import pytest
from compiled import bf16, f32, i32, mesh, ready, split
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from jax import lax
from stepbill.experiments import steps
from stepbill.model.scopes import COMPONENTS
from stepbill.profiling import Bill, Row, Work, itemize, render, targets
from stepbill.profiling.attribution import PHASES, ROLES, TAXES
from stepbill.profiling.bill import GROUPS, SCHEMA
from stepbill.profiling.hlo import HloError, Module, parse
from stepbill.profiling.price import dollars_per_million_tokens
from stepbill.profiling.walk import Kernel, apportion, itemize_module, itemize_text

H200 = targets.chip("h200")
CAPTURED = pytest.mark.parametrize("name", capture.PROGRAMS)


@cache
def captured(name: str) -> Module:
    return parse(capture.read(name))


def bill_of(name: str, **options) -> Bill:
    return itemize_module(captured(name), targets.chip(capture.PROGRAMS[name][1]), **({"roles": steps.ROLES} | options))


def quantities(work: Work) -> Counter:
    """Every number of some work, by name. Added up here, and not by Work's own arithmetic."""
    found = Counter(
        matmul=work.matmul,
        elementwise=work.elementwise,
        transcendental=work.transcendental,
        link_bytes=work.link_bytes,
        host_link_bytes=work.host_link_bytes,
        picoseconds=work.picoseconds,
    )
    for side, amounts in (("read", work.hbm_read), ("write", work.hbm_write)):
        for role, amount in amounts.items():
            found[f"{side} {role}"] += amount
    return found


def added(works) -> dict[str, int]:
    total = Counter()
    for work in works:
        total.update(quantities(work))
    return {name: amount for name, amount in total.items() if amount}


def assert_adds_up(bill: Bill) -> None:
    bill.check()
    total = added([bill.total])
    assert added([*(row.work for row in bill.rows), bill.unattributed]) == total
    assert added([*(bill.group(name) for name in GROUPS), bill.unattributed]) == total
    for work in (bill.total, bill.unattributed, *(row.work for row in bill.rows), *map(bill.group, GROUPS)):
        for name, amount in quantities(work).items():
            assert isinstance(amount, int) and amount >= 0, name
    keys = [(row.component, row.phase, row.tax) for row in bill.rows]
    assert len(set(keys)) == len(keys)
    for row in bill.rows:
        assert row.phase in PHASES and row.tax in (None, *TAXES) and row.work
        assert set(row.work.hbm_read) | set(row.work.hbm_write) <= set(ROLES)
        assert row.bound in ("compute", "hbm", "link", "latency", "unknown")
    assert bill.ideal_flops is not None and 0 <= bill.ideal_flops <= bill.total.matmul
    assert bill.ideal_hbm_bytes is not None and bill.ideal_hbm_bytes >= 0


# --- programs captured from our own steps ----------------------------------------------------------------------------


@CAPTURED
def test_captured_programs_add_up(name):
    bill = bill_of(name)
    assert_adds_up(bill)
    assert not bill.unknown
    assert bill.total.matmul > 0 and bill.total.hbm_bytes > 0
    assert (bill.total.picoseconds > 0) == ("host" not in name)
    assert (bill.total.link_bytes > 0) == ("sharded" in name)
    assert bill.unattributed.flops <= 0.01 * bill.total.flops
    assert bill.unattributed.hbm_bytes <= 0.03 * bill.total.hbm_bytes
    assert bill.ideal_hbm_bytes is not None and bill.ideal_hbm_bytes <= 1.01 * bill.total.hbm_bytes


@CAPTURED
@settings(max_examples=6, deadline=None)
@given(st.data())
def test_captured_programs_add_up_whatever_is_asked_of_them(name, data):
    """Other scopes to look for, other roles, other masks: the splits vary, the total does not."""
    components = tuple(data.draw(st.lists(st.sampled_from(COMPONENTS), unique=True), "components"))
    roles = data.draw(
        st.dictionaries(st.sampled_from(["params", "opt_state", "cache", "tokens"]), st.sampled_from(ROLES)), "roles"
    )
    fractions = st.fractions(0, 1, max_denominator=1000)
    masked = data.draw(st.dictionaries(st.sampled_from(COMPONENTS), fractions), "masked")
    bill = bill_of(name, components=components, roles=roles, masked=masked)
    assert_adds_up(bill)
    assert {row.component for row in bill.rows} <= set(components)
    expected, got = quantities(bill_of(name).total), quantities(bill.total)
    for quantity in ("matmul", "elementwise", "transcendental", "link_bytes"):
        assert got[quantity] == expected[quantity]
    assert bill.total.hbm_bytes == bill_of(name).total.hbm_bytes  # the roles may differ, the bytes do not


@CAPTURED
def test_two_bills_of_one_program_are_equal(name):
    first, second = bill_of(name), bill_of(name)
    assert first.to_json() == second.to_json()
    again = itemize_text(capture.read(name), targets.chip(capture.PROGRAMS[name][1]), roles=steps.ROLES)
    assert again.to_json() == first.to_json()


def test_the_masked_share_of_a_component_is_taken_off_all_its_flops():
    whole = bill_of("prefill-h200")
    masked = bill_of("prefill-h200", masked={"attention/core": Fraction(1, 2)})
    core, tax = whole.component("attention/core"), masked.tax("masked")
    assert (tax.matmul, tax.hbm_bytes) == (core.matmul // 2, 0)
    assert core.elementwise // 2 - 50 <= tax.elementwise <= core.elementwise // 2
    assert masked.ideal_flops == masked.total.matmul - tax.matmul
    assert masked.component("attention/core").matmul == core.matmul


# --- random programs -------------------------------------------------------------------------------------------------

B, D, L = 8, 16, 3
MATMUL = 2 * B * D * D
PIECES = {
    "matmul": (lambda x, w, stack, table, n: jnp.tanh(x @ w), MATMUL),
    "scan": (lambda x, w, stack, table, n: lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, stack)[0], L * MATMUL),
    "cond": (lambda x, w, stack, table, n: lax.cond(n > 3, lambda x: jnp.tanh(x @ w), lambda x: x * 2.0, x), MATMUL),
    "layer": (lambda x, w, stack, table, n: jnp.sin(x @ lax.dynamic_index_in_dim(stack, n, keepdims=False)), MATMUL),
    "gather": (lambda x, w, stack, table, n: x + table[jnp.arange(B) + n], 0),
    "slice": (lambda x, w, stack, table, n: x * table[3 : 3 + B], 0),
    "update": (lambda x, w, stack, table, n: lax.dynamic_update_slice(jnp.sin(x), x[:1] * 2.0, (n, 0)), 0),
    "transpose": (lambda x, w, stack, table, n: jnp.concatenate([x[:, D // 2 :], x[:, : D // 2]], 1), 0),
    "norm": (lambda x, w, stack, table, n: x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1.0), 0),
    "softmax": (lambda x, w, stack, table, n: jax.nn.softmax(x * 2.0), 0),
    "bfloat16": (lambda x, w, stack, table, n: jnp.cos(x).astype(jnp.bfloat16).astype(jnp.float32), 0),
    "nameless": (lambda x, w, stack, table, n: jnp.exp(-x), 0),
    "remat": (lambda x, w, stack, table, n: jax.checkpoint(lambda x: jnp.tanh(jnp.tanh(x @ w) @ w))(x), 2 * MATMUL),
}


# Without shrinking: the programs are small, and it would compile hundreds of them.
@settings(max_examples=12, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(
    pieces=st.lists(st.tuples(st.sampled_from(list(PIECES)), st.sampled_from(COMPONENTS)), min_size=1, max_size=6),
    gradient=st.booleans(),
    masked=st.dictionaries(st.sampled_from(COMPONENTS), st.fractions(0, 1, max_denominator=7), max_size=3),
)
def test_random_programs_add_up(pieces, gradient, masked):
    def program(params, x, n):
        w, stack, table = params
        for name, component in pieces:
            if name == "nameless":
                x = PIECES[name][0](x, w, stack, table, n)
                continue
            with jax.named_scope(component):
                x = PIECES[name][0](x, w, stack, table, n)
        return x

    def squared(params, x, n):
        return jnp.sum(program(params, x, n) ** 2)

    arguments = (f32(D, D), f32(L, D, D), f32(32, D)), f32(B, D), i32()
    ready("host")
    bill = itemize(jax.jit(jax.grad(squared) if gradient else program), *arguments, masked=masked)
    assert_adds_up(bill)
    expected = sum(PIECES[name][1] for name, _ in pieces)
    if gradient:
        assert bill.total.matmul <= 4 * expected  # forward, recompute, two products backward
    else:
        assert bill.total.matmul == expected
    assert {row.component for row in bill.rows} <= {component for _, component in pieces}
    assert {unknown.reason.split(" of ")[0] for unknown in bill.unknown} <= {"2 branches"}


# --- arithmetic ------------------------------------------------------------------------------------------------------


@given(st.integers(0, 10**18), st.lists(st.integers(0, 10**15), min_size=1, max_size=8))
def test_apportion(amount, weights):
    shares = apportion(amount, weights)
    assert len(shares) == len(weights) and sum(shares) == amount
    assert all(isinstance(share, int) and share >= 0 for share in shares)
    if sum(weights):
        for share, weight in zip(shares, weights, strict=True):
            assert abs(share - Fraction(amount * weight, sum(weights))) < 1


AMOUNTS = st.dictionaries(st.sampled_from(ROLES), st.integers(0, 10**15))
WORKS = st.builds(
    Work,
    matmul=st.integers(0, 10**18),
    elementwise=st.integers(0, 10**15),
    transcendental=st.integers(0, 10**15),
    hbm_read=AMOUNTS,
    hbm_write=AMOUNTS,
    link_bytes=st.integers(0, 10**15),
    host_link_bytes=st.integers(0, 10**15),
    picoseconds=st.integers(0, 10**15),
)


@given(WORKS, WORKS, st.integers(0, 1000))
def test_work_adds_and_subtracts(a, b, times):
    before = added([a]), added([b])
    assert added([a + b]) == added([a, b])
    assert a + b == b + a
    assert (a + b) - b == a
    assert a - a == Work() and not (a - a)
    assert a + Work() == a
    repeated = Work()
    repeated.add(a, times)
    assert repeated.flops == times * a.flops and repeated.hbm_bytes == times * a.hbm_bytes
    assert (added([a]), added([b])) == before  # neither was changed
    assert a.hbm_bytes == a.hbm_read_bytes + a.hbm_write_bytes == sum(a.hbm_read.values()) + sum(a.hbm_write.values())
    assert a.flops == a.matmul + a.elementwise + a.transcendental


def test_a_role_with_nothing_is_no_difference():
    assert Work(hbm_read={"weights": 0}) == Work()
    assert Work(hbm_read={"weights": 1}) != Work(hbm_write={"weights": 1})
    assert bool(Work(link_bytes=1)) and bool(Work(host_link_bytes=1)) and not Work(hbm_read={"cache": 0})


@pytest.mark.parametrize(("one", "other"), [("train-h200", "decode-h200"), ("decode-v5e", "decode-v5e-sharded")])
def test_bills_add_and_subtract_row_by_row(one, other):
    a, b = bill_of(one), bill_of(other)
    before = a.to_json()
    assert not (a - a).total and not any(row.work for row in (a - a).rows)
    difference = a - b
    assert difference.total == a.total - b.total and difference.unattributed == a.unattributed - b.unattributed
    back = difference + b
    assert back.total == a.total
    for row in a.rows:
        (match,) = [r for r in back.rows if (r.component, r.phase, r.tax) == (row.component, row.phase, row.tax)]
        assert match.work == row.work
    assert added([(a + b).total]) == added([a.total, b.total])
    assert a.to_json() == before  # neither was changed


def test_a_bill_that_does_not_add_up_says_so():
    row = Row("mlp/up", "forward", None, Work(matmul=3))
    Bill({}, [row], Work(), [], Work(matmul=3)).check()
    with pytest.raises(AssertionError, match="does not add up"):
        Bill({}, [row], Work(), [], Work(matmul=4)).check()


def test_groups_are_disjoint_and_cache_is_every_byte_of_it():
    bill = bill_of("decode-h200")
    cache = bill.group("cache")
    assert cache.hbm_read["cache"] == bill.total.hbm_read["cache"]
    assert cache.hbm_write["cache"] == bill.total.hbm_write["cache"]
    for name in ("attention", "mlp", "other"):
        assert not bill.group(name).hbm_read.get("cache") and not bill.group(name).hbm_write.get("cache")
    assert bill.group("mlp").matmul == bill.component("mlp").matmul
    assert bill.group("attention").matmul == bill.component("attention").matmul
    assert bill.group("other").matmul == bill.component("logits").matmul
    with pytest.raises(KeyError, match=r"embedding.* is not one of attention, mlp, cache, other"):
        bill.group("embedding")


# --- what comes out --------------------------------------------------------------------------------------------------

ENTRY = {"flops", "hbm_read", "hbm_write", "link_bytes", "seconds"}
TOP = {
    "schema",
    "program",
    "rows",
    "groups",
    "unattributed",
    "unknown",
    "total",
    "reconcile",
    "ideal",
    "memory",
    "price",
}


@CAPTURED
def test_json_is_schema_1(name):
    bill = bill_of(name)
    found = json.loads(bill.dumps())
    assert found == json.loads(json.dumps(bill.to_json()))
    assert found["schema"] == SCHEMA == 1
    assert set(found) >= TOP
    assert set(found["groups"]) == set(GROUPS)
    assert set(found["reconcile"]) >= {"xla", "closed_form", "differences"}
    assert set(found["ideal"]) >= {"flops", "hbm_bytes"}
    entries = [*found["rows"], *found["groups"].values(), found["unattributed"], found["total"]]
    for entry in entries:
        assert set(entry) >= ENTRY
        assert set(entry["flops"]) == {"matmul", "elementwise", "transcendental"}
        assert set(entry["seconds"]) >= {"roofline", "measured"}
        assert all(amount > 0 for side in ("hbm_read", "hbm_write") for amount in entry[side].values())
    for row in found["rows"]:
        assert set(row) >= {"component", "phase", "tax", "bound"}
    # The numbers of the text add up too, seconds within rounding.
    parts = [*found["rows"], found["unattributed"]]
    for kind in ("matmul", "elementwise", "transcendental"):
        assert sum(part["flops"][kind] for part in parts) == found["total"]["flops"][kind]
    for side in ("hbm_read", "hbm_write"):
        for role in ROLES:
            assert sum(part[side].get(role, 0) for part in parts) == found["total"][side].get(role, 0)
    assert sum(part["link_bytes"] for part in parts) == found["total"]["link_bytes"]
    if bill.timed:
        seconds = sum(part["seconds"]["roofline"] for part in parts)
        assert seconds == pytest.approx(found["total"]["seconds"]["roofline"])


@CAPTURED
def test_shares_sum_to_one_where_there_is_time(name):
    found = bill_of(name).to_json()
    parts = [*found["rows"], found["unattributed"]]
    if "host" in name:  # whose peaks nobody knows
        assert all(part["share"] is None and part["seconds"]["roofline"] is None for part in parts)
        assert {row["bound"] for row in found["rows"]} == {"unknown"}
        return
    assert sum(part["share"] for part in parts) == pytest.approx(1)
    assert sum(group["share"] for group in found["groups"].values()) + found["unattributed"]["share"] == pytest.approx(
        1
    )
    assert found["total"]["share"] == 1


def test_dollars_are_split_as_time_is():
    bill = bill_of("decode-h200")
    assert all(row["dollars_per_million_tokens"] is None for row in bill.to_json()["rows"])
    bill.price = {"dollars_per_million_tokens": dollars_per_million_tokens(H200, 1, bill.total.seconds, 4)}
    found = bill.to_json()
    whole = found["total"]["dollars_per_million_tokens"]
    assert whole == pytest.approx(bill.total.seconds / 3600 * H200.dollars_per_hour / 4 * 1e6)
    parts = [*found["rows"], found["unattributed"]]
    assert sum(part["dollars_per_million_tokens"] for part in parts) == pytest.approx(whole)


def test_an_unknown_kernel_is_in_the_json():
    text = capture.read("decode-h200").replace("ENTRY ", "ENTRY ", 1)
    line = '%odd = f32[8]{0} custom-call(), custom_call_target="odd_kernel"'
    head, _, tail = text.partition("ENTRY ")
    first = tail.index("\n")
    bill = itemize_text(head + "ENTRY " + tail[:first] + "\n  " + line + tail[first:], targets.chip("h200"))
    (unknown,) = bill.to_json()["unknown"]
    assert unknown == {"instruction": "odd", "reason": "no rule for custom call odd_kernel", "hbm_bytes_at_least": 32}
    assert_adds_up(bill)


@CAPTURED
def test_a_bill_prints(name):
    bill = bill_of(name)
    text = str(bill)
    assert "unattributed" in text and "total" in text
    assert "qkv" in text and "logits" in text


# --- what goes in ----------------------------------------------------------------------------------------------------


def double(x):
    with jax.named_scope("mlp/up"):
        return x @ x


def test_anything_that_becomes_a_program_can_be_billed(tmp_path):
    ready("host")
    expected = 2 * 64**3
    lowered = jax.jit(double).lower(f32(64, 64))
    compiled = lowered.compile()
    path = tmp_path / "dump.txt"
    path.write_text(compiled.as_text())
    for program in (lowered, compiled, compiled.as_text(), path, str(path)):
        assert itemize(program).component("mlp/up").matmul == expected
    for argument in (f32(64, 64), jnp.ones((64, 64)), jnp.ones((64, 64), jnp.float32)):
        assert itemize(jax.jit(double), argument).component("mlp/up").matmul == expected
    captured_bill = itemize(capture.DATA / "decode-h200.hlo.gz", target="h200", roles=steps.ROLES)
    assert captured_bill.total == bill_of("decode-h200").total


@pytest.mark.parametrize("target", ["h200", "v5e"])
def test_a_function_is_compiled_for_the_target(target):
    ready(target)
    bill = itemize(jax.jit(double), bf16(64, 64), target=target)
    assert bill.total.matmul == 2 * 64**3
    assert bill.program["target"] == target
    assert bill.timed and bill.total.seconds > 0
    assert any("not present" in note or "at hand" in note for note in bill.notes)


@pytest.mark.parametrize("target", ["host", "h200", "v5e"])
def test_a_function_on_many_chips_is_billed_a_chip_and_keeps_the_roles_of_its_arguments(target):
    """XLA calls the arguments of what it has split `param`, which says nothing of them."""
    over = mesh(target, tensor=4)
    x, w = split(bf16(256, 512), over), split(bf16(512, 1024), over, None, "tensor")
    bill = itemize(jax.jit(lambda x, w: x @ w), x, w, target=target)
    assert (bill.program["chips"], bill.total.matmul) == (4, 2 * 256 * 512 * 256)
    # Dollars of a program that handles no tokens are those of a run, on all of its chips.
    hourly = targets.chip(target).dollars_per_hour
    assert bill.price["chip_dollars_per_hour"] == hourly and bill.price["dollars_per_million_tokens"] is None
    if target != "host":
        a_run = bill.price["dollars_per_run"]
        assert hourly and a_run == pytest.approx(4 * hourly * bill.total.seconds / 3600)
        assert f"${render.dollars(1e6 * a_run)} per million runs: " in str(bill)
        read = bill.total.hbm_read  # the host makes float32 of them first
        assert (read["inputs"], read["weights"], bill.total.hbm_read_bytes) == (2**18, 2**18, 2**19)


def test_a_program_of_another_compiler_says_so():
    """It is billed, at the peaks and prices that are asked for, but is not what that chip would run."""
    ready("h200")
    lowered = jax.jit(double).lower(f32(64, 64))
    for program in (lowered, lowered.compile()):
        assert itemize(program, target="h200").notes[0] == "compiled for cpu: this is not what NVIDIA H200 would run"
        assert not any("this is not" in note for note in itemize(program).notes)
    there = targets.lower(jax.jit(double), "h200", f32(64, 64))
    for program in (there, targets.compile(there, "h200").compiled):
        assert not any("this is not" in note for note in itemize(program, target="h200").notes)
    assert itemize(targets.compile(there, "h200").compiled).notes[0].startswith("compiled for cuda: this is not what")


def test_on_the_host_xla_says_the_same_of_a_program_without_loops():
    ready("host")
    bill = itemize(jax.jit(double), f32(64, 64))
    assert bill.xla is not None and bill.xla["flops"] == pytest.approx(bill.total.flops, rel=0.01)
    for difference in bill.differences:
        assert difference["reason"] and (difference["amount"] or difference["reason"] == "unexplained")


def test_what_is_no_program_is_an_error(tmp_path):
    with pytest.raises(TypeError, match="program is a function; it must be jitted"):
        itemize(double, f32(64, 64))
    with pytest.raises(HloError):
        itemize(tmp_path / "nothing.txt")
    with pytest.raises(ValueError, match="target is 'h300'"):
        itemize("HloModule m", target="h300")


def test_captured_programs_are_of_the_model_at_hand():
    """Else `python tests/capture.py` makes them again."""
    for name, (step, _, _) in capture.PROGRAMS.items():
        built = steps.build(capture.config(step), step, batch=capture.SIZES[step][0], context=capture.SIZES[step][1])
        arguments = dict(zip(built.names, built.arguments, strict=True))
        # What a step does not read, such as a prefill the cache's old position, is no argument of the program.
        names = {root + jax.tree_util.keystr(path) for root in arguments
                 for path, _ in jax.tree.leaves_with_path(arguments[root])}  # fmt: skip
        found = {parameter.op_name for parameter in captured(name).entry.parameters}
        assert found <= names and len(names - found) <= 1, name
        assert (capture.DATA / f"{name}.hlo.gz").stat().st_size < 80_000  # flash kernels carry their own code
    assert replace(capture.TINY, remat="full") == capture.config("train")


# --- what the compiler does again of its own accord ----------------------------------------------------------


def rematerialised(*lines: str) -> str:
    body = "\n".join(f"  {line}" for line in lines)
    return (
        "HloModule m, is_scheduled=true, entry_computation_layout={(f32[8,8]{1,0})->f32[8,8]{1,0}}\n\n"
        f"ENTRY %main (x: f32[8,8]) -> f32[8,8] {{\n  %x = f32[8,8]{{1,0}} parameter(0)\n{body}\n}}\n"
    )


def dot_line(name: str, operand: str, root: str = "") -> str:
    dims = "lhs_contracting_dims={1}, rhs_contracting_dims={0}"
    return (
        f"{root}%{name} = f32[8,8]{{1,0}} dot(%{operand}, %{operand}), {dims}, "
        'metadata={op_name="jit(f)/mlp/up/dot_general"}'
    )


def test_a_kernel_that_the_compiler_runs_again_is_recompute():
    again = rematerialised(
        dot_line("dot.1", "x"), dot_line("dot.2", "dot.1"), dot_line("dot.1.remat", "dot.2", root="ROOT ")
    )
    found = itemize_text(again, targets.chip("h200"))
    assert found.remade_flops == 2 * 8**3
    assert found.component("mlp/up", "recompute").matmul == 2 * 8**3
    assert found.component("mlp/up", "forward").matmul == 2 * 2 * 8**3


def test_a_clone_that_took_the_place_of_its_original_is_the_work_itself():
    moved = rematerialised(dot_line("dot.2", "x"), dot_line("dot.1.remat3", "dot.2", root="ROOT "))
    found = itemize_text(moved, targets.chip("h200"))
    assert found.remade_flops == 0
    assert found.component("mlp/up", "forward").matmul == 2 * 2 * 8**3


# As trace.facts has it, of no run.
MEASURED = {
    **dict.fromkeys(("device", "how", "split"), "-"),
    **{"traced_seconds": [1.0], "traced_clock_seconds": None, "untraced_seconds": None},
    **{"gaps": {"count": 0, "largest_seconds": 0.0}, "unjoined": {}, "steps": 1},
    **dict.fromkeys(("busy_seconds", "idle_seconds", "loop_seconds", "traced_median_seconds"), 1.0),
    **dict.fromkeys(("joined", "coverage", "seconds", "flops_per_second", "hbm_bytes_per_second", "mfu", "mbu")),
    **dict.fromkeys(("traced_clock_median_seconds", "untraced_median_seconds")),
}


@CAPTURED
def test_measured_time_is_split_by_shares_and_adds_up(name):
    kernels: list[Kernel] = []
    plain = bill_of(name, kernels=kernels)
    times = {one.instruction.name: 1_000_003 + n for n, one in enumerate(kernels)}
    bill = bill_of(name, measured=times | {"no.such.instruction": 77})
    bill.check()
    assert bill.total.measured_picoseconds == sum(times.values()) + 77
    assert bill.unattributed.measured_picoseconds >= 77
    assert all(row.work.measured_picoseconds > 0 for row in bill.rows if row.work.matmul)
    bill.measured = MEASURED
    saved = json.loads(bill.dumps())
    assert saved["total"]["seconds"]["measured"] == pytest.approx((sum(times.values()) + 77) * 1e-12)
    assert Bill.from_json(saved).to_json() == saved
    assert plain.total.measured_picoseconds == 0
    assert json.loads(plain.dumps())["total"]["seconds"]["measured"] is None
