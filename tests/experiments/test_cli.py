"""The command line as a stranger types it."""

from __future__ import annotations

import dataclasses

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


def test_report_without_results_says_how_to_make_one(tmp_path):
    with pytest.raises(SystemExit, match="quickstart"):
        runner.main(["report", "--out", str(tmp_path)])


@pytest.mark.parametrize("name", runner.names())
def test_every_experiment_is_whole(name):
    experiment = runner.find(name)
    assert experiment.name == name
    assert experiment.claim.endswith(".")
    experiment.config()
    module = runner.find_module(name, experiments, "experiment")
    assert f"python -m experiments run {name}" in module.__doc__ or name == "quickstart"
