"""The pytest plugin: what it records, what fails and in which words, run as its users run it."""

import json
from importlib import metadata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from stepbill.profiling import Bill, Row, Unknown, Work, budget

pytest_plugins = ["pytester"]

LINE = ".".join(metadata.version("jax").split(".")[:2])

# A program whose cost is what the file says: no compiler.
BILLED = """
import json, pathlib
from stepbill.profiling import Bill, Row, Work

def test_cost(cost_budget):
    work = Work(**json.loads(pathlib.Path({cost!r}).read_text()))
    bill = Bill({{"target": "h200"}}, [Row("mlp/up", "forward", None, work)], Work(), [], work)
    cost_budget(bill, tolerance={tolerance})
"""


SHORT = (
    '{"schema": 1, "budgets": {"test_cost": {"h200": {"0.10": {"jax": "0.10.2", "costs": {}, "rows": {"a": [1]}}}}}}'
)


class Project:
    """A test of a program that costs what one says."""

    def __init__(self, pytester: pytest.Pytester):
        self.pytester, self.path = pytester, pytester.path / "test_it.budgets.json"

    def __call__(self, cost: dict, *options: str, tolerance: float = 0.01) -> pytest.RunResult:
        """What pytest says of it."""
        path = self.pytester.path / "cost.json"
        path.write_text(json.dumps(cost))
        self.pytester.makepyfile(test_it=BILLED.format(cost=str(path), tolerance=tolerance))
        return self.pytester.runpytest_inprocess("-p", "no:cacheprovider", *options)


@pytest.fixture
def project(pytester):
    return Project(pytester)


# --- from the first run on -----------------------------------------------------------------------------------------


def test_without_a_budget_the_test_fails_and_says_what_to_type(project):
    result = project({"matmul": 5})
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        [
            "test_cost has no budget for h200 in test_it.budgets.json. To record what it costs now:",
            "  pytest --budget-update 'test_it.py::test_cost'",
        ]
    )
    assert not project.path.exists()


def test_recorded_and_held(project):
    result = project({"matmul": 1000, "hbm_read": {"weights": 4000}}, "--budget-update")
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines([f"stepbill: 1 budgets recorded in {project.path}"])
    saved = json.loads(project.path.read_text())
    entry = saved["budgets"]["test_cost"]["h200"][LINE]
    assert entry["costs"] == {"matmul FLOPs": 1000, "HBM bytes: weights": 4000}
    assert entry["rows"] == {"mlp/up": [1000, 4000]} and entry["jax"] == metadata.version("jax")
    project({"matmul": 1010, "hbm_read": {"weights": 4000}}).assert_outcomes(passed=1)
    assert json.loads(project.path.read_text()) == saved
    project({"matmul": 1011, "hbm_read": {"weights": 4000}}).assert_outcomes(failed=1)
    project({"matmul": 1001, "hbm_read": {"weights": 4000}}, tolerance=0).assert_outcomes(failed=1)
    project({"matmul": 1100, "hbm_read": {"weights": 4000}}, tolerance=0.1).assert_outcomes(passed=1)


def test_the_failure_ranks_what_has_grown(project):
    project({"matmul": 1000, "hbm_read": {"weights": 4000, "cache": 1000}}, "--budget-update")
    result = project({"matmul": 1100, "hbm_read": {"weights": 5000, "cache": 900}, "link_bytes": 7})
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        [
            "test_cost costs more for h200 than its budget:",
            "  link bytes: 0 -> 7 (new)",
            "  HBM bytes: weights: 4.00 k -> 5.00 k (+25.0%)",
            "  matmul FLOPs: 1.00 k -> 1.10 k (+10.0%)",
            "in these rows, those that grew most first:",
            "  mlp/up: FLOPs 1.00 k -> 1.10 k (+10.0%), HBM bytes 5.00 k -> 5.90 k (+18.0%)",
            "If that is meant:",
            "  pytest --budget-update 'test_it.py::test_cost'",
        ],
        consecutive=True,
    )


def test_no_more_than_a_dozen_rows_are_named():
    before = {"jax": "1", "costs": {}, "rows": {f"row {n}": [n, 1] for n in range(20)}}
    now = before | {"rows": {f"row {n}": [2 * n, 1] for n in range(20)}}
    said = budget._over(before, now, {})
    assert said[1] == "  row 19: FLOPs 19 -> 38 (+100.0%)"
    assert said[-2:] == ["  row 8: FLOPs 8 -> 16 (+100.0%)", "  and 7 more"]
    assert budget._over(before, before | {"rows": {}}, {"peak memory bytes": (1, 2)}) == [
        "  peak memory bytes: 1 -> 2 (+100.0%)"
    ]


