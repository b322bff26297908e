import pytest

import subspace_jax as sj

from ..eight_devices import all_ok, run_on_8_devices


@pytest.mark.slow
def test_every_manifold_gives_the_same_on_8_devices():
    lines, output = run_on_8_devices(__file__)
    spaces = (sj.manifolds.Stiefel(), sj.manifolds.Grassmann(), sj.manifolds.SpecialOrthogonal())
    assert lines == all_ok(spaces), output
