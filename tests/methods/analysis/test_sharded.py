import pytest

from ...eight_devices import KINDS, run_on_8_devices


@pytest.mark.slow
def test_gist_scores_alike_on_8_devices():
    lines, output = run_on_8_devices(__file__)
    said = ("the same scores", "gradients stay with their examples")
    assert lines == [f"{kind}: {one}" for kind in KINDS for one in said], output
