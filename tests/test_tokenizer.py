"""Text becomes tokens and comes back as it was, at once or some tokens at a time; what is no tokenizer is named."""

import json

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from stepbill.model.tokenizer import Stream, Tokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

LINES = ["def f(x): return x\n", "for name in names: print(name)\n", "naïve €uro 🙂 text\n"] * 20


def byte_level() -> tokenizers.Tokenizer:
    """As GPT-2's, Llama 3's and Qwen's: pieces of bytes, so that a token may be half of a character."""
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=["<end>", "<start>"])
    library.train_from_iterator(LINES, trainer)
    library.post_processor = processors.TemplateProcessing(
        single="<start> $A", special_tokens=[("<start>", library.token_to_id("<start>"))]
    )
    return library


def with_spaces_in_tokens() -> tokenizers.Tokenizer:
    """As Llama 2's and Gemma's: a token begins with its space, which decoding takes from the first one; characters
    that are no tokens are bytes."""
    merges = [("i", "n"), ("▁", "in"), ("n", "a"), ("na", "m"), ("nam", "e"), ("▁", "name"), ("▁name", "s")]
    pieces = [
        "<unk>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *"▁abcdefghijklmnopqrstuvwxyz",
        *map("".join, merges),
    ]
    vocabulary = {piece: n for n, piece in enumerate(pieces)}
    library = tokenizers.Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>"))
    library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    library.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return library


@pytest.fixture(scope="module", params=["bytes", "byte level", "spaces in tokens"])
def tokenizer(request, tmp_path_factory) -> Tokenizer:
    if request.param == "bytes":
        return Tokenizer()
    folder = tmp_path_factory.mktemp("tokenizer")
    library = byte_level() if request.param == "byte level" else with_spaces_in_tokens()
    library.save(str(folder / "tokenizer.json"))
    return Tokenizer.read(folder)


TEXTS = ["def g(x): return 'é€🙂'\n", "for one in names: print(one)\n", "🙂", "x"]


@pytest.mark.parametrize("text", TEXTS)
def test_what_is_encoded_is_decoded(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("text", TEXTS)
def test_text_that_comes_some_tokens_at_a_time_is_the_text(tokenizer, text, size):
    tokens, stream = tokenizer.encode(text), Stream(tokenizer)
    shown = [stream(tokens[at : at + size]) for at in range(0, len(tokens), size)]
    assert "".join(shown) + stream([], last=True) == text
    assert not any("\ufffd" in piece for piece in shown)  # half of a character is held back


@pytest.mark.parametrize("at", range(1, 9))
def test_text_that_continues_a_prompt_keeps_its_spaces(tokenizer, at):
    tokens = tokenizer.encode("for one in names: print(one)\n")
    prompt = tokenizer.decode(tokens[:at])
    stream = Stream(tokenizer, tokens[:at])
    written = "".join(stream([token]) for token in tokens[at:]) + stream([], last=True)
    assert prompt + written == "for one in names: print(one)\n"


def test_only_a_few_tokens_are_decoded_again(tokenizer):
    decoded = []

    class Counting(Tokenizer):
        def decode(self, tokens):
            decoded.append(len(list(tokens)))
            return super().decode(tokens)

    stream = Stream(Counting(tokenizer.library))
    for token in tokenizer.encode("print(name)\n" * 50):
        stream([token])
    assert max(decoded) < 10


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 255), max_size=12), st.integers(1, 4))
def test_any_bytes_that_come_are_the_text_that_they_are_at_once(tokens, size):
    stream = Stream(Tokenizer())
    shown = [stream(tokens[at : at + size]) for at in range(0, len(tokens), size)]
    assert "".join(shown) + stream([], last=True) == bytes(tokens).decode(errors="replace")


def test_what_never_becomes_a_character_is_shown_at_the_end():
    stream = Stream(Tokenizer())
    assert [stream(list(b"ab\xe2\x82")), stream([300]), stream([], last=True)] == ["ab", "", "\ufffd\ufffd"]
    stream = Stream(Tokenizer())
    assert [stream(list(b"a\xff")), stream(list(b"b"))] == ["a", "\ufffdb"]


def test_what_is_no_token_is_nothing(tokenizer):
    tokens = tokenizer.encode("ab")
    assert tokenizer.decode([*tokens, -1, -1]) == "ab"
    stream = Stream(tokenizer)
    assert stream(tokens) + stream([-1]) + stream([], last=True) == "ab"


def test_bytes_are_tokens_where_there_is_no_tokenizer(tmp_path):
    tokenizer = Tokenizer.read(tmp_path)
    assert tokenizer.encode("né") == [110, 195, 169]
    assert tokenizer.vocabulary == 256


def test_a_stop_is_one_token_without_what_is_put_before_a_text(tmp_path):
    byte_level().save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.read(tmp_path / "tokenizer.json")
    start, letter = tokenizer.encode("a")
    assert tokenizer.token("<start>") == start and tokenizer.token("a") == letter
    assert Tokenizer().token("a") == 97
    for it in (tokenizer, Tokenizer()):
        with pytest.raises(ValueError, match="stop is 'é€ é€'; it must be the text of one token; it has"):
            it.token("é€ é€")


def test_tokenizers_are_told_apart_by_what_they_do(tmp_path):
    byte_level().save(str(tmp_path / "a.json"), pretty=True)
    byte_level().save(str(tmp_path / "b.json"), pretty=False)
    with_spaces_in_tokens().save(str(tmp_path / "c.json"))
    a, b, c = (Tokenizer.read(tmp_path / f"{name}.json") for name in "abc")
    assert a.digest == b.digest
    assert len({a.digest, c.digest, Tokenizer().digest}) == 3


@pytest.mark.parametrize("content", ["{}", "[]", "no JSON", json.dumps({"model": {"type": "BPE"}}), ""])
def test_a_file_that_is_no_tokenizer_says_so(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=r"tokenizer\.json: no tokenizer: ."):
        Tokenizer.read(tmp_path)


def test_a_file_that_is_cut_off_says_so(tmp_path):
    whole = byte_level().to_str()
    (tmp_path / "tokenizer.json").write_text(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"tokenizer\.json: no tokenizer: ."):
        Tokenizer.read(tmp_path)


def test_a_file_that_is_not_there_says_so(tmp_path):
    with pytest.raises(ValueError, match="there is no such file"):
        Tokenizer.read(tmp_path / "tokenizer.json")
