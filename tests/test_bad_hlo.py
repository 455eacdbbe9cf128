"""HLO that no compiler prints, kind by kind: refused in a line that says where, or billed with the unknown named."""

import gzip
import tracemalloc

import fuzz
import pytest
from compiled import module
from stepbill.profiling import dumps, hlo, targets
from stepbill.profiling.bill import Bill
from stepbill.profiling.hlo import MAX_NESTING, HloError
from stepbill.profiling.walk import itemize_text

HOST = targets.chip("host")
PARAMETER = "%p = f32[8]{0} parameter(0)"


def bill(*lines: str) -> Bill:
    text = module(*lines)
    assert fuzz.check(text, "h200") in ("billed", "unknown")
    return itemize_text(text, targets.chip("h200"))


def refused(text: str) -> HloError:
    assert fuzz.check(text, "host") == "refused"
    with pytest.raises(HloError) as error:
        itemize_text(text, HOST)
    return error.value


def place(text: str, piece: str) -> tuple[int, int]:
    """Line and column, from 1, of the first `piece`."""
    before = text[: text.index(piece)]
    return before.count("\n") + 1, len(before) - before.rfind("\n")


# --- errors say where ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "at", "said"),
    [
        ("ROOT %a = f32[8]{0} add(%p, %nobody)", "%nobody", "operand '%nobody' of %a is not defined above it"),
        ("ROOT %a = f32[8{0} negate(%p)", "f32[8{0}", "expected a shape"),
        ("ROOT %a = f32[-8]{0} negate(%p)", "f32[-8]{0}", "a dimension is from 0 to 2^63 - 1"),
        ("ROOT %a = f32[9223372036854775808]{0} negate(%p)", "f32[9223", "a dimension is from 0 to 2^63 - 1"),
        ("ROOT %a = f32[8]{3} negate(%p)", "f32[8]{3}", "a layout of 1 dimensions"),
        ("ROOT %a = f32[8]{0} 7(%p)", "f32[8]{0} 7(", "expected a shape"),
        ("%p = f32[9]{0} negate(%p)", "p = f32[9]", "a second instruction %p"),
        (
            "ROOT %a = f32[8]{0} fusion(%p), kind=kLoop, calls=%gone",
            "calls=%gone",
            "computation '%gone' is not defined",
        ),
        ("ROOT %a = f32[8]{0} fusion(%p), kind=kLoop", "  ROOT %a", "expected the computation that it runs"),
        ("ROOT %a = f32[8]{0} get-tuple-element(%p), index=3", "  ROOT %a", "%a takes element 3 of %p"),
        ("ROOT %a = f32[8]{0} copy()", " copy(", "0 operands of copy; expected 1 or more"),
        ("%q = f32[8]{0} parameter(x)", "x)", "expected a parameter's number, found 'x'"),
        ("%q = f32[8]{0} parameter(7)", "ENTRY", "expected parameter(1), found %q = parameter(7)"),
        ("what is this", "  what", "expected `%name = `"),
        ("ROOT %a = f32[8]{0} add(%p, %p", None, "expected `)` after the operands, found the end of the line"),
    ],
)
def test_an_error_names_its_line_and_column(wrong, at, said):
    text = module(PARAMETER, wrong)
    error = refused(text)
    assert (error.line, error.column) == (place(text, at) if at else (5, len(wrong) + 3))
    assert str(error).startswith(f"line {error.line}, column {error.column}: ") and said in str(error)


def test_text_that_is_cut_off_says_so():
    text = module(PARAMETER, "ROOT %a = f32[8]{0} negate(%p)")
    error = refused(text[: text.rindex("}")])
    assert "the text is cut off" in str(error) and (error.line, error.column) == (6, 1)
    error = refused(text[: text.index("ENTRY")])
    assert "module m has no ENTRY computation" in str(error)
    assert "no text" in str(refused(""))


# --- nesting and cycles --------------------------------------------------------------------------------------------


def chain(how: str, length: int, back_to: int | None = None) -> str:
    """A program of `length` computations, %c0, %c1 ..., that run one another in turn; the last one runs %c`back_to`."""
    last = "negate(%p)" if back_to is None else f"{how}%c{back_to}"
    bodies = [*(f"{how}%c{n + 1}" for n in range(length - 1)), last]
    blocks = [
        f"%c{n} (p: f32[8]) -> f32[8] {{\n  {PARAMETER}\n  ROOT %r = f32[8]{{0}} {body}\n}}\n\n"
        for n, body in enumerate(bodies)
    ]
    return module(PARAMETER, f"ROOT %r = f32[8]{{0}} {how}%c0").replace("ENTRY", "".join(blocks) + "ENTRY")


