# SPDX-License-Identifier: Apache-2.0
"""from_pretrained: what shard(cls.from_pretrained(path)) gives, from slices; all that does not fit in one error."""

import gc
import json
import re
import shutil
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from family_models import FAMILIES, nomic, save_nomic, tokens
from family_models import inputs as family_inputs
from modeling_hf_nomic_bert import NomicBertModel
from safetensors.torch import load_file, save_file
from switch_models import batch, run, switch_model
from transformers import AutoModel, SwitchTransformersEncoderModel, SwitchTransformersForConditionalGeneration
from workers import on_ranks

import moeshard
from moeshard import checkpoint, conversion, loading

KINDS = {"encoder": SwitchTransformersEncoderModel, "seq2seq": SwitchTransformersForConditionalGeneration}
RANKS = pytest.mark.parametrize("ranks", [1, 2, 3, 4])
NEW = pytest.mark.skipif(not conversion.CONVERTS, reason="transformers 4 has no stacked experts")


def saved(folder, kind="encoder", dtype=torch.float32, size="50GB", **changes):
    """A checkpoint as transformers writes it."""
    model = switch_model(kind, **{"num_experts": 5, **changes}).to(dtype)
    model.save_pretrained(folder, max_shard_size=size)
    return folder


def on(workers, ranks, function, *arguments):
    """The results of a function of a group, on 1 rank here or on several workers."""
    if ranks == 1:
        return [function(moeshard.init("one"), *arguments)]
    return on_ranks(workers, ranks, function, *arguments)


def same_weights(expected, found):
    """Whether two models have the same parameters and buffers, bit for bit, tied ones too."""
    mine, theirs = (
        {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
        for model in (expected, found)
    )
    tied = [
        [[name for name in tensors if tensors[name] is tensors[one]] for one in tensors] for tensors in (mine, theirs)
    ]
    return (
        list(mine) == list(theirs)
        and tied[0] == tied[1]
        and all(mine[n].dtype == theirs[n].dtype and torch.equal(mine[n], theirs[n]) for n in mine)
    )


def loaded_like_huggingface(group, cls, folder, inputs, options, loading):
    """Against shard(from_pretrained): outputs, then all weights."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = cls.from_pretrained(folder, **({"dtype": loading["torch_dtype"]} if "torch_dtype" in loading else {}))
        mine = moeshard.from_pretrained(cls, folder, group=group, progress=False, **options, **loading)
    facts = [type(mine) is type(whole), not any(module.training for module in mine.modules())]
    theirs = moeshard.shard(whole, group=group, progress=False, **options)
    with torch.no_grad():
        facts.append(all(torch.equal(a, b) for a, b in zip(mine(**inputs)[:1], theirs(**inputs)[:1], strict=True)))
    facts.append([m.packed.nbytes for m in mine.modules() if isinstance(m, moeshard.ShardedExperts)] != [])
    facts.append(same_weights(moeshard.unshard(theirs), moeshard.unshard(mine)))
    facts.append(mine.config.to_dict() == whole.config.to_dict() and mine.name_or_path == str(folder))
    if whole.can_generate():
        facts.append(mine.generation_config.to_dict() == whole.generation_config.to_dict())
    return facts


@RANKS
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", ["50GB", "20KB"])
def test_loads_what_huggingface_loads(workers, tmp_path, ranks, kind, size):
    folder, inputs = saved(tmp_path, kind, size=size), batch(3, 9)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 3) == (size == "20KB")
    if kind == "seq2seq":
        inputs["labels"] = batch(3, 7)["input_ids"]
    for facts in on(workers, ranks, loaded_like_huggingface, KINDS[kind], folder, inputs, {}, {}):
        assert all(facts), facts


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize(
    ("stored", "options", "loading"),
    [
        pytest.param(torch.float32, {"plan": "expert_parallel"}, {}, id="expert-parallel"),
        pytest.param(torch.bfloat16, {}, {}, id="bfloat16"),
        pytest.param(torch.float32, {}, {"torch_dtype": torch.bfloat16}, id="to-bfloat16"),
        pytest.param(torch.bfloat16, {}, {"torch_dtype": "float32"}, id="to-float32"),
        pytest.param(torch.float16, {}, {"torch_dtype": "auto"}, id="auto"),
        pytest.param(torch.float32, {"dtype": "bfloat16", "capacity": 2}, {}, id="storage"),
    ],
)
def test_options_and_dtypes_are_those_of_shard_and_of_huggingface(workers, tmp_path, ranks, stored, options, loading):
    folder = saved(tmp_path, dtype=stored)
    for facts in on(workers, ranks, loaded_like_huggingface, KINDS["encoder"], folder, batch(3, 9), options, loading):
        # In a 16-bit model the router casts its classifier in its first forward pass, on both sides.
        assert all(facts), facts


@RANKS
def test_a_placement_is_carried_out(workers, tmp_path, ranks):
    folder = saved(tmp_path)
    counts = {f"encoder.block.{block}.layer.1.mlp": [9, 1, block, 5, 5] for block in (1, 3)}
    options = {"plan": moeshard.place(counts, ranks)}
    for facts in on(workers, ranks, loaded_like_huggingface, KINDS["encoder"], folder, batch(3, 9), options, {}):
        assert all(facts), facts


def test_an_auto_class_and_a_configuration_of_ones_own(tmp_path):
    folder = saved(tmp_path)
    config = transformers.AutoConfig.from_pretrained(folder, expert_capacity=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = moeshard.from_pretrained(SwitchTransformersEncoderModel, folder, config=config, progress=False)
    assert {m.expert_capacity for m in model.modules() if hasattr(m, "expert_capacity")} == {2}
    saved(tmp_path / "whole", "seq2seq")
    found = moeshard.from_pretrained(transformers.AutoModelForSeq2SeqLM, tmp_path / "whole", progress=False)
    assert type(found) is SwitchTransformersForConditionalGeneration


def test_parts_that_the_class_does_not_have_are_left_out_with_a_warning(tmp_path):
    folder, inputs = saved(tmp_path, "seq2seq"), batch(2, 5)
    with pytest.warns(UserWarning, match="SwitchTransformersEncoderModel has no decoder.*left out"):
        model = moeshard.from_pretrained(SwitchTransformersEncoderModel, folder, progress=False)
    expected = switch_model("seq2seq", num_experts=5).get_encoder()
    with torch.no_grad():
        expected = expected(**inputs).last_hidden_state
    assert torch.allclose(run(model, inputs).outputs[0], expected, atol=1e-5)


def test_progress_is_shown_and_can_be_switched_off(tmp_path, capfd):
    folder = saved(tmp_path)
    capfd.readouterr()
    moeshard.from_pretrained(SwitchTransformersEncoderModel, folder)
    assert "loading experts" in capfd.readouterr().err
    moeshard.from_pretrained(SwitchTransformersEncoderModel, folder, progress=False)
    assert capfd.readouterr().err == ""


# ---- checkpoints that transformers converts ---------------------------------------------------------------------


def mixtral(folder=None, dtype=torch.float32, **options):
    """A small Mixtral; its checkpoint has every expert's w1, w2 and w3, or (``save_original_format=False``) stacks."""
    from transformers.models.mixtral import modeling_mixtral as modeling

    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=37,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=5,
        max_position_embeddings=64,
    )
    model = modeling.MixtralForCausalLM(config).eval().to(dtype)
    if folder is not None:
        model.save_pretrained(folder, **options)
    return model


