"""What the site's build does beside reading pages: writes the reference, brings the notebooks, links code to it."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.transforms.post_transforms import SphinxPostTransform

import subspace_jax as sj
from docs import docstrings, reference
from docs.method_page import title

ROOT = Path(__file__).parents[1]
WIDE = ("which-method", "methods/README", "experiments", "benchmarks")


def write_sources(app: Sphinx) -> None:
    """Writes the pages of the reference and copies the notebooks to where Sphinx looks for them."""
    _write(Path(app.srcdir) / "reference", reference.pages())
    # A badge would be fetched from another machine whenever a page is read; a link is as good.
    badge = re.compile(r"\[!\[Open in Colab\]\([^)]*\)\]")
    found = sorted((ROOT / "notebooks").glob("*.ipynb"))
    notebooks = {path.name: badge.sub("[Open in Colab]", path.read_text()) for path in found}
    _write(Path(app.srcdir) / "notebooks", notebooks)


def _write(folder: Path, files: dict[str, str]) -> None:
    """Writes what has changed only, so that a second build reads little."""
    folder.mkdir(exist_ok=True)
    for old in folder.iterdir():
        if old.name not in files:
            shutil.rmtree(old) if old.is_dir() else old.unlink()
    for name, text in files.items():
        path = folder / name
        if not path.exists() or path.read_text() != text:
            path.write_text(text)


def add_contents(app: Sphinx, docname: str, source: list[str]) -> None:
    """Makes of a page that is also read in the repository one of the site.

    Links to notebooks go to their copies, and the pages of methods are put into the contents, by family.
    """
    source[0] = source[0].replace("](../notebooks/", "](notebooks/")
    if docname != "methods/README":
        return
    for family in sorted({method.family for method in sj.catalogue()}):
        slugs = "\n".join(f"{title(method).partition(':')[0]} <{method.slug}>" for method in sj.catalogue(family))
        caption = family.replace("_", " ").capitalize()
        source[0] += f"\n```{{toctree}}\n:hidden:\n:caption: {caption}\n\n{slugs}\n```\n"


def read_docstring(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Turns the library's docstrings into reStructuredText, before napoleon reads their sections."""
    lines[:] = docstrings.to_rst(lines)


def skip_member(app: Sphinx, what: str, name: str, obj: Any, skip: bool, options: Any) -> bool | None:
    """Leaves out what Python and Flax write into classes by themselves."""
    text = getattr(obj, "__doc__", None) or ""
    return True if text.startswith(("Alias for field number", "Return a new ")) or name in ("parent", "scope") else None


class LinkNames(SphinxPostTransform):
    """Links code in the text that is a public name, such as `sj.lora`, to its documentation."""

    default_priority = 5

    def run(self, **kwargs: Any) -> None:
        """Puts a reference around every such piece of code that stands in no link."""
        found = {name: ".".join(home) for name, home in reference.homes().items()}
        found |= {namespace.name: namespace.name for namespace in reference.namespaces() if namespace.name != "sj"}
        for node in list(self.document.findall(nodes.literal)):
            name = node.astext().partition("(")[0]
            if name not in found or _is_linked(node):
                continue
            target = found[name].replace("sj", "subspace_jax", 1)
            link = addnodes.pending_xref(
                "",
                node.deepcopy(),
                refdomain="py",
                reftype="obj",
                reftarget=target,
                refdoc=self.env.current_document.docname,
            )
            node.replace_self(link)


def _is_linked(node: nodes.Node) -> bool:
    while node.parent is not None:
        node = node.parent
        if isinstance(node, nodes.reference | addnodes.pending_xref | addnodes.desc_signature):
            return True
    return False


def widen(app: Sphinx, pagename: str, templatename: str, context: dict[str, Any], doctree: Any) -> None:
    """Leaves the contents beside a page out where its table needs the room."""
    if pagename in WIDE:
        context["meta"] = {**(context.get("meta") or {}), "html_theme.sidebar_secondary.remove": "true"}


def setup(app: Sphinx) -> dict[str, bool]:
    """Connects the parts."""
    sys.setrecursionlimit(10_000)
    app.connect("builder-inited", write_sources)
    app.connect("source-read", add_contents)
    app.connect("html-page-context", widen, priority=100)
    app.connect("autodoc-process-docstring", read_docstring, priority=400)
    app.connect("autodoc-skip-member", skip_member)
    app.add_post_transform(LinkNames)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