def test_a_cost_that_fell_is_a_warning(project):
    project({"matmul": 1000}, "--budget-update")
    result = project({"matmul": 500})
    result.assert_outcomes(passed=1, warnings=1)
    result.stdout.fnmatch_lines(
        ["*CostFell: test_cost costs less for h200 than its budget: matmul FLOPs: 1.00 k -> 500 *"]
    )


@pytest.mark.parametrize(
    "content", ["", "{}", "[]", '{"schema": 2}', '{"schema": 1, "budgets": {"test_cost": 1}}', SHORT]
)
@pytest.mark.parametrize("options", [(), ("--budget-update",)])
def test_a_garbled_file_is_told_and_left_alone(project, content, options):
    project.path.write_text(content)
    result = project({"matmul": 5}, *options)
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        ["*test_it.budgets.json is not a file of budgets (*To record all of it again, delete it*"]
    )
    assert project.path.read_text() == content


@pytest.mark.parametrize(
    "lines,held,failed",
    [
        (["0.1", "999.0"], "0.1", True),  # the nearest older one, although the newer one would do
        (["999.0"], "999.0", False),
        (["0.1", LINE], LINE, False),  # its own
    ],
)
def test_another_jax(project, lines, held, failed):
    project({"matmul": 1000}, "--budget-update")
    saved = json.loads(project.path.read_text())
    entry = saved["budgets"]["test_cost"]["h200"].pop(LINE)
    cheap = entry | {"jax": "0.1.9", "costs": {"matmul FLOPs": 10}}
    saved["budgets"]["test_cost"]["h200"] = {line: cheap if line == "0.1" else entry for line in lines}
    project.path.write_text(json.dumps(saved))
    result = project({"matmul": 1000})
    result.assert_outcomes(failed=int(failed), passed=int(not failed))
    if failed:
        this = metadata.version("jax")
        result.stdout.fnmatch_lines([f"test_cost costs more for h200 than its budget of jax 0.1.9 (this is {this}):"])
    project({"matmul": 2000}, "--budget-update")
    after = json.loads(project.path.read_text())["budgets"]["test_cost"]["h200"]
    assert set(after) == {*lines, LINE} and after[LINE]["costs"] == {"matmul FLOPs": 2000}


def test_workers_of_xdist_record_into_one_file(pytester):
    pytester.makepyfile(
        test_it="""
        import pytest
        from stepbill.profiling import Bill, Row, Work

        class TestMany:
            @pytest.mark.parametrize("n", range(6))
            def test_cost(self, cost_budget, n):
                for name in ("first", "second"):
                    cost_budget(Bill({"target": "v5e"}, [], Work(n), [], Work(n)), name=name)
        """
    )
    result = pytester.runpytest_subprocess("-n", "2", "--budget-update")
    result.assert_outcomes(passed=6)
    result.stdout.fnmatch_lines(["stepbill: 12 budgets recorded in *test_it.budgets.json"])
    saved = json.loads((pytester.path / "test_it.budgets.json").read_text())["budgets"]
    names = [f"TestMany::test_cost[{n}] {name}" for n in range(6) for name in ("first", "second")]
    assert sorted(saved) == names
    assert saved[names[-1]]["v5e"][LINE]["costs"] == {"matmul FLOPs": 5}
    pytester.runpytest_inprocess().assert_outcomes(passed=6)


def test_a_function_is_compiled_whether_jitted_or_not(pytester):
    pytester.makepyfile(
        test_it="""
        import jax, jax.numpy as jnp

        def square(x):
            return x @ x

        def test_cost(cost_budget):
            x = jax.ShapeDtypeStruct((64, 64), jnp.float32)
            assert cost_budget(square, x, name="plain").total.matmul == 2 * 64**3
            cost_budget(jax.jit(square), x, name="jitted", roles={"x": "weights"})
        """
    )
    pytester.runpytest_inprocess("--budget-update").assert_outcomes(passed=1)
    saved = json.loads((pytester.path / "test_it.budgets.json").read_text())["budgets"]
    plain, jitted = (saved[f"test_cost {name}"]["host"][LINE]["costs"] for name in ("plain", "jitted"))
    assert plain["matmul FLOPs"] == jitted["matmul FLOPs"] == 2 * 64**3
    assert plain["peak memory bytes"] >= 2 * 4 * 64**2
    assert jitted["HBM bytes: weights"] == 4 * 64**2 and "HBM bytes: weights" not in plain
    pytester.runpytest_inprocess().assert_outcomes(passed=1)


