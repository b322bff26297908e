"""The command line as a stranger types it."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest

import experiments
from experiments import runner


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as stop:
        runner.main(["--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    for command in ("quickstart", "list", "run", "report", "fetch"):
        assert command in out


def test_list_shows_every_experiment_and_its_claim(capsys):
    runner.main(["list"])
    out = capsys.readouterr().out
    for name in runner.names():
        assert name in out
        assert runner.find(name).claim.split()[0] in out


def test_list_shows_the_settings_of_one(capsys):
    runner.main(["list", "quickstart"])
    out = capsys.readouterr().out
    for field in dataclasses.fields(runner.find("quickstart").config):
        assert field.name in out


def test_unknown_experiment_names_the_nearest():
    with pytest.raises(SystemExit, match="nearest: quickstart"):
        runner.main(["run", "quickstrt"])


@pytest.mark.parametrize("setting", ["stps=3", "steps"])
def test_unknown_setting_lists_the_keys(setting):
    with pytest.raises(SystemExit, match="with a key of tasks"):
        runner.main(["run", "quickstart", "--set", setting])


def test_settings_given_apart_are_refused():
    with pytest.raises(SystemExit, match="--set key=value key=value"):
        runner.main(["run", "quickstart", "--set", "steps=3", "--set", "seeds=0"])


def test_settings_are_typed():
    config = runner.find("quickstart").config
    made = runner.configure(
        config, ["steps=3", "seeds=4,5", "tasks=spam_assassin", "learning_rates=0.1,0.2", "tune=True"]
    )
    assert made == config(steps=3, seeds=(4, 5), tasks=("spam_assassin",), learning_rates=(0.1, 0.2), tune=True)


def test_badly_typed_setting_is_refused(capsys):
    with pytest.raises(SystemExit):
        runner.configure(runner.find("quickstart").config, ["steps=many"])
    assert "steps" in capsys.readouterr().err


def test_report_without_results_says_how_to_make_one_and_shows_the_recorded_league(tmp_path, capsys):
    runner.main(["report", "--out", str(tmp_path), "--write", str(tmp_path / "report.md")])
    shown = capsys.readouterr().out
    assert "quickstart" in shown
    assert "the record of the repository" in shown
    assert (tmp_path / "report.md").read_text().count("## ") == 1


def test_report_shows_the_league_first_and_one_s_own_before_the_recorded(tmp_path):
    record = Path(experiments.__file__).parent / "results"
    for name in ("quickstart", "league"):
        (tmp_path / name).mkdir()
        shutil.copy(record / f"{name}.json", tmp_path / name / "result.json")
    runner.main(["report", "--out", str(tmp_path), "--write", str(tmp_path / "report.md")])
    headings = [line for line in (tmp_path / "report.md").read_text().splitlines() if line.startswith("## ")]
    assert headings == ["## league", "## quickstart"]


@pytest.mark.parametrize("name", runner.names())
def test_every_experiment_is_whole(name):
    experiment = runner.find(name)
    assert experiment.name == name
    assert experiment.claim.endswith(".")
    experiment.config()
    module = runner.find_module(name, experiments, "experiment")
    assert f"python -m experiments run {name}" in module.__doc__ or name == "quickstart"
