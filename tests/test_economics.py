"""From an hour of a chip to the price of a token, and from FLOPs to a training bill: lines that add up, by hand."""

import pytest
from stepbill.experiments.published import FACTS
from stepbill.profiling import chips, economics
from stepbill.profiling.assumptions import TrainingRun, load

# Round numbers, so that every line can be done by hand.
PLAIN = {
    **{"capital.chip.h200": 8766, "capital.host": 876.6, "capital.network": 438.3, "capital.years": 1},
    **{"capital.interest": 0, "capital.facility_dollars_per_kilowatt_month": 73.05},
    **{"chip.watts.h200": 700, "power.host_watts": 300, "power.load": 0.5, "power.pue": 1.2},
    **{"power.dollars_per_kilowatt_hour": 0.1, "chip.dollars_per_hour.h200": 3},
    **{"redundancy.utilisation": 0.5, "redundancy.spared_units": 4, "redundancy.regions": 3},
    **{"business.engineering": 0.1, "business.margin": 0.75},
}


def dollars(itemised):
    return {item.name: item.dollars for item in itemised.items}


def test_an_hour_of_an_owned_chip_line_by_line():
    lines = dollars(economics.built_up("h200", 1, load(PLAIN)))
    raw = {"chip": 1.0, "host": 0.1, "network": 0.05, "building": 0.1, "power": 0.06}
    assert lines == pytest.approx(
        # 1.31 raw; as much again idle; a quarter to spare; a half for a region lost; a tenth; three quarters of it all
        {**raw, "idle": 1.31, "spare": 0.655, "regions": 1.6375, "engineering": 0.49125, "margin": 3 * 5.40375}
    )


def test_a_rented_chip_has_its_host_and_power_in_its_price():
    facts = load(PLAIN)
    lines = dollars(economics.built_up("h200", 2, facts, rent=True))
    assert lines["rent"] == 6 and lines["idle"] == 6 and "power" not in lines
    assert {entry.name for entry in facts.used} >= {"chip.dollars_per_hour.h200", "business.margin"}
    assert not any(entry.name.startswith(("capital.", "power.")) for entry in facts.used)


@pytest.mark.parametrize("rent", [False, True])
@pytest.mark.parametrize("chip", sorted(set(chips.CHIPS) - {"host"}))
def test_the_lines_of_every_chip_add_up_exactly(chip, rent):
    facts = load()
    prices = economics.per_million_tokens(chip, {"input": 1e-5 / 3, "cached": 1e-7, "output": 1e-3 / 7}, facts, rent)
    for whole in prices.values():
        assert whole.picodollars == sum(item.picodollars for item in whole.items)
        assert all(isinstance(item.picodollars, int) and item.picodollars > 0 and item.how for item in whole.items)
        assert whole["margin"].dollars / whole.dollars == pytest.approx(facts.number("business.margin"), abs=1e-9)
    assert prices["output"].dollars / prices["input"].dollars == pytest.approx(300 / 7, abs=1e-6)


def test_nothing_idle_nothing_spare_no_profit():
    free = {"redundancy.utilisation": 1, "redundancy.regions": 1, "business.engineering": 0, "business.margin": 0}
    facts = load({**PLAIN, **free, "redundancy.spared_units": 10**9})
    whole = economics.built_up("h200", 1, facts)
    assert whole.dollars == pytest.approx(economics.running("h200", 1, facts).dollars)
    assert whole["regions"].picodollars == whole["margin"].picodollars == 0


@pytest.mark.parametrize(
    "name,value",
    [
        ("capital.chip.h200", 20_000),
        ("capital.years", 0.5),
        ("capital.interest", 0.2),
        ("power.pue", 1.5),
        ("power.load", 1),
        ("power.dollars_per_kilowatt_hour", 0.2),
        ("redundancy.utilisation", 0.25),
        ("redundancy.spared_units", 2),
        ("redundancy.regions", 2),
        ("business.engineering", 0.5),
        ("business.margin", 0.9),
    ],
)
def test_every_assumption_matters(name, value):
    before, after = (economics.built_up("h200", 1, load({**PLAIN, **given})) for given in ({}, {name: value}))
    assert after.dollars > before.dollars * 1.001


