import pytest

from ..eight_devices import run_on_8_devices
from .contract import CASES


@pytest.mark.slow
@pytest.mark.parametrize("axes", ["auto", "explicit"])
def test_every_transformation_gives_the_same_on_8_devices_and_traces_once(axes):
    lines, output = run_on_8_devices(__file__, axes)
    assert lines == [f"{case.name}: ok" for case in CASES if not case.variant], output
