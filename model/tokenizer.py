"""Text to tokens and back: a Hugging Face `tokenizer.json`, or else bytes."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE = "tokenizer.json"
UNKNOWN = "\ufffd"  # what stands for bytes that are no text


@dataclass(frozen=True)
class Tokenizer:
    """A token for each byte of UTF-8, unless there is a tokenizer of the `tokenizers` library."""

    library: Any = None

    @classmethod
    def read(cls, path: Path) -> "Tokenizer":
        """A `tokenizer.json`, or that of a folder, or bytes where the folder has none; ValueError if it is no such."""
        file = path / FILE if path.is_dir() else path
        if not file.exists():
            if path.is_dir():
                return cls()
            raise ValueError(f"{file}: there is no such file")
        from tokenizers import Tokenizer as Library  # here, for bytes need none of it

        try:
            return cls(Library.from_file(str(file)))
        except Exception as error:  # the library raises Exception itself
            raise ValueError(f"{file}: no tokenizer: {error}") from None

    @property
    def vocabulary(self) -> int:
        """How many tokens there are."""
        return 256 if self.library is None else self.library.get_vocab_size()

    @property
    def digest(self) -> str:
        """What tells it from others: equal where the same text has the same tokens."""
        return "bytes" if self.library is None else hashlib.sha256(self.library.to_str().encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, with what the tokenizer puts before it."""
        return list(text.encode()) if self.library is None else self.library.encode(text).ids

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of tokens: U+FFFD for bytes that are none and for tokens that there are not; nothing for what is
        below zero, which stands for no token."""
        tokens = [int(token) for token in tokens if token >= 0]
        if self.library is not None:
            return self.library.decode(tokens)
        return b"".join(bytes([token]) if token < 256 else b"\xff" for token in tokens).decode(errors="replace")

    def token(self, text: str) -> int:
        """The one token that a text is; ValueError if it is none or more than one."""
        if self.library is None:
            tokens = self.encode(text)
        elif (special := self.library.token_to_id(text)) is not None:
            tokens = [special]
        else:
            tokens = self.library.encode(text, add_special_tokens=False).ids
        if len(tokens) != 1:
            raise ValueError(f"stop is {text!r}; it must be the text of one token; it has {len(tokens)}")
        return tokens[0]


class Stream:
    """Text as its tokens come: what may still change, such as half of a character, is held back.

    The text of a token may depend on those before it (of some tokenizers the first loses its space). So what is decoded
    begins some tokens earlier each time, and what has been shown of it is left out.
    """

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] = ()):
        """before: tokens that are shown already."""
        self._decode = tokenizer.decode
        self._tokens = list(before)
        self._ended = len(self._tokens)  # how many of them there were when no character was held back
        self._shown = len(self._decode(self._tokens))  # characters

    def __call__(self, tokens: Iterable[int], last: bool = False) -> str:
        """The text that these tokens add; `last`: nothing comes after them."""
        self._tokens += tokens
        text = self._decode(self._tokens)
        ready = len(text if last else text.rstrip(UNKNOWN))
        new, self._shown = text[self._shown : ready], max(self._shown, ready)
        if ready == len(text) and len(self._tokens) > self._ended:
            del self._tokens[: self._ended]
            self._ended = len(self._tokens)
            self._shown = len(self._decode(self._tokens))
        return new
