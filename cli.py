"""The command line. Heavy imports live inside the commands, so that help is instant."""

import errno
import io
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import click

SECONDS_OF_THE_FIRST = 3.0
# What a disk says that takes no more.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
SEEDS = click.IntRange(0, 2**31 - 1)

HELP = """Compare routing methods for sparse mixtures of experts, reproducibly.

\b
Workflow:
  dvc repro                         all stages for every method and seed of params.yaml
  vqmoe grid --jobs 4               the same, four methods or seeds at a time
  vqmoe compare                     the claims and the main table again, in the terminal
  vqmoe compare accuracy --by method    some measures, a row per method (--csv, --json: for programs)
  vqmoe ui                          compare the runs in MLflow
  vqmoe route --text "..."          which expert reads what
  vqmoe generate --prompt "the"     text from a language model
  vqmoe classify --text "..."       the label of a text; of lines of files, of images
  vqmoe register                    the grid's models into MLflow's registry, the best as champion
  vqmoe export DEST --model MODEL   a model as a folder to give away, with a model card
  vqmoe reproduce RUN_ID            run again what a run was made from, and compare
  vqmoe train --method smoe         all stages of one method in one process, under runs/
  vqmoe train -S model.layers=2     the same with changed params (repeat -S)
  vqmoe track sync                  send what runs could not record while MLflow was out of reach
  vqmoe preset                      other experiments, those of the paper among them
  vqmoe data check PATH...          what it would make of data of your own, and the params for it
  vqmoe doctor                      what this machine has, and what would stop a run
Stages, in order, as `dvc repro` calls them:
  prepare > pretrain > warmup > finetune > robustness > report, and compute
Params: params.yaml, every key with a comment; add methods and seeds under `grid`.
Outputs: outputs/ (tokens, models), results/ (metrics, run ids), report/ (tables, plots).
"""


