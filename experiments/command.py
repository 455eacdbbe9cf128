"""How every command here begins and ends: its flags are parsed, and what goes wrong is told in one line."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from absl.flags import FlagValues

from . import flags
from .flags import UsageError

Say = Callable[[str], None]


def run(
    body: Callable[[FlagValues], int | None],
    define: Callable[[FlagValues], None],
    introduction: str,
    argv: Sequence[str] | None = None,
    failures: tuple[type[Exception], ...] = (),
) -> int:
    """Runs `body` with the flags of `define`, or prints what --help asks for.

    -> the exit status: what `body` gives, 0 without; 2 where the flags are wrong, 1 after one of `failures`.
    """
    try:
        values = flags.parse(sys.argv[1:] if argv is None else argv, define)
        if values.help:
            print(flags.usage(values, introduction))
            return 0
        return body(values) or 0
    except UsageError as error:
        print(f"stepbill: {error}", file=sys.stderr)
        return 2
    except failures as error:
        print(f"stepbill: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `... | head`
        sys.stderr.close()
        return 0


@contextmanager
def status() -> Iterator[Say]:
    """Says on standard error what is going on, for as long as it goes on."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda _: None
        return
    with console.status("starting") as shown:
        yield lambda text: shown.update(text)
