"""DRAM bytes of kernels as Nsight Compute counts them, and whose they are.

`ncu --csv` writes one line for each metric of each kernel (its page "details"), or one for each kernel with a column
for each metric (its page "raw"); both are read here. Of a range of many kernels it writes one. Format: NVIDIA, Nsight
Compute CLI, "Command Line Options" and "Output Pages".
"""

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

READ, WRITE = "dram__bytes_read.sum", "dram__bytes_write.sum"
_UNITS = {"byte": 1, "Kbyte": 10**3, "Mbyte": 10**6, "Gbyte": 10**9, "Tbyte": 10**12}
# What its log says where it may not, or cannot, count.
_REFUSALS = {
    "ERR_NVGPUCTRPERM": "this user may not read the GPU's performance counters (ERR_NVGPUCTRPERM)",
    "LibraryNotLoaded": "ncu could not load the driver's profiling library (LibraryNotLoaded)",
    "No kernels were profiled": "ncu saw no kernel in the profiled part",
    "No ranges were profiled": "ncu saw no range to profile",
}


class CountersError(Exception):
    """Why there are no counters, in one line."""


@dataclass(frozen=True)
class Counted:
    """One kernel, or one range of kernels: its name, and the bytes that DRAM gave and took."""

    name: str
    read_bytes: int
    write_bytes: int

    @property
    def bytes(self) -> int:
        """Both ways."""
        return self.read_bytes + self.write_bytes


def parse(text: str) -> list[Counted]:
    """What `ncu --csv` counted, in the order of launches. CountersError where there is nothing, with ncu's reason."""
    lines = text.splitlines()
    heads = [n for n, line in enumerate(lines) if line.startswith('"ID",')]
    if not heads:
        raise CountersError(_reason(lines))
    rows = list(csv.reader(line for line in lines[heads[0] :] if line.startswith('"')))
    header = rows[0]
    try:
        found = _long(header, rows[1:]) if "Metric Value" in header else _wide(header, rows[1:])
    except (LookupError, ValueError) as error:
        raise CountersError(f"ncu's CSV is not as it is known here: {error}") from None
    if not found:
        raise CountersError(_reason(lines))
    return found


def _reason(lines: Sequence[str]) -> str:
    text = "\n".join(lines)
    known = next((reason for word, reason in _REFUSALS.items() if word in text), None)
    said = [line.removeprefix("==ERROR==").strip() for line in lines if line.startswith("==ERROR==")]
    return known or (said[0] if said else "ncu wrote no counters")


def _long(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[Counted]:
    key, name, metric, unit, value = (
        header.index(column) for column in ("ID", "Kernel Name", "Metric Name", "Metric Unit", "Metric Value")
    )
    kernels: dict[str, dict[str, int]] = {}
    names: dict[str, str] = {}
    for row in rows:
        if row[metric] in (READ, WRITE):
            names[row[key]] = row[name]
            kernels.setdefault(row[key], {})[row[metric]] = _bytes(row[value], row[unit])
    return [Counted(names[id], counts[READ], counts[WRITE]) for id, counts in kernels.items()]


def _wide(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[Counted]:
    """The first row has the units."""
    name, read, write = (header.index(column) for column in ("Kernel Name", READ, WRITE))
    units, *rest = rows
    return [Counted(row[name], _bytes(row[read], units[read]), _bytes(row[write], units[write])) for row in rest]


def _bytes(number: str, unit: str) -> int:
    """A number as ncu prints it, with commas between thousands."""
    if unit not in _UNITS:
        raise ValueError(f"unit is {unit!r}; it must be one of {', '.join(_UNITS)}")
    return round(float(number.replace(",", "")) * _UNITS[unit])


def owners(counted: Sequence[Counted], launches: Sequence[tuple[str, str]]) -> list[str | None]:
    """Of each counted kernel the HLO instruction that launched it; None where that cannot be told.

    launches: (kernel, instruction) in the order of a trace of the same step. Kernels are told by their order, for many
    instructions share one: both lists are laid beside each other by the names that agree; between those, as many are
    paired as there are on both sides, for the two tools do not write every name alike.
    """
    found: list[str | None] = [None] * len(counted)
    names = [kernel for kernel, _ in launches], [kernel.name for kernel in counted]
    for tag, i1, i2, j1, j2 in SequenceMatcher(None, *names, autojunk=False).get_opcodes():
        if tag == "equal" or (tag == "replace" and i2 - i1 == j2 - j1):
            found[j1:j2] = [instruction for _, instruction in launches[i1:i2]]
    return found


def by_instruction(counted: Sequence[Counted], launches: Sequence[tuple[str, str]]) -> tuple[dict[str, int], int]:
    """(bytes of each instruction in one step, both ways; bytes of kernels that no instruction can be told for)."""
    totals: dict[str, int] = {}
    nobodys = 0
    for kernel, owner in zip(counted, owners(counted, launches), strict=True):
        if owner is None:
            nobodys += kernel.bytes
        else:
            totals[owner] = totals.get(owner, 0) + kernel.bytes
    return totals, nobodys
