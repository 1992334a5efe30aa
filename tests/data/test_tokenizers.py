import numpy as np
import pytest
import tokenizers

from pipeline.data.tokenizers import Tokenizer
from pipeline.errors import Failure

TEXT = "In 1790: naïve “quotes” — and\ttabs\n\x02 control, 漢字 \U0001f600 end  "


def test_ids_are_what_the_saved_tokenizer_gives(tmp_path):
    Tokenizer.bytes().save(tmp_path / "tokenizer.json")
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    ours = Tokenizer.load(tmp_path / "tokenizer.json")
    everything = TEXT + "".join(map(chr, range(1, 0x250)))
    assert ours.encode(everything).tolist() == theirs.encode(everything).ids == list(everything.encode())
    assert ours.decode(ours.encode(everything)) == everything
    assert (ours.size, ours.pad) == (257, 256)
    assert ours.decode(np.array([72, 256, 105])) == "Hi"
    assert ours.encode("\udce6\udcbc").tolist() == [0xE6, 0xBC]  # what is left of a character that a corpus is cut in


@pytest.mark.parametrize("content", [None, b"", b"{", b'{"version": "1.0"}'])
def test_missing_or_damaged(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(Failure, match="no usable tokenizer") as caught:
        Tokenizer.load(path)
    assert "\n" not in str(caught.value)


def test_another_vocabulary_is_refused(tmp_path):
    path = tmp_path / "tokenizer.json"
    tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"a": 0}, merges=[])).save(str(path))
    with pytest.raises(Failure, match="another vocabulary"):
        Tokenizer.load(path)
