"""Dollars and tokens per second from seconds. What is not known stays None."""

import math

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


def of_run(chip: Chip, chips: int, seconds: float | None, tokens: int | None = None) -> dict[str, float | None]:
    """A bill's `price`, of a program that takes so long; tokens: how many it handles, where it handles any."""
    return {
        "chip_dollars_per_hour": chip.dollars_per_hour,
        "dollars_per_run": dollars(chip, chips, seconds),
        "dollars_per_million_tokens": dollars_per_million_tokens(chip, chips, seconds, tokens or 0),
        "tokens_per_second": tokens_per_second(seconds, tokens) if tokens else None,
    }


def checkpoint_interval(checkpoint_seconds: float, failure_seconds: float) -> float:
    """Seconds from one checkpoint to the next that lose the least, to first order: sqrt(2 x cost x time to failure).

    Source: Young, "A first order approximation to the optimum checkpoint interval" (Communications of the ACM, 1974).

    Args:
      checkpoint_seconds: how long writing one stops the work. failure_seconds: mean time between failures.
    """
    return math.sqrt(2 * checkpoint_seconds * failure_seconds)


def checkpoint_overhead(checkpoint_seconds: float, failure_seconds: float, interval_seconds: float) -> float:
    """The share of time lost to checkpoints and to what failures undo, half an interval each; restarting apart.

    Source as of `checkpoint_interval`, at which it is least.
    """
    return checkpoint_seconds / interval_seconds + interval_seconds / (2 * failure_seconds)
