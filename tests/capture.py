"""Makes tests/data: optimised HLO of our own small steps, so that tests of the bill run where no extra is installed.

    pip install -e '.[targets]' && python tests/capture.py

The files at hand were made on Python 3.11 by jax 0.10.2, flax 0.12.8, libtpu as `jax[tpu]` pins it, and the cuda13
plugin, for chips that were not there. Make them again when the model's scopes or arguments change; the tests ask for
nothing that a newer compiler may not do.
"""

import gzip
from dataclasses import replace
from pathlib import Path

from stepbill.experiments import steps
from stepbill.model.config import ModelConfig
from stepbill.profiling import targets

DATA = Path(__file__).parent / "data"
TINY = ModelConfig("tiny", 2, 128, 4, 2, 256, 512, max_context=256)
SIZES = {"decode": (4, 128), "prefill": (2, 64), "train": (2, 64)}  # batch, context
# (step, target, mesh).
PROGRAMS = {
    f"{step}-{target}": (step, target, {}) for target in ("host", "h200", "v5e") for step in SIZES
} | {
    "decode-v5e-sharded": ("decode", "v5e", {"data": 2, "tensor": 2}),
    "train-h200-sharded": ("train", "h200", {"data": 4}),
}  # fmt: skip


def config(step: str) -> ModelConfig:
    """As the step is run in earnest: training rematerialises. All prefills alike, also a TPU's, which else scans."""
    return replace(TINY, remat="full") if step == "train" else replace(TINY, layers="unroll")


def text(step: str, target: str, mesh: dict[str, int]) -> str:
    """Optimised HLO of one program."""
    batch, context = SIZES[step]
    targets.prepare(target, mesh.get("data", 1) * mesh.get("tensor", 1))
    built = steps.build(config(step), step, batch=batch, context=context, mesh=targets.mesh(target, mesh))
    return targets.compile(built.lower(), target, runs=False).text


def read(name: str) -> str:
    """The captured text called `name`."""
    return gzip.decompress((DATA / f"{name}.hlo.gz").read_bytes()).decode()


def main() -> None:
    DATA.mkdir(exist_ok=True)
    for name, program in PROGRAMS.items():
        data = gzip.compress(text(*program).encode(), mtime=0)
        (DATA / f"{name}.hlo.gz").write_bytes(data)
        print(f"{name}: {len(data) / 1000:.0f} kB")


if __name__ == "__main__":
    main()
