# SPDX-License-Identifier: Apache-2.0
"""save_pretrained and state_dict: the checkpoint of before, byte for byte, out of the ranks."""

import json
import os
import warnings

import pytest
import torch
from safetensors.torch import load_file
from switch_models import batch, run, switch_model
from test_loading import KINDS, NEW, mixtral, on, same_weights
from transformers import GenerationConfig
from workers import on_ranks

import moeshard
from moeshard import saving
from moeshard.checkpoint import INDEX, WEIGHTS


def contents(folder):
    """Every tensor of a checkpoint; its other files."""
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors.update(load_file(file))
    return tensors, {file.name: file.read_text() for file in folder.iterdir() if file.suffix == ".json"}


def equal_checkpoints(one, other):
    (mine, texts), (theirs, others) = contents(one), contents(other)
    texts.pop(INDEX, None), others.pop(INDEX, None)
    return (
        mine.keys() == theirs.keys()
        and all(mine[n].dtype == theirs[n].dtype and torch.equal(mine[n], theirs[n]) for n in mine)
        and texts == others
    )


def save_sharded(group, kind, dtype, folder, size, how):
    """Shard a model, or load it from slices; save it; whether it works as before."""
    if how == "load":
        options = {"torch_dtype": "auto", "group": group, "progress": False}  # 4.57 loads float32 by default
        model = moeshard.from_pretrained(KINDS[kind], folder / "original", **options)
    else:
        model = switch_model(kind, num_experts=5).to(dtype)
        moeshard.shard(model, group=group, plan="expert_parallel" if how == "whole" else "auto", progress=False)
    inputs = batch(2, 5)
    if kind == "seq2seq":
        inputs["labels"] = inputs["input_ids"]
    moeshard.save_pretrained(model, folder / "new", max_shard_size=size, progress=False)
    return len(run(model, inputs).outputs[0])


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize(
    ("kind", "dtype", "size", "how"),
    [
        ("encoder", torch.float32, None, "shard"),
        ("encoder", torch.float32, None, "whole"),
        ("encoder", torch.bfloat16, "20KB", "load"),
        ("seq2seq", torch.float32, "100KB", "load"),
        ("seq2seq", torch.float16, None, "shard"),
    ],
)
def test_a_saved_checkpoint_is_the_original_byte_for_byte(workers, tmp_path, ranks, kind, dtype, size, how):
    model = switch_model(kind, num_experts=5).to(dtype)
    model.save_pretrained(tmp_path / "original", **({} if size is None else {"max_shard_size": size}))
    on(workers, ranks, save_sharded, kind, dtype, tmp_path, size, how)
    assert equal_checkpoints(tmp_path / "original", tmp_path / "new")
    assert sorted(os.listdir(tmp_path)) == ["new", "original"]
    if size is not None:
        index, other = (json.loads((tmp_path / n / INDEX).read_text()) for n in ("original", "new"))
        assert len(set(other["weight_map"].values())) > 1
        assert index["metadata"]["total_size"] == other["metadata"]["total_size"]
    found = KINDS[kind].from_pretrained(tmp_path / "new", dtype="auto")
    assert same_weights(model, found)


def save_mixtral(group, folder, lazy):
    from transformers.models.mixtral import modeling_mixtral as modeling

    model = moeshard.from_pretrained(modeling.MixtralForCausalLM, folder / "original", group=group, progress=False)
    piecewise, saving._is_piecewise = saving._is_piecewise, saving._is_piecewise if lazy else lambda source: False
    try:
        moeshard.save_pretrained(model, folder / "new", progress=False)
    finally:
        saving._is_piecewise = piecewise


@NEW
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("lazy", [True, False], ids=["piecewise", "whole"])
@pytest.mark.parametrize("original", [True, False], ids=["each-expert", "stacked"])
def test_experts_that_transformers_has_stacked_go_back_as_they_were(workers, tmp_path, ranks, original, lazy):
    model = mixtral(tmp_path / "original", save_original_format=original)
    on(workers, ranks, save_mixtral, tmp_path, lazy)
    assert equal_checkpoints(tmp_path / "original", tmp_path / "new")
    assert same_weights(model, type(model).from_pretrained(tmp_path / "new"))


def test_generation_settings_are_saved(tmp_path):
    model = switch_model("seq2seq")
    model.generation_config = GenerationConfig(max_new_tokens=7, decoder_start_token_id=0)
    moeshard.save_pretrained(moeshard.shard(model, progress=False), tmp_path / "new", progress=False)
    assert KINDS["seq2seq"].from_pretrained(tmp_path / "new").generation_config.max_new_tokens == 7


def test_storage_in_another_dtype_is_saved_in_the_models_own(tmp_path):
    model = moeshard.shard(switch_model(), dtype="bfloat16", progress=False)
    moeshard.save_pretrained(model, tmp_path, progress=False)
    rounded = switch_model()
    for name, parameter in rounded.named_parameters():
        if "expert_" in name:
            parameter.data = parameter.data.bfloat16().float()
    assert same_weights(rounded, KINDS["encoder"].from_pretrained(tmp_path))


