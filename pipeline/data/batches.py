"""Token files and batches. A batch is a pure function of (seed, step): the same for every method, and nothing to resume.

With a `part`, only these rows of it.

Shapes: S segments, B batch, R rows, T positions.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipeline.data.corpora import view
from pipeline.data.tasks import Example
from pipeline.data.tokenizers import Tokenizer
from pipeline.errors import Failure

ALL = slice(None)


@dataclass(frozen=True)
class Examples:
    """Token ids of each example (uint16 or uint32) and label indices (int64)."""

    ids: list[np.ndarray]
    labels: np.ndarray


def write_tokens(path: Path, chunks: Iterable[np.ndarray], dtype: type[np.unsignedinteger] = np.uint16) -> int:
    """Write ids that come in chunks as one array of a tokenizer's type, into a folder that is not final yet; their number."""
    count, header = 0, {"descr": np.dtype(dtype).str, "fortran_order": False}
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, header | {"shape": (0,)})
        for ids in chunks:
            file.write(ids.astype(dtype, copy=False).tobytes())
            count += len(ids)
        # A header of one dimension is as long for any number: numpy leaves room for arrays that grow.
        file.seek(0)
        np.lib.format.write_array_header_1_0(file, header | {"shape": (count,)})
    return count


def open_tokens(path: Path, vocabulary: int | None = None) -> np.ndarray:
    """A token file, mapped into memory: only what is read is loaded.

    With the size of the vocabulary, every id is checked against it: one pass over the file, no memory.
    """
    try:
        tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise Failure(f"{path}: not found; run `vqmoe prepare`") from None
    except (OSError, ValueError, EOFError) as error:
        raise Failure(f"{path}: truncated or no token file ({error}); run `vqmoe prepare` again") from None
    if tokens.ndim != 1 or tokens.dtype not in (np.uint16, np.uint32):
        raise Failure(
            f"{path}: holds {tokens.dtype} of shape {tokens.shape}, expected tokens (uint16 or uint32); run `vqmoe prepare` again"
        )
    if vocabulary is not None and (largest := tokens.max(initial=0)) >= vocabulary:
        raise Failure(f"{path}: holds the id {largest}, the tokenizer has {vocabulary}; run `vqmoe prepare` again")
    return tokens


def open_documents(path: Path) -> np.ndarray:
    """The places (int64) of the first tokens of the documents of a token file."""
    try:
        documents = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise Failure(f"{path}: not found; run `vqmoe prepare`") from None
    except (OSError, ValueError, EOFError) as error:
        raise Failure(f"{path}: cannot be read ({error}); run `vqmoe prepare` again") from None
    if documents.ndim != 1 or documents.dtype != np.int64 or documents[:1].tolist() != [0]:
        raise Failure(f"{path}: holds no places of documents; run `vqmoe prepare` again")
    return documents


def token_batch(tokens: np.ndarray, batch: int, context: int, seed: int, step: int, part: slice = ALL) -> Tensor:
    """Random segments (B, context + 1)."""
    _check_length(tokens, context)
    starts = generator(seed, step).integers(0, len(tokens) - context, batch)[part]
    return torch.from_numpy(np.stack([tokens[start : start + context + 1] for start in starts]).astype(np.int64))


