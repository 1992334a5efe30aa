"""The two ways a run ends badly for a reason its user can mend; the command line prints each as one line."""


class UsageError(Exception):
    """What was asked for is wrong (params, names, options). The command exits with code 2."""

    exit_code = 2


class Failure(Exception):
    """What was asked for could not be done (data, files, servers). The command exits with code 1."""

    exit_code = 1
