"""Messages of Django in twelve languages on SmolLM2; it knew English."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import jax
import numpy as np

from experiments.tasks.league._job import Batch, Job, whole


class CausalJob(Job):
    """The next token of interface messages in twelve languages; what it knew is the next token of English reviews.

    Args:
      steps: optimizer steps of a run.
      batch_size: messages of a step.
      length: tokens of a message.
      train_size: training messages.
      test_size: messages of the validation and of the test split, each.
      layers: of the model; fewer are for tests.
    """

    name, known = "causal", "English (next token of film reviews)"
    kernels = "decoder/**/kernel"
    outputs, downs = "decoder/**/attention/output/kernel", "decoder/**/down/kernel"
    scope = ""  # no layer has a bias
    head = MappingProxyType({})

    def __init__(
        self, *, steps: int, batch_size: int, length: int, train_size: int, test_size: int, layers: int | None = None
    ) -> None:
        from subspace_jax.data import load_text_task
        from subspace_jax.models import load_smollm2

        self.steps, self.batch_size = steps, batch_size
        smollm = load_smollm2(num_layers=layers)
        self.heads, self._module, self._params = smollm.config.num_heads, smollm.module, smollm.params
        self._tokenizer, self._length = smollm.load_tokenizer(), length
        size = whole(test_size)
        messages = load_text_task("languages_latin12", train_size=train_size, eval_size=size)
        reviews = load_text_task("rotten_tomatoes", train_size=size, eval_size=size)
        self.data = {split: self._tokens(messages[split].texts, split) for split in ("train", "validation", "test")}
        self.data["known"] = self._tokens(reviews["test"].texts, "known")

    def _tokens(self, texts: Any, split: str) -> dict[str, np.ndarray]:
        from subspace_jax.models import encode_texts

        count = len(texts) if split == "train" else whole(len(texts))
        tokens, mask = encode_texts(self._tokenizer, list(texts)[:count], self._length)
        return {"tokens": tokens, "mask": mask}

    def start(self, seed: int) -> Any:
        """Returns the pretrained parameters; nothing is drawn."""
        del seed
        return self._params

    def model(self, params: Any, batch: Batch) -> jax.Array:
        """Returns logits `[batch, length, vocabulary]`."""
        return self._module.apply({"params": params}, batch["tokens"])

    def targets(self, logits: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns logits of all tokens but the last, with the token that follows."""
        return logits[:, :-1], batch["tokens"][:, 1:], batch["mask"][:, 1:]

    def known_hits(self, params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Judges the next token of English."""
        return self.hits(params, batch)
