"""The command: what it refuses and in which words, what it prints, and which mesh it proposes."""

import csv
import gzip
import io
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import pytest
from compiled import ready
from stepbill.experiments import bill, demo, fit, flags
from stepbill.model import architectures
from stepbill.model.config import ModelConfig
from stepbill.profiling import chips, dumps, hlo, render, targets

ROOT = Path(__file__).parent.parent
TINY = ("--num_layers=2", "--width=64", "--heads=4", "--kv_heads=2", "--mlp_width=128", "--context=32")


# --- what it refuses -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv,line",
    [
        ("--model=gpt", "--model=gpt: it must be one of nano, small, .*voxtral-encoder, or a path of a config.json"),
        ("--target=h20", "--target=h20: it must be one of host, a100, .*tpu7x"),
        ("--step=sleep", "--step=sleep: it must be one of train, prefill, decode, generate, score, encode"),
        ("--format=xml", "--format=xml: it must be one of table, json, csv"),
        ("--model=nano --remat=some", "--remat=some: it must be one of none, full, dots"),
        ("--layers=both", "--layers=both: it must be one of auto, scan, unroll"),
        ("--attention=best", "--attention=best: it must be one of auto, xla, flash, cudnn"),
        ("--batch=0", "--batch=0: it must be a whole number of at least 1"),
        ("--batch=-1", "--batch=-1: it must be a whole number of at least 1"),
        ("--context=0", "--context=0: it must be a whole number of at least 1"),
        ("--context=4k", "--context=4k: it must be a whole number of at least 1"),
        ("--context=1.5", "--context=1.5: it must be a whole number of at least 1"),
        ("--model=nano --context=4097", "--context=4097: nano takes 1 to 4096 positions"),
        ("--step=generate --tokens=65 --context=64", "--tokens=65: a cache of --context=64 positions .* at most 64"),
        ("--width=100 --heads=7", "--width=100: without --head_width it must be divisible by --heads, 7"),
        ("--heads=7", "--heads=7: width is 384, .* divisible by --heads, 7"),
        ("--kv_heads=4", "--kv_heads=4: heads is 6, .* divisible by --kv_heads, 4"),
        ("--head_width=63", "--head_width=63: it must be even.*"),
        ("--mesh=tensor", "--mesh=tensor: it must look like data=8,tensor=4 .*"),
        ("--mesh=tensor=0", "--mesh=tensor=0: it must look like data=8,tensor=4 .*"),
        ("--mesh=rows=2", "--mesh=rows=2: 'rows' is not an axis; the axes are data, expert and tensor"),
        ("--mesh=data=2,data=2", "--mesh=data=2,data=2: data is given twice"),
        ("--mesh=data=2 --batch=3", "--batch=3: --mesh splits it over data=2, which must divide it"),
        ("--mesh=data=2,expert=2 --batch=6", "--batch=6: --mesh splits it over data=2,expert=2, which must divide it"),
        ("--mesh=expert=2 --batch=2", "mesh has expert=2; nano has no experts"),
        ("--weights=int5", "--weights=int5: it must be bf16, int8, int4 or int4:GROUP"),
        ("--weights=int8 --step=train", "--weights=int8: it must be bf16 with --step=train"),
        ("--cache_dtype=int4", "--cache_dtype=int4: it must be one of bf16, int8"),
        ("--dispatch=blocks", "--dispatch=blocks: nano has no experts"),
        ("--model=mixtral-8x7b --dispatch=best", "--dispatch=best: it must be one of auto, all, blocks, capacity"),
        ("--step=prefill --attention=flash", "--attention=flash: a CPU has no kernel for it: it must be xla or auto"),
        ("--hlo=/no/such", "--hlo=/no/such: cannot read it: no such file or directory"),
        ("--hlo=x --batch=2", "--batch=2: it cannot be given with --hlo.*"),
        ("--modle=nano", "--modle: there is no such flag; did you mean --model\\?"),
        ("--zzzzzzzz", "--zzzzzzzz: there is no such flag; see --help"),
        ("--batch", "--batch: it needs a value"),
        ("--version=5", "--version=5: it takes no value"),
        ("nano", "nano: stray argument; .*"),
        ("--flagfile=/no/such", ".*/no/such.*"),
    ],
)
def test_wrong_input_ends_in_one_line_and_status_2(stepbill, argv, line):
    status, out, err = stepbill(*argv.split())
    assert (status, out) == (2, "")
    assert re.fullmatch(f"stepbill: {line}\n", err), err


