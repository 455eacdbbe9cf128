"""`python -m stepbill.experiments.generate`: text out, rates on the side, wrong input refused in one line."""

import io
import json
import sys
from dataclasses import replace
from itertools import chain
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from stepbill.experiments import generate
from stepbill.experiments.generate import Writer
from stepbill.model import checkpoint, decode
from stepbill.model.decode import Sampling
from stepbill.model.tokenizer import Tokenizer
from stepbill.model.transformer import graph_of, split
from test_model import LLAMA, create, run
from test_tokenizer import byte_level

TINY = replace(LLAMA, name="tiny", vocabulary=256, max_context=40)
SMALL = "--num_layers=1 --width=16 --heads=2 --kv_heads=1 --mlp_width=16 --dtype=f32"


@pytest.fixture(autouse=True)
def this_process_stays_as_it_is(monkeypatch):
    """Settles nothing of jax, and measures no bandwidth with a quarter of a gigabyte."""
    monkeypatch.setattr("stepbill.profiling.targets.prepare", lambda target: None)
    monkeypatch.setattr(generate, "COPY_BYTES", 1 << 16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint")
    checkpoint.write(path, TINY.resolve(), split(create(TINY.resolve()))[1])
    return path


def command(capfd, *argv):
    """-> (exit status, standard output, standard error)."""
    status = generate.main(argv)
    return (status, *capfd.readouterr())


# ---- writing


@pytest.mark.parametrize(
    ("size", "sampling"), [(1, Sampling()), (4, Sampling(1.5, top_p=0.9)), (16, Sampling())], ids=str
)
def test_what_is_streamed_is_what_one_loop_writes(size, sampling):
    config = TINY.resolve()
    model, prompts = create(config), [[7, 8, 9, 10], [3, 4]]
    tokens, start = decode.pad_left(prompts)
    options = {"count": 12, "sampling": sampling, "key": jax.random.key(5), "start": start}
    expected = np.asarray(run(decode.generate, model, tokens, **options))
    stop = (int(expected[0, 6]),)
    for its, stops in ((expected, ()), (None, stop)):
        writer = Writer(config, split(model)[1], prompts, count=12, sampling=sampling, stop=stops, seed=5, size=size)
        rows = [[*chain(*parts)] for parts in zip(*writer, strict=True)]
        if its is None:
            its = [row[: row.index(stop[0])] if stop[0] in row else row for row in expected.tolist()]
        np.testing.assert_array_equal(rows[0], its[0])
        np.testing.assert_array_equal(rows[1], its[1])


def test_it_writes_to_the_last_position_of_the_model():
    config = TINY.resolve()
    model, prompt = create(config), [5, 6, 7]
    writer = Writer(config, split(model)[1], [prompt], count=38, sampling=Sampling())
    written = [*chain(*(rows[0] for rows in writer))]
    np.testing.assert_array_equal(written, run(decode.generate, model, np.array([prompt]), count=38)[0])
    assert writer.written == 37 and writer.length == config.max_context


# ---- the command


def test_standard_output_has_the_text_alone(capfd, folder):
    status, out, err = command(capfd, f"--checkpoint={folder}", "--prompt=Once", "--tokens=9")
    (tokens,) = run(decode.generate, create(TINY.resolve()), np.array([list(b"Once")]), count=9).tolist()
    assert status == 0 and out == "Once" + Tokenizer().decode(tokens) + "\n"
    assert [line.split()[0] for line in err.splitlines()] == ["compile", "prefill", "decode"]
    assert "tokens/s" in err and "B/s, " in err and "(a copy in this host's memory, measured)" in err


def test_several_prompts_are_continued_together_each_as_alone(capfd, folder):
    flags = (f"--checkpoint={folder}", "--tokens=8", "--format=json", "--cache_dtype=int8")
    status, out, _ = command(capfd, *flags, "--prompt=A longer one", "--prompt=One", "--batch=2")
    both = json.loads(out)
    assert status == 0 and [one["prompt"] for one in both["written"]] == ["A longer one"] * 2 + ["One"] * 2
    rates = both["rates"]
    assert rates["prompt_tokens"] == 30 and rates["compile_seconds"] > 0
    assert rates["bytes_per_second"] == pytest.approx(
        rates["bytes_per_step"] * rates["steps"] / rates["decode_seconds"]
    )
    assert rates["share_of_ceiling"] == pytest.approx(rates["bytes_per_second"] / rates["ceiling_bytes_per_second"])
    alone = json.loads(command(capfd, *flags, "--prompt=One")[1])
    assert both["written"][2] == both["written"][3] == alone["written"][0]


def test_a_stop_ends_the_text(capfd, folder):
    flags = (f"--checkpoint={folder}", "--prompt=ab", "--tokens=30", "--temperature=3", "--format=json")
    free = json.loads(command(capfd, *flags)[1])["written"][0]["text"]
    stop = next(letter for letter in free if letter.isascii() and letter.isprintable())
    status, out, _ = command(capfd, *flags, f"--stop={stop}")
    assert status == 0 and json.loads(out)["written"][0]["text"] == free[: free.index(stop)]


def test_the_checkpoint_says_what_stops_it(tmp_path):
    (tmp_path / "config.json").write_text('{"eos_token_id": 5}')
    assert generate.stops_of(asked(tmp_path), Tokenizer()) == (5,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [6, 7]}')
    assert generate.stops_of(asked(tmp_path), Tokenizer()) == (6, 7)
    assert generate.stops_of(asked(tmp_path, stop=("a", "\n")), Tokenizer()) == (97, 10)


def asked(folder, **changes):
    return generate.Request(None, folder, {}, ("x",), Sampling(), **changes)


def test_a_prompt_read_in_chunks_is_continued_as_if_read_at_once(capfd, folder):
    flags = (f"--checkpoint={folder}", "--prompt=A longer one", "--prompt=One", "--tokens=8")
    whole = command(capfd, *flags)[1]
    assert command(capfd, *flags, "--prefill_chunk=5")[1] == whole


def test_a_prompt_is_read_from_standard_input(capfd, folder, monkeypatch):
    flags = (f"--checkpoint={folder}", "--tokens=4")
    monkeypatch.setattr("sys.stdin", io.StringIO("Once\n"))
    assert command(capfd, *flags, "--prompt=-")[1] == command(capfd, *flags, "--prompt=Once\n")[1]


@pytest.fixture(scope="module")
def with_tokenizer(tmp_path_factory):
    """-> a folder with a checkpoint and a tokenizer that puts <start> before a text, and that tokenizer."""
    path = tmp_path_factory.mktemp("with tokenizer")
    byte_level().save(str(path / "tokenizer.json"))
    tokenizer = Tokenizer.read(path)
    config = replace(TINY, vocabulary=tokenizer.vocabulary + 4).resolve()  # padded, as published ones are
    checkpoint.write(path, config, split(create(config))[1])
    return path, tokenizer


def test_text_goes_through_the_tokenizer_of_the_checkpoint(capfd, with_tokenizer):
    path, tokenizer = with_tokenizer
    config, params = checkpoint.read(path)
    prompt = tokenizer.encode("def f")
    (tokens,) = run(decode.generate, nnx.merge(graph_of(config), params), np.array([prompt]), count=12).tolist()
    status, out, err = command(capfd, f"--checkpoint={path}", "--prompt=def f", "--tokens=12")
    assert status == 0 and out == tokenizer.decode(prompt + tokens) + "\n"
    assert f"prefill  {len(prompt)} tokens" in err


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="the test extra has transformers for Python 3.11 alone")
def test_a_checkpoint_of_transformers_is_continued_with_its_tokenizer(capfd, tmp_path):
    import torch
    import transformers

    byte_level().save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.read(tmp_path)
    start, end = tokenizer.token("<start>"), tokenizer.token("<end>")
    config = transformers.LlamaConfig(
        **{"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4},
        **{"num_key_value_heads": 2, "vocab_size": tokenizer.vocabulary, "max_position_embeddings": 64},
        **{"bos_token_id": start, "eos_token_id": end, "initializer_range": 0.3},
    )
    torch.manual_seed(0)
    theirs: Any = transformers.LlamaForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path)
    prompt = tokenizer.encode("for one in")
    with torch.no_grad():
        tokens = theirs.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, pad_token_id=end)
    capfd.readouterr()  # what transformers printed
    status, out, _ = command(capfd, f"--checkpoint={tmp_path}", "--prompt=for one in", "--tokens=12", "--dtype=f32")
    assert status == 0 and out == tokenizer.decode(tokens[0].tolist()) + "\n"
    # It says itself what stops it.
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": int(tokens[0, len(prompt) + 2])}))
    out = command(capfd, f"--checkpoint={tmp_path}", "--prompt=for one in", "--tokens=12", "--dtype=f32")[1]
    assert out == tokenizer.decode(tokens[0, : len(prompt) + 2].tolist()) + "\n"


