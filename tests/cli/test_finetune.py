"""`subspace-jax finetune` from a file to a run's folder: what is learned, recorded, resumed and refused."""

import json

import numpy as np
import pytest

import subspace_jax as sj
from subspace_jax.cli import load_run
from tests.cli.conftest import QUICK, read_lines, write_lines

pytest.importorskip("matplotlib")


@pytest.fixture
def run(trained):
    """The folder of a finished run on the reviews."""
    return trained[0]


@pytest.fixture
def reviews(trained):
    """Their file."""
    return trained[1]


def test_a_classifier_learns_and_its_folder_is_evidence(run, reviews):
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["accuracy"] == 1.0
    data = json.loads((run / "data.json").read_text())
    assert data["rows"] == 40
    assert sorted(data["train_numbers"] + data["validation_numbers"]) == list(range(1, 41))
    assert data["classes"] == ["neg", "pos"]
    steps = read_lines(run / "steps.jsonl")
    assert [step["step"] for step in steps] == list(range(1, metrics["steps"] + 1))
    assert steps[-1]["loss"] < 0.5 * steps[0]["loss"]
    predictions = read_lines(run / "predictions.jsonl")
    texts = read_lines(reviews)
    assert [p["row"] for p in predictions] == data["validation_numbers"]
    assert [p["label"] for p in predictions] == [texts[p["row"] - 1]["label"] for p in predictions]
    assert metrics["accuracy"] == np.mean([p["label"] == p["prediction"] for p in predictions])
    np.testing.assert_allclose(metrics["loss"], np.mean([p["loss"] for p in predictions]), rtol=1e-4, atol=1e-6)
    for name in ("loss.png", "README.md", "adapter.safetensors", "peft/adapter_config.json", "settings.json"):
        assert (run / name).stat().st_size > 0


def test_the_kept_state_is_the_one_with_the_lowest_validation_loss(run):
    evaluations = read_lines(run / "evaluations.jsonl")
    metrics = json.loads((run / "metrics.json").read_text())
    best = min(evaluations, key=lambda one: one["loss"])
    assert metrics["step"] == best["step"]
    np.testing.assert_allclose(metrics["loss"], best["loss"], rtol=1e-5)


def test_evaluate_agrees_with_the_run_at_every_batch_size(run, reviews, shell, tmp_path):
    data = json.loads((run / "data.json").read_text())
    records = read_lines(reviews)
    held = write_lines(tmp_path / "held.jsonl", [records[n - 1] for n in data["validation_numbers"]])
    losses = []
    for batch in (1, 3, 16):
        done = shell("evaluate", run, held, "--batch", batch, "--out", tmp_path / f"e{batch}")
        assert done.code == 0, done.err
        losses.append(json.loads((tmp_path / f"e{batch}" / "metrics.json").read_text())["loss"])
    np.testing.assert_allclose(losses, json.loads((run / "metrics.json").read_text())["loss"], rtol=1e-5)


def test_a_killed_run_resumes_to_the_same_bits(run, shell, reviews, tmp_path, monkeypatch):
    arguments = ("finetune", reviews, "--model", "tiny-bert", "--epochs", 4, *QUICK)
    from subspace_jax.cli import _train

    class KilledError(Exception):
        pass

    evaluate, calls = _train.Job.evaluate, []

    def killed(self, *rest):
        calls.append(1)
        if len(calls) == 3:
            raise KilledError
        return evaluate(self, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(_train.Job, "evaluate", killed)
        with pytest.raises(KilledError):
            shell(*arguments, "--out", tmp_path / "cut")
    refused = shell(*arguments, "--out", tmp_path / "cut")
    assert refused.code == 2
    assert "--resume" in refused.err
    done = shell(*arguments, "--out", tmp_path / "cut", "--resume")
    assert done.code == 0, done.err
    for name in ("steps.jsonl", "evaluations.jsonl", "predictions.jsonl"):
        assert (tmp_path / "cut" / name).read_text() == (run / name).read_text()
    ours, theirs = (sj.io.read_safetensors(folder / "adapter.safetensors")[0] for folder in (tmp_path / "cut", run))
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name])


@pytest.mark.parametrize(
    ("change", "named"),
    [(("--rank", 3), "--rank"), (("--batch", 4), "--batch"), (("--method", "dora"), "--method")],
)
def test_resuming_with_other_settings_is_refused(run, reviews, shell, change, named):
    options = dict(zip(QUICK[::2], QUICK[1::2], strict=True)) | dict([change])
    flat = [item for pair in options.items() for item in pair]
    done = shell("finetune", reviews, "--model", "tiny-bert", "--out", run, "--epochs", 4, *flat, "--resume")
    assert done.code == 2
    assert named in done.err


def test_resuming_with_other_data_is_refused(run, reviews, shell, tmp_path):
    records = read_lines(reviews)
    others = write_lines(tmp_path / "reviews.jsonl", [records[0] | {"text": "the film was very good"}, *records[1:]])
    done = shell("finetune", others, "--model", "tiny-bert", "--out", run, "--epochs", 4, *QUICK, "--resume")
    assert done.code == 2
    assert "examples are others" in done.err


