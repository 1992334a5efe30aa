"""What the stages of a small grid leave, with fresh models: outputs, results, and runs in a store."""

import numpy as np
import pytest
from safetensors.numpy import save_file

from pipeline import config, tracking
from pipeline.config import flat
from pipeline.data.tokenizers import Tokenizer
from pipeline.files import write_json
from pipeline.models.build import build
from pipeline.training import checkpoint
from stages.paths import SECTIONS, Cell, Paths
from tests.tracking.conftest import database, made, root

__all__ = ["database", "made", "root"]

# By method: bits per character of the language model on validation and test, nats and accuracy of the classifier. What is the
# best on validation is not so on test.
SCORES = {"vqmoe": (2.0, 1.5, 1.25, 0.5), "smoe": (1.75, 1.625, 1.0, 0.25)}


@pytest.fixture
def trained(root, tiny_params, tiny_spec, seeded, monkeypatch):
    """Paths of a repository with models of two methods, as pretrain and finetune of one task leave them; commands run there."""
    monkeypatch.chdir(root)
    params, paths, tokenizer = tiny_params("data.tasks={toy: data/toy.csv}"), Paths(root, root), Tokenizer.bytes()
    (root / "params.yaml").write_text(config.dump(params))
    (root / "dvc.yaml").touch()
    for place in (paths.source, paths.task("toy")):
        place.mkdir(parents=True)
        (place / "valid").write_text("what is scored")
    read = {"view": "bytes", "vocabulary": tokenizer.size, "tokenizer": tokenizer.digest}

    def leave(stage, cell, metrics, upstream=None, kind=None, units=None):
        folder, chosen = paths.output(stage, cell) if cell else paths.data, params.select(SECTIONS[stage])
        if cell:
            folder.mkdir(parents=True)
            spec = tiny_spec(cell.method, kind, **read)
            checkpoint.save(folder, build(spec), spec)
            tokenizer.save(folder / "tokenizer.json")
            save_file(units, folder / "units.safetensors")
        place = {key: value for key, value in (cell._asdict() if cell else {}).items() if value is not None}
        shown, name = flat({"data": params.data}) | flat(chosen) | place, cell.name if cell else stage
        inputs = [paths.task(cell.task) if cell.task else paths.source] if cell else []
        numbers = {key.replace(".", "/"): value for key, value in flat(metrics).items()}
        with tracking.start(
            root, key=f"{stage}-{name}", resumed=False, experiment="vqmoe", stage=stage, name=name, params=shown, inputs=inputs
        ) as run:
            run.upstream({"prepare": upstream} if upstream else {})
            run.log(numbers)
            run.outputs([folder])
            if cell:
                run.model(folder, f"{stage}-{name}", numbers)
        write_json(paths.result(stage, cell), place | {"run_id": run.id, "metrics": metrics})
        return run.id

    prepared = leave("prepare", None, {"references": {"tasks": {"toy": {"accuracy": 0.75, "majority": 0.5}}}})
    for method, (valid, test, nats, accuracy) in SCORES.items():
        metrics = {"valid": {"bpc": valid}, "test": {"bpc": test, "bpc_discrete": test + 0.125}}
        units = {mode: np.full(8, score) for mode, score in (("both", test), ("discrete", test + 0.125))}
        leave("pretrain", Cell(method, 0), metrics, prepared, "language-model", units)
        metrics = {"valid": {"nats": nats}, "test": {"nats": nats + 0.5, "accuracy": accuracy}}
        units = {"correct": np.repeat([1.0, 0.0], [int(8 * accuracy), 8 - int(8 * accuracy)]), "groups": np.arange(8) // 2}
        leave("finetune", Cell(method, 0, "toy"), metrics, prepared, "classifier", units)
    return paths
