"""The command finds what is asked for, and a mistake of the user ends it with one message and exit code 2."""

import subprocess
import sys
from types import ModuleType

import pytest

from subspace_jax import cli
from subspace_jax.cli import _main


@pytest.fixture
def commands(monkeypatch):
    """Two commands that the tests make themselves: one function, and one group of them."""

    def greet(name: str, *, loud: bool = False) -> None:
        """Greets.

        Args:
          name: who is greeted.
          loud: in capitals.
        """
        if name == "nobody":
            raise cli.UserError("'nobody' is no name; give one.", ["line 3: nobody", "line 5: nobody"])
        print(name.upper() if loud else name)

    one, many = ModuleType("one"), ModuleType("many")
    one.run = greet
    many.COMMANDS = {"greet": greet}
    monkeypatch.setitem(sys.modules, "one", one)
    monkeypatch.setitem(sys.modules, "many", many)
    monkeypatch.setattr(_main, "COMMANDS", {"greet": ("one", "greets"), "all": ("many", "greets them all")})


def test_a_command_and_a_group_of_them_run(commands, capsys):
    cli.main(["greet", "--name", "ada", "--loud"])
    cli.main(["all", "greet", "--name", "bob"])
    assert capsys.readouterr().out.split() == ["ADA", "bob"]


def test_without_a_command_it_lists_them(commands, capsys):
    cli.main([])
    out = capsys.readouterr().out
    assert "greets them all" in out
    assert "usage: subspace-jax" in out


def test_a_mistake_is_one_message_with_its_lines_and_code_2(commands, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["greet", "--name", "nobody"])
    captured = capsys.readouterr()
    assert ended.value.code == 2
    assert captured.err == "subspace-jax greet: 'nobody' is no name; give one.\n  line 3: nobody\n  line 5: nobody\n"
    assert captured.out == ""
    with pytest.raises(cli.UserError):
        cli.main(["greet", "--name", "nobody", "--debug"])


@pytest.mark.parametrize("arguments", [["gret"], ["greet", "--nam", "ada"], ["greet"], ["all"]])
def test_a_misspelled_command_or_option_ends_with_code_2(commands, capsys, arguments):
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2
    assert "greet" in capsys.readouterr().err


def test_every_command_says_what_it_is_for(capsys):
    for name in _main.COMMANDS:
        with pytest.raises(SystemExit) as ended:
            cli.main([name, "--help"])
        assert ended.value.code == 0
        assert f"subspace-jax {name}" in capsys.readouterr().out


def test_without_the_extra_the_command_says_what_is_missing():
    """In a process in which the packages of the extra cannot be imported."""
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['tyro', 'pyarrow', 'tokenizers', 'jinja2', 'matplotlib'])); "
        "from subspace_jax import cli; cli.main(['doctor'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "pip install 'subspace-jax[cli]'" in done.stderr
    assert "Traceback" not in done.stderr
