"""Continues prompts with a run's adapter, many at once, to the trained end token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

import subspace_jax as sj
from subspace_jax.models import greedy_decode

from ._errors import UserError
from ._load_run import Run

Prompt = str | Sequence[Mapping[str, Any]]


class Writer:
    """Writes continuations; compiled once for each shape.

    Args:
      run: of a language model.
    """

    def __init__(self, run: Run) -> None:
        self._run, self.encoder = run, run.encoder()
        self._module: Any = run.backbone.model.module
        self._apply = sj.with_adapters(self._module.apply)

    def write(self, prompts: Sequence[Prompt], most: int) -> list[str]:
        """Continues prompts greedily; each as if it were alone.

        Args:
          prompts: texts, or conversations that wait for an answer.
          most: tokens to add at most.

        Returns:
          The continuations, without their end token.

        Raises:
          UserError: a prompt leaves no room in the model's context.
        """
        encoded = [self.encoder.prompt(prompt) for prompt in prompts]
        longest, context = max(map(len, encoded)), self._run.backbone.model.config.max_positions
        if not min(map(len, encoded)) or longest >= context:
            raise UserError(
                f"a prompt of {longest} tokens; expected 1 to {context - 1}, for the model reads {context}."
            )
        # A few lengths only, so that a conversation does not compile a program for every answer.
        length = min(context - 1, -(-longest // 32) * 32)
        most = min(most, context - length)
        tokens, mask = np.zeros((len(encoded), length), np.int32), np.zeros((len(encoded), length), bool)
        for row, ids in enumerate(encoded):
            tokens[row, length - len(ids) :] = ids
            mask[row, length - len(ids) :] = True
        found = greedy_decode(
            self._module,
            self._run.adapted,
            tokens,
            most,
            mask=mask,
            stop_token=self.encoder.end_tokens[0],
            apply=self._apply,
        )
        return [self._text(row) for row in np.asarray(found).tolist()]

    def _text(self, tokens: list[int]) -> str:
        ends = [i for i, token in enumerate(tokens) if token in self.encoder.end_tokens]
        return self.encoder.tokenizer.decode(tokens[: ends[0]] if ends else tokens)