def test_a_comparison_sees_one_split(shell, reviews, tmp_path):
    done = shell(
        "finetune", reviews, "--model", "tiny-bert", "--out", tmp_path / "c", "--compare", "lora,head", "dora",
        "--steps", 4, *QUICK,
    )  # fmt: skip
    assert done.code == 0, done.err
    names = ("lora", "head", "dora")
    splits = [json.loads((tmp_path / "c" / name / "data.json").read_text()) for name in names]
    assert splits[0] == splits[1] == splits[2]
    assert tuple(json.loads((tmp_path / "c" / "comparison.json").read_text())) == names


def test_a_language_model_learns_and_answers_with_its_end(shell, talker):
    run, out, _ = talker
    assert "4 of 24 tokens are labels" in out  # two answers, each with its end
    data = json.loads((run / "data.json").read_text())
    assert data["template"] == "the template 'plain'"
    assert data["packed"]
    assert data["ignored_columns"] == ["id"]
    answered = shell("generate", run, "what is next two", "what is next five")
    assert [json.loads(line)["completion"] for line in answered.out.splitlines()] == ["three", "six"]


def test_logits_in_chunks_change_nothing_that_is_learned(shell, talker, tmp_path, monkeypatch):
    found = []
    for chunk in (1024, 40):
        monkeypatch.setattr("subspace_jax.cli._problem.CHUNK", chunk)
        done = shell(
            "finetune", talker[2], "--model", "tiny-llama", "--out", tmp_path / str(chunk), "--method", "full",
            "--steps", 3, "--batch", 3, "--max-length", 48, "--learning-rate", 0.01,
        )  # fmt: skip
        assert done.code == 0, done.err
        found.append([step["loss"] for step in read_lines(tmp_path / str(chunk) / "steps.jsonl")])
    np.testing.assert_allclose(*found, rtol=1e-4)


def test_a_dry_run_writes_nothing(shell, reviews, tmp_path):
    done = shell("finetune", reviews, "--model", "tiny-bert", "--out", tmp_path / "run", "--dry-run", *QUICK)
    assert done.code == 0, done.err
    assert "estimate:" in done.out
    assert "backbone/encoder/layers/mlp/fc1/kernel" in done.out
    assert not (tmp_path / "run").exists()


def test_settings_come_from_a_file_and_the_command_line_goes_before(shell, reviews, tmp_path):
    settings = tmp_path / "settings.toml"
    settings.write_text('model = "tiny-bert"\nrank = 3\nsteps = 2\nlearning-rate = 0.01\nbatch = 8\nmerged = true\n')
    done = shell("finetune", reviews, "--settings", settings, "--out", tmp_path / "run", "--rank", 1)
    assert done.code == 0, done.err
    options = load_run(tmp_path / "run").options
    assert (options.rank, options.steps, options.learning_rate) == (1, 2, 0.01)
    tensors, _ = sj.io.read_safetensors(tmp_path / "run" / "merged" / "model.safetensors")
    head = sj.merge(load_run(tmp_path / "run").adapted)["classifier"]["kernel"]
    np.testing.assert_array_equal(tensors["classifier.weight"], head.T)
    settings.write_text("rang = 3\n")
    refused = shell("finetune", reviews, "--settings", settings)
    assert refused.code == 2
    assert "rang" in refused.err


@pytest.mark.parametrize("method", ["corda", "lora_sb"])
def test_methods_that_start_from_data_see_the_first_batches(method, shell, reviews, tmp_path):
    done = shell(
        "finetune", reviews, "--model", "tiny-bert", "--out", tmp_path / "run", "--method", method, "--steps", 2, *QUICK
    )
    assert done.code == 0, done.err
    run = load_run(tmp_path / "run")
    assert f"{method}" in str(sj.summary(run.adapted)) or method == "corda"  # CorDA is saved as the LoRA it equals
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["trained_values"] > 0


def test_patience_ends_a_run_that_does_not_improve(shell, reviews, tmp_path):
    done = shell(
        "finetune", reviews, "--model", "tiny-bert", "--out", tmp_path / "run", "--steps", 60, "--patience", 2,
        "--evaluate-every", 1, "--schedule", "constant", "--batch", 8, "--rank", 2, "--learning-rate", 0.3,
    )  # fmt: skip
    assert done.code == 0, done.err
    evaluations = read_lines(tmp_path / "run" / "evaluations.jsonl")
    losses = [one["loss"] for one in evaluations]
    assert len(losses) - 1 - losses.index(min(losses)) == 2
    assert len(losses) < 60


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "tiny-bart"), "did you mean 'tiny-bert'"),
        (("--method", "lorra"), "did you mean 'lora'"),
        (("--rank", 0), "--rank 0"),
        (("--accumulate", 3), "--accumulate 3"),
        (("--max-length", 4000), "at most 32"),
        (("--columns", "text=review"), "review"),
        (("--columns", "words=text"), "OURS=YOURS"),
        (("--cut", "left"), "--cut left"),
        (("--target", "**/nothing"), "**/nothing"),
        (("--model", "tiny-vit"), "folder"),
    ],
)
def test_a_mistake_is_one_message_and_nothing_is_written(shell, reviews, tmp_path, arguments, message):
    given = {"--model": "tiny-bert"} | dict([arguments])
    flat = [item for pair in given.items() for item in pair]
    done = shell("finetune", reviews, "--out", tmp_path / "run", *flat)
    assert done.code == 2
    assert message in done.err
    assert "Traceback" not in done.err
    assert not (tmp_path / "run").exists()
