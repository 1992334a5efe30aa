"""Tokenizers: text to ids and back, saved with the data in the format of the `tokenizers` package.

`bytes`: UTF-8 bytes, so that every symbol exists when a model of the 27-symbol view meets raw text.
`characters`: the 27 symbols of that view, as in text8.
`words`: what stands between blanks, and <eos> where a line ends, as Transformer-XL reads WikiText-103.
`bpe`: byte pairs, merged inside words (GPT-2's rule); every byte is an entry, so no text is unknown.
"""

import hashlib
import re
import sys
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from pipeline.data.archives import encoded
from pipeline.errors import Failure

Kind = Literal["bytes", "characters", "words", "bpe"]
# What a language model's score is in: bits per character where an id is one symbol of the text, else perplexity per token.
Unit = Literal["bpc", "perplexity"]

PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"

# The package is handed so many pieces of so many characters at once: enough for all cores, little memory.
PIECES, PIECE = 256, 1 << 14

# Where a text can be cut so that each side has the ids it has in the whole: before a blank between two words.
_CUT = re.compile(r"(?<=\S)[ \n](?=\S)")


class Tokenizer:
    """Entries as ids from 0, the pad token as the last id."""

    def __init__(self, kind: Kind, model: models.Model) -> None:
        self.kind = kind
        self._model = _complete(kind, model)

    @classmethod
    def make(cls, kind: Kind, texts: Iterable[str], vocabulary: int) -> "Tokenizer":
        """A tokenizer by its kind; `words` and `bpe` learn their vocabulary from texts, which are read once."""
        if kind == "words":
            return cls.words(texts, vocabulary)
        if kind == "bpe":
            return cls.bpe(texts, vocabulary)
        return cls.bytes() if kind == "bytes" else cls.characters()

    @classmethod
    def bytes(cls) -> "Tokenizer":
        return cls("bytes", models.BPE(vocab=_START["bytes"], merges=[]))

    @classmethod
    def characters(cls) -> "Tokenizer":
        return cls("characters", models.WordLevel(_START["characters"]))

    @classmethod
    def words(cls, texts: Iterable[str], limit: int = 0) -> "Tokenizer":
        """The words of texts, frequent ones first: all (0), or at most `limit` entries with <eos> and <unk>."""
        learnt = _complete("words", models.WordLevel(unk_token=UNKNOWN))
        learnt.train_from_iterator(
            _pieces(texts), trainers.WordLevelTrainer(vocab_size=sys.maxsize, min_frequency=0, show_progress=False)
        )
        ids = learnt.get_vocab(with_added_tokens=False)
        return cls.from_vocabulary(sorted(ids, key=ids.__getitem__), limit)

    @classmethod
    def from_vocabulary(cls, words: Iterable[str], limit: int = 0) -> "Tokenizer":
        """Given words in their order, behind <eos> and <unk>; frequent ones first, as adaptive softmax needs them."""
        entries = [word for word in dict.fromkeys((*_START["words"], *words)) if word != PAD][: limit or None]
        return cls("words", models.WordLevel({word: i for i, word in enumerate(entries)}, unk_token=UNKNOWN))

    @classmethod
    def bpe(cls, texts: Iterable[str], size: int) -> "Tokenizer":
        """The bytes and the merges that texts teach: `size` entries, or fewer where no pair is left to merge."""
        learnt = _complete("bpe", models.BPE())
        learnt.train_from_iterator(
            _pieces(texts), trainers.BpeTrainer(vocab_size=size, initial_alphabet=list(_START["bpe"]), show_progress=False)
        )
        return cls("bpe", learnt.model)

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        """A saved tokenizer of any kind; Failure where the file holds anything that `save` does not write."""
        try:
            found = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the package raises bare Exception, for a missing file too
            raise Failure(f"{path}: no usable tokenizer ({error}); run `vqmoe prepare` again") from None
        vocabulary = found.get_vocab(with_added_tokens=False)
        if sorted(vocabulary.values()) == list(range(len(vocabulary))):
            for kind in get_args(Kind):
                whole = kind in ("words", "bpe") or len(vocabulary) == len(_START[kind])
                if whole and _START[kind].items() <= vocabulary.items():
                    made = cls(kind, found.model)
                    if made._model.to_str() == found.to_str():
                        return made
        raise Failure(
            f"{path}: a tokenizer of another make ({type(found.model).__name__}, {found.get_vocab_size()} entries); "
            "run `vqmoe prepare` again"
        )

    def save(self, path: Path) -> None:
        path.write_text(self._model.to_str(pretty=True) + "\n", encoding="utf-8")

    @property
    def digest(self) -> str:
        """Sha256 of what makes text into ids."""
        return hashlib.sha256(self._model.to_str().encode()).hexdigest()

    @property
    def size(self) -> int:
        """Number of ids, the pad token included."""
        return self._model.get_vocab_size()

    @property
    def pad(self) -> int:
        return self._model.token_to_id(PAD)

    @property
    def dtype(self) -> type[np.unsignedinteger]:
        """Of ids in memory and on disk."""
        return np.uint16 if self.size <= 1 << 16 else np.uint32

    @property
    def unit(self) -> Unit:
        return "bpc" if self.symbols is not None else "perplexity"

    @property
    def symbols(self) -> np.ndarray | None:
        """The byte or code point of each id, rising, where an id is one symbol of the text; else None."""
        return _SYMBOLS.get(self.kind)

    def encode(self, text: str) -> np.ndarray:
        """Ids of a text; `characters` takes texts of the 27-symbol view alone.

        Where an id is one symbol, numpy does what the saved tokenizer does, at memory speed. Half of a character, where a
        corpus is cut there, is the bytes it came from, and to the other kinds a character that stands for no text.
        """
        if self.symbols is not None:
            ids = np.frombuffer(encoded(text), dtype=np.uint8)
            if self.kind == "characters":
                ids = _CHARACTER_IDS[ids]
                assert (ids < self.pad).all(), "a text of another view"
            return ids.astype(self.dtype)
        parts, pieces = [np.empty(0, self.dtype)], _pieces([text])
        while some := list(islice(pieces, PIECES)):
            parts += [
                np.array(encoding.ids, self.dtype) for encoding in self._model.encode_batch_fast(some, add_special_tokens=False)
            ]
        return np.concatenate(parts)

    def encode_some(self, text: str) -> np.ndarray:
        """Ids of a text, at least one: nothing at all becomes a space, or <eos> where blanks have no id."""
        ids = self.encode(text)
        return ids if len(ids) else self.encode("\n" if self.kind == "words" else " ")

    def decode(self, ids: np.ndarray) -> str:
        """Text of ids; pads are left out, bytes that are no UTF-8 are replaced, and one space parts words."""
        text = self._model.decode([int(i) for i in ids], skip_special_tokens=True)
        return re.sub(f"(^| ){EOS}(?= |$)", "\n", text) if self.kind == "words" else text


