"""A checkpoint in few bits is what reading it in few bits gives, with all that goes with it."""

import sys
from dataclasses import replace

import jax
import numpy as np
import pytest
from stepbill.experiments import generate, quantize
from stepbill.model import checkpoint
from stepbill.model.tokenizer import Tokenizer
from stepbill.model.transformer import split
from test_model import LLAMA, MIXTRAL, create
from test_tokenizer import byte_level


@pytest.fixture(autouse=True)
def this_process_stays_as_it_is(monkeypatch):
    monkeypatch.setattr("stepbill.profiling.targets.prepare", lambda target: None)


def with_tokenizer(folder):
    byte_level().save(str(folder / "tokenizer.json"))
    return Tokenizer.read(folder)


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ours")
    config = replace(MIXTRAL, vocabulary=with_tokenizer(folder).vocabulary)
    checkpoint.write(folder, config, split(create(config))[1])
    (folder / "generation_config.json").write_text('{"eos_token_id": 7}')
    return folder


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    if sys.version_info >= (3, 12):
        pytest.skip("the test extra has transformers for Python 3.11 alone")
    import torch
    import transformers

    folder = tmp_path_factory.mktemp("theirs")
    config = transformers.Qwen3Config(
        **{"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4},
        **{"num_key_value_heads": 2, "head_dim": 4, "vocab_size": with_tokenizer(folder).vocabulary},
        **{"max_position_embeddings": 64, "eos_token_id": 7, "initializer_range": 0.3},
    )
    torch.manual_seed(0)
    transformers.Qwen3ForCausalLM(config).save_pretrained(folder, max_shard_size="20KB")
    return folder


@pytest.mark.parametrize("weights", ["int8", "int4:8"])
@pytest.mark.parametrize("whose", ["ours", "theirs"])
def test_any_checkpoint_is_quantised_to_disk_and_read_back(whose, weights, request, tmp_path, capsys):
    folder = request.getfixturevalue(whose)
    capsys.readouterr()
    assert quantize.main([f"--checkpoint={folder}", f"--weights={weights}", f"--out={tmp_path / 'few'}"]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{tmp_path / 'few'}: {weights}, 0.0 MB; {folder} has ")
    config, params = checkpoint.read(tmp_path / "few")
    expected, whole = checkpoint.read(folder, weights=weights)
    assert config.weights == weights and config.resolve() == expected.resolve()
    jax.tree.map(np.testing.assert_array_equal, params, whole)
    assert Tokenizer.read(tmp_path / "few").digest == Tokenizer.read(folder).digest
    assert generate.named_stops(tmp_path / "few") == generate.named_stops(folder) == (7,)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--checkpoint=OURS --weights=int8 --out=OURS", "--out=OURS: it must be another folder than --checkpoint"),
        (
            "--checkpoint=OURS --weights=int8 --out=OURS/model.json",
            "--out=OURS/model.json: cannot write there: File ex",
        ),
        ("--checkpoint=OURS --weights=int8 --out=OURS/model.json/x", "cannot write there: Not a directory"),
        ("--checkpoint=OURS/nowhere --weights=int8 --out=x", "there is no such folder"),
        ("--checkpoint=OURS --weights=int3 --out=x", "--weights=int3: it must be bf16, int8, int4 or int4:GROUP"),
    ],
)
def test_wrong_input_is_one_line(argv, message, ours, capsys):
    argv, message = (part.replace("OURS", str(ours)) for part in (argv, message))
    before = (ours / "model.safetensors").read_bytes()
    assert quantize.main(argv.split()) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and message in err
    assert (ours / "model.safetensors").read_bytes() == before


def test_what_is_quantised_is_not_quantised_again(tmp_path, capsys):
    checkpoint.write(tmp_path / "full", LLAMA, split(create(LLAMA))[1])
    first = ["--weights=int8", f"--checkpoint={tmp_path / 'full'}", f"--out={tmp_path / 'int8'}"]
    assert quantize.main(first) == 0
    again = ["--weights=int4", f"--checkpoint={tmp_path / 'int8'}", f"--out={tmp_path / 'int4'}"]
    assert quantize.main(again) == 2
    assert "quantised already, to int8" in capsys.readouterr().err and not (tmp_path / "int4").exists()
