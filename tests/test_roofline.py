"""What a program is predicted to take: at least its roofline, by the rates that are said, and adding up."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from compiled import bf16, f32, hlo, module
from stepbill.experiments import calibrate, predict_host
from stepbill.experiments.bill import main
from stepbill.profiling import calibration, render, targets
from stepbill.profiling.bill import Bill
from stepbill.profiling.calibration import NarrowRate
from stepbill.profiling.flops import Flops, Product, flops, product
from stepbill.profiling.hlo import parse
from stepbill.profiling.roofline import PICOSECONDS, Assumed, predict
from stepbill.profiling.walk import Kernel, itemize_text
from test_calibration import MADE


def mlp(x, up, down):
    with jax.named_scope("mlp/up"):
        h = jnp.exp(x @ up)
    with jax.named_scope("mlp/down"):
        return h @ down, x.T + 1


ARGUMENTS = f32(64, 256), f32(256, 512), f32(512, 256)


def billed(target, rates=None, kernels=None):
    return itemize_text(hlo(target, mlp, *ARGUMENTS), targets.chip(target), calibration=rates, kernels=kernels)


@pytest.mark.parametrize(("target", "rates"), [("h200", None), ("v5e", None), ("host", MADE)])
def test_a_prediction_is_at_least_the_roofline_and_adds_up(target, rates):
    bill = billed(target, rates)
    assert bill.timed
    assert bill.total.predicted_picoseconds >= bill.total.picoseconds > 0
    rows = sum(row.work.predicted_picoseconds for row in bill.rows)
    assert rows + bill.unattributed.predicted_picoseconds == bill.total.predicted_picoseconds
    groups = [bill.group(name).predicted_picoseconds for name in ("attention", "mlp", "cache", "other")]
    assert sum(groups) == rows
    for row in bill.rows:
        assert row.work.predicted_picoseconds >= row.work.picoseconds


def test_by_the_datasheet_it_is_the_roofline_and_the_launches():
    kernels: list[Kernel] = []
    bill = billed("h200", kernels=kernels)
    launches = sum(kernel.times for kernel in kernels)
    assert bill.total.predicted_picoseconds == bill.total.picoseconds + launches * 2_000_000
    assert bill.predicted == {
        **{"peaks": "datasheet", "measured_on": None},
        **{"launch_seconds": 2e-6, "dispatch_seconds": 0.0, "kernels": launches},
    }
    assert f"{launches} kernels one after the other, 2.00 µs to launch each, at the peaks" in render.to_text(bill)


def test_without_peaks_nothing_is_predicted():
    bill = billed("host")
    assert bill.predicted is None
    assert bill.total.predicted_picoseconds == 0
    saved = bill.to_json()
    assert saved["predicted"] is None
    assert saved["total"]["seconds"]["predicted"] is None
    assert saved["total"]["predicted_picoseconds"] is None
    assert "predicted" not in render.to_text(bill)


def test_by_measured_rates_each_kernel_takes_what_was_measured():
    kernels: list[Kernel] = []
    bill = billed("host", MADE, kernels)
    footprint = bill.memory["peak_bytes"]
    seconds = MADE.dispatch_seconds
    for kernel in kernels:
        multiplies = sum(one.flops / MADE.matmul("f32", one.m, one.n, one.k) for one in kernel.products)
        others = kernel.vector_flops / MADE.vector_flops_per_second
        others += kernel.transcendentals / MADE.transcendentals_per_second
        at = MADE.transpose if kernel.reorders else MADE.copy
        assert sum(part for part, _ in kernel.reaches) == kernel.hbm_bytes
        moves = sum(part / at(kernel.hbm_bytes, min(distance, footprint)) for part, distance in kernel.reaches)
        seconds += kernel.times * (MADE.launch_seconds + max(multiplies + others, moves))
    assert bill.total.predicted_picoseconds == pytest.approx(seconds * PICOSECONDS, rel=1e-9)
    assert bill.predicted is not None
    assert bill.predicted["measured_on"]["date"] == MADE.date
    assert any(kernel.reorders for kernel in kernels)
    assert sum(one.flops for kernel in kernels for one in kernel.products) == bill.total.matmul


def predicted(kernel, rates, footprint=1 << 40):
    """Seconds without the launch."""
    assumed = Assumed(targets.chip("h200"), rates, footprint)
    return (predict(kernel, assumed) - assumed.launch_picoseconds) / PICOSECONDS


ROW, MANY = Product("f32", 1024, 1, 1024, 2 << 20), Product("f32", 1024, 16, 1024, 32 << 20)
# Rates at which nothing but products takes any time.
ALONE = replace(
    MADE,
    copies=tuple(replace(rate, bytes_per_second=10**18) for rate in MADE.copies),
    matmuls=tuple(replace(rate, flops_per_second=10**9 * rate.m) for rate in MADE.matmuls),
)


def one_kernel(work, **more):
    instruction = parse(module("ROOT %x = f32[8]{0} parameter(0)")).entry.root
    return Kernel(instruction, 1, work.flops, products=(work,), **more)


def test_weights_stored_in_fewer_bits_are_read_faster():
    assert ROW.bytes == 4 * (1024 * 1024 + 1024 + 1024)
    whole = predicted(one_kernel(ROW, hbm_bytes=ROW.bytes), ALONE)
    assert whole == pytest.approx(ROW.flops / 10**9, rel=1e-6)
    assert predicted(one_kernel(ROW, hbm_bytes=ROW.bytes // 2), ALONE) == pytest.approx(whole / 2, rel=1e-6)
    assert predicted(one_kernel(ROW, hbm_bytes=2 * ROW.bytes), ALONE) == pytest.approx(whole, rel=1e-6)


def test_a_single_row_times_few_bits_has_a_rate_of_its_own():
    """Whose weights they are is told by how many bytes there are for each; of other bits nothing is known."""
    rates = replace(ALONE, narrow=(NarrowRate(4, 10**5, 10**9), NarrowRate(4, 10**7, 4 * 10**9)))
    weights = 1024 * 1024
    row = Product("bf16", 1, 1024, 1024, 2 * weights)
    narrow = one_kernel(row, hbm_bytes=weights // 2)
    rate = rates.narrow_read(4, weights // 2)
    assert 10**9 < rate < 4 * 10**9
    assert predicted(narrow, rates) == pytest.approx(weights / 2 / rate, rel=1e-6)
    assert predicted(narrow, rates) != pytest.approx(predicted(narrow, ALONE), rel=0.01)
    eight = one_kernel(row, hbm_bytes=weights)
    assert predicted(eight, rates) == predicted(eight, ALONE)
    two = one_kernel(row._replace(m=2, n=row.n // 2), hbm_bytes=weights // 2)
    assert predicted(two, rates) == predicted(two, ALONE)


def test_computing_takes_as_long_however_little_is_read():
    least = ROW.flops / (16 * 10**9)
    assert predicted(one_kernel(ROW, hbm_bytes=1), ALONE) == pytest.approx(least, rel=1e-6)
    for size in (1, MANY.bytes // 2, MANY.bytes):
        assert predicted(one_kernel(MANY, hbm_bytes=size), ALONE) == pytest.approx(MANY.flops / (16 * 10**9), rel=1e-6)


def test_a_kernel_that_multiplies_and_does_arithmetic_takes_the_sum():
    kernel = one_kernel(ROW, hbm_bytes=ROW.bytes, vector_flops=10**7, transcendentals=10**6)
    assert predicted(kernel, ALONE) == pytest.approx(ROW.flops / 10**9 + 1e-3 + 1e-3, rel=1e-6)


def test_what_only_reads_has_a_rate_of_its_own():
    rates = replace(MADE, reads=tuple(replace(one, bytes_per_second=3 * one.bytes_per_second) for one in MADE.copies))
    kernel = one_kernel(Product("f32", 1, 1, 1, 0), hbm_bytes=1 << 30)
    for writes, slower in (
        (kernel, 3),
        (kernel._replace(written_bytes=1 << 28), 1),
        (kernel._replace(reorders=True), 1),
    ):
        assert predicted(writes, MADE) == pytest.approx(slower * predicted(writes, rates))


def test_slower_machines_are_predicted_to_be_slower():
    half = replace(
        MADE,
        matmuls=tuple(replace(rate, flops_per_second=rate.flops_per_second // 2) for rate in MADE.matmuls),
        copies=tuple(replace(rate, bytes_per_second=rate.bytes_per_second // 2) for rate in MADE.copies),
        transposes=tuple(replace(rate, bytes_per_second=rate.bytes_per_second // 2) for rate in MADE.transposes),
        **{name: getattr(MADE, name) // 2 for name in ("vector_flops_per_second", "transcendentals_per_second")},
        **{name: getattr(MADE, name) * 2 for name in ("launch_seconds", "dispatch_seconds")},
    )
    whole, twice = (billed("host", rates).total.predicted_picoseconds for rates in (MADE, half))
    assert twice == pytest.approx(2 * whole, rel=1e-6)


def test_a_bill_that_is_read_back_predicts_the_same():
    bill = billed("h200")
    again = Bill.from_json(json.loads(bill.dumps()))
    assert again.to_json() == bill.to_json()
    assert again.predicted == bill.predicted
    assert (bill + again).total.predicted_picoseconds == 2 * bill.total.predicted_picoseconds


@pytest.mark.parametrize(
    "wrong", [{"kernels": None}, {"kernels": 1.5}, {"peaks": 3}, {"launch_seconds": "2"}, {"measured_on": {"date": 1}}]
)
def test_a_wrong_prediction_is_not_read_back(wrong):
    saved = billed("h200").to_json()
    saved["predicted"] |= wrong
    with pytest.raises(ValueError):
        Bill.from_json(saved)


def test_a_bill_from_before_there_were_predictions_has_none():
    saved = billed("h200").to_json()
    del saved["predicted"]
    for entry in (*saved["rows"], *saved["groups"].values(), saved["unattributed"], saved["total"]):
        del entry["predicted_picoseconds"], entry["seconds"]["predicted"]
    assert Bill.from_json(saved).to_json()["total"]["seconds"]["predicted"] is None


def test_a_loop_is_launched_on_every_trip():
    def looped(x):
        return jax.lax.fori_loop(0, 10, lambda _, y: jnp.sin(y) @ y, x)

    kernels: list[Kernel] = []
    bill = itemize_text(hlo("h200", looped, bf16(64, 64)), targets.chip("h200"), kernels=kernels)
    assert max(kernel.times for kernel in kernels) >= 10
    launches = sum(kernel.times for kernel in kernels)
    assert bill.total.predicted_picoseconds - bill.total.picoseconds == launches * 2_000_000


@pytest.mark.parametrize(
    ("line", "sizes"),
    [
        (
            "%d = f32[8,32]{1,0} dot(f32[8,64]{1,0} %a, f32[64,32]{1,0} %b), lhs_contracting_dims={1}, "
            "rhs_contracting_dims={0}",
            (8, 32, 64),
        ),
        (  # both transposed: the same product
            "%d = f32[32,8]{1,0} dot(f32[64,32]{1,0} %a, f32[64,8]{1,0} %b), lhs_contracting_dims={0}, "
            "rhs_contracting_dims={0}",
            (32, 8, 64),
        ),
        (  # of a batch of 4, the products stand side by side
            "%d = f32[4,2,32]{2,1,0} dot(f32[4,2,64]{2,1,0} %a, f32[4,64,32]{2,1,0} %b), lhs_batch_dims={0}, "
            "lhs_contracting_dims={2}, rhs_batch_dims={0}, rhs_contracting_dims={1}",
            (2, 4 * 32, 64),
        ),
        (
            "%d = f32[4,16,2]{2,1,0} dot(f32[4,16,64]{2,1,0} %a, f32[4,64,2]{2,1,0} %b), lhs_batch_dims={0}, "
            "lhs_contracting_dims={2}, rhs_batch_dims={0}, rhs_contracting_dims={1}",
            (4 * 16, 2, 64),
        ),
    ],
)
def test_sizes_of_a_product(line, sizes):
    a, b = (part.split(" %")[0] for part in line.split("dot(")[1].split(")")[0].split(", "))
    text = line.replace(a + " ", "").replace(b + " ", "")
    made = parse(module(f"%a = {a} parameter(0)", f"%b = {b} parameter(1)", f"ROOT {text}"))
    dot = made.entry.root
    work = flops(dot)
    assert work is not None
    found = product(dot, work)
    assert (found.m, found.n, found.k) == sizes
    assert found.flops == work.matmul == 2 * found.m * found.n * found.k


def test_a_sum_of_products_is_none_of_two_arrays():
    summed = "ROOT %sum = f32[8]{0} reduce(f32[8,64]{1,0} %a, f32[] %b), dimensions={1}, to_apply=%add"
    text = module("%a = f32[8,64]{1,0} parameter(0)", "%b = f32[] parameter(1)", summed)
    add = ("%x = f32[] parameter(0)", "%y = f32[] parameter(1)", "ROOT %z = f32[] add(f32[] %x, f32[] %y)")
    made = parse(text.replace("ENTRY", "%add () -> f32[] {\n  " + "\n  ".join(add) + "\n}\n\nENTRY"))
    assert product(made.entry.root, Flops(2 * 8 * 64, precision="f32")) == Product("f32", 1, 8, 64, 2 * 8 * 64)


# --- the commands --------------------------------------------------------------------------------------------------

STEP = ["--model=nano", "--step=decode", "--context=32", "--num_layers=1", "--format=json"]


def test_the_host_is_predicted_where_it_is_calibrated(tmp_path, monkeypatch, capsys):
    assert main(STEP) == 0
    plain = json.loads(capsys.readouterr().out)
    path = tmp_path / "calibration.json"
    path.write_text(json.dumps(MADE.to_json()))
    monkeypatch.setenv(calibration.ENVIRONMENT, str(path))
    assert main(STEP) == 0
    known = json.loads(capsys.readouterr().out)
    assert plain["total"]["seconds"]["roofline"] is None
    assert plain["predicted"] is None
    assert known["total"]["seconds"]["predicted"] > known["total"]["seconds"]["roofline"] > 0
    assert known["predicted"]["peaks"] == "measured"
    assert [note for note in known["notes"] if note not in plain["notes"]] == [
        f"times by what this {MADE.hardware.device} was measured to do on 2026-11-24 (jax 0.10.2)"
    ]
    for amount in ("flops", "hbm_read", "hbm_write", "requested_bytes"):
        assert known["total"][amount] == plain["total"][amount]


def test_predicted_is_held_against_measured():
    config = replace(predict_host.configs()["1m"], num_layers=1, vocabulary=256)
    point = predict_host.run("decode", config, 1, 16, repeats=3).predicted(MADE)
    assert len(point.samples) == 3 and point.kernels > 0
    assert point.predicted_seconds > point.kernels * MADE.launch_seconds
    assert point.ratio == point.predicted_seconds / sorted(point.samples)[1]
    worse = replace(point, step="train", predicted_seconds=3 * point.measured_seconds)
    assert predict_host.medians([point, worse]) == {
        **{"decode": point.error, "train": pytest.approx(2.0)},
        "all": pytest.approx((point.error + 2) / 2),
    }


def test_microbenchmarks_take_turns_with_programs(monkeypatch):
    turns: list[str] = []
    least = replace(predict_host.configs()["1m"], num_layers=1, vocabulary=256)
    monkeypatch.setattr(predict_host, "configs", lambda: {"least": least})
    few = calibrate.Sizes(("f32",), (1,), (16,), (16,), (4 << 10,), (1,), chain=4, rounds=3)
    points, found = predict_host.predict({"decode": [("least", 1, 16), ("least", 2, 16)]}, few, turns.append)
    assert [(point.batch, point.ratio > 0) for point in points] == [(1, True), (2, True)]
    heard = [text for text in turns if text.endswith("running") or text == "dispatches"]
    assert heard == ["1m decode: running", "dispatches"] * 2 + ["dispatches"]  # three rounds are a calibration
    assert found.launch_seconds > 0 and found.command == predict_host.COMMAND


@pytest.mark.parametrize(("name", "least"), [("development", 20), ("heldout", 12)])
def test_there_are_programs_of_every_kind(name, least):
    models, by_step = predict_host.configs(), predict_host.SETS[name]
    programs = [(step, *program) for step, of_step in by_step.items() for program in of_step]
    assert len(programs) == len(set(programs)) >= least
    parameters = [models[model].parameters for _, model, _, _ in programs]
    assert max(parameters) >= 100 * min(parameters)
    for step in by_step:
        kinds = {models[model].experts is None for of_step, model, _, _ in programs if of_step == step}
        assert kinds == {True, False}


def test_what_is_held_out_is_in_no_other_set():
    models = predict_host.configs()
    seen, held = (
        [program for of_step in predict_host.SETS[name].values() for program in of_step]
        for name in ("development", "heldout")
    )
    assert not {models[model] for model, _, _ in seen} & {models[model] for model, _, _ in held}
    assert not {(batch, context) for _, batch, context in seen} & {(batch, context) for _, batch, context in held}


def test_a_step_that_a_set_has_not_is_refused(capsys):
    assert predict_host.main(["--step=generate"]) == 2
    assert capsys.readouterr().err == (
        "stepbill: --step=generate: the development set has none; it has decode, prefill, train\n"
    )
