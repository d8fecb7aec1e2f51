# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the whole suite."""

import os

import hypothesis
import pytest

hypothesis.settings.register_profile(
    "steady", deadline=None, derandomize="CI" in os.environ
)  # a busy machine is no failure; CI sees the same examples every time
hypothesis.settings.load_profile("steady")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


@pytest.fixture(scope="session")
def workers():
    """Four worker processes for the whole session; `workers.on_ranks` runs a function on fewer."""
    import moeshard

    with moeshard.launch(4, timeout=60) as ranks:
        yield ranks
