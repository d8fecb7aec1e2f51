# SPDX-License-Identifier: Apache-2.0
"""Runs a short demo in a terminal, as `make demo DEMO="..."` does, and draws what it shows there: docs/demo.svg.

python docs/record_demo.py [OPTIONS OF THE DEMO]
"""

import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

DOCS = Path(__file__).parent
COLUMNS, LINES = 100, 50
OPTIONS = ["--tokens", "2048", "--repeats", "1"]


def main() -> None:
    """Run, record, draw."""
    options = sys.argv[1:] or OPTIONS
    shown = screen(run([sys.executable, "-m", "moeshard", "demo", *options]))
    (DOCS / "demo.svg").write_text(svg(f'$ make demo DEMO="{" ".join(options)}"\n{shown}'))


def run(command: list[str]) -> str:
    """Everything that a command writes to a terminal of COLUMNS x LINES.

    Raises:
        RuntimeError: it failed.
    """
    reader, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, COLUMNS, 0, 0))
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": str(COLUMNS)}
    with subprocess.Popen(command, cwd=DOCS.parent, stdout=terminal, stderr=terminal, env=environment) as running:
        os.close(terminal)
        written = b""
        try:
            while data := os.read(reader, 1 << 16):
                written += data
                sys.stdout.buffer.write(data)
                sys.stdout.flush()
        except OSError:  # how a terminal says that nobody writes any more
            pass
    os.close(reader)
    if running.returncode:
        raise RuntimeError(f"{command}: status {running.returncode}")
    return written.decode()


def screen(written: str) -> str:
    """What is left on the screen: of a line that was written over, its last state."""
    lines = (re.split(r"\r+", line.rstrip("\r"))[-1] for line in written.split("\n"))
    return re.sub(r"\x1b\[[0-9]*[A-KJ]", "", "\n".join(lines)).strip("\n")


def svg(text: str) -> str:
    """A picture of a terminal that needs no font from elsewhere.

    Args:
        text: its lines, with the terminal's escape codes for colours.
    """
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True)
    console.print(Text.from_ansi(text))
    own_fonts = re.sub(r"@font-face \{\{.*?\}\}\s*", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
    return console.export_svg(title="moeshard", theme=MONOKAI, code_format=own_fonts, unique_id="demo")


if __name__ == "__main__":
    main()
