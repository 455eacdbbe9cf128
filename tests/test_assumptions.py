"""The facts that results rest on: every one has its unit and source, may be replaced, and is told when it was used."""

import json
import re
from datetime import date

import pytest
from stepbill.experiments import assumptions as command
from stepbill.experiments import flags
from stepbill.profiling import chips, media
from stepbill.profiling.assumptions import (
    ASSUMED,
    GIVEN,
    HISTORY,
    SOURCED,
    ApiPrice,
    Scenario,
    TrainingRun,
    load,
)

ALL = load().entries


@pytest.mark.parametrize("table", sorted({entry.path[0] for entry in ALL.values()}))
def test_every_fact_is_complete(table):
    for entry in (entry for entry in ALL.values() if entry.path[0] == table):
        assert re.fullmatch(r"[\w.-]+", entry.name) and entry.unit, entry
        assert entry.status in (SOURCED, ASSUMED, HISTORY), entry
        assert bool(entry.source) == (entry.status != ASSUMED), f"sourced, or assumed, and never both: {entry}"
        if entry.date:
            assert date.fromisoformat(entry.date + "2026-01-01"[len(entry.date) :]) > date(2017, 6, 12), entry
        if entry.low is not None or entry.high is not None:
            assert entry.low <= entry.value <= entry.high, entry
        assert entry.instead(entry.value).value == entry.value, f"not within its own bounds: {entry}"
        assert entry.status != SOURCED or not entry.unit.startswith("$") or entry.date, (
            f"a price without a date: {entry}"
        )


def test_what_a_table_says_holds_below_it_but_no_source_is_lent_to_an_assumption():
    assert ALL["api.gpt-4.1.cached"].unit == "$/M tokens" and "genai-prices" in ALL["api.gpt-4.1.cached"].source
    assert ALL["api.gpt-5.5.long_from"].unit == "tokens"
    assert ALL["chip.watts.v5e"].status == ASSUMED and not ALL["chip.watts.v5e"].source
    assert ALL["failure.interruptions"].status == HISTORY
    assert ALL["failure.restart_seconds"].status == ASSUMED and not ALL["failure.restart_seconds"].source


def test_used_is_exactly_what_was_asked_for():
    facts = load()
    assert facts.used == () and facts.oldest_price is None
    facts.number("power.pue")
    facts.record(Scenario, "scenario.chat-support")
    assert {entry.name for entry in facts.used} == {
        "power.pue",
        *(f"scenario.chat-support.{name}" for name in facts.members("scenario.chat-support")),
    }
    assert load().used == ()


def test_the_oldest_price_is_of_those_that_were_used_and_age():
    facts = load({"capital.network": 1})
    facts.number("day.dollars_per_hour")  # of the past
    facts.number("capital.network")  # given, no longer looked up
    facts.number("power.pue")  # no price
    assert facts.oldest_price is None
    facts.number("api.gpt-4o.input")
    facts.number("capital.host")
    facts.number("chip.dollars_per_hour.h200")
    assert facts.oldest_price == ALL["capital.host"]


def test_another_value():
    facts = load({"power.pue": "1.1", "redundancy.regions": 2.0})
    entry = facts.entry("power.pue")
    assert (entry.value, entry.default, entry.status, entry.source) == (1.1, ALL["power.pue"].value, GIVEN, "")
    assert facts.whole("redundancy.regions") == 2 and isinstance(facts.entry("redundancy.regions").value, int)
    assert load().number("power.pue") == ALL["power.pue"].value


@pytest.mark.parametrize(
    "name,value,message",
    [
        ("power.pu", 1, r"there is no assumption 'power\.pu'; did you mean power\.pue\?"),
        ("nonsense", 1, r"there is no assumption 'nonsense'$"),
        ("chip.dollars_per_hour.h200", -1, r"h200 is -1; it must be a number of at least 0 \(\$/h\)"),
        ("power.pue", 0.9, r"power\.pue is 0\.9; it must be a number of at least 1 \(ratio\)"),
        ("power.load", 1.5, r"it must be a number from 0 to 1 \(share\)"),
        ("business.margin", 1, r"it must be a number from 0 to 0\.99 \(share\)"),
        ("redundancy.regions", 1.5, r"it must be a whole number of at least 1 \(regions\)"),
        ("power.pue", "much", r"power\.pue is much; it must be a number"),
        ("power.pue", float("nan"), r"it must be a number"),
        ("media.image.gemma3.rule", "tiles", r"it must stay square"),
    ],
)
def test_wrong_values(name, value, message):
    with pytest.raises(ValueError, match=message):
        load({name: value})


