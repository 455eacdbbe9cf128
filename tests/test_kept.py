"""What is kept between compilations: where, and that a bill made of it is the same."""

import os
from itertools import pairwise
from pathlib import Path

import pytest
from compiled import ready
from stepbill.profiling import assembler, kept, targets
from test_targets import assembled, square


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("STEPBILL_CACHE", str(tmp_path / "kept"))
    return tmp_path / "kept"


def test_the_folder_is_the_users_own(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("STEPBILL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert str(kept.folder()) == "/somewhere/stepbill"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert kept.folder() == Path(os.path.expanduser("~/.cache/stepbill"))


def program(side: int = 512):
    """Some kernels, in a loop."""
    import jax
    import jax.numpy as jnp

    def function(x):
        return jax.lax.fori_loop(0, 3, lambda _, x: jnp.tanh(x @ x) / jnp.sum(x, 0, keepdims=True), x)

    return jax.jit(function).lower(targets.place(jax.ShapeDtypeStruct((side, side), jnp.bfloat16), "h200"))


def test_kernels_are_made_once_and_text_and_plan_are_the_same(folder: Path, tmp_path: Path, monkeypatch):
    ready("h200")
    monkeypatch.setattr(assembler, "stand_in", lambda tools, folder: tools)
    calls = assembled(tmp_path, monkeypatch)
    found, made = [], [0]
    for _ in range(3):  # on one line, since the text has the numbers of lines
        if len(found) == 2:
            next(folder.iterdir()).unlink()
        found.append(targets.compile(program(), "h200"))
        made.append(calls())
        assert [path.suffix for path in folder.iterdir()] == [".pb"]
    first, again, anew = (after - before for before, after in pairwise(made))
    assert again < anew <= first  # jax 0.12 has a few assembled to see what they take
    assert len({one.text for one in found}) == 1 and found[0].memory == found[1].memory == found[2].memory


def test_a_file_that_is_broken_refuses_nothing(folder: Path):
    ready("h200")
    texts = set()
    for content in (None, b"", b"no kernels", bytes(1000)):
        if content is not None:
            next(folder.iterdir()).write_bytes(content)
        texts.add(targets.compile(program(), "h200").text)
        assert next(folder.iterdir()).stat().st_size > 1000
    assert len(texts) == 1


def test_what_has_grown_too_large_is_begun_anew(folder: Path, monkeypatch: pytest.MonkeyPatch):
    with kept.kernels("x") as file:
        file.write_bytes(b"12345")
    (path,) = folder.iterdir()
    with kept.kernels("x") as file:
        assert file.read_bytes() == b"12345"
    monkeypatch.setattr(kept, "MOST_KERNEL_BYTES", 4)
    with kept.kernels("x") as file:
        assert not file.exists()
    assert path.read_bytes() == b"12345"  # nothing new to keep


def test_what_fails_is_not_kept(folder: Path):
    with pytest.raises(KeyError), kept.kernels("x") as file:
        file.write_bytes(b"half")
        raise KeyError
    assert not folder.exists()


def test_where_nothing_can_be_kept_nothing_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("STEPBILL_CACHE", str(tmp_path / "file" / "below"))
    with kept.kernels("x") as file:
        file.write_bytes(b"x")


@pytest.mark.parametrize("how", ["XLA_FLAGS", "jax's own"])
def test_who_keeps_programs_otherwise_is_left_alone(how: str, folder: Path, tmp_path: Path, monkeypatch):
    import jax

    ready("h200")
    if how == "XLA_FLAGS":
        monkeypatch.setenv("XLA_FLAGS", f"--xla_gpu_kernel_cache_file={tmp_path}/own.pb")
        targets.compile(square("h200", 256), "h200")
    else:
        jax.config.update("jax_compilation_cache_dir", str(tmp_path / "jax"))
        try:
            targets.compile(square("h200", 256), "h200")
        finally:
            jax.config.update("jax_compilation_cache_dir", None)
    assert not folder.exists()
