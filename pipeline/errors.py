"""The two ways a run ends badly for a reason its user can mend; the command line prints each as one line."""

import difflib
import os
from collections.abc import Iterable


def printable(text: str) -> str:
    """A text on one line, whatever is in it: what is not printable is written as in Python."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


class _OneLine(Exception):
    """What a message quotes may hold anything."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class UsageError(_OneLine):
    """What was asked for is wrong (params, names, options). The command exits with code 2."""

    exit_code = 2


class Failure(_OneLine):
    """What was asked for could not be done (data, files, servers). The command exits with code 1."""

    exit_code = 1


def nearest(name: str, known: Iterable[str], folder: str = "") -> str:
    """" (did you mean X?)" for the end of a message, where one of the known names is like the wrong one, else ""; in `folder`."""
    close = difflib.get_close_matches(name, list(map(str, known)), n=1)
    return f" (did you mean {os.path.join(folder, close[0])}?)" if close else ""
