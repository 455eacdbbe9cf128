"""What a kernel written in Pallas does, counted in its own code, which the program carries: in MLIR, as Triton takes it
for a GPU, or Mosaic for a GPU or a TPU.

HLO shows of such a kernel what goes in and what comes out. Its code is run here for all programs of the grid at once,
but only what steers it (kernel_run.py): the numbers of programs, the bounds of loops, conditions. Of the arrays in it
the sizes alone are looked at. So a kernel that skips what a mask hides is billed for what it does not skip, to the last
product. Where data steers it, nothing is known of it here.

FLOPs are of floating-point numbers, and products of whole numbers; what computes addresses is none.
"""

import base64
import binascii
import math
import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from .flops import Flops
from .hlo import Instruction
from .kernel_run import Frame, Run, Unreadable, name_of

WARPGROUP = 128  # threads that multiply together, of a GPU from Hopper on


class Code(NamedTuple):
    """What a kernel does: its FLOPs, and how many elements of each operand it asks memory for.

    reads: of a TPU what its grid fetches, more than the operand has where some is fetched again. Of a GPU at most all,
      once, for programs that run beside each other share it in the L2. () where that cannot be told.
    """

    flops: Flops
    reads: tuple[int, ...]


def counted(call: Instruction) -> Code | None:
    """What the kernel of a custom call does; None if it is no kernel of Pallas.

    Raises:
      Unreadable: data decides that, or its code is of another version.
    """
    shapes = tuple((operand.shape.dims, operand.shape.bits) for operand in call.operands)
    found = _counted(call.custom_call_target, call.backend_config, shapes)
    if isinstance(found, str):
        raise Unreadable(found)
    return found


_Shapes = tuple[tuple[tuple[int, ...], int], ...]  # of operands: dimensions, and the bits of an element


# Layers have the same kernel.
@lru_cache(maxsize=64)
def _counted(target: str, config: str, operands: _Shapes) -> Code | str | None:
    try:
        if target == "__gpu$xla.gpu.triton":
            return _triton(config, operands)
        if target == "mosaic_gpu_v2":
            return _mosaic_gpu(config)
        if target == "tpu_custom_call":
            return _mosaic(config, operands)
    except Unreadable as error:
        return str(error)
    except (AttributeError, LookupError, TypeError, ValueError):  # what is written otherwise than is known here
        return "whose code this version of jax does not read"
    return None


# --- the code of each kind of kernel --------------------------------------------------------------------------


