"""Reads a user's data for a model: form, split, tokens and labels, with everything that a user should know of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from subspace_jax.data import (
    DataError,
    Rows,
    check_classes,
    check_form,
    find_form,
    read_rows,
    split_rows,
    unused_columns,
)

from ._backbone import Backbone
from ._encode import (
    arrange,
    causal_encoder,
    encode_causal,
    encode_classified,
    longest_allowed,
    round_up,
)
from ._errors import UserError
from ._examples import Prepared
from ._images import prepare_images
from ._options import FinetuneOptions


def prepare_data(options: FinetuneOptions, backbone: Backbone) -> Prepared:
    """Reads, checks, splits and encodes the data.

    Raises:
      UserError: the data does not fit the model, or an option does not fit the data.
      DataError: some rows cannot be used; each is named.
    """
    if options.data.is_dir() or backbone.kind == "image encoder":
        return prepare_images(options, backbone)
    columns = options.column_names()
    rows = read_rows(options.data)
    form = find_form(rows, columns)
    if form == "images":
        raise UserError(
            f"{options.data}: a list of images trains an image encoder, and --model {backbone.name} is a "
            f"{backbone.kind}. Name vit-s14, or give rows with text and label."
        )
    if form != "classification" and backbone.kind != "language model":
        raise UserError(
            f"{options.data}: rows of the form {form!r} train a language model, and --model {backbone.name} is a "
            f"{backbone.kind}. Name a language model, or give rows with text and label."
        )
    examples = check_form(rows, form, columns)
    report: dict[str, Any] = {"source": rows.source, "form": form, "rows": len(rows)}
    report["ignored_columns"] = list(unused_columns(rows, form, columns))
    held_rows, held = rows, None
    if options.validation is not None:
        held_rows = read_rows(options.validation)
        if (other := find_form(held_rows, columns)) != form:
            raise UserError(f"{options.validation}: rows of the form {other!r}; those of {options.data} are {form!r}.")
        held = check_form(held_rows, form, columns)
        report |= {"validation_source": held_rows.source, "validation_rows": len(held_rows)}
    parts = _Parts(rows, examples, held_rows, held)
    if form == "classification":
        return _classification(options, backbone, parts, report)
    return _causal(options, backbone, form, parts, report)


@dataclasses.dataclass(frozen=True)
class _Parts:
    """Rows of the training file and, where there is one, of the validation file."""

    rows: Rows
    examples: Sequence[Mapping[str, Any]]
    held_rows: Rows
    held: Sequence[Mapping[str, Any]] | None

    def split(self, options: FinetuneOptions, inputs: str, labels: Sequence[Any] | None) -> tuple[list, list]:
        """Indices into `examples`, and into `held` or `examples`."""
        if self.held is not None:
            return list(range(len(self.examples))), list(range(len(self.held)))
        values = [example[inputs] for example in self.examples]
        found = split_rows(values, options.validation_fraction, labels=labels, seed=options.seed)
        return list(found.train), list(found.validation)

    def validating(self) -> tuple[Rows, Sequence[Mapping[str, Any]]]:
        return (self.rows, self.examples) if self.held is None else (self.held_rows, self.held)


def _split_report(report: dict[str, Any], train_rows: Rows, train: Sequence[int], held: Rows, held_index: Any) -> None:
    report["train_numbers"] = [train_rows.numbers[i] for i in train]
    report["validation_numbers"] = [held.numbers[i] for i in held_index]


def _classification(options: FinetuneOptions, backbone: Backbone, parts: _Parts, report: dict[str, Any]) -> Prepared:
    labels = [example["label"] for example in parts.examples]
    held_labels = [] if parts.held is None else [example["label"] for example in parts.held]
    classes = check_classes(parts.rows, labels, held_labels)
    train, held = parts.split(options, "text", labels)
    held_rows, held_examples = parts.validating()
    _split_report(report, parts.rows, train, held_rows, held)
    if options.cut == "left":
        raise UserError("--cut left: texts that are classified are cut at their end; choose right or refuse.")
    most = longest_allowed(options, backbone)
    sizes, longer = [], []
    for rows, examples, index in ((parts.rows, parts.examples, train), (held_rows, held_examples, held)):
        encodings = backbone.tokenizer.encode_batch([examples[i]["text"] for i in index])
        sizes += [len(encoding.ids) for encoding in encodings]
        longer += [rows.numbers[i] for i, e in zip(index, encodings, strict=True) if len(e.ids) > most]
    if longer and options.cut == "refuse":
        lines = [f"line {number}" for number in longer]
        raise DataError(f"{parts.rows.source}: {len(longer)} texts exceed {most} tokens:", lines)
    report |= {"classes": list(classes), "cut_rows": longer, "max_length": most}
    length = min(most, round_up(max(sizes)))
    return Prepared(
        "classification",
        encode_classified(backbone, parts.rows, parts.examples, train, classes, length),
        encode_classified(backbone, held_rows, held_examples, held, classes, length),
        classes,
        None,
        report,
    )


def _causal(options: FinetuneOptions, backbone: Backbone, form: str, parts: _Parts, report: dict[str, Any]) -> Prepared:
    most = longest_allowed(options, backbone)
    encoder = causal_encoder(options, backbone, most)
    inputs = {"messages": "messages", "completion": "prompt", "text": "text"}[form]
    train, held = parts.split(options, inputs, None)
    held_rows, held_examples = parts.validating()
    taught, lost = encode_causal(encoder, parts.rows, parts.examples, train)
    judged, lost_held = encode_causal(encoder, held_rows, held_examples, held)
    _split_report(report, parts.rows, train, held_rows, held)
    template = encoder.template.name if form == "messages" and encoder.template else None
    report |= {"max_length": most, "template": template}
    report |= {name: lost[name] + lost_held[name] for name in lost}
    # One length for both, so that training and validation compile alike.
    longest = max(len(example.tokens) for _, example in [*taught, *judged])
    packs = options.pack and sum(len(example.tokens) for _, example in taught) > most
    length = most if packs else min(most, round_up(longest))
    report["packed"] = packs
    return Prepared(
        form,
        arrange(backbone, taught, length, pack=packs),
        arrange(backbone, judged, length, pack=packs),
        (),
        encoder,
        report,
    )