HOW = ["fusion(%p), kind=kLoop, calls=", "call(%p), to_apply="]


@pytest.mark.parametrize("how", HOW)
def test_calls_nested_deep_are_refused_and_less_deep_are_billed(how):
    error = refused(chain(how, 5000))
    assert f"computations are nested more than {MAX_NESTING} deep" in str(error) and error.line is not None
    text = chain(how, MAX_NESTING - 1)
    assert fuzz.check(text, "host") == "billed"
    assert itemize_text(text, HOST).total.elementwise == 8


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize(("length", "back_to"), [(1, 0), (2, 0), (3, 1), (90, 0), (5000, 0)])
def test_computations_that_call_themselves_are_refused(how, length, back_to):
    text = chain(how, length, back_to)
    error = refused(text)
    assert "calls itself" in str(error) or (length > MAX_NESTING and "nested more than" in str(error))
    assert (error.line, error.column) != (None, None)


def test_a_loop_that_is_its_own_body_is_refused():
    loop = "ROOT %l = (f32[8]{0}) while(%t), condition=%main, body=%main"
    text = module("%t = (f32[8]{0}) parameter(0)", loop)
    assert "computation %main calls itself" in str(refused(text))


def test_tuples_nested_deep_are_refused():
    deep = "(" * 100_000 + "f32[8]{0}" + ")" * 100_000
    text = module(f"ROOT %p = {deep} parameter(0)")
    error = refused(text)
    assert f"tuples are nested more than {MAX_NESTING} deep" in str(error)
    assert (error.line, error.column) == place(text, deep)


