"""What a custom call costs: kernels of libraries and of authors, of which HLO shows only what goes in and comes out.

A rule is a function from the call to its `Cost`; `register` says for which calls. To add one of your own:

    from stepbill.profiling import Cost, Flops, register

    @register(r"__gpu\\$xla\\.gpu\\.triton|tpu_custom_call", op_name="flash_decode")
    def flash_decode(call):
        q, k, v = (operand.shape for operand in call.operands)
        return Cost(Flops(matmul=4 * q.elements * k.dims[-2]), reads=(None, k.elements // 2, v.elements // 2))

Where no rule knows a call, a Pallas kernel's own estimate counts, which is in the text; without one, its code is
counted, which is there, too (kernel_code.py). Else the bill lists it as unknown, its operands and results being the
lower bound of its bytes.
"""

import json
import math
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from . import kernel_code
from .flops import NOTHING, Flops, convolved, precision, rule
from .hlo import Instruction, Shape

MAX_BLOCKS = 1 << 20  # of queries or keys, in one kernel
DIFFERS = 1.05  # an author's estimate, that much above what the code does, is worth a word


class Cost(NamedTuple):
    """Of one call: its FLOPs, and how many elements of each operand it asks HBM for.

    reads: a number for each operand in order, or None for all of it, once; larger than the operand where some is read
      more than once. () where all are read once. A result is written once.
    """

    flops: Flops
    reads: Sequence[int | None] = ()


CallRule = Callable[[Instruction], Cost | Flops | None]
CALLS: list[tuple[re.Pattern[str], re.Pattern[str], CallRule]] = []


def register(target: str, op_name: str = "") -> Callable[[CallRule], CallRule]:
    """Registers a function as the rule of custom calls.

    Args:
      target: a regular expression that the whole custom_call_target matches.
      op_name: one that is found in the call's op_name, which holds the scopes and the kernel's own name; for targets
        that all kernels of a kind share: `__gpu$xla.gpu.triton`, `tpu_custom_call`.

    The function takes the call, an `hlo.Instruction` (`operands`, each with a `shape`; `shape`; `backend_config`), and
    gives a Cost, or Flops where operands are read once, or None to leave the call to the rules before it. A later
    registration wins, so yours override ours.
    """

    def add(function: CallRule) -> CallRule:
        CALLS.insert(0, (re.compile(target), re.compile(op_name), function))
        return function

    return add


def cost(call: Instruction) -> Cost | None:
    """What a custom call costs; None where nobody knows.

    Raises:
      ValueError: its rule speaks of other operands than it has.
    """
    ruled = _ruled(call)
    if ruled is not None:
        return ruled
    said = _said_flops(call)
    if said is not None:
        return Cost(said, _said_reads(call))
    code = _code(call)
    return None if code is None else Cost(code.flops, _said_reads(call) or code.reads)


def reads(call: Instruction) -> Sequence[int | None]:
    """How many elements of each operand a custom call reads, as `Cost.reads`; what it says, where no rule knows it."""
    found = cost(call)
    return _said_reads(call) if found is None else found.reads


@rule("custom-call")
def _custom_call(call: Instruction) -> Flops | None:
    """What its rule says."""
    found = cost(call)
    return None if found is None else found.flops


def _ruled(call: Instruction) -> Cost | None:
    """By the rule of its kind."""
    target = call.custom_call_target
    for called, named, function in CALLS:
        if called.fullmatch(target) and named.search(call.op_name) and (found := function(call)) is not None:
            made = found if isinstance(found, Cost) else Cost(found, _said_reads(call))
            if made.reads and len(made.reads) != len(call.operands):
                raise ValueError(f"the rule of {target} says {len(made.reads)} reads of {len(call.operands)} operands")
            return made
    return None


def _code(call: Instruction) -> kernel_code.Code | None:
    """What the code of a kernel does, as far as it tells."""
    try:
        return kernel_code.counted(call)
    except kernel_code.Unreadable:
        return None


