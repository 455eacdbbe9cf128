"""What a kernel says of itself to whoever reads the program: compilers know nothing of it, and bills would not."""

import json
from typing import Any

from jax.experimental import pallas as pl


def cost(flops: int, reads: list[int | None], arrays: list[Any], name: str = "grouped_matmul") -> dict[str, Any]:
    """What a kernel says of itself to whoever reads the program.

    reads: how many elements of each operand; None: all, once. A TPU's are what its grid fetches, to the last element. A
      GPU's are what memory has to deliver: programs that run beside each other share it in the L2.
    """
    size = sum(x.size * x.dtype.itemsize for x in arrays)
    estimate = {"flops": flops, "transcendentals": 0, "bytes_accessed": size}
    said = {
        "cost_estimate": json.dumps(estimate),
        "operand_reads": ",".join("" if n is None else str(n) for n in reads),
    }
    return {"cost_estimate": pl.CostEstimate(**estimate), "metadata": said, "name": name}