def test_types_are_kept():
    facts = load()
    assert facts.text("media.image.gemma3.rule") == "square"
    with pytest.raises(TypeError, match=r"power\.pue is .*, not int"):
        facts.whole("power.pue")
    with pytest.raises(TypeError, match=r"rule is 'square', not int or float"):
        facts.number("media.image.gemma3.rule")


def test_nothing_can_be_changed_in_place():
    with pytest.raises(AttributeError):
        ALL["power.pue"].value = 1.0
    with pytest.raises(AttributeError):
        load().entries = {}


# --- facts that belong together ------------------------------------------------------------------------------------


def test_every_scenario_price_and_run_makes_its_record():
    facts = load()
    asked = {"long-context-summarization", "coding-agent", "chat-support", "realtime-voice"}
    assert set(facts.members("scenario")) == asked
    for table, kind in (("scenario", Scenario), ("api", ApiPrice), ("run", TrainingRun)):
        for name in facts.members(table):
            facts.record(kind, f"{table}.{name}")
    known = {name for name in ALL if name.split(".")[0] in ("scenario", "api")}
    assert known == {entry.name for entry in facts.used} - {name for name in ALL if name.startswith("run.")}
    with pytest.raises(ValueError, match=r"there is no table of assumptions 'scenario\.chess'"):
        facts.record(Scenario, "scenario.chess")


def test_a_scenario_cannot_have_more_in_its_cache_than_in_its_prompt():
    facts = load({"scenario.chat-support.input_tokens": 100})
    with pytest.raises(ValueError, match="cached_tokens is 1500; it must be at most input_tokens, 100"):
        facts.record(Scenario, "scenario.chat-support")


def test_a_long_prompt_is_dearer_all_of_it():
    price = load().record(ApiPrice, "api.gemini-2.5-pro")
    assert price.dollars(8_000, 1_000) == pytest.approx(8_000 * 1.25e-6 + 1_000 * 10e-6)
    assert price.dollars(200_000, 0) == pytest.approx(0.25)
    assert price.dollars(200_001, 1_000, cached_tokens=100_001) == pytest.approx(0.25 + 0.02500025 + 0.015)
    with pytest.raises(ValueError, match="cached_tokens is 3; it must be at most input_tokens, 2"):
        price.dollars(2, 0, cached_tokens=3)


def test_long_prices_are_dearer_and_cached_ones_cheaper():
    facts = load()
    for name in facts.members("api"):
        price = facts.record(ApiPrice, f"api.{name}")
        assert price.cached < price.input < price.output
        assert price.long_from is None or (price.long_input > price.input and price.long_output > price.output)


def test_the_parts_of_published_runs_make_their_whole():
    facts = load()
    parts = ("pre_training", "context_extension", "post_training")
    hours = sum(facts.number(f"run.deepseek-v3.{part}") for part in parts)
    assert hours == facts.number("run.deepseek-v3.chip_hours")
    tokens = facts.whole("day.uncached_tokens") + facts.whole("day.cached_tokens")
    assert facts.whole("day.cached_tokens") / tokens == pytest.approx(0.563, abs=5e-4)  # as it says itself


# --- chips and media read them -----------------------------------------------------------------------------------


def test_chips_have_their_price_and_power_from_here():
    h200 = chips.chip("h200")
    entry = ALL["chip.dollars_per_hour.h200"]
    assert (h200.dollars_per_hour, h200.dollars_range) == (entry.value, (entry.low, entry.high))
    assert h200.watts == ALL["chip.watts.h200"].value and entry.date in h200.sources
    assert chips.chip("v5e").watts is None, "assumed: unknown to whoever asks the chip"
    assert {name.split(".")[-1] for name in ALL if name.startswith("chip.")} == set(chips.CHIPS) - {"host"}


