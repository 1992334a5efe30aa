"""A grid of made-up results, as the stages write them: quick, and known in advance."""

from types import SimpleNamespace

import numpy as np
from safetensors.numpy import save_file

from pipeline.files import output_folder, write_json, write_rows
from pipeline.moe.routers import ROUTERS
from stages.paths import Cell, Paths

MODES = {"vqmoe": ("both", "discrete"), "vqmoe_released": ("both", "discrete"), "dense": ("dense",)} | {
    "smoe_dropout": ("dense", "router"),
    "hyperrouter": ("dense", "router"),
}
MFLOPS = {"both": 1.6, "discrete": 1.2, "router": 1.5, "dense": 1.5}
LABELS = ("no", "yes", "a | b")


def params(methods=("vqmoe", "smoe", "dense"), seeds=(0, 1, 2), tasks=("era", "banking77"), resamples=200):
    """What the stage `report` is given."""
    return SimpleNamespace(
        grid=SimpleNamespace(methods=methods, seeds=seeds),
        data=SimpleNamespace(
            corpus="sotu", view="text27", tokenizer="bytes", tasks={task: task for task in tasks}, shifts={"austen": "austen"}
        ),
        report=SimpleNamespace(dpi=60, resamples=resamples),
    )


def write(root, given, kinds=("swap", "delete", "keyboard"), rates=(0.02, 0.1)):
    """Writes results and outputs of the whole grid below `root`; VQMoE loses half of what the others lose."""
    paths, grid = Paths(root, root), given.grid
    linear = {task: {"accuracy": 0.79, "macro_f1": 0.7, "majority": 0.4} for task in given.data.tasks}
    examples = {task: {"train": 1000, "valid": 100, "test": 200} for task in given.data.tasks}
    references = {"bits_per_character": {"gzip": 2.5, "bz2": 1.9, "xz": 2.1, "unigram": 4.1}}
    references |= {"classifier": "TF-IDF", "tasks": linear}
    _result(
        paths.result("prepare"),
        {"tokens": {"train": 9_142_210, "valid": 932_416, "test": 749_197}, "examples": examples, "references": references},
    )
    for place, method in enumerate(grid.methods):
        _result(paths.result("compute", Cell(method, 0)), _compute(MODES.get(method, ("router",))))
        for seed in grid.seeds:
            _cell(paths, given, place, method, seed, kinds, rates)
    return paths


def _result(path, metrics):
    write_json(path, {"run_id": f"{path.parent.name}{path.stem}".replace("-", ""), "metrics": metrics})


def _compute(modes):
    timed = {
        mode: {"tokens_per_second": 10_000 / MFLOPS[mode], "low": 9_500 / MFLOPS[mode], "high": 10_500 / MFLOPS[mode]}
        | {"peak_memory_mib": 512.0, "flops_per_token": 1e6 * MFLOPS[mode]}
        for mode in modes
    }
    metrics = {
        "parameters": {"total": 2_000_000, "active": dict.fromkeys(modes, 500_000)},
        "flops_per_token": {mode: 1e6 * MFLOPS[mode] for mode in modes},
        "train": timed,
        "finetune": timed,
        "infer": timed,
    }
    if len(modes) == 2:
        metrics["saving"] = {phase: {"seconds": 0.31, "low": 0.29, "high": 0.33} for phase in ("train", "finetune", "infer")}
    return metrics


