# SPDX-License-Identifier: Apache-2.0
"""What the README claims: its numbers, files and commands. Its code runs in test_examples.py."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_readme_numbers_are_those_of_the_demo_that_it_names() -> None:
    results = json.loads((ROOT / "docs/demo.json").read_text())
    skewed = results["skewed"]
    caption = " ".join(README.partition("![")[2].partition("## ")[0].split())
    for number in (
        *(f"{100 * share:.1f} %" for share in results["share_of_work_expert_parallel"]),
        *(f"{100 * share:.1f} %" for share in skewed["share_of_work_expert_parallel"]),
        *(f"{100 * share:.1f} %" for share in results["share_of_work"]),
        *(f"{part[key]:.1f} s" for part in (results, skewed) for key in ("seconds", "seconds_hf")),
        f"{100 * skewed['hot_share']:.0f} % of the tokens",
        f"{max(results['max_rel_diff'], skewed['max_rel_diff']):.1e}",
        f"{results['tokens']:,} tokens",
        f"{max(results['weight_bytes']) / 2**30:.2f} GiB",
        f"{results['weight_bytes_hf'][0] / 2**30:.2f} GiB",
    ):
        assert number in caption, number


def test_readme_names_only_files_that_exist() -> None:
    for path in set(re.findall(r"[`( ]((?:docs|csrc|moeshard|tests|notebooks)/[\w./]+\w)[`) \n]", README)):
        assert (ROOT / path).exists(), path


def test_readme_commands_are_make_targets() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"^make ([a-z-]+)", README, re.MULTILINE)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