def mixtral_like_huggingface(group, folder, loading):
    from transformers.models.mixtral import modeling_mixtral as modeling

    inputs = {"input_ids": torch.arange(14).view(2, 7)}
    return loaded_like_huggingface(group, modeling.MixtralForCausalLM, folder, inputs, {}, loading)


@NEW
@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("original", [True, False], ids=["each-expert", "stacked"])
def test_experts_one_by_one_and_stacked_on_disk(workers, tmp_path, ranks, original):
    mixtral(tmp_path, save_original_format=original, max_shard_size="50KB")
    names = json.loads((tmp_path / checkpoint.INDEX).read_text())["weight_map"]
    assert any(".experts.4.w1.weight" in name for name in names) == original
    for facts in on(workers, ranks, mixtral_like_huggingface, tmp_path, {}):
        assert all(facts), facts


@NEW
@pytest.mark.parametrize("family", ["nllb", *({"gpt_oss", "mixtral"} & FAMILIES.keys())])
def test_on_a_device_a_row_of_memory_stands_in_for_a_parameter(tmp_path, monkeypatch, family):
    """Seen on torch's meta device: which strides the tensors of experts have that a CUDA engine checks."""
    stand_ins = []
    put_back = loading._Taken.put_back

    def on_meta(taken, model):
        sources = put_back(taken, model.to("meta"))
        stand_ins.extend(adapter.weights(block) for block, adapter in taken.blocks)
        return sources

    FAMILIES[family]().save_pretrained(tmp_path)
    monkeypatch.setattr(loading._Taken, "put_back", on_meta)
    with pytest.raises(moeshard.ArgumentError, match="on the meta device"):
        moeshard.from_pretrained(type(FAMILIES[family]()), tmp_path, progress=False)
    for weights in stand_ins:
        sizes = {expert.shape for expert in weights.w_in}
        assert len(sizes) == 1 and all(expert.untyped_storage().nbytes() <= 4096 for expert in weights.w_in)
        for bias in (weights.b_in, weights.b_out):
            assert bias is None or all(expert.is_contiguous() for expert in bias)
    assert stand_ins