@pytest.mark.parametrize(
    "mesh,target,line",
    [("data=3", "v5e", "a power of two up to 256"), ("data=9", "h200", "1 to 8, or whole hosts of 8")],
)
def test_a_mesh_that_the_target_cannot_make(stepbill, mesh, target, line):
    ready(target)
    status, out, err = stepbill(f"--mesh={mesh}", f"--target={target}")
    assert (status, out) == (2, "")
    assert err.startswith(f"stepbill: --mesh={mesh}: ") and err.endswith(f"{line}\n") and err.count("\n") == 1


@pytest.mark.parametrize("target,extra", [("h200", "cuda"), ("v5e", "tpu")])
def test_a_missing_extra_names_its_pip_command(stepbill, monkeypatch, target, extra):
    monkeypatch.setattr(targets, "_installed", lambda module: False)
    status, out, err = stepbill(f"--target={target}")
    assert (status, out) == (2, "")
    assert err.startswith(f"stepbill: --target={target}: ")
    assert err.endswith(f"pip install 'stepbill[{extra}]'\n") and err.count("\n") == 1


@pytest.mark.parametrize(
    "content", [b"", b"no program", b"\x00\xff\xfe", b"HloModule m\n\nENTRY %e {\n  %x = f32[", b"\x1f\x8bno"]
)
@pytest.mark.parametrize("suffix", [".txt", ".gz"])
def test_a_garbled_dump(stepbill, tmp_path, content, suffix):
    path = tmp_path / f"dump{suffix}"
    path.write_bytes(content)
    status, out, err = stepbill(f"--hlo={path}")
    assert (status, out) == (2, "")
    assert err.startswith(f"stepbill: --hlo={path}: ") and err.count("\n") == 1


