import numpy as np
import pytest

from subspace_jax import data
from tests.tolerances import tolerance


def test_unknown_task_lists_the_known_ones(cache):
    with pytest.raises(ValueError, match=r"'heat'; there are darcy16, darcy32, burgers"):
        data.load_operator_task("heat")


@pytest.mark.carried
def test_darcy_on_two_grids(need, tfds, tmp_path):
    need("neuraloperator")
    coarse = data.load_operator_task("darcy16", data_dir=tmp_path)
    assert len(coarse["train"]) + len(coarse["validation"]) == 1_000
    assert coarse["test"].inputs.shape == coarse["test"].outputs.shape == (50, 16, 16)
    fine = data.load_operator_task("darcy32", data_dir=tmp_path)
    assert list(fine.splits) == ["test"]
    assert fine["test"].outputs.shape == (50, 32, 32)
    assert coarse["train"].inputs.dtype == coarse["train"].outputs.dtype == np.float32


@pytest.mark.carried
def test_burgers_pairs_stay_together(need, tfds, tmp_path):
    need("neuraloperator")
    task = data.load_operator_task("burgers", data_dir=tmp_path, train_size=100)
    assert len(task["train"]) == 100
    for batch in task.batches("train", 25, seed=1):
        assert batch["outputs"].shape == (25, 17, 16)
        np.testing.assert_allclose(batch["outputs"][:, 0], batch["inputs"], rtol=tolerance())