@NEW
def test_stacked_experts_in_another_dtype(workers, tmp_path):
    mixtral(tmp_path, torch.bfloat16)
    for facts in on(workers, 2, mixtral_like_huggingface, tmp_path, {"torch_dtype": torch.float32}):
        assert all(facts), facts


@NEW
def test_a_conversion_that_lazy_tensors_do_not_understand_is_run_on_whole_ones(workers, tmp_path, monkeypatch):
    mixtral(tmp_path)

    def blind(*arguments, **options):
        raise NotImplementedError

    monkeypatch.setattr(conversion.Stored, "__torch_function__", classmethod(blind))
    [facts] = on(workers, 1, mixtral_like_huggingface, tmp_path, {})
    assert all(facts), facts


@NEW
def test_experts_that_a_stack_lacks_are_named(tmp_path):
    from transformers.models.mixtral import modeling_mixtral as modeling

    mixtral(tmp_path)
    weights = load_file(tmp_path / checkpoint.WEIGHTS)
    prefix = "model.layers.0.block_sparse_moe.experts."
    gone = [
        f"{prefix}1.w1.weight",
        f"{prefix}4.w2.weight",
        *(f"{prefix.replace('0', '2')}{e}.w3.weight" for e in range(5)),
    ]
    for name in gone:
        del weights[name]
    weights[f"{prefix.replace('0', '1')}3.w2.weight"] = torch.zeros(48, 36)
    save_file(weights, tmp_path / checkpoint.WEIGHTS)
    with pytest.raises(moeshard.CheckpointError) as caught:
        moeshard.from_pretrained(modeling.MixtralForCausalLM, tmp_path, progress=False)
    assert sorted(p for p in caught.value.problems if "missing" in p) == sorted(f"{name}: missing" for name in gone)
    [other] = [problem for problem in caught.value.problems if "missing" not in problem]
    assert other.startswith("model.layers.1.mlp.experts.down_proj: cannot be made of")


# ---- every family ---------------------------------------------------------------------------------------------------


def loaded_and_saved(group, family, folder):
    """Whether a family's model loads as HuggingFace loads it, and is saved as it was."""
    cls = type(FAMILIES[family]())
    config = transformers.AutoConfig.from_pretrained(folder / "original")
    config._attn_implementation = "eager"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mine = moeshard.from_pretrained(
            cls, folder / "original", group=group, progress=False, torch_dtype="auto", config=config
        )
        theirs = moeshard.shard(
            cls.from_pretrained(folder / "original", dtype="auto", config=config), group=group, progress=False
        )
    given = family_inputs(mine)
    facts = [torch.equal(tokens(mine, given), tokens(theirs, given))]
    moeshard.save_pretrained(mine, folder / "new", progress=False)
    facts.append(same_weights(moeshard.unshard(theirs), moeshard.unshard(mine)))
    if group.rank == 0:
        theirs.save_pretrained(folder / "theirs")
    return facts


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "nomic"])  # it has test_hub_code.py
def test_every_family_is_loaded_and_saved_as_huggingface_does(workers, tmp_path, family, ranks, dtype):
    FAMILIES[family]().to(dtype).save_pretrained(tmp_path / "original")
    for facts in on(workers, ranks, loaded_and_saved, family, tmp_path):
        assert all(facts), facts
    # In 16 bits HuggingFace keeps, or makes, some weights float32: routers in their first forward pass, for example.
    for name in ["theirs", "original"] if dtype == torch.float32 else ["theirs"]:
        expected, new = (load_file(tmp_path / folder / checkpoint.WEIGHTS) for folder in (name, "new"))
        assert expected.keys() == new.keys()
        assert all(expected[n].dtype == new[n].dtype and torch.equal(expected[n], new[n]) for n in new)


# ---- one error ------------------------------------------------------------------------------------------------


