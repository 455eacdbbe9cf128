"""The front door: anything that is or becomes an optimised XLA program -> its Bill."""

from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

from . import dumps, hlo, price, reconcile, targets, xla_cost
from .bill import Bill
from .walk import Kernel, itemize_module


def itemize(
    program: Any,
    *args: Any,
    target: str = "host",
    roles: Mapping[str, str] | None = None,
    masked: Mapping[str, Fraction] | None = None,
    components: tuple[str, ...] | Mapping[str, str] | None = None,
    **kwargs: Any,
) -> Bill:
    """The bill of one execution, per chip.

    Args:
      program: a jitted function (called with `args` and `kwargs`, arrays or ShapeDtypeStructs, on one chip of
        `target`), a `jax.stages.Lowered`, a `Compiled`, HLO text, or the path of a file of it (plain or
        .gz) or of a folder that XLA dumped to (then the largest optimised module in it, and a note that says so).
      target: the chip whose peaks and prices apply, and for which a function is compiled.
      roles: argument name -> role; by default told by the arguments' names.
      masked: component -> share of its FLOPs that is computed and then masked away.
      components: pattern -> component, to name what names.SYNONYMS does not or names otherwise (see names.Names); or a
        tuple: the only scope names to look for.

    Raises:
      hlo.HloError: the text or file is not HLO. TypeError: the program is none of these.
    """
    chip = targets.chip(target)
    compilation, note, plan, said, compiled_for = None, "", None, None, None
    if isinstance(program, str | Path):
        if isinstance(program, str) and "HloModule " in program[: hlo.HEAD_CHARACTERS]:
            text = program
        else:
            found = dumps.find(program)
            text, note = dumps.read(found.path), found.note
    elif hasattr(program, "as_text") and hasattr(program, "memory_analysis"):
        text, plan, said = program.as_text(), targets.plan(program, target), xla_cost.totals(program)
        compiled_for = targets.platform(program)
    else:
        if hasattr(program, "lower"):
            targets.prepare(target)
            program = targets.lower(program, target, *args, **kwargs)
        if not hasattr(program, "compile"):
            raise TypeError(f"program is a {type(program).__name__}; it must be jitted, lowered, compiled or HLO text")
        compilation, compiled_for = targets.compile(program, target, runs=False), targets.platform(program)
        text, plan, said = compilation.text, compilation.memory, compilation.xla
    kernels: list[Kernel] | None = None if said is None else []
    with hlo.collection_paused():
        module = hlo.parse(text)
        bill = itemize_module(
            module, chip, roles=roles, masked=masked, components=components, plan=plan, kernels=kernels
        )
        reconcile.against_xla(bill, module, kernels or (), chip.platform, said)
    if note:
        bill.notes.append(note)
    bill.program |= {"target": target, "chips": module.num_partitions}
    bill.price = price.of_run(chip, module.num_partitions, bill.total.seconds or None)
    if compiled_for not in (None, chip.platform):
        bill.notes.insert(0, f"compiled for {compiled_for}: this is not what {chip.title} would run")
    elif compilation is not None:
        bill.notes.insert(0, compilation.how)
    return bill