def stream_batch(tokens: np.ndarray, batch: int, context: int, seed: int, step: int, part: slice = ALL) -> tuple[Tensor, bool]:
    """The segment (B, at most context + 1) of `step` (from 1) of B streams, and whether it is their first.

    Each stream is a stretch of the text of its own; all walk through theirs side by side and round and round, from a place that
    the seed decides. As in `segments`, neighbours share a token; a stream's last segment may be shorter than the others.
    """
    _check_length(tokens, context)
    length = _row_length(tokens, batch)
    count = -(-length // context)
    place = (int(generator(seed, 0, stream=3).integers(count)) + step - 1) % count
    first = place * context
    return torch.from_numpy(_rows(tokens, batch, first, min(context, length - first))[part]), place == 0


def rows(tokens: np.ndarray, count: int, limit: int | None = None) -> np.ndarray:
    """The text as `count` rows (R, T + 1) to be read in order, each token but the text's first predicted once.

    Fewer rows where a short text would leave some without a token to predict. With `limit`, at most about that many tokens: the
    start of each row.
    """
    _check_length(tokens, 1)
    length = _row_length(tokens, count)
    filled = -(-(len(tokens) - 1) // length)
    return _rows(tokens, filled, 0, length if limit is None else min(length, max(1, limit // count)))


def segments(tokens: np.ndarray, context: int, limit: int | None = None) -> np.ndarray:
    """Consecutive segments (S, context + 1) for scoring; neighbours share a token, so each is predicted once.

    With `limit`, at most that many, evenly spaced.
    """
    return np.stack([tokens[start : start + context + 1] for start in segment_starts(tokens, context, limit)])


def segment_starts(tokens: np.ndarray, context: int, limit: int | None = None) -> np.ndarray:
    """The places (S,) at which `segments` begin."""
    _check_length(tokens, context)
    starts_S = np.arange(0, len(tokens) - context, context)
    if limit is not None and limit < len(starts_S):
        starts_S = starts_S[np.linspace(0, len(starts_S) - 1, limit).astype(int)]
    return starts_S


def document_numbers(documents: np.ndarray, starts_S: np.ndarray) -> np.ndarray:
    """The number (S,) of the document that each segment begins in, of documents by the places of their first tokens."""
    return documents.searchsorted(starts_S, side="right") - 1


def evenly(count: int, limit: int) -> np.ndarray:
    """At most `limit` of the numbers under `count`, evenly spaced."""
    return np.unique(np.linspace(0, count - 1, limit).astype(int))


def spaced(examples: Sequence[Example], limit: int) -> list[Example]:
    """At most `limit` examples, evenly spaced over all."""
    return [examples[i] for i in evenly(len(examples), limit)]


def encode_examples(
    examples: Sequence[Example], labels: Sequence[str], tokenizer: Tokenizer, view_name: str, length: int | None = None
) -> Examples:
    """Each text in a view, whole or its first `length` tokens; a text the view leaves empty keeps one (a space, or <eos>)."""
    index = {label: i for i, label in enumerate(labels)}
    ids = [tokenizer.encode_some(view(example.text, view_name))[:length] for example in examples]
    return Examples(ids, np.array([index[example.label] for example in examples], dtype=np.int64))


def shuffled(count: int, batch: int, seed: int, step: int) -> list[int]:
    """Which of `count` examples (B) the batch of `step` (from 1) has, going through all of them in shuffled epochs."""
    chosen: list[int] = []
    for position in range((step - 1) * batch, step * batch):
        epoch, place = divmod(position, count)
        chosen.append(int(_order(count, seed, epoch)[place]))
    return chosen


def example_batch(
    examples: Examples, batch: int, crop: int, seed: int, step: int, part: slice = ALL
) -> tuple[list[np.ndarray], Tensor]:
    """Ids and labels (B,) of the batch of `step` (from 1), going through the examples in shuffled epochs.

    Of an example longer than `crop` tokens a stretch of that length from a random place.
    """
    chosen = shuffled(len(examples.ids), batch, seed, step)
    ids = [examples.ids[i] for i in chosen]
    starts = generator(seed, step, stream=2).integers(0, [max(1, len(sequence) - crop + 1) for sequence in ids])
    crops = [sequence[start : start + crop] for sequence, start in zip(ids[part], starts[part], strict=True)]
    return crops, torch.from_numpy(examples.labels[chosen[part]])


def generator(seed: int, index: int, stream: int = 0) -> np.random.Generator:
    """Random numbers that depend on these three only; each use has a stream of its own."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, stream, index))))


def padded(ids: Sequence[np.ndarray], pad: int) -> tuple[Tensor, Tensor]:
    """Tokens (B, T) padded on the right, and lengths (B,).

    Under causal attention a token never sees what is right of it, so this equals padding on the left with a mask,
    and the positions are those of pre-training.
    """
    tokens = np.full((len(ids), max(map(len, ids))), pad, dtype=np.int64)
    for row, sequence in enumerate(ids):
        tokens[row, : len(sequence)] = sequence
    return torch.from_numpy(tokens), torch.tensor([len(sequence) for sequence in ids])


# The order of a million images takes as long as a tenth of a step; two, since a batch may reach into the next epoch.
@lru_cache(maxsize=2)
def _order(count: int, seed: int, epoch: int) -> np.ndarray:
    return generator(seed, epoch, stream=1).permutation(count)


def _row_length(tokens: np.ndarray, count: int) -> int:
    """Tokens that each of `count` rows predicts; the last row may end early."""
    return -(-(len(tokens) - 1) // count)


def _rows(tokens: np.ndarray, count: int, first: int, length: int) -> np.ndarray:
    """Of each row of the text the tokens from `first` on (R, length + 1), -1 beyond the text's end."""
    place = first + np.arange(count)[:, None] * _row_length(tokens, count) + np.arange(length + 1)
    return np.where(place < len(tokens), tokens[np.minimum(place, len(tokens) - 1)].astype(np.int64), -1)


def _check_length(tokens: np.ndarray, context: int) -> None:
    if len(tokens) < context + 1:
        raise Failure(
            f"a split has {len(tokens)} tokens, one segment needs {context + 1}; give it more text or "
            "lower model.context and model.evaluate_context"
        )
