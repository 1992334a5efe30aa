from typing import get_args

import numpy as np
import pytest

from pipeline import config
from pipeline.data.corruption import KINDS, Alphabet, alphabet, corrupt, corrupt_text, rng_for
from pipeline.errors import Failure, UsageError

TEXT = np.frombuffer(b"the quick brown fox jumps over the lazy dog " * 200, dtype=np.uint8).astype(np.uint16)
LETTERS = alphabet("text27")
# Words as tokens: the symbols are ids, one of which stands for the constant word.
IDS = Alphabet(np.arange(70_000), np.array([69_999]), None)


def noisy(kind, rate, index=0, seed=0, text=TEXT, symbols=LETTERS):
    return corrupt(text, kind, rate, symbols, rng_for(seed, kind, rate, index))


def points(text):
    return np.array([ord(character) for character in text])


def string(symbols):
    return "".join(map(chr, symbols))


def test_params_know_the_same_kinds():
    assert set(get_args(config.Corruption)) == set(KINDS)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rate", [0.02, 0.1, 0.2])
def test_about_rate_of_the_symbols_is_touched(kind, rate):
    symbols, source = noisy(kind, rate)
    touched = {
        "swap": lambda: (source != np.arange(len(TEXT))).mean(),
        "delete": lambda: 1 - len(symbols) / len(TEXT),
        "insert": lambda: len(symbols) / len(TEXT) - 1,
        "replace": lambda: (symbols != TEXT).mean(),
        # Only letters have neighbours.
        "keyboard": lambda: (symbols != TEXT).sum() / (TEXT != 32).sum(),
        "word": lambda: np.mean([word == "aaa" for word in string(symbols).split()]),
        "case": lambda: (symbols != TEXT).sum() / (TEXT != 32).sum(),
        "whitespace": lambda: ((source < 0).sum() + len(set(range(len(TEXT))) - set(source.tolist()))) / len(TEXT),
    }[kind]()
    assert touched == pytest.approx(rate, rel=0.2)


@pytest.mark.parametrize("kind", KINDS)
def test_sources_name_where_symbols_came_from(kind):
    symbols, source = noisy(kind, 0.1)
    assert len(symbols) == len(source)
    kept = source >= 0
    assert len(set(source[kept])) == kept.sum()
    if kind in ("swap", "delete", "insert", "word", "whitespace"):
        assert (symbols[kept] == TEXT[source[kept]]).all()
    else:
        assert (source == np.arange(len(TEXT))).all()
    if kind != "swap":
        assert (np.diff(source[kept]) > 0).all()
    assert symbols.dtype == TEXT.dtype
    assert np.isin(symbols | 32 if kind == "case" else symbols, LETTERS.symbols).all()


@pytest.mark.parametrize("kind", KINDS)
def test_zero_changes_nothing_and_noise_repeats(kind):
    assert (noisy(kind, 0.0)[0] == TEXT).all()
    assert np.array_equal(noisy(kind, 0.1)[0], noisy(kind, 0.1)[0])
    assert not np.array_equal(noisy(kind, 0.1)[0], noisy(kind, 0.1, index=1)[0])
    assert not np.array_equal(noisy(kind, 0.1)[0], noisy(kind, 0.1, seed=1)[0])


def test_swapped_pairs_are_neighbours():
    _, source = noisy("swap", 0.2)
    moved = np.flatnonzero(source != np.arange(len(source)))
    assert (np.abs(source[moved] - moved) == 1).all()
    assert (source[source] == np.arange(len(source))).all()


def test_replacement_is_another_symbol_and_any_other():
    text = np.full(20_000, ord("e"), dtype=np.uint16)
    symbols, _ = noisy("replace", 1.0, text=text)
    assert set(symbols.tolist()) == set(LETTERS.symbols.tolist()) - {ord("e")}
    assert np.bincount(symbols)[LETTERS.symbols].max() < 1.3 * 20_000 / 26


def test_keyboard_neighbours_are_near_and_keep_their_case():
    text = np.array([ord("g"), ord("G"), ord(" "), ord("5"), 233] * 2000, dtype=np.uint16)
    symbols, _ = noisy("keyboard", 1.0, text=text)
    assert {chr(s) for s in symbols[0::5]} == set("ftyhbv")
    assert {chr(s) for s in symbols[1::5]} == set("FTYHBV")
    assert (symbols[2::5] == 32).all()
    assert (symbols[3::5] == ord("5")).all()
    assert (symbols[4::5] == 233).all()


def test_a_word_gives_way_to_the_constant_word_and_spaces_stay():
    text = points("  the fox,  jumped ")
    symbols, source = noisy("word", 1.0, text=text)
    assert string(symbols) == "  aaa aaa  aaa "
    assert source.tolist() == [0, 1, -1, -1, -1, 5, -1, -1, -1, 10, 11, -1, -1, -1, 18]
    assert string(noisy("word", 1.0, text=text, symbols=LETTERS._replace(word=points("xy")))[0]) == "  xy xy  xy "
    assert string(noisy("word", 1.0, text=points("no end"))[0]) == "aaa aaa"


