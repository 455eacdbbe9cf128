"""The driver of images, sounds and films, over bills that are made up and can be done by hand."""

from functools import partial

import findings
import pytest
from findings import table
from stepbill.experiments.drivers import multimodal, sweep
from stepbill.profiling.bill import Bill, Row, Work

TOKEN = 20_000_000  # picoseconds of a prompt's token, after the first
PATCH = 1000  # picoseconds that an encoder takes for a pair of positions
HOURLY = 3.5


def made_up(point):
    """A prompt that takes so long a token, and something besides; an encoder as the square of its positions."""
    if point.step == "prefill":
        flops, time = 10**12, 7_000_000 + TOKEN * point.context
    else:
        flops, time = point.batch * point.context**2, point.batch * PATCH * point.context**2
    total = Work(flops, picoseconds=time)
    name = "vision/attention/core" if point.step == "encode" else "mlp/up"
    bill = Bill(
        {"chips": 1, "batch": point.batch, "context": point.context, "target": point.target},
        [Row(name, "forward", None, total, "compute")],
        Work(),
        [],
        total,
    )
    bill.price = {"chip_dollars_per_hour": 1.0, "dollars_per_million_tokens": 1.0}
    return bill


@pytest.fixture
def found(monkeypatch, capsys):
    monkeypatch.setattr(sweep, "sweep", lambda points, *_: {point: made_up(point) for point in points})

    return partial(findings.found, capsys, multimodal.main)


def test_the_encoder_beside_the_tokens_that_it_makes(found):
    one = found("--batch=4", f"--assume=chip.dollars_per_hour.h200={HOURLY}")
    rows = {(row["encoder"], row["positions"]): row for row in table(one, "Encoded")}
    tokens = {
        ("clip-vit-l", 577): 576,
        ("siglip-so400m", 4096): 256,
        ("qwen2-vl-vit", 4 * 299): 299,  # 23 by 13 groups of four patches
        ("qwen2-vl-vit", 4096): 1024,
        ("qwen2-vl-vit", 4 * 2691): 2691,  # 69 by 39
        ("voxtral-encoder", 1500): 375,
    }
    assert {key: row["tokens"] for key, row in rows.items()} == tokens
    for (_, positions), row in rows.items():
        own, read = PATCH * positions**2 * 1e-12, row["tokens"] * TOKEN * 1e-12
        assert (row["encoding"], row["encoding takes"]) == (positions**2, pytest.approx(own))
        assert row["reading it takes"] == pytest.approx(read) and row["encoder of both"] == pytest.approx(
            own / (own + read)
        )
        assert row["as text tokens"] == pytest.approx((own + read) / (TOKEN * 1e-12), abs=0.6)
        assert row["both, $ / M"] == pytest.approx((own + read) * 1e6 * HOURLY / 3600)
    assert one.holds is False and "siglip-so400m" in one.evidence
    read = 256 * TOKEN * 1e-12  # by which every encoder's part is the largest
    assert one.factor == pytest.approx((read + PATCH * 4096**2 * 1e-12) / read)
    assert one.fits["attention/core FLOPs of qwen2-vl-vit, by patches"].exponent == pytest.approx(2)
    assert all("--step=encode --batch=4" in str(command) for command in one.tables[0].commands)


def test_a_small_encoder_lets_the_claim_hold(found, monkeypatch):
    monkeypatch.setattr(f"{__name__}.PATCH", 1)
    assert found().holds is True


def test_a_minute_of_speech_and_of_film_beside_its_text(found):
    assumed = {"media.speech.words_per_minute": 120, "media.speech.tokens_per_word": 1.5}
    one = found(*(f"--assume={name}={value}" for name, value in assumed.items()))
    rows = {row["a minute of"]: row for row in table(one, "A minute")}
    text, speech, film = (rows[name] for name in ("its text", "speech, voxtral-encoder", "film, qwen2-vl-vit"))
    assert text["tokens"] == 180 and text["both"] == pytest.approx(180 * TOKEN * 1e-12)
    assert (speech["tokens"], film["tokens"]) == (
        2 * 375,
        60 * 299,
    )  # two windows; a patch has two frames of two a second
    whole = (750 * TOKEN + 2 * PATCH * 1500**2) * 1e-12
    assert speech["both"] == pytest.approx(whole)
    assert speech["times its text"] == pytest.approx(whole / text["both"])
    assert film["encoding takes"] == pytest.approx(60 * PATCH * (4 * 299) ** 2 * 1e-12)
    assert rows["gemini-audio, tokens alone"]["times its text"] == pytest.approx(60 * 32 / 180)


def test_rules_give_what_is_published(found):
    rows = table(found(), "Tokens by published rules")
    published = {(row["rule of"], row["of"]): row["published"] for row in rows if row["published"] is not None}
    assert sorted(published.values()) == [256, 765, 1105, 1500]
    assert all(row["tokens"] == row["published"] for row in rows if row["published"] is not None)


def test_a_target_without_times_is_a_clear_error(capsys):
    assert multimodal.main(["--target=host"]) == 2
    assert "--target=host: its step times are not known" in capsys.readouterr().err
