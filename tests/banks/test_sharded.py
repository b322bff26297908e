"""Banks and bottleneck modules on a mesh give what they give on one device."""

from tests.eight_devices import KINDS, run_on_8_devices


def test_on_8_devices():
    lines, output = run_on_8_devices(__file__)
    cases = ("bank", "sequential", "parallel", "modules")
    assert set(lines) == {"auto: split bank", *(f"{kind}: {name}" for kind in KINDS for name in cases)}, output
    assert len(lines) == 2 * len(cases) + 1, output