def broken(folder):
    """A checkpoint with one of everything; the problems it must be said to have."""
    saved(folder)
    weights = load_file(folder / checkpoint.WEIGHTS)
    mlp = "encoder.block.1.layer.1.mlp."
    del weights[f"{mlp}experts.expert_2.wi.weight"]
    del weights["encoder.final_layer_norm.weight"]
    weights[f"{mlp}experts.expert_0.wo.weight"] = torch.zeros(48, 36)
    weights[f"{mlp}experts.expert_1.wi.weight"] = torch.zeros(37, 48, dtype=torch.int64)
    weights[f"{mlp}experts.expert_5.wi.weight"] = torch.zeros(37, 48)
    weights["encoder.block.0.layer.0.layer_norm.weight"] = torch.zeros(47)
    weights["encoder.block.9.layer.0.layer_norm.weight"] = torch.zeros(48)
    save_file(weights, folder / checkpoint.WEIGHTS)
    size = (folder / checkpoint.WEIGHTS).stat().st_size
    last = max(checkpoint.Checkpoint(folder).entries.values(), key=lambda entry: entry.stop)
    with open(folder / checkpoint.WEIGHTS, "r+b") as file:
        file.truncate(size - 4)
    return [
        f"{last.name}: truncated, model.safetensors ends at byte {size - 4} but the tensor at byte {size}",
        f"{mlp}experts.expert_2.wi.weight: missing",
        "encoder.final_layer_norm.weight: missing",
        f"{mlp}experts.expert_0.wo.weight: expected [48, 37], got [48, 36]",
        f"{mlp}experts.expert_1.wi.weight: expected torch.float32, got torch.int64",
        f"{mlp}experts.expert_5.wi.weight: the model has no place for it",
        "encoder.block.0.layer.0.layer_norm.weight: expected [48], got [47]",
        "encoder.block.9.layer.0.layer_norm.weight: the model has no place for it",
    ]


def load_broken(group, folder):
    try:
        moeshard.from_pretrained(SwitchTransformersEncoderModel, folder, group=group, progress=False)
    except moeshard.CheckpointError as error:
        said = error.problems, str(error).count("\n"), error.path
    return said, group.all_gather(b"goes on") == [b"goes on"] * group.size


@RANKS
def test_everything_that_is_wrong_is_in_one_error_on_every_rank(workers, tmp_path, ranks):
    problems = broken(tmp_path)
    for (found, lines, path), goes_on in on(workers, ranks, load_broken, tmp_path):
        assert sorted(found) == sorted(problems)
        assert lines == len(problems) and path == str(tmp_path) and goes_on


def test_a_checkpoint_error_travels_between_processes(workers, tmp_path):
    problems = broken(tmp_path)

    def load(folder):
        moeshard.from_pretrained(SwitchTransformersEncoderModel, folder, group=moeshard.init("one"), progress=False)

    with pytest.raises(moeshard.CheckpointError, match="8 problems") as caught:
        workers.run(load, tmp_path)
    assert sorted(caught.value.problems) == sorted(problems)


