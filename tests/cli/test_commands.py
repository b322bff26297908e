"""The commands that use a finished run: generate, chat, export, merge, explain, list, doctor."""

import dataclasses
import io
import json

import jax
import numpy as np
import pytest

import subspace_jax as sj
from subspace_jax.cli import UserError, load_run
from subspace_jax.cli._generate import Writer
from subspace_jax.models import CARRIED, Clip, PretrainedModel, load, small_clip
from tests.cli.conftest import QUICK, write_chats

pytest.importorskip("matplotlib")


def test_a_batch_of_prompts_equals_each_alone(talker):
    writer = Writer(load_run(talker[0]))
    prompts = ["what is next one", "nine", "the film was not very good and it is a very dull film what is next two"]
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    assert writer.write(chats, 6) == [writer.write([chat], 6)[0] for chat in chats]


def test_generation_stops_at_the_context_and_refuses_what_does_not_fit(talker):
    writer = Writer(load_run(talker[0]))
    context = 64
    words = "one " * 40
    assert len(writer.write([words], 500)[0].split()) <= context - 40
    with pytest.raises(UserError, match="tokens"):
        writer.write(["one " * 64], 5)


def test_prompts_from_a_file_and_mistakes(talker, shell, tmp_path):
    (tmp_path / "prompts.txt").write_text("what is next two\n\nwhat is next five\n")
    done = shell("generate", talker[0], "--file", tmp_path / "prompts.txt", "--batch", 1)
    assert [json.loads(line)["completion"] for line in done.out.splitlines()] == ["three", "six"]
    for arguments in ((), ("--file", tmp_path / "absent.txt")):
        assert shell("generate", talker[0], *arguments).code == 2


def test_a_conversation_keeps_what_was_said(talker, shell, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("what is next two\nwhat is next five\n"))
    done = shell("chat", talker[0])
    assert done.code == 0, done.err
    assert len(done.out.splitlines()) == 2
    assert done.out.splitlines()[0] == "three"


def test_a_classifier_does_not_write(trained, shell):
    done = shell("generate", trained[0], "the film")
    assert done.code == 2
    assert "evaluate" in done.err


@pytest.mark.parametrize("to", ["peft", "hf"])
def test_exports_read_back_as_the_adapter(trained, shell, tmp_path, to):
    done = shell("export", trained[0], tmp_path / to, "--to", to)
    assert done.code == 0, done.err
    assert shell("export", trained[0], tmp_path / to, "--to", to).code == 2  # it exists now
    if to == "hf":
        tensors, _ = sj.io.read_safetensors(tmp_path / to / "model.safetensors")
        run = load_run(trained[0])
        kernel = sj.merge(run.adapted)["backbone"]["encoder"]["layers"]["mlp"]["fc1"]["kernel"]
        np.testing.assert_array_equal(tensors["bert.encoder.layer.1.intermediate.dense.weight"], kernel[1].T)
        config = json.loads((tmp_path / to / "config.json").read_text())
        assert config["id2label"] == {"0": "neg", "1": "pos"}


def test_an_exported_folder_is_a_model_to_begin_with(talker, shell, tmp_path):
    done = shell("export", talker[0], tmp_path / "model", "--to", "hf")
    assert done.code == 0, done.err
    model = load(f"hf:{tmp_path / 'model'}", scan_layers=True)
    for one, other in zip(*map(jax.tree.leaves, (model.params, sj.merge(load_run(talker[0]).adapted))), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)
    assert model.text_format.end_tokens == (1,)
    again = shell(
        "finetune", talker[2], "--model", f"hf:{tmp_path / 'model'}", "--out", tmp_path / "again", "--steps", 2,
        "--max-length", 48, *QUICK,
    )  # fmt: skip
    assert again.code == 0, again.err
    first = (tmp_path / "again" / "steps.jsonl").read_text().splitlines()[0]
    assert json.loads(first)["loss"] < 0.5  # what was learned is there


def test_an_export_that_lost_something_is_refused(trained, shell, tmp_path, monkeypatch):
    from subspace_jax.cli import export

    monkeypatch.setattr(export, "read_merged", lambda folder, like, backbone, problem: like)
    done = shell("export", trained[0], tmp_path / "bad", "--to", "hf")
    assert done.code == 2
    assert "1.000" in done.err


