"""Noise on arrays of symbols (bytes, code points, or ids of words), each symbol traceable to its clean position.

Shapes: T clean symbols, T' noisy ones. `source` (T',) is the clean position of each noisy symbol, -1 for an inserted one.
No corruption makes a text empty.
"""

import hashlib
from typing import NamedTuple

import numpy as np

from pipeline.errors import Failure, UsageError, nearest

Noisy = tuple[np.ndarray, np.ndarray]


class Alphabet(NamedTuple):
    """What noise draws from: `symbols` to insert and replace with, the constant `word` of the word-swap attack.

    `space` is the symbol between words; None where every symbol is a word, of which `word` then is one.
    """

    symbols: np.ndarray
    word: np.ndarray
    space: int | None


_ROWS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")


def swap(symbols: np.ndarray, rate: float, alphabet: Alphabet, rng: np.random.Generator) -> Noisy:
    """Exchange neighbours: disjoint pairs, so that a share `rate` of the symbols moves."""
    source = np.arange(len(symbols))
    # Pairs on a random grid (even or odd starts) are disjoint without a loop.
    starts = np.arange(int(rng.integers(2)), len(symbols) - 1, 2)
    starts = starts[rng.random(len(starts)) < rate]
    source[starts], source[starts + 1] = starts + 1, starts
    return symbols[source], source


def delete(symbols: np.ndarray, rate: float, alphabet: Alphabet, rng: np.random.Generator) -> Noisy:
    """Drop each symbol with probability `rate`; if all would go, the first stays."""
    source = np.flatnonzero(rng.random(len(symbols)) >= rate)
    if not len(source):
        source = np.array([0])
    return symbols[source], source


def insert(symbols: np.ndarray, rate: float, alphabet: Alphabet, rng: np.random.Generator) -> Noisy:
    """Put a random symbol before each symbol with probability `rate`."""
    places = np.flatnonzero(rng.random(len(symbols)) < rate)
    source = np.insert(np.arange(len(symbols)), places, -1)
    return np.insert(symbols, places, rng.choice(alphabet.symbols, len(places))), source


def replace(symbols: np.ndarray, rate: float, alphabet: Alphabet, rng: np.random.Generator) -> Noisy:
    """Replace each symbol with probability `rate` by another one of the alphabet."""
    noisy = symbols.copy()
    places = np.flatnonzero(rng.random(len(symbols)) < rate)
    ordered = np.sort(alphabet.symbols)
    # The place of the old symbol in the alphabet, plus 1 to size-1 steps round it, is any other symbol alike.
    place = np.searchsorted(ordered, symbols[places]) % len(ordered)
    noisy[places] = ordered[(place + rng.integers(1, len(ordered), len(places))) % len(ordered)]
    return noisy, np.arange(len(symbols))


def keyboard(symbols: np.ndarray, rate: float, alphabet: Alphabet, rng: np.random.Generator) -> Noisy:
    """Replace each letter with probability `rate` by a neighbour on a QWERTY keyboard, in the same case."""
    noisy = symbols.copy()
    letters = np.flatnonzero(symbols < 128)
    letters = letters[_NEIGHBOUR_COUNT[symbols[letters]] > 0]
    places = letters[rng.random(len(letters)) < rate]
    pick = rng.integers(0, 1 << 30, len(places)) % _NEIGHBOUR_COUNT[symbols[places]]
    noisy[places] = _NEIGHBOURS[symbols[places], pick]
    return noisy, np.arange(len(symbols))


def word(symbols: np.ndarray, rate: float, alphabet: Alphabet, rng: np.random.Generator) -> Noisy:
    """The word-swap attack: put the constant word in the place of each word with probability `rate`; spaces stay."""
    if alphabet.space is None:
        hit = rng.random(len(symbols)) < rate
        return np.where(hit, alphabet.word[0], symbols).astype(symbols.dtype), np.arange(len(symbols))
    letter = symbols != alphabet.space
    first = letter & np.append(True, ~letter[:-1])
    starts = np.flatnonzero(first)
    hit = rng.random(len(starts)) < rate
    # The False is for a text without words.
    gone = letter & np.append(hit, False)[np.cumsum(first) - 1]
    return _put_before(symbols, np.flatnonzero(~gone), starts[hit], alphabet.word)


