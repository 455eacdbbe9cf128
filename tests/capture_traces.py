"""Makes tests/data/traces: what jax.profiler writes of our own small steps on a CPU, with their HLO.

    pip install -e . && python tests/capture_traces.py

Once with each line of jax that is supported: a folder is called by the step and jax's version. The files at hand were
made by jax 0.10.2 (Python 3.11) and 0.12.0.1 (Python 3.13) on two cores of an AMD EPYC that others used, too.
"""

import gzip
import re
import tempfile
from importlib import metadata
from pathlib import Path

from capture import SIZES, TINY
from stepbill.experiments import steps
from stepbill.experiments.measure import HLO_SUFFIX, Runner
from stepbill.profiling import hlo, targets, trace

TRACES = Path(__file__).parent / "data" / "traces"
STEPS = ("train", "decode", "generate")
EXECUTIONS, TOKENS = 3, 4


def capture(name: str) -> None:
    """Traces a few executions of one step."""
    import jax

    batch, context = SIZES[name if name in SIZES else "decode"]
    built = steps.build(TINY, name, batch=batch, context=context, real=True, count=TOKENS)
    compilation = targets.compile(built.lower(), "host", options=built.compiler_options("cpu"))
    runner = Runner(built, compilation.compiled)
    runner.seconds(2)
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    options.enable_hlo_proto = False  # which names the files of this machine
    folder = TRACES / f"{name}-jax-{metadata.version('jax')}"
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        with jax.profiler.trace(scratch, profiler_options=options):
            for _ in range(EXECUTIONS):
                runner.seconds(1)
        file, _ = trace.find(scratch)
        (folder / "host.xplane.pb.gz").write_bytes(gzip.compress(file.read_bytes(), mtime=0))
    # Without its tables of source lines.
    text = re.sub(r"\nFileNames\n.*?(?=\n(?:%|ENTRY))", "", compilation.text, flags=re.DOTALL)
    path = folder / f"{hlo.parse(text).name}{HLO_SUFFIX}"
    path.write_bytes(gzip.compress(text.encode(), mtime=0))
    print(f"{folder.name}: {sum(one.stat().st_size for one in folder.iterdir()) / 1000:.0f} kB")


if __name__ == "__main__":
    targets.prepare("host")
    for step in STEPS:
        capture(step)