def test_words_are_replaced_or_left_as_a_whole():
    before, (symbols, source) = string(TEXT).split(), noisy("word", 0.3)
    after = string(symbols).split()
    assert len(after) == len(before)
    assert {new for old, new in zip(before, after, strict=True) if new != old} == {"aaa"}
    assert (symbols == 32).sum() == (TEXT == 32).sum()
    # Sources are -1 in threes: a replaced word leaves none of its symbols.
    assert (source < 0).sum() == 3 * after.count("aaa")


def test_a_token_that_is_a_word_is_replaced_in_its_place():
    text = np.random.default_rng(0).integers(0, 60_000, 20_000).astype(np.uint32)
    symbols, source = noisy("word", 0.1, text=text, symbols=IDS)
    assert symbols.dtype == text.dtype
    assert (source == np.arange(len(text))).all()
    assert set(symbols[symbols != text].tolist()) == {69_999}
    assert (symbols != text).mean() == pytest.approx(0.1, rel=0.1)


def test_case_changes_of_ascii_letters_alone():
    text = "aZ @[`{ 5\u00e9\u00c9\u6f22\u0161"
    assert string(noisy("case", 1.0, text=points(text))[0]) == "Az @[`{ 5\u00e9\u00c9\u6f22\u0161"


def test_whitespace_drops_spaces_and_puts_them_before_other_symbols():
    symbols, source = noisy("whitespace", 1.0, text=points("ab c  d"))
    assert string(symbols) == " a b c d"
    assert source.tolist() == [-1, 0, -1, 1, -1, 3, -1, 6]
    symbols, source = noisy("whitespace", 0.2)
    assert (symbols[source < 0] == 32).all()
    assert (source[np.flatnonzero(source < 0) + 1] >= 0).all()
    assert (symbols[np.flatnonzero(source < 0) + 1] != 32).all()
    assert string(symbols).replace(" ", "") == string(TEXT).replace(" ", "")
    # Spaces are dropped as often as others are touched.
    assert 1 - np.isin(np.flatnonzero(TEXT == 32), source).mean() == pytest.approx(0.2, rel=0.2)


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_gets_the_noise_of_its_code_points(kind):
    text = "na\u00efve \u6f22\u5b57 \U0001f600 and the rest of it " * 20
    found = corrupt_text(text, kind, 0.1, LETTERS, rng_for(0, kind, 0.1, 0))
    assert found == string(noisy(kind, 0.1, text=points(text))[0])
    assert found != text
    assert corrupt_text(text, kind, 0.0, LETTERS, rng_for(0, kind, 0.0, 0)) == text


def test_bytes_that_are_no_text_pass():
    text = b"caf\xe9 au lait".decode("utf-8", "surrogateescape")
    assert corrupt_text(text, "case", 1.0, LETTERS, rng_for(0, "case", 1.0, 0)) == "CAF\udce9 AU LAIT"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", [" ", "   ", "a", "\u6f22", "\U0001f600", " a", "a ", "\n"])
def test_a_text_never_becomes_empty(kind, text):
    for rate in (0.0, 0.5, 1.0):
        symbols, source = noisy(kind, rate, text=points(text))
        assert len(symbols) == len(source) >= 1
        assert source.max() < len(text)


@pytest.mark.parametrize("kind", KINDS)
def test_a_million_symbols_take_no_loop(kind):
    text = np.resize(TEXT, 1_000_000)
    symbols, source = noisy(kind, 0.1, text=text)
    assert len(symbols) == len(source) > 800_000


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_text_is_refused(kind):
    with pytest.raises(Failure, match=f"corruption {kind}: the text is empty"):
        corrupt_text("", kind, 0.1, LETTERS, np.random.default_rng(0))


def test_bad_requests():
    with pytest.raises(UsageError, match=r"corruption 'swop' does not exist; there are: swap, delete.*did you mean swap"):
        noisy("swop", 0.1)
    for rate in (1.5, -0.1, float("nan"), float("inf")):
        with pytest.raises(UsageError, match=f"rate {rate} of corruption swap: expected 0 to 1"):
            noisy("swap", rate)
    with pytest.raises(UsageError, match="corruption whitespace needs characters"):
        noisy("whitespace", 0.1, text=np.arange(9), symbols=IDS)


def test_alphabets_of_views():
    assert string(alphabet("text27").symbols) == " abcdefghijklmnopqrstuvwxyz"
    assert string(alphabet("bytes").symbols) == string(range(32, 127))
    for view in ("text27", "bytes"):
        assert string(alphabet(view).word) == "aaa"
        assert alphabet(view).space == 32