class Group(click.Group):
    """Turns the errors a user can mend into one line and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        from pipeline.errors import Failure, UsageError

        rank = 0
        if "TORCHELASTIC_RUN_ID" in os.environ:  # for others this would load torch, which takes seconds
            from pipeline import ranks

            rank = ranks.rank()
        try:
            try:
                return super().invoke(ctx)
            finally:
                # Here, and not where Python ends, which would show a traceback.
                if sys.stdout is not None:
                    sys.stdout.flush()
        except (UsageError, Failure) as error:
            if rank:
                # What all processes run into is said by the first, whose end ends the others.
                time.sleep(SECONDS_OF_THE_FIRST)
            click.echo(f"vqmoe: process {rank}: {error}" if rank else f"vqmoe: {error}", err=True)
            ctx.exit(error.exit_code)
        except KeyboardInterrupt:
            if not rank:
                click.echo("vqmoe: interrupted", err=True)
            ctx.exit(130)
        except OSError as error:
            # Others have the name of a file, or are told where they come up; a pipe that was closed, as by head, is no error.
            if error.errno not in FULL or error.filename is not None:
                raise
            # What is left of it would fail again where Python ends.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            click.echo(f"vqmoe: standard output: cannot be written ({error.strerror}); free space and run again", err=True)
            ctx.exit(1)


@click.group(cls=Group, help=HELP, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="vqmoe")
@click.option("--quiet", is_flag=True, envvar="VQMOE_QUIET", help="No progress: results, warnings and errors alone.")
def main(quiet: bool) -> None:
    # What this command starts is as quiet.
    os.environ.pop("VQMOE_QUIET", None)
    if quiet:
        os.environ["VQMOE_QUIET"] = "1"
    # Not known, as in the standard library, and no width of nothing.
    if not os.environ.get("COLUMNS", "").strip("0"):
        os.environ.pop("COLUMNS", None)
    for stream in (sys.stdout, sys.stderr):
        # A text may have what a terminal's encoding lacks.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _completed(names: Callable[[dict[str, Any]], Iterable[str]]) -> Any:
    """For completion, which has no second to spare and no words for errors: names that there are by the params as written."""

    def complete(ctx: click.Context, parameter: click.Parameter, begun: str) -> list[str]:
        from ruamel.yaml import YAML

        from stages.paths import Paths

        try:
            given = YAML(typ="safe").load(ctx.params.get("file") or Paths.here().root / "params.yaml")
            return [name for name in names(given) if name.startswith(begun)]
        except Exception:
            return []

    return complete


def _keys(given: dict[str, Any], above: str = "") -> Iterator[str]:
    """What an override may begin with."""
    for key, value in given.items():
        if isinstance(value, dict) and value:
            yield from _keys(value, f"{above}{key}.")
        elif above:
            yield f"{above}{key}="


def _cells(given: dict[str, Any]) -> list[str]:
    from stages.paths import Cell

    return [Cell(method, seed).name for method in given["grid"]["methods"] for seed in given["grid"]["seeds"]]


def _models(given: dict[str, Any]) -> list[str]:
    from stages.paths import Paths

    found = Paths.here().root.glob("outputs/*/**/model.json")
    return sorted(os.path.relpath(file.parent) for file in found)


def _presets() -> dict[str, Path]:
    from stages.paths import Paths

    folder = Paths.here().root / "presets"
    return dict(sorted((path.relative_to(folder).with_suffix("").as_posix(), path) for path in folder.rglob("*.yaml")))


def _known_presets(ctx: click.Context, parameter: click.Parameter, begun: str) -> list[str]:
    return [name for name in _presets() if name.startswith(begun)]


def _with_params(command: Any) -> Any:
    command = click.option(
        "-S",
        "overrides",
        multiple=True,
        metavar="section.key=value",
        shell_complete=_completed(_keys),
        help="Override a param; repeatable.",
    )(command)
    return click.option(
        "--params", "file", type=click.Path(path_type=Path), help="The experiment. Default: params.yaml of the repository."
    )(command)


def _with_method(command: Any) -> Any:
    text = "A section under methods. Default: the first of grid.methods."
    return click.option("--method", shell_complete=_completed(lambda given: given["methods"]), help=text)(command)


def _with_cell(command: Any) -> Any:
    command = click.option("--seed", type=SEEDS, help="Default: the first of grid.seeds.")(command)
    return _with_method(command)


def _with_model(place: str) -> Any:
    text = f"A folder with model.json, a run id, or models:/name@alias. Default: the first method and seed under {place}."
    return click.option("--model", metavar="MODEL", shell_complete=_completed(_models), help=text)


def _load(file: Path | None, overrides: tuple[str, ...], method: str | None = None, seed: int | None = None) -> Any:
    """Params; with a grid of one method, if that is named, so that the others' settings need not fit, or of one seed."""
    from pipeline import config
    from pipeline.moe.layer import SETTINGS
    from stages.paths import Paths

    if seed is not None:
        overrides = (*overrides, f"grid.seeds=[{seed}]")
    return config.load(file or Paths.here().root / "params.yaml", SETTINGS, overrides, method)


def _execute(name: str, params: Any, task: str | None = None) -> None:
    """Run a stage in the repository, of a cell where it has cells: the first of the grid."""
    from pipeline.errors import UsageError, nearest
    from stages.execute import execute
    from stages.launch import launch
    from stages.paths import TRAINING, Paths, cells

    if name in TRAINING:
        launch(params.machine.processes)
    if task is not None and task not in params.data.tasks:
        known = params.data.tasks
        raise UsageError(f"task '{task}' is not one of data.tasks; there are: {', '.join(known)}{nearest(task, known)}")
    tasks = params.data.tasks if task is None else [task]
    execute(name, params, Paths.here(), next(iter(cells(name, params.grid.methods, params.grid.seeds, tasks)), None))


def _stage(name: str, text: str) -> None:
    @main.command(name, help=text)
    @_with_params
    def command(file: Path | None, overrides: tuple[str, ...]) -> None:
        _execute(name, _load(file, overrides))


def _grid_stage(name: str, text: str) -> None:
    @main.command(name, help=text)
    @_with_params
    @_with_cell
    def command(file: Path | None, overrides: tuple[str, ...], method: str | None, seed: int | None) -> None:
        _execute(name, _load(file, overrides, method, seed))


