"""What a kernel says of itself to whoever reads the program: compilers know nothing of it, and bills would not."""

import json
from typing import Any

from jax.experimental import pallas as pl


def estimate(flops: int, exponentials: int, arrays: list[Any]) -> dict[str, int]:
    """FLOPs of products, exponentials, and the bytes of all arrays that a kernel reads and writes."""
    size = sum(x.size * x.dtype.itemsize for x in arrays)
    return {"flops": flops, "transcendentals": exponentials, "bytes_accessed": size}


def said(of: dict[str, int], elementwise: int = 0) -> dict[str, str]:
    """An `estimate` as metadata: Pallas has an argument for it, which a GPU's kernel loses on its way.

    elementwise: FLOPs of no product, which Pallas has no word for. A kernel that has products leaves them out.
    """
    return {"cost_estimate": json.dumps(of | {"elementwise": elementwise} if elementwise else of)}


def waves(programs: int, rows: list[int], whole: int, times: int = 1) -> dict[str, str]:
    """What programs that run beside each other go over together, as metadata: how many there are in a row of the grid;
    the bytes that each row goes over, in the order in which they start; those of all arrays that are gone over so; and
    how often there is all this."""
    return {"waves": json.dumps({"programs": programs, "rows": rows, "whole": whole, "times": times})}


def cost(
    flops: int, reads: list[int | None], arrays: list[Any], name: str = "grouped_matmul", rows: int | None = None
) -> dict[str, Any]:
    """What a kernel says of itself to whoever reads the program.

    reads: how many elements of each operand; None: all, once. A TPU's are what its grid fetches, to the last element. A
      GPU's are what memory has to deliver: programs that run beside each other share it in the L2.
    rows: that each weight meets, where arrays do not tell.
    """
    of = estimate(flops, 0, arrays)
    metadata = said(of) | {"operand_reads": ",".join("" if n is None else str(n) for n in reads)}
    if rows:
        metadata["rows"] = str(rows)
    return {"cost_estimate": pl.CostEstimate(**of), "metadata": metadata, "name": name}
