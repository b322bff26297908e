import pytest

from ...eight_devices import run_on_8_devices


@pytest.mark.slow
@pytest.mark.parametrize("axes", ["auto", "explicit"])
def test_gist_scores_alike_on_8_devices(axes):
    lines, output = run_on_8_devices(__file__, axes)
    assert lines == ["the same scores", "gradients stay with their examples"], output
