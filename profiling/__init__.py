"""Reads compiled programs of any JAX code and bills them: `itemize(jax.jit(f), *args, target="h200")`."""

from .bill import Bill, Row, Unknown, Work
from .itemize import itemize

__all__ = ["Bill", "Row", "Unknown", "Work", "itemize"]
