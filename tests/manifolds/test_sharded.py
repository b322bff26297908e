import pytest

from ..eight_devices import all_ok, run_on_8_devices
from .sharded import SPACES


@pytest.mark.slow
def test_every_manifold_gives_the_same_on_8_devices():
    lines, output = run_on_8_devices(__file__)
    assert lines == all_ok(SPACES), output