def kernel(call: Instruction) -> str:
    """A custom call's target; and of kernels written in Pallas, which share one, the name."""
    target, said = call.custom_call_target, re.search(r'\bname = "([^"]*)"', call.backend_config)
    name = said[1] if said else re.sub(r"\.\d+$", "", call.name) if target == "tpu_custom_call" else ""
    return f"{target}, the kernel {name}" if name else target


def unknown(call: Instruction) -> str:
    """Why nobody knows what a custom call costs."""
    if call.custom_call_target in PYTHON:
        return "calls back into Python: what that does and takes is in no text"
    reason = f"no rule for custom call {kernel(call)}"
    try:
        kernel_code.counted(call)
    except kernel_code.Unreadable as error:
        return f"{reason}, {error}"
    return reason


def remark(call: Instruction) -> str | None:
    """What a reader has to know of a kernel's cost: that it is counted in its code; or that its author's estimate,
    which is billed, is not what the code does."""
    if "cost_estimate" in kernel_metadata(call) or _ruled(call) is not None or (code := _code(call)) is None:
        return None
    said = _said_flops(call)
    does = code.flops.matmul
    if said is None:
        return f"counted in its own code, for it says nothing of its cost: {kernel(call)}"
    if does <= said.matmul <= (does + code.flops.elementwise) * DIFFERS:
        return None
    return f"billed as its author estimates, {said.matmul:,} FLOPs; its code does {does:,} in products: {kernel(call)}"


# --- what a kernel says of itself ---------------------------------------------------------------------------------


def kernel_metadata(call: Instruction) -> dict[str, str]:
    """What a Pallas kernel says of itself by `pallas_call(metadata=...)`; {} where it says nothing.

    Read here: "cost_estimate", the JSON of a pallas.CostEstimate, whose `flops` are taken to be those of products, with
    `elementwise` ones beside them, if it has any; "operand_reads", how many elements of each operand the kernel reads,
    comma-separated ("" for an operand: all, once); "rows", that each weight of a product meets; "waves", the JSON of
    `Waves`.
    """
    mosaic = re.search(r"kernel_metadata=(\{.*?\})\}", call.attributes)
    text = mosaic[1] if mosaic else kernel_code.string(call.backend_config, "serialized_metadata")
    if text is None:
        return {}
    try:
        return json.loads(text)
    except ValueError:
        return {}


def _said_flops(call: Instruction) -> Flops | None:
    """A Pallas kernel's CostEstimate: Mosaic's (TPU) is in the text anyhow, Triton's (GPU) as metadata. Less than none
    means that the author does not know."""
    estimate = re.search(r'"cost_estimate":\{([^}]*)\}', call.backend_config)
    said = (estimate[1] if estimate else "") + kernel_metadata(call).get("cost_estimate", "")
    numbers = {key: int(value) for key, value in re.findall(r'"(\w+)": ?"?(-?\d+)"?', said)}
    found = numbers.get("flops", -1), numbers.get("elementwise", 0), numbers.get("transcendentals", 0)
    return Flops(*found, precision(call)) if min(found) >= 0 else None


def _said_reads(call: Instruction) -> Sequence[int | None]:
    said = kernel_metadata(call).get("operand_reads")
    counts = [] if said is None else said.split(",")
    if len(counts) != len(call.operands) or not all(count.isdigit() or not count for count in counts):
        return ()
    return [int(count) if count else None for count in counts]


def is_matmul_of_library(call: Instruction) -> bool:
    """Whether it is one product of its first two operands, by a library of NVIDIA's."""
    return call.opcode == "custom-call" and call.custom_call_target.startswith("__cublas$")


def said_rows(call: Instruction) -> int | None:
    """How many rows each weight of a kernel meets, where it says so."""
    said = kernel_metadata(call).get("rows", "") if call.opcode == "custom-call" else ""
    return int(said) if said.isdigit() else None


class Waves(NamedTuple):
    """What programs that run beside each other go over together, each from one end to the other.

    programs: in a row of the grid.
    rows: the bytes that the programs of each row go over, in the order in which they start.
    whole: bytes of all arrays that are gone over so.
    times: how often there is all this, of other arrays each time: of a batch.
    """

    programs: int
    rows: tuple[int, ...]
    whole: int
    times: int


