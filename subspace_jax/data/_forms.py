"""Finds which form a user's rows have, and refuses rows that lack what it needs."""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
from typing import Any

from ._errors import DataError
from ._rows import Rows

# In this order: rows with a prompt may carry a text besides, and rows with a label always do.
FORMS: Mapping[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "completion": ("prompt", "completion"),
    "classification": ("text", "label"),
    "text": ("text",),
    "images": ("image", "label"),
}
ROLES = ("system", "developer", "user", "assistant", "tool")


def find_form(rows: Rows, columns: Mapping[str, str] | None = None) -> str:
    """Finds the form of rows by their columns.

    Args:
        rows: from `read_rows`.
        columns: the file's names of columns that are called otherwise, such as `{"text": "review"}`.

    Returns:
        `"messages"` for conversations, `"completion"` for prompts with their completions, `"classification"` for
        texts with labels, `"text"` for plain texts, `"images"` for files of images with labels.

    Raises:
        DataError: a column that `columns` names is missing, a row fits no form, or rows have different forms.

    Example:
        >>> rows = Rows(({"text": "fine", "label": 1},), (1,), "data.jsonl")
        >>> find_form(rows)
        'classification'
    """
    names = {name: name for form in FORMS.values() for name in form} | dict(columns or {})
    for ours, theirs in (columns or {}).items():
        lacking = [rows.where(i) for i, record in enumerate(rows.records) if theirs not in record]
        if lacking:
            raise DataError(
                f"{rows.source}: the column {theirs!r}, named for {ours!r}, is missing in {len(lacking)} rows; the "
                f"columns are {', '.join(rows.columns())}.",
                lacking,
            )
    found: dict[str | None, list[int]] = collections.defaultdict(list)
    for index, record in enumerate(rows.records):
        fits = (form for form, needed in FORMS.items() if all(names[name] in record for name in needed))
        found[next(fits, None)].append(index)
    if None in found:
        lines = [f"{rows.where(i)}: has {', '.join(rows.records[i]) or 'nothing'}" for i in found[None]]
        wanted = "; ".join(" and ".join(names[name] for name in needed) for needed in FORMS.values())
        raise DataError(f"{rows.source}: {len(lines)} rows lack the columns of every form ({wanted}):", lines)
    if len(found) > 1:
        most = max(found, key=lambda form: len(found[form]))
        lines = [f"{rows.where(i)}: {form}" for form, where in found.items() if form != most for i in where]
        raise DataError(
            f"{rows.source}: rows of different forms; {len(found[most])} are {most!r}, {len(lines)} are not. Put them "
            "in files of their own, or fill what is missing:",
            lines,
        )
    return str(next(iter(found)))


def check_form(rows: Rows, form: str, columns: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
    """Returns what a form needs of every row, by the form's own names, refusing empty and wrong fields.

    Args:
        rows: from `read_rows`.
        form: see `find_form`.
        columns: see `find_form`.

    Returns:
        One dict for each row, with the form's columns alone; a conversation keeps its `tools` too.

    Raises:
        DataError: fields that are null, empty or of a wrong type, labels of several types, conversations without an
            answer; the message names every such row.

    Example:
        >>> rows = Rows(({"text": "fine", "label": 1, "id": 7},), (1,), "data.jsonl")
        >>> check_form(rows, "classification")
        [{'text': 'fine', 'label': 1}]
    """
    names = {name: (columns or {}).get(name, name) for name in FORMS[form]}
    bad: list[str] = []
    kept = []
    for index, record in enumerate(rows.records):
        fields = {ours: record.get(theirs) for ours, theirs in names.items()}
        problems = [
            problem for ours, value in fields.items() if (problem := _problem(ours, value, names[ours])) is not None
        ]
        bad += [f"{rows.where(index)}: {problem}" for problem in problems]
        if form == "messages" and record.get("tools"):
            fields["tools"] = record["tools"]
        kept.append(fields)
    if bad:
        raise DataError(f"{rows.source}: {len(bad)} fields cannot be used:", bad)
    if form in ("classification", "images"):
        _check_types(rows, [fields["label"] for fields in kept])
    return kept


def unused_columns(rows: Rows, form: str, columns: Mapping[str, str] | None = None) -> tuple[str, ...]:
    """Returns the columns that a form has no use for, to tell the user that they are ignored."""
    used = {(columns or {}).get(name, name) for name in FORMS[form]} | ({"tools"} if form == "messages" else set())
    return tuple(name for name in rows.columns() if name not in used)


def _problem(name: str, value: Any, column: str) -> str | None:
    if value is None:
        return f"{column!r} is null"
    if name == "messages":
        return _message_problem(value, column)
    if name == "label":
        if isinstance(value, bool | int) or (isinstance(value, str) and value.strip()):
            return None
        return f"{column!r} is {value!r}; expected a string, an integer or a boolean"
    if not isinstance(value, str):
        return f"{column!r} is {type(value).__name__}; expected a string"
    return None if value.strip() else f"{column!r} is empty"


def _message_problem(messages: Any, column: str) -> str | None:
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        return f"{column!r} is {type(messages).__name__ if messages else 'empty'}; expected a list of messages"
    for number, message in enumerate(messages, 1):
        if not isinstance(message, Mapping) or message.get("role") not in ROLES:
            return f"message {number} of {column!r} has no role of {', '.join(ROLES)}"
        content = message.get("content")
        if message.get("tool_calls") and content in (None, ""):
            continue
        if not isinstance(content, str) or not content.strip():
            return f"message {number} of {column!r} ({message['role']}) has no content"
    if not any(message["role"] == "assistant" for message in messages):
        return f"{column!r} has no message of the assistant, so nothing to learn"
    return None


def _check_types(rows: Rows, labels: Sequence[Any]) -> None:
    kinds: dict[str, list[int]] = collections.defaultdict(list)
    for index, label in enumerate(labels):
        kinds[type(label).__name__].append(index)
    if len(kinds) > 1:
        most = max(kinds, key=lambda kind: len(kinds[kind]))
        lines = [
            f"{rows.where(i)}: {labels[i]!r} ({kind})" for kind, where in kinds.items() if kind != most for i in where
        ]
        raise DataError(f"{rows.source}: labels of several types; most are {most}, these are not:", lines)
