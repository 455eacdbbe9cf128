"""Broken HLO, made from real: captured programs and single instructions of them, then garbled.

    python tests/fuzz.py --minutes=10 [--seed=0]

What has to hold of any text (`check`): its bill adds up and can be printed, or an HloError says in one harmless line
what is wrong; in time proportional to its length.
"""

import argparse
import json
import random
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import capture
from stepbill.profiling import render, targets
from stepbill.profiling.hlo import HloError
from stepbill.profiling.walk import itemize_text

# CPU seconds of a text at most: far more than it takes on a slow machine, far less than what does not end.
SECONDS, SECONDS_PER_CHARACTER = 2.0, 20e-6


class TooSlow(Exception):
    """The bill of a text took longer than its length allows."""


@contextmanager
def within(cpu_seconds: float) -> Iterator[None]:
    """TooSlow after so much time on the CPU, which a busy machine does not shorten.

    Not by SIGPROF: once TPU's compiler is loaded, it sends those.
    """

    def stop(*_: object) -> None:
        raise TooSlow(f"more than {cpu_seconds:.1f} s")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, cpu_seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def check(text: str, target: str) -> str:
    """AssertionError, TooSlow or whatever goes wrong; else what became of the text: "billed", "unknown", "refused"."""
    with within(SECONDS + SECONDS_PER_CHARACTER * len(text)):
        try:
            bill = itemize_text(text, targets.chip(target))
        except HloError as error:
            assert str(error).isprintable(), f"{str(error)!r} is not harmless"
            assert (error.line, error.column) == (None, None) or min(error.line or 0, error.column or 0) >= 1
            return "refused"
        bill.check()
        works = [bill.unattributed, bill.total, *(row.work for row in bill.rows)]
        for work in works:
            amounts = (work.matmul, work.elementwise, work.transcendental, work.link_bytes, work.picoseconds)
            assert min(*amounts, *work.hbm_read.values(), *work.hbm_write.values()) >= 0, "a negative amount"
        json.dumps(bill.to_json())
        odd = not text.replace("\n", "").isprintable() or max(bill.total.magnitude) > 1 << 63
        for printed in (str(bill), render.to_csv(bill)) if odd else ():  # the table takes longer than the bill
            assert printed.replace("\n", "").isprintable(), "what is printed is not harmless"
        return "unknown" if bill.unknown else "billed"


# --- real programs -------------------------------------------------------------------------------------------------


@cache
def programs() -> list[tuple[str, str]]:
    """(text, target) of the smaller captured programs of each backend."""
    names = [name for name in capture.PROGRAMS if name.startswith(("decode", "prefill"))]
    return [(capture.read(name), capture.PROGRAMS[name][1]) for name in names]


@cache
def kernels() -> list[tuple[str, str]]:
    """(text, target) of programs of one instruction each: every kind of instruction that a captured program has at its
    top level, with the computations it runs and its operands as parameters. Garbling these goes to the point."""
    found: dict[tuple[str, ...], tuple[str, str]] = {}
    for name, (_, target, _) in capture.PROGRAMS.items():
        text = capture.read(name)
        blocks = {
            block[1]: block[0] for block in re.finditer(r"^(?:ENTRY )?%(\S+) [^\n]*\{\n.*?^\}$", text, re.M | re.S)
        }
        for block in blocks.values():
            shapes = dict(re.findall(r"^  (?:ROOT )?%(\S+) = (\(.*?\)|\S+) [a-z][\w\-]*\(", block, re.M))
            # Lines of more than one line are what Pallas kernels for TPU say of themselves.
            for line in re.findall(r"^  (?:ROOT )?%.*?(?=\n  (?:ROOT )?%|\n\}\Z)", block, re.M | re.S):
                made = _program(line, shapes, blocks)
                opcodes = re.findall(r" = (?:\(.*?\)|\S+) ([a-z][\w\-]*)\(", made)
                found.setdefault((target, *sorted(set(opcodes))), (made, target))
    return list(found.values())


def _program(line: str, shapes: dict[str, str], blocks: dict[str, str]) -> str:
    names = dict.fromkeys(re.findall(r"%([\w.\-]+)", line.split(" = ", 1)[1]))
    operands = [name for name in names if name in shapes]
    wanted = [name for name in names if name in blocks]
    for name in wanted:  # and what these run in turn
        wanted += [one for one in re.findall(r"%([\w.\-]+)", blocks[name]) if one in blocks and one not in wanted]
    parameters = [f"  %{name} = {shapes[name]} parameter({n})" for n, name in enumerate(operands)]
    body = "\n".join([*parameters, line if "ROOT " in line else line.replace("  %", "  ROOT %", 1)])
    called = "".join(blocks[name].removeprefix("ENTRY ") + "\n\n" for name in reversed(wanted))
    return f"HloModule m, is_scheduled=true\n\n{called}ENTRY %main () -> f32[] {{\n{body}\n}}\n"


# --- garbling ------------------------------------------------------------------------------------------------------