def test_an_annuity_pays_back_what_was_lent():
    a_year = economics.amortised(1000, 3, 0.1) * economics.HOURS_PER_YEAR
    owed = 1000.0
    for _ in range(3):
        owed = owed * 1.1 - a_year
    assert owed == pytest.approx(0, abs=1e-9)
    assert economics.amortised(1000, 3, 1e-9) == pytest.approx(economics.amortised(1000, 3, 0))


def test_a_chip_without_a_price():
    with pytest.raises(ValueError, match="target is host; it must be one with a price: a100, h100, "):
        economics.built_up("host", 1, load(), rent=True)


# --- training ------------------------------------------------------------------------------------------------------


def test_a_training_run_line_by_line():
    # 3.6e18 FLOPs at half of 1e12 a second: 2000 chip-hours; 200 chips, of which one fails each 10 hours.
    given = {"training.mfu": 0.5, "training.experiments": 0.5, "training.evaluation": 0.1}
    given |= {"training.data_dollars_per_trillion_tokens": 1000, "failure.checkpoint_seconds": 180}
    given |= {"failure.restart_seconds": 360, "failure.interruptions": 24, "failure.days": 10, "failure.chips": 200}
    run = economics.training(3.6e18, 2e12, 200, 1e12, 2.0, load(given))
    assert (run.chip_hours, run.failure_hours, run.interval_seconds) == pytest.approx((2000, 10, 3600))
    assert dollars(run.cost) == pytest.approx(
        {
            **{"training": 4000, "checkpoints": 4000 / 20, "lost work": 4000 / 20, "restarts": 4000 / 100},
            **{"experiments": 2000, "evaluation": 400, "data": 2000},
        }
    )
    assert run.wall_hours == pytest.approx(10 * 1.11)
    assert run.cost.picodollars == sum(item.picodollars for item in run.cost.items)


def test_twice_the_chips_fail_twice_as_often():
    facts = load()
    assert economics.failure_hours(16_384, facts) == pytest.approx(54 * 24 / 419)
    assert economics.failure_hours(32_768, facts) == pytest.approx(54 * 24 / 419 / 2)


def test_too_many_chips_to_get_anything_done():
    with pytest.raises(ValueError, match=r"chips is 100000000; it must be less: one fails each 1\.82 s, and no work"):
        economics.training(1e25, 1e13, 10**8, 989e12, 2.0, load())


@pytest.mark.parametrize(
    "name,low,high",
    [
        ("llama3-405b", 0.33, 0.43),  # 38 to 43 % it says of its steps; the hours of its model card are of all stages
        ("deepseek-v3", 0.30, 0.36),  # of the bfloat16 peak, which fp8 doubles
        ("llama1-65b", 0.45, 0.50),
        ("llama1-33b", 0.45, 0.50),
        ("llama1-13b", 0.50, 0.53),
        ("llama1-7b", 0.42, 0.45),
    ],
)
def test_published_hours_are_flops_at_a_plausible_utilisation(name, low, high):
    run = FACTS.record(TrainingRun, f"run.{name}")
    peak = chips.chip("h100" if run.chip == "h800" else run.chip).peak_flops["bf16"]
    flops = 6 * run.parameters * run.tokens
    assert low < (found := economics.mfu(flops, peak, run.hours)) < high
    assert economics.chip_hours(flops, peak, found) == pytest.approx(run.hours)


# --- tokens that are guessed ---------------------------------------------------------------------------------------


def test_tokens_of_a_check():
    assert economics.tokens_per_check(0.5, 3) == 1 + 0.5 + 0.25 + 0.125
    assert economics.tokens_per_check(0.8, 5) == pytest.approx((1 - 0.8**6) / (1 - 0.8))
    assert economics.tokens_per_check(1, 4) == 5 and economics.tokens_per_check(0, 4) == 1
    assert economics.speculative_speedup(0.5, 1, 0.25) == 1.5 / 1.25
    # DeepSeek guesses one token, and says that it decodes 1.8 times as fast: as many tokens a step, less the guessing.
    assert 1.8 < economics.tokens_per_check(load().number("speculation.accepted_deepseek_mtp"), 1) < 1.9
