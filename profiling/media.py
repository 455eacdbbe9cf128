"""How many positions an image or a sound takes in a decoder's context: the vendors' published rules.

The rules are functions of all that they depend on; `image_tokens` and `audio_tokens` fill them in with the facts of a
vendor's own, `media.image.*` and `media.audio.*` of assumptions.py.
"""

import math
from fractions import Fraction

from .assumptions import Assumptions, load

_FACTS = load()


def tiled_image_tokens(
    width: int,
    height: int,
    *,
    base: int = _FACTS.whole("media.image.gpt-4o.base"),
    tile: int = _FACTS.whole("media.image.gpt-4o.tile"),
    side: int = _FACTS.whole("media.image.gpt-4o.side"),
    longest: int = _FACTS.whole("media.image.gpt-4o.longest"),
    shortest: int = _FACTS.whole("media.image.gpt-4o.shortest"),
) -> int:
    """Tokens of an image at high detail, by OpenAI's rule, that of GPT-4o (its guide to images and vision).

    The image is made to fit in a square of `longest` pixels, then its shorter side to be at most `shortest`; `tile`
    tokens for each square of `side` that it needs, and `base` for the whole. Never enlarged.
    """
    scale = min(Fraction(1), Fraction(longest, max(width, height)))
    scale = min(scale, Fraction(shortest, min(width, height)))
    across, down = (math.ceil(pixels * scale / side) for pixels in (width, height))
    return base + tile * across * down


def patch_tokens(side: int, patch: int, pooled: int = 1) -> int:
    """Tokens of a square image of `side` pixels cut into patches of `patch`, of which pooled x pooled become one.

    Gemma 3 (config of its vision tower, SigLIP): 896, 14, 4.
    """
    patches, left = divmod(side, patch)
    if left or patches % pooled:
        raise ValueError(f"side is {side}; it must be a multiple of patch times pooled, {patch * pooled}")
    return (patches // pooled) ** 2


def native_image_tokens(
    width: int, height: int, *, patch: int, pooled: int, fewest_pixels: int, most_pixels: int
) -> int:
    """Tokens of an image at its own size, each side rounded to whole groups of pooled x pooled patches.

    An image of too many or too few pixels is scaled, its proportions kept. Source: Qwen2VLImageProcessor of the
    transformers library (smart_resize).
    """
    group = patch * pooled
    across, down = (round(pixels / group) for pixels in (width, height))
    if across * down * group**2 > most_pixels:
        scale = math.sqrt(width * height / most_pixels)
        across, down = (max(1, math.floor(pixels / scale / group)) for pixels in (width, height))
    elif across * down * group**2 < fewest_pixels:
        scale = math.sqrt(fewest_pixels / (width * height))
        across, down = (math.ceil(pixels * scale / group) for pixels in (width, height))
    return across * down


def area_image_tokens(width: int, height: int, *, pixels: float, longest: int, ceiling: int) -> int:
    """Tokens of an image by its area, one for so many pixels, once its longer side is made to fit; at most `ceiling`.

    Source: Anthropic, docs: Vision, which calls it an estimate.
    """
    scale = min(Fraction(1), Fraction(longest, max(width, height)))
    return min(ceiling, math.ceil(width * scale * height * scale / Fraction(pixels)))


def cropped_image_tokens(width: int, height: int, *, small: int, side: int, crop: int) -> int:
    """Tokens of an image of which both sides are at most `small`: `crop`; else `crop` for each square of `side`.

    Source: Google, Gemini API: Understand and count tokens.
    """
    if max(width, height) <= small:
        return crop
    return crop * math.ceil(width / side) * math.ceil(height / side)


def image_tokens(vendor: str, width: int, height: int, facts: Assumptions = _FACTS) -> int:
    """Tokens of an image by the rule of `vendor`, one of `facts.members("media.image")`.

    Rules: "tiles", "native", "area", "crops"; "square": every image is made the one size of the encoder.
    """
    table = f"media.image.{vendor}"
    rule = facts.text(f"{table}.rule")
    given = {name: facts.entry(f"{table}.{name}").value for name in facts.members(table) if name != "rule"}
    if rule == "square":
        return patch_tokens(**given)  # pyright: ignore[reportArgumentType]
    rules = {
        "tiles": tiled_image_tokens,
        "native": native_image_tokens,
        "area": area_image_tokens,
        "crops": cropped_image_tokens,
    }
    return rules[rule](width, height, **given)


def audio_positions(
    seconds: float,
    *,
    rate: int = _FACTS.whole("media.audio.whisper.rate"),
    hop: int = _FACTS.whole("media.audio.whisper.hop"),
    stride: int = _FACTS.whole("media.audio.whisper.stride"),
) -> int:
    """Positions of a sound in Whisper's encoder: a spectrum every `hop` samples, and a convolution of that stride.

    Source: openai/whisper, whisper/audio.py and whisper/model.py. Whisper pads every sound to 30 s before that.
    """
    frames = math.ceil(seconds * rate / hop)
    return math.ceil(frames / stride)


def audio_tokens(vendor: str, seconds: float, facts: Assumptions = _FACTS) -> int:
    """Tokens of a sound, filled up to whole windows, in a decoder behind the encoder of `facts.members("media.audio")`.

    Of every window `pooled` neighbouring positions become one token. Vendors that publish a rate alone: `rated_tokens`.
    """
    table = f"media.audio.{vendor}"
    window = facts.number(f"{table}.window_seconds")
    rate, hop, stride, pooled = (facts.whole(f"{table}.{name}") for name in ("rate", "hop", "stride", "pooled"))
    positions = audio_positions(window, rate=rate, hop=hop, stride=stride)
    return math.ceil(seconds / window) * math.ceil(positions / pooled)


def rated_tokens(kind: str, seconds: float, facts: Assumptions = _FACTS) -> int:
    """Tokens of so long a sound or film of a `kind` that is one of `facts.members("media.rate")`."""
    return math.ceil(seconds * facts.number(f"media.rate.{kind}"))
