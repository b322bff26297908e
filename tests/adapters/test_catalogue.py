import pytest

import subspace_jax as sj
from subspace_jax.adapters import _catalogue


def test_every_entry_names_functions_of_the_public_face():
    for source in sj.catalogue():
        assert source.public, source.name
        for name in source.public:
            assert callable(getattr(sj, name)), f"{source.name}: sj.{name}"
            assert getattr(sj, name).__doc__
        assert source.title
        assert source.authors
        assert source.claim.endswith(".")
        assert source.year > 2000


def test_entries_come_by_name():
    names = [source.name for source in sj.catalogue()]
    assert names == sorted(set(names))
    assert {"lora", "pissa", "dora"} <= set(names)


def test_a_name_is_taken_once():
    with pytest.raises(ValueError, match="already has 'lora'"):
        _catalogue.register(next(s for s in sj.catalogue() if s.name == "lora"))
