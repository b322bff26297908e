import json
from types import SimpleNamespace

import pytest

from experiments.low_rank import pissa

SMALL = pissa.PissaConfig(pretraining_steps=600, seeds=(0,), quantized_size=64, quantized_rank=4)
QUIET = SimpleNamespace(track=lambda items, description: items)


@pytest.mark.slow
def test_every_claim_holds_in_a_small_setting():
    results = pissa.run(SMALL, QUIET)
    json.dumps(results)
    assert all(held for name, held in results["checks"].items() if isinstance(held, bool)), results["checks"]
    methods = results["convergence"]["methods"]
    assert methods["pissa"]["trainable"] == methods["lora"]["trainable"] == 8 * (64 + 128 + 128 + 128)
    assert methods["full"]["accuracy"]["mean"] > methods["pissa"]["accuracy"]["mean"]
    assert results["convergence"]["zero_shot_accuracy"]["mean"] < 0.3
    table = pissa.rows(results)
    assert {len(row) for row in table} == {len(table[0])}
