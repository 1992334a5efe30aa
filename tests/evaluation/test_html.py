import base64
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest

from pipeline.evaluation.html import METHODS, Shown, page
from pipeline.evaluation.tables import Table

DATA = SimpleNamespace(corpus="<b>sotu", view="text27", tokenizer="bytes", tasks={"era": "era", "banking77": "a&b.csv"})
NAMES = ("claims", "methods", "compute", "pairs")
SHOWN = [Shown("one", "A <figure>", 'It says "this".', b"\x89PNG", b"a,b\n1,2\n", ("run1", "run2"))]
VOID = {"meta", "img", "link", "br"}


class Page(HTMLParser):
    """What a page holds; tags have to close in the order in which they were opened."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


def made(grid, claims=(("28 % <more>", "not supported", "1 %", "[0.5, 1.5]", ""),)):
    tables = {name: Table(name, ("measure", "value"), [("a", "1.0"), ("- b", "2.0")]) for name in NAMES}
    tables["claims"] = Table("claims", ("claim", "verdict", "measured", "95 % interval", "note"), claims)
    return page(DATA, grid, tables, {name: name.encode() for name in (*NAMES, "gains")}, SHOWN)


@pytest.fixture(scope="module")
def found(grid):
    return Page(made(grid))


def test_it_is_whole_and_needs_nothing_beside_itself(found, grid):
    text = made(grid)
    assert text == made(grid)
    assert text.startswith("<!DOCTYPE html>") and text.endswith("</html>\n")
    assert not found.open
    links = [attrs[key] for _, attrs in found.tags for key in ("src", "href") if key in attrs]
    assert links and all(link.startswith(("data:", "#")) for link in links)
    assert not found.all("script") and "url(" not in text
    ids = [attrs["id"] for _, attrs in found.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert {link[1:] for link in links if link.startswith("#")} <= set(ids)


def test_figures_have_their_data_their_runs_and_words_for_who_cannot_see_them(found):
    (image,) = found.all("img")
    assert image["alt"] == 'A <figure>. It says "this".'
    assert base64.b64decode(image["src"].partition("base64,")[2]) == b"\x89PNG"
    data = {attrs["download"]: attrs["href"] for attrs in found.all("a") if "download" in attrs}
    assert data.keys() == {"one.csv", *(f"{name}.csv" for name in (*NAMES, "gains"))}
    assert base64.b64decode(data["one.csv"].partition("base64,")[2]) == b"a,b\n1,2\n"
    assert "run1 run2" in found.text


def test_a_heading_is_said_once_and_a_verdict_is_marked(found):
    assert not found.all("caption")
    assert [attrs["aria-label"] for attrs in found.all("div")] == list(NAMES)
    assert {"class": "not-supported"} in found.all("td")


def test_a_number_breaks_before_its_interval_only(grid):
    cell = '<td class="number"><span>1.0</span> <span>[0.9, 1.1]</span> <span>(swap 2 %)</span> </td>'
    claims = (("a", "supported", "1.0 [0.9, 1.1] (swap 2 %)", "", ""),)
    assert cell in made(grid, claims)


def test_what_a_user_wrote_is_text(found):
    assert "<b>sotu" in found.text and "a&b.csv" in found.text and "28 % <more>" in found.text
    assert not found.all("b") and not found.all("more")


def test_it_says_what_was_compared(found, grid):
    for words in ("3 methods, 3 training seeds each, 2 classification tasks", "0, 1, 2", "swap, delete, keyboard", "2, 10 %"):
        assert words in " ".join(found.text.split())
    assert "9,142,210" in found.text and "30 segments" in found.text
    assert all(METHODS[method] in found.text for method in grid.methods)
    assert "fewer than" not in found.text


def test_no_claims_are_said_to_be_none(grid):
    assert "No claims: they are about vqmoe" in made(grid, claims=())