def test_wrong_flags_are_told_without_importing_jax():
    code = (
        "import sys; from stepbill.experiments import bill\n"
        "for wrong in ('--step=x', '--batch=0', '--target=x', '--mesh=x', '--nope', '--hlo=/no/such'):\n"
        "    assert bill.main([wrong]) == 2\n"
        "assert bill.main(['--version']) == bill.main(['--help']) == 0\n"
        "assert 'jax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)


def test_the_installed_command_says_its_version():
    command = Path(sys.executable).with_name("stepbill")
    ran = subprocess.run([command, "--version"], capture_output=True, text=True, timeout=60)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert re.fullmatch(r"stepbill \d+\.\d+\.\d+\n", ran.stdout)


def test_help_names_every_flag(stepbill):
    status, out, err = stepbill("--help")
    assert (status, err) == (0, "")
    assert set(re.findall(r"^  --(\w+)", out, re.M)) == set(flags.all_flags(flags.parse([])))


# --- what it prints ------------------------------------------------------------------------------------------------


def test_json_has_the_documented_keys_and_adds_up(stepbill):
    status, out, err = stepbill("--step=decode", "--batch=2", *TINY, "--format=json")
    assert (status, err) == (0, "")
    said = json.loads(out)
    keys = "schema program rows groups unattributed unknown total reconcile ideal memory price"
    assert set(keys.split()) <= set(said)
    assert said["schema"] == 1
    keys = (
        "model parameters active_parameters step batch context weights cache_dtype target chips mesh layers jax flags"
    )
    assert set(keys.split()) <= set(said["program"])
    assert said["program"]["flags"]["batch"] == "2" and said["program"]["mesh"] == {}
    assert set(said["groups"]) == {"attention", "mlp", "cache", "other"}
    parts = [*said["rows"], said["unattributed"]]
    for kind in ("matmul", "elementwise", "transcendental"):
        assert sum(part["flops"][kind] for part in parts) == said["total"]["flops"][kind]
    for side in ("hbm_read", "hbm_write"):
        assert sum(sum(part[side].values()) for part in parts) == sum(said["total"][side].values())
    unknown = {"roofline": None, "measured": None, "predicted": None}  # nobody knows this host's peaks
    assert said["total"]["seconds"] == unknown
    assert said["memory"]["peak_bytes"] >= said["memory"]["weights"] + said["memory"]["cache"] > 0


def test_csv_is_exact_and_adds_up(stepbill):
    status, out, err = stepbill("--step=prefill", *TINY, "--format=csv")
    assert (status, err) == (0, "")
    *rows, unattributed, total = csv.DictReader(io.StringIO(out))
    assert (unattributed["component"], total["component"]) == ("unattributed", "total")
    assert {row["phase"] for row in rows} == {"forward"} and rows[0]["component"] == "embed"
    for column in render.CSV_COLUMNS[3:-1]:
        assert sum(int(row[column]) for row in (*rows, unattributed)) == int(total[column]), column


@pytest.mark.parametrize("step", [step for step in flags.STEPS if step != "encode"])
def test_table_of_every_step(stepbill, step):
    status, out, err = stepbill(f"--step={step}", *TINY, "--tokens=4")
    assert (status, err) == (0, "")
    first, second, *_ = out.splitlines()
    assert (
        first.startswith("nano(L=2,D=64,N=4,K=2,F=128) (90.43 thousand parameters)")
        and f"· {step} · batch 1 · context 32 ·" in first
    )
    assert "no proxy for HBM" in second
    for name in ("attention/core", "mlp/up", "unattributed", "total", "  attention", "  mlp", "  cache", "  other"):
        assert re.search(rf"^ *{name} ", out, re.M), name
    for name in ("unknown", "ideal", "closed form", "memory", "price"):
        assert re.search(rf"^{name} ", out, re.M), name
    assert max(map(len, out.splitlines())) <= render.WIDTH


@pytest.mark.parametrize("target,mesh", [("h200", "tensor=2"), ("v5e", "tensor=2"), ("h200", "data=2,tensor=2")])
def test_a_bill_on_a_mesh_says_what_one_chip_and_all_chips_do(stepbill, target, mesh):
    ready(target)
    chips = 4 if "," in mesh else 2
    argv = ("--batch=2", *TINY, f"--target={target}", f"--mesh={mesh}")
    status, out, err = stepbill(*argv)
    assert (status, err) == (0, "")
    assert f"{chips} x {target} ({mesh})" in " ".join(out.split()) and "not present" in out
    assert "total, per chip" in out and f"total, {chips} chips" in out
    assert re.search(r"\blink\b", out)
    assert "per million tokens" in out


def test_training_takes_one_sequence_a_data_shard_unless_told(stepbill):
    assert request("--step=train", *TINY).batch_on({"data": 2, "tensor": 4}) == 2
    assert request("--step=train", *TINY, "--batch=8").batch_on({"data": 2}) == 8
    assert request("--step=decode", *TINY).batch_on({"data": 2}) == 1
    _, out, _ = stepbill("--step=decode", *TINY, "--mesh=data=2", "--batch=4")
    assert "batch 4 (2 a data shard)" in out


@pytest.mark.parametrize("suffix", [".txt", ".gz"])
def test_a_dump_is_billed_like_the_program_itself(stepbill, tmp_path, suffix):
    step, compilation = bill._Compiler(request("--batch=2", *TINY), lambda _: None)({})
    direct = bill.bill_of(step, compilation, "host")
    path = tmp_path / f"dump{suffix}"
    text = compilation.text.encode()
    path.write_bytes(gzip.compress(text) if suffix == ".gz" else text)
    status, out, err = stepbill(f"--hlo={path}", "--format=json")
    assert (status, err) == (0, "")
    assert json.loads(out)["total"] == json.loads(direct.dumps())["total"]
    status, out, _ = stepbill(f"--hlo={path}")
    assert status == 0 and "read from a dump" in out


def test_progress_and_logs_stay_off_standard_output():
    command = [sys.executable, "-m", "stepbill.experiments.bill", *TINY, "--format=json"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0
    assert json.loads(ran.stdout)["schema"] == 1


# --- which mesh fits -----------------------------------------------------------------------------------------------


def request(*argv: str) -> flags.Request:
    return flags.request(flags.parse(argv))


SIZES = [[{}], [{"data": 2}, {"tensor": 2}], [{"data": 4}, {"data": 2, "tensor": 2}], [{"data": 8}]]


def test_search_takes_the_first_mesh_that_the_compiler_confirms():
    compiled = []

    def compile_(mesh):
        compiled.append(mesh)
        return {1: 90, 2: None, 4: 40}[flags.chips(mesh)]

    found = fit.smallest(SIZES, lambda mesh: 80 // flags.chips(mesh), compile_, capacity_bytes=50)
    assert found == fit.Fit({"data": 4}, 40, confirmed=True)
    assert compiled == [{"data": 2}, {"tensor": 2}, {"data": 4}]  # one chip: the estimate says no by itself


def test_search_prefers_and_then_takes_what_is_leaner():
    def compile_(mesh):
        return 40 if "tensor" in mesh else 60

    assert fit.smallest(SIZES, lambda mesh: 45, compile_, 50) == fit.Fit({"tensor": 2}, 40, confirmed=True)


def test_search_without_a_compiler_says_that_it_guessed():
    assert fit.smallest(SIZES, lambda mesh: 80 // flags.chips(mesh), None, 50) == fit.Fit({"data": 2}, 40, False)
    assert fit.smallest(SIZES, lambda mesh: 80 // flags.chips(mesh), lambda _: None, 50, tries=1) == fit.Fit(
        {"tensor": 2}, 40, confirmed=False
    )


def test_search_finds_nothing():
    assert fit.smallest(SIZES, lambda mesh: 51, lambda mesh: 1, 50) is None
    assert fit.smallest(SIZES, lambda mesh: 1, lambda mesh: 51, 50, tries=100) is None


def test_candidates_split_what_can_be_split():
    llama = architectures.get("llama3-8b")
    train = list(fit.candidates(llama, "train", None))
    assert [flags.chips(same[0]) for same in train] == [1, 2, 4, 8, 16, 32, 64, 128, 256, 16, 32, 64, 128, 256]
    assert all(len({flags.chips(mesh) for mesh in same}) == 1 for same in train)
    assert train[3] == [{"data": 8}, {"data": 4, "tensor": 2}, {"data": 2, "tensor": 4}, {"tensor": 8}]
    decode = list(fit.candidates(llama, "decode", 1))
    one = [[{}], *([{"tensor": tensor}] for tensor in (2, 4, 8, 16, 32))]  # one sequence cannot be split
    assert decode == one
    assert all(8 % mesh.get("data", 1) == 0 for same in fit.candidates(llama, "train", 8) for mesh in same)
    # What fits on no host's chips, such as the experts of DeepSeek-V3, is split further, after all else.
    deepseek = architectures.get("deepseek-v3")
    tensors = [mesh.get("tensor", 1) for same in fit.candidates(deepseek, "decode", 8) for mesh in same]
    assert max(tensors) == 64 and max(tensors[: tensors.index(16)]) == 8


@pytest.mark.parametrize("step", ["train", "prefill", "decode"])
def test_argument_bytes_are_those_of_the_built_step(step):
    from stepbill.experiments import steps

    config = request(*TINY).config
    assert config is not None
    built = steps.build(config, step, batch=2, context=32)
    whole, parameters = fit.argument_bytes(config, step, 2, 32, {})
    assert whole == fit.held_bytes(built.arguments)
    assert parameters == config.parameters * (4 if step == "train" else 2)
    if step == "train":
        # All but the counters and the norms, whose one axis is D, divides by both axes.
        assert fit.argument_bytes(config, step, 2, 32, {"data": 2, "tensor": 2})[0] < 0.27 * whole


def with_memory(monkeypatch, target: str, share: float, *argv: str) -> None:
    """Gives the chip only a share of the memory that the step needs on one chip."""
    ready(target)
    _, compilation = bill._Compiler(request(*argv), lambda _: None)({})
    assert compilation.memory is not None
    small = replace(targets.chip(target), usable_hbm_bytes=int(compilation.memory.needed * share))
    monkeypatch.setitem(chips.CHIPS, target, small)


WIDE = ("--num_layers=2", "--width=256", "--heads=8", "--kv_heads=8", "--mlp_width=1024", "--context=64", "--batch=8")


def test_what_does_not_fit_is_refused_with_the_smallest_mesh_that_does(stepbill, monkeypatch):
    argv = (*WIDE, "--target=h200")
    with_memory(monkeypatch, "h200", 0.4, *argv)
    status, out, err = stepbill(*argv)
    assert (status, out) == (2, "")
    assert re.fullmatch(
        r"stepbill: --target=h200: .* decode does not fit: it needs at least [\d.]+ MB a chip, h200 has [\d.]+ MB; "
        r"the smallest mesh that fits is --mesh=tensor=4 \(compiled to make sure\)\n",
        err,
    )
    status, out, err = stepbill(*argv, "--mesh=tensor=2")
    assert status == 2 and err.startswith("stepbill: --mesh=tensor=2: ")
    status, out, err = stepbill(*argv, "--mesh=auto")
    assert (status, err) == (0, "") and "4 x h200 (tensor=4)" in out


def test_what_the_compiler_finds_too_large_is_refused_too(stepbill, monkeypatch):
    argv = (*WIDE, "--target=h200", "--step=prefill", "--context=512")
    with_memory(monkeypatch, "h200", 0.99, *argv)
    status, out, err = stepbill(*argv)
    assert (status, out) == (2, "")
    assert "it needs " in err and "at least" not in err
    assert err.endswith("--mesh=tensor=2 (compiled to make sure)\n")


def test_what_fits_nowhere_is_told(stepbill, monkeypatch):
    argv = (*WIDE, "--target=h200")
    ready("h200")
    monkeypatch.setitem(chips.CHIPS, "h200", replace(targets.chip("h200"), usable_hbm_bytes=10_000))
    status, _, err = stepbill(*argv)
    assert status == 2 and err.endswith("; no mesh of up to 256 chips will do\n")
    status, _, err = stepbill(*argv, "--mesh=auto")
    assert status == 2 and "fits on no mesh of up to 256 h200" in err


# --- the demonstration ---------------------------------------------------------------------------------------------


@pytest.fixture
def small_demo(monkeypatch):
    tiny = ModelConfig("nano", 2, 64, 4, 2, 128, 256, tied=True, max_context=4096)
    monkeypatch.setitem(architectures.ARCHITECTURES, "nano", tiny)
    for name, value in {"TRAIN_STEPS": 3, "TRAIN_CONTEXT": 32, "PROMPT": 24, "TOKENS": 8, "REPEATS": 2}.items():
        monkeypatch.setattr(demo, name, value)


def test_without_flags_it_shows_three_programs_billed_and_timed(stepbill, small_demo, tmp_path):
    status, out, err = stepbill(f"--logdir={tmp_path}")
    assert (status, err) == (0, f"to look at it: tensorboard --logdir={tmp_path}\n")
    assert re.search(r"train +3 steps on Python's own .*: loss \d\.\d\d, \d\.\d\d, \d\.\d\d\n", out)
    assert len(re.findall(r"^(train|prefill|decode 8) +measured .*tokens/s", out, re.M)) == 3
    assert "What to try next" in out and out.count("stepbill --") == 4
    assert "pip install 'stepbill[cuda]'" in out and "pip install 'stepbill[tpu]'" in out
    assert max(len(line) for line in out.split("What to try next")[0].splitlines()) <= render.WIDTH
    runs = {"train_b4_c32": "optimizer", "prefill_b1_c24": "logits", "generate_b1_c32_t8": "sampling"}
    assert {folder.name for folder in tmp_path.iterdir()} == {f"nano_{name}_host" for name in runs}
    for name, part in runs.items():  # each has its own trace where the Profile tab looks for it, its components named
        (xplane,) = tmp_path.glob(f"nano_{name}_host/plugins/profile/*/*.xplane.pb")
        planes = {plane.name: plane for plane in jax.profiler.ProfileData.from_file(str(xplane)).planes}
        lines = {line.name for line in planes["/device:CUSTOM:components"].lines}
        assert {"attention/core", "mlp/up", part} <= lines and "/host:CPU" in planes


def test_the_demonstration_as_json_and_csv(stepbill, monkeypatch):
    step, compilation = bill._Compiler(request("--step=prefill", *TINY), lambda _: None)({})
    one = demo.Timed("prefill", bill.bill_of(step, compilation, "host"), 0.5, 32, "a prompt")
    monkeypatch.setattr(demo, "run", lambda report, keep: [one, one])
    status, out, err = stepbill("--format=json")
    assert (status, err) == (0, "")
    said = json.loads(out)
    assert said["schema"] == 1 and len(said["bills"]) == 2
    status, out, err = stepbill("--format=csv")
    assert {row["step"] for row in csv.DictReader(io.StringIO(out))} == {"prefill"}


def test_the_demonstration_reads_real_text_the_same_every_time():
    text = demo.corpus(10_000)
    assert len(text) == 10_000 and text == demo.corpus(10_000) and b"import" in text
    batches = demo.windows(text, batch=4, length=65, count=3)
    assert len(batches) == 3 and all(batch.shape == (4, 65) for batch in batches)
    assert bytes(batches[0][0].astype("uint8")) == text[:65]


# --- documents -----------------------------------------------------------------------------------------------------


def test_the_readme_tells_what_ci_runs():
    readme = (ROOT / "README.md").read_text()
    commands = re.findall(r"^pip install .*$", readme, re.M)
    assert commands[:2] == ["pip install -e . && stepbill", "pip install -e '.[test]' && pytest"]
    pattern = re.search(r"grep -m1 -E '(.*)' README.md", (ROOT / ".ci" / "run").read_text())
    assert pattern and re.search(pattern[1], readme, re.M)


def test_what_the_demonstration_proposes_can_be_typed():
    for _, command in demo.NEXT:
        argv = command.partition("stepbill --")[2].split()
        values = flags.parse(["--" + argv[0], *argv[1:]])
        assert values.model in architectures.ARCHITECTURES and values.target in chips.CHIPS


def test_dumps_are_read_by_suffix(tmp_path):
    path = tmp_path / "empty.gz"
    path.write_bytes(gzip.compress(b"nothing"))
    with pytest.raises(hlo.HloError):
        hlo.parse(dumps.read(path))
