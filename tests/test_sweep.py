"""Bills that are compiled in other processes and kept: the same as without, once only, and after any interruption."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from compiled import ready
from stepbill.experiments import flags
from stepbill.experiments.bill import bill_step
from stepbill.experiments.drivers import sweep
from stepbill.experiments.drivers.sweep import Point, Refusal
from stepbill.experiments.flags import UsageError
from stepbill.model.architectures import ARCHITECTURES

NANO = ARCHITECTURES["nano"]
SHORT, LONG = (Point(NANO, "decode", batch=2, context=context, target="h200") for context in (32, 64))
# More than one H200 holds, which is known without compiling.
HUGE = Point(replace(NANO, name="huge", max_context=1 << 30), "decode", batch=1, context=1 << 30, target="h200")


@pytest.fixture
def kept_in(tmp_path, monkeypatch):
    monkeypatch.setenv("STEPBILL_CACHE", str(tmp_path))
    return tmp_path


def no_process(*_, **__):
    raise AssertionError("a process was started")


def test_bills_are_those_of_this_process_in_the_order_asked_for_and_compiled_once(kept_in, monkeypatch):
    ready("h200")
    said = []
    bills = sweep.bills([LONG, SHORT, LONG], jobs=2, say=said.append)
    assert list(bills) == [LONG, SHORT] and len(said) == 2 and said[1].startswith("2 of 2 compiled: nano decode")
    alone = bill_step(SHORT.request).to_json()
    there = bills[SHORT].to_json()
    assert there == json.loads(json.dumps(alone))
    monkeypatch.setattr(subprocess, "Popen", no_process)
    assert sweep.bills([SHORT, LONG])[SHORT].to_json() == there
    assert {path.suffix for path in kept_in.iterdir()} == {".json", ".pb"}  # bills, and kernels they were made of


def test_what_was_killed_half_way_goes_on(kept_in):
    ready("h200")
    program = (
        "from stepbill.experiments.drivers import sweep\n"
        "from stepbill.model.architectures import ARCHITECTURES\n"
        "points = [sweep.Point(ARCHITECTURES['nano'], 'decode', 2, context, 'h200') for context in (32, 64)]\n"
        "sweep.sweep(points, jobs=1)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program])
    while not (there := list(kept_in.glob("*.json"))) and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert there == [sweep._file(SHORT)], "the first was not done when it ended"
    written = there[0].stat().st_mtime_ns
    bills = sweep.bills([SHORT, LONG], jobs=1)
    assert there[0].stat().st_mtime_ns == written, "it was compiled again"
    assert [bill.program["context"] for bill in bills.values()] == [32, 64]


def test_what_does_not_fit_says_how_many_chips_it_needs_each_time(kept_in, monkeypatch):
    ready("h200")
    refused = sweep.sweep([HUGE], jobs=1)[HUGE]
    assert isinstance(refused, Refusal) and "does not fit" in refused.text and "mesh" in refused.text
    monkeypatch.setattr(subprocess, "Popen", no_process)
    with pytest.raises(UsageError, match="does not fit"):
        sweep.bills([HUGE])


def test_a_worker_that_dies_costs_its_own_point_alone(kept_in, monkeypatch):
    ready("h200")
    dying = kept_in / "sitecustomize.py"
    dying.write_text("import os, sys\nsys.stderr.write('out of luck\\n')\nsys.stderr.flush()\nos._exit(7)\n")
    monkeypatch.setenv("PYTHONPATH", str(kept_in))
    outcomes = sweep.sweep([SHORT, LONG], jobs=1)
    for point, outcome in outcomes.items():
        assert outcome == Refusal(f"{point}: the compiler crashed (status 7): out of luck")
        assert sweep.kept(point) is None


def test_half_a_file_is_no_bill(kept_in):
    path = sweep._file(SHORT)
    path.write_text('{"bill": {"schema": 1')
    assert sweep.kept(SHORT) is None


def test_another_process_finds_what_was_kept(kept_in):
    """Also where a worker keeps jax to the CPU by itself; where it was told to: see above."""
    ready("h200")
    environment = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    found = "from test_sweep import *; found = sweep.kept(SHORT); sweep.bills([SHORT]); print(found is not None)"
    for answer in ("False", "True"):
        command = [sys.executable, "-c", found]
        ran = subprocess.run(command, env=environment, cwd=os.path.dirname(__file__), capture_output=True, text=True)
        assert (ran.stdout.strip(), ran.returncode) == (answer, 0), ran.stderr
    assert len(list(kept_in.glob("*.json"))) == 1


@pytest.mark.parametrize(
    "other",
    [
        replace(SHORT, config=replace(NANO, norm_epsilon=1e-6)),
        replace(SHORT, step="prefill"),
        replace(SHORT, batch=3),
        replace(SHORT, context=33),
        replace(SHORT, target="h100"),
        replace(SHORT, mesh="tensor=2"),
    ],
)
def test_each_part_of_a_point_is_in_its_key(other):
    assert sweep._file(other) != sweep._file(SHORT)


def test_surroundings_are_in_the_key(tmp_path, monkeypatch):
    before = sweep._file(SHORT)
    for change in ("sources", "versions", "environment", "machine"):
        monkeypatch.setattr(sweep, "_surroundings", lambda change=change: {change: "other"})
        assert sweep._file(SHORT) != before
    monkeypatch.undo()
    (tmp_path / "model").mkdir()
    monkeypatch.setattr(sweep, "ROOT", tmp_path)
    digests = []
    for text in ("a = 1", "a = 2"):
        (tmp_path / "model" / "config.py").write_text(text)
        digests.append(sweep._surroundings.__wrapped__()["sources"])
    assert digests[0] != digests[1]


def test_the_command_of_a_point_is_that_of_its_bill():
    config = replace(ARCHITECTURES["llama3-8b"], num_layers=2, weights="int8", name="llama3-8b(L=2)")
    point = Point(config, "decode", batch=8, context=128, target="h200", mesh="tensor=2")
    assert point.command is not None
    values = flags.parse(point.command.split()[1:])
    request = flags.request(values)
    assert replace(request, given={}) == replace(point.request, given={}, weights="int8")
    assert replace(point, config=replace(config, norm_epsilon=1.0)).command is None
