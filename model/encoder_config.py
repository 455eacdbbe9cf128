"""What an encoder is: how an image or a sound becomes positions, and the blocks that these go through.

The blocks are those of a decoder, by the same fields (`ModelConfig`), but that every position sees all others.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

from .config import ModelConfig, choice, positive

WINDOW = 3  # frames of a spectrum that one position is made of, and then of these
STRIDE = 2  # frames of a spectrum for one position


@dataclass(frozen=True)
class Merge:
    """How positions become a decoder's tokens: `count` neighbours as one long vector, through an MLP."""

    count: int  # of an image: a square of them
    hidden: int
    width: int  # of a token: D of the decoder
    bias: bool = True

    def __post_init__(self) -> None:
        positive(self, "merge.", "count", "hidden", "width")


@dataclass(frozen=True)
class EncoderConfig(ModelConfig):
    """One encoder of images ("vision") or sounds ("audio"). Raises ValueError as `ModelConfig` does.

    max_context is how many positions it has; where these are learned ("positions"), it never has fewer. With "rope" a
    quarter of each head turns by the row and a quarter by the column that a patch is in, against the other half.
    """

    vocabulary: int = 1  # it knows no tokens
    tied: bool = True
    norm: str = "layer"
    positions: str = "learned"
    qkv_bias: bool = True
    output_bias: bool = True
    mlp_bias: bool = True
    kind: str = "vision"
    channels: int = 3  # colours of a pixel; bands of a spectrum
    patch: int = 14  # pixels on a side of what becomes one position
    frames: int = 1  # of a film, one behind the other, in one patch; an image is repeated so often
    patch_bias: bool = False
    class_token: bool = False  # one more position, learned, before the patches
    first_norm: bool = False  # before the blocks
    merge: Merge | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        choice(self, "", kind=("vision", "audio"))
        positive(self, "", "channels", "patch", "frames")
        if self.positions == "rope" and (self.head_width % 4 or self.class_token or self.kind == "audio"):
            raise ValueError(
                f"positions is 'rope'; it must be 'learned' with class_token, for audio, and where head_width, "
                f"{self.head_width}, is no multiple of 4"
            )
        if self.positions == "learned":
            self.check(self.max_context)

    @property
    def causal(self) -> bool:
        """Whether a position sees only those before it."""
        return False

    @property
    def merged(self) -> int:
        """Positions that become one token."""
        return self.merge.count if self.merge else 1

    @property
    def side(self) -> int:
        """Of the square of patches that become one token."""
        return math.isqrt(self.merged)

    @property
    def inputs(self) -> tuple[int, ...]:
        """(numbers that one patch is made of); of a sound (those of a first window, those of a second)."""
        if self.kind == "audio":
            return WINDOW * self.channels, WINDOW * self.width
        return (self.frames * self.patch**2 * self.channels,)

    def check(self, context: int) -> None:
        """ValueError where it does not take so many positions."""
        patches = context - self.class_token
        if self.positions == "learned" and context != self.max_context:
            raise ValueError(f"context is {context}; {self.name} takes {self.max_context} positions, always")
        if patches < 1 or patches % self.merged or (self.kind == "vision" and self.side**2 != self.merged):
            raise ValueError(
                f"context is {context}; {self.name} makes one token of {self.merged} positions, which must divide it"
                + (" and be a square" if self.kind == "vision" else "")
            )

    def grid(self, context: int) -> tuple[int, int]:
        """(rows, columns) of patches: as near to a square as so many patches come."""
        groups = (context - self.class_token) // self.merged
        rows = next(n for n in range(math.isqrt(groups), 0, -1) if groups % n == 0)
        return rows * self.side, groups // rows * self.side

    def input_shape(self, batch: int, context: int) -> tuple[int, ...]:
        """Of pixels [B, frames, height, width, channels], or of a spectrum [B, frames, channels]."""
        if self.kind == "audio":
            return batch, STRIDE * context, self.channels
        rows, columns = self.grid(context)
        return batch, self.frames, rows * self.patch, columns * self.patch, self.channels

    def tokens(self, context: int) -> int:
        """What comes out of so many positions."""
        return context // self.merged

    @property
    def variant(self) -> str:
        """What it takes and gives, in a few words."""
        merge = f", {self.merged} positions a token" if self.merged > 1 else ""
        if self.kind == "audio":
            return f"audio: {STRIDE} frames of {self.channels} bands a position{merge}"
        frames = f" in {self.frames} frames" if self.frames > 1 else ""
        return f"vision: {self.patch} x {self.patch} pixels{frames} a position{merge}"

    def _count(self, experts_counted: Any) -> int:
        D, m = self.width, self.merge
        total = super()._count(experts_counted) - D * self.vocabulary
        total += D * (sum(self.inputs) + self.class_token + 2 * self.first_norm)
        total += D * (2 if self.kind == "audio" else self.patch_bias)
        if m:
            total += m.hidden * (m.count * D + m.width) + m.bias * (m.hidden + m.width)
        return total


def _clip(name: str, L: int, D: int, N: int, F: int, pixels: int) -> EncoderConfig:
    return EncoderConfig(
        *(name, L, D, N, N, F),
        activation="gelu_quick",
        max_context=(pixels // 14) ** 2 + 1,
        class_token=True,
        first_norm=True,
    )


# As in the models' own `config.json`. Of Qwen2-VL the merge is that of its 7B model, of Voxtral that of the 3B one.
_WHISPER = EncoderConfig(
    *("whisper-large-v3", 32, 1280, 20, 20, 5120),
    kind="audio",
    channels=128,
    activation="gelu_exact",
    key_bias=False,
    max_context=1500,
)
ENCODERS = {
    config.name: config
    for config in (
        _clip("clip-vit-l", 24, 1024, 16, 4096, pixels=336),  # of LLaVA 1.5
        EncoderConfig(  # of Gemma 3
            *("siglip-so400m", 27, 1152, 16, 16, 4304),
            activation="gelu",
            norm_epsilon=1e-6,
            patch_bias=True,
            max_context=(896 // 14) ** 2,
        ),
        EncoderConfig(
            *("qwen2-vl-vit", 32, 1280, 16, 16, 5120),
            activation="gelu_quick",
            norm_epsilon=1e-6,
            positions="rope",
            frames=2,
            merge=Merge(4, 5120, 3584),
            max_context=65_536,
        ),
        _WHISPER,
        replace(_WHISPER, name="voxtral-encoder", merge=Merge(4, 3072, 3072, bias=False)),
    )
}
