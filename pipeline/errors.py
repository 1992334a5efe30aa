"""The two ways a run ends badly for a reason its user can mend; the command line prints each as one line."""


class _OneLine(Exception):
    """What a message quotes may hold anything; what is not printable is written as in Python."""

    def __init__(self, message: str) -> None:
        super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in message))


class UsageError(_OneLine):
    """What was asked for is wrong (params, names, options). The command exits with code 2."""

    exit_code = 2


class Failure(_OneLine):
    """What was asked for could not be done (data, files, servers). The command exits with code 1."""

    exit_code = 1
