# SPDX-License-Identifier: Apache-2.0
"""The `moeshard` command: the demo end to end on a small model, its numbers checked, and the text it reads."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import moeshard
from moeshard import cli, demo, text
from moeshard.plans import Plan

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

SMALL = ["--layers", "4", "--d-model", "64", "--d-ff", "37", "--experts", "5", "--tokens", "300", "--repeats", "2"]


def run_demo(folder: Path, *options: str) -> dict:
    """Run the command as a user would, in a process of its own; its results."""
    command = [sys.executable, "-m", "moeshard", "demo", "--json", "out.json", "--plot", "out.png", *options]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    results: dict = json.loads((folder / "out.json").read_text())
    results["printed"] = done.stdout
    return results


def checkpoint(folder: Path) -> Path:
    """A small Switch checkpoint with a tokenizer, as save_pretrained leaves them."""
    tokenizer = text.train_tokenizer(text.english()[:10], vocabulary=400)
    torch.manual_seed(1)
    config = transformers.SwitchTransformersConfig(
        vocab_size=400,
        d_model=64,
        d_ff=48,
        d_kv=32,
        num_heads=2,
        num_layers=4,
        num_sparse_encoder_layers=2,
        num_experts=4,
    )
    transformers.SwitchTransformersEncoderModel(config).save_pretrained(folder)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>"
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict:
    return run_demo(tmp_path_factory.mktemp("demo"), *SMALL, "--ranks", "3", "--threads", "1")


@pytest.mark.timeout(300)
def test_demo_outputs_agree_with_huggingface(results: dict) -> None:
    for routing in (results, results["skewed"]):
        assert 0 < routing["max_rel_diff_without_flips"] <= 1e-5  # exactly 0 would mean that nothing was compared
        assert routing["max_rel_diff"] >= routing["max_rel_diff_without_flips"]
        assert routing["router_flips"] >= 0


@pytest.mark.timeout(300)
def test_demo_counts_every_token_and_drops_none(results: dict) -> None:
    # 300 tokens a rank in sequences of 256: two sequences a rank
    assert (results["ranks"], results["tokens_per_rank"], results["tokens"]) == (3, 512, 1536)
    for routing in (results, results["skewed"]):
        assert routing["tokens_dropped"] == 0
        counts = np.array(routing["tokens_per_expert"])
        assert counts.shape == (2, 5)
        assert (counts.sum(1) == 1536).all()
        assert routing["tokens_dropped_by_default_capacity"] > 0  # 256 tokens, 5 experts, 64 each at most


@pytest.mark.timeout(300)
def test_demo_shares_follow_from_the_routing(results: dict) -> None:
    for routing in (results, results["skewed"]):
        counts = np.array(routing["tokens_per_expert"])
        sharded, owned = Plan.shard(3, 5, 37), Plan.expert_parallel(3, 5, 37)
        assert routing["share_of_work"] == pytest.approx(sharded.share(counts.sum(0)).tolist())
        assert routing["share_of_work_expert_parallel"] == pytest.approx(owned.share(counts.sum(0)).tolist())
        assert max(routing["share_of_work"]) < 0.36  # 37 columns over 3 ranks are 12 or 13
        assert routing["busiest_rank"] < routing["busiest_rank_expert_parallel"]


@pytest.mark.timeout(300)
def test_demo_skewed_router_sends_60_percent_to_a_tenth_of_the_experts(results: dict) -> None:
    assert results["skewed"]["hot_share"] == pytest.approx(0.6, abs=0.1)
    assert results["skewed"]["hot_share"] > results["hot_share"]
    counts = np.array(results["skewed"]["tokens_per_expert"])
    assert counts[:, 0].sum() / counts.sum() == pytest.approx(results["skewed"]["hot_share"])


@pytest.mark.timeout(300)
def test_demo_times_both_models_on_every_pass(results: dict) -> None:
    for routing in (results, results["skewed"]):
        for key in ("seconds", "seconds_hf"):
            assert len(routing[f"{key}_all"]) == 2  # one batch, two repeats
            assert routing[key] == pytest.approx(np.median(routing[f"{key}_all"]))
            assert routing[key] > 0


@pytest.mark.timeout(300)
def test_demo_says_what_it_measured_on(results: dict) -> None:
    assert results["weights"] == "seeded"
    assert "seeded, not trained" in results["printed"]
    assert results["machine"]["isa"] == moeshard._core.isa()
    assert results["versions"]["moeshard"] == moeshard.__version__
    expected = 2 * 2 * 5 * 64 * 37 * 4  # two MoE layers, two matrices, five experts
    saved = [whole - part for whole, part in zip(results["weight_bytes_hf"], results["weight_bytes"], strict=True)]
    # Packed columns are padded to panels of 16: 12 or 13 columns take 16 here.
    assert all(expected * (1 - 16 / 37) <= bytes_saved + 1 for bytes_saved in saved)
    assert "tokens dropped" in results["printed"]


@pytest.mark.timeout(300)
def test_demo_reads_a_checkpoint(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "model")
    results = run_demo(tmp_path, "--model", str(path), "--tokens", "40", "--repeats", "1", "--ranks", "1")
    assert results["weights"] == str(path)
    assert str(path) in results["printed"]
    assert results["tokens"] == 40
    assert results["d_ff"] == 48
    assert results["max_rel_diff_without_flips"] <= 1e-5
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_demo_fails_when_outputs_differ_without_a_flip() -> None:
    facts = facts_of(ranks=2)
    good, bad = pair_of(difference=1e-6), pair_of(difference=1e-3)
    outcome = demo.summarize([[good, good]], 1, facts, hot=1)
    assert outcome.max_rel_diff_without_flips <= demo.TOLERANCE
    outcome = demo.summarize([[good, good], [good, bad]], 1, facts, hot=1)
    assert outcome.max_rel_diff_without_flips > demo.TOLERANCE
    assert outcome.tokens == 8  # repetitions are not counted twice
    broken = pair_of(difference=float("inf"), magnitude=0.0)
    assert demo.summarize([[broken, good]], 1, facts, hot=1).max_rel_diff_without_flips > demo.TOLERANCE


def test_pass_takes_as_long_as_its_slowest_rank() -> None:
    passes = [[pair_of(seconds=a), pair_of(seconds=b)] for a, b in ((1.0, 2.0), (5.0, 3.0), (4.0, 4.0))]
    assert demo.summarize(passes, 1, facts_of(ranks=2), hot=1).seconds == 4.0


def facts_of(ranks: int) -> list:
    from moeshard.demo_rank import Facts

    columns = np.full((1, 2), 8 // ranks)
    return [Facts(columns, d_ff=8, parameters=1, capacity=64, weight_bytes=1, weight_bytes_hf=2)] * ranks


def pair_of(seconds: float = 1.0, difference: float = 0.0, magnitude: float = 1.0) -> object:
    from moeshard.demo_rank import Pair

    return Pair(
        seconds=seconds,
        seconds_hf=seconds,
        counts=np.array([[6, 2]]),
        dropped=0,
        dropped_by_default=0,
        flips=0,
        difference=difference,
        difference_without_flips=difference,
        magnitude=magnitude,
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        pytest.param(["demo", "--ranks", "0"], "--ranks: expected at least 1, got 0", id="no-ranks"),
        pytest.param(["demo", "--tokens", "many"], "--tokens", id="not-a-number"),
        pytest.param(["sing"], "invalid choice: 'sing'", id="unknown-command"),
        pytest.param([], "COMMAND", id="no-command"),
    ],
)
def test_bad_option_says_what_is_accepted(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_impossible_width_is_refused_before_anything_starts(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo", "--d-model", "100"]) == 1
    assert "--d-model: expected a multiple of 64, got 100" in capsys.readouterr().err


def test_a_folder_that_does_not_exist_is_refused_before_anything_starts(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo", "--json", "nowhere/out.json"]) == 1
    assert "nowhere/out.json: there is no folder nowhere" in capsys.readouterr().err


def test_english_is_real_text() -> None:
    topics = text.english()
    assert len(topics) > 50
    assert sum(map(len, topics)) > 300_000
    assert "coroutine" in " ".join(topics)


def test_tokenizer_is_the_same_every_time_and_loses_nothing() -> None:
    topics = text.english()
    one, other = text.train_tokenizer(topics), text.train_tokenizer(topics)
    assert one.to_str() == other.to_str()
    assert one.get_vocab_size() <= 8192
    for sample in (*topics[:5], "naïve façade, 東京, \t tabs"):
        encoded = one.encode(sample)
        assert encoded.ids[-1] == 1
        assert one.decode(encoded.ids) == sample


def test_tokenizer_refuses_a_vocabulary_without_room_for_bytes() -> None:
    with pytest.raises(moeshard.ArgumentError, match="vocabulary: expected at least 258, got 100"):
        text.train_tokenizer(["a"], vocabulary=100)


def test_sequences_follow_the_documents_and_start_again() -> None:
    assert text.sequences([[1, 2, 3], [], [4]], count=3, length=3).tolist() == [[1, 2, 3], [4, 1, 2], [3, 4, 1]]


@pytest.mark.parametrize("documents", [[], [[], []]])
def test_sequences_refuse_documents_without_a_token(documents: list[list[int]]) -> None:
    with pytest.raises(moeshard.ArgumentError, match="at least one token"):
        text.sequences(documents, count=1, length=1)
