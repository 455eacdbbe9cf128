"""The report as one page that needs nothing else: its style, its drawings and its little script are in it.

Whatever comes from data is escaped, and the page's own policy forbids any script but its own and any request.
"""

import base64
import hashlib
import itertools
import math
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from . import chart
from .chart import Chart
from .content import STALE_DAYS, Report, times

HERE = Path(__file__).parent
RAISED = str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻")
BAR = 100.0  # the length of the longest bar


def html(report: Report) -> str:
    """The whole page."""
    style, script = ((HERE / name).read_text().strip() for name in ("page.css", "page.js"))
    pages = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    numbers = itertools.count(1)
    filters = {"cell": chart.words, "chart": Chart.of, "times": times, "exact": exact}
    pages.filters |= filters | {"bar": lambda factor: _bar(factor, report)}
    pages.globals |= {"new_id": lambda: f"n{next(numbers)}", "sheet": chart, "stale_days": STALE_DAYS}
    return (
        pages.get_template("page.html")
        .render(report=report, style=Markup(style), script=Markup(script), policy=_policy(style, script))
        .lstrip()
    )


def exact(value: float) -> str:
    """Six digits: 1,234.57; from a million on as 1.234 × 10⁶, if that is shorter than the whole number."""
    if abs(value) < 1e6 or (float(value).is_integer() and abs(value) < 1e12 and float(f"{value:.6g}") == value):
        return f"{value:,.6g}" if abs(value) < 1e6 else f"{value:,.0f}"
    digits, _, power = f"{value:.5e}".partition("e")
    return f"{digits.rstrip('0').rstrip('.')} × 10{str(int(power)).translate(RAISED)}"


def _policy(style: str, script: str) -> str:
    """Of the page's content: this style, this script, and nothing from anywhere."""
    return (
        f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _bar(factor: float, report: Report) -> float:
    """How long its bar is: in proportion to its logarithm, that of the largest is BAR."""
    largest = max((section.factor or 1.0 for section in report.sections), default=1.0)
    return round(BAR * math.log(max(factor, 1.0)) / math.log(largest), 1) if largest > 1 else 0.0