_TOKEN = re.compile(r"[\w.\-]+|[^\w\s]|\n")
NUMBERS = (
    "0",
    "-1",
    "1",
    "7",
    "-9223372036854775808",
    "9223372036854775807",
    str(1 << 70),
    "9" * 5000,
    "1.5",
    "?",
    "<=8",
    "*",
)
ODD = (
    "\x1b[31m",
    "\x00",
    "\u202e",
    "é",
    "\u2028",
    '"',
    "\\",
    "[red]",
    "<b>",
    "=",
    "(" * 300,
    "{" * 300,
    "\r",
    "\udc80",
)
WORDS = (
    *("f6e3m2fn", "f32", "s4", "token", "opaque", "tuple", "fusion", "while", "call", "conditional", "custom-call"),
    *(
        "parameter",
        "constant",
        "dot",
        "convolution",
        "reduce",
        "scatter",
        "gather",
        "dynamic-update-slice",
        "copy-start",
    ),
    *("all-reduce", "all-gather-start", "sort", "fft", "get-tuple-element", "frobnicate", "ROOT", "ENTRY", "HloModule"),
)


def garble(text: str, how: str, where: int, what: int) -> str:
    """`text` with one thing wrong. where, what: any numbers; which token or line it happens to, and what happens."""
    if not text:
        return text
    if how == "cut":
        return text[: where % len(text)]
    if how == "delete":
        start = where % len(text)
        return text[:start] + text[start + what % 80 + 1 :]
    if how in ("swap lines", "double line", "drop line"):
        lines = text.split("\n")
        a, b = where % len(lines), what % len(lines)
        if how == "swap lines":
            lines[a], lines[b] = lines[b], lines[a]
        elif how == "double line":
            lines.insert(b, lines[a])
        else:
            del lines[a]
        return "\n".join(lines)
    if how == "insert":
        start = where % len(text)
        return text[:start] + ODD[what % len(ODD)] + text[start:]
    return _change_token(text, how, where, what)


_KINDS = {
    "number": r"\d+",
    "name": r"(?<=%)[\w.\-]+",
    "word": r"[a-z][\w\-]*",
    "shape": r"[a-z]\w*\[[^\]\n]*\](?:\{[^}\n]*\})?",
    "opcode": r"(?<= )[a-z][\w\-]*(?=\()",
    "attribute": r", [a-z_]+=(?:\{[^{}\n]*\}|[^,\s]+)",
    "drop attribute": r", [a-z_]+=(?:\{[^{}\n]*\}|[^,\s]+)",
}


def _change_token(text: str, how: str, where: int, what: int) -> str:
    kind = {"swap tokens": _TOKEN, "double token": _TOKEN, "drop token": _TOKEN}.get(how) or re.compile(_KINDS[how])
    tokens = list(kind.finditer(text))
    if not tokens:
        return text
    token, other = tokens[where % len(tokens)], tokens[what % len(tokens)]
    if how == "swap tokens":
        first, second = sorted((token, other), key=lambda one: one.start())
        between = text[first.end() : second.start()]
        return text[: first.start()] + second[0] + between + first[0] + text[max(first.end(), second.end()) :]
    new = {
        "double token": token[0] * 2,
        "drop token": "",
        "drop attribute": "",
        "shape": other[0],
        "opcode": other[0],
        "attribute": other[0],
        "number": NUMBERS[what % len(NUMBERS)],
        "name": other[0],
        "word": WORDS[what % len(WORDS)],
    }[how]
    return text[: token.start()] + new + text[token.end() :]


HOW = (
    *("cut", "delete", "swap lines", "double line", "drop line", "insert", "swap tokens", "double token", "drop token"),
    *("number", "name", "word", "shape", "opcode", "attribute", "drop attribute") * 3,
)


# --- long runs -----------------------------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(description="garbles captured HLO and bills it; 1 if anything goes wrong")
    parser.add_argument("--minutes", type=float, default=10, help="of CPU time, which a busy machine does not shorten")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    chance = random.Random(given.seed)
    sources: list[Callable[[], list[tuple[str, str]]]] = [kernels] * 9 + [programs]
    end, outcomes, failed = time.process_time() + 60 * given.minutes, Counter[str](), 0
    while time.process_time() < end:
        text, target = chance.choice(chance.choice(sources)())
        steps = [
            (chance.choice(HOW), chance.getrandbits(32), chance.getrandbits(32)) for _ in range(chance.randint(1, 3))
        ]
        for step in steps:
            text = garble(text, *step)
        try:
            outcomes[check(text, target)] += 1
        except Exception as error:
            failed += 1
            path = f"fuzz-{given.seed}-{failed}.hlo"
            with open(path, "w", errors="surrogatepass") as file:
                file.write(text)
            print(f"{path}: {steps}: {type(error).__name__}: {error}", file=sys.stderr)
    said = ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items()))
    print(f"seed {given.seed}, {given.minutes:g} minutes: {outcomes.total() + failed} texts, {said}, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
