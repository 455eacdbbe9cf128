"""A ptxas for GPUs that are not there: it assembles what somebody wrote, and only seems to assemble XLA's own kernels.

XLA starts ptxas for each kernel of a program, hundreds of times, which took nearly half of the processor time of a
compilation; and nothing of what it makes is ever run or read where there is no GPU. HLO text and memory plan are the
same without. Kernels that are not XLA's own (Pallas, from JAX's or anybody's code) go to the real ptxas: what it would
refuse on the machine that has the GPU shall be refused here.
"""

import os
import shlex
from pathlib import Path

# Names of kernels that XLA makes by itself, which are those of fusions: loop_add_fusion_2, fusion_7, gemm_fusion_dot_3,
# wrapped_convert. All kernels in a file must have one, or the whole file is assembled.
OWN = r"(([a-z_]*_)?fusion|gemm_fusion_[a-z_]*|wrapped_[a-z_]*)[0-9_]*"

_SCRIPT = r"""#!/bin/sh
# ptxas FILE -o RESULT ...; anything else, and any kernel that XLA did not make by itself, is for the real one.
[ "$2" = -o ] || exec {ptxas} "$@"
names=$(grep '^\.visible \.entry ' "$1") || exec {ptxas} "$@"
if printf '%s\n' "$names" | grep -qvE '\.entry {own}\('; then exec {ptxas} "$@"; fi
printf x > "$3"
"""


def stand_in(tools: Path, folder: Path) -> Path:
    """A folder of CUDA's tools for XLA, made in `folder`, with all that it takes from `tools` and such a ptxas; or
    `tools`, where programs in `folder` may not be started."""
    made = folder / "cuda"
    (made / "bin").mkdir(parents=True)
    (made / "nvvm").symlink_to(tools / "nvvm")
    ptxas = made / "bin" / "ptxas"
    ptxas.write_text(_SCRIPT.format(ptxas=shlex.quote(str(tools / "bin" / "ptxas")), own=OWN))
    ptxas.chmod(0o755)
    return made if os.access(ptxas, os.X_OK) else tools
