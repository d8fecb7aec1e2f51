# SPDX-License-Identifier: Apache-2.0
"""The README's Python, run as a reader would run it: in order, with a small checkpoint under the name it uses."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_demo import checkpoint

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.timeout(300)
def test_readme_python_runs_in_order(tmp_path: Path) -> None:
    names = set(re.findall(r'from_pretrained\("([^"]+)"\)', README))
    assert names == {"google/switch-base-8"}
    checkpoint(tmp_path / names.pop())  # a folder of that name wins over the hub
    check = "assert first.shape == second.shape == (1, 64) and output.shape == (100, 64)\n"
    script = "\n".join([*BLOCKS, check])
    (tmp_path / "readme.py").write_text(script)
    done = subprocess.run(
        [sys.executable, "readme.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=280,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr}"
    assert "MoE layers on 1 rank" in done.stdout


def test_readme_names_only_files_that_exist() -> None:
    for path in set(re.findall(r"[`( ]((?:docs|csrc|moeshard|tests|notebooks)/[\w./]+\w)[`) \n]", README)):
        assert (ROOT / path).exists(), path


def test_readme_commands_are_make_targets() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"^make ([a-z-]+)", README, re.MULTILINE)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