def test_another_price_of_a_chip():
    facts = load({"chip.dollars_per_hour.h200": 2, "chip.watts.v5e": 220})
    h200, v5e = (chips.priced(chips.chip(name), facts) for name in ("h200", "v5e"))
    assert h200.dollars_per_hour == 2 and "Price: given" in h200.sources
    assert v5e.watts == 220 and v5e.dollars_range is None
    assert chips.chip("h200").dollars_per_hour == ALL["chip.dollars_per_hour.h200"].value


@pytest.mark.parametrize(
    "vendor,width,height,tokens",
    [
        ("gpt-4o", 1024, 1024, 765),
        ("gpt-4o-mini", 1024, 1024, 2833 + 4 * 5667),
        ("gemma3", 1, 9999, 256),
        ("vit-l16", 640, 480, 196),
        ("llava-1.5", 640, 480, 576),
        ("claude", 1092, 1092, 1590),  # in a table of the page that has the rule
        ("claude", 4000, 3000, 1600),
        ("claude", 200, 200, 54),
        ("gemini", 384, 384, 258),
        ("gemini", 385, 384, 258),
        ("gemini", 769, 768, 516),
        ("qwen2-vl", 1204, 1120, 43 * 40),
        ("qwen2-vl", 8204, 1092, 293 * 39),
        ("qwen2-vl", 28, 28, 4),  # made larger
        ("qwen2-vl", 8000, 8000, 128 * 128),  # made smaller
    ],
)
def test_images_of_every_vendor(vendor, width, height, tokens):
    assert media.image_tokens(vendor, width, height) == tokens
    assert vendor in load().members("media.image")


def test_sounds_and_films():
    assert [media.audio_tokens("whisper", seconds) for seconds in (1, 30, 30.1)] == [1500, 1500, 3000]
    assert media.audio_tokens("voxtral", 30) == 375  # 12.5 a second
    assert [media.rated_tokens(kind, 60) for kind in ("gemini-audio", "gemini-video")] == [1920, 15_780]
    assert media.rated_tokens("gemini-video", 10, load({"media.rate.gemini-video": 100})) == 1000


# --- the command and its flag ------------------------------------------------------------------------------------


def test_json_has_all_of_it(capsys):
    assert command.main(["--format=json", "--assume=power.pue=1.1"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert [entry["name"] for entry in said["assumptions"]] == list(ALL)
    assert said["oldest_price"] == {"name": "capital.host", "date": "2023-05"}
    (pue,) = (entry for entry in said["assumptions"] if entry["name"] == "power.pue")
    assert (pue["value"], pue["default"], pue["status"]) == (1.1, ALL["power.pue"].value, GIVEN)


def test_the_table_names_each_source_once(capsys):
    assert command.main(["--only=power", "--assume=power.pue=1.1", "--assume=power.load=1"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^power\.pue +1\.1 +ratio +1\.09 to 1\.56 +given, instead of 1\.25 +- +-$", out, re.M)
    assert out.count("EIA, Electric Power Monthly") == 1 and "chip." not in out
    assert out.endswith("oldest price: power.dollars_per_kilowatt_hour, 2025-06-25\n")


@pytest.mark.parametrize(
    "argument,message",
    [
        ("--assume=power.pu=2", "--assume=power.pu=2: there is no assumption 'power.pu'; did you mean power.pue?"),
        ("--assume=power.pue", "--assume=power.pue: it must be NAME=VALUE, such as power.pue=1.1"),
        (
            "--assume=api.gpt-4o.input=-2",
            "--assume=api.gpt-4o.input=-2: it must be a number of at least 0 ($/M tokens)",
        ),
        ("--assume=power.pue=high", "--assume=power.pue=high: it must be a number of at least 1 (ratio)"),
    ],
)
def test_wrong_flags(argument, message, capsys):
    assert command.main([argument]) == 2
    assert capsys.readouterr() == ("", f"stepbill: {message}\n")


def test_no_such_table(capsys):
    assert command.main(["--only=powder"]) == 2
    assert "--only=powder: there is no such table; the first parts are api, business," in capsys.readouterr().err


def test_any_command_can_take_the_flag():
    def define(values):
        command.define_assume(flags.Definer(values))

    values = flags.parse(["--assume=power.pue=1.1", "--assume=power.pue=1.2"], define)
    assert command.facts(values).number("power.pue") == 1.2
    assert command.facts(flags.parse([], define)).number("power.pue") == ALL["power.pue"].value
    assert command.text((), None) == "no assumption was used\n"