def save_over(group, folder, how):
    """A save that fails on a rank; then one over the checkpoint that the model was loaded from."""
    model = moeshard.from_pretrained(KINDS["encoder"], folder, group=group, progress=False)
    before = run(model, batch(2, 5)).outputs[0]
    place, name = {"gathering": (saving, "collect"), "writing": (saving.Writer, "write")}[how]
    here = group.rank == (0 if how == "writing" else group.size - 1)
    original, calls = getattr(place, name), iter(range(3))

    def failing(*arguments):
        if next(calls, None) is None:
            if how == "writing":
                raise OSError("no space left")
            with arguments[0].group.refusing():
                raise OSError("no space left")
        return original(*arguments)

    if here:
        setattr(place, name, failing)
    try:
        moeshard.save_pretrained(model, folder, progress=False)
        said = "nothing"
    except Exception as error:
        said = type(error).__name__
    finally:
        setattr(place, name, original)
    works = torch.equal(run(model, batch(2, 5)).outputs[0], before)
    left = sorted(os.listdir(folder.parent))
    group.barrier()
    moeshard.save_pretrained(model, folder, progress=False)
    return (
        said == ("OSError" if here else "PeerError"),
        works,
        left,
        torch.equal(run(model, batch(2, 5)).outputs[0], before),
    )


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("how", ["gathering", "writing"])
def test_a_save_that_fails_leaves_everything_as_it_was(workers, tmp_path, ranks, how):
    switch_model().save_pretrained(tmp_path / "model", max_shard_size="20KB")
    for result in on(workers, ranks, save_over, tmp_path / "model", how):
        assert result == (True, True, ["model"], True)
    # one file now, in place of several and their index
    assert sorted(os.listdir(tmp_path / "model")) == ["config.json", WEIGHTS]
    assert same_weights(switch_model(), KINDS["encoder"].from_pretrained(tmp_path / "model"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (switch_model, "not sharded"),
        (lambda: moeshard.shard(torch.nn.Sequential(switch_model()), progress=False), "of transformers.*state_dict"),
    ],
)
def test_what_cannot_be_saved_says_why(tmp_path, make, message):
    with pytest.raises(moeshard.ArgumentError, match=message):
        moeshard.save_pretrained(make(), tmp_path / "new", progress=False)
    (tmp_path / "file").touch()
    with pytest.raises(moeshard.ArgumentError, match="path: expected a folder"):
        moeshard.save_pretrained(moeshard.shard(switch_model(), progress=False), tmp_path / "file", progress=False)
    assert os.listdir(tmp_path) == ["file"]


def test_progress_is_shown(tmp_path, capfd):
    moeshard.save_pretrained(moeshard.shard(switch_model(), progress=False), tmp_path)
    assert "saving experts" in capfd.readouterr().err


# ---- state_dict -------------------------------------------------------------------------------------------------


def whole_state(group, kind, dtype, rank0_only):
    model = switch_model(kind, num_experts=5).to(dtype)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    moeshard.shard(model, group=group, progress=False)
    found = moeshard.state_dict(model, rank0_only=rank0_only)
    inputs = batch(2, 5)
    if kind == "seq2seq":
        inputs["labels"] = inputs["input_ids"]
    output = run(model, inputs).outputs[0]  # collective, also where the result is empty
    if rank0_only and group.rank:
        return found == {}
    same = list(found) == list(expected) and all(
        found[n].dtype == expected[n].dtype and torch.equal(found[n], expected[n]) for n in expected
    )
    again = switch_model(kind, num_experts=5, seed=1).to(dtype)
    again.load_state_dict(found)
    difference = (output - run(again, inputs).outputs[0]).abs().max()
    return same and bool(difference < 0.05)


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("rank0_only", [False, True])
@pytest.mark.parametrize(("kind", "dtype"), [("encoder", torch.bfloat16), ("seq2seq", torch.float32)])
def test_state_dict_has_the_original_names_and_bits(workers, ranks, kind, dtype, rank0_only):
    assert all(on(workers, ranks, whole_state, kind, dtype, rank0_only))


def test_the_state_dict_of_a_block_by_itself():
    block = switch_model(num_experts=3).encoder.block[1].layer[-1].mlp
    expected = {name: tensor.clone() for name, tensor in block.state_dict().items()}
    found = moeshard.state_dict(moeshard.shard(block, progress=False))
    assert list(found) == list(expected) and all(torch.equal(found[n], expected[n]) for n in expected)


def one_rank_fails(group):
    model = moeshard.shard(switch_model(), group=group, progress=False)
    before = run(model, batch(2, 5)).outputs[0]
    if group.rank == 1:
        allocate, saving.allocate = saving.allocate, lambda *_: (_ for _ in ()).throw(MemoryError("no memory"))
    try:
        moeshard.state_dict(model)
        said = "nothing"
    except Exception as error:
        said = type(error).__name__
    finally:
        if group.rank == 1:
            saving.allocate = allocate
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return said, torch.equal(run(model, batch(2, 5)).outputs[0], before), len(moeshard.state_dict(model)) > 10


def test_a_state_dict_that_fails_on_a_rank_fails_on_all_and_leaves_the_model_as_it_was(workers):
    assert on_ranks(workers, 2, one_rank_fails) == [("PeerError", True, True), ("MemoryError", True, True)]
