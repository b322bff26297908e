"""Language identification from the interface messages of `Django`."""

import gettext
import pathlib
import re
from collections import Counter
from collections.abc import Iterator

from subspace_jax.assets import find_files
from subspace_jax.data._records import TextRecord

LATIN_LANGUAGES = ("cs", "da", "de", "es", "fi", "fr", "hu", "it", "nl", "pl", "pt", "sv")
"""Twelve large European languages in Latin script, by locale code."""

_PLACEHOLDERS = re.compile(r"%\(?\w*\)?[sd]|\{[^}]*\}|<[^>]+>|&\w+;")
_LOCALE = re.compile(r"/locale/([^/]+)/LC_MESSAGES/django\.mo$")
_SHORTEST = 25


def _messages(catalogue: pathlib.Path, shortest: int = _SHORTEST) -> Iterator[tuple[str, str]]:
    """Yields the English original and the translation, cleaned of placeholders and markup."""
    with open(catalogue, "rb") as file:
        # The standard library has no public way to list a catalogue's messages.
        entries: dict = gettext.GNUTranslations(file)._catalog  # type: ignore[attr-defined]
    for key, translation in entries.items():
        original = key[0] if isinstance(key, tuple) else key
        text = _cleaned(translation)
        if original and len(text) >= shortest:
            yield original, text


def _cleaned(message: str) -> str:
    return " ".join(_PLACEHOLDERS.sub(" ", message).split())


def languages(codes: tuple[str, ...] | None = None) -> Iterator[TextRecord]:
    """Yields messages labeled by locale, grouped by their English original.

    All translations of one message are in the same split, so that names and technical terms in a training
    text do not give a test text away. A text occurs once, and not at all if several of the locales share
    it.

    Args:
        codes: locales to read; all of the package if None.

    Yields:
        Records whose label is a locale code.

    Raises:
        AssetMissingError: the package is not here.
        ValueError: a locale has no messages.
    """
    found: dict[str, dict[str, str]] = {}
    for path in find_files("django", "/LC_MESSAGES/django.mo"):
        match = _LOCALE.search(path.as_posix())
        if match and (codes is None or match[1] in codes):
            for original, text in _messages(path):
                found.setdefault(match[1], {}).setdefault(text, original)
    absent = set(codes or ()) - set(found)
    if absent:
        raise ValueError(f"no messages in the locales {', '.join(sorted(absent))}")
    locales_of = Counter(text for texts in found.values() for text in texts)
    for code in sorted(found):
        for text, original in found[code].items():
            if locales_of[text] == 1:
                yield TextRecord(text, code, group=original)


def messages_by_application(code: str, *, shortest: int = 12) -> Iterator[TextRecord]:
    """Yields messages in one locale labeled by the application that shows them, such as "conf" or "contrib/admin".

    The label is that of the English original, so a task learned in one language is the same in every other. A text
    that several applications share is left out.

    Args:
        code: a locale, or "en" for the originals of the German catalogues, which are complete.
        shortest: characters that a message has at least.

    Yields:
        Records grouped by their English original.

    Raises:
        AssetMissingError: the package is not here.
        ValueError: the locale has no messages.
    """
    found: dict[str, dict[str, str]] = {}
    locale = "de" if code == "en" else code
    for path in find_files("django", "/LC_MESSAGES/django.mo"):
        if f"/locale/{locale}/" not in path.as_posix():
            continue
        application = path.as_posix().split("/django/")[-1].split("/locale/")[0]
        for original, text in _messages(path, shortest):
            found.setdefault(_cleaned(original) if code == "en" else text, {})[application] = original
    if not found:
        raise ValueError(f"no messages in the locale {code}")
    for text in sorted(found):
        if len(found[text]) == 1:
            [(application, original)] = found[text].items()
            yield TextRecord(text, application, group=original)


def languages_latin12() -> Iterator[TextRecord]:
    """Yields messages in the twelve `LATIN_LANGUAGES`."""
    return languages(LATIN_LANGUAGES)
