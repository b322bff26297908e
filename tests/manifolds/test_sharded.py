import pytest

from ..eight_devices import run_on_8_devices


@pytest.mark.slow
@pytest.mark.parametrize("axes", ["auto", "explicit"])
def test_every_manifold_gives_the_same_on_8_devices(axes):
    lines, output = run_on_8_devices(__file__, axes)
    assert lines == ["Stiefel: ok", "Grassmann: ok", "SpecialOrthogonal: ok"], output
