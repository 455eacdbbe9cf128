"""Seconds of one kernel from its work: the least it can take on a chip, given the chip's peaks."""

from collections.abc import Mapping

from .chips import Chip

PICOSECONDS = 10**12


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
