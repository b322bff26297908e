"""tfds builders over the packaged datasets: one configuration for each entry of the table of sources.

Importing this module needs tensorflow-datasets; nothing else in the package imports it before it is used.
Prepare with `file_format="array_record"`, the only format here that needs no TensorFlow.
"""

import abc
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from subspace_jax.data._records import SPLITS, PairRecord, TextRecord, split_of
from subspace_jax.data._sources import (
    IMAGE_SOURCES,
    OPERATOR_SOURCES,
    PAIR_SOURCES,
    RECORDS_VERSION,
    TEXT_SOURCES,
    ImageSource,
    OperatorSource,
    PairSource,
    Source,
    TextSource,
)

Example = dict[str, Any]


def _configs(sources: Mapping[str, Source]) -> list[tfds.core.BuilderConfig]:
    return [tfds.core.BuilderConfig(name=s.name, description=s.description) for s in sources.values()]


class _PackagedBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """What the packaged builders share: splits that are filled by one reading of the source."""

    VERSION = tfds.core.Version(RECORDS_VERSION)

    def _config_name(self) -> str:
        return self.builder_config.name if self.builder_config else ""

    @abc.abstractmethod
    def _source(self) -> Any: ...

    @abc.abstractmethod
    def _examples(self) -> Iterator[tuple[str, Example]]:
        """Yields the split and the features of every record."""

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[str, Example]]]:
        filled: dict[str, list[Example]] = {}
        for split, example in self._examples():
            filled.setdefault(split, []).append(example)
        return {split: self._generate_examples(filled[split]) for split in SPLITS if split in filled}

    def _generate_examples(self, examples: list[Example]) -> Iterator[tuple[str, Example]]:
        for index, example in enumerate(examples):
            yield f"{index:06d}", example

    def _dataset_info(self, features: Mapping[str, Any], keys: tuple[str, str]) -> Any:
        return tfds.core.DatasetInfo(
            builder=self,
            description=self._source().description,
            features=tfds.features.FeaturesDict(features),
            supervised_keys=keys,
        )


class PackagedText(_PackagedBuilder):
    """Texts with a class, or with a rating, from packages."""

    BUILDER_CONFIGS = _configs(TEXT_SOURCES)

    def _source(self) -> TextSource:
        return TEXT_SOURCES[self._config_name()]

    @functools.cached_property
    def _records(self) -> list[TextRecord]:
        return list(self._source().read())

    def _info(self) -> Any:
        source = self._source()
        if source.rated:
            label = tfds.features.Scalar(np.float32)
        else:
            label = tfds.features.ClassLabel(names=sorted({str(record.label) for record in self._records}))
        return self._dataset_info({"text": tfds.features.Text(), "label": label}, ("text", "label"))

    def _examples(self) -> Iterator[tuple[str, Example]]:
        split_of_text: dict[str, str] = {}
        for record in self._records:
            split = split_of(record.group, record.split)
            # Where the splits are ours, a text that two groups share stays in the first one's split.
            if record.split is not None or split_of_text.setdefault(record.text, split) == split:
                yield split, {"text": record.text, "label": record.label}


class PackagedImages(_PackagedBuilder):
    """Gray images with a class, from packages."""

    BUILDER_CONFIGS = _configs(IMAGE_SOURCES)

    def _source(self) -> ImageSource:
        return IMAGE_SOURCES[self._config_name()]

    def _info(self) -> Any:
        source = self._source()
        features = {
            "image": tfds.features.Tensor(shape=(source.side, source.side, 1), dtype=np.uint8),
            "label": tfds.features.ClassLabel(names=list(source.label_names)),
        }
        return self._dataset_info(features, ("image", "label"))

    def _examples(self) -> Iterator[tuple[str, Example]]:
        for index, record in enumerate(self._source().read()):
            split = split_of(f"{self._config_name()}/{index}", record.split)
            yield split, {"image": record.image, "label": record.label}


class PackagedOperators(_PackagedBuilder):
    """Pairs of functions on a grid, from packages."""

    BUILDER_CONFIGS = _configs(OPERATOR_SOURCES)

    def _source(self) -> OperatorSource:
        return OPERATOR_SOURCES[self._config_name()]

    def _info(self) -> Any:
        source = self._source()
        features = {
            "input": tfds.features.Tensor(shape=source.input_shape, dtype=np.float32),
            "output": tfds.features.Tensor(shape=source.output_shape, dtype=np.float32),
        }
        return self._dataset_info(features, ("input", "output"))

    def _examples(self) -> Iterator[tuple[str, Example]]:
        for index, record in enumerate(self._source().read()):
            split = split_of(f"{self._config_name()}/{index}", record.split)
            yield split, {"input": record.input, "output": record.output}


class PackagedPairs(_PackagedBuilder):
    """Images with captions, from packages."""

    BUILDER_CONFIGS = _configs(PAIR_SOURCES)

    def _source(self) -> PairSource:
        return PAIR_SOURCES[self._config_name()]

    @functools.cached_property
    def _records(self) -> list[PairRecord]:
        return list(self._source().read())

    def _info(self) -> Any:
        source = self._source()
        features = {
            "image": tfds.features.Tensor(shape=(source.side, source.side, 3), dtype=np.uint8),
            "text": tfds.features.Text(),
            "category": tfds.features.ClassLabel(names=list(source.category_names)),
            "topic": tfds.features.ClassLabel(names=sorted({record.topic for record in self._records})),
            "group": tfds.features.Text(),
        }
        return self._dataset_info(features, ("image", "text"))

    def _examples(self) -> Iterator[tuple[str, Example]]:
        for record in self._records:
            yield split_of(record.group), record._asdict()