def _task_stage(name: str, text: str) -> None:
    @main.command(name, help=text)
    @_with_params
    @_with_cell
    @click.option(
        "--task",
        shell_complete=_completed(lambda given: given["data"]["tasks"]),
        help="A name under data.tasks. Default: the first.",
    )
    def command(file: Path | None, overrides: tuple[str, ...], method: str | None, seed: int | None, task: str | None) -> None:
        _execute(name, _load(file, overrides, method, seed), task)


_stage("prepare", "Write tokens, tokenizer, tasks and manifest to outputs/data.")
_grid_stage("pretrain", "Pre-train a language model with one method.")
_task_stage("warmup", "Warm up the codebook (or router) on a fine-tuning domain, backbone frozen.")
_task_stage("finetune", "Fine-tune on a labelled task, in the mode of inference.")
_grid_stage("robustness", "Score language model and classifiers under noise, attack and shift, and look into the routing.")
_stage("report", "Compare the methods: claims, tables and plots in report/.")


@main.command(help="Measure FLOPs, parameters, throughput and memory of a method in its modes.")
@_with_params
@_with_method
def compute(file: Path | None, overrides: tuple[str, ...], method: str | None) -> None:
    _execute("compute", _load(file, overrides, method))


@main.command(
    help="Print claims, main table and pairs of the grid's runs, as in the report, or only MEASURES: parts of names, or globs."
)
@_with_params
@click.argument("measures", nargs=-1)
@click.option(
    "--method",
    "methods",
    multiple=True,
    shell_complete=_completed(lambda given: given["methods"]),
    help="One of the methods; repeatable. Default: grid.methods.",
)
@click.option("--sort", metavar="MEASURE", help="Methods in the order of a measure, the lowest first.")
@click.option("--by", type=click.Choice(["measure", "method"]), default="measure", show_default=True, help="What a row is.")
@click.option("--csv", "form", flag_value="csv", help="As CSV: unrounded, with seeds and run ids.")
@click.option("--json", "form", flag_value="json", help="The same as JSON.")
def compare(
    file: Path | None,
    overrides: tuple[str, ...],
    measures: tuple[str, ...],
    methods: tuple[str, ...],
    sort: str | None,
    by: str,
    form: str | None,
) -> None:
    import json

    from stages.compare import compare as compare_runs
    from stages.paths import SECTIONS, Paths
    from stages.report import read

    if methods:
        overrides = (*overrides, f"grid.methods={json.dumps(methods)}")
    compare_runs(read(_load(file, overrides).select(SECTIONS["report"]), Paths.here()), measures, sort, by, form)


@main.command(help="All stages of one method in one process, in a folder of their own under runs/.")
@_with_params
@_with_cell
def train(file: Path | None, overrides: tuple[str, ...], method: str | None, seed: int | None) -> None:
    from pipeline import ranks
    from pipeline.config import fingerprint
    from stages.execute import train as train_cell
    from stages.launch import launch
    from stages.paths import Cell, Paths

    params = _load(file, overrides, method, seed)
    launch(params.machine.processes)
    cell = Cell(params.grid.methods[0], params.grid.seeds[0])
    here = Paths.here()
    sections = params.select(set(type(params).model_fields) - {"grid", "methods", "tracking", "report"}, cell.method)
    out = here.root / "runs" / f"{cell.name}-{fingerprint(sections)[:8]}"
    train_cell(params, Paths(here.root, out), cell)
    if not ranks.rank():
        click.echo(f"Models and results: {out}")


@main.command(
    help="Go on with a text, by a language model; the same seed gives the same text. The prompt is printed as the model reads it."
)
@_with_params
@_with_model("outputs/pretrain")
@click.option("--prompt", default="the", show_default=True, help="What the text begins with.")
@click.option("--length", default=400, show_default=True, type=click.IntRange(1), help="Tokens to add.")
@click.option("--temperature", default=0.8, show_default=True, help="Over 0; 0 is the most likely token always.")
@click.option("--top-p", default=1.0, show_default=True, help="Draw among the fewest tokens of this probability together.")
@click.option("--seed", default=0, show_default=True, type=SEEDS)
def generate(
    file: Path | None,
    overrides: tuple[str, ...],
    model: str | None,
    prompt: str,
    length: int,
    temperature: float,
    top_p: float,
    seed: int,
) -> None:
    from pipeline.serving import Sampling
    from stages import use
    from stages.paths import Paths

    sampling, here = Sampling(temperature, top_p), Paths.here()
    use.generate(model or use.default_model(_load(file, overrides), here, "pretrain"), here.root, prompt, length, sampling, seed)


