"""Tokenizers: text to ids and back, saved with the data in the format of the `tokenizers` package.

Both views use bytes, so that every symbol exists when a model of the 27-symbol view meets raw text.
"""

from pathlib import Path
from typing import Literal

import numpy as np
import tokenizers
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from pipeline.data.archives import encoded
from pipeline.errors import Failure

PAD = "<pad>"

# What a language model's score is in: bits per character where tokens are characters or bytes, else perplexity.
Unit = Literal["bpc", "perplexity"]


class Tokenizer:
    """Bytes as ids 0 to 255, and a pad token."""

    def __init__(self, model: tokenizers.Tokenizer) -> None:
        self._model = model

    @classmethod
    def bytes(cls) -> "Tokenizer":
        vocabulary = {character: byte for byte, character in _byte_characters().items()}
        model = tokenizers.Tokenizer(BPE(vocab=vocabulary, merges=[]))
        model.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
        model.decoder = ByteLevelDecoder()
        model.add_special_tokens([PAD])
        return cls(model)

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        try:
            model = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the package raises bare Exception, for a missing file too
            raise Failure(f"{path}: no usable tokenizer ({error}); run `vqmoe prepare` again") from None
        if model.token_to_id(PAD) != 256:
            raise Failure(
                f"{path}: a tokenizer of another vocabulary ({model.get_vocab_size()} entries); run `vqmoe prepare` again"
            )
        return cls(model)

    def save(self, path: Path) -> None:
        path.write_text(self._model.to_str(pretty=True) + "\n", encoding="utf-8")

    @property
    def size(self) -> int:
        """Number of ids, the pad token included."""
        return self._model.get_vocab_size()

    @property
    def pad(self) -> int:
        return self._model.token_to_id(PAD)

    @property
    def unit(self) -> Unit:
        return "bpc"

    def encode(self, text: str) -> np.ndarray:
        """Ids as uint16. The ids are the UTF-8 bytes, so numpy does what the saved tokenizer does, at memory speed.

        Half of a character, where a corpus is cut there, is the bytes it came from.
        """
        return np.frombuffer(encoded(text), dtype=np.uint8).astype(np.uint16)

    def decode(self, ids: np.ndarray) -> str:
        """Text of ids; pads are left out and bytes that are no UTF-8 are replaced."""
        return self._model.decode([int(i) for i in ids], skip_special_tokens=True)


def _byte_characters() -> dict[int, str]:
    """The printable character that stands for each byte in byte-level vocabularies (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {byte: chr(byte) for byte in printable}
    for byte in range(256):
        if byte not in table:
            table[byte] = chr(256 + len(table) - len(printable))
    return table
