"""Seconds of one kernel from its work: the least it can take on a chip, given the chip's peaks; and what it will.

The roofline is a lower bound. The prediction is another number: for each kernel the longest of computing and moving
bytes, and what it takes to launch it, one kernel after the other. Its rates are either

- the datasheet's peaks: then it is the roofline, and `Chip.launch_overhead_seconds` a kernel; or
- measured on such a chip by microbenchmarks (calibration.py): products at the rate of their type and sizes, single
  rows times few bits at that of the bytes that they read; then the rest at that of vector arithmetic and exponentials;
  bytes at that of kernels of this size, in order, transposed or only read, in a program that touches as much in all as
  this one does between two touches of the same array. What a cache still holds of an array depends on that, its reuse
  distance (on_chip.distances): in a loop, what one trip touches; at most, what the whole program holds in memory.

Not in it: kernels that run at the same time (those of a CPU's independent instructions do), links between programs,
and whatever else the machine does.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .calibration import Calibration
from .chips import Chip

if TYPE_CHECKING:
    from .walk import Kernel

PICOSECONDS = 10**12
READS = 16  # a kernel that writes less than one byte of so many that it touches only reads


@dataclass(frozen=True)
class Assumed:
    """By what a program is predicted: the chip, what was measured of one (None: the datasheet), and the most memory
    that the program holds, beyond which nothing can lie between two touches of an array."""

    chip: Chip
    calibration: Calibration | None
    footprint_bytes: int

    @property
    def launch_picoseconds(self) -> int:
        """From one kernel to the next."""
        measured = self.calibration.launch_seconds if self.calibration else self.chip.launch_overhead_seconds
        return round((measured or 0) * PICOSECONDS)

    @property
    def dispatch_picoseconds(self) -> int:
        """Of the program as a whole; nobody's in particular. 0 where it is not known."""
        return round(self.calibration.dispatch_seconds * PICOSECONDS) if self.calibration else 0

    def to_json(self) -> dict[str, Any]:
        """What a bill says of it."""
        of = self.calibration
        return {
            "peaks": "measured" if of else "datasheet",
            "measured_on": {"device": of.hardware.device, "date": of.date, "jax": of.jax} if of else None,
            "launch_seconds": self.launch_picoseconds / PICOSECONDS,
            "dispatch_seconds": self.dispatch_picoseconds / PICOSECONDS,
        }


def predict(kernel: "Kernel", assumed: Assumed) -> int:
    """Picoseconds that one execution of a kernel will take: at least its roofline, and its launch."""
    return assumed.launch_picoseconds + max(kernel.picoseconds, _measured_picoseconds(kernel, assumed))


def _measured_picoseconds(kernel: "Kernel", assumed: Assumed) -> int:
    rates = assumed.calibration
    if rates is None:
        return 0
    # In one kernel the vector units wait for what is multiplied, or the matrix units for what is to be: attention's
    # softmax lies between two products of the same thread block.
    seconds = _product_seconds(kernel, rates) + kernel.vector_flops / rates.vector_flops_per_second
    seconds += kernel.transcendentals / rates.transcendentals_per_second
    if moved := kernel.hbm_bytes - kernel.served_bytes:
        at = rates.transpose if kernel.reorders else rates.read if READS * kernel.written_bytes < moved else rates.copy
        most = assumed.footprint_bytes
        reaches = kernel.reaches or ((moved, most),)
        seconds = max(seconds, sum(part / at(moved, min(distance, most)) for part, distance in reaches))
    return round(seconds * PICOSECONDS)


def _product_seconds(kernel: "Kernel", rates: Calibration) -> float:
    """What was measured of such products; in proportion less where a kernel reads fewer bytes than those did, as of
    bfloat16 weights that it multiplies as float32, but never less than what computing takes. A single row times weights
    in few bits takes what was measured of those, by the bytes that there are for each weight."""
    measured = sum(one.flops / rates.matmul(one.precision, one.m, one.n, one.k) for one in kernel.products)
    moved = sum(one.bytes for one in kernel.products)
    if kernel.hbm_bytes >= moved:
        return measured
    weights = sum(one.n * one.k for one in kernel.products)
    if all(one.m == 1 for one in kernel.products):
        rate = rates.narrow_read(8 * kernel.hbm_bytes / weights, kernel.hbm_bytes)
        if rate is not None:
            return kernel.hbm_bytes / rate
    computing = sum(one.flops / rates.with_most_rows(one.precision, one.m, one.n, one.k) for one in kernel.products)
    return max(min(measured, computing), measured * kernel.hbm_bytes / moved)


def kernel_picoseconds(
    chip: Chip,
    matmul_flops: Mapping[str, int],
    other_flops: int,
    hbm_bytes: int,
    link_bytes: int,
    host_link_bytes: int = 0,
) -> tuple[int | None, str | None]:
    """The longest of computing, HBM and links, which can all overlap; and which of "compute", "hbm", "link" it was.

    Picoseconds, whole and rounded up, so that rows can add up to their total exactly. The time to launch a kernel is
    NOT in it: it is a lower bound. "latency" is the bound of a kernel without any work, which takes 0.

    matmul_flops: by class of operands, a key of `Chip.peak_flops`; the classes take turns on the matrix units.
    other_flops: elementwise and transcendental, on the vector units, beside the matrix units. Where their peak is not
      known they are left out, which keeps the result a lower bound.
    hbm_bytes, link_bytes: read and written; sent.
    host_link_bytes: to and from the host's memory. Where that link's speed is not known they are left out, too.

    (None, None) where the kernel needs a peak that is not known.
    """
    compute = 0
    for kind, flops in matmul_flops.items():
        if not flops:
            continue
        # TPUs multiply float32 in bfloat16 passes: one at jax's default precision.
        peak = chip.peak_flops.get("bf16" if kind == "f32" and chip.platform == "tpu" else kind)
        time = _picoseconds(flops, peak or _wider(chip, kind))
        if time is None:
            return None, None
        compute += time
    if other_flops and (vector := _picoseconds(other_flops, chip.peak_flops.get("vector"))) is not None:
        compute = max(compute, vector)
    hbm = _picoseconds(hbm_bytes, chip.hbm_bytes_per_second)
    link = _picoseconds(link_bytes, chip.link_bytes_per_second)
    if chip.host_bytes_per_second is not None and link is not None:
        link = max(link, _picoseconds(host_link_bytes, chip.host_bytes_per_second) or 0)
    if hbm is None or link is None or (other_flops and not chip.peak_flops):
        return None, None
    longest = max(compute, hbm, link)
    if not longest:
        return 0, "latency"
    return longest, "compute" if compute == longest else "hbm" if hbm == longest else "link"


def _picoseconds(amount: int, per_second: int | None) -> int | None:
    if not amount:
        return 0
    return None if per_second is None else -(-amount * PICOSECONDS // per_second)


def _wider(chip: Chip, kind: str) -> int | None:
    """Where a chip has no units for 4-bit or 8-bit operands, the compiler widens them, at most to bfloat16."""
    wider = {"fp4": "fp8", "fp8": "bf16", "int8": "bf16"}.get(kind)
    return chip.peak_flops.get(wider) or _wider(chip, wider) if wider else None
