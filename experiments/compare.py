"""`stepbill --compare="weights=bf16;weights=int8"`: several bills from one process, side by side."""

import json
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from ..profiling import render, targets
from ..profiling.bill import Bill
from ..profiling.compare import Comparison
from . import flags
from .bill import bill_step
from .flags import Request, UsageError

SEPARATOR = ";"
OF_ALL = ("compare", "format", "logdir", "list", "version", "help")  # what is no flag of one variant
WANTED = 'two or more variants with ; between, such as "weights=bf16;weights=int8", "a.json;b.json" or "a.hlo;b.hlo"'


def compare(argv: Sequence[str], text: str, say: Callable[[str], None] = lambda _: None) -> Comparison:
    """The bills of the variants in `text`, each with the flags of `argv` besides; UsageError.

    A variant is flags as on the command line (a space between them, with `--` or without), which win over those of
    `argv`; or the path of a saved bill (JSON) or of a dump of an HLO module.
    """
    variants = [variant.strip() for variant in text.split(SEPARATOR)]
    if len(variants) < 2 or not all(variants):
        raise UsageError(f"--compare={text}: it must be {WANTED}")
    if twice := next((variant for variant in variants if variants.count(variant) > 1), None):
        raise UsageError(f"--compare={text}: {twice} is given twice")
    wanted: dict[str, Request | Bill] = {}
    for variant in variants:
        with _within(variant):
            wanted[variant] = _wanted(argv, variant)
    requests = [one for one in wanted.values() if isinstance(one, Request)]
    if not requests and (alien := sorted(flags.given_flags(flags.parse(argv)).keys() - {"format"})):
        raise UsageError(f"--{alien[0]}: it cannot be given with --compare of saved bills alone")
    _start_host(requests)
    files = {variant: Path(variant).name for variant, one in wanted.items() if not isinstance(one, Request) or one.hlo}
    short = len(set(files.values())) == len(files)
    bills = {}
    for variant, one in wanted.items():
        if isinstance(one, Request):
            with _within(variant):
                one = bill_step(one, lambda what, variant=variant: say(f"{variant}: {what}"))
        bills[files.get(variant, variant) if short else variant] = one
    return Comparison(bills)


@contextmanager
def _within(variant: str) -> Iterator[None]:
    """What is wrong inside is said to be wrong of this variant."""
    try:
        yield
    except UsageError as error:
        raise UsageError(f"--compare={variant}: {error}") from None


def _wanted(argv: Sequence[str], variant: str) -> Request | Bill:
    """What a variant asks for, or the bill that it is already."""
    if "=" in variant and not Path(variant).exists():
        return flags.request(flags.parse([*argv, *_flags(variant)]))
    try:
        saved = False
        if not Path(variant).is_dir():  # as XLA dumps to
            with Path(variant).open("rb") as file:
                saved = file.read(64).lstrip().startswith(b"{")
    except OSError as error:
        raise UsageError(f"cannot read it: {(error.strerror or str(error)).lower()}") from None
    return _saved(Path(variant)) if saved else flags.request(flags.parse([*argv, f"--hlo={variant}"]))


def _flags(variant: str) -> list[str]:
    """`weights=int8 batch=4` as on the command line."""
    try:
        words = ["--" + word.lstrip("-") for word in shlex.split(variant)]
    except ValueError as error:
        raise UsageError(str(error).lower()) from None
    for word in words:
        flag, equals, _ = word.partition("=")
        if not equals or flag[2:] in OF_ALL:
            raise UsageError(f"{flag}: a variant has flag=value, of flags other than {', '.join(OF_ALL)}")
    return words


def _saved(path: Path) -> Bill:
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        if "bills" in saved:
            raise ValueError("it holds several bills, and one is wanted")
        return Bill.from_json(saved)
    except (ValueError, RecursionError) as error:  # of what is not UTF-8, not JSON, or no bill
        raise UsageError(f"not a saved bill: {' '.join(str(error).split())}") from None


def _start_host(requests: Sequence[Request]) -> None:
    """Makes as many host devices as any variant wants: their number is fixed once jax has started."""
    most = max((flags.chips(r.mesh) for r in requests if r.target == "host" and isinstance(r.mesh, dict)), default=1)
    if most > 1:
        targets.prepare("host", most)
        targets.devices("host", most)


def show(comparison: Comparison, form: str) -> None:
    """The comparison on standard output."""
    if form == "json":
        print(json.dumps(comparison.to_json(), indent=1))
    elif form == "csv":
        sys.stdout.write(render.comparison_csv(comparison))
    elif sys.stdout.isatty():
        Console(highlight=False, emoji=False).print(render.comparison(comparison))
    else:
        sys.stdout.write(render.comparison_text(comparison))
    sys.stdout.flush()
