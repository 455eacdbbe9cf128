"""The report: what it says of findings made by hand, the page that it makes of them, its command on small models."""

import itertools
import json
import math
import re
from collections import Counter
from dataclasses import replace
from datetime import date
from html.parser import HTMLParser

import pytest
from browser import CHROMIUM, browser
from stepbill.experiments import published
from stepbill.experiments.drivers import sweep
from stepbill.experiments.drivers.context import CONTEXT
from stepbill.experiments.drivers.finding import Finding, Plot, PowerLaw, Quantity, Table
from stepbill.experiments.drivers.infrastructure import INFRASTRUCTURE
from stepbill.experiments.flags import UsageError
from stepbill.experiments.report import __main__ as command
from stepbill.experiments.report import chart, page, registry
from stepbill.experiments.report.chart import Chart
from stepbill.experiments.report.content import Figure, Report, Section
from stepbill.experiments.report.registry import Entry

HOSTILE = "</script></style><img src=x onerror=alert(1)>&amp;\"'"
MADE = date(2026, 11, 26)
MAKES = "stepbill --model=llama3-8b --step=decode --batch=8 --context=1024 --target=h200"


def price(name, said, **more):
    fact = {"name": name, "value": 3.5, "unit": "$/h", "status": "sourced", "source": "a list", "date": said}
    return fact | {"low": None, "high": None, "note": "", "default": None} | more


PLOT = Plot(
    "Time of a prompt",
    Quantity("context", "tokens"),
    Quantity("time", "s"),
    {"prompt": ((1000, 0.01), (100_000, 1.0)), "decode": ((1000, 0.001), (100_000, 0.1))},
)
TABLE = Table(
    "By context",
    (Quantity("context"), Quantity("time", "s"), Quantity("kind")),
    ((2048, 0.2, "b"), (1024, None, "a"), (4096, 0.1, "c")),
    (MAKES, None, "stepbill --other"),
)
FOUND = Finding(
    *("context", "What does a longer context cost?", "h200", "A long context costs more.", True, "It does, 12 times."),
    *("python -m stepbill.experiments.drivers.context --target=h200", (TABLE,), (PLOT,)),
    {"FLOPs": PowerLaw(1.98, 2.0, 0.999, 9)},
    (price("chip.dollars_per_hour.h200", "2026-11"), price("api.old.input", "2026-03-01")),
    ("at the roofline",),
    "200,000 tokens: 12 times",
    12.3,
)


def section(number=2, name="context", topic="the context", finding: Finding | None = FOUND, failure=""):
    return Section(Entry(number, name, topic), "What does it cost?", "python -m it", finding, failure)


def reported(*sections, figures=()):
    versions = {"python": "3.11", "stepbill": "0.1"}
    return Report("h200", "NVIDIA H200", MADE, "python -m the.report", sections, tuple(figures), versions)


# --- what it says --------------------------------------------------------------------------------------------------


def test_the_answer_names_the_largest_factors_and_counts_the_verdicts():
    factors = {"a": 3.14159, "b": 57.4, "c": None, "d": 12.3, "e": 1.0}
    verdicts = {"a": True, "b": True, "c": None, "d": False, "e": True}
    made = [
        section(n, name, f"topic {name}", replace(FOUND, factor=factor, holds=verdicts[name]))
        for n, (name, factor) in enumerate(factors.items(), 1)
    ]
    report = reported(*made)
    assert [one.entry.name for one in report.ranked] == ["b", "d", "a", "e"]
    why, counted = report.answer
    assert "topic b (up to 57×), topic d (up to 12×) and topic a (up to 3.1×), and 1 more factor below." in why
    assert counted == (
        "Of 5 claims about it, tested below on NVIDIA H200: 3 hold, 1 does not hold and 1 cannot be told."
    )


def test_without_any_finding_the_answer_says_so():
    report = reported(section(finding=None, failure="--mesh: it does not fit"))
    assert report.answer == ("On NVIDIA H200 nothing could be told: no driver has a finding.",)
    assert "--mesh: it does not fit" in page.html(report)
    assert command.text(report).count("--mesh: it does not fit") == 1


