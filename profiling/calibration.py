"""What one machine was measured to do (`python -m stepbill.experiments.calibrate`), read back and interpolated.

Between two measured sizes a rate is interpolated linearly in the logarithms of sizes and rate; beyond the smallest and
the largest it is that of the nearest. So a rate is always within the measured ones.
"""

import json
import math
import os
import platform
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

from . import kept
from .chips import Chip

SCHEMA = 1
ENVIRONMENT = "STEPBILL_CALIBRATION"
COMMAND = "python -m stepbill.experiments.calibrate"
PLATFORMS = ("cpu", "cuda")
# Where a class of operands was not measured, that of which the compiler makes it.
WIDER = {"fp4": "fp8", "fp8": "bf16", "int8": "bf16", "bf16": "f32"}


class CalibrationError(ValueError):
    """The file is not a calibration; the text is one line that says what is wrong with it."""


@dataclass(frozen=True)
class Hardware:
    """What was measured: platform "cpu" or "cuda", the device's name, cores (CPU), bytes of memory, driver (GPU)."""

    platform: str
    device: str
    cores: int | None = None
    memory_bytes: int | None = None
    driver: str | None = None

    def is_like(self, other: "Hardware") -> bool:
        """Whether what was measured on one holds on the other: memory and driver may differ."""
        mine, theirs = ((it.platform, it.device, it.cores) for it in (self, other))
        return mine == theirs


@dataclass(frozen=True)
class MatmulRate:
    """Of products [m, k] x [k, n] one after the other. One rate serves (n, k) and (k, n), see `Calibration.matmul`."""

    precision: str
    m: int
    n: int
    k: int
    flops_per_second: int


@dataclass(frozen=True)
class ByteRate:
    """Of kernels that touch so many bytes each, read and written together, in a program that touches so many in all.

    footprint_bytes: what of it is still in a cache when it is asked for again depends on this. The kernels take turns
      and their arrays are all different, so it is the reuse distance of each (on_chip.Recency).
    """

    bytes: int
    footprint_bytes: int
    bytes_per_second: int


@dataclass(frozen=True)
class NarrowRate:
    """Of one row times weights of so many bits, made wider on their way: of a kernel that reads so many bytes of them
    from memory, and none of which a cache has."""

    bits: int
    bytes: int
    bytes_per_second: int


