import pytest

from ..eight_devices import all_ok, run_on_8_devices
from .methods import SHARDED


@pytest.mark.slow
def test_every_method_gives_the_same_on_8_devices_and_traces_once():
    lines, output = run_on_8_devices(__file__)
    assert lines == all_ok(SHARDED), output