@main.command(
    help="Label texts, lines of text FILES (- is standard input) or images, by a classifier: one line for each, in their order. "
    "A blank line, or a text of which the model reads nothing, has the label - (in JSON null)."
)
@_with_params
@_with_model("outputs/finetune")
@click.option("--text", "texts", multiple=True, help="A text to label; repeatable.")
@click.option("--json", "as_json", is_flag=True, help="JSON lines, with the probabilities of all labels.")
@click.argument("files", nargs=-1, type=click.Path(path_type=Path))
def classify(
    file: Path | None,
    overrides: tuple[str, ...],
    model: str | None,
    texts: tuple[str, ...],
    as_json: bool,
    files: tuple[Path, ...],
) -> None:
    from pipeline.errors import UsageError
    from stages import use
    from stages.paths import Paths

    if not texts and not files:
        raise UsageError("nothing to label; name files, - for standard input, or --text")
    here = Paths.here()
    use.classify(model or use.default_model(_load(file, overrides), here, "finetune"), here.root, texts, files, as_json)


@main.command(
    help="Put the models of the grid's runs into MLflow's registry, the best on validation as `champion`; twice adds none."
)
@_with_params
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def register(file: Path | None, overrides: tuple[str, ...], as_json: bool) -> None:
    from stages.paths import Paths
    from stages.register import register as register_runs

    register_runs(_load(file, overrides), Paths.here(), as_json)


@main.command(help="Write a model into the folder DEST with a model card, for use without DVC and MLflow.")
@click.option(
    "--model",
    metavar="MODEL",
    required=True,
    shell_complete=_completed(_models),
    help="A folder with model.json, a run id, or models:/name@alias.",
)
@click.argument("dest", type=click.Path(path_type=Path))
def export(model: str, dest: Path) -> None:
    from stages.export import export as write
    from stages.paths import Paths

    write(model, Paths.here().root, dest)


@main.command(help="Show how models route a text, or the text or image of FILE: every token in the colour of its expert.")
@_with_params
@click.option(
    "--model", "sources", multiple=True, metavar="MODEL", shell_complete=_completed(_models), help="As of generate; repeatable."
)
@click.option("--text", help="A text, in the place of FILE.")
@click.option("--by", type=click.Choice(["expert", "code"]), default="expert", show_default=True, help="What the colours are.")
@click.option("--noise", help="Beside the clean text the noised one: swap, delete, insert, replace, keyboard, word, case, ...")
@click.option("--rate", default=0.1, show_default=True, type=click.FloatRange(0, 1), help="Share of the text with noise.")
@click.option("--seed", default=0, show_default=True, type=SEEDS, help="Of the noise.")
@click.option("--html", type=click.Path(), help="Write a page to look around in, which needs no network.")
@click.option("--json", "as_json", is_flag=True, help="A JSON line per model: tokens, experts, codes, margins, distances.")
@click.argument("text_or_image", metavar="[FILE]", required=False, type=click.Path(path_type=Path))
def route(
    file: Path | None,
    overrides: tuple[str, ...],
    sources: tuple[str, ...],
    text: str | None,
    by: str,
    noise: str | None,
    rate: float,
    seed: int,
    html: str | None,
    as_json: bool,
    text_or_image: Path | None,
) -> None:
    from contextlib import ExitStack

    from pipeline.errors import UsageError
    from stages import route as routing
    from stages import use
    from stages.paths import Paths

    if (text is None) == (text_or_image is None):
        raise UsageError("what is to be routed? name one: FILE or --text")
    if html is not None and (html.endswith("/") or os.path.isdir(html)):
        raise UsageError(f"{html}: a folder; name a file for the page, such as {os.path.join(html, 'route.html')}")
    paths, page = Paths.here(), None if html is None else Path(html)
    noised = None if noise is None else routing.Noise(noise, rate, seed)
    with ExitStack() as stack:
        given = zip(routing.named(sources), [stack.enter_context(use.folder_of(one, paths.root)) for one in sources], strict=True)
        models = [*given] or routing.default_models(_load(file, overrides), paths)
        routing.route(models, paths, text, text_or_image, noised, by, page, as_json)


