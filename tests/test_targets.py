"""Chips, their devices and meshes, compiling for each without having it, and refusals."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from stepbill.profiling import itemize, targets
from stepbill.profiling.chips import CHIPS, GIB
from stepbill.profiling.targets import COUNTS, DoesNotFit, MissingExtra

ALL = list(CHIPS)
REMOTE = [name for name in ALL if name != "host"]


def ready(target: str, chips: int = 1) -> None:
    """Prepares the target; skips where its extra is not installed, but never in CI, which installs all of them."""
    try:
        targets.prepare(target, chips)
    except MissingExtra as error:
        if os.environ.get("CI") == "true":
            raise
        pytest.skip(str(error))


def square(target: str, side: int):
    """x @ x, lowered for one chip."""
    import jax
    import jax.numpy as jnp

    x = jax.ShapeDtypeStruct((side, side), jnp.bfloat16)
    return jax.jit(lambda x: x @ x).lower(targets.place(x, target))


# --- facts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REMOTE)
def test_every_chip_has_peaks_memory_price_and_sources(name: str):
    chip = targets.chip(name)
    assert chip.name == name and chip.platform in ("cuda", "tpu") and chip.sources
    assert 1e14 < chip.peak_flops["bf16"] < 1e16
    assert all(isinstance(peak, int) and peak > 0 for peak in chip.peak_flops.values())
    assert chip.usable_hbm_bytes is not None and chip.hbm_bytes is not None
    assert 0.9 * chip.hbm_bytes < chip.usable_hbm_bytes < 1.1 * chip.hbm_bytes
    assert chip.hbm_bytes_per_second and chip.link_bytes_per_second
    assert chip.link_bytes_per_second < chip.hbm_bytes_per_second
    low, high = chip.dollars_range or (chip.dollars_per_hour, chip.dollars_per_hour)
    assert low is not None and chip.dollars_per_hour is not None and high is not None
    assert 0 < low <= chip.dollars_per_hour <= high
    assert (chip.l2_bytes is not None) == (chip.platform == "cuda")


def test_datasheet_numbers():
    h200, v5e, tpu7x = targets.chip("h200"), targets.chip("v5e"), targets.chip("tpu7x")
    assert (h200.peak_flops["bf16"], h200.hbm_bytes_per_second) == (989_000_000_000_000, 4_800_000_000_000)
    assert h200.link_bytes_per_second == 450_000_000_000  # NVLink's 900 GB/s is both directions
    assert (v5e.peak_flops["bf16"], v5e.hbm_bytes) == (197_000_000_000_000, 16 * GIB)
    assert (tpu7x.cores, tpu7x.hbm_bytes) == (2, 96 * GIB)  # per device: half a chip


def test_the_host_claims_no_peaks():
    host = targets.chip("host")
    assert not host.peak_flops and host.hbm_bytes_per_second is None and host.dollars_per_hour is None


def test_unknown_target_names_the_known_ones():
    with pytest.raises(ValueError, match=r"target is 'h300'; it must be one of host, .*h200.*tpu7x"):
        targets.chip("h300")


# --- devices and meshes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REMOTE)
def test_every_count_resolves(name: str):
    ready(name)
    if targets.present(name):
        pytest.skip("the chip is here")
    for count in COUNTS:
        found = targets.devices(name, count)
        assert len(set(found)) == count
        if CHIPS[name].platform == "tpu":
            assert {device.device_kind for device in found} <= set(CHIPS[name].kinds)


@pytest.mark.parametrize(("name", "cores"), [("v4", 2), ("v5e", 1), ("v5p", 2), ("v6e", 1), ("tpu7x", 1)])
def test_a_tpu_device_is_as_many_cores_as_its_peaks_say(name: str, cores: int):
    ready(name)
    assert targets.devices(name)[0].num_cores == cores


def test_gpus_are_numbered_host_by_host():
    ready("h200")
    assert [device.process_index for device in targets.devices("h200", 16)] == [0] * 8 + [1] * 8


@pytest.mark.parametrize(
    ("name", "chips", "right"),
    [("h200", 12, "1 to 8, or whole hosts of 8"), ("v5p", 3, "a power of two up to 256"), ("host", 0, "at least 1")],
)
def test_impossible_counts_say_what_is_right(name: str, chips: int, right: str):
    ready(name)
    with pytest.raises(ValueError, match=rf"chips is {chips}; .*{right}"):
        targets.devices(name, chips)


@pytest.mark.parametrize("inner", ["tensor", "expert"])
@pytest.mark.parametrize("name", ["h200", "v5e", "v5p", "tpu7x"])
def test_the_inner_axis_lies_on_neighbours(name: str, inner: str):
    ready(name)
    mesh = targets.mesh(name, {"data": 8, inner: 8})
    assert dict(mesh.shape) == {"data": 8, "expert": 1, "tensor": 1} | {inner: 8}
    for row in mesh.devices.reshape(8, 8):
        if CHIPS[name].platform == "cuda":
            assert len({device.process_index for device in row}) == 1
        else:  # a box without holes: no chip far from the others
            extents = [max(d.coords[n] for d in row) - min(d.coords[n] for d in row) + 1 for n in range(3)]
            assert extents[0] * extents[1] * extents[2] == 8 // CHIPS[name].cores
    assert len(set(mesh.devices.flat)) == 64


def test_a_mesh_wants_known_axes_of_at_least_one():
    ready("host")
    with pytest.raises(ValueError, match=r"mesh axis is 'model'; it must be one of data, expert, tensor"):
        targets.mesh("host", {"model": 2})
    with pytest.raises(ValueError, match=r"mesh axis data is 0"):
        targets.mesh("host", {"data": 0})


# --- compiling -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_compiles_a_matmul(name: str, capfd: pytest.CaptureFixture[str]):
    ready(name)
    compilation = targets.compile(square(name, 256), name)
    assert compilation.text.startswith("HloModule") and compilation.chips == 1
    assert compilation.memory is not None
    assert (compilation.memory.arguments, compilation.memory.outputs) == (2 * 256**2, 2 * 256**2)
    assert compilation.memory.peak is not None and compilation.memory.peak >= 2 * 2 * 256**2
    if CHIPS[name].platform != "cuda":
        assert compilation.xla is not None and compilation.xla.flops == pytest.approx(2 * 256**3, rel=0.01)
    if name != "host" and not targets.present(name):
        assert compilation.how.startswith(f"{CHIPS[name].title} not present: compiled from its description")
        assert ("no autotuning" in compilation.how) == (CHIPS[name].platform == "cuda")
    assert capfd.readouterr().err == ""


def test_compiles_a_jitted_function_and_times_its_lowering():
    import jax
    import jax.numpy as jnp

    ready("host")
    compilation = targets.compile(jax.jit(lambda x: x + 1), "host", jnp.zeros(8))
    assert compilation.lower_seconds is not None and compilation.lower_seconds > 0
    assert compilation.compile_seconds > 0


@pytest.mark.parametrize("name", ["h200", "v5e", "v5p", "v6e", "tpu7x"])
def test_compiles_for_eight_chips(name: str):
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    ready(name, 8)
    mesh = targets.mesh(name, {"tensor": 8})
    split = NamedSharding(mesh, PartitionSpec(None, "tensor"))
    whole = NamedSharding(mesh, PartitionSpec())
    x = jax.ShapeDtypeStruct((256, 512), jnp.bfloat16, sharding=split)
    w = jax.ShapeDtypeStruct((512, 256), jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec("tensor", None)))
    compilation = targets.compile(jax.jit(lambda x, w: x @ w, out_shardings=whole).lower(x, w), name)
    assert compilation.chips == 8 and "all-reduce" in compilation.text
    assert compilation.memory is not None and compilation.memory.arguments == 2 * (2 * 256 * 512) // 8


def test_host_devices_are_made_before_jax_starts():
    program = (
        "from stepbill.profiling import targets; targets.prepare('host', 8); m = targets.mesh('host', {'tensor': 8});"
        "import sys; assert m.size == 8; assert not targets.present('host', 9); targets.devices('host', 9)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert "chips is 9; this process has 8 host devices, fixed when jax started" in done.stderr.splitlines()[-1]


def test_importing_targets_does_not_import_jax():
    program = (
        "import sys; from stepbill.profiling import targets; targets.prepare('host', 4); sys.exit('jax' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


# --- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["h200", "v5e", "v4", "v6e"])
def test_what_does_not_fit_says_what_it_needs_and_what_there_is(name: str):
    ready(name)
    side = 400_000
    with pytest.raises(DoesNotFit) as refusal:
        targets.compile(square(name, side), name)
    assert refusal.value.needs_bytes == pytest.approx(2 * 2 * side**2, rel=0.01)
    assert refusal.value.has_bytes == pytest.approx(CHIPS[name].usable_hbm_bytes, rel=1e-3)
    assert re.search(rf"needs 596.05 GiB a chip, {name} has [\d.]+ GiB", str(refusal.value))


def test_what_just_fits_is_compiled():
    ready("h200")
    usable = CHIPS["h200"].usable_hbm_bytes
    assert usable is not None
    fits = int((usable / 4) ** 0.5) // 256 * 256
    assert targets.compile(square("h200", fits), "h200").memory is not None
    with pytest.raises(DoesNotFit):
        targets.compile(square("h200", fits + 1024), "h200")


@pytest.mark.parametrize(
    ("text", "needs", "has"),
    [
        ("the total memory required for HLO temporaries (21.56G) exceeds available HBM (15.75G). HLO", 21.56, 15.75),
        ("Ran out of memory in memory space hbm. Used 1.50T of 95.73G hbm. Exceeded hbm capacity by", 1536, 95.73),
    ],
)
def test_reads_the_sizes_in_tpu_refusals(text: str, needs: float, has: float, tmp_path):
    error = targets._translated(RuntimeError(f"RESOURCE_EXHAUSTED: {text}"), CHIPS["v5e"], tmp_path / "none")
    assert isinstance(error, DoesNotFit)
    assert (error.needs_bytes, error.has_bytes) == (round(needs * GIB), round(has * GIB))


def test_any_other_failure_carries_what_the_compiler_printed(tmp_path):
    noise = tmp_path / "noise"
    noise.write_text("E1123 a hint\n")
    error = targets._translated(RuntimeError("UNIMPLEMENTED: sorting"), CHIPS["v5e"], noise)
    assert isinstance(error, targets.CompileError) and str(error) == "TPU v5e: UNIMPLEMENTED: sorting\nE1123 a hint"


@pytest.mark.parametrize(
    ("said", "options", "right"),
    [
        ("INTERNAL: No supported config found for HLO: %dot.1", {}, ", xla_gpu_enable_triton_gemm=False"),
        (
            "INTERNAL: Couldn't find output tile sizes that satisfy hlo: %dot.1",
            {},
            ", xla_gpu_enable_triton_gemm=False",
        ),
        ("INTERNAL: No supported config found", {"xla_gpu_enable_triton_gemm": True}, None),
        ("INTERNAL: something else", {}, None),
    ],
)
def test_a_product_that_xla_cannot_make_without_the_gpu_is_a_librarys(said, options, right, monkeypatch):
    """Versions differ in which those are, so one that they all make is refused here, once."""
    import jax

    ready("h200")
    x = jax.ShapeDtypeStruct((256, 256), "float32")
    lowered = targets.lower(jax.jit(lambda x: x @ x), "h200", x)
    compile, tried = type(lowered).compile, []

    def refuse(lowered, compiler_options):
        tried.append(compiler_options)
        if compiler_options.get("xla_gpu_enable_triton_gemm", True):
            raise RuntimeError(said)
        return compile(lowered, compiler_options)

    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_kernel_cache_file=none")  # else each is tried again without kept kernels
    monkeypatch.setattr(type(lowered), "compile", refuse)
    if right is None:
        with pytest.raises(targets.CompileError, match=said.partition(" for")[0]):
            targets.compile(lowered, "h200", options=options, runs=False)
        assert len(tried) == 1
        return
    compilation = targets.compile(lowered, "h200", options=options, runs=False)
    assert compilation.how.endswith(f"(no autotuning){right}") and "__cublas$" in compilation.text


def test_what_some_versions_refuse_is_billed_by_all():
    """Pictures scaled up, by products that jax asks to be exact: jax 0.10 refuses one where no GPU is there."""
    import jax

    ready("h200")
    x = jax.ShapeDtypeStruct((8, 256, 256, 3), "float32")
    found = itemize(jax.jit(lambda x: jax.image.resize(x, (8, 512, 512, 3), "bicubic")), x, target="h200")
    assert found.total.matmul == 2 * 8 * 3 * (256 * 512 * 256 + 512 * 512 * 256)


def test_a_kernel_that_asks_which_tpu_it_is_for_is_told():
    """As jax's own ragged paged attention does, which would run another loop on another TPU."""
    import jax
    from jax.experimental import pallas
    from jax.experimental.pallas import tpu

    def kernel(x, y):
        y[...] = x[...] * tpu.get_tpu_info().generation

    ready("v5e")
    x = jax.ShapeDtypeStruct((8, 128), "float32")
    found = itemize(jax.jit(lambda x: pallas.pallas_call(kernel, out_shape=x)(x)), x, target="v5e")
    assert found.total.hbm_bytes == 2 * 4 * 8 * 128