def said_waves(call: Instruction) -> Waves | None:
    """The waves of a kernel that says so."""
    try:
        said = json.loads(kernel_metadata(call).get("waves", "")) if call.opcode == "custom-call" else {}
        found = Waves(int(said["programs"]), tuple(map(int, said["rows"])), int(said["whole"]), int(said["times"]))
    except (ValueError, TypeError, LookupError):
        return None
    return found if found.rows and found.programs > 0 and min(*found.rows, found.whole, found.times) >= 0 else None


# --- names and moves ----------------------------------------------------------------------------------------------

# Markers and allocations: no kernel runs. Source: read in compiled programs of the three backends.
FREE_CALLS = re.compile(
    r"ConcatBitcast|AsyncCollective\w+|AllocateBuffer|AssumeGatherIndicesInBound|Sharding|SPMD\w+|BitcastConvert"
    r"|annotate_device_placement|PinToDevice|PinToHost|MoveToHost|MoveToDevice|LayoutConstraint|PrepareAsyncCall\w+"
)


@register(FREE_CALLS.pattern)
def _free_call(call: Instruction) -> Flops:
    """Nothing."""
    del call
    return NOTHING


# jax.pure_callback, io_callback, jax.debug.print: what Python does with the arrays that it is given, and how long the
# program waits for it, is in no text. A TPU sends and receives instead.
FROM_A_GPU = ("xla_ffi_python_gpu_callback", "xla_ffi_partitioned_python_gpu_callback")
PYTHON = (*FROM_A_GPU, *(name.replace("gpu", "cpu") for name in FROM_A_GPU))


@register("GatherScatterIndicesBitpacked")
def _pack_indices(call: Instruction) -> Flops:
    """The indices of a TPU's gather, several in one word."""
    del call
    return NOTHING


