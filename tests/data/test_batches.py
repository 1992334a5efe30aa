import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from pipeline.data.batches import (
    Examples,
    document_numbers,
    encode_examples,
    example_batch,
    open_documents,
    open_tokens,
    padded,
    rows,
    segment_starts,
    segments,
    spaced,
    stream_batch,
    token_batch,
    write_tokens,
)
from pipeline.data.tasks import Example
from pipeline.data.tokenizers import Tokenizer
from pipeline.errors import Failure


def test_tokens_are_written_as_they_come_and_mapped_not_loaded(tmp_path):
    assert write_tokens(tmp_path / "t.npy", (np.arange(first, first + 100) for first in range(0, 1000, 100))) == 1000
    np.save(tmp_path / "whole.npy", np.arange(1000, dtype=np.uint16))
    assert (tmp_path / "t.npy").read_bytes() == (tmp_path / "whole.npy").read_bytes()
    tokens = open_tokens(tmp_path / "t.npy")
    assert isinstance(tokens, np.memmap)
    assert tokens[999] == 999
    assert tokens.dtype == np.uint16


def test_ids_of_a_large_vocabulary_have_room(tmp_path):
    for largest, dtype in ((65535, np.uint16), (65536, np.uint32)):
        write_tokens(tmp_path / "t.npy", [np.array([0, largest])], dtype)
        tokens = open_tokens(tmp_path / "t.npy", vocabulary=largest + 1)
        assert tokens.dtype == dtype
        assert tokens.tolist() == [0, largest]
        with pytest.raises(Failure, match=rf"t\.npy: holds the id {largest}, the tokenizer has {largest}; run `vqmoe prepare`"):
            open_tokens(tmp_path / "t.npy", vocabulary=largest)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-5]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"something else"),
        lambda path: np.save(path, np.zeros((2, 2))),
        lambda path: np.save(path, np.zeros(5, dtype=np.int64)),
        lambda path: path.unlink(),
    ],
)
def test_damaged_token_files(tmp_path, damage):
    path = tmp_path / "t.npy"
    write_tokens(path, [np.arange(1000)])
    damage(path)
    with pytest.raises(Failure, match=r"t\.npy: .*run `vqmoe prepare`") as caught:
        open_tokens(path)
    assert "\n" not in str(caught.value)


def test_a_batch_depends_on_seed_and_step_only():
    tokens = np.arange(500, dtype=np.uint16)
    one = token_batch(tokens, 4, 16, seed=0, step=3)
    assert torch.equal(one, token_batch(tokens, 4, 16, seed=0, step=3))
    assert not torch.equal(one, token_batch(tokens, 4, 16, seed=0, step=4))
    assert not torch.equal(one, token_batch(tokens, 4, 16, seed=1, step=3))
    assert one.shape == (4, 17)
    assert (one[:, 1:] - one[:, :-1] == 1).all()


def test_every_start_can_be_drawn():
    starts = {int(row[0]) for step in range(40) for row in token_batch(np.arange(20, dtype=np.uint16), 16, 10, 0, step)}
    assert starts == set(range(10))


@pytest.mark.parametrize(("size", "batch", "context"), [(97, 4, 8), (98, 4, 8), (24, 7, 9), (40, 1, 8)])
def test_streams_predict_every_token_but_the_first_once_per_epoch(size, batch, context):
    tokens = np.arange(size, dtype=np.uint16)
    count = math.ceil(math.ceil((size - 1) / batch) / context)
    walk = [stream_batch(tokens, batch, context, seed=3, step=step) for step in range(1, 1 + 2 * count)]
    for epoch in (walk[:count], walk[count:]):
        targets = torch.cat([segment_BT[:, 1:].flatten() for segment_BT, _ in epoch])
        assert sorted(targets[targets >= 0].tolist()) == list(range(1, size))
        assert sum(first for _, first in epoch) == 1
    for (before_BT, _), (after_BT, first) in pairwise(walk):
        if first:
            # Round to the start of every stream: the text's, and where the stream before ends.
            assert after_BT[:, 0].tolist() == [0, *before_BT[:-1, -1].tolist()]
        else:
            assert torch.equal(before_BT[:, -1], after_BT[:, 0])
        run = (after_BT[:, 1:] >= 0) & (after_BT[:, :-1] >= 0)
        assert ((after_BT[:, 1:] - after_BT[:, :-1])[run] == 1).all()


def test_a_stream_depends_on_seed_and_step_only():
    tokens = np.arange(1000, dtype=np.uint16)
    one, first = stream_batch(tokens, 2, 10, seed=0, step=7)
    again, _ = stream_batch(tokens, 2, 10, seed=0, step=7)
    assert torch.equal(one, again)
    assert not first
    starts = {int(stream_batch(tokens, 2, 10, seed, step=1)[0][0, 0]) for seed in range(8)}
    assert len(starts) > 4
    with pytest.raises(Failure, match="a split has 20 tokens, one segment needs 21"):
        stream_batch(tokens[:20], 2, 20, 0, 1)


def test_rows_predict_every_token_but_the_first_once():
    whole = rows(np.arange(18, dtype=np.uint16), 4)
    assert whole.tolist() == [list(range(0, 6)), list(range(5, 11)), list(range(10, 16)), [15, 16, 17, -1, -1, -1]]
    assert rows(np.arange(18), 4, limit=8).tolist() == [[0, 1, 2], [5, 6, 7], [10, 11, 12], [15, 16, 17]]
    assert rows(np.arange(18), 4, limit=1000).tolist() == whole.tolist()
    with pytest.raises(Failure, match="a split has 1 tokens, one segment needs 2"):
        rows(np.arange(1), 4)


