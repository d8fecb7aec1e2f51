# SPDX-License-Identifier: Apache-2.0
"""The ``moeshard`` command: its subcommands and their options. Imports no torch."""

import argparse
import sys
from collections.abc import Sequence

from . import __version__, bench, demo, doctor
from .bench import encoder
from .errors import MoeshardError
from .planner import command as planner


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: words of the command line; ``None``: those of the process.

    Returns:
        The exit status: 0 for success, 1 if an output of the demo or of the benchmark is wrong or something failed.

    Raises:
        SystemExit: 2 for a bad option, with its message on standard error; 0 after ``--help``.

    Example:
        >>> main(["doctor"])  # doctest: +ELLIPSIS
        moeshard ...
        0
    """
    parser = argparse.ArgumentParser(prog="moeshard", description="Balanced Mixture-of-Experts inference.")
    parser.add_argument("--version", action="version", version=f"moeshard {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    command = commands.add_parser("demo", help=demo.SUMMARY, description=demo.SUMMARY)
    demo.add_options(command)
    command.set_defaults(run=demo.run)

    command = commands.add_parser("bench", help=bench.SUMMARY, description=bench.SUMMARY)
    bench.add_options(command)
    command.set_defaults(run=bench.run)
    command = command.add_subparsers(title="another benchmark").add_parser(
        "encoder", help=encoder.SUMMARY, description=encoder.SUMMARY
    )
    encoder.add_options(command)
    command.set_defaults(run=encoder.run)

    command = commands.add_parser("plan", help=planner.SUMMARY, description=planner.SUMMARY)
    planner.add_options(command)
    command.set_defaults(run=planner.run)

    summary = "say what moeshard finds on this machine"
    command = commands.add_parser("doctor", help=summary, description=summary)
    command.add_argument("--calibrate", action="store_true", help="measure it for moeshard plan: about ten seconds")
    command.set_defaults(run=_doctor)

    options = parser.parse_args(arguments)
    try:
        return int(options.run(options))
    except (MoeshardError, OSError, ImportError) as error:
        print(f"moeshard: {error}", file=sys.stderr)
        return 1


def _doctor(options: argparse.Namespace) -> int:
    if options.calibrate:
        from .planner import calibration

        return calibration.run()
    print(doctor.describe())
    return 0
