# SPDX-License-Identifier: Apache-2.0
"""The encoder benchmark: end to end on a small encoder, its routing, and how measurements are summed up."""

import argparse
import json
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

import moeshard  # noqa: E402
from moeshard import ArgumentError  # noqa: E402
from moeshard.bench import encoder, encoder_rank, rival_deepspeed  # noqa: E402
from moeshard.bench.encoder_rank import Check  # noqa: E402

SMALL = ["--layers", "4", "--d-model", "64", "--d-ff", "37", "--length", "25", "--seconds", "0"]
PRESENT = ["hf", "moeshard"] if rival_deepspeed.unavailable() else ["hf", "deepspeed", "moeshard"]


def options(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    encoder.add_options(parser)
    return parser.parse_args([*SMALL, *words])


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder = tmp_path_factory.mktemp("encoder")
    words = ["--experts", "6", "--batches", "2", "8", "--json", f"{folder}/out.json", "--plot", f"{folder}/out.png"]
    assert encoder.run(options(*words)) == 0
    assert (folder / "out.png").read_bytes().startswith(b"\x89PNG")
    found: dict = json.loads((folder / "out.json").read_text())
    return found


def test_every_case_has_a_row_for_every_contestant(report: dict) -> None:
    expected = {
        (ranks, batch, routing, name)
        for ranks in (1, 2)
        for batch in (2, 8)
        for routing in ("own", "skew")
        for name in PRESENT
    }
    rows = report["rows"]
    assert len(rows) == len(expected)
    assert {(row["ranks"], row["batch"], row["routing"], row["contestant"]) for row in rows} == expected
    assert all((row["experts"], row["moe_layers"], row["layers"], row["length"]) == (6, 2, 4, 25) for row in rows)
    assert report["machine"]["cores"] and report["versions"]["torch"]


def test_every_contestant_gives_huggingfaces_output(report: dict) -> None:
    for row in report["rows"]:
        assert row["max_rel_diff"] <= 1e-5
        assert 0 < row["sequences_compared"] <= row["ranks"] * row["batch"]
        if row["routing"] == "skew":  # forced routers have no near ties
            assert row["sequences_compared"] == row["ranks"] * row["batch"]
    assert max(row["max_rel_diff"] for row in report["rows"]) > 0  # else one model may have been compared with itself


def test_forced_routers_send_the_papers_share_to_the_hot_experts(report: dict) -> None:
    share = (1 / 6 + 0.6) / 1.6  # one hot expert of six
    for row in report["rows"]:
        if row["routing"] == "skew":
            tokens = row["ranks"] * row["batch"] * row["length"]
            # Draws of a binomial: 5 standard deviations.
            assert row["hot_share"] == pytest.approx(share, abs=5 * (share * (1 - share) / tokens) ** 0.5)


def test_times_and_shares_are_of_real_passes(report: dict) -> None:
    ours = {
        (row["ranks"], row["batch"], row["routing"]): row for row in report["rows"] if row["contestant"] == "moeshard"
    }
    for row in report["rows"]:
        assert len(row["seconds_all"]) == 3  # no budget: the fewest rounds
        assert row["seconds"] == pytest.approx(np.median(row["seconds_all"]))
        assert 0 < row["moe_share"] < 1
        mine = ours[row["ranks"], row["batch"], row["routing"]]["seconds"]
        assert row["over_moeshard"] == pytest.approx(row["seconds"] / mine)


def test_forced_routers_read_the_expert_off_the_token_in_every_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moeshard, "worker_state", {})
    config = encoder._config(options("--layers", "6"), 5, 1)
    encoder_rank.prepare(encoder_rank.Job(config, 0, ("hf",)))
    found = encoder_rank.check(encoder.Case("skew", 3, 31))
    rank = moeshard.worker_state["encoder"]
    experts = rank.batch % 5
    assert (found.counts == np.bincount(experts.flatten(), minlength=5)).all()
    given: list[torch.Tensor] = []
    with encoder_rank._hooked(rank.entries["hf"], lambda layer, inputs: given.append(inputs[0])):
        encoder_rank.measure(["hf"])
    assert len(given) == 3
    for hidden in given:  # the code itself, scaled
        carried = torch.nn.functional.normalize(hidden[..., : rank.codes.shape[1]], dim=-1)
        codes = torch.nn.functional.normalize(rank.codes, dim=-1)[experts]
        assert float((carried - codes).abs().max()) <= 8 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize(("experts", "hot"), [pytest.param(8, 0.453, id="8"), pytest.param(128, 0.898, id="128")])
