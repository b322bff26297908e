"""Prepares packaged datasets once, and opens prepared ones."""

import contextlib
import importlib
import os
import pathlib
import sys
import tempfile
from typing import Any

from subspace_jax.assets import asset_folder, cache_folder
from subspace_jax.data._sources import (
    IMAGE_SOURCES,
    OPERATOR_SOURCES,
    PAIR_SOURCES,
    RECORDS_VERSION,
    TEXT_SOURCES,
    ImageSource,
    PairSource,
    Source,
    TextSource,
)
from subspace_jax.data._tfds import import_tfds

PACKAGED_IMAGES = "packaged_images"


def packaged_source(name: str) -> Source | None:
    """Returns the table's entry of a packaged dataset, None if there is none of this name."""
    tables = (TEXT_SOURCES, IMAGE_SOURCES, OPERATOR_SOURCES, PAIR_SOURCES)
    return next((table[name] for table in tables if name in table), None)


def _builder_name(source: Source) -> tuple[str, str]:
    """Returns the builder's class and its tfds name."""
    if isinstance(source, TextSource):
        return "PackagedText", "packaged_text"
    if isinstance(source, ImageSource):
        return "PackagedImages", PACKAGED_IMAGES
    if isinstance(source, PairSource):
        return "PackagedPairs", "packaged_pairs"
    return "PackagedOperators", "packaged_operators"


def prepared_folder(name: str, data_dir: str | os.PathLike[str] | None = None) -> pathlib.Path:
    """Returns the folder of a prepared packaged dataset; it need not exist.

    Args:
        name: name of a packaged dataset.
        data_dir: tfds folder; `tfds` in the cache folder if None.

    Returns:
        The absolute path.

    Raises:
        ValueError: there is no such packaged dataset.
    """
    source = packaged_source(name)
    if source is None:
        known = [*TEXT_SOURCES, *IMAGE_SOURCES, *OPERATOR_SOURCES, *PAIR_SOURCES]
        raise ValueError(f"no packaged dataset is called {name!r}; there are {', '.join(known)}")
    root = pathlib.Path(data_dir).expanduser().absolute() if data_dir else cache_folder() / "tfds"
    return root / _builder_name(source)[1] / name / RECORDS_VERSION


def prepare(name: str, *, data_dir: str | os.PathLike[str] | None = None) -> pathlib.Path:
    """Writes a packaged dataset as a tfds dataset of array records, unless that has been done.

    It is written beside its place and renamed, so that an interruption leaves no half dataset and two
    processes that prepare it at once do not disturb each other.

    Args:
        name: one of `text_tasks()`, `image_tasks()`, `operator_tasks()`, `pair_tasks()`.
        data_dir: tfds folder; `tfds` in the cache folder if None.

    Returns:
        The folder of the prepared dataset, for `tfds.builder_from_directory`.

    Raises:
        ValueError: there is no such packaged dataset.
        AssetMissingError: the package that carries it is not here.
        ImportError: the `tfds` extra is not installed.
    """
    folder = prepared_folder(name, data_dir)
    source = packaged_source(name)
    if source is None or (folder / "dataset_info.json").exists():
        return folder
    if source.asset is not None:
        asset_folder(source.asset)
    import_tfds()
    builders = importlib.import_module("subspace_jax.data._builders")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".prepare-", dir=folder.parent) as staging:
        builder = getattr(builders, _builder_name(source)[0])(config=name, data_dir=staging, file_format="array_record")
        # tfds reports on standard output, which belongs to the caller.
        with contextlib.redirect_stdout(sys.stderr):
            builder.download_and_prepare()
        try:
            pathlib.Path(builder.data_path).rename(folder)
        except OSError:
            if not (folder / "dataset_info.json").exists():
                raise
            # Another process was faster, with the same records.
    return folder


def open_dataset(name: str, data_dir: str | os.PathLike[str] | None = None) -> tuple[Any, dict[str, Any]]:
    """Opens a packaged dataset, preparing it if need be, or any dataset that tfds finds prepared.

    Where both have a name, the one in the caller's `data_dir` comes first.

    Args:
        name: name of a packaged dataset, or a tfds name such as `glue/sst2`.
        data_dir: tfds folder.

    Returns:
        The dataset's tfds info and its random-access data source per split.

    Raises:
        AssetMissingError: a packaged dataset's package is not here.
        ImportError: the `tfds` extra is not installed.
        ValueError: tfds does not know the dataset, or it is not prepared as array records.
    """
    users_own = data_dir is not None and (pathlib.Path(data_dir).expanduser() / name).is_dir()
    if packaged_source(name) is not None and not users_own:
        folder = prepare(name, data_dir=data_dir)
        builder = import_tfds().builder_from_directory(str(folder))
    else:
        builder = _prepared_builder(name, data_dir)
    return builder.info, dict(builder.as_data_source())


def _prepared_builder(name: str, data_dir: str | os.PathLike[str] | None) -> Any:
    tfds = import_tfds()
    mend = (
        f"prepare it with tfds.builder({name!r}, data_dir=..., file_format='array_record')."
        "download_and_prepare() and pass the same data_dir"
    )
    known = ", ".join((*TEXT_SOURCES, *IMAGE_SOURCES))
    where = f" in {os.fspath(data_dir)}" if data_dir else ""
    try:
        builder = tfds.builder(name, data_dir=os.fspath(data_dir) if data_dir else None)
    except tfds.core.DatasetNotFoundError as error:
        raise ValueError(
            f"{name!r} is neither packaged ({known}) nor known to tfds or prepared{where}; {mend}"
        ) from error
    if not builder.is_prepared():
        raise ValueError(f"dataset {name!r} is not prepared{where}; {mend}")
    file_format = builder.info.file_format
    if file_format is not None and file_format.value == "tfrecord":
        raise ValueError(f"dataset {name!r} is prepared as tfrecord, which needs TensorFlow; {mend}")
    return builder
