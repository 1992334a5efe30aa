import re
import runpy
from types import SimpleNamespace

from tests.conftest import REPOSITORY

DIAGRAM = SimpleNamespace(**runpy.run_path(str(REPOSITORY / "docs/diagram.py")))
PICTURE = DIAGRAM.OUT.read_text()


def test_the_picture_is_the_one_that_the_script_draws():
    assert PICTURE == DIAGRAM.draw(), "run python docs/diagram.py"


def test_every_name_in_it_is_in_the_code():
    code = "".join(path.read_text() for path in (REPOSITORY / "pipeline/moe").rglob("*.py"))
    names = re.findall(r"\w*_\w+", " ".join(re.findall(r'class="code">(.*?)<', PICTURE)))
    assert {"codebook_CD", "code_embedding_CD", "apply_experts"} <= set(names)
    for name in names:
        assert re.search(rf"\b{name}\b", code), name
