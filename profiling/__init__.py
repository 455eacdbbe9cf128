"""Reads compiled programs of any JAX code and bills them: `itemize(jax.jit(f), *args, target="h200")`."""

from . import factorizations as factorizations  # its rules register themselves
from .bill import Bill, Row, Unknown, Work
from .calls import Cost, register
from .flops import Flops
from .itemize import itemize

__all__ = ["Bill", "Cost", "Flops", "Row", "Unknown", "Work", "itemize", "register"]
