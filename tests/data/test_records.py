import subprocess
import sys

import numpy as np
import pytest

from subspace_jax.data._records import split_of

CHEAP = """
import sys, subspace_jax.data
heavy = {"tensorflow_datasets", "sklearn", "tokenizers", "PIL", "array_record"} & set(sys.modules)
assert not heavy, heavy
"""


def test_shares_of_the_splits():
    splits = np.array([split_of(f"group {i}") for i in range(20_000)])
    for split, share in (("train", 0.7), ("validation", 0.1), ("test", 0.2)):
        assert np.mean(splits == split) == pytest.approx(share, abs=0.01)


def test_official_split_is_kept_and_validation_taken_from_train():
    assert {split_of(f"{i}", "test") for i in range(500)} == {"test"}
    splits = np.array([split_of(f"{i}", "train") for i in range(20_000)])
    assert set(splits) == {"train", "validation"}
    assert np.mean(splits == "validation") == pytest.approx(0.1, abs=0.01)


def test_assignment_never_changes():
    # Prepared datasets and published numbers depend on it.
    splits = [split_of(f"film{i}") for i in range(4)]
    assert splits == ["train", "test", "train", "validation"]


def test_import_is_cheap():
    subprocess.run([sys.executable, "-c", CHEAP], check=True)
