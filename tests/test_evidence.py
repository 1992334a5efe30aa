"""What the documents say of the robustness experiment is what its kept results say."""

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
