"""Finds carried files without importing any of the carrier's code."""

import importlib.metadata
import json
import os
import pathlib
import sys
from collections.abc import Iterator

from subspace_jax.assets._registry import Asset, get_asset

MANIFEST = "subspace_jax_asset.json"
_CACHE_VARIABLE = "SUBSPACE_JAX_CACHE"


class AssetMissingError(FileNotFoundError):
    """A carrier package, or a file that it should hold, is not on this machine."""


def cache_folder(cache: str | os.PathLike[str] | None = None) -> pathlib.Path:
    """Returns the folder that holds fetched assets and prepared datasets; it need not exist.

    Args:
        cache: the folder itself, if the caller has one; otherwise the environment variable
            `SUBSPACE_JAX_CACHE` decides, otherwise the user's cache folder.

    Returns:
        The absolute path.

    Example:
        >>> cache_folder("somewhere").name
        'somewhere'
    """
    chosen = cache or os.environ.get(_CACHE_VARIABLE)
    if chosen:
        return pathlib.Path(chosen).expanduser().absolute()
    if sys.platform == "win32":
        base = pathlib.Path(os.environ.get("LOCALAPPDATA") or pathlib.Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = pathlib.Path.home() / "Library" / "Caches"
    else:
        base = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
    return base / "subspace_jax"


def unpacked_folder(asset: Asset, cache: str | os.PathLike[str] | None = None) -> pathlib.Path:
    """Returns the folder of the cache that belongs to an asset; it need not exist.

    Args:
        asset: the table's entry.
        cache: see `cache_folder`.

    Returns:
        `cache/<name>-<version>`.
    """
    return cache_folder(cache) / f"{asset.name}-{asset.version}"


def is_fetched(asset: Asset, cache: str | os.PathLike[str] | None = None) -> bool:
    """Tells whether the cache holds an asset whose recorded hash is the one pinned now.

    Args:
        asset: the table's entry.
        cache: see `cache_folder`.

    Returns:
        True if it does.
    """
    try:
        manifest = json.loads((unpacked_folder(asset, cache) / MANIFEST).read_text(encoding="utf8"))
    except (OSError, ValueError):
        return False
    return isinstance(manifest, dict) and manifest.get("sha256") == asset.sha256


def _distribution(asset: Asset, cache: str | os.PathLike[str] | None) -> importlib.metadata.Distribution | None:
    if asset.registry != "pypi-wheel":
        return None  # an installed sdist has lost its data files
    path = [str(cache_folder(cache)), *sys.path]
    found = importlib.metadata.Distribution.discover(name=asset.package, path=path)
    # Another version may hold other data, or none.
    return next((d for d in found if d.version == asset.version), None)


def _missing(asset: Asset, why: str) -> AssetMissingError:
    return AssetMissingError(
        f"{why}. Fetch it ({asset.size / 1e6:.1f} MB, {asset.purpose}) with: python -m experiments fetch {asset.name}"
    )


def asset_folder(name: str, *, cache: str | os.PathLike[str] | None = None) -> pathlib.Path:
    """Returns the folder that holds an asset's files.

    Looked for in this order: the cache, the place where the system's package manager puts it, packages
    installed at the pinned version in the cache folder (`pip install --target`) or the environment. Nothing
    of the package is imported.

    Args:
        name: short name of the asset, or its package's name.
        cache: see `cache_folder`.

    Returns:
        The folder. For an installed Python package this is the site folder, which holds other packages too.

    Raises:
        UnknownAssetError: no asset has this name.
        AssetMissingError: it is nowhere; the message has the command that fetches it.
    """
    asset = get_asset(name)
    if is_fetched(asset, cache):
        return unpacked_folder(asset, cache)
    if asset.installed_at and pathlib.Path(asset.installed_at).is_dir():
        return pathlib.Path(asset.installed_at)
    distribution = _distribution(asset, cache)
    if distribution is not None:
        return pathlib.Path(str(distribution.locate_file("")))
    raise _missing(asset, f"asset {asset.name!r} (package {asset.package} {asset.version}) is not here")


def _files(asset: Asset, cache: str | os.PathLike[str] | None) -> Iterator[pathlib.Path]:
    folder = asset_folder(asset.name, cache=cache)
    distribution = None
    if folder not in (unpacked_folder(asset, cache), pathlib.Path(asset.installed_at or "")):
        distribution = _distribution(asset, cache)
    if distribution is None:
        yield from (path for path in sorted(folder.rglob("*")) if path.is_file())
    else:
        yield from (pathlib.Path(str(file.locate())) for file in sorted(distribution.files or ()))


def find_files(name: str, suffix: str, *, cache: str | os.PathLike[str] | None = None) -> list[pathlib.Path]:
    """Returns the asset's files whose path, written with `/`, ends with a suffix, sorted.

    Args:
        name: short name of the asset, or its package's name.
        suffix: end of the path, such as `model/tokenizer.json` or `.mo`.
        cache: see `cache_folder`.

    Returns:
        The paths, at least one.

    Raises:
        UnknownAssetError: no asset has this name.
        AssetMissingError: the asset is not here, or holds no such file.
    """
    asset = get_asset(name)
    found = [path for path in _files(asset, cache) if path.as_posix().endswith(suffix)]
    if not found:
        folder = asset_folder(asset.name, cache=cache)
        raise _missing(asset, f"asset {asset.name!r} in {folder} holds no file that ends with {suffix!r}")
    return found


def find_file(name: str, suffix: str, *, cache: str | os.PathLike[str] | None = None) -> pathlib.Path:
    """Returns the one file of an asset whose path, written with `/`, ends with a suffix.

    Args:
        name: short name of the asset, or its package's name.
        suffix: end of the path, such as `model/tokenizer.json`.
        cache: see `cache_folder`.

    Returns:
        The path of the file.

    Raises:
        UnknownAssetError: no asset has this name.
        AssetMissingError: the asset is not here, or holds no such file.
        ValueError: several files fit.
    """
    found = find_files(name, suffix, cache=cache)
    if len(found) > 1:
        shown = ", ".join(path.as_posix() for path in found[:3])
        raise ValueError(
            f"asset {name!r}: {len(found)} files end with {suffix!r} ({shown}, ...); give more of the path"
        )
    return found[0]


def is_available(name: str, *, cache: str | os.PathLike[str] | None = None) -> bool:
    """Tells whether an asset's files are on this machine.

    Args:
        name: short name of the asset, or its package's name.
        cache: see `cache_folder`.

    Returns:
        True if `asset_folder` would find it.

    Raises:
        UnknownAssetError: no asset has this name.
    """
    try:
        asset_folder(name, cache=cache)
    except AssetMissingError:
        return False
    return True