@pytest.mark.parametrize(("name", "extra"), [("v5e", "tpu"), ("h200", "cuda")])
def test_a_missing_extra_names_its_pip_command(name: str, extra: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(targets, "_installed", lambda module: False)
    with pytest.raises(MissingExtra) as missing:
        targets.prepare(name)
    assert str(missing.value) == f"target {name} needs its compiler: pip install 'stepbill[{extra}]'"
    targets.prepare("host")


def test_what_assembles_for_a_gpu_is_of_the_extra_or_of_this_machine(monkeypatch: pytest.MonkeyPatch):
    ready("h200")
    monkeypatch.setattr(targets, "_installed", lambda module: True)
    monkeypatch.setattr(targets, "cuda_tools", lambda: None)
    monkeypatch.setattr(targets, "_USUAL_PTXAS", ())
    monkeypatch.setenv("PATH", "")
    with pytest.raises(MissingExtra, match=r"pip install 'stepbill\[cuda\]'"):
        targets.require("h200")
    targets.require("v5e")
    monkeypatch.setattr(targets, "_USUAL_PTXAS", (sys.executable,))
    targets.require("h200")
    monkeypatch.setattr(targets, "_USUAL_PTXAS", ())
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_cuda_data_dir=/somewhere")
    targets.require("h200")


def assembled(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """-> how often the extra's ptxas has been called since."""
    tools = targets.cuda_tools()
    assert tools is not None and (tools / "nvvm" / "libdevice").is_dir()
    ours = folder / "tools"
    (ours / "bin").mkdir(parents=True)
    for entry in tools.iterdir():
        if entry.name != "bin":
            (ours / entry.name).symlink_to(entry)
    calls = folder / "calls"
    calls.touch()
    wrapper = ours / "bin" / "ptxas"
    wrapper.write_text(f'#!/bin/sh\necho called >> {calls}\nexec {tools}/bin/ptxas "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setattr(targets, "cuda_tools", lambda: ours)
    return lambda: len(calls.read_text().split())


def test_a_gpus_kernels_are_assembled_by_the_extra_and_not_by_what_lies_around(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    ready("h200")
    monkeypatch.setenv("STEPBILL_CACHE", str(tmp_path / "kept"))
    calls = assembled(tmp_path, monkeypatch)
    targets.compile(square("h200", 4096), "h200")
    assert calls()


def test_a_missing_package_is_told_without_importing_it():
    assert not targets._installed("no_such_package") and not targets._installed("no_such_package.module")
    assert targets._installed("json.decoder")


def test_errors_of_cpp_are_kept_and_python_may_still_write(capfd: pytest.CaptureFixture[str]):
    with targets.quiet() as noise:
        os.write(2, b"from C++\n")
        assert noise.read_text() == "from C++\n"
    os.write(2, b"after\n")
    assert capfd.readouterr().err == "after\n"
