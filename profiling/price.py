"""Dollars and tokens per second from seconds. What is not known stays None."""

from .chips import Chip

SECONDS_PER_HOUR = 3600


def tokens_per_second(seconds: float | None, tokens: int) -> float | None:
    """Of a step that handles `tokens` tokens (over all chips) in `seconds`."""
    return tokens / seconds if seconds else None


def dollars(chip: Chip, chips: int, seconds: float | None) -> float | None:
    """What `chips` chips cost for that long, at the chip's on-demand price."""
    if seconds is None or chip.dollars_per_hour is None:
        return None
    return chip.dollars_per_hour / SECONDS_PER_HOUR * chips * seconds


def dollars_per_million_tokens(chip: Chip, chips: int, seconds: float | None, tokens: int) -> float | None:
    """Of a step that handles `tokens` tokens (over all chips) in `seconds` on `chips` chips."""
    cost = dollars(chip, chips, seconds)
    return None if cost is None or not tokens else cost / tokens * 1_000_000
