"""Training on 8 host devices, as fsdp x tensor layouts, is training on one."""

import pytest

from ..eight_devices import run_on_8_devices


@pytest.mark.parametrize("axes", ["auto", "explicit"])
def test_training_on_8_devices_is_training_on_one(axes):
    lines, output = run_on_8_devices(__file__, axes)
    assert len(lines) == 4, output
    assert all(line.endswith(": ok") for line in lines), output
