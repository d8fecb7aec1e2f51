# SPDX-License-Identifier: Apache-2.0
"""from_pretrained and save_pretrained with a class whose code comes from the hub: nomic-embed-text-v2-moe's tree."""

import os

import pytest
import torch
import transformers
from family_models import inputs, nomic, save_nomic, tokens
from modeling_hf_nomic_bert import NomicBertModel
from test_families import error
from test_loading import on, same_weights
from test_saving import equal_checkpoints
from transformers.dynamic_module_utils import get_class_from_dynamic_module

import moeshard
from moeshard import checkpoint

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


def loaded_and_saved(group, folder, dtype, cls=NomicBertModel):
    """Errors in float32 of the unsharded model and of the loaded one; what must be the same as ``shard`` makes it."""
    whole = nomic()
    given = inputs(whole, seed=group.rank)
    exact = tokens(whole, given)
    whole.to(dtype)
    unsharded = tokens(whole, given)
    mine = moeshard.from_pretrained(cls, folder / "original", group=group, progress=False, torch_dtype="auto")
    facts = [type(mine) is cls, not any(module.training for module in mine.modules()), mine.pooler is None]
    theirs = moeshard.shard(whole, group=group, progress=False)
    found = tokens(mine, given)
    facts.append(torch.equal(found, tokens(theirs, given)))
    moeshard.save_pretrained(mine, folder / "new", max_shard_size="20KB", progress=False)
    mine = moeshard.unshard(mine)
    facts.append(mine.encoder.layers[1].rotary_emb.inv_freq.dtype == torch.float32)
    facts.append(same_weights(moeshard.unshard(theirs).to(dtype), mine.to(dtype)))  # `to` has cast their buffers
    return error(unsharded, exact), error(found, exact), error(found, unsharded), facts


@pytest.mark.parametrize("ranks", [1, 2])
@DTYPES
@pytest.mark.parametrize("size", ["50GB", "20KB"], ids=["one-file", "index"])
def test_the_class_of_hub_code_is_loaded_in_slices_and_saved(workers, tmp_path, ranks, dtype, size):
    save_nomic(nomic().to(dtype), tmp_path / "original", size)
    assert (tmp_path / "original" / checkpoint.INDEX).exists() == (size == "20KB")
    for theirs, ours, difference, facts in on(workers, ranks, loaded_and_saved, tmp_path, dtype):
        assert all(facts), facts
        if dtype == torch.float32:
            assert difference.max() <= 1e-5
        else:  # the rule of test_families.check
            assert ours.median() <= 1.5 * theirs.median()
            assert ours.sort().values[:-2].max() <= 1.5 * theirs.max() + 1e-3
    assert equal_checkpoints(tmp_path / "original", tmp_path / "new")


def test_the_class_is_found_in_a_module_that_transformers_made(tmp_path, monkeypatch):
    save_nomic(nomic(), tmp_path / "original")
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    cls = get_class_from_dynamic_module("modeling_hf_nomic_bert.NomicBertModel", str(tmp_path / "original"))
    assert cls is not NomicBertModel and cls.__module__.startswith("transformers_modules.")
    _, _, difference, facts = loaded_and_saved(moeshard.init("one"), tmp_path, torch.float32, cls)
    assert all(facts) and difference.max() <= 1e-5
    own = tokens(cls.from_pretrained(tmp_path / "original").eval(), inputs(nomic()))
    assert torch.equal(own, tokens(nomic(), inputs(nomic())))


@pytest.mark.parametrize("sharded", [True, False], ids=["from-shard", "loaded"])
def test_a_pooler_is_made_only_of_weights(tmp_path, sharded):
    model = NomicBertModel(nomic().config).eval()
    save_nomic(model, tmp_path / "original")
    given = inputs(model)
    with torch.no_grad():
        expected = model(**given)["pooler_output"]
    if sharded:
        mine = moeshard.shard(model, progress=False)
    else:
        mine = moeshard.from_pretrained(NomicBertModel, tmp_path / "original", progress=False)
    with torch.no_grad():
        assert torch.allclose(mine(**given)["pooler_output"], expected, atol=1e-5)
    moeshard.save_pretrained(mine, tmp_path / "new", progress=False)
    assert equal_checkpoints(tmp_path / "original", tmp_path / "new")


def test_everything_that_is_wrong_with_it_is_in_one_error(tmp_path):
    model = nomic()
    weights = model.state_dict()
    experts = "encoder.layers.0.mlp.experts."
    del weights[f"{experts}bias"]
    weights[f"{experts}mlp.w2"] = torch.zeros(5 * 37 - 1, 40)
    weights["encoder.layers.2.norm2.weight"] = torch.zeros(40)
    model.state_dict = lambda: weights
    save_nomic(model, tmp_path)
    with pytest.raises(moeshard.CheckpointError) as caught:
        moeshard.from_pretrained(NomicBertModel, tmp_path, progress=False)
    assert sorted(caught.value.problems) == [
        f"{experts}bias: missing",
        f"{experts}mlp.w2: expected [185, 40], got [184, 40]",
        "encoder.layers.2.norm2.weight: the model has no place for it",
    ]


# ---- what is read -----------------------------------------------------------------------------------------------


def mapped(file):
    """Bytes of a file that this process has touched through its mappings and not let go."""
    total, inside = 0, False
    with open("/proc/self/smaps") as lines:
        for line in lines:
            if "-" in line.partition(" ")[0]:
                inside = line.rstrip().endswith(str(file))
            elif inside and line.startswith("Rss:"):
                total += int(line.split()[1]) * 1024
    return total


def bytes_read(group, folder):
    """Of the checkpoint, by loading; and this rank's share of its experts."""
    touched = []
    forget = checkpoint.Checkpoint.forget
    checkpoint.Checkpoint.forget = lambda self, names: touched.append(mapped(file))
    file = os.path.realpath(folder / checkpoint.WEIGHTS)
    try:
        model = moeshard.from_pretrained(NomicBertModel, folder, group=group, progress=False)
    finally:
        checkpoint.Checkpoint.forget = forget
    return touched[-1], sum(m.packed.nbytes for m in model.modules() if isinstance(m, moeshard.ShardedExperts))


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_rank_reads_its_rows_of_the_stacked_experts_and_no_others(workers, tmp_path, ranks):
    save_nomic(nomic(n_embd=1024, n_inner=4096, num_experts=2), tmp_path)
    for read, share in on(workers, ranks, bytes_read, tmp_path):
        # The system maps 64 KiB to 2 MiB at a time: a slice of 8 MiB takes 12 MiB at most. Whole tensors: 2 shares.
        assert 0.99 * share <= read <= 1.6 * share, (read, share)