def _triton(config: str, operands: _Shapes) -> Code | None:
    written = string(config, "ir")
    if written is None:
        return None
    module = _parsed(written)  # whose blocks are there as long as it is
    main = _main(module, "tt.func")
    sizes = [re.search(rf"\bgrid_{axis} = (\d+)", config) for axis in "xyz"]
    grid = [int(size[1]) if size else 1 for size in sizes]
    run = Run(grid)
    for axis, (number, size) in enumerate(zip(run.numbers, grid, strict=True)):
        run.places |= {f"tt.get_program_id {axis}": number, f"tt.get_num_programs {axis}": size}
    run.block(main, run.frame)
    if run.lost_reads:
        return Code(run.flops, ())
    asked = (run.read.get(n, 0) // bits for n, (_, bits) in enumerate(operands))
    return Code(run.flops, tuple(min(n, math.prod(dims)) for n, (dims, _) in zip(asked, operands, strict=True)))


def _mosaic_gpu(config: str) -> Code | None:
    """Its code is of threads: products are of a warpgroup together, all else is of each. Copies name their arrays by
    descriptors that are made outside, so nothing is known of what is read."""
    written = string(config, "module")
    if written is None:
        return None
    module = _parsed(written)
    launches = [op for op in _within(module.operation) if name_of(op) == "gpu.launch"]
    if len(launches) != 1 or len(launches[0].regions[0].blocks) != 1:
        raise Unreadable("whose code is of another kind than is known")
    outside = Run([])
    found = [outside.value(size, outside.frame) for size in launches[0].operands if str(size.type) == "index"]
    sizes = [int(size) for size in found[:6] if size is not None]
    if len(sizes) < 6:
        raise Unreadable("of which data says how many programs there are")
    blocks, threads = sizes[:3], sizes[3:]
    run = Run([*blocks, -(-math.prod(threads) // WARPGROUP)], threads=WARPGROUP)
    *places, warpgroup = run.numbers
    first = None if warpgroup is None else warpgroup * WARPGROUP  # of its threads, along x
    for axis, place, number, size, wide in zip("xyz", places, (first, 0, 0), blocks, threads, strict=True):
        run.places |= {f"gpu.block_id {axis}": place, f"gpu.grid_dim {axis}": size}
        run.places |= {f"gpu.thread_id {axis}": number, f"gpu.block_dim {axis}": wide}
    run.block(launches[0].regions[0].blocks[0], run.frame)
    return Code(run.flops, ())


def _within(op: Any) -> Iterator[Any]:
    """All operations inside one."""
    for region in op.regions:
        for block in region.blocks:
            for inner in block.operations:
                yield inner.operation
                yield from _within(inner.operation)


def _mosaic(config: str, operands: _Shapes) -> Code | None:
    written = re.search(r'"body": ?"([^"]*)"', config)
    if written is None:
        return None
    try:
        module = _parsed(base64.b64decode(written[1], validate=True))
    except binascii.Error:
        raise Unreadable("whose code is garbled") from None
    main = _main(module, "func.func")
    said = main.owner.attributes
    grid: list[int] = list(said["iteration_bounds"]) if "iteration_bounds" in said else []
    if any(size < 0 for size in grid):
        raise Unreadable("of which data says how many programs there are")
    run = Run(grid)
    run.frame.values |= dict(zip(main.arguments, run.numbers, strict=False))  # they come first
    run.block(main, run.frame)
    windows = list(said["window_params"]) if "window_params" in said else []
    prefetched = said["scalar_prefetch"].value if "scalar_prefetch" in said else 0

    def asked(n: int, dims: tuple[int, ...], bits: int) -> int | None:
        """Elements of an operand: by the grid, or by copies that the code starts itself; else it is there at once."""
        window = windows[n - prefetched] if prefetched <= n < prefetched + len(windows) else {}
        if "transform_indices" in window:
            return _fetched(module, window, main, dims, run)
        return None if run.lost_reads else run.read.get(len(grid) + n, math.prod(dims) * bits) // bits

    reads = [asked(n, *operand) for n, operand in enumerate(operands)]
    return Code(run.flops, tuple(n for n in reads if n is not None) if None not in reads else ())


def _fetched(module: Any, window: Any, main: Any, dims: tuple[int, ...], run: Run) -> int | None:
    """Elements of an operand that a TPU's grid fetches: a block whenever it is another than that of the program before.
    None where data says which."""
    name = window["transform_indices"].value
    block = next(op.regions[0].blocks[0] for op in module.body.operations if _name_of(op) == name)
    numbers = Frame(run.frame.times)
    for argument, own in zip(block.arguments, main.arguments, strict=False):
        numbers.values[argument] = run.frame.values.get(own)
    ends = [run.value(index, numbers) for index in list(block.operations)[-1].operands]
    if any(index is None for index in ends):
        return None
    sizes = [int(size) for size in window["window_bounds"]]
    if len(sizes) != len(dims) or len(ends) != len(dims) or not ends:
        return None
    at = np.stack([np.broadcast_to(np.asarray(index), len(run.frame.times)) for index in ends])
    moved = np.append(True, np.any(at[:, 1:] != at[:, :-1], axis=0))
    # A block that ends beyond the array is fetched as far as there is an array.
    there = [np.clip(dim - index * size, 0, size) for dim, index, size in zip(dims, at[:, moved], sizes, strict=True)]
    return int(np.sum(np.prod(np.stack(there), axis=0, dtype=np.int64)))


def _parsed(code: bytes) -> Any:
    """The MLIR module. jaxlib brings the parser and all dialects."""
    from jaxlib.mlir import ir
    from jaxlib.mlir._mlir_libs import _jax_mlir_ext as usual
    from jaxlib.mlir.passmanager import PassManager
    from jaxlib.mosaic.python import mosaic_gpu, tpu
    from jaxlib.triton import dialect as triton

    context = ir.Context()
    context.allow_unregistered_dialects = True
    try:
        usual.register_dialects(registry := ir.DialectRegistry())
        context.append_dialect_registry(registry)
        context.load_all_available_dialects()
        for dialect in (mosaic_gpu, tpu, triton):
            dialect.register_dialect(context)
        module = ir.Module.parse(code, context)
        if "stable_mosaic.version" in module.operation.attributes:
            with context:
                PassManager.parse("builtin.module(mosaic-serde{serialize=false})").run(module.operation)
    except (ir.MLIRError, ValueError, RuntimeError):
        raise Unreadable("whose code this version of jax does not read") from None
    return module


def string(config: str, name: str) -> bytes | None:
    """A string of that name in a config that MLIR wrote, where a backslash stands before two hexadecimal digits, or
    before itself; None where there is none."""
    found = re.search(rf'\b{name} = "((?:[^"\\]|\\.)*)"', config)
    if found is None:
        return None
    raw = found[1].encode("utf-8", "surrogateescape")
    return re.sub(rb"\\([0-9A-Fa-f]{2}|\\)", lambda m: b"\\" if m[1] == b"\\" else bytes([int(m[1], 16)]), raw)


def _main(module: Any, kind: str) -> Any:
    """The body of a module's first function."""
    for op in module.body.operations:
        if op.operation.name == kind and op.regions and len(op.regions[0].blocks) == 1:
            return op.regions[0].blocks[0]
    raise Unreadable("whose code has jumps")


def _name_of(op: Any) -> str:
    return op.attributes["sym_name"].value if "sym_name" in op.attributes else ""
