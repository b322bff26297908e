"""Banks and bottleneck modules on a mesh give what they give on one device."""

import pytest

from tests.eight_devices import run_on_8_devices


@pytest.mark.parametrize("axes", ["auto", "explicit"])
def test_on_8_devices(axes):
    lines, output = run_on_8_devices(__file__, axes)
    more = ["split bank"] if axes == "auto" else []
    assert lines == ["bank", "sequential", "parallel", *more, "modules"], output