def test_prices_have_the_age_that_they_may_have_at_most():
    report = reported(section())
    assert [(one.name, one.days) for one in report.prices] == [
        ("api.old.input", (MADE - date(2026, 3, 1)).days),
        ("chip.dollars_per_hour.h200", 25),
    ]
    assert [one.name for one in report.stale] == ["api.old.input"]
    html = page.html(report)
    assert "the oldest is up to 270 days old" in html and "1 may be stale" in html
    year = price("api.of_a_year", "2026")
    ignored = [price("given", "", status="given"), price("then", "2020", status="history"), price("w", "1", unit="W")]
    report = reported(section(finding=replace(FOUND, assumptions=(year, *ignored))))
    assert [(one.name, one.days) for one in report.prices] == [("api.of_a_year", 329)]


def test_json_says_what_the_page_says():
    case = published.cases()[0]
    saved = json.loads(json.dumps(reported(section(), figures=[Figure(case, case.published * 1.5)]).to_json()))
    (one,) = saved["sections"]
    assert Finding.from_json(one["finding"]) == FOUND and one["verdict"] == "holds"
    assert saved["published"][0]["difference"] == pytest.approx(0.5) and saved["published"][0]["verdict"] == "DIFFERS"
    assert saved["prices"]["oldest"] == {"name": "api.old.input", "date": "2026-03-01", "days": 270}


def test_every_driver_of_the_registry_is_there_once_and_in_order():
    assert [entry.number for entry in registry.ENTRIES] == sorted(entry.number for entry in registry.ENTRIES)
    drivers = [entry.driver() for entry in registry.ENTRIES]
    assert len({one.name for one in drivers}) == len({one.question for one in drivers}) == len(registry.ENTRIES)


# --- the page ------------------------------------------------------------------------------------------------------


