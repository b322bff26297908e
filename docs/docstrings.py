r"""Docstrings as reStructuredText and as Markdown.

The library's docstrings are plain text with two marks: code between backticks, formulas between `\(` and `\)`.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

_MARKED = re.compile(r"(?P<code>`[^`]+`)|(?P<math>\\\(.*?\\\))", flags=re.DOTALL)
_SECTIONS = ("Args:", "Attributes:", "Returns:", "Yields:", "Raises:", "Example:", "Examples:", "Source:", "Note:")


def to_rst(lines: list[str]) -> list[str]:
    """Returns a docstring's lines as reStructuredText, for napoleon to read the sections of.

    Args:
      lines: the docstring, one string a line.
    """
    found: list[str] = []
    for text, is_example in _parts(lines):
        found += text.split("\n") if is_example else _spaced_lists(_marked_up(text).split("\n"))
    return found


def to_markdown(text: str) -> str:
    """Returns text of a docstring as Markdown, its formulas between dollars.

    Args:
      text: paragraphs without sections or examples.
    """

    def mark(match: re.Match[str]) -> str:
        return match["code"] or f"${_formula(match['math'])}$"

    return _MARKED.sub(mark, text)


def description(value: Any) -> str:
    """Returns what a docstring says before its first section."""
    lines = (inspect.getdoc(value) or "").split("\n")
    ends = [i for i, line in enumerate(lines) if line.strip() in _SECTIONS]
    return "\n".join(lines[: min(ends, default=len(lines))]).strip()


def example(value: Any) -> str:
    """Returns the program in a docstring's example without prompts and results; empty if there is none."""
    lines = (inspect.getdoc(value) or "").split("\n")
    return "\n".join(line.strip()[4:] for line in lines if line.strip().startswith((">>> ", "... ")))


def _parts(lines: list[str]) -> list[tuple[str, bool]]:
    """Splits lines into runs of words and of examples; an example ends at an empty line."""
    runs: list[tuple[list[str], bool]] = []
    inside = False
    for line in lines:
        inside = line.strip().startswith(">>>") or (inside and bool(line.strip()))
        if not runs or runs[-1][1] != inside:
            runs.append(([], inside))
        runs[-1][0].append(line)
    return [("\n".join(run), is_example) for run, is_example in runs]


def _marked_up(text: str) -> str:
    """Marks code and formulas, and takes the meaning from every other sign that reStructuredText knows."""
    found, end = [], 0
    for match in _MARKED.finditer(text):
        before = text[end : match.start()]
        found.append(_escaped(before))
        code = match["code"]
        inner = f"``{' '.join(code[1:-1].split())}``" if code else f":math:`{_formula(match['math'])}`"
        # Marked text must stand apart from letters: "`a`s" and "-`b`" do not.
        found.append(inner if not before or before[-1] in " \n([{/-:\"'<" else f"\\ {inner}")
        end = match.end()
        if end < len(text) and (text[end].isalnum() or text[end] in "_`\\^"):
            found.append("\\ ")
    return "".join([*found, _escaped(text[end:])])


def _escaped(text: str) -> str:
    text = re.sub(r"(?<!^)([*|\\])(?![*\w]*:\s)", r"\\\1", text)
    return re.sub(r"(\w)_(?=\W|$)", r"\1\\_", text)


def _formula(text: str) -> str:
    return " ".join(text[2:-2].split())


def _spaced_lists(lines: list[str]) -> list[str]:
    """Puts an empty line before a list that follows a line of words."""
    found: list[str] = []
    for line in lines:
        is_item = line.lstrip().startswith("- ")
        if is_item and found and found[-1].strip() and not _in_list(found, line):
            found.append("")
        found.append(line)
    return found


def _in_list(found: list[str], line: str) -> bool:
    indent = len(line) - len(line.lstrip())
    for before in reversed(found):
        if not before.strip():
            return False
        depth = len(before) - len(before.lstrip())
        if depth <= indent:
            return depth == indent and before.lstrip().startswith("- ")
    return False
