"""What a real NVIDIA H200 did, beside the bill: data/h200 was kept of `device_suite` on 2026-11-27 (driver 580.159,
jax 0.11.2). Decode of Llama 3 8B in bfloat16 (batch 1, context 1024), and training of 3 B (8 x 2048, remat full); of
the same day a prefill of 8192 positions by cuDNN's attention, whose time is in results/h200-fifth.json."""

import gzip
import json
from functools import cache
from pathlib import Path

import pytest
from stepbill.experiments.device_worker import launches
from stepbill.profiling import calibration, counters, dumps, hlo, targets, trace
from stepbill.profiling.bill import Bill
from stepbill.profiling.walk import itemize_module

DATA = Path(__file__).parent / "data" / "h200"
RESULTS = Path(__file__).parents[1] / "results"
STEPS = ("decode-8b", "train-3b")


@cache
def billed(name: str) -> tuple[Bill, list[trace.Execution]]:
    module = hlo.parse(dumps.read(DATA / f"{name}.hlo.txt.gz"))
    executions = trace.read(DATA / f"{name}.xplane.pb.gz").executions(module)
    h200 = targets.chip("h200")
    bill = itemize_module(module, h200, measured=trace.typical(executions).spent.by_name)
    bill.measured = trace.facts(bill, executions, h200)
    return bill, executions


@pytest.mark.parametrize("name", STEPS)
def test_every_kernel_is_joined_and_the_bill_adds_up(name):
    bill, executions = billed(name)
    bill.check()
    assert len(executions) == 3 and not any(one.unjoined for one in executions)
    facts = bill.measured
    assert facts is not None and facts["joined"] == 1 and facts["coverage"] > 0.999
    assert bill.total.measured_picoseconds == round(facts["busy_seconds"] * 1e12)
    assert not bill.unknown


def test_copies_that_run_beside_others_are_joined_though_a_trace_calls_them_by_another_name():
    bill, executions = billed("train-3b")
    spent = trace.typical(executions).spent.by_name
    beside = {name: time for name, time in spent.items() if name.startswith("fusion-start")}
    assert len(beside) == 7 and max(beside, key=lambda name: beside[name]) == "fusion-start.2"  # writes [8,2048,3072]
    assert bill.unattributed.measured_picoseconds == 0


@pytest.mark.parametrize("name", STEPS)
def test_no_component_was_faster_than_its_roofline(name):
    """But for what takes next to no time, where its bytes may never have to leave the L2."""
    bill, _ = billed(name)
    components = {row.component for row in bill.rows}
    works = {name: bill.component(name) for name in components}
    large = {name: work for name, work in works.items() if work.picoseconds > 0.001 * bill.total.picoseconds}
    assert len(large) >= 6
    for component, work in large.items():
        assert work.picoseconds < work.measured_picoseconds, component


def test_a_prefill_by_cudnn_is_billed_and_takes_what_was_predicted():
    """By the calibration of that machine, of microbenchmarks alone: within a tenth."""
    module = hlo.parse(dumps.read(DATA / "prefill-8b-cudnn.hlo.txt.gz"))
    rates = calibration.read(RESULTS / "h200-calibration.json")
    bill = itemize_module(module, targets.chip("h200"), calibration=rates)
    bill.check()
    assert not bill.unknown and not bill.unattributed.flops
    layers, heads, width, length = 32, 32, 128, 8192
    assert bill.component("attention/core").matmul == 4 * layers * heads * width * length**2 // 2
    rows = json.loads((RESULTS / "h200-fifth.json").read_text())["rows"]
    (measured,) = (row["result"]["seconds"] for row in rows if row["name"] == "prefill/8b/8k/cudnn")
    assert bill.total.predicted_picoseconds / 1e12 == pytest.approx(measured, rel=0.1)
    assert bill.total.picoseconds / 1e12 < measured


def test_dram_counters_of_a_decode_step_say_what_the_bill_says():
    """Nsight Compute counted each kernel of one step: `--cache-control none`, so what the L2 served is not in it."""
    counted = counters.parse(gzip.decompress((DATA / "decode-8b.ncu.csv.gz").read_bytes()).decode())
    of_all = [
        (kernel, owner)
        for _, kernel, owner in launches(gzip.decompress((DATA / "decode-8b.xplane.pb.gz").read_bytes()))
    ]
    launched = of_all[: len(of_all) // 3]
    bill, _ = billed("decode-8b")
    assert len(counted) == len(launched) == 678
    by_name, nobodys = counters.by_instruction(counted, launched)
    assert not nobodys
    assert bill.total.hbm_bytes == pytest.approx(sum(one.bytes for one in counted), rel=0.005)
    module = hlo.parse(dumps.read(DATA / "decode-8b.hlo.txt.gz"))
    of_bytes = itemize_module(module, targets.chip("h200"), measured=by_name)
    assert of_bytes.total.measured_picoseconds == sum(one.bytes for one in counted)
    for component in ("attention/qkv", "attention/core", "attention/out", "mlp/up", "mlp/down", "logits"):
        work = of_bytes.component(component)
        assert work.hbm_bytes == pytest.approx(work.measured_picoseconds, rel=0.10), component  # the aim; 0.063 at most
