# SPDX-License-Identifier: Apache-2.0
"""The ``moeshard`` command: its subcommands and their options. Imports no torch."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from . import __version__, bench, demo, doctor
from .bench import encoder
from .errors import MoeshardError
from .planner import command as planner

DESCRIPTION = "Balanced Mixture-of-Experts inference: every expert cut over every rank, no token dropped."
EXAMPLES = """\
examples:
  moeshard demo                     a Switch encoder on 2 ranks, beside HuggingFace's own
  moeshard doctor                   is this machine ready, and what to do if not
  moeshard plan --preset switch-base-128 --ranks 4 --skew 0.6:0.1
                                    which layout its layers should have, why, and what it costs
  moeshard bench --quick            the MoE layer against its rivals, in minutes

exit status:
  0    all is well
  1    something failed, an output is wrong or the doctor found a problem: it was said which
  2    the command line cannot be understood
  130  interrupted
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: words of the command line; ``None``: those of the process.

    Returns:
        The exit status: 0 for success, 1 if an output of the demo or of the benchmark is wrong, if the doctor finds a
        problem or something failed; 130 after Ctrl-C, 141 if nobody reads the output any more.

    Raises:
        SystemExit: 2 for a bad option, with its message on standard error; 0 after ``--help``.

    Example:
        >>> main(["doctor"])  # doctest: +ELLIPSIS
          moeshard ...
        0
    """
    options = parser().parse_args(arguments)
    try:
        status = int(options.run(options))
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # `moeshard doctor | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that the flush at exit does not complain
        return 141
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except (MoeshardError, OSError, ImportError) as error:
        print(f"moeshard: {error}", file=sys.stderr)
        return 1


def parser() -> argparse.ArgumentParser:
    """The command line."""
    whole = argparse.ArgumentParser(
        prog="moeshard",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    whole.add_argument("--version", action="version", version=f"moeshard {__version__}")
    commands = whole.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add(commands, "demo", demo)
    benchmark = _add(commands, "bench", bench)
    _add(benchmark.add_subparsers(title="another benchmark", metavar="[encoder]"), "encoder", encoder)
    _add(commands, "plan", planner)
    _add(commands, "doctor", doctor)
    return whole


def _add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]", name: str, room: Any) -> Any:
    """A subcommand: a module with ``SUMMARY``, ``add_options(parser)`` and ``run(options) -> status``."""
    summary: str = room.SUMMARY
    command = commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
    room.add_options(command)
    run: Callable[[argparse.Namespace], int] = room.run
    command.set_defaults(run=run)
    return command
