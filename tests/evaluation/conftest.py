"""A made-up grid, read once: three methods, three seeds, two tasks."""

import pytest

from stages.report import read
from tests.stages import made_up


@pytest.fixture(scope="session")
def grid(tmp_path_factory):
    params = made_up.params()
    return read(params, made_up.write(tmp_path_factory.mktemp("grid"), params))