@pytest.mark.parametrize(
    "piece", ["(", ")", "{", "}", "{(", ",", ", ", " ", '"', "\\", "%", "%a = ", "f32[8]", "/*", "a"]
)
@pytest.mark.parametrize("where", ["shape", "operands", "attributes", "name", "metadata", "header", "between"])
def test_what_is_repeated_without_end_takes_time_in_proportion(piece, where):
    """fuzz.check raises TooSlow after 20 microseconds a character."""
    parts = {
        name: piece * (300_000 // len(piece)) if name == where else usual
        for name, usual in {
            "shape": "f32[8]{0}", "operands": "%p", "attributes": "x={1}", "name": "a", "metadata": 'op_name="a"',
            "header": "", "between": "",
        }.items()
    }  # fmt: skip
    line = f"ROOT %{parts['name']} = {parts['shape']} negate({parts['operands']}), {parts['attributes']}"
    text = module(PARAMETER, line + ", metadata={" + parts["metadata"] + "}", header=", " + parts["header"])
    fuzz.check(text.replace("\n\n", f"\n{parts['between']}\n"), "host")


# --- sizes ---------------------------------------------------------------------------------------------------------


def test_shapes_of_more_than_2_to_the_63_bytes_are_billed_exactly():
    size = (1 << 62) * (1 << 62) * 4
    huge = f"f32[{1 << 62},{1 << 62}]{{1,0}}"
    found = bill(f"%p = {huge} parameter(0)", f"ROOT %n = {huge} negate(%p)")
    assert (found.total.hbm_read_bytes, found.total.hbm_write_bytes) == (size, size)
    assert found.total.elementwise == size // 4


def test_a_bill_of_more_than_any_chip_could_run_is_refused():
    huge = f"f32[{','.join(['4611686018427387904'] * 8)}]"
    text = module(f"%p = {huge} parameter(0)", f"ROOT %n = {huge} negate(%p)")
    assert "no chip runs that" in str(refused(text))


def test_more_dimensions_than_are_read_are_refused():
    text = module(f"ROOT %p = f32[{','.join(['1'] * 1000)}] parameter(0)")
    assert "it has 1000 dimensions; at most 64 are read" in str(refused(text))


# --- what is not known ---------------------------------------------------------------------------------------------


def test_an_unknown_opcode_is_a_row_of_the_unknown_with_its_bytes():
    found = bill("%p = f32[8]{0} parameter(0)", "ROOT %f = f32[16]{0} frobnicate(%p), knob=7")
    (one,) = found.unknown
    assert (one.instruction, one.reason) == ("f", "no rule for opcode frobnicate")
    assert one.hbm_bytes_at_least == 96 == found.total.hbm_bytes


def test_an_unknown_type_is_counted_as_no_bytes_and_named():
    found = bill("%p = f6e3m2fn[8]{0} parameter(0)", "ROOT %n = f32[8]{0} convert(%p)")
    (one,) = found.unknown
    assert one.reason == "size not known, counted as no bytes: f6e3m2fn[8]"
    assert found.total.hbm_bytes == 32


def test_an_unknown_type_whose_layout_says_its_bits_is_known():
    assert not bill("%p = f6e3m2fn[8]{0:E(6)} parameter(0)", "ROOT %n = f32[8]{0} convert(%p)").unknown


def test_a_size_that_only_a_run_knows_is_named():
    found = bill("%p = f32[?]{0} parameter(0)", "ROOT %n = f32[<=8]{0} slice(%p), slice={[0:8]}")
    assert [one.reason for one in found.unknown] == ["size not known, counted as no bytes: f32[1]"]


def test_fewer_results_than_operands():
    """Of a copy's start that is no tuple; found by the fuzzer."""
    for opcode in ("copy-start", "all-gather-start", "collective-permute-start", "slice-start"):
        bill("%p = f32[8]{0} parameter(0)", "%q = f32[8]{0} parameter(1)", f"ROOT %s = f32[8]{{0}} {opcode}(%p, %q)")


# --- bytes that are no text, and too much of it --------------------------------------------------------------------


def test_bytes_that_are_not_utf_8_are_read(tmp_path):
    text = module('%p = f32[8]{0} parameter(0), metadata={op_name="w"}', "ROOT %n = f32[8]{0} negate(%p)")
    raw = text.encode().replace(b'"w"', b'"\xff\xfew\x80"')
    for name, data in (("a.hlo", raw), ("a.hlo.gz", gzip.compress(raw))):
        path = tmp_path / name
        path.write_bytes(data)
        assert fuzz.check(dumps.read(path), "host") == "billed"


@pytest.mark.parametrize("data", [b"\xff" * 1000, b"\x7fELF\x00", b"\x1f\x8bHloModule", b"\x00" * 5000])
def test_bytes_that_are_nothing_of_the_kind_are_refused_in_one_line(tmp_path, data):
    for name in ("a.hlo", "a.gz"):
        path = tmp_path / name
        path.write_bytes(data)
        with pytest.raises(HloError) as error:
            itemize_text(dumps.read(path), HOST)
        assert str(error.value).isprintable() and len(str(error.value)) < 300


GIGABYTE = 1 << 30


def test_a_gigabyte_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "big.hlo"
    with path.open("wb") as file:  # sparse: it takes no room on the disk
        file.write(b"HloModule m\n")
        file.truncate(GIGABYTE)
    tracemalloc.start()
    try:
        with fuzz.within(2), pytest.raises(HloError, match=r"big\.hlo: at most 500 MB .* are read, found 1,074 MB"):
            dumps.read(path)
        assert tracemalloc.get_traced_memory()[1] < 10e6
    finally:
        tracemalloc.stop()


def test_a_gigabyte_that_is_compressed_is_refused_when_there_is_too_much_of_it(tmp_path):
    path = tmp_path / "big.hlo.gz"
    member = gzip.compress(bytes(1 << 24), compresslevel=1)  # a file of many members is read as one
    path.write_bytes(gzip.compress(b"HloModule m\n") + member * (GIGABYTE >> 24))
    with fuzz.within(20), pytest.raises(HloError, match=r"big\.hlo\.gz: at most 500 MB .* are read, found more"):
        dumps.read(path)


def test_text_that_is_too_long_is_refused_unread(monkeypatch):
    text = module(PARAMETER)
    monkeypatch.setattr(hlo, "MAX_CHARACTERS", len(text))
    assert itemize_text(text, HOST)
    with pytest.raises(HloError, match="HLO text are read, found"):
        itemize_text(text + "\n", HOST)


@pytest.mark.parametrize("line", ["convolution(%p, %p)", "dot(%p, %p), lhs_contracting_dims={7}"])
def test_a_product_that_is_none(line):
    """Whose part it is, is asked before anybody bills it; found by the fuzzer."""
    found = bill(PARAMETER, f"ROOT %d = f32[8]{{0}} {line}")
    assert "cannot be told from its text" in found.unknown[0].reason


@pytest.mark.parametrize("line", ["convolution(%p)", "dot(%p), lhs_contracting_dims={0}", "multiply(%p)", "reduce(%p)"])
def test_a_product_of_one_thing_is_refused(line):
    assert "1 operands of" in str(refused(module(PARAMETER, f"ROOT %d = f32[8]{{0}} {line}")))


def test_a_fusion_that_is_a_constant():
    """It has no operation at all; found by the fuzzer."""
    body = (
        "%c (q: f32[8]) -> f32[8] {\n  %q = f32[8]{0} parameter(0)\n  ROOT %k = f32[8]{0} constant({...})\n}\n\nENTRY"
    )
    text = module(PARAMETER, "ROOT %f = f32[8]{0} fusion(%p), kind=kLoop, calls=%c").replace("ENTRY", body)
    assert fuzz.check(text, "host") == "billed"
