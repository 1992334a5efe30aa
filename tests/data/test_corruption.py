from typing import get_args

import numpy as np
import pytest

from pipeline import config
from pipeline.data.corruption import KINDS, alphabet, corrupt, corrupt_text, rng_for
from pipeline.errors import UsageError

TEXT = np.frombuffer(b"the quick brown fox jumps over the lazy dog " * 200, dtype=np.uint8).astype(np.uint16)
LETTERS = alphabet("text27")


def noisy(kind, rate, index=0, seed=0, text=TEXT):
    return corrupt(text, kind, rate, LETTERS, rng_for(seed, kind, rate, index))


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
    }[kind]()
    assert touched == pytest.approx(rate, rel=0.2)


@pytest.mark.parametrize("kind", KINDS)
def test_sources_name_where_symbols_came_from(kind):
    symbols, source = noisy(kind, 0.1)
    assert len(symbols) == len(source)
    kept = source >= 0
    assert len(set(source[kept])) == kept.sum()
    if kind in ("swap", "delete", "insert"):
        assert (symbols[kept] == TEXT[source[kept]]).all()
    else:
        assert (source == np.arange(len(TEXT))).all()
    if kind in ("delete", "insert"):
        assert (np.diff(source[kept]) > 0).all()
    assert np.isin(symbols, LETTERS).all()


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
    assert set(symbols.tolist()) == set(LETTERS.tolist()) - {ord("e")}
    assert np.bincount(symbols)[LETTERS].max() < 1.3 * 20_000 / 26


def test_keyboard_neighbours_are_near_and_keep_their_case():
    text = np.array([ord("g"), ord("G"), ord(" "), ord("5"), 233] * 2000, dtype=np.uint16)
    symbols, _ = noisy("keyboard", 1.0, text=text)
    assert {chr(s) for s in symbols[0::5]} == set("ftyhbv")
    assert {chr(s) for s in symbols[1::5]} == set("FTYHBV")
    assert (symbols[2::5] == 32).all()
    assert (symbols[3::5] == ord("5")).all()
    assert (symbols[4::5] == 233).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_gets_the_noise_of_its_code_points(kind):
    text = "na\u00efve \u6f22\u5b57 \U0001f600 and the rest of it " * 20
    points, _ = noisy(kind, 0.1, text=np.array([ord(character) for character in text]))
    found = corrupt_text(text, kind, 0.1, LETTERS, rng_for(0, kind, 0.1, 0))
    assert found == "".join(map(chr, points))
    assert found != text
    assert corrupt_text(text, kind, 0.0, LETTERS, rng_for(0, kind, 0.0, 0)) == text


def test_a_text_never_becomes_empty():
    for kind in KINDS:
        symbols, source = noisy(kind, 1.0, text=TEXT[:1])
        assert len(symbols) == len(source) >= 1


def test_bad_requests():
    with pytest.raises(UsageError, match="corruption 'swop' does not exist; there are: swap, delete"):
        corrupt(TEXT, "swop", 0.1, LETTERS, np.random.default_rng(0))
    with pytest.raises(UsageError, match=r"rate 1\.5 of corruption swap"):
        corrupt(TEXT, "swap", 1.5, LETTERS, np.random.default_rng(0))
