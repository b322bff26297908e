import struct
from collections import Counter

import pytest

from subspace_jax.data import _languages
from subspace_jax.data._records import split_of

LONG = "a message of more than twenty-five letters"


def catalogue(messages):
    """Writes a binary catalogue as its format's manual describes it."""
    entries = sorted({"": "Content-Type: text/plain; charset=UTF-8\n", **messages}.items())
    keys = [key.encode() for key, _ in entries]
    values = [value.encode() for _, value in entries]
    start = 28 + 16 * len(entries)
    table, blob = b"", b""
    for group in (keys, values):
        for text in group:
            table += struct.pack("<II", len(text), start + len(blob))
            blob += text + b"\0"
    head = struct.pack("<7I", 0x950412DE, 0, len(entries), 28, 28 + 8 * len(entries), 0, 0)
    return head + table + blob


def test_messages_are_cleaned_and_shared_or_short_ones_dropped(lay_carrier):
    german = {"k1": f"<b>Eine</b> %(name)s {LONG} {{x}} &nbsp;", "k2": "kurz", "k3": f"shared {LONG}"}
    danish = {"k1": f"En {LONG}", "k3": f"shared {LONG}"}
    lay_carrier(
        "django",
        {
            "django/conf/locale/de/LC_MESSAGES/django.mo": catalogue(german),
            "django/contrib/x/locale/de/LC_MESSAGES/django.mo": catalogue({"k9": f"Eine {LONG}"}),
            "django/conf/locale/da/LC_MESSAGES/django.mo": catalogue(danish),
            "django/conf/locale/de/LC_MESSAGES/djangojs.mo": catalogue({"k5": f"ignored {LONG}"}),
        },
    )
    records = list(_languages.languages())
    assert [(r.text, r.label, r.group) for r in records] == [
        (f"En {LONG}", "da", "k1"),
        (f"Eine {LONG}", "de", "k1"),
    ]
    assert {r.label for r in _languages.languages(("de",))} == {"de"}
    with pytest.raises(ValueError, match="no messages in the locales fr"):
        list(_languages.languages(("de", "fr")))


def test_applications_label_the_same_message_in_every_language(lay_carrier):
    shared = {"Save it now": "Jetzt speichern"}
    lay_carrier(
        "django",
        {
            "django/conf/locale/de/LC_MESSAGES/django.mo": catalogue({"Enter a %(kind)s value": "Einen Wert eingeben"}),
            "django/contrib/admin/locale/de/LC_MESSAGES/django.mo": catalogue(
                {"Log in again": "Wieder anmelden"} | shared
            ),
            "django/contrib/auth/locale/de/LC_MESSAGES/django.mo": catalogue({"No": "Nein"} | shared),
        },
    )
    german = list(_languages.messages_by_application("de"))
    assert [(r.text, r.label, r.group) for r in german] == [
        ("Einen Wert eingeben", "conf", "Enter a %(kind)s value"),
        ("Wieder anmelden", "contrib/admin", "Log in again"),
    ]
    english = list(_languages.messages_by_application("en"))
    assert [(r.text, r.label, r.group) for r in english] == [
        ("Enter a value", "conf", "Enter a %(kind)s value"),
        ("Log in again", "contrib/admin", "Log in again"),
    ]
    assert len(list(_languages.messages_by_application("de", shortest=1))) == 3
    with pytest.raises(ValueError, match="no messages in the locale fr"):
        list(_languages.messages_by_application("fr"))


@pytest.mark.carried
def test_published_counts(need):
    need("django")
    records = list(_languages.languages_latin12())
    counts = Counter(r.label for r in records)
    assert tuple(sorted(counts)) == _languages.LATIN_LANGUAGES
    assert all(225 <= count <= 316 for count in counts.values())
    assert len({r.text for r in records}) == len(records)
    originals = {split: {r.group for r in records if split_of(r.group) == split} for split in ("train", "test")}
    assert not originals["train"] & originals["test"]
    assert len({r.label for r in _languages.languages()}) == 98