def test_a_missing_file_is_one_problem(tmp_path):
    saved(tmp_path, size="20KB")
    lost = sorted(tmp_path.glob("*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(moeshard.CheckpointError) as caught:
        moeshard.from_pretrained(SwitchTransformersEncoderModel, tmp_path, progress=False)
    assert len(caught.value.problems) == 1 and caught.value.problems[0].startswith(f"{lost.name}: missing")


def fails_on_rank_1(group, folders, how):
    """What each rank says when rank 1 has another checkpoint, none, or trouble midway; then all have the same."""
    cls, path, options = SwitchTransformersEncoderModel, folders[0], {"progress": False, "group": group}
    if group.rank == 1:
        path = {"other": folders[1], "none": folders[0] + "-gone"}.get(how, path)
        if how == "midway":
            forget, calls = checkpoint.Checkpoint.forget, iter(range(3))

            def failing(self, names):
                if next(calls, None) is None:
                    raise OSError("the disk is gone")

            checkpoint.Checkpoint.forget = failing
        if how == "option":
            options["capacity"] = -1
    try:
        moeshard.from_pretrained(cls, path, **options)
        said = "nothing"
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    finally:
        if group.rank == 1 and how == "midway":
            checkpoint.Checkpoint.forget = forget
    model = moeshard.from_pretrained(cls, folders[0], group=group, progress=False)
    return said, run(model, batch(2, 5)).outputs[0]


@pytest.mark.parametrize(
    ("how", "on_rank_1", "elsewhere"),
    [
        ("other", "RankMismatch: .*were all ranks given the same", None),
        ("none", "ArgumentError: path: no folder", "PeerError: rank 1: ArgumentError: path: no folder"),
        ("midway", "OSError: the disk is gone", "PeerError: rank 1: OSError: the disk is gone"),
        ("option", "ArgumentError: capacity", "PeerError: rank 1: ArgumentError: capacity"),
    ],
)
def test_a_rank_that_fails_makes_all_fail(workers, tmp_path, how, on_rank_1, elsewhere):
    folders = [str(saved(tmp_path / "a")), str(saved(tmp_path / "b", seed=1))]
    results = on_ranks(workers, 2, fails_on_rank_1, folders, how)
    for rank, (said, _) in enumerate(results):
        assert re.match(on_rank_1 if rank == 1 or elsewhere is None else elsewhere, said), said
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize(
    ("cls", "change", "message"),
    [
        pytest.param(torch.nn.Linear, None, "cls: expected a model class of transformers", id="class"),
        pytest.param(AutoModel, lambda folder: shutil.rmtree(folder), "path: no folder", id="no-folder"),
        pytest.param(
            SwitchTransformersEncoderModel,
            lambda folder: (folder / checkpoint.WEIGHTS).rename(folder / "pytorch_model.bin"),
            "pytorch_model.bin, a pickle",
            id="pickle",
        ),
    ],
)
def test_what_cannot_be_loaded_says_why(tmp_path, cls, change, message):
    folder = saved(tmp_path / "model")
    if change is not None:
        change(folder)
    with pytest.raises(moeshard.ArgumentError, match=message):
        moeshard.from_pretrained(cls, folder, progress=False)


def test_a_model_without_experts_says_so(tmp_path):
    config = transformers.BertConfig(
        vocab_size=11, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    transformers.BertModel(config).save_pretrained(tmp_path)
    with pytest.raises(moeshard.ArgumentError, match="BertModel has no Mixture-of-Experts layer"):
        moeshard.from_pretrained(transformers.BertModel, tmp_path, progress=False)


# ---- memory ---------------------------------------------------------------------------------------------------

MIB = 1 << 20


def resident(peak=False):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM" if peak else "VmRSS"))


def loading_peak(folder, family):
    """Bytes that loading took at most, and those that stay, above what the process had."""
    group = moeshard.init()
    cls = {"switch": SwitchTransformersEncoderModel, "nomic": NomicBertModel}.get(family)
    if family == "stacked":
        from transformers.models.mixtral import modeling_mixtral as modeling

        cls = modeling.MixtralForCausalLM
    small = Path(folder) / "small"
    moeshard.from_pretrained(cls, small, group=group, progress=False)  # imports and first-call memory
    gc.collect()
    before = resident()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # VmHWM starts afresh
    model = moeshard.from_pretrained(cls, Path(folder) / "large", group=group, progress=False)
    peak, after = resident(peak=True), resident()
    share = sum(m.packed.nbytes for m in model.modules() if isinstance(m, moeshard.ShardedExperts))
    return peak - before, after - before, share


@pytest.mark.parametrize("family", ["switch", "nomic", pytest.param("stacked", marks=NEW)])
@pytest.mark.parametrize("ranks", [1, 2])
def test_no_more_than_a_ranks_share_and_one_expert_is_ever_in_memory(tmp_path, family, ranks):
    d_model, d_ff, experts = 512, 1024, 64
    if family == "switch":
        saved(tmp_path / "small")
        large = {"num_experts": experts, "d_model": d_model, "d_ff": d_ff, "num_layers": 2}
        saved(tmp_path / "large", num_sparse_encoder_layers=1, **large)
    elif family == "nomic":
        save_nomic(nomic(), tmp_path / "small")
        save_nomic(nomic(n_embd=d_model, n_inner=d_ff, num_experts=experts // 2), tmp_path / "large")
    else:
        from transformers.models.mixtral import modeling_mixtral as modeling

        mixtral(tmp_path / "small")
        config = mixtral().config
        config.update({"hidden_size": d_model, "intermediate_size": d_ff, "num_local_experts": 16})
        config.head_dim = 16
        modeling.MixtralForCausalLM(config).save_pretrained(tmp_path / "large")
    expert = (3 if family == "stacked" else 2) * d_model * d_ff * 4
    with moeshard.launch(ranks, timeout=60) as fresh:
        for peak, stays, share in fresh.run(loading_peak, str(tmp_path), family):
            # 16 MiB: the model's other weights, pages that the system maps in advance, Python's own objects
            assert share <= peak <= 1.1 * share + expert + 16 * MIB, (peak / MIB, share / MIB)
            assert stays <= 1.1 * share + 16 * MIB
