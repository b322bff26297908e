"""The catalogue is complete: what it names exists, is tested, is shown by an experiment and has a page."""

import inspect
from pathlib import Path

import pytest

import subspace_jax as sj
from experiments import runner
from subspace_jax.core import register
from tests.contract.methods import METHODS
from tests.merging.test_contract import MERGERS
from tests.modules.contract import MODULES
from tests.optim.contract import TRANSFORMATIONS

ROOT = Path(__file__).parents[2]
SOURCES = sj.catalogue()


@pytest.fixture(params=SOURCES, ids=lambda source: source.slug)
def source(request):
    return request.param


def test_names_exist_and_are_documented(source):
    namespace = getattr(sj.methods, source.slug)
    assert namespace.__name__ == source.module == f"subspace_jax.methods.{source.family}.{source.slug}"
    assert source.public
    for name in source.public:
        value = getattr(namespace, name)
        if inspect.isfunction(value) or inspect.isclass(value):
            assert value.__doc__, name
            assert value.__doc__.count("Source:") == 1, f"{source.slug}.{name} cites its publication once"
            assert source.title in value.__doc__
    for name in source.uses:
        assert callable(getattr(sj, name, None) or getattr(sj.optim, name))
    assert source.year > 2000
    assert source.authors


def test_has_a_test_an_experiment_and_a_page(source):
    tests = list((ROOT / "tests" / "methods" / source.family).glob(f"test_{source.slug}*.py"))
    assert any(path.stem == f"test_{source.slug}" for path in tests), (
        f"tests/methods/{source.family}/test_{source.slug}.py"
    )
    assert source.experiment in runner.names(), f"no experiment is called {source.experiment}"
    assert (ROOT / "docs" / "methods" / f"{source.slug}.md").exists(), "run `make tables`"


def test_every_home_registers():
    homes = set()
    for family in (ROOT / "subspace_jax" / "methods").iterdir():
        if family.is_dir() and family.name != "__pycache__":
            found = (p.stem if p.is_file() else p.name for p in family.iterdir())
            homes |= {name for name in found if not name.startswith("__")}
    assert homes == {source.slug for source in SOURCES}


def test_every_stand_in_is_in_the_battery_of_weights(source):
    """A function of a home that returns a `Method` is a case of the contract battery, or of that of modules."""
    tested = {name for case in (*METHODS, *MODULES) for name in case.factory.__code__.co_names}
    for name in source.public:
        value = getattr(getattr(sj.methods, source.slug), name)
        if inspect.isfunction(value) and value.__annotations__.get("return") == "Method":
            assert name in tested, f"{source.slug}.{name}: add a Case to the battery of weights or of modules"


def returns_a_transformation(value) -> bool:
    found = value.__annotations__.get("return", "") if inspect.isfunction(value) else ""
    return str(found).removeprefix("optax.").startswith("GradientTransformation")


def test_every_transformation_is_in_the_battery_of_transformations():
    """A public function that returns a gradient transformation is a case of that battery."""
    homes = [(f"methods.{s.slug}", getattr(sj.methods, s.slug)) for s in SOURCES] + [("optim", sj.optim)]
    public = {(where, n) for where, home in homes for n in home.__all__ if returns_a_transformation(getattr(home, n))}
    missing = sorted(f"{where}.{name}" for where, name in public if name not in TRANSFORMATIONS)
    assert not missing, f"add cases to tests/optim/contract.py: {missing}"


def test_every_merger_is_in_the_battery_of_mergers(source):
    """A public function of a merger that takes experts and gives one tree is a case of that battery."""
    for name in source.public if "merger" in source.kinds else ():
        value = getattr(getattr(sj.methods, source.slug), name)
        if inspect.isfunction(value) and value.__annotations__.get("return") == "Params":
            assert name in MERGERS, f"{source.slug}.{name}: add it to tests/merging/test_contract.py"


def test_entries_come_by_family_and_name():
    names = [(source.family, source.slug) for source in SOURCES]
    assert names == sorted(set(names))
    assert [s.slug for s in sj.catalogue("sparse")] == [
        "composable_sft",
        "lift",
        "mosa",
        "s2ft",
        "sara",
        "snell",
        "snella",
        "spt",
    ]


def test_bad_entries_are_refused():
    options = {"title": "T", "authors": "A", "year": 2024}
    with pytest.raises(ValueError, match="already has 'lora'"):
        register("subspace_jax.methods.low_rank.lora", kinds=("weight",), **options)
    with pytest.raises(ValueError, match="kinds="):
        register("subspace_jax.methods.low_rank.thing", kinds=("wait",), **options)  # pyright: ignore
    with pytest.raises(ValueError, match="registers from its home"):
        register("subspace_jax.weights._low_rank", kinds=("weight",), **options)
