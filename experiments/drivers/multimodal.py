"""Driver 9: what images, sounds and films cost beside text.

    python -m stepbill.experiments.drivers.multimodal --target=h200

They become tokens by rules that the vendors publish, and an encoder makes them: a vision transformer of patches,
Whisper's of a spectrum. Compiled are both the encoder and the decoder that reads its tokens. A token of a prompt costs
what a prompt of 4096 positions costs more than one of 1024, over the positions that it has more.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from absl.flags import FlagValues

from ...profiling import chips, media, targets
from ...profiling.assumptions import Assumptions
from ...profiling.bill import Bill
from .. import flags
from ..assumptions import facts
from .driver import Bills, Driver, bill, require_times
from .finding import Finding, Plot, Quantity, Table, power_law
from .sweep import Point

if TYPE_CHECKING:
    from ...model.encoder_config import EncoderConfig

SHORT, LONG = 1024, 4096  # prompts between which a token has its price
SMALL = 0.1  # of the time: an encoder that takes no more is small
HD = (1920, 1080)
MINUTE, MILLION, HOUR = 60, 1_000_000, 3600
CLAIM = (
    "An image, a sound or a film costs what its tokens cost: the encoder that makes them is small beside the decoder."
)
# (what, by whose rule, its size; what it is called in published.csv)
IMAGES = (
    ("gpt-4o", (1024, 1024), "gpt-4o-1024x1024"),
    ("gpt-4o", (2048, 4096), "gpt-4o-2048x4096"),
    ("gpt-4o", HD, ""),
    ("gemma3", (896, 896), "gemma3-image"),
    ("llava-1.5", HD, ""),
    ("qwen2-vl", (896, 896), ""),
    ("qwen2-vl", HD, ""),
    ("claude", HD, ""),
    ("gemini", HD, ""),
)


@dataclass(frozen=True)
class Seen:
    """What an encoder is given, and a decoder by it.

    name: of it, for people. seconds: of a sound, or of a film, that it is. step: so many of them at once.
    """

    name: str
    tokens: int
    step: Point
    seconds: float = 0.0

    @property
    def encoder(self) -> "EncoderConfig":
        return self.step.config  # pyright: ignore[reportReturnType]


def _define(to: flags.Definer) -> None:
    to.count("batch", 8, "images or sounds that are encoded together")
    to.string("mesh", flags.AUTO, "of the decoder: data=N,tensor=N, or auto: for each step the smallest that fits")


def _seen(values: FlagValues, known: Assumptions) -> list[Seen]:
    """What is encoded, each the more positions the later of one encoder."""
    from ...model.architectures import ENCODERS

    def seen(encoder: str, name: str, context: int | None, tokens: int, seconds: float = 0.0) -> Seen:
        config = ENCODERS[encoder]
        step = Point(config, "encode", values.batch, context or config.max_context, values.target)
        return Seen(name, tokens, step, seconds)

    def native(name: str, width: int, height: int, seconds: float = 0.0) -> Seen:
        tokens = media.image_tokens("qwen2-vl", width, height, known)
        return seen("qwen2-vl-vit", name, tokens * ENCODERS["qwen2-vl-vit"].merged, tokens, seconds)

    window = known.number("media.audio.voxtral.window_seconds")
    frame = known.whole("media.film.width"), known.whole("media.film.height")
    lasting = ENCODERS["qwen2-vl-vit"].frames / known.number("media.film.frames_per_second")
    return [
        seen("clip-vit-l", "image, 336 x 336", None, media.image_tokens("llava-1.5", 336, 336, known)),
        seen("siglip-so400m", "image, 896 x 896", None, media.image_tokens("gemma3", 896, 896, known)),
        native(f"film, {lasting:g} s of {frame[0]} x {frame[1]}", *frame, lasting),
        native("image, 896 x 896", 896, 896),
        native(f"image, {HD[0]} x {HD[1]}", *HD),
        seen("voxtral-encoder", f"sound, {window:g} s", None, media.audio_tokens("voxtral", window, known), window),
    ]


def _prompts(values: FlagValues) -> list[Point]:
    config = flags.model_config(values, "prefill")
    return [Point(config, "prefill", 1, context, values.target, values.mesh) for context in (SHORT, LONG)]


def _points(values: FlagValues) -> list[Point]:
    require_times(values.target)
    return [*(one.step for one in _seen(values, facts(values))), *_prompts(values)]


def _find(values: FlagValues, bills: Bills, known: Assumptions) -> Finding:
    short, long = (bill(bills, point) for point in _prompts(values))
    token = (_chip_seconds(long) - _chip_seconds(short)) / (LONG - SHORT)
    seen = _seen(values, known)
    encoders = {one: bill(bills, one.step) for one in seen}
    encoding = {one: found.total.seconds / values.batch for one, found in encoders.items()}
    shares = {one: encoding[one] / (encoding[one] + one.tokens * token) for one in seen}
    hourly = chips.priced(targets.chip(values.target), known).dollars_per_hour
    minutes = _minutes(seen, encoding, token, hourly, known)
    times = [float(row[5] or 0) for row in minutes.rows[1:3]]
    least, most = (f(seen, key=lambda one: shares[one]) for f in (min, max))
    native = [one for one in seen if one.encoder.positions == "rope"]
    core = [
        (one.step.context, encoders[one].component("vision/attention/core").matmul / values.batch) for one in native
    ]
    spent = [(one.step.context, encoding[one]) for one in native]
    fits = {
        "attention/core FLOPs of qwen2-vl-vit, by patches": power_law(core),
        "time of qwen2-vl-vit, by patches": power_law(spent),
    }
    decoder, of_core = flags.model_config(values, "prefill").name, power_law(core)
    evidence = (
        f"Beside {decoder}, which reads its tokens, the encoder takes {shares[least]:.1%} ({least.encoder.name}, "
        f"{least.name}) to {shares[most]:.1%} ({most.encoder.name}, {most.name}) of the time; its attention grows with "
        f"{of_core}. A minute of speech costs {times[0]:.3g} times its text, one of film {times[1]:.3g} times."
    )
    return Finding(
        "multimodal",
        MULTIMODAL.question,
        values.target,
        CLAIM,
        max(shares.values()) <= SMALL,
        evidence,
        MULTIMODAL.command(values),
        tables=(_encoded(seen, encoders, encoding, shares, token, hourly), minutes, _rules(known)),
        plots=(
            Plot(
                "The encoder and the tokens that it makes, for an image",
                Quantity("tokens"),
                Quantity("time", "s"),
                {
                    "encoder, qwen2-vl-vit": tuple((one.tokens, encoding[one]) for one in native),
                    "decoder": tuple((one.tokens, one.tokens * token) for one in native),
                },
            ),
        ),
        fits=fits,
        notes=(
            f"an encoder takes {values.batch} at once; times are at the roofline: a lower bound for both",
            "clip-vit-l and siglip-so400m without what maps their features to a decoder's width; the others with it",
            "of a film pictures are counted, and no sound; of GPT-4o, Claude and Gemini nobody says what encodes them",
        ),
        headline=f"the encoder is up to {shares[most]:.0%} of it; a minute of speech is {times[0]:.2g} times its text, "
        f"one of film {times[1]:.3g}",
        factor=1 / (1 - shares[most]),  # of what its tokens alone would cost
    )


def _chip_seconds(found: Bill) -> float:
    return found.total.seconds * found.program["chips"]


def _dollars(chip_seconds: float, hourly: float | None) -> float | None:
    return None if hourly is None else chip_seconds / HOUR * hourly


def _encoded(
    seen: list[Seen],
    bills: Mapping[Seen, Bill],
    encoding: Mapping[Seen, float],
    shares: Mapping[Seen, float],
    token: float,
    hourly: float | None,
) -> Table:
    columns = (
        *(Quantity("encoder"), Quantity("of"), Quantity("positions"), Quantity("tokens")),
        *(Quantity("encoding", "FLOP"), Quantity("encoding takes", "s"), Quantity("reading it takes", "s")),
        *(Quantity("encoder of both", "%"), Quantity("as text tokens"), Quantity("both, $ / M", "$")),
    )
    rows = tuple(
        (
            *(one.encoder.name, one.name, one.step.context, one.tokens),
            bills[one].total.matmul / bills[one].program["batch"],
            *(encoding[one], one.tokens * token, shares[one]),
            round(encoding[one] / token) + one.tokens,
            _dollars((encoding[one] + one.tokens * token) * MILLION, hourly),
        )
        for one in seen
    )
    return Table("Encoded, and read by the decoder", columns, rows, tuple(one.step.command for one in seen))


def _minutes(
    seen: list[Seen], encoding: Mapping[Seen, float], token: float, hourly: float | None, known: Assumptions
) -> Table:
    """A minute of text, of speech, of film; and of others' sounds and films, of which the tokens alone are known."""
    words = known.number("media.speech.words_per_minute") * known.number("media.speech.tokens_per_word")
    told: list[tuple[str, float, float | None]] = [("its text", words, None)]
    for one in sorted((one for one in seen if one.seconds), key=lambda one: one.encoder.kind):
        name, count = {"audio": "speech", "vision": "film"}[one.encoder.kind], MINUTE / one.seconds
        told.append((f"{name}, {one.encoder.name}", one.tokens * count, encoding[one] * count))
    for kind in known.members("media.rate"):
        told.append((f"{kind}, tokens alone", media.rated_tokens(kind, MINUTE, known), None))
    columns = (
        *(Quantity("a minute of"), Quantity("tokens"), Quantity("encoding takes", "s"), Quantity("reading takes", "s")),
        *(Quantity("both", "s"), Quantity("times its text", "x"), Quantity("both, $ / M", "$")),
    )
    rows = []
    for name, tokens, own in told:
        both = tokens * token + (own or 0.0)
        rows.append(
            (name, round(tokens), own, tokens * token, both, both / (words * token), _dollars(both * MILLION, hourly))
        )
    return Table("A minute of speech and of film beside its text", columns, tuple(rows))


def _rules(known: Assumptions) -> Table:
    """Tokens by the published rules, beside what the vendors publish of single cases."""
    from ..published import cases

    published = {case.name: case.published for case in cases()}
    columns = (Quantity("rule of"), Quantity("of"), Quantity("tokens"), Quantity("published"))
    rows = [
        (name, f"image, {width} x {height}", media.image_tokens(name, width, height, known), published.get(case))
        for name, (width, height), case in IMAGES
    ]
    rows += [
        (name, "sound, 30 s", media.audio_tokens(name, 30, known), published.get(f"{name}-30s"))
        for name in known.members("media.audio")
    ]
    return Table("Tokens by published rules", columns, tuple(rows))


MULTIMODAL = Driver(
    "multimodal", "What do images, sound and film cost beside text?", _define, _points, _find, "llama3-8b"
)
main = MULTIMODAL.main

if __name__ == "__main__":
    sys.exit(main())
