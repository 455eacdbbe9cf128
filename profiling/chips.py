"""Chips: their peaks, memory, links and prices, each with its source. Facts only; `targets.py` compiles for them."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from .assumptions import ASSUMED, Assumptions, load

GIB = 1 << 30


@dataclass(frozen=True)
class Chip:
    """One device of a mesh and what it can do at best. None, or a key that is absent, is unknown, never zero.

    platform: "cpu", "cuda" or "tpu".
    peak_flops: dense FLOP/s, by the class of the operands: "bf16" (and f16), "int8", "fp8", "f32" (at jax's default
      precision: TF32 on NVIDIA; one bf16 pass on TPU, so not a number of its own), "fp4" and "vector" (elementwise).
    hbm_bytes: capacity. usable_hbm_bytes: what a program may fill: the limit of TPU's compiler; on NVIDIA what the
      driver leaves (jax preallocates 75 % of it unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise).
    hbm_bytes_per_second: reads and writes together.
    link_bytes_per_second: what one chip can send, over all its links at once. NVIDIA: half of the two-way NVLink (or
      PCIe) total, inside one host of 8; between hosts the network is slower, so link seconds are a lower bound there.
      TPU: one-way ICI over all ports; a collective along one mesh axis uses only some of them, again a lower bound.
    host_bytes_per_second: between the chip and its host's memory, both ways together.
    l2_bytes: NVIDIA's L2 cache; what it is taken to serve is in on_chip.py.
    multiprocessors: NVIDIA's, those in use in the product (its whitepaper, and XLA's target_config/specs).
    launch_overhead_seconds: an ASSUMPTION, not a datasheet number: between kernels on NVIDIA.
    watts: board power, where it is published. dollars_per_hour: one on-demand price, of one chip. dollars_range: the
      lowest and highest seen. All three are facts of assumptions.py, with source and date.
    sources: where each number is from.
    kinds: what jax calls the chip when it is present (`device_kind`).
    cores: devices that jax shows for one physical chip. All amounts here are per device.
    """

    name: str
    title: str
    platform: str
    peak_flops: Mapping[str, int] = field(default_factory=dict, hash=False)
    hbm_bytes: int | None = None
    usable_hbm_bytes: int | None = None
    hbm_bytes_per_second: int | None = None
    link_bytes_per_second: int | None = None
    l2_bytes: int | None = None
    watts: int | None = None
    launch_overhead_seconds: float | None = None
    dollars_per_hour: float | None = None
    dollars_range: tuple[float, float] | None = None
    sources: str = ""
    kinds: tuple[str, ...] = ()
    cores: int = 1
    host_bytes_per_second: int | None = None
    multiprocessors: int | None = None


def _tera(**peaks: float) -> dict[str, int]:
    return {name: round(peak * 1e12) for name, peak in peaks.items()}


_ICI = "ICI: half of the documented two-way bandwidth per chip."
_LAUNCH = 2e-6
_HOPPER = "L2: NVIDIA H100 architecture whitepaper, 50 MB."
_ADA = "L2: NVIDIA Ada architecture whitepaper (48 MB of AD104, 96 MB of AD102)."
_PCIE_4, _PCIE_5 = 64_000_000_000, 128_000_000_000  # 16 lanes, both ways: NVIDIA's datasheets of these chips

_NVIDIA = (
    Chip(
        "a100",
        "NVIDIA A100 SXM 80GB",
        "cuda",
        _tera(bf16=312, int8=624, f32=156, vector=19.5),
        80 * GIB,
        85_100_068_864,
        2_039_000_000_000,
        300_000_000_000,
        41_943_040,
        multiprocessors=108,
        launch_overhead_seconds=_LAUNCH,
        sources="Peaks, HBM, NVLink: NVIDIA A100 datasheet (dense). L2: A100 whitepaper, 40 MB. No fp8 units.",
        kinds=("NVIDIA A100-SXM4-80GB",),
        host_bytes_per_second=_PCIE_4,
    ),
    Chip(
        "h100",
        "NVIDIA H100 SXM",
        "cuda",
        _tera(bf16=989, int8=1979, fp8=1979, f32=494.5, vector=67),
        80 * GIB,
        84_942_979_072,
        3_350_000_000_000,
        450_000_000_000,
        52_428_800,
        multiprocessors=132,
        launch_overhead_seconds=_LAUNCH,
        sources=f"Peaks, HBM, NVLink: NVIDIA H100 datasheet, its sparse numbers halved. {_HOPPER}",
        kinds=("NVIDIA H100 80GB HBM3",),
        host_bytes_per_second=_PCIE_5,
    ),
    Chip(
        "h200",
        "NVIDIA H200",
        "cuda",
        _tera(bf16=989, int8=1979, fp8=1979, f32=494.5, vector=67),
        141_000_000_000,
        # jax's own description of the chip says 141 GiB; out-of-memory messages of real ones say 139.80 GiB in all.
        round(139.80 * GIB),
        4_800_000_000_000,
        450_000_000_000,
        52_428_800,
        multiprocessors=132,
        launch_overhead_seconds=_LAUNCH,
        sources="Peaks, HBM, NVLink: NVIDIA H200 datasheet, its sparse numbers halved. Measured on one: 8192^3 bf16 at "
        f"769 to 798 TFLOP/s, a copy at 4.3 TB/s. {_HOPPER}",
        kinds=("NVIDIA H200",),
        host_bytes_per_second=_PCIE_5,
    ),
    Chip(
        "b200",
        "NVIDIA B200",
        "cuda",
        _tera(bf16=2250, int8=4500, fp8=4500, fp4=9000, f32=1125, vector=75),
        180_000_000_000,
        191_514_411_008,
        7_700_000_000_000,
        900_000_000_000,
        132_644_864,
        multiprocessors=148,
        launch_overhead_seconds=_LAUNCH,
        sources="Peaks, HBM, NVLink: NVIDIA HGX B200 datasheet / 8, its sparse numbers halved (DGX documents say "
        "8 TB/s). L2: 126.5 MiB, as its driver says (XLA's target_config/specs/b200.txtpb).",
        kinds=("NVIDIA B200",),
    ),
    Chip(
        "l4",
        "NVIDIA L4",
        "cuda",
        _tera(bf16=121, int8=242, fp8=242, f32=60, vector=30.3),
        24_000_000_000,
        24_152_899_584,
        300_000_000_000,
        32_000_000_000,
        50_331_648,
        multiprocessors=58,
        launch_overhead_seconds=_LAUNCH,
        sources=f"Peaks, memory (GDDR6), PCIe gen 4 x16: NVIDIA L4 datasheet, its sparse numbers halved. {_ADA}",
        kinds=("NVIDIA L4",),
        host_bytes_per_second=_PCIE_4,
    ),
    Chip(
        "l40s",
        "NVIDIA L40S",
        "cuda",
        _tera(bf16=362, int8=733, fp8=733, f32=183, vector=91.6),
        48_000_000_000,
        48_305_799_168,
        864_000_000_000,
        32_000_000_000,
        100_663_296,
        multiprocessors=142,
        launch_overhead_seconds=_LAUNCH,
        sources=f"Peaks, memory (GDDR6), PCIe gen 4 x16: NVIDIA L40S datasheet. {_ADA}",
        kinds=("NVIDIA L40S",),
        host_bytes_per_second=_PCIE_4,
    ),
)

_TPU_DOCS = "Peaks, HBM, ICI: cloud.google.com/tpu/docs, page of the generation, read 2026-11;"

_TPU = (
    Chip(
        "v4",
        "TPU v4",
        "tpu",
        _tera(bf16=275, int8=275),
        32 * GIB,
        round(30.75 * GIB),
        1_200_000_000_000,
        300_000_000_000,
        sources="Peaks, HBM, ICI: the v4 page of cloud.google.com/tpu/docs, from memory, not read again. "
        "Two cores as one device (megacore).",
        kinds=("TPU v4",),
    ),
    Chip(
        "v5e",
        "TPU v5e",
        "tpu",
        _tera(bf16=197, int8=394, vector=6.1),
        16 * GIB,
        round(15.75 * GIB),
        819_000_000_000,
        200_000_000_000,
        sources=f"{_TPU_DOCS} {_ICI} Vector: ASSUMED 8 x 128 lanes x 4 ALUs x 1.5 GHz.",
        kinds=("TPU v5 lite", "TPU v5e"),
    ),
    Chip(
        "v5p",
        "TPU v5p",
        "tpu",
        _tera(bf16=459, int8=918, vector=14),
        103_000_000_000,
        round(95.73 * GIB),
        2_765_000_000_000,
        600_000_000_000,
        sources=f"{_TPU_DOCS} {_ICI} Vector: 2 cores x 8 x 128 lanes x 4 ALUs x 1.75 GHz (How to Scale Your Model). "
        f"HBM capacity: jax's tpu_info. Two cores as one device (megacore).",
        kinds=("TPU v5", "TPU v5p"),
    ),
    Chip(
        "v6e",
        "TPU v6e",
        "tpu",
        _tera(bf16=918, int8=1836, fp8=918),
        32 * GIB,
        round(31.24 * GIB),
        1_638_000_000_000,
        400_000_000_000,
        sources=f"{_TPU_DOCS} {_ICI}",
        kinds=("TPU v6 lite", "TPU v6e"),
    ),
    Chip(
        "tpu7x",
        "TPU7x, one of a chip's two cores",
        "tpu",
        _tera(bf16=2307 / 2, fp8=4614 / 2),
        96 * GIB,
        round(94.74 * GIB),
        3_690_000_000_000,
        300_000_000_000,
        sources=f"{_TPU_DOCS} all halved, because jax shows a chip's two cores as two devices. {_ICI}",
        kinds=("TPU7x",),
        cores=2,
    ),
)

# Hosts differ a hundredfold, and a CPU bill is no proxy for HBM traffic: no peaks are better than invented ones.
_HOST = Chip("host", "this host's CPU", "cpu", sources="Peaks and price unknown: measure instead.", kinds=("cpu",))


def priced(chip: Chip, facts: Assumptions) -> Chip:
    """The chip with the price and the power that `facts` say, and where they have them from."""
    price, power = facts.entry(f"chip.dollars_per_hour.{chip.name}"), facts.entry(f"chip.watts.{chip.name}")
    whence = f"{price.source}, {price.date}; they change, check before quoting" if price.source else price.status
    known = "not published" if power.status == ASSUMED else power.source or power.status
    return replace(
        chip,
        dollars_per_hour=facts.number(price.name),
        dollars_range=None if price.low is None or price.high is None else (price.low, price.high),
        watts=None if power.status == ASSUMED else facts.whole(power.name),
        sources=f"{chip.sources} Power: {known}. Price: {whence}.",
    )


_FACTS = load()
CHIPS: dict[str, Chip] = {_HOST.name: _HOST} | {chip.name: priced(chip, _FACTS) for chip in (*_NVIDIA, *_TPU)}


def chip(name: str) -> Chip:
    """The chip called `name`; ValueError with all names where there is none."""
    if name not in CHIPS:
        raise ValueError(f"target is {name!r}; it must be one of {', '.join(CHIPS)}")
    return CHIPS[name]
