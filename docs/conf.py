"""How Sphinx builds the site (`make docs`).

The source is the repository, not this folder: links from one Markdown file to another are then the same here and on GitHub. A
link to a Python file leads to its place in the reference. Docstrings are Markdown, formulas become MathML, and nothing is fetched
from the network.
"""

import pkgutil
import shutil
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from click import Command, Context, Group
from docutils import nodes
from docutils.parsers.rst import Directive
from docutils.utils import new_document
from docutils.utils.math.latex2mathml import tex2mathml
from myst_parser.parsers.sphinx_ import MystParser
from sphinx.addnodes import download_reference, pending_xref
from sphinx.application import Sphinx
from sphinx.writers.html5 import HTML5Translator

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import cli  # noqa: E402
import pipeline  # noqa: E402

HOW_TO = ("router", "quantizer", "corpus", "corruption", "stage")
PACKAGES = ["pipeline", *(found.name for found in pkgutil.iter_modules(pipeline.__path__, "pipeline.") if found.ispkg), "stages"]
CONTENTS = {
    "Use": ["docs/presets", "docs/runs", "docs/parallel", "docs/RELIABILITY", "data/README"],
    "Understand": ["docs/method", "docs/architecture", "docs/EXPERIMENTS", "docs/comparison", "docs/PERFORMANCE"],
    "Extend": ["docs/how-to/README", *(f"docs/how-to/{name}" for name in HOW_TO), "CONTRIBUTING"],
    "Reference": ["docs/api/cli", *(f"docs/api/{package}" for package in PACKAGES)],
    "Project": ["CHANGELOG", "SECURITY"],
}

project, release = "vqmoe", metadata.version("vqmoe")
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.viewcode"]
root_doc = "README"
# Of the folders beside README.md these two have pages.
exclude_patterns = [path.name for path in ROOT.iterdir() if path.is_dir() and path.name not in ("docs", "data")]
exclude_patterns += ["docs/_build", "data/archives"]
nitpicky = True
# Of other packages nothing is known without the network.
nitpick_ignore_regex = [("py:.*", r"(?!(pipeline|stages)\b).*")]

html_theme, html_title = "furo", f"vqmoe {release}"
html_math_renderer = "mathml"
html_static_path = html_css_files = ["site.css"]
html_copy_source = html_show_copyright = False
highlight_language = "text"
myst_heading_anchors = 3
myst_disable_syntax = ["html_block", "html_inline"]
myst_enable_extensions = ["dollarmath"]
myst_fence_as_directive = ["math"]
autodoc_default_options = {"members": True, "undoc-members": True, "exclude-members": "model_config"}
autodoc_inherit_docstrings = False
autodoc_preserve_defaults = True
autodoc_member_order = "bysource"
add_module_names = toc_object_entries = False
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100


class Markdown(Directive):
    """Markdown inside of what autodoc writes."""

    has_content = True

    def run(self) -> list[nodes.Node]:
        document = new_document("", self.state.document.settings)
        MystParser().parse("\n".join(self.content), document)
        return document.children


def docstring(app: Sphinx, what: str, name: str, value: Any, options: Any, lines: list[str]) -> None:
    said = [line for line in lines if not line.startswith("Alias for field number")]  # of a NamedTuple
    lines[:] = [".. markdown::", "", *(f"   {line}" for line in said), ""]


def contents(app: Sphinx, page: str, text: list[str]) -> None:
    """README.md leads to all other pages, in the margin alone."""
    if page == root_doc:
        for caption, pages in CONTENTS.items():
            text[0] += "\n".join(["\n```{toctree}", ":hidden:", f":caption: {caption}", "", *pages, "```\n"])


def reference(app: Sphinx) -> None:
    """A page for every package, with a section for each module, and one for the command line."""
    folder = ROOT / "docs/api"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    context = Context(cli.main, info_name="vqmoe", terminal_width=110, **cli.main.context_settings)
    (folder / "cli.md").write_text("# Command line\n\n" + "\n".join(helps(cli.main, context)))
    for package in PACKAGES:
        place = ROOT / package.replace(".", "/")
        own = sorted(place.glob("*.py") if package == "pipeline" else place.rglob("*.py"))
        modules = [module_name(path.relative_to(ROOT)) for path in own]
        sections = (f"# {name}\n\n```{{eval-rst}}\n.. automodule:: {name}\n```\n" for name in modules)
        # Modules stand below their package.
        (folder / f"{package}.md").write_text("\n#".join(sections))


def module_name(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def helps(command: Command, context: Context) -> Iterator[str]:
    yield f"## {context.command_path}\n\n```text\n{command.get_help(context)}\n```\n"
    for name, one in command.commands.items() if isinstance(command, Group) else ():
        yield from helps(one, Context(one, parent=context, info_name=name))


def code(app: Sphinx, page: nodes.document) -> None:
    """A link to a module's file leads to its section of the reference."""
    for link in list(page.findall(download_reference)):
        path = (ROOT / app.env.docname).parent.joinpath(link["reftarget"]).resolve().relative_to(ROOT)
        if path.suffix == ".py" and path.parts[0] in ("pipeline", "stages"):
            where = {"refdomain": "py", "reftype": "mod", "reftarget": module_name(path), "refexplicit": True}
            link.replace_self(pending_xref("", *link.children, refdoc=app.env.docname, **where))


def inline_formula(writer: HTML5Translator, node: nodes.math) -> None:
    writer.body.append(tex2mathml(node.astext()))
    raise nodes.SkipNode


def formula(writer: HTML5Translator, node: nodes.math_block) -> None:
    writer.body.append(tex2mathml(node.astext(), as_block=True))
    raise nodes.SkipNode


def front_page(app: Sphinx, error: Exception | None) -> None:
    if not error:
        shutil.copy(app.outdir / f"{root_doc}.html", app.outdir / "index.html")


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("markdown", Markdown)
    app.add_html_math_renderer("mathml", (inline_formula, None), (formula, None))
    app.connect("builder-inited", reference)
    app.connect("source-read", contents)
    app.connect("autodoc-process-docstring", docstring)
    app.connect("doctree-read", code, priority=100)  # before what is linked is copied
    app.connect("build-finished", front_page)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