class Parsed(HTMLParser):
    """Elements as they open, with their attributes and what is around them; all text of each kind of element."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.stack, self.content = [], [], {}
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs), list(self.stack)))
        if tag not in ("meta", "link", "br"):
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs), list(self.stack)))

    def handle_endtag(self, tag):
        assert self.stack[-1] == tag, f"</{tag}> within {self.stack}"
        self.stack.pop()

    def handle_data(self, data):
        if self.stack:
            self.content[self.stack[-1]] = self.content.get(self.stack[-1], "") + data

    def of(self, tag):
        return [attributes for name, attributes, _ in self.elements if name == tag]


@pytest.fixture(scope="module")
def report():
    hostile = replace(
        FOUND,
        driver=HOSTILE,
        claim=HOSTILE,
        evidence=HOSTILE,
        command=HOSTILE,
        holds=False,
        tables=(Table(HOSTILE, (Quantity(HOSTILE, HOSTILE),), ((HOSTILE,),), (HOSTILE,)),),
        plots=(Plot(HOSTILE, Quantity(HOSTILE), Quantity(HOSTILE), {HOSTILE: ((1, 2.0),), "other": ()}),),
        fits={HOSTILE: PowerLaw(1, 1, 1, 2)},
        notes=(HOSTILE,),
        assumptions=(price(HOSTILE, "2026-11", source=HOSTILE, note=HOSTILE, status="given", default=1),),
        headline=HOSTILE,
        factor=2.0,
    )
    figures = [Figure(case, case.published * (1 + 1e-3 * n)) for n, case in enumerate(published.cases())]
    figures[-1] = replace(figures[-1], ours=None)
    return reported(
        section(),
        section(3, "cache", HOSTILE, hostile),
        section(4, "empty", "nothing", None, HOSTILE),
        section(
            5, "bare", "little", replace(FOUND, tables=(), plots=(), fits={}, notes=(), assumptions=(), factor=None)
        ),
        figures=figures,
    )


@pytest.fixture(scope="module")
def parsed(report):
    done = Parsed(page.html(report))
    assert not done.stack
    return done


def test_the_page_asks_for_nothing(parsed):
    for tag, attributes, _ in parsed.elements:
        for name in ("src", "href", "xlink:href", "action", "data", "srcset", "poster"):
            if name in attributes:
                assert re.fullmatch(r"#[\w-]+|data:,|report\.json", attributes[name]), (tag, attributes)
        assert not any(name.startswith("on") or name == "style" for name in attributes), (tag, attributes)
    assert "url(" not in parsed.content["style"] and "@import" not in parsed.content["style"]
    assert not re.search(r"fetch|XMLHttpRequest|import|http", parsed.content["script"])


def test_its_policy_lets_only_its_own_script_and_style_in(parsed):
    (policy,) = (one["content"] for one in parsed.of("meta") if "http-equiv" in one)
    assert policy.startswith("default-src 'none';")
    for kind in ("script", "style"):
        assert len(parsed.of(kind)) == 1
        assert f"{kind}-src '{page._hash(parsed.content[kind])}'" in policy
    assert "unsafe" not in policy


def test_what_comes_from_data_is_text(parsed, report):
    assert "<img" not in page.html(report)
    for tag in ("figcaption", "title", "desc", "code", "li", "p", "th", "text"):
        assert HOSTILE in parsed.content[tag], tag


def test_names_are_used_once_and_lead_somewhere(parsed):
    ids = Counter(attributes["id"] for _, attributes, _ in parsed.elements if "id" in attributes)
    assert set(ids.values()) == {1}
    for _, attributes, _ in parsed.elements:
        told = [attributes[name] for name in ("aria-labelledby", "popovertarget") if name in attributes]
        told += [attributes["href"][1:]] if attributes.get("href", "").startswith("#") else []
        assert set(" ".join(told).split()) <= set(ids), attributes


def test_headings_landmarks_tables_and_drawings_can_be_read_out(parsed):
    levels = [int(tag[1]) for tag, _, _ in parsed.elements if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    for landmark in ("header", "nav", "main", "footer"):
        assert parsed.of(landmark)
    assert parsed.of("html") == [{"lang": "en"}]
    assert all(one.get("scope") in ("col", "row") for one in parsed.of("th"))
    drawings = [one for one in parsed.of("svg") if one.get("role") == "img"]
    titles = [stack for tag, _, stack in parsed.elements if tag == "desc"]
    assert len(drawings) == len(titles) == 2
    assert all("aria-hidden" in one or one.get("role") == "img" for one in parsed.of("svg"))
    for tag, attributes, _ in parsed.elements:
        if attributes.get("class") == "scroll":  # by keyboard, too
            assert attributes["tabindex"] == "0" and attributes["role"] == "group", tag


def test_a_verdict_is_said_in_words_and_overridden_assumptions_are_marked(parsed, report):
    html = page.html(report)
    assert html.count("holds</span>") >= 2 and "does not hold</span>" in html and "no finding</span>" in html
    assert "<strong>given</strong> instead of 1" in html and ", of them 1 not the usual" in html


def test_rows_have_their_commands_a_click_away(report):
    html = page.html(report)
    assert f"<code>{MAKES}</code>" in html
    assert html.count("popovertarget=") == html.count(" popover ") == 2 + 1 + 0  # of the hostile table one, bare none
    assert "agrees</span>" in html and "differs</span>" in html and "not compiled</span>" in html


def _luminance(colour):
    parts = [int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5)]
    red, green, blue = (one / 12.92 if one <= 0.04045 else ((one + 0.055) / 1.055) ** 2.4 for one in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_contrast_is_enough_in_both_themes():
    """4.5 for text, 3 for what is drawn: WCAG 2.2, 1.4.3 and 1.4.11."""
    style = (page.HERE / "page.css").read_text()
    light, dark = (
        dict(re.findall(r"--([\w-]+): (#\w{6})", block)) for block in re.findall(r":root {(.*?)}", style, re.S)[:2]
    )
    for theme in (light, light | dark):
        for names, least, grounds in (
            (("ink", "soft", "accent", "no"), 4.5, ("paper", "raised")),
            (("ink",), 4.5, ("mark",)),
            ([f"c{n}" for n in range(1, chart.COLOURS + 1)], 3, ("paper",)),
        ):
            for name in names:
                for ground in grounds:
                    low, high = sorted((_luminance(theme[name]), _luminance(theme[ground])))
                    assert (high + 0.05) / (low + 0.05) >= least, (name, ground)


@pytest.mark.parametrize(
    ("value", "said"),
    [(1234.5678, "1,234.57"), (2.25e20, "2.25 × 10²⁰"), (5_576_000, "5,576,000"), (0.073, "0.073"), (765, "765")],
)
def test_numbers_have_six_digits(value, said):
    assert page.exact(value) == said


# --- plots ---------------------------------------------------------------------------------------------------------


def test_points_lie_where_their_logarithms_do():
    drawn = Chart.of(PLOT)
    prompt, decode = drawn.lines
    (x0, y0, words), (x1, y1, _) = prompt.points
    inner = chart.WIDTH - chart.LEFT - chart.RIGHT
    room = chart.ROOM / (1 + 2 * chart.ROOM)
    assert x0 == pytest.approx(chart.LEFT + room * inner, abs=0.06)
    assert x1 == pytest.approx(chart.WIDTH - chart.RIGHT - room * inner, abs=0.06)
    assert words == "prompt, 1.00 k, 10.0 ms" or "10.0 ms" in words
    assert y1 < y0 < decode.points[0][1]  # upwards on the page is less
    assert y0 - y1 == pytest.approx(2 / 3 * (decode.points[0][1] - y1), abs=0.2)  # two decades of three
    assert [tick.label for tick in drawn.x_ticks] == ["1 k", "10 k", "100 k"]
    assert [tick.label for tick in drawn.y_ticks] == ["1 ms", "10 ms", "100 ms", "1 s"]
    assert drawn.said.startswith("time [s] over context [tokens]. prompt: 10.0 ms at")
    assert len(drawn.rows) == 4 and len({line.mark for line in drawn.lines}) == 2


def test_an_axis_that_has_no_logarithm_is_even():
    plot = Plot("", Quantity("share", "%"), Quantity("number"), {"a": ((0, 5), (0.5, 10), (1, 5))})
    drawn = Chart.of(plot)
    first, middle, last = (x for x, _, _ in drawn.lines[0].points)
    assert middle - first == pytest.approx(last - middle, abs=0.11)
    assert [tick.label for tick in drawn.x_ticks] == ["0", "20%", "40%", "60%", "80%", "100%"]


@pytest.mark.parametrize("points", [(), ((1, 1),), ((3, 7), (3, 7)), ((0, 0.007), (1, 0.007))])
def test_few_points_are_drawn_too(points):
    drawn = Chart.of(Plot("", Quantity("x"), Quantity("y", "s"), {"a": points}, log_y=False))
    assert all(math.isfinite(x + y) for x, y, _ in drawn.lines[0].points)
    assert not any("-" in tick.label for tick in drawn.y_ticks)


def test_more_lines_than_colours_differ_by_dashes():
    lines = {f"line {n}": ((1.0, 1.0), (2.0, n + 1.0)) for n in range(chart.COLOURS + 2)}
    drawn = Chart.of(Plot("", Quantity("x"), Quantity("y"), lines)).lines
    assert len({(line.colour, line.dashed) for line in drawn}) == len(lines)


# --- the command ---------------------------------------------------------------------------------------------------

SMALL = {"model": "nano", "num_layers": 1, "width": 64, "heads": 4, "kv_heads": 2, "head_width": 16, "mlp_width": 64}


def small(driver, **more):
    """The driver with another model, and fewer steps, by default."""

    def define(to):
        driver.define(to)
        for name, value in (SMALL | more).items():
            to.values.set_default(name, value)

    return replace(driver, define=define)


def refusing(driver, where):
    def refuse(*_):
        raise UsageError(f"--mesh=tensor=1: {where}: it needs 8 chips")

    return replace(driver, **{"points": lambda _: [], where: refuse})


@pytest.fixture
def small_drivers(cache, monkeypatch):
    drivers = {
        "context": small(CONTEXT, contexts="256,1024", mesh=""),
        "batching": refusing(CONTEXT, "points"),
        "cache": refusing(CONTEXT, "find"),
        "infrastructure": small(INFRASTRUCTURE, batch=4, context=256, mesh=""),
    }
    monkeypatch.setattr(registry, "ENTRIES", tuple(one for one in registry.ENTRIES if one.name in drivers))
    monkeypatch.setattr(Entry, "driver", lambda self: drivers[self.name])


def test_small_drivers_in_one_sweep_and_again_without_compiling(small_drivers, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    given = "--assume=power.pue=1.5"
    only = "--only=infrastructure,context,cache,batching"
    assert command.main([f"--out={out}", "--target=h200", only, given, "--format=json"]) == 0
    printed = capsys.readouterr().out
    assert printed == (out / "report.json").read_text()
    saved = json.loads(printed)
    by_name = {one["name"]: one for one in saved["sections"]}
    assert list(by_name) == ["context", "cache", "batching", "infrastructure"]
    assert by_name["batching"]["failure"] == "--mesh=tensor=1: points: it needs 8 chips"
    assert by_name["cache"]["failure"] == "--mesh=tensor=1: find: it needs 8 chips"
    assert by_name["cache"]["verdict"] == "no finding" and by_name["cache"]["finding"] is None
    found = Finding.from_json(by_name["infrastructure"]["finding"])
    (pue,) = (one for one in found.assumptions if one["name"] == "power.pue")
    assert (pue["value"], pue["status"]) == (1.5, "given") and given in found.command
    assert saved["command"].endswith(f"{only} --target=h200 {given}") and not saved["published"]
    before = (out / "index.html").read_text()
    assert len(Parsed(before).of("section")) == 4 + 1  # the prices, too

    monkeypatch.setattr(sweep, "_compiled", None)
    board = tmp_path / "board"
    assert command.main([f"--out={out}", f"--logdir={board}", "--target=h200", only, given]) == 0
    assert sorted(path.name for path in board.iterdir()) == ["context_h200", "infrastructure_h200"]
    assert (out / "index.html").read_text() == before
    table = capsys.readouterr().out
    assert "cannot be told" in table or "hold" in table
    assert str(out / "index.html") in table and "--mesh=tensor=1: find: it needs 8 chips" in table


def test_published_figures_are_beside_ours(small_drivers, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command, "_can_compile", lambda _: False)
    assert command.main([f"--out={tmp_path}", "--only=published", "--format=json"]) == 0
    saved = json.loads(capsys.readouterr().out)
    verdicts = Counter(one["verdict"] for one in saved["published"])
    assert verdicts == {"agrees": len(published.cases()) - 3, "not compiled": 2, "differs, explained": 1}
    assert saved["sections"] == []


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "--out: it must be given"),
        (["--out={}", "--only=context,none"], "--only=context,none: there is no 'none'; there are model_size, context"),
        (["--out={}", "--target=h2000"], "--target=h2000: it must be one of"),
        (["--out={}/file"], "cannot write there"),
        (["--out={}", "--assume=power.pue=-1"], "--assume=power.pue=-1: it must be a number of at least 1"),
        (["--out={}", "--jobs=0"], "--jobs"),
    ],
)
def test_wrong_flags_end_in_one_line_and_status_2(capsys, tmp_path, argv, said):
    (tmp_path / "file").write_text("")
    assert command.main([one.format(tmp_path) for one in argv]) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("stepbill: ") and said in err and err.count("\n") == 1


# --- in a browser --------------------------------------------------------------------------------------------------


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (360, True)])
def test_in_a_browser(report, tmp_path, width, dark):
    (tmp_path / "index.html").write_text(page.html(report))
    with browser(tmp_path / "profile") as tab:
        tab.open(tmp_path / "index.html", width, dark=dark)
        assert tab.run("document.documentElement.scrollWidth") <= tab.run("innerWidth") == width
        paper = "rgb(23, 24, 26)" if dark else "rgb(252, 251, 248)"
        assert tab.run("getComputedStyle(document.body).backgroundColor") == paper

        table = "document.querySelector('#context table.sortable')"
        rows = f"Array.from({table}.tBodies[0].rows, row => row.cells[0].innerText)"
        state = f"{table}.querySelector('th').getAttribute('aria-sort')"
        assert tab.run(rows) == ["2,048", "1,024", "4,096"] and tab.run(state) is None
        tab.run(f"{table}.querySelector('th button').click()")
        assert tab.run(rows) == ["1,024", "2,048", "4,096"] and tab.run(state) == "ascending"
        tab.run(f"{table}.querySelector('th button').focus()")
        tab.press("Enter", 13, "\r")
        assert tab.run(rows) == ["4,096", "2,048", "1,024"] and tab.run(state) == "descending"
        tab.run(f"{table}.querySelectorAll('th button')[1].click()")
        assert tab.run(rows) == ["4,096", "2,048", "1,024"] and tab.run(state) is None  # 0.1 s, 0.2 s, not known

        shown = (
            "document.querySelector('#context [popover]:popover-open')?.innerText.includes('--step=decode') ?? false"
        )
        assert tab.run(shown) is False
        tab.run("[...document.querySelectorAll('#context [popovertarget]')].at(1).click()")
        assert tab.run(shown) is True
        tab.press("Escape", 27)
        assert tab.run(shown) is False

        tab.press("Tab", 9)
        assert tab.requests == [(tmp_path / "index.html").as_uri()]
        assert tab.complaints == []