def case(symbols: np.ndarray, rate: float, alphabet: Alphabet, rng: np.random.Generator) -> Noisy:
    """Change the case of each ASCII letter with probability `rate`."""
    noisy = symbols.copy()
    lower = symbols | 32  # the bit in which the cases of a letter differ
    letters = np.flatnonzero((ord("a") <= lower) & (lower <= ord("z")))
    noisy[letters[rng.random(len(letters)) < rate]] ^= 32
    return noisy, np.arange(len(symbols))


def whitespace(symbols: np.ndarray, rate: float, alphabet: Alphabet, rng: np.random.Generator) -> Noisy:
    """Touch each symbol with probability `rate`: drop a space, put one before any other; of spaces alone the first stays."""
    if alphabet.space is None:
        raise UsageError("corruption whitespace needs characters, tokens are words here; drop it")
    space, touched = symbols == alphabet.space, rng.random(len(symbols)) < rate
    kept = np.flatnonzero(~(touched & space))
    if not len(kept):
        kept = np.array([0])
    return _put_before(symbols, kept, np.flatnonzero(touched & ~space), np.array([alphabet.space]))


def _put_before(symbols: np.ndarray, kept: np.ndarray, before: np.ndarray, put: np.ndarray) -> Noisy:
    """The symbols at the positions `kept`, and all of `put` where each position in `before` is or was."""
    places = np.repeat(np.searchsorted(kept, before), len(put))
    return np.insert(symbols[kept], places, np.tile(put, len(before))), np.insert(kept, places, -1)


KINDS = {kind.__name__: kind for kind in (swap, delete, insert, replace, keyboard, word, case, whitespace)}


def corrupt(symbols: np.ndarray, kind: str, rate: float, alphabet: Alphabet, rng: np.random.Generator) -> Noisy:
    """Noisy symbols (T',) and their source (T',) for a corruption by name at a rate in 0..1.

    Raises UsageError for another name or rate, Failure for a text of no symbols.
    """
    if kind not in KINDS:
        raise UsageError(f"corruption '{kind}' does not exist; there are: {', '.join(KINDS)}{nearest(kind, KINDS)}")
    if not 0 <= rate <= 1:
        raise UsageError(f"rate {rate} of corruption {kind}: expected 0 to 1")
    if not len(symbols):
        raise Failure(f"corruption {kind}: the text is empty; leave it out, or make it a space")
    return KINDS[kind](np.asarray(symbols), rate, alphabet, rng)


def corrupt_text(text: str, kind: str, rate: float, alphabet: Alphabet, rng: np.random.Generator) -> str:
    """A text with noise on its code points."""
    # Bytes that are no UTF-8 are lone surrogates in a text; they pass as any other code point.
    clean = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    return corrupt(clean, kind, rate, alphabet, rng)[0].tobytes().decode("utf-32-le", "surrogatepass")


def rng_for(seed: int, kind: str, rate: float, index: int) -> np.random.Generator:
    """The generator of one example: the same for every method, whatever was drawn before."""
    key = hashlib.sha256(f"{seed}:{kind}:{rate!r}:{index}".encode()).digest()[:16]
    return np.random.Generator(np.random.Philox(int.from_bytes(key, "little")))


def alphabet(view: str) -> Alphabet:
    """Of characters: a-z and space for `text27`, printable ASCII for `bytes`; the word is aaa."""
    symbols = np.array([32, *range(97, 123)] if view == "text27" else range(32, 127), dtype=np.uint16)
    return Alphabet(symbols, word=np.frombuffer(b"aaa", dtype=np.uint8), space=32)


def _neighbours() -> tuple[np.ndarray, np.ndarray]:
    """Up to 8 neighbours of every ASCII letter, and how many there are."""
    table, count = np.zeros((128, 8), dtype=np.uint16), np.zeros(128, dtype=np.int64)
    position = {letter: (row, column) for row, letters in enumerate(_ROWS) for column, letter in enumerate(letters)}
    for letter, (row, column) in position.items():
        for other, (other_row, other_column) in position.items():
            # Each row is shifted to the right by about half a key.
            across = (other_column + other_row / 2) - (column + row / 2)
            if other != letter and abs(other_row - row) <= 1 and abs(across) <= 1:
                for change in (str.lower, str.upper):
                    code = ord(change(letter))
                    table[code, count[code]] = ord(change(other))
                    count[code] += 1
    return table, count


_NEIGHBOURS, _NEIGHBOUR_COUNT = _neighbours()
