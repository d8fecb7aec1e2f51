# SPDX-License-Identifier: Apache-2.0
"""`import moeshard`: light, without torch, and clear when it cannot work."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import moeshard


def python(code, **kwargs):
    return subprocess.run([sys.executable, *code], capture_output=True, text=True, timeout=60, **kwargs)


def test_import_does_not_import_torch_nor_anything_slow():
    code = "import sys, moeshard; print(*sorted(sys.modules))"
    modules = python(["-c", code]).stdout.split()
    assert "moeshard._core" in modules
    heavy = {"torch", "transformers", "cloudpickle", "tqdm", "rich", "multiprocessing", "subprocess", "moeshard.api"}
    assert not heavy & set(modules)


def test_import_takes_at_most_one_and_a_half_times_numpy():
    ratios = []
    for _ in range(5):  # both in the same process, which the first of them pays for: the best of five is steady
        lines = python(["-X", "importtime", "-c", "import numpy, moeshard"]).stderr.splitlines()
        cumulative = {
            name: int(time)
            for time, name in (re.match(r"import time: +\d+ \| +(\d+) \| *(\S+)", line).groups() for line in lines[1:])
        }
        ratios.append(1 + cumulative["moeshard"] / cumulative["numpy"])
    assert min(ratios) < 1.5


@pytest.mark.parametrize("name", moeshard.__all__)
def test_every_public_name_can_be_had_and_is_documented(name):
    assert getattr(moeshard, name).__doc__
    assert name in dir(moeshard)


def test_importing_a_room_hides_no_public_name():
    code = (
        "import importlib, pkgutil, moeshard\n"
        "for room in pkgutil.iter_modules(moeshard.__path__):\n"
        "    if room.name not in ('__main__', '_worker'): importlib.import_module('moeshard.' + room.name)\n"
        "assert not [n for n in moeshard.__all__ if type(getattr(moeshard, n)).__name__ == 'module']"
    )
    result = python(["-c", code])
    assert result.returncode == 0, result.stderr


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="moeshard.*nonsense"):
        moeshard.nonsense  # noqa: B018


def test_a_source_tree_without_the_extension_says_what_to_do(tmp_path):
    package = Path(moeshard.__file__).parent
    shutil.copytree(package, tmp_path / "moeshard", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    # -S: an editable install would find its own extension for any package of this name
    result = python(["-S", "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import moeshard"])
    assert result.returncode == 1
    assert "source tree without its C extension" in result.stderr
    assert str(tmp_path) in result.stderr and "make build" in result.stderr
