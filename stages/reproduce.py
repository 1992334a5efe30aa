"""Run again what a recorded run was made from, in a clean work tree, and compare what comes out with what came out then."""

import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ruamel.yaml import YAML

from pipeline import tracking
from pipeline.errors import Failure, UsageError
from pipeline.evaluation.tables import Table
from stages.execute import sources
from stages.paths import SECTIONS, UPSTREAM, Cell, Paths, cells, read_result

FOLDER = ".vqmoe-reproduce-"
# Tags of what may change numbers although all that the run was made from is the same.
ENVIRONMENT = ("vqmoe.version.", "vqmoe.cpu", "vqmoe.gpu", "vqmoe.threads")
# Of the caller's environment: they would lead a stage out of the work tree.
OUTSIDE = ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "DVC_ROOT", "DVC_STAGE", "DVC_EXP_NAME")


def reproduce(root: Path, prefix: str, keep: bool) -> None:
    """Find a run by the first characters of its id, run its stage and those before it, print what differs.

    Raises Failure if metrics or files are not the same, or if something that the run was made from is not there any more.
    """
    last = Step.of(tracking.named(root, prefix))
    steps = plan(last, root)
    with _work_tree(root, last.run.id, keep) as tree:
        for step in steps:  # what is missing is found before anything is trained
            tree.become(step)
        for step in steps:
            tree.become(step)
            tree.execute(step)
        now = tracking.embedded(tree.paths.root, read_result(tree.paths.result(last.stage, last.cell))["run_id"])
    _compare(last, now)


class Step:
    """A stage to run, of a cell where it has cells, from what `run` was made from.

    `run` is the stage's own run or, where that is gone, one that read what it wrote.
    """

    def __init__(self, run: tracking.Recorded, stage: str, cell: Cell | None) -> None:
        self.run, self.stage, self.cell = run, stage, cell
        self.name = f"{stage} {cell.name}" if cell else stage

    @classmethod
    def of(cls, run: tracking.Recorded) -> "Step":
        """The stage that `run` recorded. Raises UsageError if there is nothing to run, or to compare with."""
        stage = run.tags.get("vqmoe.stage")
        if stage == "report":
            raise UsageError(f"run {run.id} is a report; reproduce the runs that it reads, which its tags vqmoe.upstream.* name")
        if stage not in SECTIONS:
            raise UsageError(f"run {run.id} is not of a stage; `vqmoe ui` shows those that are")
        if run.status != "FINISHED":
            raise UsageError(f"run {run.id} is {run.status}: there is nothing to compare with; name one that is FINISHED")
        if stage == "prepare":
            return cls(run, stage, None)
        return cls(run, stage, Cell(run.params["method"], int(run.params["seed"]), run.params.get("task")))

    @cached_property
    def files(self) -> dict[str, str]:
        """What the run kept of files that differ from the commit's: params with what overrode them, and dvc.lock."""
        return {name: self.run.text(name) for name in ("params.yaml", "dvc.lock") if name != "dvc.lock" or self.run.has(name)}

    @cached_property
    def data(self) -> dict[str, Any]:
        """The section `data` of the params."""
        return YAML(typ="safe").load(self.files["params.yaml"])["data"]

    @cached_property
    def source(self) -> tuple[str, str]:
        """Commit, and as a patch what was not committed. Raises Failure if they were not kept."""
        commit = self.run.tags.get("mlflow.source.git.commit")
        if commit is None:
            raise Failure(f"run {self.run.id}: has no commit to go back to; make runs inside a git repository")
        changes = self.run.text("changes.diff") if self.run.tags.get("vqmoe.git_dirty") == "true" else ""
        if changes.endswith(tracking.CUT):
            raise Failure(f"run {self.run.id}: more was changed and not committed than is kept of it; commit before such a run")
        return commit, changes

    def digests(self, kind: str) -> dict[str, str]:
        """md5 of the files that the stage's own run read (`in`) or wrote (`out`), by name; nothing where that is gone."""
        return _digests(self.run.tags, kind) if self.run.tags["vqmoe.stage"] == self.stage else {}

    def upstream(self, root: Path) -> "Iterator[Step]":
        """The stages whose outputs this one reads, the later ones first.

        They may have read other runs of the earlier ones; what is left in the end has to be what this stage read.
        """
        if self.cell is None:
            return
        tasks = [self.cell.task] if self.cell.task else self.data["tasks"]
        for stage in reversed(UPSTREAM[self.stage]):
            for one in cells(stage, [self.cell.method], [self.cell.seed], tasks):
                yield self._before(root, stage, one, stage if self.cell.task else f"{stage}.{one.name}")
        yield self._before(root, "prepare", None, "prepare")

    def _before(self, root: Path, stage: str, cell: Cell | None, tag: str) -> "Step":
        run_id = self.run.tags.get(f"vqmoe.upstream.{tag}")
        found = tracking.find(root, run_id) if run_id else []
        step = Step(found[0] if found else self.run, stage, cell)
        if run_id and not found:
            print(f"Run {run_id} ({step.name}) is gone; what run {self.run.id} was made from stands in for it.")
        return step


