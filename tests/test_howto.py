"""Every block of the how-to pages runs, one after the other."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"


@pytest.mark.parametrize("name", ["beyond-the-weight.md"])
def test_the_blocks_of_a_page_run(name):
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / name).read_text(), flags=re.DOTALL)
    assert len(blocks) > 3
    names: dict = {}
    for block in blocks:
        exec(compile(block, name, "exec"), names)