@main.command(help="Do as `dvc repro`, several cells of the grid (a method and a seed) at a time; or only CELLS, like vqmoe-s0.")
@click.argument("cells", nargs=-1, shell_complete=_completed(_cells))
@click.option(
    "--jobs", required=True, type=click.IntRange(1), help="Cells at a time. OMP_NUM_THREADS is CPUs / jobs, unless set."
)
def grid(jobs: int, cells: tuple[str, ...]) -> None:
    from stages.grid import grid as run_grid
    from stages.paths import Paths

    run_grid(_load(None, ()), Paths.here().root, jobs, cells)


@main.command(
    help="Run again what a run was made from, in a clean work tree; compare metrics and weights, then and now. "
    "RUN_ID, or its first characters, is on the run's page of `vqmoe ui`, and is the run_id in the files of results/."
)
@click.argument("run_id")
@click.option("--keep", is_flag=True, help="Leave the work tree, beside the repository.")
def reproduce(run_id: str, keep: bool) -> None:
    from stages.paths import Paths
    from stages.reproduce import reproduce as run_again

    run_again(Paths.here().root, run_id, keep)


@main.command(help="Print a preset: a whole params.yaml. Without NAME, list them.")
@click.argument("name", required=False, shell_complete=_known_presets)
def preset(name: str | None) -> None:
    from pipeline.errors import UsageError, nearest
    from stages.paths import Paths

    files = _presets()
    if not files:
        raise UsageError(f"{Paths.here().root / 'presets'}: holds no presets; run inside the repository")
    if name is None:
        for known, path in files.items():
            first = path.read_text(encoding="utf-8").splitlines()[0]
            click.echo(f"{known:<{max(map(len, files))}}  {first.removeprefix('# ')}")
    elif name in files:
        click.echo(files[name].read_bytes(), nl=False)
    else:
        raise UsageError(f"there is no preset '{name}'{nearest(name, files)}; `vqmoe preset` lists them all")


@main.command(help="What this machine has, and what would stop a run on it: for reports of bugs. Exit code 1 if something would.")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@click.pass_context
def doctor(ctx: click.Context, as_json: bool) -> None:
    import json

    from stages.doctor import examine
    from stages.paths import Paths

    findings = []
    for finding in examine(Paths.here().root):
        findings.append(finding)
        if not as_json:
            click.echo(f"{finding.name:<16}{finding.value}")
            if finding.problem:
                click.echo(f"{'':16}! {finding.problem}")
    if as_json:
        click.echo(json.dumps([finding._asdict() for finding in findings], indent=2))
    ctx.exit(any(finding.problem for finding in findings))


@main.group(help="Data of your own.")
def data() -> None:
    pass


@data.command(
    "check", help="What vqmoe would make of the files or folders PATHS, and what to put into params.yaml for all of them at once."
)
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path))
def data_check(paths: tuple[Path, ...], as_json: bool) -> None:
    from stages.check import run
    from stages.paths import Paths

    run(paths, Paths.here().root, as_json)


@main.command(help="Serve the MLflow pages of the recorded runs on this machine, until interrupted.")
@click.option("--port", default=5000, show_default=True, type=click.IntRange(1, 65535))
@click.option("--open", "in_browser", is_flag=True, help="Open the page in the browser.")
def ui(port: int, in_browser: bool) -> None:
    from pipeline.tracking import serve
    from stages.paths import Paths

    serve(Paths.here().root, port, _load(None, ()).tracking.experiment, in_browser)


@main.group(help="What runs record in MLflow.")
def track() -> None:
    pass


@track.command(help="Send what runs left on disk: recorded while the store was out of reach, or cut off by a kill.")
def sync() -> None:
    from pipeline import tracking
    from stages.paths import Paths

    tracking.sync(Paths.here().root)
