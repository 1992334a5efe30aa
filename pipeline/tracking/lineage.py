"""Where a run came from: commit, changes, versions, machine, digests."""

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pipeline.errors import Failure
from pipeline.files import digest

PACKAGES = ("torch", "torchvision", "numpy", "scipy", "scikit-learn", "tokenizers", "pillow", "mlflow", "dvc")
DIFF_LIMIT = 1_000_000
CUT = "\nvqmoe: cut off here, there are more changes than are kept\n"
LEFT_OUT = "vqmoe: new files that are too large to be kept: "
# What stages themselves write changes with every run and is no change of the source, and neither is data, which has digests.
SOURCES = (".", ":(exclude)results", ":(exclude)report", ":(exclude)dvc.lock", ":(exclude)data")


def git(root: Path, *arguments: str, stdin: str = "", **environment: str) -> str:
    """Output of a git command, or "" where there is no git, no repository or no commit."""
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=root, capture_output=True, timeout=30, input=stdin.encode(), env=os.environ | environment
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    # Decoded here, since as text a carriage return of a changed line would be lost.
    return done.stdout.decode(errors="replace") if done.returncode == 0 else ""


def source_tags(root: Path) -> dict[str, str]:
    """Tags for commit, dirty flag, DVC stage and experiment, versions and machine."""
    tags = {f"vqmoe.version.{name}": text for name in PACKAGES if (text := _version(name))}
    tags |= {"vqmoe.threads": threads(), "vqmoe.cpu": _cpu(), "vqmoe.gpu": _gpus()}
    tags |= {"vqmoe.version.python": platform.python_version(), "mlflow.source.name": "vqmoe", "mlflow.source.type": "LOCAL"}
    if commit := git(root, "rev-parse", "HEAD").strip():
        tags |= {"mlflow.source.git.commit": commit, "vqmoe.git_dirty": str(bool(diff(root))).lower()}
    for variable, tag in (("DVC_STAGE", "dvc.stage"), ("DVC_EXP_NAME", "dvc.experiment"), ("USER", "mlflow.user")):
        if os.environ.get(variable):
            tags[tag] = os.environ[variable]
    return tags


def diff(root: Path) -> str:
    """Changes against the commit as `git apply` takes them, new files that git does not ignore among them; "" when clean.

    The first line, LEFT_OUT, names new files that DIFF_LIMIT bytes have no room for; changes of more characters end with CUT.
    Raises Failure where no temporary file can be written.
    """
    new, left_out, room = [], [], DIFF_LIMIT
    for size, name in sorted(_new_files(root)):
        room -= size
        (new if room >= 0 else left_out).append(name)
    # Git shows new files once the index has their names; a copy of the index, for the user's own is not to be touched. It keeps
    # its time: files as old as the index may have changed since, and only their content tells.
    try:
        temporary = tempfile.TemporaryDirectory()
    except OSError as error:
        raise Failure(f"no temporary folder can be made ({error}); free space there, or set TMPDIR to another place") from None
    with temporary as folder:
        index = Path(folder) / "index"
        try:
            shutil.copy2(root / git(root, "rev-parse", "--git-path", "index").strip(), index)
        except OSError:
            return ""
        names = ("--intent-to-add", "--pathspec-from-file=-", "--pathspec-file-nul")
        git(root, "--literal-pathspecs", "add", *names, stdin="\0".join(new), GIT_INDEX_FILE=str(index))
        # As `git apply` wants it, whatever the user's settings are.
        form = ("--binary", "--no-color", "--no-ext-diff", "--no-textconv", "--no-relative", "--src-prefix=a/", "--dst-prefix=b/")
        changes = git(root, "diff", *form, "HEAD", "--", *SOURCES, GIT_INDEX_FILE=str(index))
    first = f"{LEFT_OUT}{', '.join(left_out)}\n" if left_out else ""
    return first + (changes if len(changes) <= DIFF_LIMIT else changes[:DIFF_LIMIT] + CUT)


def _new_files(root: Path) -> Iterable[tuple[int, str]]:
    """Bytes and name of each file that git neither tracks nor ignores; a repository inside this one is too large for any."""
    for name in git(root, "ls-files", "--others", "--exclude-standard", "-z", "--", *SOURCES).split("\0")[:-1]:
        try:
            yield DIFF_LIMIT + 1 if name.endswith("/") else (root / name).lstat().st_size, name
        except OSError:  # gone again
            continue


def digests(paths: Iterable[Path], root: Path, kind: str) -> dict[str, str]:
    """Tags `md5.<kind>.<file>`; of a folder each file's. For a file md5 is what DVC writes into dvc.lock.

    Files are named from the repository on, also where it is a copy that `dvc exp` runs in and they lie in the original.
    """
    tags = {}
    bases = (root, Path(os.environ.get("DVC_ROOT", root)))
    for path in paths:
        for file in sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]:
            name = next((file.relative_to(base) for base in bases if file.is_relative_to(base)), file.name)
            tags[f"md5.{kind}.{name}"] = digest(file, "md5")
    return tags


def threads() -> str:
    """Threads among which sums are split: the same bits need as many."""
    # Left alone, torch need not take one for every CPU. Stages have imported it; it is not imported for this.
    if torch := sys.modules.get("torch"):
        return str(torch.get_num_threads())
    return os.environ.get("OMP_NUM_THREADS") or str(len(os.sched_getaffinity(0)))


def _cpu() -> str:
    """Model of the processor, or its architecture where the system names no model."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _gpus() -> str:
    """Models of the NVIDIA cards as their driver names them, or "none"."""
    names = []
    for file in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
        names += [line.partition(":")[2].strip() for line in lines if line.startswith("Model:")]
    return ", ".join(names) or "none"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