@dataclass(frozen=True)
class Calibration:
    """The facts of one machine, all measured, each the median of several.

    Attributes:
      matmuls: of each class of operands a full grid of sizes. copies: of kernels that read one array and write another
        in its order; transposes: in another order; reads: of kernels that write next to nothing, where they were
        measured, else copies stand for them. narrow: of single rows times weights in few bits, where it was measured.
      vector_flops_per_second, transcendentals_per_second: of kernels that do much to little data.
      launch_seconds: from one kernel to the next in a program. dispatch_seconds: of a program, seen by its caller.
    """

    hardware: Hardware
    jax: str
    date: str
    command: str
    matmuls: tuple[MatmulRate, ...]
    copies: tuple[ByteRate, ...]
    transposes: tuple[ByteRate, ...]
    vector_flops_per_second: int
    transcendentals_per_second: int
    launch_seconds: float
    dispatch_seconds: float
    reads: tuple[ByteRate, ...] = ()
    narrow: tuple[NarrowRate, ...] = ()

    def matmul(self, precision: str, m: int, n: int, k: int) -> float:
        """FLOP/s of [m, k] x [k, n]. The fewer of m and n are the rows that each weight meets, and m of the grid."""
        grid = self._grids[self._measured(precision)]
        rows, side = sorted((m, n))
        return grid((rows, *sorted((side, k))))

    def with_most_rows(self, precision: str, m: int, n: int, k: int) -> float:
        """FLOP/s of the same weights with as many rows as were measured: of computing, with reading them no matter."""
        grid = self._grids[self._measured(precision)]
        return grid((grid.axes[0][-1], *sorted((max(m, n), k))))

    def _measured(self, precision: str) -> str:
        while precision not in self._grids and precision in WIDER:
            precision = WIDER[precision]
        return precision if precision in self._grids else next(iter(self._grids))

    @cached_property
    def _grids(self) -> "dict[str, Grid]":
        points: dict[str, dict[tuple[int, ...], float]] = {}
        for rate in self.matmuls:
            for sides in ((rate.n, rate.k), (rate.k, rate.n)):
                points.setdefault(rate.precision, {})[(rate.m, *sides)] = rate.flops_per_second
        return {precision: Grid(of) for precision, of in points.items()}

    def copy(self, size: int, footprint: int) -> float:
        """Bytes a second of a kernel that touches `size` bytes in order, in a program that touches `footprint`."""
        return _at(self._copies, size, footprint)

    def transpose(self, size: int, footprint: int) -> float:
        """The same, of a kernel that changes their order."""
        return _at(self._transposes, size, footprint)

    def read(self, size: int, footprint: int) -> float:
        """The same, of a kernel that reads them and writes next to nothing."""
        return _at(self._reads, size, footprint) if self.reads else self.copy(size, footprint)

    def narrow_read(self, bits: float, size: int) -> float | None:
        """Bytes a second at which one row times weights of about so many bits each reads `size` bytes of them; None
        where weights so narrow were not measured."""
        nearest = min(self._narrow, key=lambda one: abs(math.log(bits / one)), default=None)
        if nearest is None or not nearest / math.sqrt(2) < bits < nearest * math.sqrt(2):
            return None
        return self._narrow[nearest]((size,))

    @cached_property
    def _narrow(self) -> "dict[int, Grid]":
        points: dict[int, dict[tuple[int, ...], float]] = {}
        for rate in self.narrow:
            points.setdefault(rate.bits, {})[(rate.bytes,)] = rate.bytes_per_second
        return {bits: Grid(of) for bits, of in points.items()}

    @cached_property
    def _reads(self) -> "Grid":
        return _line(self.reads)

    @cached_property
    def _copies(self) -> "Grid":
        return _line(self.copies)

    @cached_property
    def _transposes(self) -> "Grid":
        return _line(self.transposes)

    def fastest(self, chip: Chip) -> Chip:
        """`chip` with the highest rates that were measured as its peaks: what a roofline can be drawn from."""
        peaks = {kind: round(max(self._grids[self._measured(kind)].points.values())) for kind in ("f32", *WIDER)}
        peaks["vector"] = max(self.vector_flops_per_second, self.transcendentals_per_second)
        return replace(
            chip,
            peak_flops=peaks,
            hbm_bytes_per_second=max(rate.bytes_per_second for rate in (*self.copies, *self.transposes, *self.reads)),
            launch_overhead_seconds=self.launch_seconds,
            sources=f"Measured on {self.date} by {self.command}.",
        )

    def to_json(self) -> dict[str, Any]:
        """What `read` reads."""
        return {"schema": SCHEMA, **asdict(self)}

    @classmethod
    def from_json(cls, saved: Any) -> "Calibration":
        """What `to_json` wrote; CalibrationError says what is wrong with what it did not."""
        if not isinstance(saved, dict) or "matmuls" not in saved or "hardware" not in saved:
            raise CalibrationError("it is no calibration of a machine")
        if saved.get("schema") != SCHEMA:
            raise CalibrationError(f"schema is {saved.get('schema')!r}; it must be {SCHEMA}: run {COMMAND} again")
        values = {}
        for field in fields(cls):
            if field.name not in saved:
                if field.default is MISSING:
                    raise CalibrationError(f"it has no {field.name!r}")
                continue
            try:
                values[field.name] = _READ[field.name](saved[field.name])
            except (TypeError, KeyError, ValueError) as error:
                raise CalibrationError(f"{field.name} is not what it must be: {_said(error)}") from None
        made = cls(**values)
        grids = made._grids | {"copies": made._copies, "transposes": made._transposes}
        for name, grid in (grids | {"reads": made._reads} if made.reads else grids).items():
            if missing := set(product(*grid.axes)) - grid.points.keys():
                at = ", ".join(map(str, min(missing)))
                raise CalibrationError(f"{name} is measured at some sizes but not at ({at}); it must be a full grid")
        return made


class Grid:
    """Positive values at all combinations of some sizes along each axis; interpolated, linearly in all logarithms."""

    def __init__(self, points: Mapping[tuple[int, ...], float]):
        self.axes = [sorted(set(axis)) for axis in zip(*points, strict=True)]
        self.points = points

    def __call__(self, at: Sequence[int]) -> float:
        log = 0.0
        for corner in product(*(_between(axis, size) for axis, size in zip(self.axes, at, strict=True))):
            weight = math.prod(share for _, share in corner)
            if weight:
                log += weight * math.log(self.points[tuple(size for size, _ in corner)])
        return math.exp(log)


def _between(axis: Sequence[int], size: int) -> list[tuple[int, float]]:
    """The sizes of an axis around `size`, each with its weight."""
    after = bisect_right(axis, size)
    if after == 0 or after == len(axis):
        return [(axis[min(after, len(axis) - 1)], 1.0)]
    low, high = axis[after - 1], axis[after]
    share = math.log(size / low) / math.log(high / low)
    return [(low, 1 - share), (high, share)]


