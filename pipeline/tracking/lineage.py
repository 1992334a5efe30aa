"""Where a run came from: commit, changes, versions, digests."""

import os
import platform
import subprocess
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pipeline.files import digest

PACKAGES = ("torch", "numpy", "tokenizers", "scikit-learn", "mlflow", "dvc")
DIFF_LIMIT = 1_000_000
# What stages themselves write changes with every run and is no change of the source.
SOURCES = (".", ":(exclude)results", ":(exclude)report", ":(exclude)dvc.lock")


def git(root: Path, *arguments: str) -> str:
    """Output of a git command, or "" where there is no git, no repository or no commit."""
    try:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, errors="replace", timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def source_tags(root: Path) -> dict[str, str]:
    """Tags for commit, dirty flag, DVC stage and experiment, and versions."""
    tags = {f"vqmoe.version.{name}": text for name in PACKAGES if (text := _version(name))}
    # The same bits need as many threads: sums are split among them.
    tags["vqmoe.threads"] = os.environ.get("OMP_NUM_THREADS") or str(len(os.sched_getaffinity(0)))
    tags |= {"vqmoe.version.python": platform.python_version(), "mlflow.source.name": "vqmoe", "mlflow.source.type": "LOCAL"}
    if commit := git(root, "rev-parse", "HEAD").strip():
        tags |= {
            "mlflow.source.git.commit": commit,
            "vqmoe.git_dirty": str(bool(git(root, "status", "--porcelain", "--", *SOURCES).strip())).lower(),
        }
    for variable, tag in (("DVC_STAGE", "dvc.stage"), ("DVC_EXP_NAME", "dvc.experiment"), ("USER", "mlflow.user")):
        if os.environ.get(variable):
            tags[tag] = os.environ[variable]
    return tags


def diff(root: Path) -> str:
    """Changes against the commit, at most DIFF_LIMIT characters; "" when clean."""
    return git(root, "diff", "HEAD", "--", *SOURCES)[:DIFF_LIMIT]


def digests(paths: Iterable[Path], root: Path, kind: str) -> dict[str, str]:
    """Tags `md5.<kind>.<file>`; of a folder each file's. For a file md5 is what DVC writes into dvc.lock."""
    tags = {}
    for path in paths:
        for file in sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]:
            name = file.relative_to(root) if file.is_relative_to(root) else file.name
            tags[f"md5.{kind}.{name}"] = digest(file, "md5")
    return tags


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
