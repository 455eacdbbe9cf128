"""Turns of processes at one device: alone when exclusive, nobody left out, and given up by whoever dies."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from stepbill.experiments import device_turns

HOLD = """
import pathlib, sys, time
from stepbill.experiments.device_turns import turn
with turn(pathlib.Path(sys.argv[1]), exclusive=True):
    print("held", flush=True)
    time.sleep(600)
"""


def take(folder, log, name, exclusive, seconds=0.0):
    """A thread that takes a turn, and writes down when it has it and when it gives it up."""

    def run():
        with device_turns.turn(folder, exclusive=exclusive):
            log.append((name, "has"))
            time.sleep(seconds)
            log.append((name, "leaves"))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


def until(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_an_exclusive_turn_has_nobody_beside_it(tmp_path):
    inside, alone, lock = [], [], threading.Lock()

    def work(exclusive):
        for _ in range(15):
            with device_turns.turn(tmp_path, exclusive=exclusive):
                with lock:
                    inside.append(exclusive)
                time.sleep(0.002)
                with lock:
                    if exclusive:
                        alone.append(inside == [True])
                    inside.remove(exclusive)

    threads = [threading.Thread(target=work, args=(number % 2 == 0,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(alone) == 45 and all(alone)


def test_shared_turns_have_each_other(tmp_path):
    all_inside = threading.Barrier(3, timeout=60)  # which lets nobody out before all three are in

    def work():
        with device_turns.turn(tmp_path, exclusive=False):
            all_inside.wait()

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not all_inside.broken


def test_no_shared_turn_begins_while_an_exclusive_one_is_waited_for(tmp_path):
    log = []
    with device_turns.turn(tmp_path, exclusive=False):
        waits = take(tmp_path, log, "exclusive", True)
        until(lambda: is_locked(tmp_path / "turnstile.lock"))
        late = [take(tmp_path, log, f"late {number}", False) for number in range(3)]
        time.sleep(0.2)
        assert log == []
    for thread in (waits, *late):
        thread.join(60)
    assert log[:2] == [("exclusive", "has"), ("exclusive", "leaves")] and len(log) == 8


def is_locked(path):
    import fcntl

    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def test_who_dies_gives_up_its_turn(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE)
    assert holder.stdout and holder.stdout.readline() == b"held\n"
    log = []
    waits = take(tmp_path, log, "next", False)
    time.sleep(0.2)
    assert log == []
    os.kill(holder.pid, signal.SIGKILL)
    waits.join(60)
    assert log
    holder.wait()
    holder.stdout.close()


def test_an_error_gives_up_the_turn(tmp_path):
    with pytest.raises(RuntimeError), device_turns.turn(tmp_path, exclusive=True):
        raise RuntimeError
    with device_turns.turn(tmp_path, exclusive=True):
        pass


def test_memory_is_waited_for_until_it_is_free_but_not_for_ever(tmp_path, monkeypatch):
    """An nvidia-smi that has one MiB more each time."""
    smi, count = tmp_path / "nvidia-smi", tmp_path / "count"
    smi.write_text(f'#!/bin/sh\necho >>{count}\necho "$(wc -l <{count}) MiB"\n')
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(device_turns, "POLL_SECONDS", 0.0)
    device_turns.wait_for_memory(3 << 20)
    assert count.read_text().count("\n") == 3
    device_turns.wait_for_memory(1 << 60, seconds=0.1)
    smi.write_text("#!/bin/sh\necho '[N/A]'\n")
    assert device_turns.free_bytes() is None
    monkeypatch.setenv("PATH", "/nonexistent")
    device_turns.wait_for_memory(1 << 60)
