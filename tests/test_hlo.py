"""The parser, on lines as the three backends print them."""

import pytest
from stepbill.profiling.hlo import HloError, parse, parse_shape


def module(*lines: str, header: str = "") -> str:
    body = "\n".join("  " + line for line in lines)
    return f"HloModule m, is_scheduled=true{header}\n\nENTRY %main (p: f32[2]) -> f32[2] {{\n{body}\n}}\n"


@pytest.mark.parametrize(
    ("text", "dims", "bits", "space", "logical", "padded"),
    [
        ("f32[]", (), 32, 0, 4, 4),
        ("bf16[8,8,4096,128]{3,2,1,0}", (8, 8, 4096, 128), 16, 0, 67108864, 67108864),
        ("bf16[8,8,4,128]{3,0,1,2:T(8,128)(2,1)}", (8, 8, 4, 128), 16, 0, 65536, 65536),
        ("bf16[8,8,1,128]{3,2,1,0:T(2,128)(2,1)S(1)}", (8, 8, 1, 128), 16, 1, 16384, 32768),
        ("f32[8]{0:T(256)}", (8,), 32, 0, 32, 1024),
        ("f32[5,130]{1,0:T(8,128)}", (5, 130), 32, 0, 2600, 8 * 256 * 4),
        ("s4[4096,128]{1,0:E(4)}", (4096, 128), 4, 0, 262144, 262144),
        ("s4[4096,128]{1,0:T(8,128)(8,1)E(4)}", (4096, 128), 4, 0, 262144, 262144),
        ("u32[]{:S(2)}", (), 32, 2, 4, 4),
        ("pred[4096]{0:T(1024)(128)(4,1)}", (4096,), 8, 0, 4096, 4096),
        ("f8e4m3fn[3]{0}", (3,), 8, 0, 3, 3),
    ],
)
def test_shapes(text: str, dims: tuple[int, ...], bits: int, space: int, logical: int, padded: int) -> None:
    shape = parse_shape(text)
    assert (shape.dims, shape.bits, shape.space) == (dims, bits, space)
    assert (shape.bytes, shape.padded_bytes) == (logical, padded)


def test_tuple_shapes_flatten_and_may_hold_index_comments() -> None:
    shape = parse_shape("((bf16[4,8]{1,0:T(8,128)(2,1)}), /*index=1*/(s32[], f32[2]{0}), token[])")
    assert [leaf.dtype for leaf in shape.leaves] == ["bf16", "s32", "f32", "token"]
    assert shape.bytes == 64 + 4 + 8


def test_an_instruction_with_everything() -> None:
    text = module(
        "%p.1 = f32[2]{0} parameter(0), sharding={replicated}, metadata={op_name=\"params[\\'layers\\'][0]\"}",
        '%c = f32[] constant(1), metadata={op_name="jit(f)/x" stack_frame_id=3}',
        'ROOT %add.2 = f32[2]{0} add(%p.1, %p.1), frontend_attributes={a="b{c}"}, '
        'metadata={op_name="jit(f)/attention/qkv/add" stack_frame_id=7}, backend_config={"n":"1"}',
        header=", input_output_alias={ {}: (0, {}, may-alias) }, entry_computation_layout={(f32[2]{0})->f32[2]{0}}",
    )
    entry = parse(text).entry
    parameter, constant, add = entry.instructions
    assert parameter.op_name == "params['layers'][0]"
    assert parameter.number == 0
    assert parameter.users == [add, add]
    assert constant.arguments == "1"
    assert entry.root is add
    assert add.operands == [parameter, parameter]
    assert add.op_name == "jit(f)/attention/qkv/add"
    assert add.backend_config == '{"n":"1"}'
    assert add.attribute("frontend_attributes") == '{a="b{c}"}'
    assert parse(text).aliases == {0: 0}


def test_operands_may_carry_their_shapes() -> None:
    text = module("%p.1 = f32[2]{0} parameter(0)", "ROOT %n = f32[2]{0} negate(f32[2]{0:T(256)} %p.1)")
    assert parse(text).entry.root.operands[0].name == "p.1"


def test_attributes() -> None:
    text = module(
        "%p.1 = f32[2]{0} parameter(0)",
        "ROOT %s = f32[1]{0} slice(%p.1), slice={[0:1]}, dim_labels=bf_io->bf, dimensions={0,1}, index=3",
    )
    root = parse(text).entry.root
    assert root.attribute("slice") == "{[0:1]}"
    assert root.attribute("dim_labels") == "bf_io->bf"
    assert root.attribute("index") == "3"
    assert root.attribute("nothing") is None
    assert root.integers("dimensions") == (0, 1)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "not HLO at all",
        "HloModule m",
        "HloModule m\n\nENTRY %main () -> f32[] {\n",
        "HloModule m\n\nENTRY %main () -> f32[] {\n}\n",
        module("ROOT %a = f32[2]{0} add(%nobody, %nobody)"),
        module("what is this"),
        module("ROOT %a = f32[2]{0"),
        module("ROOT %a = (f32[2]{0}, f32[2]{0} tuple(%p"),
    ],
)
def test_what_is_not_hlo_is_an_error_that_says_so(text: str) -> None:
    with pytest.raises(HloError):
        parse(text)
