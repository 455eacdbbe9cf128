"""Holds a bill against what others say of the same program, difference by difference, each with a named reason."""

from collections.abc import Mapping

from .bill import Bill


def against_closed_form(
    bill: Bill, matmul: Mapping[str, int], weights_bytes: int | None, cache_bytes: tuple[int, int] | None
) -> None:
    """Fills the bill's `closed_form` and appends `differences` (bill - closed form). All amounts per chip.

    Args:
      matmul: matmul FLOPs by component, as executed.
      weights_bytes: read by an inference step, or None where the closed form does not say.
      cache_bytes: (read, written) likewise.
    """
    bill.closed_form = {"matmul_flops": sum(matmul.values())}
    left = {}
    for component in sorted({*matmul, *(row.component for row in bill.rows if row.work.matmul)}):
        left[component] = bill.component(component).matmul - matmul.get(component, 0)
    reason = "billed against the closed form"
    if bill.remade_flops and sum(left.values()) == bill.remade_flops:
        reason = "run again by the compiler itself, to save memory"
    for component, amount in left.items():
        _note(bill, "matmul_flops", amount, f"{component}: {reason}")
    _note(bill, "matmul_flops", bill.unattributed.matmul, "unattributed matmuls")
    if weights_bytes is not None:
        bill.closed_form["weights_bytes"] = weights_bytes
        _itemize_role(bill, "weights", "read", weights_bytes)
    if cache_bytes is not None:
        bill.closed_form["cache_bytes"] = sum(cache_bytes)
        _itemize_role(bill, "cache", "read", cache_bytes[0])
        _itemize_role(bill, "cache", "write", cache_bytes[1])


def _itemize_role(bill: Bill, role: str, side: str, expected: int) -> None:
    """One difference a tax, and what is left under a name of its own."""
    taxes: dict[str, int] = {}
    needed = 0
    for row in bill.rows:
        amount = (row.work.hbm_read if side == "read" else row.work.hbm_write).get(role, 0)
        if row.tax is None:
            needed += amount
        else:
            taxes[row.tax] = taxes.get(row.tax, 0) + amount
    quantity = f"{role}_{side}_bytes"
    for tax, amount in sorted(taxes.items()):
        _note(bill, quantity, amount, f"tax: {tax}")
    unattributed = (bill.unattributed.hbm_read if side == "read" else bill.unattributed.hbm_write).get(role, 0)
    _note(bill, quantity, unattributed, "unattributed")
    _note(bill, quantity, needed - expected, "needed by the program beyond the closed form" if needed > expected
          else "in the closed form but not in the program")  # fmt: skip


def against_xla(bill: Bill, flops: float | None, bytes_accessed: float | None) -> None:
    """Records XLA's own totals, where its cost analysis gives them, and by how much the bill differs.

    Known reasons: XLA counts a loop's body once, charges a gather its whole table and an update in place its whole
    buffer, and counts on-chip traffic of TPU programs as bytes accessed.
    """
    bill.xla = {}
    for key, theirs, ours in (("flops", flops, bill.total.flops), ("bytes", bytes_accessed, bill.total.hbm_bytes)):
        if theirs is not None and theirs >= 0:
            bill.xla[key] = int(theirs)
            _note(bill, f"xla_{key}", ours - int(theirs), "bill - XLA's cost analysis, not itemised further")
    bill.xla = bill.xla or None


def _note(bill: Bill, quantity: str, amount: int, reason: str) -> None:
    if amount:
        bill.differences.append({"quantity": quantity, "amount": amount, "reason": reason})
