# SPDX-License-Identifier: Apache-2.0
"""The command line: help that reads well, exit codes that say what happened."""

import argparse
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from moeshard import MoeshardError, cli, doctor


def commands(parser: argparse.ArgumentParser, name: str = "moeshard") -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Every command and subcommand."""
    yield name, parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for word, below in action.choices.items():
                yield from commands(below, f"{name} {word}")


COMMANDS = dict(commands(cli.parser()))


def test_the_commands_are_found() -> None:
    assert {"moeshard", "moeshard demo", "moeshard bench", "moeshard bench encoder", "moeshard doctor"} <= set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_says_what_a_command_and_each_option_is_for(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as stop:
        cli.main([*command.split()[1:], "--help"])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    assert said.startswith(f"usage: {command}")
    assert max(map(len, said.splitlines())) <= 125
    for action in COMMANDS[command]._actions:
        if isinstance(action, argparse._SubParsersAction):
            continue
        assert action.help, f"{action.option_strings}: no help"
        assert action.help == argparse.SUPPRESS or all(word in said for word in action.option_strings)


def test_the_first_help_names_every_command_and_the_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    said = capsys.readouterr().out
    for word in ("demo", "bench", "doctor"):
        assert re.search(rf"^ +{word} +\S+", said, re.MULTILINE), word
    assert "exit status:" in said and "examples:" in said


def test_examples_of_the_help_are_commands_that_parse() -> None:
    examples = re.findall(r"^  moeshard ((?:\S+ )*\S+)(?:  |$)", cli.EXAMPLES, re.MULTILINE)
    assert len(examples) >= 3
    for words in examples:
        cli.parser().parse_args(words.split())


def failing(error: BaseException):
    def run(options: argparse.Namespace) -> int:
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        pytest.param(MoeshardError("no such thing"), 1, "moeshard: no such thing\n", id="own-error"),
        pytest.param(OSError("disk full"), 1, "moeshard: disk full\n", id="system"),
        pytest.param(ImportError("no torch"), 1, "moeshard: no torch\n", id="missing-library"),
        pytest.param(KeyboardInterrupt(), 130, "\n", id="ctrl-c"),
    ],
)
def test_a_failure_is_one_line_and_a_status(
    error: BaseException,
    status: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(doctor, "run", failing(error))
    assert cli.main(["doctor"]) == status
    assert capsys.readouterr().err == said


def test_a_bug_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "run", failing(KeyError("bug")))
    with pytest.raises(KeyError):
        cli.main(["doctor"])


def test_a_reader_that_leaves_ends_the_command_quietly() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "moeshard", "doctor"], stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_ctrl_c_ends_the_command_with_130() -> None:
    program = "import time; from moeshard import cli, doctor; "
    program += "doctor.run = lambda options: print(1, flush=True) or time.sleep(60); "
    running = subprocess.Popen(
        [sys.executable, "-c", program + "raise SystemExit(cli.main(['doctor']))"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert running.stdout is not None
    assert running.stdout.readline() == "1\n"
    time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=60)
    assert (running.returncode, err) == (130, "\n"), err