def test_two_runs_become_one_model_and_spoiled_ones_none(talker, shell, tmp_path, monkeypatch):
    data = write_chats(tmp_path)
    common = ("finetune", data, "--model", "tiny-llama", "--steps", 4, "--max-length", 48, *QUICK)
    for seed in (1, 2):
        assert shell(*common, "--out", tmp_path / f"r{seed}", "--seed", seed).code == 0
    runs = [tmp_path / "r1", tmp_path / "r2"]
    done = shell("merge", *runs, "--out", tmp_path / "both", "--method", "task-arithmetic", "--strength", 0.5)
    assert done.code == 0, done.err
    tensors, _ = sj.io.read_safetensors(tmp_path / "both" / "model.safetensors")
    kernels = [sj.merge(load_run(r).adapted)["decoder"]["layers"]["mlp"]["up"]["kernel"] for r in runs]
    base = load_run(runs[0]).problem.params["decoder"]["layers"]["mlp"]["up"]["kernel"]
    expected = base + 0.5 * sum(kernel - base for kernel in kernels)
    np.testing.assert_allclose(tensors["model.layers.0.mlp.up_proj.weight"], expected[0].T, atol=1e-5)
    assert "--method" in shell("merge", *runs, "--out", tmp_path / "x", "--method", "tie").err
    check_merge_report(tmp_path / "both", base, expected)
    check_merge_of_files(runs, shell, tmp_path, tensors)

    def spoiled(folder):
        run = load_run(folder)
        up = run.adapted["decoder"]["layers"]["mlp"]["up"]
        up["kernel"] = dataclasses.replace(up["kernel"], a=up["kernel"].a * np.nan)
        return run

    monkeypatch.setattr("subspace_jax.cli._merge_sources.load_run", spoiled)
    for given in (runs, runs[:1]):
        done = shell("merge", *given, "--out", tmp_path / "x")
        assert done.code == 2
        assert "decoder/layers/mlp/up/kernel" in done.err
        assert "NaN" in done.err or "not finite" in done.err
        assert not (tmp_path / "x").exists()


def check_merge_report(folder, base, expected):
    """The report names the adapted leaves, who changed them, and how far they moved."""
    found = json.loads((folder / "merge.json").read_text())
    leaves = {leaf["path"]: leaf for leaf in found["leaves"]}
    moved = np.linalg.norm(expected - base) / np.linalg.norm(base)
    assert leaves["decoder/layers/mlp/up/kernel"]["changed_by"] == [0, 1]
    np.testing.assert_allclose(leaves["decoder/layers/mlp/up/kernel"]["moved"], moved, rtol=1e-3)
    assert leaves["embedding/embedding"]["changed_by"] == []
    assert leaves["embedding/embedding"]["moved"] == 0


def check_merge_of_files(runs, shell, tmp_path, tensors):
    """PEFT's folder, Hugging Face's, their tensors and our adapter's file stand for the runs that they came from."""
    for run in runs:
        assert shell("export", run, tmp_path / f"{run.name}-peft", "--to", "peft").code == 0
        assert shell("export", run, tmp_path / f"{run.name}-hf", "--to", "hf").code == 0
    forms = (
        (tmp_path / "r1-peft", tmp_path / "r2-hf"),
        (tmp_path / "r1" / "adapter.safetensors", tmp_path / "r2-hf" / "model.safetensors"),
    )
    for number, files in enumerate(forms):
        out = tmp_path / f"files{number}"
        done = shell("merge", *files, "--base", "tiny-llama", "--out", out, "--strength", 0.5)
        assert done.code == 0, done.err
        assert "2 of 2" in done.out
        found, _ = sj.io.read_safetensors(out / "model.safetensors")
        for name, tensor in tensors.items():
            np.testing.assert_allclose(found[name], tensor, atol=1e-5, err_msg=name)
    for wrong, word in ((tmp_path, "adapter_config.json"), (runs[0] / "absent.safetensors", "expected a folder")):
        done = shell("merge", wrong, "--base", "tiny-llama", "--out", tmp_path / "x")
        assert (done.code, word in done.err) == (2, True), done.err
        assert not (tmp_path / "x").exists()
    done = shell("merge", tmp_path / "r1-peft", "--base", "tiny-bert", "--out", tmp_path / "x")
    assert (done.code, "language model" in done.err) == (2, True)


def test_runs_of_two_models_are_not_merged(talker, trained, shell, tmp_path):
    done = shell("merge", talker[0], trained[0], "--out", tmp_path / "x")
    assert done.code == 2
    assert "one model" in done.err
    assert not (tmp_path / "x").exists()


def test_explain_tells_rule_and_role(trained, shell):
    done = shell("explain", trained[0], "**/query/*")
    assert done.code == 0, done.err
    assert "backbone/encoder/layers/attention/query/kernel" in done.out
    assert "'backbone/encoder/**/kernel': lora, 256 values learn" in done.out
    assert "no rule fits" in done.out  # its bias
    assert shell("explain", trained[0], "nothing").code == 2


def test_list_and_doctor(shell):
    assert "dora" in shell("list").out
    assert "deep_subspace_clustering" in shell("list", "--all").out
    done = shell("doctor")
    assert done.code == 0, done.err
    assert sj.__version__ in done.out


def test_a_folder_that_is_no_run_is_refused(shell, tmp_path):
    done = shell("evaluate", tmp_path, tmp_path / "data.jsonl")
    assert done.code == 2
    assert "settings.json" in done.err


def test_a_model_of_images_and_texts_is_refused_with_what_serves_it(shell, tmp_path, monkeypatch):
    clip = PretrainedModel(Clip(small_clip()), {}, small_clip())
    monkeypatch.setitem(CARRIED, "tiny-clip", (lambda **options: clip, "minilm"))
    (tmp_path / "data.jsonl").write_text('{"text": "good", "label": 1}\n' * 4)
    done = shell("finetune", tmp_path / "data.jsonl", "--model", "tiny-clip", "--out", tmp_path / "run")
    assert (done.code, (tmp_path / "run").exists()) == (2, False)
    assert "Clip" in done.err
    assert "sj.adapt" in done.err