@register("X64SplitLow|X64SplitHigh")
def _split_64_bits(call: Instruction) -> Cost:
    """A TPU computes in 32 bits: the halves of a complex or 64-bit array, each copied from its half of the array.
    (Copied: XLA's buffer assignment gives each half a buffer of its own.)"""
    return Cost(NOTHING, reads=[call.operands[0].shape.elements // 2])


@register("X64Combine")
def _combine_64_bits(call: Instruction) -> Flops:
    """Halves, copied into one array."""
    del call
    return NOTHING


# --- matmuls and convolutions -------------------------------------------------------------------------------------


def _gemm(call: Instruction, lhs: Shape, out: Shape, contracting: Sequence[int]) -> Flops:
    contracted = math.prod(lhs.dims[d] for d in contracting)
    return Flops(2 * out.elements * contracted, precision=precision(call))


_LIBRARIES = re.compile(r"__(cublas|cudnn|onednn)\$.*")


def workspace(call: Instruction) -> frozenset[int]:
    """Which leaves of a library call's result are room to work in, bytes in a row after the results.

    Whether it writes there, and how much, depends on the algorithm; nobody reads it after. cuBLAS is offered 32 MiB
    for any product: an H200 takes 3 us for one that would then write for 7 (BUILD_NOTES.md, stop 10)."""
    leaves = call.shape.leaves
    if len(leaves) < 2 or not _LIBRARIES.fullmatch(call.custom_call_target):
        return frozenset()
    last = leaves[-1]
    return frozenset([len(leaves) - 1] if last.dtype in ("s8", "u8") and len(last.dims) == 1 else [])


class Epilogue(NamedTuple):
    """What a library does with each element of a product before it writes it.

    elementwise, transcendental: FLOPs an element. nonlinear: whether an activation function is among it.
    """

    elementwise: int = 0
    transcendental: int = 0
    nonlinear: bool = False


# By XLA's names, as XLA would compute them: `gelu` is the one by tanh.
_ACTIVATIONS = {
    "relu": (1, 0),
    "gelu": (8, 1),
    "silu": (1, 1),
    "relu6": (2, 0),
    "elu": (2, 1),
    "leakyrelu": (2, 0),
}


def epilogue(call: Instruction) -> Epilogue:
    """Of a product by cuBLAS or a convolution by cuDNN: a bias, another array that is added, an activation function."""
    if not _LIBRARIES.fullmatch(call.custom_call_target):
        return Epilogue()
    said = dict(re.findall(r'"(epilogue|beta|activation_mode|side_input_scale)":"?([\w.+-]+)', call.backend_config))
    words = [*said.get("epilogue", "").lower().split("_"), said.get("activation_mode", "").lower().removeprefix("k")]
    has_bias = "bias" in words or ("BiasActivation" in call.custom_call_target and len(call.operands) > 2)
    is_added = any(said.get(name, "0").strip("0.") for name in ("beta", "side_input_scale"))
    activation = next((word for word in words if word in _ACTIVATIONS), None)
    elementwise, transcendental = _ACTIVATIONS.get(activation or "", (0, 0))
    return Epilogue(elementwise + has_bias + is_added, transcendental, activation is not None)


def _with_epilogue(call: Instruction, product: Flops) -> Flops:
    after, elements = epilogue(call), call.shape.leaves[0].elements
    return product._replace(
        elementwise=product.elementwise + after.elementwise * elements,
        transcendental=product.transcendental + after.transcendental * elements,
    )


@register(r"__cublas\$gemm|__cublas\$lt\$.*|__triton_gemm")
def _cublas(call: Instruction) -> Flops:
    """2 x product elements x contracted sizes, and the epilogue. The result's first leaf is the product, the rest
    workspace."""
    try:
        config = json.loads(call.backend_config)
        gemm = next(value for key, value in config.items() if key.endswith("gemm_backend_config"))
        contracting = [int(d) for d in gemm["dot_dimension_numbers"]["lhs_contracting_dimensions"]]
    except (ValueError, KeyError, StopIteration):
        contracting = [-1]
    return _with_epilogue(call, _gemm(call, call.operands[0].shape, call.shape.leaves[0], contracting))


@register(r"__onednn\$matmul.*|__onednn\$.*dot.*")
def _onednn(call: Instruction) -> Flops:
    """2 x product elements x contracted size."""
    transposed = '"transpose_a":true' in call.backend_config.replace(" ", "")
    return _gemm(call, call.operands[0].shape, call.shape.leaves[0], [-2 if transposed else -1])


@register(r"__cudnn\$blockScaledDot|__op\$block_scaled_dot")
def _block_scaled_dot(call: Instruction) -> Flops:
    """[B,M,K] x [B,N,K], each with a scale for every 16 or 32 along K: 2 x product elements x K. The scales are applied
    inside the matrix units (a B200's) and are not counted."""
    return _gemm(call, call.operands[0].shape, call.shape.leaves[0], [-1])


@register(r"__cudnn\$conv.*")
def _cudnn_convolution(call: Instruction) -> Flops:
    """As the convolution that it replaced, whose window= and dim_labels= it keeps, forward or backward."""
    first, second, result = (shape.dims for shape in (*(o.shape for o in call.operands[:2]), call.shape.leaves[0]))
    if "BackwardInput" in call.custom_call_target:
        return convolved(call, result, second, first)
    if "BackwardFilter" in call.custom_call_target:
        return convolved(call, first, result, second)
    return _with_epilogue(call, convolved(call, first, second, result))


@register("tpu_custom_call", op_name=r"(^|/)ragged-dot-metadata")
def _ragged_dot_metadata(call: Instruction) -> Flops:
    """Where each group of a TPU's ragged_dot begins, and which tiles it meets: a few integers. (The product itself,
    `ragged-dot-none`, carries XLA's estimate: the routed FLOPs.)"""
    return Flops(elementwise=sum(leaf.elements for leaf in call.shape.leaves))


# --- attention ----------------------------------------------------------------------------------------------------


@register(r"__cudnn\$fmha.*")
def _cudnn_attention(call: Instruction) -> Flops:
    """4 B N T S H forward, 2.5 times that backward, halved where the mask is causal (the kernel skips the rest).

    Q is [B,T,N,H] or [B,N,T,H]; T x S comes from the intermediate tensor that the config names.
    """
    config = call.backend_config
    query = call.operands[0].shape
    found = re.search(r'"intermediate_tensor_shape":\{[^{}]*"dimensions":\[([^\]]*)\]', config)
    heads_queries_keys = [int(n) for n in re.findall(r"\d+", found[1])] if found else []
    scores = math.prod(heads_queries_keys) if heads_queries_keys else query.elements // query.dims[-1] * query.dims[1]
    work = 4 * scores * query.dims[-1]
    if "Backward" in call.custom_call_target:
        work = work * 5 // 2
    if '"mask_type":"CAUSAL"' in config.replace(" ", ""):
        work //= 2
    return Flops(work, transcendental=scores)


# jax's flash attention for TPUs: how wide the products are together that a kernel makes of a query and a key, H and V
# wide; and what its metadata calls its blocks.
_SPLASH = {
    "fwd": (lambda H, V: H + V, "block_q", "block_kv"),
    "dq": (lambda H, V: 2 * H + V, "block_q_dq", "block_kv_dq"),
    "dkv": (lambda H, V: 2 * H + 2 * V, "block_q_dkv", "block_kv_dkv"),
}


@register("tpu_custom_call")
def _splash_attention(call: Instruction) -> Flops | None:
    """Of the blocks of queries and keys that it does not skip; it carries no estimate of its own.

    Which they are says a constant, of which HLO text has only the shape: [heads, blocks, the most that one of them
    meets]. Where some are masked in part, by the positions of queries or by blocks of a mask, they are taken to be
    those of a causal mask, over a window if one meets fewer than there are; else each is taken to meet as many.
    """
    name = re.search(r"splash_m[hq]a_(fwd|dq|dkv)_", call.op_name)
    said = json.loads(kernel_metadata(call).get("xprof_metadata", "{}"))
    shapes = [operand.shape for operand in call.operands]
    arrays = [shape for shape in shapes if shape.dtype in ("f32", "bf16", "f16")][:3]
    if name is None or len(arrays) < 3 or any(said.get(f"{letter}_layout") != 1 for letter in "qkv"):
        return None
    (*_, queries, H), (*_, keys, _), (*_, V) = (shape.dims for shape in arrays)
    products, *blocks = _SPLASH[name[1]]
    side_q, side_k = (said[block] for block in blocks)
    down, across = queries // side_q, keys // side_k
    if max(down, across) > MAX_BLOCKS:
        return None
    # Positions of queries are [T,128] or [8,T]; so are the two arrays of segments, if there are any.
    rest = shapes[next(n for n, shape in enumerate(shapes) if shape is arrays[2]) + 1 :]
    in_part = sum(shape.dtype == "s32" and len(shape.dims) == 2 for shape in rest) % 2
    in_part += any(shape.dtype[0] in "psu" and len(shape.dims) == 3 for shape in rest)
    most = shapes[0].dims[-2 if name[1] == "dkv" else -1] if shapes[0].dtype[0] == "s" else max(down, across)
    if name[1] == "dkv":
        met = sum(min(down - n * side_k // side_q if in_part else down, most) for n in range(across))
    else:
        met = sum(min(-(-(n + 1) * side_q // side_k) if in_part else across, most) for n in range(down))
    pairs = arrays[0].elements // (queries * H) * met * side_q * side_k
    precision = "f32" if arrays[0].dtype == "f32" else "bf16"
    return Flops(2 * pairs * products(H, V), transcendental=pairs, precision=precision)


# --- sorting ------------------------------------------------------------------------------------------------------


@register(r"TopK|__gpu\$TopK|PartialReduce")
def _top_k(call: Instruction) -> Flops:
    """One comparison a value. PartialReduce is a TPU's approx_max_k: the best of each bin."""
    return Flops(elementwise=call.operands[0].shape.elements)
