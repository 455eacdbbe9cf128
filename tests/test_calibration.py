"""What a machine was measured to do: files read back, wrong files refused, rates interpolated; and measuring itself."""

import json
import math
import re
from dataclasses import replace
from functools import partial
from itertools import product
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from compiled import bf16, ready
from hypothesis import given
from hypothesis import strategies as st
from stepbill.experiments import calibrate
from stepbill.experiments.bill import main
from stepbill.profiling import calibration, targets
from stepbill.profiling.calibration import ByteRate, Calibration, CalibrationError, Hardware, MatmulRate
from stepbill.profiling.chips import chip
from stepbill.profiling.walk import Kernel, itemize_text

KIB = 1024
ROWS, SIDES = (1, 16), (64, 1024)
MADE = Calibration(
    hardware=calibration.host(),
    jax="0.10.2",
    date="2026-11-24T12:00:00+00:00",
    command=calibration.COMMAND,
    matmuls=tuple(MatmulRate("f32", m, n, k, 10**9 * m * (n + k)) for m, k, n in product(ROWS, SIDES, SIDES) if k <= n),
    copies=tuple(ByteRate(s, s * n, 10**10 // n) for s, n in product((4 * KIB, 64 * KIB), (1, 8))),
    transposes=tuple(ByteRate(s, s * n, 10**9) for s, n in product((4 * KIB, 64 * KIB), (1, 8))),
    vector_flops_per_second=10**10,
    transcendentals_per_second=10**9,
    launch_seconds=1e-6,
    dispatch_seconds=5e-6,
)


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """saved(text): what is in the file that STEPBILL_CALIBRATION names."""
    path = tmp_path / "calibration.json"
    monkeypatch.setenv(calibration.ENVIRONMENT, str(path))

    def write(content):
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return write


def test_a_file_holds_what_was_measured(saved):
    path = saved(MADE.to_json())
    assert calibration.read(path) == MADE
    assert calibration.of(chip("host")) == MADE


@pytest.mark.parametrize(
    "other", [{"device": "another CPU"}, {"cores": 3_000}, {"platform": "cuda", "device": "NVIDIA H200", "cores": None}]
)
def test_another_machines_is_not_used_on_this_host(saved, other):
    saved(replace(MADE, hardware=replace(MADE.hardware, **other)).to_json())
    assert calibration.of(chip("host")) is None


def test_of_a_gpu_the_model_decides(saved):
    saved(replace(MADE, hardware=Hardware("cuda", "NVIDIA H200", driver="580.1")).to_json())
    assert calibration.of(chip("h200")) is not None
    assert calibration.of(chip("h100")) is None
    assert calibration.of(chip("v5e")) is None


def test_memory_and_driver_may_change():
    assert MADE.hardware.is_like(replace(MADE.hardware, memory_bytes=1, driver="other"))


def test_without_a_file_there_is_none(monkeypatch, tmp_path):
    monkeypatch.delenv(calibration.ENVIRONMENT)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert calibration.default_path("cpu") == tmp_path / "stepbill" / "calibration-cpu.json"
    assert calibration.of(chip("host")) is None


def changed(**fields):
    return MADE.to_json() | fields


def without(name):
    return {key: value for key, value in MADE.to_json().items() if key != name}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "it is not JSON"),
        ("[1", "it is not JSON"),
        ([], "it is no calibration of a machine"),
        ({"schema": 1, "rows": []}, "it is no calibration of a machine"),
        (changed(schema=99), "schema is 99; it must be 1"),
        (without("launch_seconds"), "it has no 'launch_seconds'"),
        (changed(launch_seconds=-1), "launch_seconds is not what it must be: -1 must be seconds"),
        (changed(launch_seconds=math.inf), "inf must be seconds"),
        (changed(vector_flops_per_second=0), "0 must be a whole number of at least 1"),
        (changed(matmuls=[]), "matmuls is not what it must be: it has no entries"),
        (changed(copies=[{"bytes": 1}]), "copies is not what it must be: it has no 'footprint_bytes'"),
        (changed(jax=3), "jax is not what it must be: 3 must be text"),
        (changed(hardware={"platform": "tpu"}), "hardware is not what it must be: it has no 'cores'"),
        (changed(matmuls=MADE.to_json()["matmuls"][1:]), "f32 is measured at some sizes but not at (1, 64, 64)"),
        (changed(copies=MADE.to_json()["copies"][1:]), "copies is measured at some sizes but not at (4096, 1)"),
    ],
)
def test_a_wrong_file_is_refused_in_one_line(saved, content, said):
    path = saved(content)
    with pytest.raises(CalibrationError) as error:
        calibration.read(path)
    assert said in str(error.value)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)