def _cell(paths, given, place, method, seed, kinds, rates):
    rng = np.random.default_rng([place, seed])
    modes, chooses, codes = MODES.get(method, ("router",)), method != "dense", method.startswith("vqmoe")
    bpc = 1.7 + 0.02 * place + 0.005 * seed
    test = {"bpc": bpc} | {f"bpc_{mode}": bpc + 0.02 for mode in modes[1:]}
    _result(paths.result("pretrain", Cell(method, seed)), {"test": test, "routing": {"code_error": 0.9} if codes else {}})
    for task in given.data.tasks:
        cell = Cell(method, seed, task)
        _result(paths.result("warmup", cell), {"before": {"bpc": bpc}, "after": {"bpc": bpc - 0.01}})
        scores = {"accuracy": 0.8 - 0.01 * place + 0.005 * seed, "macro_f1": 0.7}
        _result(paths.result("finetune", cell), {"test": scores, "scratch": {"accuracy": 0.4, "macro_f1": 0.3}})
        with output_folder(paths.output("finetune", cell)) as folder:
            counts = rng.integers(0, 20, (len(LABELS), len(LABELS)))
            rows = [{"": a} | dict(zip(LABELS, row, strict=True)) for a, row in zip(LABELS, counts.tolist(), strict=True)]
            write_rows(folder / "confusion.csv", rows)
            correct_U = (np.arange(200) < 200 * scores["accuracy"]).astype(float)
            save_file({"correct": correct_U, "groups": np.arange(200) // 10}, folder / "units.safetensors")
    steps = (400, 800, 1200)
    with output_folder(paths.output("pretrain", Cell(method, seed))) as folder:
        tested = {mode: np.linspace(-1, 1, 40) + bpc + 0.02 * i for i, mode in enumerate(modes)}
        save_file(tested | {"groups": np.arange(40) % 8}, folder / "units.safetensors")
        write_rows(folder / "history.csv", [{"step": s, "valid/bpc": bpc + 80 / s + 0.02 * rng.random()} for s in steps])
        write_rows(
            folder / "routing.csv",
            [
                {"step": step, "layer": layer}
                | dict.fromkeys(("imbalance", "entropy", "variation", "unused"), rng.random() if chooses else None)
                | {"margin": rng.random() if chooses else None}
                | {"fluctuation": 40 / step + 0.01 * layer if chooses and step > 400 else None}
                | dict.fromkeys(("utilisation", "perplexity"), 0.9 if codes else None)
                for step in steps
                for layer in range(3)
            ],
        )
    scores, units, layers, load = [], {}, [], []
    models = [("language", mode) for mode in modes] + [(task, modes[-1]) for task in given.data.tasks]
    hurt = 0.5 if method == "vqmoe" else 1.0
    for model, mode in models:
        language = model == "language"
        sizes = {"clean": 30, "noise": 30, "attack": 10, "shift": 20 if language else 30}
        clean_U = rng.normal(bpc, 0.1, 30) if language else (rng.random(30) < 0.8).astype(float)
        conditions = [("clean", "clean", 0.0), *(("noise", kind, rate) for kind in kinds for rate in rates)]
        conditions += [("shift", "raw", 0.0), ("shift", "austen", 0.0)]
        conditions += [] if language else [("attack", "greedy", rate) for rate in rates]
        for family, kind, rate in conditions:
            size = sizes[family]
            before_U = clean_U[:size] if family != "shift" else np.full(size, clean_U.mean())
            if language:
                lost_U = np.zeros(size) if family == "clean" else hurt * (0.2 + 4 * rate + rng.normal(0, 0.05, size))
            else:
                lost_U = before_U * (rng.random(size) < (0 if family == "clean" else hurt * (0.1 + 2 * rate)))
            score_U = before_U + lost_U if language else before_U - lost_U
            for what, values_U in (("score", score_U), ("lost", lost_U)):
                units[f"{model}/{mode}/{kind}/{rate!r}/{what}"] = np.ascontiguousarray(values_U, dtype=np.float64)
            same = None if not chooses or family == "shift" else 1.0 if family == "clean" else 0.95 - 0.05 * place - rate
            scores.append(
                {"model": model, "mode": mode, "family": family, "kind": kind, "rate": rate}
                | {"score": score_U.mean(), "degradation": lost_U.mean(), "consistency": same, "kappa": same and same - 0.1}
                | {"ece": None if language else 0.05 + rate, "flips": None if language else rate}
            )
        for layer in range(3):
            # What a layer does not have has no column: not even an empty one, where no layer of a method has it.
            row = {"model": model, "mode": mode, "layer": layer, "consistency": None, "kappa": None}
            if chooses:
                names = "consistency kappa imbalance entropy variation unused margin output_cosine cka".split()
                row |= {name: rng.random() for name in names} | {"effective_rank": 20 + layer}
            layers.append(row | ({"utilisation": 0.9, "perplexity": 6.5} if codes else {}))
            for what, size in (("expert", 8 if chooses else 1), ("code", 16 if codes else 0)):
                shares = rng.dirichlet(np.ones(size)) if size else []
                load += [
                    {"model": model, "mode": mode, "what": what, "layer": layer, "index": i, "share": s}
                    for i, s in enumerate(shares)
                ]
    units["language/groups"] = np.arange(30) // 3
    units |= {f"language/{name}/groups": np.arange(20) // 4 for name in ("raw", "austen")}
    for task in given.data.tasks:
        units |= {f"{task}/groups": np.arange(30) // 3, f"{task}/attack/groups": np.arange(10) // 2}
    with output_folder(paths.output("robustness", Cell(method, seed))) as folder:
        for name, rows in (("scores", scores), ("layers", layers), ("load", load)):
            write_rows(folder / f"{name}.csv", rows)
        save_file(units, folder / "units.safetensors")
    _result(paths.result("robustness", Cell(method, seed)), {})


ALL = (*MODES, *(name for name in ROUTERS if name not in MODES))