def _line(rates: Sequence[ByteRate]) -> Grid:
    return Grid({(rate.bytes, rate.footprint_bytes // rate.bytes): rate.bytes_per_second for rate in rates})


def _at(line: Grid, size: int, footprint: int) -> float:
    sizes = line.axes[0]
    nearest = min(max(size, sizes[0]), sizes[-1])
    return line((nearest, max(1, footprint // nearest)))


# --- files ---------------------------------------------------------------------------------------------------------


def default_path(of_platform: str) -> Path:
    """Where this user's calibration of a "cpu" or "cuda" is: what STEPBILL_CALIBRATION says, or in the cache folder."""
    if said := os.environ.get(ENVIRONMENT):
        return Path(said)
    return kept.user_folder() / f"calibration-{of_platform}.json"


def read(path: str | Path) -> Calibration:
    """The calibration in a file; CalibrationError says what is wrong with another."""
    try:
        return Calibration.from_json(json.loads(Path(path).read_text()))
    except OSError as error:
        raise CalibrationError(f"{path}: cannot read it: {(error.strerror or str(error)).lower()}") from None
    except CalibrationError as error:
        raise CalibrationError(f"{path}: {error}") from None
    except ValueError:
        raise CalibrationError(f"{path}: it is not JSON") from None


def of(chip: Chip) -> Calibration | None:
    """The saved calibration that holds for `chip`: on the host, of this very kind of machine; of a GPU, of the same
    model. None where there is none. CalibrationError where the file is there and wrong, so that nobody misses it."""
    path = default_path(chip.platform)
    if chip.platform not in PLATFORMS or not path.exists():
        return None
    found = read(path)
    if chip.platform == "cpu":
        return found if found.hardware.is_like(host()) else None
    return found if found.hardware.platform == chip.platform and found.hardware.device in chip.kinds else None


def host() -> Hardware:
    """This machine."""
    return Hardware("cpu", processor(), cores(), _memory_bytes())


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor() -> str:
    """The model of this machine's CPU, as far as the system says it."""
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


# --- what each field must be ---------------------------------------------------------------------------------------


def _said(error: Exception) -> str:
    return f"it has no {error}" if isinstance(error, KeyError) else str(error)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} must be text")
    return value


def _whole(value: Any) -> int:
    if type(value) is not int or value < 1:
        raise ValueError(f"{value!r} must be a whole number of at least 1")
    return value


def _seconds(value: Any) -> float:
    if type(value) not in (int, float) or not 0 <= value < math.inf:
        raise ValueError(f"{value!r} must be seconds")
    return float(value)


def _hardware(saved: Mapping[str, Any]) -> Hardware:
    cores, memory = (None if saved[key] is None else _whole(saved[key]) for key in ("cores", "memory_bytes"))
    driver = None if saved["driver"] is None else _text(saved["driver"])
    if saved["platform"] not in PLATFORMS:
        raise ValueError(f"platform is {saved['platform']!r}; it must be one of {', '.join(PLATFORMS)}")
    return Hardware(saved["platform"], _text(saved["device"]), cores, memory, driver)


def _rates(saved: Any) -> tuple[ByteRate, ...]:
    if not saved:
        raise ValueError("it has no entries; it must have at least 1")
    keys = ("bytes", "footprint_bytes", "bytes_per_second")
    return tuple(ByteRate(*(_whole(one[key]) for key in keys)) for one in saved)


def _narrow(saved: Any) -> tuple[NarrowRate, ...]:
    keys = ("bits", "bytes", "bytes_per_second")
    return tuple(NarrowRate(*(_whole(one[key]) for key in keys)) for one in saved)


def _matmuls(saved: Any) -> tuple[MatmulRate, ...]:
    if not saved:
        raise ValueError("it has no entries; it must have at least 1")
    sizes = ("m", "n", "k", "flops_per_second")
    return tuple(MatmulRate(_text(one["precision"]), *(_whole(one[key]) for key in sizes)) for one in saved)


_READ: dict[str, Callable[[Any], Any]] = {
    "hardware": _hardware,
    "jax": _text,
    "date": _text,
    "command": _text,
    "matmuls": _matmuls,
    "copies": _rates,
    "transposes": _rates,
    "narrow": _narrow,
    "reads": lambda saved: _rates(saved) if saved else (),
    "vector_flops_per_second": _whole,
    "transcendentals_per_second": _whole,
    "launch_seconds": _seconds,
    "dispatch_seconds": _seconds,
}
