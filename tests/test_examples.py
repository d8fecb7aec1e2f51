# SPDX-License-Identifier: Apache-2.0
"""The examples in the docstrings run and give what they show."""

import doctest
import importlib
import pkgutil

import pytest

import moeshard

ROOMS = [
    room.name
    for room in pkgutil.walk_packages(moeshard.__path__, "moeshard.")
    if room.name.rpartition(".")[2] not in ("_core", "_worker", "__main__")
]


@pytest.mark.parametrize("name", ROOMS)
def test_examples_of_a_room_run(name):
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert result.failed == 0, "see the captured output"
