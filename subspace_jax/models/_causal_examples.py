"""Turns texts, prompts and conversations into token ids with labels: which tokens a causal model learns to write."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from subspace_jax.core import SubspaceError

from ._chat import ChatTemplate

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclasses.dataclass(frozen=True)
class CausalExample:
    """One sequence of a causal language model.

    Attributes:
        tokens: int32 `[length]`.
        labels: bool `[length]`, true at tokens that the model learns to write; never at the first.
        ended: whether the last label is an end token.
        cut: tokens that were cut off.
    """

    tokens: np.ndarray
    labels: np.ndarray
    ended: bool = True
    cut: int = 0


@dataclasses.dataclass(frozen=True)
class CausalEncoder:
    """How examples become tokens, the same in training and in use.

    Attributes:
        tokenizer: of the model.
        end_tokens: ids that end what the model writes; the first is appended to completions and texts.
        bos_token: id that starts every sequence; None for models that have none.
        template: of conversations; None refuses them.
        max_length: most tokens of an example.
        cut: which side of a longer one is cut off, `"right"` or `"left"`, or `"refuse"`.

    Example:
        >>> CausalEncoder(None, (2,), cut="both")
        Traceback (most recent call last):
        ...
        ValueError: CausalEncoder: cut='both'; expected 'right', 'left' or 'refuse'.
    """

    tokenizer: Tokenizer | Any
    end_tokens: tuple[int, ...]
    bos_token: int | None = None
    template: ChatTemplate | None = None
    max_length: int = 512
    cut: str = "right"

    def __post_init__(self) -> None:
        if self.cut not in ("right", "left", "refuse"):
            raise ValueError(f"CausalEncoder: cut={self.cut!r}; expected 'right', 'left' or 'refuse'.")
        if self.max_length < 2 or not self.end_tokens:
            raise ValueError(
                f"CausalEncoder: max_length={self.max_length}, end_tokens={self.end_tokens}; expected at least two "
                "tokens and one end token."
            )

    def encode(self, example: Mapping[str, Any]) -> CausalExample:
        """Encodes one example of any form.

        Args:
            example: with `messages` (and `tools`), with `prompt` and `completion`, or with `text`.

        Returns:
            Its tokens; labels are at every assistant's turn with its end token, at the completion with its end
            token, or at the whole text.

        Raises:
            SubspaceError: a conversation without a template, or an example too long where cutting is refused.
        """
        if "messages" in example:
            tokens, labels = self._conversation(example["messages"], example.get("tools"))
        else:
            prompt = self.prompt(example["prompt"]) if "prompt" in example else self._start()
            written = self._ids(example["completion"] if "prompt" in example else example["text"])
            written.append(self.end_tokens[0])
            tokens, labels = prompt + written, [False] * len(prompt) + [True] * len(written)
        return self._cut(np.array(tokens, np.int32), np.array(labels, bool))

    def prompt(self, prompt: str | Sequence[Mapping[str, Any]], *, tools: Any = None) -> list[int]:
        """Returns the token ids of a prompt, or of a conversation that waits for an answer.

        Args:
            prompt: text, or messages.
            tools: of a conversation; see `ChatTemplate.render`.

        Raises:
            SubspaceError: a conversation without a template.
        """
        if isinstance(prompt, str):
            return self._start() + self._ids(prompt)
        text = self._template().render(prompt, add_generation_prompt=True, tools=tools)
        return self._with_one_bos(self._ids(text))

    def _start(self) -> list[int]:
        return [] if self.bos_token is None else [self.bos_token]

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def _template(self) -> ChatTemplate:
        if self.template is None:
            raise SubspaceError("conversations need a chat template, which this model has not; name one.")
        return self.template

    def _with_one_bos(self, tokens: list[int]) -> list[int]:
        """A template may write the first token itself; it must be there once either way."""
        starts = self.bos_token is None or tokens[:1] == [self.bos_token]
        return tokens if starts else [*self._start(), *tokens]

    def _conversation(self, messages: Sequence[Mapping[str, Any]], tools: Any) -> tuple[list[int], list[bool]]:
        text, spans = self._template().spans(messages, tools=tools)
        encoding = self.tokenizer.encode(text, add_special_tokens=False)
        labels = np.zeros(len(encoding.ids), bool)
        starts = np.array([start for start, _ in encoding.offsets])
        ends = np.array([end for _, end in encoding.offsets])
        for start, end in spans:
            labels |= (starts >= start) & (starts < end) & (ends > start)
        tokens = self._with_one_bos(list(encoding.ids))
        return tokens, [False] * (len(tokens) - len(labels)) + labels.tolist()

    def _cut(self, tokens: np.ndarray, labels: np.ndarray) -> CausalExample:
        over = len(tokens) - self.max_length
        if over > 0 and self.cut == "refuse":
            raise SubspaceError(
                f"{len(tokens)} tokens, at most {self.max_length} are allowed: raise the maximum length, or choose a "
                "side to cut."
            )
        if over > 0:
            keep = slice(None, self.max_length) if self.cut == "right" else slice(over, None)
            first = self._start() if self.cut == "left" else []
            tokens, labels = tokens[keep].copy(), labels[keep].copy()
            tokens[: len(first)] = first
            labels[: len(first)] = False
        if len(labels):
            labels[0] = False
        written = np.flatnonzero(labels)
        ended = bool(len(written)) and int(tokens[written[-1]]) in self.end_tokens
        return CausalExample(tokens, labels, ended, max(over, 0))
