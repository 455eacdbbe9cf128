"""`python -m stepbill.experiments.quantize`: a checkpoint of ours or of Hugging Face, quantised, on disk."""

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags as absl_flags

from . import command, flags
from .flags import UsageError
from .generate import STOPS, named_stops

INTRODUCTION = """quantize: writes a checkpoint with its weights in few bits

  python -m stepbill.experiments.quantize --checkpoint=DIR --weights=int4 --out=DIR2
"""


def define(values: absl_flags.FlagValues) -> None:
    """Adds every flag."""
    to = flags.Definer(values)
    to.string("checkpoint", None, "the folder of a checkpoint, ours or Hugging Face's")
    to.string("out", None, "the folder to write")
    flags.define_storage(to)
    flags.define_help(to)


def quantize(checkpoint_folder: Path, weights: str, out: Path) -> tuple[int, int]:
    """Reads, quantises and writes, with the tokenizer and what ends a text; bytes of the tensors before and after.

    UsageError names the flag that is wrong.
    """
    from ..model import checkpoint, tokenizer

    if out.resolve() == checkpoint_folder.resolve():
        raise UsageError(f"--out={out}: it must be another folder than --checkpoint")
    stops = named_stops(checkpoint_folder)
    try:
        config, params = checkpoint.read(checkpoint_folder, weights=weights)
    except (OSError, ValueError) as error:
        raise UsageError(f"--checkpoint={checkpoint_folder}: {error}") from None
    try:
        checkpoint.write(out, config, params)
        if (checkpoint_folder / tokenizer.FILE).exists():
            shutil.copyfile(checkpoint_folder / tokenizer.FILE, out / tokenizer.FILE)
        if stops:
            (out / STOPS[0]).write_text(json.dumps({"eos_token_id": stops}))
    except OSError as error:
        raise UsageError(f"--out={out}: cannot write there: {error.strerror or error}") from None

    def size(folder: Path) -> int:
        return sum(file.stat().st_size for file in folder.glob("*.safetensors"))

    return size(checkpoint_folder), size(out)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs it: 0; 2 where the flags are wrong."""
    return command.run(_run, define, INTRODUCTION, argv)


def _run(values: absl_flags.FlagValues) -> None:
    from ..profiling import targets

    for name in ("checkpoint", "out"):
        if getattr(values, name) is None:
            raise UsageError(f"--{name}: it needs a value, a folder")
    if values.weights == flags.BF16:
        raise UsageError("--weights=bf16: it must be int8, int4 or int4:GROUP")
    targets.prepare(targets.here())
    before, after = quantize(Path(values.checkpoint), values.weights, Path(values.out))
    print(f"{values.out}: {values.weights}, {after / 1e6:,.1f} MB; {values.checkpoint} has {before / 1e6:,.1f} MB")


if __name__ == "__main__":
    sys.exit(main())
