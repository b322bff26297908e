"""`export --to gguf`: what is written is what was learned, or nothing is written."""

import pytest

from subspace_jax.models import load_gguf, read_gguf
from tests.cli.conftest import QUICK, write_lines
from tests.cli.test_qlora import ROWS, packed_model  # noqa: F401

pytest.importorskip("matplotlib")


def test_a_run_goes_out_as_float16_with_the_same_tokens(packed_model, shell, tmp_path):  # noqa: F811
    data = write_lines(tmp_path / "rows.jsonl", ROWS)
    run, out = tmp_path / "run", tmp_path / "tuned.gguf"
    options = ("--model", packed_model, "--method", "qlora", "--epochs", 3, *QUICK)
    done = shell("finetune", data, *options, "--out", run)
    assert done.code == 0, done.err
    done = shell("export", run, out, "--to", "gguf")
    assert done.code == 0, done.err
    assert "read back" in done.out
    assert {t.kind for t in read_gguf(out).tensors.values()} == {"F16", "F32"}
    assert load_gguf(out).config.vocab_size == load_gguf(tmp_path / "m.gguf").config.vocab_size
    done = shell("export", run, out, "--to", "gguf")
    assert done.code == 2
    assert "it exists" in done.err


def test_a_model_of_another_kind_is_refused(trained, shell, tmp_path):
    done = shell("export", trained[0], tmp_path / "no.gguf", "--to", "gguf")
    assert done.code == 2
    assert "no place for a head of classes" in done.err
    assert not (tmp_path / "no.gguf").exists()
