import pickle

import pytest

from pipeline.errors import Failure, UsageError, nearest, printable


@pytest.mark.parametrize("kind", [UsageError, Failure])
def test_a_message_is_one_line_whatever_it_quotes(kind):
    said = str(kind("file 'a\nb\x0b\u2028\ud800' of Zoë: not found"))
    assert said == r"file 'a\nb\x0b\u2028\ud800' of Zoë: not found"
    assert str(pickle.loads(pickle.dumps(kind("a\nb")))) == r"a\nb"


def test_what_is_not_printable_is_written_as_in_python():
    assert printable("caf\u00e9\t\x1b[1m\nb") == "caf\u00e9" + r"\t\x1b[1m\nb"


def test_the_nearest_name_is_suggested_and_none_where_none_is_near():
    assert nearest("smeo", ["vqmoe", "smoe", "dense"]) == " (did you mean smoe?)"
    assert nearest("transformer", ["vqmoe", "smoe"]) == nearest("smoe", []) == ""
