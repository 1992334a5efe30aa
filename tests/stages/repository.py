"""A small git and DVC repository with the project's own code and a tiny experiment, for what runs in processes of its own."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from pipeline import config
from pipeline.moe.layer import SETTINGS
from tests.conftest import REPOSITORY, TINY, write_corpus, write_task

CODE = ("cli.py", "pipeline", "stages", "dvc.yaml", ".gitignore", ".dvc", ".dvcignore")
QUICK = ("model.layers=1", "robustness.kinds=[swap]", "robustness.rates=[0.1]", "finetune.scratch=false")
DATA = ("data.corpus=data/corpus", "data.tasks={toy: data/task.csv}", "data.shifts={}")


def git(root, *arguments):
    command = ["git", "-c", "user.name=t", "-c", "user.email=t@t", *arguments]
    return subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout


def make(root, *overrides):
    """Code and params committed, data that git does not know."""
    for name in git(REPOSITORY, "ls-files", "-co", "--exclude-standard", "--", *CODE).splitlines():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / name, root / name)
    set_params(root, *overrides)
    git(root, "init")
    git(root, "add", ".")
    git(root, "commit", "-m", "first")
    write_corpus(root / "data/corpus")
    write_task(root / "data/task.csv")
    return root


def set_params(root, *overrides):
    params = config.load(REPOSITORY / "params.yaml", SETTINGS, (*TINY, *QUICK, *DATA, *overrides))
    (root / "params.yaml").write_text(config.dump(params))


def start(root, *command, warm="", **environment):
    """A command of this installation in the repository, as a process group with one thread each; what it prints is one text.

    `warm` is the folder of the fixture of that name, if `vqmoe` and `python` may be those.
    """
    path = f"{warm}:{Path(sys.executable).parent}:{os.environ['PATH']}".strip(":")
    return subprocess.Popen(
        command,
        cwd=root,
        env=os.environ | {"PATH": path, "PYTHONPATH": ".", "OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