def test_skew_is_the_papers(experts: int, hot: float) -> None:
    shares = encoder.shares_of_experts("skew", experts)
    count = -(-experts // 10)
    assert shares.sum() == pytest.approx(1)
    assert shares[:count].sum() == pytest.approx(hot, abs=5e-4)
    assert shares[0] / shares[-1] == pytest.approx(1 + 0.6 * experts)
    assert (encoder.shares_of_experts("own", experts) == 1 / experts).all()


def test_number_of_moe_layers_is_what_transformers_makes_of_the_configuration() -> None:
    from transformers import SwitchTransformersConfig

    for layers in (2, 4, 6, 12):
        for wanted in range(1, layers + 1):
            found, configured = encoder.sparse_layers(layers, wanted)
            config = SwitchTransformersConfig(num_layers=layers, num_sparse_encoder_layers=configured)
            step = config.encoder_sparse_step
            assert found == sum(i % step == 1 or step == 1 for i in range(layers)) <= wanted


def test_as_many_moe_layers_as_fit_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    for memory, layers in ((24, 2), (96, 6)):  # GiB; 6.75 a layer on 2 ranks, three quarters to be filled
        monkeypatch.setattr(encoder.doctor, "machine", lambda memory=memory: {"memory_bytes": memory << 30})
        config = encoder._config(options("--layers", "12", "--d-model", "768", "--d-ff", "3072"), 128, 2)
        assert encoder.sparse_layers(12, layers)[1] == config["num_sparse_encoder_layers"]
    monkeypatch.setattr(encoder.doctor, "machine", lambda: {"memory_bytes": 8 << 30})
    with pytest.raises(ArgumentError, match=r"--experts 128: one MoE layer takes 6.8 GiB on 2 ranks"):
        encoder._config(options("--d-model", "768", "--d-ff", "3072"), 128, 2)


def test_a_row_takes_the_worst_rank_and_leaves_out_what_cannot_be_compared() -> None:
    counts = np.array([[6, 2], [8, 0]])
    checks = [
        Check({"hf": 0.0, "moeshard": 1e-6}, {"hf": 0, "moeshard": 1}, 2.0, counts),
        Check({"hf": 0.0, "moeshard": 4e-6}, {"hf": 0, "moeshard": 2}, 1.0, counts),
    ]
    seconds = {"hf": [4.0, 9.0, 6.0], "moeshard": [1.0, 3.0, 2.0]}
    config, case = {"num_experts": 2, "num_layers": 4}, encoder.Case("own", 4, 2)
    row = encoder.summarize(config, case, "hf", 2, 1, checks, seconds, [0.5, 0.7, 0.6])
    assert (row.seconds, row.over_moeshard, row.moe_share, row.sequences_compared) == (6.0, 3.0, 0.6, 8)
    row = encoder.summarize(config, case, "moeshard", 2, 1, checks, seconds, [0.1])
    assert (row.max_rel_diff, row.sequences_compared, row.hot_share) == (2e-6, 5, 0.875)


def test_contestants_take_turns_in_going_first() -> None:
    rounds = list(encoder._rounds(("hf", "moeshard"), 0, 3, 9))
    assert rounds == [("hf", "moeshard"), ("moeshard", "hf"), ("hf", "moeshard")]
    assert len(list(encoder._rounds(("hf",), 60, 1, 2))) == 2


def test_wrong_outputs_fail_the_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    checks = [Check({"hf": 0.0, "moeshard": 1e-3}, {"hf": 0, "moeshard": 0}, 1.0, np.ones((2, 6), int))]

    def instead(config: dict, seed: int, ranks: int, names: tuple, cases: list, budget: float) -> list:
        seconds = {"hf": [1.0], "moeshard": [1.0]}
        return [
            [encoder.summarize(config, case, name, ranks, 1, checks, seconds, [0.5]) for name in seconds]
            for case in cases
        ]

    monkeypatch.setattr(encoder, "_run_encoder", instead)
    monkeypatch.setattr(encoder, "plot", lambda rows, path: None)
    assert encoder.run(options("--experts", "6", "--batches", "1", "--ranks", "1")) == 1
    said = capsys.readouterr().out
    assert "FAILED: moeshard, 6 experts, 1 ranks, 1 x 25, own: difference 1.0e-03 over 1 sequences" in said
    assert "FAILED: HuggingFace" not in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        pytest.param(["--d-model", "100"], "--d-model: expected a multiple of 64, got 100", id="width"),
        pytest.param(["--json", "nowhere/out.json"], "nowhere/out.json: there is no folder nowhere", id="folder"),
    ],
)
def test_options_that_cannot_be_used_are_refused_before_anything_starts(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ArgumentError, match=message):
        encoder.run(options(*words))