def test_no_row_is_without_a_token_to_predict():
    assert rows(np.arange(50), 8)[:, [0, -1]].tolist() == [[7 * row, 7 * row + 7] for row in range(7)]
    for size in range(2, 80):
        for limit in (None, 20):
            assert (rows(np.arange(size), 8, limit)[:, 1] >= 0).all()
        targets = rows(np.arange(size), 8)[:, 1:]
        assert targets[targets >= 0].tolist() == list(range(1, size))


def test_segments_predict_every_token_but_the_first_once():
    tokens = np.arange(101)
    parts = segments(tokens, 20)
    assert np.concatenate(parts[:, 1:]).tolist() == list(range(1, 101))
    few = segments(tokens, 20, limit=2)
    assert few[:, 0].tolist() == [0, 80]
    with pytest.raises(Failure, match="a split has 20 tokens, one segment needs 21"):
        segments(tokens[:20], 20)


def test_a_segment_has_the_number_of_the_document_it_begins_in():
    documents, tokens = np.array([0, 3, 40, 41, 80]), np.arange(101)
    for context, limit in ((20, None), (7, None), (7, 5)):
        starts = segment_starts(tokens, context, limit)
        assert starts.tolist() == segments(tokens, context, limit)[:, 0].tolist()
        naive = [max(number for number, first in enumerate(documents) if first <= start) for start in starts]
        assert document_numbers(documents, starts).tolist() == naive


@pytest.mark.parametrize("damaged", [b"", b"no", np.ones(3), np.array([1, 2]), np.array([], dtype=np.int64), np.array([[0]])])
def test_damaged_places_of_documents(tmp_path, damaged):
    path = tmp_path / "t.documents.npy"
    with pytest.raises(Failure, match=r"t\.documents\.npy: not found; run `vqmoe prepare`"):
        open_documents(path)
    path.write_bytes(damaged) if isinstance(damaged, bytes) else np.save(path, damaged)
    with pytest.raises(Failure, match=r"t\.documents\.npy: .*; run `vqmoe prepare` again$"):
        open_documents(path)


def test_examples_are_cut_viewed_and_shuffled_in_epochs():
    examples = encode_examples([Example("ABC 1", "x"), Example("!!!", "y")], ["x", "y"], Tokenizer.bytes(), "text27", 5)
    assert [bytes(ids.tolist()).decode() for ids in examples.ids] == ["abc o", " "]
    assert examples.labels.tolist() == [0, 1]
    words = Tokenizer.from_vocabulary(["abc"])
    examples = encode_examples([Example("abc new", "x"), Example(" ", "y")], ["x", "y"], words, "bytes", 5)
    assert [ids.tolist() for ids in examples.ids] == [[2, 1], [0]]
    many = Examples([np.array([i]) for i in range(10)], np.arange(10))
    epochs = [[int(i) for step in range(first, first + 5) for i in example_batch(many, 2, 8, 0, step)[1]] for first in (1, 6)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(10))
    assert epochs[0] != epochs[1]
    # A batch across the border of two epochs has the end of one and the start of the next.
    order = [int(i) for step in (1, 2, 3) for i in example_batch(many, 4, 8, 0, step)[1]]
    assert order[:10] == epochs[0]
    assert order[10:] == epochs[1][:2]


def test_crops_start_anywhere_and_depend_on_seed_and_step_only():
    examples = Examples([np.arange(10), np.arange(3)], np.array([0, 1]))
    starts = set()
    for step in range(1, 60):
        ids, labels = example_batch(examples, 2, 4, 0, step)
        again, _ = example_batch(examples, 2, 4, 0, step)
        for crop, same, label in zip(ids, again, labels, strict=True):
            assert crop.tolist() == same.tolist()
            assert crop.tolist() == list(range(crop[0], crop[0] + (3 if label else 4)))
            starts.add((int(label), int(crop[0])))
    assert starts == {*((0, start) for start in range(7)), (1, 0)}


def test_spaced_examples_reach_both_ends_without_repeats():
    many = [Example(str(i), "x") for i in range(10)]
    assert [example.text for example in spaced(many, 4)] == ["0", "3", "6", "9"]
    assert spaced(many, 50) == many


def test_padding_is_on_the_right():
    tokens_BT, lengths_B = padded([np.array([1, 2, 3]), np.array([4])], 9)
    assert tokens_BT.tolist() == [[1, 2, 3], [4, 9, 9]]
    assert lengths_B.tolist() == [3, 1]


@pytest.mark.parametrize("part", [slice(0, 2), slice(2, 6)])
def test_a_part_of_a_batch_is_these_rows_of_it(part):
    tokens = np.arange(500, dtype=np.uint16)
    assert torch.equal(token_batch(tokens, 6, 10, 1, 3, part), token_batch(tokens, 6, 10, 1, 3)[part])
    assert torch.equal(stream_batch(tokens, 6, 10, 1, 3, part)[0], stream_batch(tokens, 6, 10, 1, 3)[0][part])
    examples = Examples([np.arange(i, i + 20) for i in range(9)], np.arange(9))
    (ids, labels), (all_ids, all_labels) = example_batch(examples, 6, 8, 1, 3, part), example_batch(examples, 6, 8, 1, 3)
    assert torch.equal(labels, all_labels[part])
    assert [one.tolist() for one in ids] == [one.tolist() for one in all_ids[part]]
