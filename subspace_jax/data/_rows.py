"""Reads a user's rows from JSON lines, CSV or Parquet, with the number of every row."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ._errors import DataError


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows of a table and where they stand in their file.

    Attributes:
        records: one dict for each row.
        numbers: the line of each row in its file, counted from 1; of a Parquet file the row's number.
        source: the file, as error messages call it.
    """

    records: tuple[Mapping[str, Any], ...]
    numbers: tuple[int, ...]
    source: str

    def __len__(self) -> int:
        return len(self.records)

    def where(self, index: int) -> str:
        """Returns how messages call a row: `line 7`."""
        return f"line {self.numbers[index]}"

    def columns(self) -> tuple[str, ...]:
        """Returns the names of all columns, in the order in which they first appear."""
        return tuple(dict.fromkeys(name for record in self.records for name in record))


def read_rows(path: str | Path) -> Rows:
    """Reads a table of examples.

    Args:
        path: `.jsonl`, `.ndjson` or `.json` (an object on every line, or one list of objects), `.csv`, `.tsv` with a
            line of names, or `.parquet`. Text is UTF-8; a byte order mark is dropped.

    Returns:
        The rows. Empty lines are skipped; cells of a CSV file are strings.

    Raises:
        DataError: the file is missing, empty, of another kind, not UTF-8, or some lines cannot be read; the message
            names every such line.
        ImportError: a Parquet file without pyarrow, which the `cli` extra brings.

    Example:
        >>> import pathlib, tempfile
        >>> file = pathlib.Path(tempfile.mkdtemp()) / "data.jsonl"
        >>> _ = file.write_text('{"text": "fine", "label": 1}\\n\\n{"text": "bad", "label": 0}\\n')
        >>> rows = read_rows(file)
        >>> rows.records[1]["text"], rows.where(1)
        ('bad', 'line 3')
    """
    path = Path(path)
    readers: dict[str, Callable[[Path], Rows]] = {
        ".jsonl": _json,
        ".ndjson": _json,
        ".json": _json,
        ".csv": lambda file: _csv(file, ","),
        ".tsv": lambda file: _csv(file, "\t"),
        ".parquet": _parquet,
    }
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path}: the suffix {path.suffix!r} is not known; expected one of {', '.join(readers)}.")
    if not path.is_file():
        raise DataError(f"{path}: there is no such file.")
    rows = reader(path)
    if not rows.records:
        raise DataError(f"{path}: the file has no rows.")
    return rows


def _text(path: Path) -> str:
    raw = path.read_bytes()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise DataError(
            f"{path}: line {line} is not UTF-8 (byte 0x{raw[error.start]:02x}). Save the file as UTF-8, for example "
            "with: iconv -f latin1 -t utf-8"
        ) from error


def _json(path: Path) -> Rows:
    text = _text(path)
    if path.suffix.lower() == ".json" and text.lstrip().startswith("["):
        return _json_list(path, text)
    records, numbers, bad = [], [], []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line, parse_constant=_no_constant, object_pairs_hook=_no_repeats)
        except ValueError as error:
            bad.append(f"line {number}: {_reason(error)}: {_shown(line)}")
            continue
        if not isinstance(record, dict):
            bad.append(f"line {number}: {type(record).__name__}, expected an object {{...}}: {_shown(line)}")
            continue
        records.append(record)
        numbers.append(number)
    if bad:
        raise DataError(f"{path}: {len(bad)} lines are not a JSON object each:", bad)
    return Rows(tuple(records), tuple(numbers), str(path))


def _json_list(path: Path, text: str) -> Rows:
    try:
        records = json.loads(text, parse_constant=_no_constant, object_pairs_hook=_no_repeats)
    except ValueError as error:
        raise DataError(f"{path}: not readable as JSON: {_reason(error)}.") from error
    bad = [f"entry {i}: {type(r).__name__}" for i, r in enumerate(records, 1) if not isinstance(r, dict)]
    if bad:
        raise DataError(f"{path}: a list of objects was expected:", bad)
    return Rows(tuple(records), tuple(range(1, len(records) + 1)), str(path))


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON value")


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"repeated name {next(n for n in names if names.count(n) > 1)!r}")
    return record


def _reason(error: ValueError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    return str(error)


def _shown(line: str, limit: int = 60) -> str:
    line = line.strip()
    return line if len(line) <= limit else f"{line[:limit]}..."


def _csv(path: Path, delimiter: str) -> Rows:
    text = _text(path)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    records, numbers, bad = [], [], []
    try:
        header = next(reader, [])
        repeated = sorted({name for name in header if header.count(name) > 1})
        if repeated:
            raise DataError(f"{path}: the first line names columns twice: {', '.join(repeated)}.")
        while True:
            first = reader.line_num + 1
            cells = next(reader, None)
            if cells is None:
                break
            if not cells:
                continue
            if len(cells) != len(header):
                bad.append(f"line {first}: {len(cells)} cells")
                continue
            records.append(dict(zip(header, cells, strict=True)))
            numbers.append(first)
    except csv.Error as error:
        raise DataError(f"{path}: line {reader.line_num}: not readable as CSV: {error}.") from error
    if bad:
        raise DataError(f"{path}: {len(header)} columns by the first line, but other rows:", bad)
    return Rows(tuple(records), tuple(numbers), str(path))


def _parquet(path: Path) -> Rows:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError(
            "Parquet files need the 'pyarrow' package; install it with: pip install 'subspace-jax[cli]'"
        ) from error
    try:
        records = parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not readable as Parquet: {error}") from error
    return Rows(tuple(records), tuple(range(1, len(records) + 1)), str(path))
