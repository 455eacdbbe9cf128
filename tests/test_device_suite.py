"""The device suite without its device: what ends a row ends no other, what is done is not done again, time is kept."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
from stepbill.experiments import (
    calibrate,
    device_results,
    device_rows,
    device_suite,
    device_table,
    device_turns,
    device_worker,
)
from stepbill.experiments.device_results import Results
from stepbill.profiling import counters
from test_calibration import MADE

HBM = 141 * 10**9
TINY = {row.name: row for row in device_rows.rows(device_suite.TINY_HBM_BYTES, tiny=True)}
MACHINE = device_suite.Machine("host", device_suite.TINY_HBM_BYTES, {"versions": {}})
FIRST = "decode/8b/bf16/b1/1k"
WIDE = '"ID","Kernel Name","dram__bytes_read.sum","dram__bytes_write.sum"\n"","","byte","byte"\n"0","range","{}","{}"\n'


def supervise(folder, rows, seconds=600.0, workers=2, **sabotage):
    """What became of rows by name."""
    results, told = Results(folder), []
    how = {name.replace("_", "/"): what for name, what in sabotage.items()}
    supervisor = device_suite.Supervisor(results, MACHINE, time.time() + seconds, True, told.append, how, workers)
    supervisor.run(rows)
    return {row.name: results.read(row) for row in rows}


# --- rows ------------------------------------------------------------------------------------------------------------


def test_every_row_is_named_once_and_has_what_it_is_held_against():
    rows = device_rows.rows(HBM)
    names = [row.name for row in rows]
    assert len(set(names)) == len(names)
    steps = {row.name: row.work for row in rows if row.part == "steps"}
    for row in rows:
        if row.part in ("counters", "peers"):
            assert steps[row.of_step] == row.work
            assert names.index(row.of_step) < names.index(row.name)
    for name, work in steps.items():
        if name.endswith(device_rows.CUDNN):
            assert replace(work, attention="auto") == steps[name.removesuffix(device_rows.CUDNN)]
    asked = {(model, weights, batch, context)
             for model in ("1b", "3b", "8b") for weights in ("bf16", "int8", "int4:128")
             for batch in (1, 8, 64) for context in (1024, 8192)}  # fmt: skip
    decode = {(w.model, w.weights, w.batch, w.context) for w in steps.values() if w.step == "decode"}
    assert asked <= decode
    assert {row.kind for row in rows if row.part == "ceilings"} >= {"bf16", "int8", "fp8", "copy", "launch"}
    assert {"bf16", "int8", "fp8"} <= calibrate.DTYPES.keys()
    assert names[: len(device_rows.CEILINGS)] == [f"ceilings/{name}" for name in device_rows.CEILINGS]


@pytest.mark.parametrize("model, billions", [("1b", 1.236), ("3b", 3.213), ("8b", 8.030), ("moe", 6.742)])
def test_models_are_of_the_sizes_they_are_called_by(model, billions):
    config = device_rows.config_of(model)
    assert round(config.parameters / 1e9, 3) == billions
    assert config.max_context >= max(device_rows.CONTEXTS.values())


def test_a_smaller_chip_trains_half_the_batch():
    def batch(hbm):
        return next(row.work.batch for row in device_rows.rows(hbm) if row.name == "train/3b/full")

    assert batch(HBM) == 2 * batch(85 * 10**9)


# --- what goes wrong -------------------------------------------------------------------------------------------------


def test_what_ends_a_row_ends_no_other(tmp_path):
    rows = [TINY[f"ceilings/{name}"] for name in ("fp8", "copy", "bf16", "int8", "launch")]
    rows[0], rows[2] = replace(rows[0], limit_seconds=4.0), replace(rows[2], limit_seconds=1.0)
    how = {"ceilings_fp8": "hold", "ceilings_copy": "crash", "ceilings_bf16": "hang", "ceilings_int8": "raise"}
    found = supervise(tmp_path, rows, 600.0, 2, **how)
    statuses = [found[row.name]["status"] for row in rows]
    assert statuses == [
        device_results.TIMED_OUT,
        device_results.CRASHED,
        device_results.TIMED_OUT,
        device_results.FAILED,
        device_results.DONE,
    ]
    assert "SIGSEGV" in found["ceilings/copy"]["error"]
    assert "more than 4 seconds" in found["ceilings/fp8"]["error"]
    assert "more than 1 seconds" in found["ceilings/bf16"]["error"]
    assert found["ceilings/int8"]["error"] == "RuntimeError: as a test asked for"
    assert found["ceilings/launch"]["result"]["per_second"]["launches"] > 0
    # What failed is tried again, after what was never tried; what is done is not.
    before = Results(tmp_path).path("rows", "ceilings/launch", ".json").read_bytes()
    found = supervise(tmp_path, [rows[4], rows[3]], ceilings_launch="raise", ceilings_int8="raise")
    assert found["ceilings/int8"]["status"] == device_results.FAILED
    assert Results(tmp_path).path("rows", "ceilings/launch", ".json").read_bytes() == before


def test_a_worker_that_cannot_even_begin_costs_its_row(tmp_path, monkeypatch):
    monkeypatch.setattr(device_suite.sys, "executable", "/bin/false")
    found = supervise(tmp_path, [TINY["ceilings/copy"], TINY["ceilings/launch"]])
    assert [one["status"] for one in found.values()] == [device_results.CRASHED] * 2
    assert "status 1" in found["ceilings/copy"]["error"]


def test_time_is_kept(tmp_path):
    rows = [replace(TINY["ceilings/copy"], seconds=1.0), TINY["ceilings/launch"]]
    found = supervise(tmp_path, rows, seconds=0.5)
    assert list(found.values()) == [None, None]
    rows = [replace(row, seconds=0.0) for row in rows]
    found = supervise(tmp_path, rows, seconds=4.0, workers=1, ceilings_copy="hang", ceilings_launch="hang")
    assert found["ceilings/copy"]["status"] in (device_results.INTERRUPTED, None)  # None: the machine was too slow
    assert found["ceilings/launch"] is None
    said = device_suite.collect(Results(tmp_path), list(TINY.values()), rows, MACHINE, [], tiny=True)
    reasons = {one["name"]: one["reason"] for one in said["not_run"]}
    assert reasons["ceilings/launch"] == device_table.NO_TIME
    assert reasons["decode/8b/bf16/b1/1k"] != device_table.NO_TIME


def test_killed_it_leaves_nothing_behind_and_goes_on(tmp_path):
    command = [sys.executable, "-m", "stepbill.experiments.device_suite", f"--out={tmp_path}", "--platform=cpu"]
    command += ["--tiny", "--rows=ceilings/(launch|copy)", "--minutes=20"]
    suite = subprocess.Popen([*command, "--sabotage=ceilings/launch=hang"], stderr=subprocess.DEVNULL)
    results, launch, copy = Results(tmp_path), TINY["ceilings/launch"], TINY["ceilings/copy"]
    worker = None
    while worker is None or results.status(copy) != device_results.DONE:
        assert suite.poll() is None
        worker = (results.read(launch) or {}).get("process")
        time.sleep(0.05)
    suite.send_signal(signal.SIGKILL)
    suite.wait()
    while alive(worker):
        time.sleep(0.05)
    done = results.read(copy)
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "ceilings/launch: done" in ran.stderr and "ceilings/copy: done" not in ran.stderr
    assert results.read(copy) == done
    said = json.loads((tmp_path / "results.json").read_text())
    assert (said["schema"], said["tiny"], said["target"]) == (1, True, "host")
    assert [row["name"] for row in said["rows"]] == ["ceilings/copy", "ceilings/launch"]
    assert len(said["runs"]) == 2 and said["machine"]["versions"]["jax"]
    assert "says anything" in (tmp_path / "table.txt").read_text() and "ceilings" in ran.stdout


def alive(process):
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"  # a container without an init keeps the dead
    except FileNotFoundError:
        return False


# --- rows at once ----------------------------------------------------------------------------------------------------


def test_rows_are_prepared_at_once_and_measured_alone(tmp_path):
    rows = [TINY[FIRST], TINY["prefill/8b/2k"], TINY["decode/8b/bf16/b8/1k"]]
    found = list(supervise(tmp_path, rows).values())
    assert [one["status"] for one in found] == [device_results.DONE] * 3, found
    timed = [one["result"]["timed_between"] for one in found]
    assert max(one["began"] for one in found[:2]) < min(begin for begin, _ in timed)
    ended = [one["began"] + one["seconds"] + one["waited_seconds"] for one in found]
    assert found[2]["began"] >= min(ended[:2])  # of two at once, it had to wait for one of them
    in_order = sorted(timed)
    assert all(end <= begin for (_, end), (begin, _) in pairwise(in_order))


def test_waiting_for_a_turn_is_not_held_against_a_row(tmp_path):
    results, row = Results(tmp_path), replace(TINY["ceilings/copy"], limit_seconds=10.0)
    supervisor = device_suite.Supervisor(results, MACHINE, time.time() + 100, True, print, {}, 1)
    results.begin(row)
    held = threading.Event()

    def hold():
        with device_turns.turn(tmp_path, exclusive=True):
            held.set()
            while not results.read(row).get("waiting_since"):
                time.sleep(0.01)
            time.sleep(0.2)

    threading.Thread(target=hold, daemon=True).start()
    held.wait()
    with results.turn(row, exclusive=False):
        entry = results.read(row)
    assert entry["waiting_since"] is None and entry["waited_seconds"] >= 0.2
    results._note(row, began=time.time() - 100, waited_seconds=20.0, waiting_since=time.time() - 75)
    assert supervisor._must_stop(row) is None
    results._note(row, waiting_since=None)
    status, why = supervisor._must_stop(row)
    assert status == device_results.TIMED_OUT and "more than 10 seconds" in why
    results.end(row, status, error=why)
    assert results.read(row)["seconds"] == pytest.approx(80, abs=5) and results.read(row)["waited_seconds"] == 20


def test_a_row_waits_for_what_it_is_held_against(tmp_path):
    supervisor = device_suite.Supervisor(Results(tmp_path), MACHINE, time.time() + 100, True, print, {}, 4)
    step, counted, peer = TINY[FIRST], TINY[f"counters/{FIRST}:range"], TINY[f"peers/{FIRST}:gpt_fast"]
    other = TINY["train/1b/none"]
    assert supervisor._next([counted, peer, step, other], []) == step
    assert supervisor._next([counted, peer, other], [step]) == other
    assert supervisor._next([counted, peer], [step]) is None
    assert supervisor._next([counted, peer], [other]) == counted  # the step is not to be run, or was
    # Nor does one begin that cannot end: not by itself, nor behind those that it has to wait for.
    assert supervisor._next([replace(other, seconds=101)], []) is None
    long = replace(step, exclusive_seconds=60)
    assert supervisor._next([replace(other, exclusive_seconds=60), counted], [long]) is None
    assert supervisor._next([replace(other, exclusive_seconds=30)], [long]) is not None


def test_steps_billed_before_the_calibration_are_predicted_by_it_in_the_end(decoded, tmp_path, capsys):
    _, results = decoded
    shutil.copytree(results.folder, tmp_path, dirs_exist_ok=True)
    before = results.read(TINY[FIRST])["result"]
    assert before["predicted_seconds"] is None
    (tmp_path / device_suite.CALIBRATION).write_text(json.dumps(MADE.to_json()))
    argv = [f"--out={tmp_path}", "--platform=cpu", "--tiny", f"--rows=^{FIRST}$", "--minutes=20", "--format=json"]
    assert device_suite.main(argv) == 0
    (row,) = (row for row in json.loads(capsys.readouterr().out)["rows"] if row["name"] == FIRST)
    assert row["result"]["predicted_seconds"] > 0
    assert row["result"]["predicted_by"]["measured_on"]["date"] == MADE.date
    assert row["result"] | {"predicted_seconds": None, "predicted_by": before["predicted_by"]} == before


# --- what a worker does ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def decoded(tmp_path_factory):
    """A folder in which this process has done one decode row."""
    folder = tmp_path_factory.mktemp("suite")
    job = device_worker.Job(str(folder), FIRST, "host", device_suite.TINY_HBM_BYTES, tiny=True)
    device_worker.do(TINY[FIRST], job, Results(folder))
    return job, Results(folder)


def test_a_step_is_measured_billed_and_traced(decoded):
    _, results = decoded
    entry = results.read(TINY[FIRST])
    assert entry["status"] == device_results.DONE, entry
    result = entry["result"]
    assert result["seconds"] > 0 and result["device_busy_seconds"] > 0 and len(result["untraced_seconds"]) == 10
    assert sum(row["hbm_bytes"] for row in result["rows"]) + result["unattributed_hbm_bytes"] == result["hbm_bytes"]
    assert any(row["measured_seconds"] for row in result["rows"])
    assert results.load_text("hlo", FIRST, ".hlo.txt").startswith("HloModule")
    trace = results.path("traces", FIRST, ".xplane.pb.gz")
    assert trace.stat().st_size > 0


def test_without_our_kernel_a_step_is_measured_with_xlas(monkeypatch, tmp_path):
    def measured(row, job, results):
        if row.work.attention == "auto":
            raise RuntimeError("no such kernel")
        return {"attention": row.work.attention}

    monkeypatch.setattr(device_worker, "measured_step", measured)
    job = device_worker.Job(str(tmp_path), "train/3b/full", "h200", HBM)
    found = device_worker.run_step(TINY["train/3b/full"], job, Results(tmp_path))
    assert found["attention"] == "xla" and "no such kernel" in found["instead"]["because"]
    with pytest.raises(RuntimeError, match="no such kernel"):
        device_worker.run_step(TINY[FIRST], job, Results(tmp_path))


def test_a_trace_is_trimmed_to_its_device(decoded):
    def plane(name, events=b""):
        body = b"\x12" + bytes([len(name)]) + name + b"\x1a" + bytes([len(events)]) + events
        return b"\x0a" + bytes([len(body)]) + body

    gpu, host, hlo = plane(b"/device:GPU:0", b"abc"), plane(b"/host:CPU", b"de"), plane(b"/host:metadata")
    warning = b"\x22\x02hm"
    assert device_worker.trimmed(host + gpu + hlo + warning) == gpu
    assert device_worker.trimmed(host + hlo) == host
    with pytest.raises(ValueError, match="wire type"):
        device_worker.trimmed(b"\x0f")


def test_counters_are_held_against_the_bill(decoded, tmp_path, monkeypatch):
    """An ncu that cannot do ranges, and counts 4096 and 1024 bytes by kernels."""
    job, results = decoded
    ncu = tmp_path / "ncu"
    ncu.write_text(
        "#!/bin/sh\nwhile [ $# -gt 0 ]; do\n"
        '  [ "$1" = --log-file ] && log=$2\n  [ "$1" = app-range ] && range=1\n  shift\ndone\n'
        'if [ "$range" ]; then echo "==ERROR== Failed to profile" >"$log"; exit 1; fi\n'
        f"cat >\"$log\" <<'END'\n{WIDE.format(4096, 1024)}END\n"
    )
    ncu.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    row = TINY[f"counters/{FIRST}:range"]
    device_worker.do(row, job, results)
    entry = results.read(row)
    assert entry["status"] == device_results.DONE, entry
    result = entry["result"]
    assert (result["read_bytes"], result["write_bytes"], result["kernels"]) == (4096, 1024, 1)
    assert "Failed to profile" in result["not_by"][0] and "--clock-control none" in " ".join(result["command"])
    assert result["bill"]["hbm_bytes"] == results.read(TINY[FIRST])["result"]["hbm_bytes"]
    counted = sum(one["counted_bytes"] for one in result["components"].values())
    assert counted + result["bytes_of_kernels_without_an_instruction"] == 5120


def test_without_ncu_the_row_says_so(decoded, monkeypatch):
    job, results = decoded
    monkeypatch.setattr(device_worker, "NCU_PLACES", ())
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(counters.CountersError, match="not installed here"):
        device_worker.run_counters(TINY[f"counters/{FIRST}:kernels"], job, results)


@pytest.mark.parametrize(
    "stats, piece",
    [
        (None, None),  # a CPU's
        ({"largest_free_block_bytes": 7 << 20, "bytes_limit": 99 << 20}, None),  # it is there already
        ({"largest_free_block_bytes": 0, "bytes_limit": 99 << 20, "pool_bytes": 1 << 20}, 6 << 20),
        ({"largest_free_block_bytes": 0, "bytes_limit": 9 << 20, "pool_bytes": 5 << 20}, 4 << 20),  # all that is left
    ],
)
def test_memory_is_taken_in_one_piece(stats, piece, monkeypatch):
    waited = []
    monkeypatch.setattr(device_worker, "MARGIN_BYTES", 1 << 20)
    monkeypatch.setattr("jax.devices", lambda: [SimpleNamespace(memory_stats=lambda: stats)])
    monkeypatch.setattr(device_turns, "wait_for_memory", waited.append)
    device_worker.make_room(5 << 20)
    assert waited == ([] if piece is None else [piece])


def test_what_is_too_large_is_not_tried(tmp_path):
    row = next(row for row in device_rows.rows(HBM) if row.name == "decode/8b/bf16/b64/8k")
    job = device_worker.Job(str(tmp_path), row.name, "l4", HBM)
    device_worker.do(row, job, Results(tmp_path))
    entry = Results(tmp_path).read(row)
    assert entry["status"] == device_results.DOES_NOT_FIT and "l4 has 22.5 GiB" in entry["error"]


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="the test extra has torch for Python 3.11 alone")
@pytest.mark.parametrize("kind", ["gpt_fast", "transformers"])
def test_peers_compute_what_ours_does(decoded, kind, monkeypatch):
    from stepbill.experiments import device_peers

    _, results = decoded
    monkeypatch.setattr(device_peers, "REPEATS", 1)
    result = device_peers.run(TINY[f"peers/{FIRST}:{kind}"], "host", results)
    assert result["seconds"] > 0
    assert 0 < result["apart"] < 2**-6  # bfloat16 has 8 bits; ours and theirs round in other places
    wrong = np.load(results.path("logits", FIRST, ".npy"))[::-1]
    assert np.linalg.norm(wrong - wrong[::-1]) / np.linalg.norm(wrong) > 10 * device_table.AGREEMENT


# --- what is made of it ----------------------------------------------------------------------------------------------


def said_of(**results):
    rows = [{"name": name, "status": "done", "result": result} for name, result in results.items()]
    return {"rows": rows, "not_run": [], "target": "h200", "tiny": False, "machine": {"versions": {}}}


def step(seconds, **more):
    ideal = {"flops": 2 * 10**12, "hbm_bytes": 16 * 10**9}
    common = {"tokens_per_second": 1 / seconds, "ideal": ideal, "mfu": 0.5, "mbu": 0.8, "roofline_seconds": 0.003}
    return common | {"seconds": seconds, "hbm_bytes": 17 * 10**9, "predicted_seconds": 1.09 * seconds} | more


def counted(read, bill, again=0, **components):
    of_bill = {"hbm_bytes": bill, "reread_bytes": again, "requested_bytes": 2 * bill}
    said = {"read_bytes": read, "write_bytes": 0, "bill": of_bill}
    return said | {"components": {name: dict(zip(("counted_bytes", "hbm_bytes"), pair, strict=True))
                                  for name, pair in components.items()}}  # fmt: skip


def test_aims():
    said = said_of(
        **{
            "ceilings/copy": {"bytes_per_second": {"1": 4e12, "2": 3e12}},
            FIRST: step(0.005),
            "decode/8b/int8/b1/1k": step(0.0025),
            "train/3b/full": step(0.3, mfu=0.61, predicted_seconds=0.36),
            f"peers/{FIRST}:gpt_fast": {"seconds": 0.006, "tokens_per_second": 1, "apart": 0.01},
            f"peers/{FIRST}:transformers": {"seconds": 0.002, "tokens_per_second": 1, "apart": 0.5},
            f"counters/{FIRST}:range": counted(100, 100, again=4),
            f"counters/{FIRST}:kernels": counted(100, 90, mlp=(60, 75), loss=(0, 9)),
        }
    )
    aims = {one["aim"]: one for one in device_table.aims(said)}
    assert [one["reached"] is not None and round(one["reached"], 4) for one in aims.values()] == [
        0.8,  # 16 GB in 5 ms of 4 TB/s
        2.0,
        False,  # int4 was not measured
        1.2,  # a peer that computes something else is not counted
        0.61,
        0.07,  # the median of 4 % and 10 %
        0.25,  # of components with any weight
        0.09,  # the median of 9 %, 9 % and 20 %
    ]
    assert [one["met"] for one in aims.values()] == [False, True, None, True, True, False, False, True]
    text = device_table.text(said | {"aims": list(aims.values())})
    assert "computes something else" in text and "not measured" in text and "1.20x" in text


def test_the_table_tells_what_failed_and_what_was_not_run():
    said = said_of() | {"aims": [], "not_run": [{"name": "a/b", "part": "steps", "reason": device_table.NO_TIME}]}
    said["rows"] = [{"name": "x/y", "status": "crashed", "error": "ended by signal 9"}]
    text = device_table.text(said)
    assert "crashed: x/y: ended by signal 9" in text and "no time for it: a/b" in text


def test_clocks_are_those_of_the_row():
    lines = [f"2026/11/24 12:00:0{n}.500, {sm}, 3201, {watts}, 60" for n, sm, watts in
             ((0, 345, 90), (1, 1980, 650), (2, 1200, 700), (3, 1700, 690), (9, 345, 90))]  # fmt: skip
    at = time.mktime((2026, 11, 24, 12, 0, 1, 0, 0, -1))
    found = device_suite.clocks_between([*lines, "2026/11/24 12:00:02", "[N/A], a"], at, at + 3)
    assert found == {
        **{"samples": 3, "sm_mhz_median": 1700, "sm_mhz_least": 1200, "memory_mhz_median": 3201},
        **{"watts_most": 700, "celsius_most": 60},
    }
    assert device_suite.clocks_between(lines, at + 100, at + 200) is None


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv, word",
    [
        ([], "--out"),
        (["--out=x", "--parts=steps,beer"], "'beer'"),
        (["--out=x", "--rows=("], "regular expression"),
        (["--out=x", "--rows=decode/9b"], "--rows=decode/9b"),
        (["--out=x", "--tiny"], "--platform=cpu"),
        (["--dry_run", "--target=v5e"], "--target=v5e"),
        (["--out=x", "--minutes=-1"], "--minutes"),
        (["--out=x", "--sabotage=ceilings/copy=explode"], "--sabotage"),
        (["--out=/nonexistent", "--predict"], "calibration.json"),
    ],
)
def test_wrong_flags_are_one_line(argv, word, capsys):
    assert device_suite.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and word in err


@pytest.mark.skipif(os.path.exists("/dev/nvidiactl"), reason="there is a GPU here")
def test_without_a_gpu_it_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "/nonexistent")
    assert device_suite.main([f"--out={tmp_path}"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "NVIDIA GPU" in err and "--dry_run" in err


def test_dry_run_says_what_fits(capsys):
    assert device_suite.main(["--dry_run", "--target=l4", "--rows=decode/(1b|8b)/bf16/b1/1k$", "--format=json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert rows["decode/1b/bf16/b1/1k"]["fits"] and rows["decode/8b/bf16/b1/1k"]["fits"]
    assert 16e9 < rows["decode/8b/bf16/b1/1k"]["needs_bytes"] < 17e9
    assert device_suite.main(["--dry_run", "--target=l4", "--rows=decode/8b/bf16/b64/8k"]) == 0
    assert "DOES NOT FIT" in capsys.readouterr().out