def test_weights_in_few_bits_move_fewer_bytes(capfd, folder):
    def bytes_per_step(*flags):
        out = command(capfd, f"--checkpoint={folder}", "--prompt=ab", "--tokens=3", "--format=json", *flags)[1]
        return json.loads(out)["rates"]["bytes_per_step"]

    assert bytes_per_step("--weights=int8") < 0.6 * bytes_per_step()


def test_random_weights_are_said_to_be_random(capfd):
    flags = ("--model=nano", *SMALL.split(), "--prompt=x", "--tokens=5", "--temperature=1")
    status, out, err = command(capfd, *flags)
    assert status == 0 and out.startswith("x") and "with random weights" in err.splitlines()[0]
    assert command(capfd, *flags)[1] == out
    assert command(capfd, *flags, "--seed=1")[1] != out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--checkpoint=DIR", "--prompt: it needs a value"),
        ("--prompt=x", "--checkpoint: it needs a value"),
        ("--checkpoint=DIR --prompt=", "--prompt=: it must have at least one character"),
        ("--checkpoint=nowhere --prompt=x", "--checkpoint=nowhere: nowhere: there is no such folder"),
        ("--checkpoint=DIR --prompt=x --top_p=1.5", "--top_p=1.5: it must be above 0 and at most 1"),
        ("--checkpoint=DIR --prompt=x --temperature=-1", "--temperature=-1.0: it must be positive, or 0"),
        ("--checkpoint=DIR --prompt=x --model=nano", "--model=nano: it cannot be given with --checkpoint"),
        ("--checkpoint=DIR --prompt=x --width=8", "--width=8: it cannot be given with --checkpoint"),
        ("--checkpoint=DIR --prompt=x --tokens=41", "--tokens=41: after a prompt of 1 tokens tiny writes at most 40"),
        ("--checkpoint=DIR --prompt=x --stop=ab", "--stop=ab: it must be the text of one token; it has 2"),
        ("--checkpoint=DIR --prompt=x --weights=int3", "--weights=int3: it must be bf16, int8, int4 or int4:GROUP"),
        (
            f"--model=nano {SMALL} --head_width=512 --prompt=x --attention=flash",
            "--attention=flash: its kernels take keys",
        ),
        (f"--model=nano {SMALL} --vocabulary=100 --prompt=x", "--prompt: it has the token 120; nano(L=1,"),
        ("--model=nanno --prompt=x", "--model=nanno"),
        ("--checkpoint=DIR --prompt=x --tempature=1", "--tempature: there is no such flag; did you mean --temperature"),
    ],
)
def test_wrong_input_is_one_line_and_no_output(capfd, folder, argv, message):
    status, out, err = command(capfd, *(arg.replace("DIR", str(folder)) for arg in argv.split()))
    assert status == 2 and out == "" and len(err.splitlines()) == 1 and message in err


@pytest.mark.parametrize("name", ["tokenizer.json", "generation_config.json"])
def test_a_file_beside_the_model_that_is_broken_is_named(capfd, tmp_path, name):
    (tmp_path / name).write_text("{")
    checkpoint.write(tmp_path, TINY.resolve(), split(create(TINY.resolve()))[1])
    status, out, err = command(capfd, f"--checkpoint={tmp_path}", "--prompt=x")
    assert status == 2 and out == "" and len(err.splitlines()) == 1 and f"{name}: no" in err


def test_help_lists_the_flags(capfd):
    status, out, _ = command(capfd, "--help")
    assert status == 0 and all(f"--{name}" in out for name in ("checkpoint", "prompt", "min_p", "prefill_chunk"))
