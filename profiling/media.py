"""How many positions an image or a sound takes in a decoder's context: the vendors' published rules."""

import math
from fractions import Fraction


def tiled_image_tokens(width: int, height: int, *, base: int = 85, tile: int = 170) -> int:
    """Tokens of an image at high detail, by OpenAI's rule for GPT-4o (its guide to images and vision).

    The image is made to fit in 2048 x 2048, then its shorter side to be at most 768; `tile` tokens for each square of
    512 that it needs, and `base` for the whole. Never enlarged. Other models of the vendor have other base and tile.
    """
    scale = min(Fraction(1), Fraction(2048, max(width, height)))
    scale = min(scale, Fraction(768, min(width, height)))
    across, down = (math.ceil(side * scale / 512) for side in (width, height))
    return base + tile * across * down


def patch_tokens(side: int, patch: int, pooled: int = 1) -> int:
    """Tokens of a square image of `side` pixels cut into patches of `patch`, of which pooled x pooled become one.

    Gemma 3 (config of its vision tower, SigLIP): 896, 14, 4.
    """
    patches, left = divmod(side, patch)
    if left or patches % pooled:
        raise ValueError(f"side is {side}; it must be a multiple of patch times pooled, {patch * pooled}")
    return (patches // pooled) ** 2


def audio_positions(seconds: float, *, rate: int = 16_000, hop: int = 160, stride: int = 2) -> int:
    """Positions of a sound in Whisper's encoder: a spectrum every `hop` samples, and a convolution of that stride.

    Source: openai/whisper, whisper/audio.py and whisper/model.py. Whisper pads every sound to 30 s before that.
    """
    frames = math.ceil(seconds * rate / hop)
    return math.ceil(frames / stride)
