import pickle

import pytest

from pipeline.errors import Failure, UsageError


@pytest.mark.parametrize("kind", [UsageError, Failure])
def test_a_message_is_one_line_whatever_it_quotes(kind):
    said = str(kind("file 'a\nb\x0b\u2028\ud800' of Zoë: not found"))
    assert said == r"file 'a\nb\x0b\u2028\ud800' of Zoë: not found"
    assert str(pickle.loads(pickle.dumps(kind("a\nb")))) == r"a\nb"
