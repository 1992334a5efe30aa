"""What the README claims: its table is the report's, its tree is the repository's, its code works."""

import re
import subprocess

from click.testing import CliRunner

import cli
from pipeline.data.corpora import load_corpus
from pipeline.data.tasks import load_task, write_task
from tests.conftest import REPOSITORY

README = (REPOSITORY / "README.md").read_text()


def _git(*arguments):
    return subprocess.run(["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout


def _rows(text):
    return [line for line in text.splitlines() if line.startswith("|")]


def test_the_table_is_the_reports():
    # As staged or committed: a run of one's own may have written another into the working tree.
    report = _git("show", ":report/report.md")
    assert _rows(report)
    for row in _rows(report):
        assert row in README


def test_the_tree_names_every_file_and_no_other():
    tracked = _git("ls-files").split()
    (tree,) = re.findall(r"## The tree\n\n```\n(.*?)```", README, re.S)
    named = {line.split()[0] for line in tree.splitlines() if line.strip()}
    # Tests mirror the packages and results are the runs': their folders stand for their files.
    folders = {name for name in named if name.endswith("/")}
    files = {path for path in tracked if not any(path.startswith(folder) for folder in folders)}
    files = {path for path in files if (REPOSITORY / path).exists() and (REPOSITORY / path).stat().st_size}
    assert named - folders == files
    assert all((REPOSITORY / folder).is_dir() for folder in folders)


def test_the_models_of_the_example_are_used(served):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    for folder, kind in (("outputs/pretrain/vqmoe-s0", "language-model"), ("outputs/finetune/vqmoe-s0/era", "classifier")):
        assert code.count(folder) == 1
        code = code.replace(folder, str(served(kind)))
    *before, generate, classify = code.strip().splitlines()
    used: dict = {}
    exec("\n".join(before), used)
    assert len(eval(generate, used)) > 20
    assert eval(classify, used).shape == (1, 2)


def test_the_example_of_own_data_prints_that(tmp_path, monkeypatch):
    pattern = r"## Your own data\n\n```\nmake setup.*?\n(.*?)\n(.*?)\n```.*?```\n(.*?)```"
    copy, command, output = re.search(pattern, README, re.S).groups()
    _, source, target, *_ = copy.split()
    assert source == "outputs/data/tasks/era/examples.jsonl"
    (tmp_path / "dvc.yaml").touch()
    write_task(tmp_path / "era", load_task("era", load_corpus("sotu", REPOSITORY), REPOSITORY, 480))
    (tmp_path / target).parent.mkdir()
    (tmp_path / "era/examples.jsonl").rename(tmp_path / target)
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(cli.main, command.split()[1:])
    assert (done.exit_code, done.stdout) == (0, output)
