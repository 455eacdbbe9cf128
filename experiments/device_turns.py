"""Turns of several processes at the one GPU that they share, so that nothing disturbs what is measured.

A shared turn is for what uses the device a little and times nothing. An exclusive one is for all that is timed, and for
compilers that choose kernels by timing them. The locks are those of files: what ends a process ends its turn.
"""

import fcntl
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

MEMORY_SECONDS, POLL_SECONDS = 30.0, 0.25  # how long memory is waited for at most, and how often it is asked for


@contextmanager
def turn(folder: Path, *, exclusive: bool) -> Iterator[None]:
    """Waits for a turn, and has it.

    Who waits stands in a turnstile meanwhile, through which everybody has to go: so no shared turn begins while an
    exclusive one is waited for.
    """
    with (folder / "turnstile.lock").open("w") as turnstile, (folder / "device.lock").open("w") as device:
        fcntl.flock(turnstile, fcntl.LOCK_EX)
        fcntl.flock(device, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)
        fcntl.flock(turnstile, fcntl.LOCK_UN)
        try:
            yield
        finally:
            fcntl.flock(device, fcntl.LOCK_UN)  # closing would not do it where a process was forked meanwhile


def wait_for_memory(needs: int, seconds: float = MEMORY_SECONDS) -> None:
    """Until the device has so many bytes free, or for so long: a process that has measured and is still at its bill
    keeps what it took."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        free = free_bytes()
        if free is None or free >= needs:
            return
        time.sleep(POLL_SECONDS)


def free_bytes() -> int | None:
    """Of the device's memory; None where nvidia-smi does not say."""
    mebibytes, _, unit = (ask_smi(["memory.free"]) or [""])[0].partition(" ")
    return int(mebibytes) << 20 if mebibytes.isdigit() and unit == "MiB" else None


def ask_smi(names: Sequence[str]) -> list[str] | None:
    """What nvidia-smi says of the first GPU, value by value; None where it is not there or says something else."""
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return None
    query = [smi, f"--query-gpu={','.join(names)}", "--format=csv,noheader", "--id=0"]
    try:
        ran = subprocess.run(query, capture_output=True, text=True, timeout=20, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired):
        return None
    values = [value.strip() for value in ran.stdout.strip().split(",")]
    return values if ran.returncode == 0 and len(values) == len(names) else None
