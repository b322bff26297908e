import re
from pathlib import Path

import subspace_jax as sj

PAGE = Path(__file__).parents[2] / "docs" / "merging.md"


def test_snippets_run_one_after_the_other():
    names: dict = {}
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    assert len(blocks) == 5
    for block in blocks:
        exec(compile(block, "docs/merging.md", "exec"), names)
    assert type(names["dare_ties"]["w"]).__name__ == "Full"
    assert names["knots_ties"]["w"].rank == 6
    assert isinstance(names["again"]["w"], sj.core.Weight) or names["again"]["w"].shape == (16, 12)
