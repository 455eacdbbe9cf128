"""Which drivers the report runs: the one place to add one."""

import importlib
from dataclasses import dataclass

from ..drivers.driver import Driver
from ..flags import UsageError


@dataclass(frozen=True)
class Entry:
    """A driver. name: of its module in experiments/drivers. topic: what it is about, in the middle of a sentence."""

    number: int
    name: str
    topic: str

    def driver(self) -> Driver:
        """It, imported."""
        module = importlib.import_module(f"...drivers.{self.name}", __name__)
        return next(it for it in vars(module).values() if isinstance(it, Driver) and it.name == self.name)


ENTRIES = (
    Entry(1, "model_size", "the size of the model"),
    Entry(2, "context", "the length of the context"),
    Entry(3, "cache", "the kind of KV cache"),
    Entry(4, "prefill_decode", "an output instead of an input token"),
    Entry(5, "batching", "serving one at a time"),
    Entry(6, "experts", "experts that are there but not met"),
    Entry(7, "quantization", "the precision of the weights"),
    Entry(8, "reasoning", "hidden reasoning"),
    Entry(9, "multimodal", "images, sound and video"),
    Entry(10, "training", "what training loses"),
    Entry(11, "request", "tools, search and moderation"),
    Entry(12, "infrastructure", "everything around the chips"),
    Entry(13, "serving", "limits of latency"),
    Entry(13, "serving_day", "a published day of serving"),
    Entry(14, "smaller", "a model larger than its task"),
)
PUBLISHED = "published"  # the section that is no driver
NAMES = (*(entry.name for entry in ENTRIES), PUBLISHED)


def chosen(only: str) -> frozenset[str]:
    """The names in `--only`, all of them without; UsageError."""
    names = [name.strip() for name in only.split(",")] if only else NAMES
    for name in names:
        if name not in NAMES:
            raise UsageError(f"--only={only}: there is no {name!r}; there are {', '.join(NAMES)}")
    return frozenset(names)
