import numpy as np
import pytest

from subspace_jax.data._batches import batch_indices, epoch_order, subset


def test_order_is_a_permutation_given_by_seed_and_epoch():
    orders = {(seed, epoch): epoch_order(50, seed=seed, epoch=epoch) for seed in (0, 1) for epoch in (0, 1)}
    for order in orders.values():
        np.testing.assert_array_equal(np.sort(order), np.arange(50))
    assert len({tuple(order) for order in orders.values()}) == 4
    np.testing.assert_array_equal(orders[1, 0], epoch_order(50, seed=1, epoch=0))


def test_batches_cover_an_epoch_once():
    batches = list(batch_indices(11, 4, seed=3, epoch=2, drop_remainder=False))
    assert [len(batch) for batch in batches] == [4, 4, 3]
    np.testing.assert_array_equal(np.sort(np.concatenate(batches)), np.arange(11))
    full = list(batch_indices(11, 4, seed=3, epoch=2))
    np.testing.assert_array_equal(np.stack(full), np.stack(batches[:2]))


@pytest.mark.parametrize("start", [0, 1, 2])
def test_start_resumes_in_the_middle(start):
    whole = list(batch_indices(9, 4, seed=1, epoch=5))
    rest = list(batch_indices(9, 4, seed=1, epoch=5, start=start))
    assert [batch.tolist() for batch in rest] == [batch.tolist() for batch in whole[start:]]


def test_bad_sizes_are_refused():
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        batch_indices(5, 0)
    with pytest.raises(ValueError, match="5 examples fill no batch of 8"):
        batch_indices(5, 8)
    with pytest.raises(ValueError, match="start must be 0 to 2"):
        batch_indices(5, 2, start=3)


def test_draws_are_nested_and_bounded():
    small, large = subset(100, 10, seed=4, what="x"), subset(100, 40, seed=4, what="x")
    assert set(small) < set(large)
    assert len(set(large)) == 40
    np.testing.assert_array_equal(subset(5, None, seed=0, what="x"), np.arange(5))
    for wanted in (0, 101):
        with pytest.raises(ValueError, match=f"{wanted} examples asked of split 'train', which has 100"):
            subset(100, wanted, seed=0, what="split 'train'")
