"""What stands in for ptxas: that it leaves HLO and plan as they are, and refuses what ptxas would."""

import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from compiled import bf16, f32, ready
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from stepbill.profiling import assembler, targets

OWN = ("loop_add_fusion", "fusion", "fusion_7", "gemm_fusion_dot_general_3_1", "wrapped_convert", "input_sum_fusion_2")
OTHERS = ("decode_attention", "fusion_kernel", "my_gemm", "loop_add_fusion_of_mine", "wrapped_Mine")


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    """Tools with a ptxas that only says that it was asked."""
    (tmp_path / "it's real" / "bin").mkdir(parents=True)
    ptxas = tmp_path / "it's real" / "bin" / "ptxas"
    ptxas.write_text('#!/bin/sh\necho "real: $*"\n')
    ptxas.chmod(0o755)
    return tmp_path / "it's real"


FILES = {(name,): False for name in OWN} | {(name,): True for name in OTHERS}  # by names of kernels: is it assembled?
FILES |= {OWN: False, (*OWN, "mine"): True, (): True}


@pytest.mark.parametrize(("names", "is_real"), FILES.items())
def test_what_xla_did_not_make_is_assembled(names: tuple[str, ...], is_real: bool, tools: Path, tmp_path: Path):
    made = assembler.stand_in(tools, tmp_path)
    source, result = tmp_path / "source", tmp_path / "result"
    source.write_text("".join(f".visible .entry {name}(\n\t.param .u64 {name}_param_0\n)\n{{\n}}\n" for name in names))
    command = [made / "bin" / "ptxas", source, "-o", result, "-arch=sm_90a"]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert said == (f"real: {source} -o {result} -arch=sm_90a\n" if is_real else "")
    assert result.exists() == (not is_real)


def test_its_version_is_that_of_the_real_one(tools: Path, tmp_path: Path):
    made = assembler.stand_in(tools, tmp_path)
    assert subprocess.check_output([made / "bin" / "ptxas", "--version"], text=True) == "real: --version\n"


def test_where_nothing_may_be_started_the_real_one_is_told(tools: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(assembler.os, "access", lambda path, how: False)
    assert assembler.stand_in(tools, tmp_path) == tools


def double(x, code="add.f32 $0, $1, $1;"):
    """2 x, by a kernel of Pallas with a line of PTX in it."""

    def kernel(x, out):
        shape = jax.ShapeDtypeStruct(out.shape, out.dtype)
        (out[:],) = triton.elementwise_inline_asm(
            code, args=[x[:]], constraints="=r,r", pack=1, result_shape_dtypes=[shape]
        )

    return pl.pallas_call(kernel, out_shape=x, compiler_params=triton.CompilerParams())(x)


def attention(x):
    """Products, sums and exponentials, in a loop."""
    weights = jax.nn.softmax((x @ x.T).astype(jnp.float32)).astype(x.dtype)
    return jax.lax.fori_loop(0, 3, lambda _, x: jnp.tanh(weights @ x) + jnp.sort(x), x)


@pytest.mark.parametrize("name", ["attention", "double", "gradients"])
def test_text_and_plan_are_those_of_the_real_one(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    ready("h200")

    def gradients(x):
        return jax.grad(lambda x: jnp.sum(attention(x).astype(jnp.float32) ** 2))(x)

    function = {"attention": attention, "double": lambda x: double(x.astype(jnp.float32)), "gradients": gradients}[name]
    lowered = targets.lower(jax.jit(function), "h200", bf16(256, 128))
    found = []
    for how in ("seeming", "real"):
        monkeypatch.setenv("STEPBILL_CACHE", str(tmp_path / how))
        if how == "real":
            monkeypatch.setattr(assembler, "stand_in", lambda tools, folder: tools)
        found.append(targets.compile(lowered, "h200"))
    assert found[0].text == found[1].text and found[0].memory == found[1].memory


def test_what_ptxas_refuses_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    ready("h200")
    monkeypatch.setenv("STEPBILL_CACHE", str(tmp_path))
    assert "__gpu$xla.gpu.triton" in targets.compile(jax.jit(double), "h200", f32(256)).text
    with pytest.raises(targets.CompileError):
        targets.compile(jax.jit(lambda x: double(x, "no.such.instruction $0, $1;")), "h200", f32(256))
