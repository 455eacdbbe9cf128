"""Broken HLO of every kind: a clear error or a bill that adds up, never a crash or a hang."""

import fuzz
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from stepbill.profiling import targets
from stepbill.profiling.hlo import HloError
from stepbill.profiling.walk import itemize_text

numbers = st.integers(0, 2**32 - 1)
changes = st.tuples(st.sampled_from(sorted(set(fuzz.HOW))), numbers, numbers)
# The same texts on every run, whoever runs it: `tests/fuzz.py` is for looking further.
thorough = settings(derandomize=True, database=None, deadline=None)


@settings(thorough, max_examples=400)
@given(numbers, st.lists(changes, min_size=1, max_size=3))
def test_a_garbled_instruction_is_billed_or_refused(which, steps):
    text, target = fuzz.kernels()[which % len(fuzz.kernels())]
    for step in steps:
        text = fuzz.garble(text, *step)
    fuzz.check(text, target)


@settings(thorough, max_examples=40)
@given(numbers, st.lists(changes, min_size=1, max_size=3))
def test_a_garbled_program_is_billed_or_refused(which, steps):
    text, target = fuzz.programs()[which % len(fuzz.programs())]
    for step in steps:
        text = fuzz.garble(text, *step)
    fuzz.check(text, target)


@settings(thorough, max_examples=100)
@given(st.text())
@example("HloModule ")
@example("HloModule m\n\nENTRY ")
def test_any_text_is_refused(text):
    assert fuzz.check(text, "host") == "refused"


def test_what_is_garbled_was_whole():
    """Each instruction by itself is a program with a bill; so what the tests above find, the garbling made."""
    outcomes = [fuzz.check(text, target) for text, target in fuzz.kernels()]
    assert len(outcomes) > 300 and outcomes.count("refused") == 0
    assert outcomes.count("billed") > 0.99 * len(outcomes)


def test_every_beginning_of_a_program_is_refused_where_it_ends():
    """Cut at each character of a small program: the error is in the line that was cut, or says what is missing."""
    text, target = min(fuzz.kernels())
    for end in range(len(text.rstrip()) - 1):
        with pytest.raises(HloError) as error:
            itemize_text(text[:end], targets.chip(target))
        assert error.value.line == text[:end].count("\n") + 1 or "HloModule" in str(error.value)
