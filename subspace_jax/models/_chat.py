"""Chat templates: from messages to text, with the spans that the assistant wrote."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from subspace_jax.core import SubspaceError

# Private-use characters that mark what stands between {% generation %} and {% endgeneration %}.
_OPEN, _CLOSE = "\ue0f0", "\ue0f1"

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
PLAIN = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ 'Assistant: ' + message['content'] + eos_token + '\\n' }}"
    "{% else %}{{ message['role'] | capitalize + ': ' + message['content'] + '\\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}"
)
# `plain` needs no token of its own, so every model can learn it: the default of a model without a template.
TEMPLATES: Mapping[str, str] = {"chatml": CHATML, "plain": PLAIN}


class TemplateError(SubspaceError):
    """A chat template cannot be read, fails on a conversation, or does not say what the assistant wrote."""


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """A chat template in Jinja's language, run in its sandbox.

    Attributes:
        source: the template.
        special_tokens: what it may call `bos_token`, `eos_token` and so on.
        name: how messages call it.

    Example:
        >>> template = ChatTemplate(CHATML)
        >>> template.render([{"role": "user", "content": "Hi"}], add_generation_prompt=True)
        '<|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\n'
    """

    source: str
    special_tokens: Mapping[str, str] = dataclasses.field(default_factory=dict)
    name: str = "chat template"

    def render(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = False, tools: Any = None
    ) -> str:
        """Returns the text of a conversation.

        Args:
            messages: dicts with `role` and `content`.
            add_generation_prompt: end with what comes before an answer.
            tools: descriptions of tools, where the template knows them.

        Raises:
            TemplateError: the template refuses the conversation, or fails.
            ImportError: jinja2 is not installed.
        """
        return self._marked(messages, add_generation_prompt, tools).replace(_OPEN, "").replace(_CLOSE, "")

    def spans(self, messages: Sequence[Mapping[str, Any]], *, tools: Any = None) -> tuple[str, list[tuple[int, int]]]:
        """Returns the text and where in it the assistant's turns are, each with its end token.

        A template with `{% generation %}` blocks says so itself. Of others prefixes are rendered: a turn is what
        comes between the conversation before it, ready for an answer, and the conversation with it.

        Args:
            messages: dicts with `role` and `content`.
            tools: see `render`.

        Returns:
            The text, and a pair of start and end for every turn of the assistant.

        Raises:
            TemplateError: as `render`; or the template rewrites earlier turns as the conversation goes on, so that
                no prefix of the text says what the model will have seen.

        Example:
            >>> text, spans = ChatTemplate(CHATML).spans(
            ...     [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
            ... )
            >>> [text[start:end] for start, end in spans]
            ['Hello<|im_end|>']
        """
        marked = self._marked(messages, False, tools)
        if _OPEN in marked:
            return _unmark(marked)
        spans = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self.render(messages[:index], add_generation_prompt=True, tools=tools)
            through = self.render(messages[: index + 1], tools=tools)
            if not (through.startswith(before) and marked.startswith(through)):
                raise TemplateError(
                    f"{self.name}: it rewrites turns as a conversation goes on (message {index + 1}), so what the "
                    "model is trained on is not what it sees in use. Name another template, or one with "
                    "{% generation %} blocks."
                )
            # Line breaks after the end token come with the next turn and are not the model's to write.
            spans.append((len(before), len(before) + len(through[len(before) :].rstrip())))
        return marked, spans

    def _marked(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool, tools: Any) -> str:
        template, failures = _compiled(self.source)
        try:
            return template.render(
                messages=[dict(message) for message in messages],
                tools=tools,
                add_generation_prompt=add_generation_prompt,
                **self.special_tokens,
            )
        except TemplateError as error:
            raise TemplateError(f"{self.name}: {error}") from error
        except failures as error:
            raise TemplateError(f"{self.name}: fails on this conversation: {error}") from error


def _unmark(marked: str) -> tuple[str, list[tuple[int, int]]]:
    """Text without marks, and the pairs of places where they stood."""
    text, spans, start = [], [], 0
    length = 0
    for character in marked:
        if character == _OPEN:
            start = length
        elif character == _CLOSE:
            spans.append((start, length))
        else:
            text.append(character)
            length += 1
    return "".join(text), [span for span in spans if span[0] < span[1]]


@functools.lru_cache(maxsize=16)
def _compiled(source: str) -> tuple[Any, tuple[type[Exception], ...]]:
    """The compiled template, and what it raises where it fails on a conversation."""
    try:
        import jinja2
        from jinja2 import ext, nodes
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise ImportError(
            "chat templates need the 'jinja2' package; install it with: pip install 'subspace-jax[cli]'"
        ) from error

    class Generation(ext.Extension):
        """Marks `{% generation %}` blocks: what the assistant writes."""

        tags = {"generation"}  # noqa: RUF012 (Jinja's own way of saying it)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

        def _mark(self, caller: Any) -> str:
            return f"{_OPEN}{caller()}{_CLOSE}"

    def refuse(message: str) -> None:
        raise TemplateError(f"the template refuses this conversation: {message}")

    def tojson(value: Any, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    try:
        return environment.from_string(source), (jinja2.TemplateError, TypeError, ValueError, KeyError)
    except jinja2.TemplateError as error:
        raise TemplateError(f"not readable as a Jinja template: {error}") from error