def plan(last: Step, root: Path) -> list[Step]:
    """The steps in order. What several of them read is made once, if it was one run or runs that wrote the same."""
    steps: list[Step] = []
    there: dict[str, Step] = {}

    def visit(step: Step) -> None:
        before = there.get(step.name)
        if before and (before.run.id == step.run.id or before.digests("out") == step.digests("out") != {}):
            return
        for upstream in step.upstream(root):
            visit(upstream)
        there[step.name] = step
        steps.append(step)

    visit(last)
    return steps


def arguments(step: Step) -> list[str]:
    """What follows `vqmoe` on the command line of a step."""
    options = step.cell._asdict() if step.cell else {}
    if step.stage == "compute":
        del options["seed"]
    return [step.stage, *(part for key, value in options.items() if value is not None for part in (f"--{key}", str(value)))]


class WorkTree:
    """A clone of the repository to run stages in; `paths` are those of the project there, `root` is the project itself."""

    def __init__(self, root: Path, clone: Path, project: str) -> None:
        self.root, self.clone = root, clone
        self.paths = Paths(clone / project, clone / project)
        self._source: tuple[str, str] | None = None
        self._differs = False

    def become(self, step: Step) -> None:
        """Take on a step's commit, changes, params and data; what stages have written stays."""
        if self._source != step.source:
            self._check_out(step)
        for name, text in step.files.items():
            (self.paths.root / name).write_text(text, encoding="utf-8")
        if step.stage == "prepare":
            self._find_data(step)

    def execute(self, step: Step) -> None:
        """Run the stage as a process of its own."""
        self._name_changes(step)
        print(f"Running {step.name} as in run {step.run.id}", flush=True)
        done = subprocess.run(
            [sys.executable, "-c", "from cli import main; main()", *arguments(step)],
            cwd=self.paths.root,
            env={name: value for name, value in os.environ.items() if name not in OUTSIDE}
            | {"PYTHONPATH": ".", "OMP_NUM_THREADS": step.run.tags["vqmoe.threads"]},
        )
        if done.returncode:
            raise Failure(
                f"run {step.run.id}: {step.name} ended with code {done.returncode}; what it says above is the reason, "
                "--keep leaves the work tree to look into"
            )

    def _check_out(self, step: Step) -> None:
        commit, changes = step.source
        run = f"run {step.run.id}"
        try:
            _git(self.clone, "cat-file", "-e", f"{commit}^{{commit}}")
        except Failure:
            raise Failure(
                f"{run}: its commit {commit} is not in this repository; fetch it from where it was made (`git fetch --all`)"
            ) from None
        _git(self.clone, "checkout", "--quiet", "--force", "--detach", commit)
        _git(self.clone, "clean", "--quiet", "-d", "--force")
        if changes.startswith(tracking.LEFT_OUT):
            print(f"Not kept with {run} and not here: {changes.splitlines()[0].removeprefix(tracking.LEFT_OUT)}")
        if "diff --git " in changes:
            try:
                _git(self.clone, "apply", "--whitespace=nowarn", "-", stdin=changes)
            except Failure as error:
                raise Failure(f"{run}: its changes.diff does not apply to commit {commit}: {error}") from None
        self._source = step.source

    def _find_data(self, step: Step) -> None:
        """Link data that is not in the commit as the run read it, such as what git does not keep, to where it lies now."""
        tree, then = self.paths.root, step.digests("in")
        for path in sources(SimpleNamespace(**step.data), self.root):
            if not path.is_relative_to(self.root):
                continue
            name = path.relative_to(self.root)
            target = tree / name
            own = {file: md5 for file, md5 in then.items() if Path(file).is_relative_to(name)}
            if target.exists() and (not own or _digests(tracking.digests([target], tree, "in"), "in") == own):
                continue
            # By a path or a link that leads out of the tree, the very same files.
            if not target.resolve().is_relative_to(tree.resolve()):
                continue
            if target.is_dir():
                shutil.rmtree(target)
            target.unlink(missing_ok=True)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(path)
        for name in then.keys() - self._inputs(step).keys():
            # An archive is downloaded again.
            if not name.startswith("data/archives/"):
                raise Failure(f"{name}: gone, and run {step.run.id} read it; put it back (its md5 is {then[name]})")

    def _inputs(self, step: Step) -> dict[str, str]:
        """md5 of the files that the stage is about to read."""
        prepare = step.stage == "prepare"
        paths = sources(SimpleNamespace(**step.data), self.paths.root) if prepare else self.paths.inputs(step.stage, step.cell)
        return _digests(tracking.digests(paths, self.paths.root, "in"), "in")

    def _name_changes(self, step: Step) -> None:
        """Print which files are not those that the run read; what comes after the first of them differs because of it."""
        now = self._inputs(step)
        changed = {name: md5 for name, md5 in step.digests("in").items() if now.get(name, md5) != md5}
        if changed and not self._differs:
            for name, md5 in changed.items():
                print(f"{name} is not what run {step.run.id} read: md5 {md5} then, {now[name]} now")
            self._differs = True


