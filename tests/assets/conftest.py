import dataclasses
import hashlib
import io
import zipfile

import pytest

from subspace_jax import assets
from subspace_jax.assets import _registry


@pytest.fixture
def wheel_bytes():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("carrier/data/train.csv", "1,2\n")
        archive.writestr("carrier/data/test.csv", "3,4\n")
        archive.writestr("carrier/__init__.py", "raise RuntimeError('imported')\n")
        archive.writestr("carrier-1.0.dist-info/METADATA", "Name: carrier\nVersion: 1.0\n")
    return buffer.getvalue()


@pytest.fixture
def fake_asset(wheel_bytes, monkeypatch):
    """A table of one small asset in place of the real one."""
    asset = assets.Asset(
        name="fake",
        registry="pypi-wheel",
        package="subspace-jax-fake-carrier",
        version="1.0",
        sha256=hashlib.sha256(wheel_bytes).hexdigest(),
        filename="subspace_jax_fake_carrier-1.0-py3-none-any.whl",
        size=len(wheel_bytes),
        license="none",
        purpose="two tables",
    )
    monkeypatch.setattr(_registry, "ASSETS", {"fake": asset})
    monkeypatch.setattr(_registry, "GROUPS", {})
    return asset


@pytest.fixture
def deliver(wheel_bytes):
    """A download function that writes the archive and counts its calls."""

    def download(asset, folder):
        download.calls += 1
        archive = folder / asset.filename
        archive.write_bytes(wheel_bytes)
        return archive

    download.calls = 0
    return download


@pytest.fixture
def change(fake_asset, monkeypatch):
    """Replaces fields of the fake asset in the table."""

    def changed(**fields):
        asset = dataclasses.replace(fake_asset, **fields)
        monkeypatch.setattr(_registry, "ASSETS", {"fake": asset})
        return asset

    return changed