# --- wrong use -----------------------------------------------------------------------------------------------------


def test_wrong_use(pytester):
    pytester.makepyfile(
        test_it="""
        import pytest
        from stepbill.profiling import Bill, Work

        def test_cost(cost_budget):
            bill = Bill({"target": "h200"}, [], Work(), [], Work())
            with pytest.raises(ValueError, match=r"^tolerance is -0.1; it must be 0 or more$"):
                cost_budget(bill, tolerance=-0.1)
            with pytest.raises(TypeError, match=r"^a Bill is given; it goes without arguments and options .*$"):
                cost_budget(bill, 5)
            cost_budget(bill)
            with pytest.raises(ValueError, match=r"^cost_budget is called twice for h200; give each program a name$"):
                cost_budget(bill)
            cost_budget(bill, name="another")
        """
    )
    pytester.runpytest_inprocess("--budget-update").assert_outcomes(passed=1)


# --- what is recorded, and what counts as growth -------------------------------------------------------------------


def test_what_is_recorded_of_a_bill():
    up = Work(100, 5, 1, {"weights": 40, "cache": 3}, {"activations": 7}, link_bytes=9)
    copied = Work(elementwise=2, hbm_write={"cache": 8})
    rows = [Row("mlp/up", "backward", None, up), Row("attention/cache", "forward", "layout", copied)]
    nobody = Work(hbm_read={"inputs": 1})
    bill = Bill({}, rows, nobody, [Unknown("%x", "no rule", 0)], up + copied + nobody)
    bill.memory = {"peak_bytes": 77}
    entry = budget.entry_of(bill)
    assert entry["costs"] == {
        **{"matmul FLOPs": 100, "other FLOPs": 8, "link bytes": 9, "peak memory bytes": 77},
        **{"HBM bytes: activations": 7, "HBM bytes: cache": 11, "HBM bytes: inputs": 1, "HBM bytes: weights": 40},
        **{"tax: layout, FLOPs": 2, "tax: layout, HBM bytes": 8, "instructions without a cost rule": 1},
    }
    assert entry["rows"] == {
        "mlp/up backward": [106, 50],
        "attention/cache, tax: layout": [2, 8],
        "unattributed": [0, 1],
    }


def test_a_cost_that_is_a_small_part_of_all_does_not_matter_alone():
    before = {"HBM bytes: weights": 1_000_000, "HBM bytes: constants": 4, "peak memory bytes": 4}
    assert budget.grown(before, before | {"HBM bytes: constants": 104}, 0.01) == {}  # 1 % of 1 % of all
    assert budget.grown(before, before | {"HBM bytes: constants": 105}, 0.01) == {"HBM bytes: constants": (4, 105)}
    assert budget.grown(before, before | {"peak memory bytes": 5}, 0.01) == {"peak memory bytes": (4, 5)}
    assert budget.grown(before, before | {"HBM bytes: constants": 5}, 0) == {"HBM bytes: constants": (4, 5)}


COSTS = st.dictionaries(st.sampled_from(["matmul FLOPs", "HBM bytes: cache", "link bytes"]), st.integers(1, 10**15))


@given(COSTS, COSTS, st.floats(0, 1))
def test_growth(before, now, tolerance):
    found = budget.grown(before, now, tolerance)
    assert budget.grown(before, before, tolerance) == {}
    assert all(was == before.get(name, 0) < now[name] == amount for name, (was, amount) in found.items())
    assert found.keys() <= budget.grown(before, now, 0).keys() == {n for n in now if now[n] > before.get(n, 0)}
    assert all(name in found for name in now if now[name] > 2.1 * before.get(name, 0) and before.get(name))


@pytest.mark.parametrize(
    "lines,found", [([], None), (["0.9", "0.10", "0.12"], "0.10"), (["0.12", "1.0"], "0.12"), (["0.2", "0.11"], "0.11")]
)
def test_release_lines_are_numbers(lines, found):
    assert budget.nearest(lines, "0.11") == found
