import json
from collections import Counter

import pytest

from subspace_jax.data import _spam
from subspace_jax.data._spam import subject_and_body

MULTIPART = """From: a@b
Received: from secret-relay
Subject: =?iso-8859-1?Q?Caf=E9?= now
MIME-Version: 1.0
Content-Type: multipart/mixed; boundary="x"

--x
Content-Type: text/plain; charset=utf-8
Content-Transfer-Encoding: base64

R3LDvMOfZQ==
--x
Content-Type: text/html

<b>other</b>
--x
Content-Type: text/plain
Content-Disposition: attachment; filename="virus.txt"

attached
--x--
"""
PAGE = """Subject: Win
Content-Type: text/html

<html><head><title>hidden</title><style>p{}</style></head>
<body><p>Big &amp; <b>real</b></p><script>evil()</script> prize</body></html>
"""


def test_only_subject_and_plain_text_are_kept():
    assert subject_and_body(MULTIPART) == ("Café now", "Grüße")


def test_page_is_reduced_to_visible_text():
    assert subject_and_body(PAGE) == ("Win", "Big & real prize")


@pytest.mark.parametrize(
    "raw",
    [
        "",
        "\n\n",
        "Subject: =?no-such-charset?Q?x?=\n\ny",
        "Content-Type: text/plain; charset=nonsense\n\nx",
        "Content-Type: text/html\n\n<![if foo]><!-- <",
        "Content-Transfer-Encoding: base64\n\n!!!",
    ],
)
def test_malformed_mail_is_read_somehow(raw):
    subject, body = subject_and_body(raw)
    assert isinstance(subject, str)
    assert isinstance(body, str)


def test_threads_are_groups_and_empty_mails_dropped(lay_carrier):
    def entry(group, text):
        return json.dumps({"group": group, "text": text}).encode()

    lay_carrier(
        "spam-assassin",
        {
            "package/data/easy-ham-1/1.json": entry("easy-ham-1", "Subject: [ILUG] Tools\n\none"),
            "package/data/easy-ham-2/2.json": entry("easy-ham-2", "Subject: Re: [ILUG] Re: tools\n\ntwo"),
            "package/data/spam-1/3.json": entry("spam-1", "X: y\n\nbuy"),
            "package/data/spam-2/4.json": entry("spam-2", "X: y\n\n"),
            "package/data/file_list.json": b"[]",
        },
    )
    records = list(_spam.spam_assassin())
    assert [(r.text, r.label, r.group) for r in records] == [
        ("[ILUG] Tools\none", "ham", "tools"),
        ("Re: [ILUG] Re: tools\ntwo", "ham", "tools"),
        ("buy", "spam", "buy"),
    ]


@pytest.mark.carried
def test_published_counts(mails):
    assert Counter(mail.label for mail in mails) == {"ham": 2_500 + 1_400 + 250, "spam": 500 + 1_396}
    headers = sum("Received: from" in mail.text[:2000] for mail in mails)
    assert headers < len(mails) / 50  # some mails quote headers in their bodies
