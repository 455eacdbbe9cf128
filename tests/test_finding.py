"""What a driver of cost ends in: data that is printed, drawn and read back."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from stepbill.experiments.drivers.finding import Finding, Plot, PowerLaw, Quantity, Table, cell, power_law, show

COLUMNS = (Quantity("context"), Quantity("cache", "B"), Quantity("time", "s"), Quantity("who"))
FOUND = Finding(
    "context",
    "What does a longer context cost?",
    "h200",
    "The cache grows in proportion to the context.",
    True,
    "exponent 1.000",
    "python -m stepbill.experiments.drivers.context",
    (Table("cache", COLUMNS, ((1024, 134_217_728, 1.5e-3, "llama"), (2048, 268_435_456, None, "<llama>"))),),
    (Plot("cache", COLUMNS[0], COLUMNS[1], {"llama": ((1024, 1.3e8), (2048, 2.6e8))}),),
    {"cache": PowerLaw(1.0, 131072.0, 1.0, 2)},
    ({"name": "price.h200", "value": 3.5, "unit": "$/h", "source": "a list", "date": "2026-11-01"},),
    ("a note",),
)


def test_it_survives_json():
    assert Finding.from_json(json.loads(json.dumps(FOUND.to_json()))) == FOUND


def test_the_table_says_all_of_it(capsys):
    show(FOUND, "table")
    out = capsys.readouterr().out
    for said in (
        FOUND.question,
        FOUND.claim,
        "It holds.",
        "134 M",
        "1.50 ms",
        "<llama>",
        "R² 1.0000",
        "price.h200 = 3.5",
    ):
        assert said in out
    show(FOUND, "json")
    assert json.loads(capsys.readouterr().out)["schema"] == 1


@pytest.mark.parametrize(
    ("value", "unit", "said"),
    [
        (None, "B", "-"),
        (1.5e9, "B", "1.50 G"),
        (0.25, "%", "25.0%"),
        (2, "x", "2.00"),
        (12_000, "", "12,000"),
        ("a", "s", "a"),
    ],
)
def test_cells_are_in_their_units(value, unit, said):
    assert cell(value, unit) == said


def test_a_row_that_lacks_a_column_is_refused():
    with pytest.raises(ValueError, match="has 4 columns, and a row of 1"):
        Table("cache", COLUMNS, ((1,),))


@given(st.floats(-3, 3), st.floats(1e-3, 1e3), st.lists(st.integers(1, 10**6), min_size=2, max_size=8, unique=True))
def test_a_power_law_is_found(exponent, factor, xs):
    law = power_law([(x, factor * x**exponent) for x in xs])
    assert law.exponent == pytest.approx(exponent, abs=1e-6)
    assert law.factor == pytest.approx(factor, rel=1e-4)
    assert law.r_squared == pytest.approx(1, abs=1e-6) or abs(exponent) < 1e-6


def test_what_is_no_power_law_explains_less():
    assert power_law([(1, 1), (2, 8), (3, 1), (4, 8)]).r_squared < 0.6


@pytest.mark.parametrize("points", [[(1, 1)], [(1, 1), (1, 2)], [(1, 0), (2, 1)]])
def test_points_that_no_law_goes_through_are_refused(points):
    with pytest.raises(ValueError, match="positive ones at two x"):
        power_law(points)