def test_the_command_refuses_it_too(saved, capsys):
    path = saved("{}")
    assert main(["--model=nano", "--step=decode", "--context=64", "--num_layers=1"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == f"stepbill: {path}: it is no calibration of a machine; {calibration.COMMAND} writes it anew\n"


def test_a_missing_file_says_so(tmp_path):
    with pytest.raises(CalibrationError, match="cannot read it: no such file or directory"):
        calibration.read(tmp_path / "none.json")


# --- interpolation -------------------------------------------------------------------------------------------------

sizes = st.integers(1, 1 << 20)


@given(sizes, sizes, sizes)
def test_a_rate_is_within_those_that_were_measured(m, n, k):
    measured = [rate.flops_per_second for rate in MADE.matmuls]
    assert min(measured) * (1 - 1e-9) <= MADE.matmul("f32", m, n, k) <= max(measured) * (1 + 1e-9)


@given(sizes, sizes, sizes, sizes)
def test_where_more_was_faster_more_is_faster_in_between(m, n, k, more):
    assert MADE.matmul("f32", m, n, k + more) >= MADE.matmul("f32", m, n, k) * (1 - 1e-9)
    assert MADE.matmul("f32", m + more, n + more, k) >= MADE.matmul("f32", m, n, k) * (1 - 1e-9)


@given(sizes, sizes, sizes)
def test_which_operand_has_the_rows_is_no_matter(m, n, k):
    assert MADE.matmul("f32", m, n, k) == MADE.matmul("f32", n, m, k)


def test_at_the_measured_sizes_it_is_what_was_measured():
    for rate in MADE.matmuls:
        if rate.m <= rate.n:
            assert MADE.matmul("f32", rate.m, rate.n, rate.k) == pytest.approx(rate.flops_per_second, rel=1e-12)
    for rate in MADE.copies:
        assert MADE.copy(rate.bytes, rate.footprint_bytes) == pytest.approx(rate.bytes_per_second, rel=1e-12)


def test_half_way_between_two_sizes_it_is_their_geometric_mean():
    low, high = MADE.matmul("f32", 1, 64, 64), MADE.matmul("f32", 16, 64, 64)
    assert MADE.matmul("f32", 4, 64, 64) == pytest.approx(math.sqrt(low * high), rel=1e-12)


def test_a_program_that_touches_more_has_the_rate_of_a_larger_one():
    assert MADE.copy(4 * KIB, 4 * KIB) > MADE.copy(4 * KIB, 16 * KIB) > MADE.copy(4 * KIB, 10**9)
    assert MADE.copy(1, 1) == MADE.copy(4 * KIB, 4 * KIB)


def test_computing_is_what_the_most_rows_measured_do():
    assert MADE.with_most_rows("f32", 1, 64, 1024) == MADE.with_most_rows("f32", 64, 1, 1024)
    assert MADE.with_most_rows("f32", 1, 64, 1024) == pytest.approx(MADE.matmul("f32", 16, 64, 1024), rel=1e-12)


def test_operands_that_were_not_measured_are_those_they_are_widened_to():
    assert MADE.matmul("int8", 8, 64, 64) == MADE.matmul("f32", 8, 64, 64)
    assert MADE.matmul("fp4", 8, 64, 64) == MADE.matmul("f32", 8, 64, 64)


def test_the_fastest_that_was_measured_are_the_peaks():
    fastest = MADE.fastest(chip("host"))
    products = dict.fromkeys(["f32", "bf16", "int8", "fp8", "fp4"], 10**9 * 16 * 2048)
    assert fastest.peak_flops == {**products, "vector": 10**10}
    assert fastest.hbm_bytes_per_second == 10**10


# --- measuring -----------------------------------------------------------------------------------------------------


def test_a_machine_is_measured(tmp_path):
    few = calibrate.Sizes(("f32", "int8"), (1, 4), (16,), (8,), (4 * KIB,), (1, 2), chain=4, rounds=3)
    said = []
    found = calibrate.measure(few, calibration.host(), "a test", said.append)
    assert {(rate.precision, rate.m, rate.n, rate.k) for rate in found.matmuls} == {
        *(("f32", 1, 16, 16), ("f32", 4, 16, 16), ("int8", 1, 8, 8), ("int8", 4, 8, 8))
    }
    assert [(rate.bytes, rate.footprint_bytes) for rate in found.copies] == [(4 * KIB, 4 * KIB), (4 * KIB, 8 * KIB)]
    assert found.launch_seconds > 0
    assert found.dispatch_seconds > 0
    assert found.command == "a test"
    assert sum(text.startswith("round 3 of 3") for text in said) == 4 + 4 + 2 + 2
    path = tmp_path / "found.json"
    path.write_text(json.dumps(found.to_json()))
    assert calibration.read(path) == found


def test_what_one_case_does_is_what_its_program_does():
    few = calibrate.Sizes(("f32",), (4,), (16,), (16,), (4 * KIB,), (2,), chain=6)
    ((at, case),) = calibrate.matmuls(few)
    assert at == ("f32", 4, 16, 16)
    assert case.amount == 6 * 2 * 4 * 16 * 16
    ((at, case),) = calibrate.copies(few, "transposes")
    assert at == (4 * KIB, 8 * KIB)
    first, second = case.run()
    assert first.nbytes == second.nbytes == 4 * 22**2  # the largest square in 2 KiB
    x = calibrate._square(2 * KIB)
    assert (first.reshape(x.shape) == x.T + 1).all()


@pytest.mark.parametrize("kind", ["copies", "transposes"])
def test_copies_are_as_far_apart_as_they_say(kind):
    """By the bill of the program that is timed: so many kernels, each finding its arrays after the bytes of all."""
    size, count, trips = 4 * KIB if kind == "copies" else 2 * 4 * 22**2, 3, 5
    program, arrays, results = calibrate.turns(4 * KIB, count, trips, kind)
    kernels: list[Kernel] = []
    text = program.lower(arrays, results).compile().as_text()
    itemize_text(text, chip("host"), calibration=MADE, kernels=kernels)
    copies = [kernel for kernel in kernels if kernel.hbm_bytes >= size]
    assert sum(kernel.times for kernel in copies) == count * trips
    for kernel in copies:
        whole = [distance for part, distance in kernel.reaches if part == size // 2]
        assert len(whole) == 2
        assert all(count * size <= distance <= count * size + 32 for distance in whole)  # the trips' number is beside


def test_on_a_gpu_what_only_reads_is_measured_alone():
    """One kernel a trip for each array, which reads it all and writes the sum of each row."""
    size, count, trips = 1 << 20, 3, 5
    program, *given = calibrate.turns(size, count, trips, "reads")
    kernels: list[Kernel] = []
    ready("h200")
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), given)
    text = targets.compile(program.lower(*targets.place(shapes, "h200")), "h200").text
    itemize_text(text, chip("h200"), kernels=kernels)
    readers = [kernel for kernel in kernels if kernel.hbm_bytes > size // 2]
    assert sum(kernel.times for kernel in readers) == count * trips
    for kernel in readers:
        assert kernel.written_bytes == size // calibrate.ROW
        assert kernel.hbm_bytes == pytest.approx(size + size // calibrate.ROW, rel=1e-4)
    for one, array in zip(program(*given), given[0], strict=True):
        assert float(one.sum()) == pytest.approx(trips * float(array.sum()), rel=1e-5)


def test_single_rows_times_few_bits_read_each_weight_once():
    """As the bill of the program says that runs on a GPU; and here, that it runs at all."""
    sizes = replace(calibrate.SIZES["cpu"], narrow=((512, 1024),), uncached=1 << 20)
    for (bits, size), case in calibrate.narrow_products(sizes):
        weights = 512 * 1024
        assert size == weights * bits // 8 + (weights // calibrate.GROUP * 4 if bits == 4 else 0)
        assert case.amount % (2 * size) == 0 and case.amount >= 1 << 20
        x = case.run()
        assert x.shape == (1, 1, 512) and np.all(np.isfinite(np.asarray(x, np.float32))) and np.any(x)
        _, given = case.run.args
        kernels: list[Kernel] = []
        ready("h200")
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), case.run.args)
        with jax.sharding.use_abstract_mesh(targets.mesh("h200", {}).abstract_mesh):
            lowered = jax.jit(partial(calibrate._narrow_chain, interpret=False)).lower(*targets.place(shapes, "h200"))
        itemize_text(targets.compile(lowered, "h200").text, chip("h200"), kernels=kernels)
        products = [kernel for kernel in kernels if kernel.products]
        assert sum(kernel.times for kernel in products) == len(given)
        assert all(kernel.products[0].m == 1 for kernel in products)
        assert [kernel.hbm_bytes for kernel in products] == pytest.approx([size] * len(products), rel=0.1)


@pytest.mark.parametrize("kind", ["copies", "transposes", "reads"])
@pytest.mark.parametrize("size", [*calibrate.SIZES["cuda"].copies, 1 << 27])
def test_every_size_is_touched_whole_and_four_numbers_at_a_time(size, kind):
    program, arrays, results = calibrate.turns(size, 1, 1, kind)
    assert arrays[0].nbytes == pytest.approx(size if kind == "reads" else size // 2, rel=0.01)
    assert arrays[0].size % 4 == results[0].size % 4 == 0
    assert jax.eval_shape(program, arrays, results)[0].shape == results[0].shape


def test_a_sample_of_many_runs_says_of_one_run_what_it_takes(monkeypatch):
    """By a clock that only the runs move: as a GPU is measured, the rate is that of one run, however many there are."""
    now = [0.0]
    monkeypatch.setattr(calibrate, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def run() -> float:
        now[0] += 0.001
        return 0.0

    case = calibrate.Case("a wait", 1, 1, run)
    for sample_seconds, runs in ((0.0, 2), (0.0095, 12), (60.0, 2 + calibrate.MOST_RUNS)):  # two to warm up and to know
        before = now[0]
        assert calibrate._sample(case, sample_seconds) == pytest.approx(0.001)
        assert now[0] - before == pytest.approx(runs * 0.001)


def test_programs_compiled_ahead_are_those_of_their_sizes():
    few = calibrate.Sizes(("f32",), (4, 1), (16, 8), (), (), chain=2, compilers=2, sample_seconds=1e-6)
    found = dict(calibrate.matmuls(few))
    assert [at[1] for at in found] == [1] * 3 + [4] * 3  # few rows first
    for (_, m, n, k), case in found.items():
        assert case.amount == 2 * 2 * m * n * k and case.run().shape == (m, k)


@pytest.mark.parametrize(("rows", "kernels"), [(1, 1), (8, 2), (4096, 1)])
def test_products_are_those_of_a_gpus_models(rows, kernels):
    """Of the type of their operands, which nothing converts; of few rows in two kernels, each with its launch."""
    ready("h200")
    chain = jax.jit(partial(calibrate._chain, platform="cuda"))
    weights = [bf16(2048, 2048)] * 4
    made = targets.compile(
        chain, "h200", bf16(rows, 2048), weights, options=calibrate.options("cuda", "bf16"), runs=False
    )
    assert calibrate._kernels(made.compiled) == kernels * len(weights)
    operands = re.findall(r" dot\((%[\w.]+), (%[\w.]+)\)", made.text)
    assert len(operands) == len(weights)
    for name in {name for pair in operands for name in pair}:
        assert re.search(rf"{re.escape(name)} = bf16\S+ (parameter|bitcast)\(", made.text), name


def test_on_a_gpu_the_kernels_are_those_of_the_program(monkeypatch):
    monkeypatch.setattr(targets, "here", lambda: "h200")
    few = calibrate.Sizes(("f32",), (4,), (16,), (), (), chain=6)
    ((_, case),) = calibrate.matmuls(few)
    assert case.kernels == calibrate._kernels(case.run.func) >= 6
    assert case.amount == 6 * 2 * 4 * 16 * 16


def refusing(dtype, monkeypatch):
    """A device that does not multiply a type."""
    compiled = calibrate._compiled

    def refuse(program, given, options):
        if given[0].dtype == dtype:
            return jax.errors.JaxRuntimeError("UNIMPLEMENTED: no such units\nat a place")
        return compiled(program, given, options)

    monkeypatch.setattr(calibrate, "_compiled", refuse)


def test_a_type_that_the_device_does_not_multiply_is_left_out(monkeypatch):
    refusing("int8", monkeypatch)
    few = calibrate.Sizes(("f32", "int8"), (1, 4), (16,), (8,), (), chain=2, compilers=1)
    assert [at for at, _ in calibrate.matmuls(few)] == [("f32", 1, 16, 16), ("f32", 4, 16, 16)]


def test_without_the_first_type_there_is_no_calibration(monkeypatch, tmp_path, capsys):
    refusing("float32", monkeypatch)
    few = calibrate.Sizes(("f32", "int8"), (1,), (16,), (8,), (4 * KIB,), (1,), chain=2, compilers=1)
    monkeypatch.setitem(calibrate.SIZES, "cpu", few)
    out = tmp_path / "found.json"
    assert calibrate.main([f"--out={out}"]) == 1
    assert capsys.readouterr().err == (
        "stepbill: products of f32, 1 x 16 x 16, cannot be measured on this device: UNIMPLEMENTED: no such units\n"
    )
    assert not out.exists()


@pytest.mark.parametrize(
    ("said", "version"),
    [
        ("NVIDIA UNIX Open Kernel Module for x86_64  580.159.04  Release Build  (dvs-builder)", "580.159.04"),
        ("NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023", "535.104.05"),
        ("NVIDIA UNIX Open Kernel Module for aarch64  570.86", "570.86"),
        ("something else 1.2", None),
    ],
)
def test_the_drivers_version_is_read(said, version):
    assert calibrate.driver(f"NVRM version: {said}\nGCC version:  gcc version 12.3.0 (Ubuntu)\n") == version


def test_copies_go_on_until_they_have_moved_enough():
    few = calibrate.Sizes((), (), (), (), (4 * KIB,), (1, 3), moved=64 * KIB)
    (alone, one), (of_three, three) = calibrate.copies(few, "copies")
    assert (alone, of_three) == ((4 * KIB, 4 * KIB), (4 * KIB, 12 * KIB))
    assert (one.amount, three.amount) == (64 * KIB, 60 * KIB)


def test_the_command_says_where_it_cannot_write(tmp_path, capsys):
    assert calibrate.main([f"--out={tmp_path}"]) == 2
    assert capsys.readouterr().err.startswith(f"stepbill: --out={tmp_path}: it is a folder; it must be a file")
