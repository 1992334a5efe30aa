"""What the documents say of the robustness experiment is what its kept results say."""

import json
import re
import tarfile

import pytest

from pipeline import config
from pipeline.evaluation import findings, summary, tables
from pipeline.moe.layer import SETTINGS
from stages.paths import SECTIONS, Paths
from stages.report import read
from tests.conftest import REPOSITORY

SECTION = {"README.md": "## Robustness with three seeds", "docs/EXPERIMENTS.md": "robustness with three seeds"}


@pytest.fixture(scope="module")
def tables_of_the_archive(tmp_path_factory):
    root = tmp_path_factory.mktemp("evidence")
    with tarfile.open(REPOSITORY / "docs/evidence/robustness.tar.xz") as archive:
        archive.extractall(root, filter="data")
    params = config.load(REPOSITORY / "presets/evidence/robustness.yaml", SETTINGS)
    grid = read(params.select(SECTIONS["report"]), Paths(root, root))
    made = [
        tables.claim_table(findings.claims(grid)),
        tables.comparison("Methods compared", grid.methods, summary.measures(grid)),
        tables.pair_table("Pairs", findings.pairs(grid), len(grid.seeds)),
    ]
    return {line for table in made for line in table.markdown().splitlines() if line.startswith("|")}


@pytest.mark.parametrize("document", SECTION)
def test_each_row_of_the_document_is_a_row_of_the_report(document, tables_of_the_archive):
    text = (REPOSITORY / document).read_text()
    (section,) = re.findall(rf"(?ms)^##[^\n]*{SECTION[document].removeprefix('## ')}\n(.*?)(?=^## |\Z)", text)
    rows = [line for line in section.splitlines() if line.startswith("|")]
    assert len(rows) > 10
    for row in rows:
        assert row in tables_of_the_archive, row


def test_the_trials_say_what_their_archive_says(tmp_path):
    with tarfile.open(REPOSITORY / "docs/evidence/trials.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    found = {}
    for path in tmp_path.rglob("results/robustness/*.json"):
        result = json.loads(path.read_text())
        # The mode of inference comes last.
        language, task = ([*result["metrics"][model].values()][-1] for model in ("language", "banking77"))
        clean, noise, attack = (language[family] for family in ("clean", "noise", "attack"))
        bits = [clean["score"], noise["degradation"], noise["score"], attack["degradation"], noise["kappa"]]
        accuracy = [f"{100 * task[family]['score']:.1f}" for family in ("clean", "noise")]
        found[f"`{result['run_id'][:8]}`"] = [*(f"{value:.3f}" for value in bits), *accuracy, f"{task['noise']['kappa']:.3f}"]
    text = (REPOSITORY / "docs/EXPERIMENTS.md").read_text()
    (section,) = re.findall(r"(?ms)^## [^\n]*can VQMoE be made more robust\?\n(.*?)(?=^## )", text)
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("|")][2:]
    assert len(rows) == len(found) == 11
    for _, *values, run in rows:
        assert values == found[run], run
