"""Notebooks: `python -m docs.write_notebooks` runs notebooks/*.py and writes the .ipynb beside each, with its outputs.

The programs are in jupytext's percent form, which editors open as notebooks. A name after the command runs that one.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "notebooks"


def cells(program: str) -> list[tuple[str, str]]:
    """Returns the cells of a program in percent form, "markdown" or "code" and the text of each.

    Args:
      program: with a header between lines of `# ---`, and cells that begin with `# %%`.
    """
    _, _, body = program.partition("# ---\n")[2].partition("# ---\n")
    found = []
    for part in re.split(r"^# %%", body, flags=re.MULTILINE)[1:]:
        head, _, text = part.partition("\n")
        is_text = "[markdown]" in head
        lines = text.strip("\n").split("\n")
        kept = [re.sub("^# ?", "", line) for line in lines] if is_text else lines
        found.append(("markdown" if is_text else "code", "\n".join(kept)))
    return found


def stored(notebook: dict[str, list[dict[str, object]]]) -> list[tuple[str, str]]:
    """Returns the cells of an .ipynb file in the same form.

    Args:
      notebook: the file's JSON.
    """

    def text(source: object) -> str:
        return "".join(source) if isinstance(source, list) else str(source)

    return [(str(cell["cell_type"]), text(cell["source"])) for cell in notebook["cells"]]


def write(path: Path) -> None:
    """Runs one program and writes its notebook with outputs.

    Args:
      path: the program.
    """
    import jupytext
    import nbformat
    from nbclient import NotebookClient

    notebook = jupytext.read(path)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(FOLDER.parent)}}).execute()
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number}"  # the same at every run
        cell.metadata.pop("execution", None)
        if cell["cell_type"] == "code":  # what is to be seen is printed or drawn; no "<matplotlib.legend.Legend ...>"
            cell["outputs"] = [out for out in cell["outputs"] if out["output_type"] != "execute_result"]
    notebook.metadata.pop("jupytext", None)
    notebook.metadata.pop("language_info", None)
    nbformat.write(notebook, path.with_suffix(".ipynb"))


def main() -> None:
    """Writes the notebooks that are named, all if none is."""
    for path in sorted(FOLDER.glob("*.py")):
        if sys.argv[1:] in ([], [path.stem]):
            print(path.stem, flush=True)
            write(path)


if __name__ == "__main__":
    main()
