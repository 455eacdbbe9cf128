"""What stands in for chips that are not there: the compiler's idea of them, made of a description."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .chips import Chip

COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)  # the numbers of chips that every target but the host resolves
GPUS_PER_HOST = 8

# What else XLA needs to know of a GPU that is not there: FP32 lanes of each multiprocessor, shared memory per
# multiprocessor, threads per multiprocessor, clock in GHz, memory bytes per second, memory bytes, compute capability.
_GPU_DESCRIPTION = {
    "a100": (64, 167_936, 2048, 1.41, 2_039_040_000_000, 85_100_068_864, (8, 0)),
    "h100": (128, 233_472, 2048, 1.98, 3_352_320_000_000, 84_942_979_072, (9, 0)),
    "h200": (128, 233_472, 2048, 1.98, 4_800_000_000_000, 151_397_597_184, (9, 0)),
    "b200": (128, 233_472, 2048, 1.965, 7_672_320_000_000, 191_514_411_008, (10, 0)),
    "l4": (128, 102_400, 1536, 2.04, 300_096_000_000, 24_152_899_584, (8, 9)),
    "l40s": (128, 102_400, 1536, 2.52, 864_096_000_000, 48_305_799_168, (8, 9)),
}

# Shapes of slices by number of physical chips. Below 4 chips the host is smaller than usual, and must be told so.
_TORUS_2D: dict[int, str] = dict(zip(COUNTS, "1x1 1x2 2x2 2x4 4x4 4x8 8x8 8x16 16x16".split(), strict=True))
_TORUS_3D: dict[int, str] = dict(
    zip(COUNTS, "1x1x1 1x1x2 2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x8x8".split(), strict=True)
)
_TPU_SLICES = {"v4": _TORUS_3D, "v5e": _TORUS_2D, "v5p": _TORUS_3D, "v6e": _TORUS_2D, "tpu7x": _TORUS_3D}


def devices(it: Chip, chips: int) -> list[Any]:
    """jax devices of so many of these chips, to compile for."""
    from jax.experimental import topologies

    if it.platform == "cuda":
        hosts, per_host = max(1, chips // GPUS_PER_HOST), min(chips, GPUS_PER_HOST)
        found = topologies.get_topology_desc(
            it.name, platform="cuda", target_config=_gpu_description(it), topology=f"1x{hosts}x{per_host}"
        ).devices
    else:
        options: dict[str, Any] = {"chip_config_name": "megacore"} if it.name == "v4" else {}
        shape = _TPU_SLICES[it.name][math.ceil(chips / it.cores)]
        if chips < 4 * it.cores:
            options["chips_per_host_bounds"] = (*map(int, shape.split("x")), 1)[:3]
        found = topologies.get_topology_desc(f"{it.name}:{shape}", platform="tpu", **options).devices
    return list(found)[:chips]


def _gpu_description(it: Chip) -> str:
    """The GpuTargetConfig of XLA, as a text proto."""
    lanes, shared, threads, clock, bandwidth, memory, (major, minor) = _GPU_DESCRIPTION[it.name]
    numbers: dict[str, Any] = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "shared_memory_per_block": 49_152,
        "shared_memory_per_block_optin": shared - 1024,  # 1 KiB a block is the system's own
        "shared_memory_per_core": shared,
        "threads_per_core_limit": threads,
        "core_count": it.multiprocessors,
        "fpus_per_core": lanes,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 65_535,
        "block_dim_limit_z": 65_535,
        "memory_bandwidth": bandwidth,
        "l2_cache_size": it.l2_bytes,
        "clock_rate_ghz": clock,
        "device_memory_size": memory,
        "registers_per_core_limit": 65_536,
        "registers_per_block_limit": 65_536,
        "thread_dim_limit_x": 1024,
        "thread_dim_limit_y": 1024,
        "thread_dim_limit_z": 64,
    }
    info = " ".join(f"{name}:{number}" for name, number in numbers.items())
    capability = f"cuda_compute_capability{{major:{major} minor:{minor}}}"
    # By this Pallas knows what it compiles for, from jax 0.11 on. Of an L40S, which is a faster L40, it knows nothing.
    known_as = it.kinds[0].replace("L40S", "L40")
    return (
        f'gpu_device_info{{{info} {capability}}} platform_name:"CUDA" '
        f'dnn_version_info{{major:9 minor:10}} device_description_str:"{known_as}"'
    )


@contextmanager
def gpu_known() -> Iterator[None]:
    """A program that calls back into Python (jax.debug.print) makes jax ask what "gpu" is, which is how the compiler's
    idea of one calls itself; and jax knows of none where there is none. Inside, it does."""
    from jax._src import xla_bridge

    named = xla_bridge.canonicalize_platform
    xla_bridge.canonicalize_platform = lambda platform: "cuda" if platform == "gpu" else named(platform)
    try:
        yield
    finally:
        xla_bridge.canonicalize_platform = named
