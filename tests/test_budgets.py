"""What our own steps cost, held to what is recorded: `pytest --budget-update tests/test_budgets.py` records it anew."""

import capture
import pytest
from compiled import ready
from stepbill.experiments import bill, steps
from stepbill.profiling import targets


@pytest.mark.parametrize("step", capture.SIZES)
@pytest.mark.parametrize("target", ["h200", "v5e"])
def test_cost_of_a_step(cost_budget, step, target):
    ready(target)
    batch, context = capture.SIZES[step]
    built = steps.build(capture.config(step), step, batch=batch, context=context, mesh=targets.mesh(target, {}))
    options = built.compiler_options(targets.chip(target).platform)
    compilation = targets.compile(built.lower(), target, options=options)
    cost_budget(bill.bill_of(built, compilation, target), target=target)