def _complete(kind: Kind, model: models.Model) -> tokenizers.Tokenizer:
    """A model with what its kind does to a text before and after it, and the pad token."""
    complete = tokenizers.Tokenizer(model)
    if kind == "words":
        complete.normalizer = normalizers.Replace("\n", f" {EOS} ")
        complete.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    elif kind == "characters":
        complete.pre_tokenizer = pre_tokenizers.Split("", "isolated")
        complete.decoder = decoders.Fuse()
    else:
        complete.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind == "bpe")
        complete.decoder = decoders.ByteLevel()
    complete.add_special_tokens([PAD])
    complete.encode_special_tokens = True  # a text that says <pad> says it in ordinary tokens
    return complete


def _pieces(texts: Iterable[str]) -> Iterator[str]:
    """Texts in pieces of about PIECE characters that have the ids which they have in the whole."""
    for text in texts:
        text = encoded(text).decode("utf-8", "replace")
        start = 0
        while start < len(text):
            cut = _CUT.search(text, start + PIECE)
            end = cut.start() if cut else len(text)
            yield text[start:end]
            start = end


def _byte_characters() -> dict[int, str]:
    """The printable character that stands for each byte in byte-level vocabularies (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {byte: chr(byte) for byte in printable}
    for byte in range(256):
        if byte not in table:
            table[byte] = chr(256 + len(table) - len(printable))
    return table


_SYMBOLS = {
    "bytes": np.arange(256, dtype=np.uint16),
    "characters": np.array([32, *range(97, 123)], dtype=np.uint16),
}
_CHARACTER_IDS = np.full(256, len(_SYMBOLS["characters"]), dtype=np.uint8)
_CHARACTER_IDS[_SYMBOLS["characters"]] = np.arange(len(_SYMBOLS["characters"]))
# The entries with which a vocabulary starts; with these a fixed one also ends.
_START: dict[Kind, dict[str, int]] = {
    "bytes": {character: byte for byte, character in _byte_characters().items()},
    "characters": {chr(point): i for i, point in enumerate(_SYMBOLS["characters"])},
    "words": {EOS: 0, UNKNOWN: 1},
    "bpe": {character: i for i, character in enumerate(sorted(_byte_characters().values()))},
}
