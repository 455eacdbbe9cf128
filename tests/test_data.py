"""What is trained on: whole, in an order that a number determines, and never what is held out."""

import hashlib
import json
import os
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stepbill.experiments import data
from stepbill.experiments.data import HELD_OUT, Batches, corpus


@pytest.fixture
def texts(tmp_path):
    """200 files of text, each unlike the others, of which six happen to be held out."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for n in range(200):
        (folder / f"{n:03}.txt").write_text(f"number {n}: " + f"<{n}>" * (20 + n % 7))
    return folder


def of(folder, tmp_path, **kw):
    return corpus(f"{folder}/*", tmp_path / "cache", **kw)


# ---- the corpus


def test_what_is_held_out_is_never_trained_on(texts, tmp_path):
    it = of(texts, tmp_path)
    train, held_out = bytes(it.train), bytes(it.held_out)
    for path in texts.iterdir():
        text = path.read_bytes()
        assert (text in train) != (text in held_out)
    assert sum(path.read_bytes() in held_out for path in texts.iterdir()) == 6
    assert it.held_out_bytes == len(held_out) and it.train_bytes == len(train)
    assert len(train) + len(held_out) == sum(path.stat().st_size for path in texts.iterdir())


def test_a_copy_of_what_is_held_out_is_not_trained_on(texts, tmp_path):
    before = of(texts, tmp_path)
    for path in list(texts.iterdir()):
        (texts / f"copy of {path.name}").write_bytes(path.read_bytes())
    after = of(texts, tmp_path)
    assert sorted(bytes(after.held_out)) == sorted(bytes(before.held_out))
    assert len(after.train) == len(before.train)


def test_more_files_leave_what_is_held_out_as_it_was(texts, tmp_path):
    before = bytes(of(texts, tmp_path).held_out)
    for n in range(200, 250):
        (texts / f"{n}.txt").write_text(f"more, {n}" * 20)
    after = of(texts, tmp_path)
    assert bytes(after.held_out).startswith(before) and after.train_bytes > 30_000


@pytest.mark.parametrize("count", [1, 2, 3])
def test_of_few_files_the_end_is_held_out(tmp_path, count):
    folder = tmp_path / "few"
    folder.mkdir()
    for n in range(count):
        (folder / f"{n}").write_bytes(bytes(range(n, n + 200)))
    it = of(folder, tmp_path)
    whole = b"".join(path.read_bytes() for path in sorted(folder.iterdir()))
    assert bytes(it.train) + bytes(it.held_out) == whole
    assert it.held_out_bytes == len(it.held_out) == len(whole) // HELD_OUT


def test_one_large_file_is_not_held_out_whole(tmp_path):
    folder = tmp_path / "one"
    folder.mkdir()
    texts = (b"%d" % n * 1000 for n in range(1000))
    text = next(text for text in texts if int(hashlib.sha256(text).hexdigest()[:16], 16) % HELD_OUT == 0)
    (folder / "text").write_bytes(text)
    it = of(folder, tmp_path)
    assert bytes(it.train) + bytes(it.held_out) == text and len(it.held_out) == len(text) // HELD_OUT


def test_an_empty_file_is_no_harm_and_too_little_text_is_named(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "empty").touch()
    with pytest.raises(ValueError, match=r"data is .*; it has 0 bytes, too little"):
        of(folder, tmp_path)
    (folder / "short").write_text("x" * 99)
    with pytest.raises(ValueError, match="it has 99 bytes, too little"):
        of(folder, tmp_path)
    (folder / "text").write_text("yz" * 100)
    assert len(of(folder, tmp_path).train) == 299 - 5
    with pytest.raises(ValueError, match=r"data is .*nothing; it must match at least one file"):
        corpus(f"{folder}/nothing", tmp_path / "cache")


def test_the_standard_library_is_there_and_its_tests_are_not():
    paths = data.standard_library()
    names = {path.name for path in paths}
    assert {"argparse.py", "typing.py"} <= names and len(paths) > 300
    assert not any({"test", "site-packages"} & set(path.parts[-4:]) for path in paths)


# ---- its cache


def test_a_corpus_is_kept_by_its_content(texts, tmp_path):
    first = of(texts, tmp_path)
    elsewhere = texts.rename(tmp_path / "elsewhere")
    assert of(elsewhere, tmp_path).digest == first.digest
    assert len(list((tmp_path / "cache").iterdir())) == 1
    path = elsewhere / "007.txt"
    before = path.stat()
    path.write_text(path.read_text().replace("<7>", "<8>"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    changed = of(elsewhere, tmp_path)
    assert changed.digest != first.digest
    assert b"<7>" not in bytes(changed.train) + bytes(changed.held_out)


def test_tokens_of_another_tokenizer_are_another_corpus(texts, tmp_path):
    def words(text):
        return [70_000 + len(word) for word in text.split()]

    plain, other = of(texts, tmp_path), of(texts, tmp_path, encode=words, name="words")
    assert plain.digest != other.digest and other.train.dtype == np.uint32 and other.train.max() > 70_000
    assert (other.train_bytes, other.held_out_bytes) == (plain.train_bytes, plain.held_out_bytes)
    again = of(texts, tmp_path, encode=None, name="words")  # as it was kept
    np.testing.assert_array_equal(again.train, other.train)
    assert isinstance(again.train, np.memmap)


def test_a_cache_appears_whole_or_not_at_all(texts, tmp_path):
    seen = []

    def fails_in_the_end(text):
        seen.append(text)
        if len(seen) == 150:
            raise KeyboardInterrupt
        return [1]

    with pytest.raises(KeyboardInterrupt):
        of(texts, tmp_path, encode=fails_in_the_end, name="x")
    assert list((tmp_path / "cache").iterdir()) == []
    assert len(of(texts, tmp_path, encode=lambda text: [1], name="x").train) > 150


def test_two_runs_that_make_the_same_cache_do_not_disturb_each_other(texts, tmp_path):
    inner = []

    def encode(text):
        if not inner:
            inner.append(None)
            inner[0] = of(texts, tmp_path, encode=encode, name="x")
        return list(text.encode())

    outer = of(texts, tmp_path, encode=encode, name="x")
    np.testing.assert_array_equal(outer.train, inner[0].train)
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_an_unwritable_cache_is_an_os_error(texts, tmp_path):
    (tmp_path / "cache").write_text("in the way")
    with pytest.raises(OSError, match="cache"):
        of(texts, tmp_path)


# ---- batches

TOKENS = np.arange(1000, dtype=np.uint32)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(1, 7), st.integers(1, 40), st.integers(0, 2**32), st.integers(50, 300))
def test_an_epoch_has_each_window_once(batch, context, seed, size):
    it = Batches(TOKENS[:size], batch, context, seed)
    windows = it.windows
    rows = np.concatenate([it[n] for n in range(-(-3 * windows // batch))])[: 3 * windows]
    expected = {tuple(range(start, start + context + 1)) for start in range(0, size - context, context)}
    epochs = [list(map(tuple, rows[n * windows : (n + 1) * windows].tolist())) for n in range(3)]
    for epoch in epochs:
        assert len(epoch) == len(expected) and set(epoch) == expected
    if windows > 10:
        assert epochs[0] != epochs[1] and epochs[0] != sorted(epochs[0])


def test_a_batch_is_a_function_of_its_number_and_the_seed():
    it = Batches(TOKENS, 4, 16, 7)
    there = [it[n] for n in range(40)]
    back = [Batches(TOKENS, 4, 16, 7)[n] for n in reversed(range(40))]  # as a run that is resumed there makes it
    np.testing.assert_array_equal(there, back[::-1])
    assert (replace(it, seed=8)[0] != it[0]).any()
    assert it[0].dtype == np.int32 and it[0].shape == (4, 17)


def test_what_is_measured_is_spread_over_the_text_and_not_shuffled():
    it = Batches(TOKENS, 2, 10, 3)
    everything = np.concatenate(list(it.evenly(None)))
    np.testing.assert_array_equal(everything[:, 0], np.arange(0, 980, 10))
    some = np.stack(list(it.evenly(4)))
    assert some.shape == (4, 2, 11)
    np.testing.assert_array_equal(some[:, 0, 0], [0, 240, 480, 720])
    few = list(Batches(TOKENS[:50], 8, 10).evenly(4))  # fewer than one batch
    assert len(few) == 1 and few[0].shape == (4, 11)


def test_less_than_a_window_is_named():
    assert Batches(TOKENS[:11], 1, 10).windows == 1
    with pytest.raises(ValueError, match="context is 10; the held-out text has 10 tokens, less than one window of 11"):
        Batches(TOKENS[:10], 1, 10, name="held-out text")


def test_what_is_kept_says_what_it_is(texts, tmp_path):
    it = of(texts, tmp_path)
    (folder,) = (tmp_path / "cache").iterdir()
    about = json.loads((folder / "about.json").read_text())
    assert about == {"dtype": "uint8", "bytes": [it.train_bytes, it.held_out_bytes]}
