import json
from typing import get_args

import numpy as np
import pytest
import tokenizers

from pipeline import config
from pipeline.data import tokenizers as module
from pipeline.data.corpora import view
from pipeline.data.tokenizers import Kind, Tokenizer
from pipeline.errors import Failure

TEXT = "In 1790: naïve “quotes” — and\ttabs\n\x02 control, 漢字 \U0001f600 end  "
PROSE = "It is a truth, that it is so.\nThe truth is a truth\n\n  it's said <pad> <eos>  of <unk>\r\n" * 30 + TEXT


def made(kind, text=PROSE):
    return Tokenizer.make(kind, [view(text, "text27") if kind == "characters" else text], {"bpe": 300}.get(kind, 0))


def test_params_know_the_same_kinds():
    assert get_args(config.TextData.model_fields["tokenizer"].annotation) == get_args(Kind)


@pytest.mark.parametrize("kind", get_args(Kind))
def test_ids_are_what_the_saved_tokenizer_gives(tmp_path, kind, monkeypatch):
    text = view(PROSE, "text27") if kind == "characters" else PROSE.replace("<pad>", "")
    tokenizer = made(kind)
    tokenizer.save(tmp_path / "tokenizer.json")
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode(text).ids
    ours = Tokenizer.load(tmp_path / "tokenizer.json")
    assert ours.kind == kind
    assert ours.encode(text).tolist() == theirs
    # However a text is cut into pieces.
    for size in (1, 7, 50):
        monkeypatch.setattr(module, "PIECE", size)
        assert ours.encode(text).tolist() == theirs
    assert ours.pad == ours.size - 1 == tokenizer.size - 1
    assert ours.encode(text).dtype == np.uint16
    assert max(theirs) < ours.pad


@pytest.mark.parametrize("kind", ["bytes", "characters", "bpe"])
def test_the_round_trip_is_exact(kind):
    text = view(PROSE, "text27") if kind == "characters" else PROSE + "".join(map(chr, range(1, 0x250)))
    tokenizer = made(kind)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(np.append(tokenizer.encode("end"), tokenizer.pad)) == "end"
    assert len(tokenizer.encode("")) == 0


def test_bytes_and_characters_are_symbols_with_their_own_ids():
    tokenizer = Tokenizer.bytes()
    assert tokenizer.encode(TEXT).tolist() == list(TEXT.encode())
    assert (tokenizer.size, tokenizer.pad) == (257, 256)
    assert tokenizer.encode("\udce6\udcbc").tolist() == [0xE6, 0xBC]  # what is left of a character that a corpus is cut in
    tokenizer = Tokenizer.characters()
    assert tokenizer.encode("az b").tolist() == [1, 26, 0, 2]
    assert (tokenizer.size, tokenizer.pad) == (28, 27)
    assert bytes(tokenizer.symbols[tokenizer.encode("az b")].tolist()) == b"az b"
    with pytest.raises(AssertionError):
        tokenizer.encode("A")


def test_words_are_those_of_the_training_text_by_frequency_and_lines_end():
    tokenizer = Tokenizer.words(["b b b\nc", " c a\n", "b <unk> <pad>"])
    assert [tokenizer.decode([i]) for i in range(tokenizer.size)] == ["\n", "<unk>", "b", "c", "a", ""]
    assert tokenizer.encode("c  new\tb\n\na <pad>").tolist() == [3, 1, 2, 0, 0, 4, 1]
    assert tokenizer.decode(tokenizer.encode("c new\n\na\n")).split(" ") == ["c", "<unk>\n\n", "a\n"]
    few = Tokenizer.words(["b b b\nc c a\n"], limit=4)
    assert few.encode("a b c\n").tolist() == [1, 2, 3, 0]


def test_a_given_vocabulary_keeps_its_order():
    tokenizer = Tokenizer.from_vocabulary(["the", "of", "<unk>", "and"])
    assert tokenizer.encode("and of the x\n").tolist() == [4, 3, 2, 1, 0]
    assert tokenizer.size == 6


def test_learning_reads_a_stream_and_repeats():
    lines = [line + "\n" for line in PROSE.split("\n")]
    for kind, vocabulary in (("words", 0), ("bpe", 280)):
        one, other = (Tokenizer.make(kind, iter(lines), vocabulary) for _ in range(2))
        assert one._model.to_str() == other._model.to_str()
    assert one.size == 281
    # Bytes come first, then merges: the most frequent pair of this text's words.
    assert one.encode("truth").shape < (5,)


def test_units_and_types_of_ids():
    assert {kind: made(kind).unit for kind in get_args(Kind)} == {
        "bytes": "bpc",
        "characters": "bpc",
        "words": "perplexity",
        "bpe": "perplexity",
    }
    many = Tokenizer.from_vocabulary(map(str, range(1 << 16)))
    assert many.encode("65535").tolist() == [65537]
    assert many.encode("65535").dtype == many.dtype == np.uint32


@pytest.mark.parametrize(("kind", "text"), [("bytes", " "), ("characters", " "), ("words", "\n"), ("bpe", " ")])
def test_an_example_has_a_token(kind, text):
    tokenizer = made(kind)
    assert tokenizer.decode(tokenizer.encode_some("")) == text
    assert tokenizer.encode_some("end of").tolist() == tokenizer.encode("end of").tolist()


@pytest.mark.parametrize("kind", ["words", "bpe"])
def test_half_a_character_is_no_error_to_learnt_tokenizers(kind):
    tokenizer = made(kind, "ab \udce6\udcbc cd\n" * 30)
    assert tokenizer.decode(tokenizer.encode("\udce6")) == "\ufffd"


@pytest.mark.parametrize("content", [None, b"", b"{", b'{"version": "1.0"}'])
def test_missing_or_damaged(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(Failure, match="no usable tokenizer") as caught:
        Tokenizer.load(path)
    assert "\n" not in str(caught.value)


def _without_first(found):
    del found["model"]["vocab"][min(found["model"]["vocab"], key=found["model"]["vocab"].get)]


def _swapped(found):
    vocabulary = found["model"]["vocab"]
    one, other = list(vocabulary)[:2]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]


def _lower_case(found):
    found["normalizer"] = {"type": "Lowercase"}


def _no_pad(found):
    found["added_tokens"] = []


def _gap(found):
    vocabulary = found["model"]["vocab"]
    last = max(vocabulary, key=vocabulary.get)
    vocabulary[last] += 5


@pytest.mark.parametrize("kind", get_args(Kind))
@pytest.mark.parametrize("change", [_without_first, _swapped, _lower_case, _no_pad, _gap])
def test_a_tokenizer_that_is_none_of_ours_is_refused(tmp_path, kind, change):
    path = tmp_path / "tokenizer.json"
    made(kind).save(path)
    found = json.loads(path.read_text())
    change(found)
    path.write_text(json.dumps(found))
    with pytest.raises(Failure, match=r"tokenizer\.json: .*run `vqmoe prepare` again") as caught:
        Tokenizer.load(path)
    assert "\n" not in str(caught.value)