@contextmanager
def _work_tree(root: Path, run_id: str, keep: bool) -> Iterator[WorkTree]:
    """A clone that shares git's objects, beside the repository, so that relative paths out of it lead to the same files."""
    top = Path(_git(root, "rev-parse", "--show-toplevel").strip())
    clone = top.parent / f"{FOLDER}{run_id[:8]}"
    if clone.exists():
        raise Failure(f"{clone}: is there already, kept or in use; remove it, then run again")
    try:
        with tracking.terminable():
            _git(root, "init", "--quiet", str(clone))
            # Any commit is there then, of whatever branch or experiment, or of none any more.
            objects = (root / _git(root, "rev-parse", "--git-path", "objects").strip()).resolve()
            (clone / ".git/objects/info/alternates").write_text(f"{objects}\n", encoding="utf-8")
            yield WorkTree(root, clone, _git(root, "rev-parse", "--show-prefix").strip())
    finally:
        if not keep:
            shutil.rmtree(clone, ignore_errors=True)
        elif clone.exists():
            print(f"Work tree: {clone}")


def _compare(last: Step, now: tracking.Recorded) -> None:
    """Print metrics, files and, if these are not the same, the environment, then and now."""
    then, stage = last.run, last.stage
    metrics = _both(*({key: value for key, value in run.metrics.items() if _counts(stage, key)} for run in (then, now)))
    files = _both(*(_digests(run.tags, "out") for run in (then, now)))
    rows = [(name, _number(old), _number(new), _difference(old, new)) for name, (old, new) in metrics.items()]
    differ = sum(row[-1] != "identical" for row in rows)
    Table(f"Metrics of {last.name}", ("metric", "then", "now", "relative difference"), rows).show()
    if files:
        rows = [
            (name, old or "none", new or "none", "identical" if old == new else "differs") for name, (old, new) in files.items()
        ]
        Table("Files, by md5", ("file", "then", "now", ""), rows).show()
    other = sum(old != new for old, new in files.values())
    if not differ and not other:
        print(f"Run {then.id} is reproduced: {len(metrics)} metrics and {len(files)} files are identical")
        return
    tags = ({key: value for key, value in run.tags.items() if key.startswith(ENVIRONMENT)} for run in (then, now))
    rows = [(name, old or "", new or "") for name, (old, new) in _both(*tags).items() if old != new]
    if rows:
        Table("What differs in the environment", ("tag", "then", "now"), rows).show()
    else:
        print("Nothing differs in the environment: packages, Python, CPU, GPU, threads")
    raise Failure(
        f"run {then.id} is not reproduced: {differ} of {len(metrics)} metrics and {other} of {len(files)} files differ; "
        "the tables above say how far, and what else does"
    )


def _git(folder: Path, *arguments: str, stdin: str = "") -> str:
    """Output of a git command. Raises Failure with the first line of what it complains of."""
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, input=stdin.encode(), capture_output=True)
    except FileNotFoundError:
        raise Failure("git is not installed; without it a run's commit cannot be had") from None
    if done.returncode:
        lines = done.stderr.decode(errors="replace").splitlines() or [f"code {done.returncode}"]
        raise Failure(f"{folder}: git {arguments[0]} failed ({lines[0]})")
    return done.stdout.decode(errors="replace")


def _digests(tags: Mapping[str, str], kind: str) -> dict[str, str]:
    """md5 by name, as if all had been written into the repository itself; results, which hold run ids, are none of them."""
    given = {key.removeprefix(f"md5.{kind}."): md5 for key, md5 in tags.items() if key.startswith(f"md5.{kind}.")}
    named = {re.sub("^runs/[^/]+/", "", name): md5 for name, md5 in given.items()}
    return {name: md5 for name, md5 in named.items() if not name.startswith("results/")}


def _both(then: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    return {key: (then.get(key), now.get(key)) for key in sorted(then.keys() | now.keys())}


def _counts(stage: str, metric: str) -> bool:
    """Whether a metric is counted or computed, and so comes out the same; time and memory do not."""
    if stage == "compute":
        return any(part.startswith(("flops", "parameters")) for part in metric.split("/"))
    return not metric.startswith("cost/")


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.8g}"


def _difference(then: float | None, now: float | None) -> str:
    if then is None or now is None:
        return "differs"
    if then == now or (math.isnan(then) and math.isnan(now)):
        return "identical"
    return f"{(now - then) / abs(then):+.1e}" if then else f"{now - then:+.1e} (absolute)"
