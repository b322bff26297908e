"""Turns checked rows into the arrays of a model: tokens, labels, and what a user should know of every row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from subspace_jax.core import SubspaceError
from subspace_jax.data import DataError, Rows
from subspace_jax.models import TEMPLATES, CausalEncoder, CausalExample, ChatTemplate, encode_texts
from subspace_jax.training import pack_sequences

from ._backbone import Backbone
from ._errors import UserError
from ._examples import Examples
from ._options import FinetuneOptions

DEFAULT_LENGTH = 512
Encoded = list[tuple[int, CausalExample]]


def longest_allowed(options: FinetuneOptions, backbone: Backbone) -> int:
    """Returns the most tokens of an example.

    Raises:
      UserError: the user asks for more than the model takes.
    """
    config = backbone.model.config
    most = getattr(config, "longest", config.max_positions)
    if options.max_length is not None and options.max_length > most:
        raise UserError(f"--max-length {options.max_length}: --model {backbone.name} takes at most {most} tokens.")
    return options.max_length or min(most, DEFAULT_LENGTH)


def check_ids(tokens: np.ndarray, backbone: Backbone) -> None:
    """Refuses token ids that the embedding table has no row for; JAX would take the last row in silence.

    Raises:
      UserError: names the highest id and the table's rows.
    """
    rows = backbone.model.config.vocab_size
    if tokens.size and int(tokens.max()) >= rows:
        raise UserError(
            f"--model {backbone.name}: its tokenizer gives the id {int(tokens.max())}, and its embedding table has "
            f"{rows} rows. The tokenizer belongs to another model."
        )


def encode_classified(
    backbone: Backbone,
    rows: Rows,
    examples: Sequence[Mapping[str, Any]],
    index: Sequence[int],
    classes: tuple[Any, ...],
    length: int,
) -> Examples:
    """Returns the arrays of texts with labels.

    Args:
      backbone: the model.
      rows: of the file, for row numbers.
      examples: of the same rows, checked.
      index: which of them.
      classes: in the order of the logits.
      length: tokens of every row.

    Raises:
      DataError: labels that are none of the classes.
    """
    numbers = {label: number for number, label in enumerate(classes)}
    strange = [f"{rows.where(i)}: {examples[i]['label']!r}" for i in index if examples[i]["label"] not in numbers]
    if strange:
        raise DataError(f"{rows.source}: labels that training did not have ({', '.join(map(repr, classes))}):", strange)
    tokens, mask = encode_texts(backbone.tokenizer, [examples[i]["text"] for i in index], length)
    check_ids(tokens, backbone)
    arrays = {
        "tokens": tokens,
        "mask": mask,
        "labels": np.array([numbers[examples[i]["label"]] for i in index], np.int32),
        "counts": np.ones(len(index), bool),
    }
    details = tuple(
        {"row": rows.numbers[i], "tokens": int(m.sum()), "label": examples[i]["label"]}
        for i, m in zip(index, mask, strict=True)
    )
    return Examples(arrays, tuple((rows.numbers[i],) for i in index), details)


def causal_encoder(options: FinetuneOptions, backbone: Backbone, length: int) -> CausalEncoder:
    """Returns how texts become tokens: with the model's own template, a named one, or one from a file.

    Raises:
      UserError: the file cannot be read.
    """
    form = backbone.text_format
    source, name = form.chat_template, f"the template of {backbone.name}"
    if options.template is not None and options.template in TEMPLATES:
        source, name = TEMPLATES[options.template], f"the template {options.template!r}"
    elif options.template is not None:
        name = options.template
        try:
            source = Path(name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            known = ", ".join(TEMPLATES)
            raise UserError(f"--template {name}: neither one of {known} nor a readable file: {error}") from error
    elif source is None:
        source, name = TEMPLATES["plain"], "the template 'plain'"
    return CausalEncoder(
        backbone.tokenizer,
        form.end_tokens,
        form.bos_token,
        ChatTemplate(source, form.special_tokens, name),
        length,
        options.cut,
    )


def encode_causal(
    encoder: CausalEncoder, rows: Rows, examples: Sequence[Mapping[str, Any]], index: Sequence[int]
) -> tuple[Encoded, dict[str, list[int]]]:
    """Returns encoded examples with their row numbers, and the numbers of those that lost something in the cut.

    Raises:
      DataError: examples that cannot be encoded, or none that teaches anything.
    """
    kept, bad = [], []
    lost: dict[str, list[int]] = {"cut_rows": [], "unended_rows": [], "empty_rows": []}
    for i in index:
        number = rows.numbers[i]
        try:
            example = encoder.encode(examples[i])
        except SubspaceError as error:
            bad.append(f"{rows.where(i)}: {error}")
            continue
        if example.cut:
            lost["cut_rows"].append(number)
        if not example.labels.any():
            lost["empty_rows"].append(number)
            continue
        if not example.ended:
            lost["unended_rows"].append(number)
        kept.append((number, example))
    if bad:
        raise DataError(f"{rows.source}: {len(bad)} examples cannot be encoded:", bad)
    if not kept:
        raise DataError(f"{rows.source}: no example has a token left to learn after the cut; raise --max-length.")
    return kept, lost


def arrange(backbone: Backbone, examples: Encoded, length: int, *, pack: bool) -> Examples:
    """Returns the arrays of encoded examples, one or several in a row."""
    packed = pack_sequences([e.tokens for _, e in examples], [e.labels for _, e in examples], length, pack=pack)
    numbers = [number for number, _ in examples]
    details = tuple(
        {"row": number, "tokens": len(e.tokens), "labels": _runs(e.labels), "cut": e.cut} for number, e in examples
    )
    check_ids(packed.tokens, backbone)
    arrays = {"tokens": packed.tokens, "labels": packed.labels, "segments": packed.segments}
    return Examples(arrays, tuple(tuple(numbers[i] for i in row) for row in packed.members), details)


def _runs(labels: np.ndarray) -> list[list[int]]:
    """Starts and ends of the runs of labels, short to write and easy to read."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], labels.astype(np.int8), [0]])))
    return edges.reshape(-1, 2).tolist()


def round_up(length: int, multiple: int = 8) -> int:
    """Returns the next multiple: a few lengths only, and ones that processors like."""
    return -(-length // multiple) * multiple


def encode_examples(
    options: FinetuneOptions,
    backbone: Backbone,
    rows: Rows,
    examples: Sequence[Mapping[str, Any]],
    classes: tuple[Any, ...],
) -> Examples:
    """Returns the arrays of all rows of a file, as training would have made them.

    Raises:
      DataError: rows that cannot be encoded, or labels that training did not have.
    """
    most, index = longest_allowed(options, backbone), range(len(rows))
    if classes:
        return encode_classified(backbone, rows, examples, index, classes, most)
    encoder = causal_encoder(options, backbone, most)
    found, _ = encode_causal(encoder, rows, examples, index)
    length = min(most, round_up(max(len(example.tokens) for _, example in found)))
    return arrange(backbone, found, length, pack=options.pack)
