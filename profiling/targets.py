"""Compiling for a chip without having it: its devices, what the compiler makes of a program, whether that fits.

jax is imported inside the functions: `prepare` must run before jax chooses its backends.
"""

import ctypes
import glob
import importlib.util
import inspect
import math
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from . import absent, assembler, kept
from .absent import COUNTS, GPUS_PER_HOST
from .chips import CHIPS, GIB, Chip, chip
from .memory import Plan, assignment_of, constant_bytes
from .xla_cost import Totals, totals

MESH_AXES = ("data", "expert", "tensor")  # what a mesh of chips can be split by, see model/axes.py


class MissingExtra(Exception):
    """The compiler for the target is not installed; the text is one line with the pip command."""


class DoesNotFit(Exception):
    """The program needs more memory than the chip has.

    needs_bytes, has_bytes: per chip.
    """

    def __init__(self, needs_bytes: int, has_bytes: int, target: str):
        self.needs_bytes, self.has_bytes, self.target = needs_bytes, has_bytes, target
        super().__init__(
            f"does not fit: it needs {needs_bytes / GIB:.2f} GiB a chip, {target} has {has_bytes / GIB:.2f} GiB"
        )


class CompileError(Exception):
    """The compiler refused the program for another reason; the text carries what it printed."""


# By these a TPU is told from files, before jax is there to ask.
_TPU_PCI_IDS = {"v4": "0x005e", "v5e": "0x0063", "v5p": "0x0062", "v6e": "0x006f", "tpu7x": "0x0076"}

# What some versions of XLA say where they find no way to make a product by Triton, which they only know by trying.
_NO_PRODUCT = r"No supported config found|Couldn't find output tile sizes"
_TRITON = "xla_gpu_enable_triton_gemm"

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX, _MOST = -1, -3, -8, 2**31 - 1  # glibc's

