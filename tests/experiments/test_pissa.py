import json
from types import SimpleNamespace

import pytest

from experiments.low_rank import pissa

SMALL = pissa.PissaConfig(steps=60, rates=(1e-3, 1e-2), seeds=(0,), quantized_size=64, quantized_rank=4)
QUIET = SimpleNamespace(track=lambda items, description: items)


@pytest.mark.slow
def test_what_is_claimed_holds_in_a_small_setting():
    results = {**pissa.run(SMALL, QUIET), "config": {"quantized_steps": SMALL.quantized_steps}}
    json.dumps(results)
    assert all(held for held in results["checks"].values() if isinstance(held, bool)), results["checks"]
    counts = {r["method"]: r["adapter_values"] for r in results["runs"]}
    assert counts["pissa"] == counts["lora"] == 8 * (64 + 128 + 128 + 128)
    assert len(results["runs"]) == 5 * len(SMALL.rates)
    table = pissa.rows(results)
    assert {len(row) for row in table} == {len(table[0])}
