from types import SimpleNamespace

import numpy as np
import pytest

from subspace_jax.data._labels import read_labels


def info(**features):
    return SimpleNamespace(features=features)


def test_class_labels_keep_their_names_and_hidden_splits_are_left_out():
    values = {"train": [0, 2, 1], "test": [-1, -1]}
    arrays, names = read_labels("x", info(y=SimpleNamespace(names=["a", "b", "c"])), "y", values)
    assert set(arrays) == {"train"}
    assert arrays["train"].dtype == np.int32
    assert arrays["train"].tolist() == [0, 2, 1]
    assert names == ("a", "b", "c")


def test_bare_integers_are_named_by_number():
    arrays, names = read_labels("x", info(y=object()), "y", {"train": [0, 1], "test": [3]})
    assert names == ("0", "1", "2", "3")
    assert arrays["test"].tolist() == [3]


def test_strings_are_sorted_over_all_splits():
    arrays, names = read_labels("x", info(y=object()), "y", {"train": [b"no", b"yes"], "test": [b"maybe"]})
    assert names == ("maybe", "no", "yes")
    assert arrays["train"].tolist() == [1, 2]


def test_ratings_stay_real():
    arrays, names = read_labels("x", info(y=object()), "y", {"train": [0.5, -2.0]})
    assert names == ()
    assert arrays["train"].dtype == np.float32
    assert arrays["train"].tolist() == [0.5, -2.0]


def test_labels_of_another_kind_are_refused():
    with pytest.raises(ValueError, match=r"'x', split 'train': feature 'y'.*shape \(2,\)"):
        read_labels("x", info(y=object()), "y", {"train": [[1, 2], [3, 4]]})
    with pytest.raises(ValueError, match="negative label"):
        read_labels("x", info(y=object()), "y", {"train": [0, -2]})
    with pytest.raises(ValueError, match="none at all"):
        read_labels("x", info(y=object()), "y", {"train": [-1, -1]})