_EXTRAS = {"tpu": ("libtpu",), "cuda": ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12")}
_TOOLS = ("cu13", "cuda_nvcc")  # folders of pip's nvidia-cuda-nvcc, and of nvidia-cuda-nvcc-cu12
_USUAL_PTXAS = ("/usr/local/cuda/bin/ptxas", "/opt/cuda/bin/ptxas")  # where XLA looks, too


# --- getting at devices --------------------------------------------------------------------------------------------


def require(target: str) -> None:
    """Raises MissingExtra where the compiler for `target` is not installed. Imports nothing of it."""
    it = chip(target)
    modules = _EXTRAS.get(it.platform, ())
    is_there = not modules or any(_installed(module) for module in modules)
    if it.platform == "cuda" and not _attached(it):
        has_ptxas = shutil.which("ptxas") or any(map(os.path.exists, _USUAL_PTXAS)) or _told_tools()
        is_there = is_there and (cuda_tools() is not None or has_ptxas)
    if not is_there:
        raise MissingExtra(f"target {target} needs its compiler: pip install 'stepbill[{it.platform}]'")


def cuda_tools() -> Path | None:
    """The folder of CUDA's own tools that the extra installs; None where it is not installed.

    XLA has ptxas assemble each kernel, which no GPU will run, and stops without it.
    """
    found = importlib.util.find_spec("nvidia")  # no package but a name that several share
    places = [Path(place) / name for place in (found and found.submodule_search_locations) or () for name in _TOOLS]
    return next((place for place in places if (place / "bin" / "ptxas").exists()), None)


def prepare(target: str, chips: int = 1) -> None:
    """Settles how jax starts. Call it once, before anything touches jax's backends (importing jax is no harm).

    Without the chip at hand jax is kept to the CPU, so that no other accelerator is taken by a mere compilation.
    chips: on the host, CPU devices to make, which only works before the backends start.
    Raises ValueError, MissingExtra.
    """
    it = chip(target)
    require(target)
    _check_count(it, chips)
    if it.platform == "cuda" and not _attached(it):
        # Else the plugin looks for cuDNN and friends, which compiling does not need.
        os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
    if it.platform == "tpu" and not _attached(it):
        # libtpu asks the network and the environment what host it is on, at length; and it locks the machine for one
        # process at a time, which protects a TPU where there is one.
        for name, value in (
            ("TPU_ACCELERATOR_TYPE", "v5litepod-1"),
            ("TPU_WORKER_HOSTNAMES", "localhost"),
            ("TPU_WORKER_ID", "0"),
            ("TPU_SKIP_MDS_QUERY", "1"),
            ("TPU_LOG_DIR", "disabled"),
            ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1"),
        ):
            os.environ.setdefault(name, value)
    if it.platform == "cpu" or not _attached(it):
        _configure("jax_platforms", "cpu")
    if it.platform == "cpu" and chips > 1 and "--xla_force_host_platform_device_count" not in _xla_flags():
        with suppress(RuntimeError):  # the backends have started; `devices` says whether they have enough
            _configure("jax_num_cpu_devices", chips)


def keep_memory() -> None:
    """Has the C library of this process keep the memory that programs free; for commands that run steps on the host.

    XLA on a CPU allocates a program's temporaries anew in every run. Where they are large, the GNU C library gets them
    from the system and gives them back, and each page costs a fault of about a microsecond: measured, that was three
    quarters of a decode step of 300 million parameters. Elsewhere than on that library this does nothing.
    Source: mallopt(3); the numbers are those of glibc's malloc.h.
    """
    with suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        for parameter, value in ((_M_ARENA_MAX, 1), (_M_MMAP_THRESHOLD, _MOST), (_M_TRIM_THRESHOLD, _MOST)):
            mallopt(parameter, value)


def present(target: str, chips: int = 1) -> bool:
    """Whether jax can run on that many of these chips in this process. Starts jax's backends."""
    return len(_local(chip(target))) >= chips


def here() -> str:
    """The chip of this machine, or "host" where there is none that is known."""
    return next((name for name, it in CHIPS.items() if it.platform != "cpu" and _attached(it)), "host")


def describe(target: str, chips: int = 1) -> str:
    """How a program for that many chips gets compiled here: a line for the bill."""
    it = chip(target)
    if it.platform == "cpu":
        return "compiled on this host's CPU: no proxy for HBM traffic (no caches modelled; bfloat16 may be float32)"
    if present(target, chips):
        return f"compiled on the {it.title} at hand"
    what = it.title if chips == 1 or not _local(it) else f"{it.title} x {chips}"
    choices = ", default kernel choices (no autotuning)" if it.platform == "cuda" else ""
    return f"{what} not present: compiled from its description{choices}"


def devices(target: str, chips: int = 1) -> list[Any]:
    """jax devices to compile for: real ones where there are enough, else the compiler's idea of them.

    chips: how many devices. One of COUNTS; on NVIDIA any number up to 8, or a multiple of 8; on the host, as many as
      `prepare` made.
    Raises ValueError naming the number and what is right, MissingExtra.
    """
    it = chip(target)
    _check_count(it, chips)
    local = _local(it)
    if len(local) >= chips:
        return local[:chips]
    if it.platform == "cpu":
        raise ValueError(f"chips is {chips}; this process has {len(local)} host devices, fixed when jax started")
    require(target)
    with quiet():
        return absent.devices(it, chips)


def mesh(target: str, axes: Mapping[str, int]) -> Any:
    """A jax.sharding.Mesh with all of MESH_AXES (1 where not given), the last on neighbouring chips."""
    import numpy as np
    from jax.experimental import mesh_utils
    from jax.sharding import AxisType, Mesh

    wrong = set(axes) - set(MESH_AXES)
    if wrong:
        raise ValueError(f"mesh axis is {min(wrong)!r}; it must be one of {', '.join(MESH_AXES)}")
    for axis, size in axes.items():
        if size < 1:
            raise ValueError(f"mesh axis {axis} is {size}; it must be at least 1")
    shape = tuple(axes.get(axis, 1) for axis in MESH_AXES)
    found = devices(target, math.prod(shape))
    it = chip(target)
    if it.platform == "tpu":
        # The cores of one chip stay together (jax 0.10 would deal them to different tensor groups).
        inner = max((axis for axis, size in enumerate(shape) if size % it.cores == 0), default=None)
        if inner is None:
            grid = mesh_utils.create_device_mesh(shape, found, allow_split_physical_axes=True)
        else:
            whole = [size // (it.cores if axis == inner else 1) for axis, size in enumerate(shape)]
            grid = mesh_utils.create_device_mesh(whole, found[:: it.cores], allow_split_physical_axes=True)
            number = {device: n for n, device in enumerate(found)}
            cores = np.array([[found[number[chip] + core] for core in range(it.cores)] for chip in grid.flat])
            grid = np.moveaxis(cores.reshape(*whole, it.cores), -1, inner + 1).reshape(shape)
    else:
        grid = np.array(found).reshape(shape)  # numbered host by host
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def place(tree: Any, target: str) -> Any:
    """Arrays and ShapeDtypeStructs -> ShapeDtypeStructs on one chip; what has a mesh already, and the rest, stays."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import NamedSharding, SingleDeviceSharding

    here = SingleDeviceSharding(devices(target)[0])

    def abstract(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array | np.ndarray | jax.ShapeDtypeStruct):
            return leaf
        if isinstance(leaf, jax.ShapeDtypeStruct) and isinstance(leaf.sharding, NamedSharding):
            return leaf
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.extended)
        dtype = leaf.dtype if is_key else jax.dtypes.canonicalize_dtype(leaf.dtype)
        weak = getattr(leaf, "weak_type", False)
        return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=here, weak_type=weak)

    return jax.tree.map(abstract, tree)


# --- compiling -----------------------------------------------------------------------------------------------------


def lower(program: Any, target: str, *args: Any, **kwargs: Any) -> Any:
    """A jitted function of `args`, arrays or ShapeDtypeStructs, as a jax.stages.Lowered: on one chip of `target`, or
    where they are on a mesh, on that."""
    if type(program).__module__.partition(".")[0] == "equinox":
        program, args, kwargs = _of_arrays(program, args, kwargs)
    args, kwargs = place(args, target), place(kwargs, target)
    it = chip(target)
    if it.platform == "cpu" or _local(it):
        return program.lower(*args, **kwargs)
    import jax

    with absent.gpu_known() if it.platform == "cuda" else nullcontext():
        try:
            return program.lower(*args, **kwargs)
        except (RuntimeError, ValueError) as error:
            if not re.search("use_abstract_mesh|Unsupported TPU device kind", str(error)):
                raise
            # A kernel in Pallas that asks which chip it is for: every one for a GPU from jax 0.12 on, and those for a
            # TPU that do something else on another. Others are better without: a program may do something else on a
            # mesh.
            shardings = (getattr(x, "sharding", None) for x in jax.tree.leaves((args, kwargs)))
            meshes = (getattr(sharding, "mesh", None) for sharding in shardings)
            on = next(filter(None, meshes), None) or mesh(target, {})
            with jax.sharding.use_abstract_mesh(on.abstract_mesh):
                return program.lower(*args, **kwargs)


def _of_arrays(program: Any, args: Any, kwargs: Any) -> tuple[Any, Any, Any]:
    """What Equinox has jitted, and its arguments, for jax itself. To both, what is no array is part of the program; to
    Equinox the shape of an array is none."""
    import jax
    import numpy as np

    def is_array(leaf: Any) -> bool:
        return isinstance(leaf, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct)

    def arrays(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf if is_array(leaf) else None, tree)

    def whole(*given: Any, **named: Any) -> Any:
        leaves, tree = jax.tree.flatten((args, kwargs))
        of_arrays = iter(jax.tree.leaves((given, named)))
        again = jax.tree.unflatten(tree, [next(of_arrays) if is_array(leaf) else leaf for leaf in leaves])
        return arrays(program(*again[0], **again[1]))

    with suppress(AttributeError, TypeError, ValueError):  # by the names of its arguments a bill tells their roles
        whole.__signature__ = inspect.signature(program.__wrapped__)  # pyright: ignore[reportFunctionMemberAccess]
    return jax.jit(whole), arrays(args), arrays(kwargs)


def platform(program: Any) -> str | None:
    """What a jax.stages.Lowered or Compiled, or Flax's or Equinox's, is for: "cpu", "cuda", "tpu"; None: not known."""
    import jax

    lowering = getattr(_of_jax(program), "_lowering", None)
    if found := getattr(lowering, "_platforms", None):
        return found[0]
    with suppress(Exception):  # what some programs do not say
        shardings = jax.tree.leaves((program.input_shardings, program.output_shardings))
        said = next(device.platform for sharding in shardings for device in sharding.device_set)
        return {"gpu": "cuda"}.get(said, said)
    return None


def _of_jax(lowered: Any) -> Any:
    """The jax.stages.Lowered in one of Flax or Equinox."""
    return getattr(lowered, "lowered", lowered)


@dataclass(frozen=True)
class Compilation:
    """An optimised program and what the compiler says of it.

    text: the optimised HLO. memory: None where the compiler does not say.
    xla: XLA's own cost analysis, None where it gives none (a GPU that is not there).
    lower_seconds: None where the program came lowered. how: `describe` of it.
    compiled: the jax.stages.Compiled; it runs only on chips that are present.
    """

    text: str
    memory: Plan | None
    xla: Totals | None
    lower_seconds: float | None
    compile_seconds: float
    chips: int
    how: str
    compiled: Any = field(repr=False)


def compile(
    program: Any,
    target: str,
    *args: Any,
    options: Mapping[str, Any] | None = None,
    runs: bool = True,
    **kwargs: Any,
) -> Compilation:
    """Compiles a jax.stages.Lowered, or a jitted function of `args` on one chip, for `target`.

    options: XLA's, for this compilation alone.
    runs: whether it is to be run, where the chip is here. If not, the backend makes machine code without taking pains:
      on a CPU and for a GPU that spares a third of the compiler's work or more, and HLO and plan come out the same.
    Raises DoesNotFit (TPU: the compiler refuses; NVIDIA: it does not, so its memory plan is checked here; on the host
    nothing is checked, its memory is not the model's), MissingExtra, CompileError.
    """
    it = chip(target)
    lower_seconds = None
    if not hasattr(program, "compile"):
        start = time.perf_counter()
        program = lower(program, target, *args, **kwargs)
        lower_seconds = time.perf_counter() - start
    program = _of_jax(program)
    chips = _partitions(program)
    # As an option of this one compilation, not in XLA_FLAGS: the user's own flags stay, and the text comes out equal.
    chosen, further = dict(options or {}), dict[str, Any]()
    absent_gpu = it.platform == "cuda" and not present(target, chips)
    if absent_gpu:
        chosen["xla_gpu_autotune_level"] = 0
    if absent_gpu or (it.platform == "cpu" and not runs):
        chosen.setdefault("xla_backend_optimization_level", 0)
    start = time.perf_counter()
    with quiet() as noise:
        if absent_gpu and (tools := cuda_tools()) and not _told_tools():  # not some toolkit that lies on this machine
            if _may_tell("xla_gpu_cuda_data_dir"):
                tools = assembler.stand_in(tools, noise.parent)
            chosen.setdefault("xla_gpu_cuda_data_dir", str(tools))
        if _may_tell("xla_dump_to"):
            chosen |= {"xla_dump_to": str(noise.parent), "xla_dump_hlo_as_proto": True}
        try:
            if absent_gpu:
                compiled, further = _for_absent_gpu(program, it.name, chosen)
            else:
                compiled = program.compile(compiler_options=chosen or None)
        except Exception as error:
            raise _translated(error, it, noise) from error
        compile_seconds = time.perf_counter() - start
        assignment = _assignment(noise.parent)
    memory = plan(compiled, target, assignment)
    if it.platform == "cuda" and it.usable_hbm_bytes and memory and memory.needed > it.usable_hbm_bytes:
        raise DoesNotFit(memory.needed, it.usable_hbm_bytes, target)
    shown = {**(options or {}), **further}
    return Compilation(
        text=compiled.as_text(),
        memory=memory,
        xla=totals(compiled),
        lower_seconds=lower_seconds,
        compile_seconds=compile_seconds,
        chips=chips,
        how=", ".join([describe(target, chips), *(f"{name}={value}" for name, value in shown.items())]),
        compiled=compiled,
    )


def _for_absent_gpu(program: Any, name: str, options: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The program compiled for a GPU of this name that is not there, and the options that this took beside those."""
    arguments = getattr(getattr(program, "_lowering", None), "compile_args", {})
    callbacks = arguments.get("host_callbacks")
    if callbacks:  # which nobody will call, and which a compiler without a device refuses
        arguments["host_callbacks"] = []
    keeps = _may_tell("xla_gpu_kernel_cache_file")

    def compiled(options: Mapping[str, Any]) -> Any:
        return _with_kept_kernels(program, name, options) if keeps else program.compile(compiler_options=options)

    try:
        return compiled(options), {}
    except Exception as error:
        if _TRITON in options or not re.search(_NO_PRODUCT, str(error)):
            raise
        further = {_TRITON: False}  # NVIDIA's libraries have all products
        return compiled({**options, **further}), further
    finally:
        if callbacks:
            arguments["host_callbacks"] = callbacks


def _with_kept_kernels(program: Any, name: str, options: Mapping[str, Any]) -> Any:
    """The program compiled for a GPU of this name that is not there, of kernels that were made before where it can be.

    HLO and plan are those of a compilation without them: kernels are made when the program is finished.
    """
    # Other versions of XLA may make other kernels of the same computation.
    with kept.kernels(f"{name}-{metadata.version('jaxlib')}") as file:
        chosen = {**options, "xla_gpu_kernel_cache_file": str(file)}
        try:
            return program.compile(compiler_options=chosen)
        except Exception:
            if not file.exists():
                raise
            file.unlink()  # what XLA cannot read shall not refuse a program
            return program.compile(compiler_options=chosen)


def plan(compiled: Any, target: str, assignment: bytes = b"") -> Plan | None:
    """What the compiler says of a jax.stages.Compiled; None where it says nothing.

    assignment: its BufferAssignmentProto, where it is at hand.
    """
    stats = compiled.memory_analysis()
    if stats is None:
        return None
    # TPU's compiler has constants in its code; the others load them beside it and count them nowhere.
    constants = 0 if chip(target).platform == "tpu" or not assignment else constant_bytes(assignment)
    return Plan(
        stats.argument_size_in_bytes,
        stats.output_size_in_bytes,
        stats.temp_size_in_bytes,
        stats.alias_size_in_bytes,
        stats.generated_code_size_in_bytes,
        getattr(stats, "peak_memory_in_bytes", None) or None,
        constants,
        assignment,
    )


def _may_tell(option: str) -> bool:
    """Whether the compiler may be told where files are: not where the user has told it, nor where jax keeps compiled
    programs, to which one with other options is another program."""
    import jax

    return option not in _xla_flags() and jax.config.values["jax_compilation_cache_dir"] is None


def _assignment(folder: Path) -> bytes:
    """The BufferAssignmentProto in a dump of one program; b"" where there is none."""
    dumps = sorted(folder.glob("*after_optimizations.hlo.pb"), key=lambda path: path.stat().st_size)
    return assignment_of(dumps[-1].read_bytes()) if dumps else b""


def _translated(error: Exception, it: Chip, noise: Path) -> Exception:
    text = str(error)
    size = r"([\d.]+)([KMGT]?)"
    found = re.search(rf"\({size}\) exceeds available HBM \({size}\)", text)
    found = found or re.search(rf"Used {size} of {size} hbm", text)
    if "RESOURCE_EXHAUSTED" in text and found:
        return DoesNotFit(_bytes(found[1], found[2]), _bytes(found[3], found[4]), it.name)
    printed = noise.read_text(errors="replace")[-2000:].strip()
    return CompileError(f"{it.title}: {text}" + (f"\n{printed}" if printed else ""))


def _bytes(number: str, unit: str) -> int:
    return round(float(number) * 1024 ** " KMGT".index(unit or " "))


def _partitions(lowered: Any) -> int:
    attributes = lowered.compiler_ir().operation.attributes
    names = [name for name in ("mhlo.num_partitions", "mhlo.num_replicas") if name in attributes]
    return math.prod(attributes[name].value for name in names)


@contextmanager
def quiet() -> Iterator[Path]:
    """Sends what C++ writes to standard error into a file, whose path it gives; STEPBILL_VERBOSE=1 lets it through.

    Python's own sys.stderr (a progress bar, say) still reaches the terminal.
    """
    with tempfile.TemporaryDirectory() as folder:
        noise = Path(folder) / "stderr"
        noise.touch()
        if os.environ.get("STEPBILL_VERBOSE"):
            yield noise
            return
        python_stderr = sys.stderr
        python_stderr.flush()
        saved = os.dup(2)
        try:
            is_the_terminal = python_stderr.fileno() == 2
        except (AttributeError, OSError, ValueError):  # replaced by something that is no file
            is_the_terminal = False
        if is_the_terminal:
            sys.stderr = os.fdopen(saved, "w", buffering=1, closefd=False)
        try:
            with noise.open("wb") as file:
                os.dup2(file.fileno(), 2)
            yield noise
        finally:
            sys.stderr.flush()
            os.dup2(saved, 2)
            sys.stderr = python_stderr
            os.close(saved)


# --- what is there -------------------------------------------------------------------------------------------------


def _check_count(it: Chip, chips: int) -> None:
    if it.platform == "cuda":
        if chips < 1 or (chips > GPUS_PER_HOST and chips % GPUS_PER_HOST):
            raise ValueError(f"chips is {chips}; {it.name} takes 1 to {GPUS_PER_HOST}, or whole hosts of 8")
    elif it.platform == "tpu":
        counts = [count * it.cores for count in COUNTS]
        if chips not in counts and chips not in COUNTS:
            raise ValueError(f"chips is {chips}; {it.name} takes a power of two up to {counts[-1]}")
    elif chips < 1:
        raise ValueError(f"chips is {chips}; it must be at least 1")


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package that would hold it
        return False


def _attached(it: Chip) -> bool:
    """Whether this machine seems to have such a chip and the user lets jax have it: told by files, without jax."""
    wanted = os.environ.get("JAX_PLATFORMS", "")
    if "jax" in sys.modules:
        wanted = sys.modules["jax"].config.jax_platforms or ""
    aliases = {"cuda": ("cuda", "gpu"), "tpu": ("tpu",), "cpu": ("cpu",)}[it.platform]
    if wanted and not any(alias in wanted.split(",") for alias in aliases):
        return False
    if it.platform == "cpu":
        return True
    if it.platform == "tpu":
        folders = [Path(vendor).parent for vendor in glob.glob("/sys/bus/pci/devices/*/vendor")]
        ids = [[(folder / name).read_text().strip() for name in ("vendor", "device")] for folder in folders]
        return ["0x1ae0", _TPU_PCI_IDS[it.name]] in ids
    models = [Path(path).read_text() for path in glob.glob("/proc/driver/nvidia/gpus/*/information")]
    if models:
        return any(re.search(rf"^Model:\s+{re.escape(kind)}\s*$", text, re.M) for text in models for kind in it.kinds)
    return os.path.exists("/dev/nvidiactl")


def _local(it: Chip) -> list[Any]:
    """The chips of this kind that jax can run on."""
    if not _attached(it):
        return []
    import jax

    with quiet():
        try:
            return [device for device in jax.local_devices(backend=it.platform) if device.device_kind in it.kinds]
        except RuntimeError:  # no driver, no CUDA libraries beside the plugin, or the chip is taken
            return []


def _told_tools() -> bool:
    """Whether the user has told XLA where CUDA's tools are."""
    return "--xla_gpu_cuda_data_dir" in _xla_flags()


def _xla_flags() -> str:
    return os.environ.get("XLA_FLAGS", "")


def _configure(option: str, value: Any) -> None:
    """Sets a jax option, by environment as long as jax is not imported. RuntimeError where it is too late."""
    if "jax" in sys.modules:
        sys.modules["jax"].config.update(option, value)
    os.environ[option.upper()] = str(value)
