"""Text to tokens and back: a Hugging Face `tokenizer.json`, or else bytes."""

import codecs
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Tokenizer:
    """A byte is a token, unless there is a tokenizer of the `tokenizers` library."""

    library: Any = None

    @classmethod
    def read(cls, path: Path) -> "Tokenizer":
        """A `tokenizer.json`, or that of a folder, or bytes where the folder has none; ValueError if it is no such."""
        file = path / "tokenizer.json" if path.is_dir() else path
        if not file.exists():
            if path.is_dir():
                return cls()
            raise ValueError(f"{file}: there is no such file")
        try:
            from tokenizers import Tokenizer as Library
        except ImportError:
            raise ValueError(f"{file}: reading it needs pip install 'stepbill[checkpoints]'") from None
        try:
            return cls(Library.from_file(str(file)))
        except Exception as error:  # the library raises Exception itself
            raise ValueError(f"{file}: no tokenizer: {error}") from None

    @property
    def vocabulary(self) -> int:
        """How many tokens there are."""
        return 256 if self.library is None else self.library.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, with what the tokenizer puts before it."""
        return list(text.encode()) if self.library is None else self.library.encode(text).ids

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens; bytes that are no UTF-8 become U+FFFD, and -1, which is no token, nothing."""
        return "".join(Stream(self)(tokens, last=True))

    def token(self, text: str) -> int:
        """The one token that a text is; ValueError if it is none or more than one."""
        special = None if self.library is None else self.library.token_to_id(text)
        tokens = [special] if special is not None else self.encode(text)
        if len(tokens) != 1:
            raise ValueError(f"stop is {text!r}; it must be one token, and is {len(tokens)}")
        return tokens[0]


class Stream:
    """Text as its tokens come: what may still change, such as half of a character, is held back."""

    def __init__(self, tokenizer: Tokenizer):
        self._library = tokenizer.library
        self._bytes = codecs.getincrementaldecoder("utf-8")("replace")
        self._tokens: list[int] = []
        self._said = 0  # how many of these tokens have been said

    def __call__(self, tokens: Iterable[int], last: bool = False) -> str:
        """The text that these tokens add; `last`: nothing comes after them."""
        tokens = [int(token) for token in tokens if token >= 0]
        if self._library is None:
            return self._bytes.decode(bytes(token for token in tokens if token < 256), last)
        # A token's text may depend on those before it (spaces, halves of characters): so both with it and without.
        self._tokens += tokens
        before = self._library.decode(self._tokens[: self._said])
        now = self._library.decode(self._tokens)
        if now.endswith("\ufffd") and not last:
            return ""
        self._said = len(self._tokens)
        return now[len(before) :]
