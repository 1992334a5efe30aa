"""What the pages of docs/how-to say is done as they say it, each in a copy of the repository.

Files are written, diffs applied and commands run in the order of the page; what a page shows as printed has to be printed.
"""

import re
import shutil
import subprocess

import pytest

from tests.conftest import REPOSITORY
from tests.stages.repository import git, start

PAGES = {path.stem: path.read_text() for path in sorted((REPOSITORY / "docs/how-to").glob("*.md")) if path.stem != "README"}
# The name of a file, the language and the text of a block.
BLOCK = re.compile(r"(?:^`([^`\n]+)`:\n\n)?^```(\w+)\n(.*?)^```$", re.M | re.S)


@pytest.fixture
def copy(tmp_path):
    for name in git(REPOSITORY, "ls-files", "-co", "--exclude-standard").splitlines():
        if (REPOSITORY / name).is_file():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPOSITORY / name, tmp_path / name)
    git(tmp_path, "init")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "first")
    return tmp_path


@pytest.fixture(scope="module")
def run(tmp_path_factory, warm):
    """A function from a folder and a line of a shell to what it prints; fails as the command does.

    All runs are recorded in one store, since to make its tables takes MLflow some seconds.
    """
    store = f"sqlite:///{tmp_path_factory.mktemp('runs')}/mlflow.db"

    def run_line(folder, line):
        process = start(folder, "bash", "-ec", line, warm=warm, MLFLOW_TRACKING_URI=store)
        printed = process.communicate()[0]
        assert process.returncode == 0, printed
        return printed

    return run_line


def change(folder, file, kind, text):
    """Write a file, or apply a diff."""
    if kind == "python":
        assert not (folder / file).exists(), file
        (folder / file).write_text(text)
    elif kind == "diff":
        subprocess.run(["git", "apply"], cwd=folder, input=text, text=True, check=True)


@pytest.mark.parametrize("page", PAGES)
def test_the_page_works_as_printed(copy, run, page):
    printed, kinds = "", set()
    for file, kind, text in BLOCK.findall(PAGES[page]):
        kinds.add(kind)
        change(copy, file, kind, text)
        if kind == "sh":
            printed = "".join(run(copy, line) for line in text.splitlines())
        elif kind == "text":
            for part in re.split(r"\n| \.\.\. ", text):
                assert part in printed, printed
    assert {"python", "diff", "sh", "text"} - kinds <= {"python"}


def test_the_pages_do_not_get_in_each_others_way_and_obey_the_linters(copy):
    for text in PAGES.values():
        for block in BLOCK.findall(text):
            change(copy, *block)
    for command in (["ruff", "check", "."], ["lint-imports"]):
        process = start(copy, *command)
        assert process.communicate()[0] and not process.returncode
