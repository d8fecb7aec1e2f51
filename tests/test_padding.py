# SPDX-License-Identifier: Apache-2.0
"""skip_padding: real tokens keep their bits, padding is not computed, and no mask outlives its call."""

import copy
import inspect
import warnings

import family_models
import pytest
import torch
from switch_models import batch, routers, switch_model
from workers import on_ranks

import moeshard
from moeshard.layer import sharded_layers

RANKS = pytest.mark.parametrize("ranks", [1, 2, 3])


def ragged(size, length, seed, left=False):
    given = batch(size, length, seed=seed)
    given["attention_mask"][0] = 1  # one sequence without padding
    if left:
        given = {name: tensor.flip(1) for name, tensor in given.items()}
    return given


def real_outputs(model, given, kind):
    """The outputs of every real token."""
    with torch.no_grad():
        result = model(**given)
    if kind == "encoder":
        return [result.last_hidden_state[given["attention_mask"].bool()]]
    return [
        result.encoder_last_hidden_state[given["attention_mask"].bool()],
        result.logits[given["decoder_attention_mask"].bool()],
    ]


def inputs_of(kind, left, rank):
    given = ragged(5, 13, rank, left)
    if kind == "seq2seq":
        decoder = ragged(5, 9, rank + 7, left)
        given["decoder_input_ids"], given["decoder_attention_mask"] = decoder["input_ids"], decoder["attention_mask"]
    return given


def both(group, kind, left, settings):
    """Whether real tokens have the same bits; slots computed with and without skipping."""
    given, outputs, computed = inputs_of(kind, left, group.rank), [], []
    for skip in (False, True):
        model = moeshard.shard(switch_model(kind, **settings), group=group, skip_padding=skip, progress=False)
        outputs.append(real_outputs(model, given, kind))
        computed.append(sum(int(layer.counts.sum()) for _, layer in sharded_layers(model)))
    return all(torch.equal(*pair) for pair in zip(*outputs, strict=True)), *computed


@RANKS
@pytest.mark.parametrize("kind", ["encoder", "seq2seq"])
@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_real_tokens_keep_their_bits(workers, ranks, kind, left):
    arguments = (kind, left, {"expert_capacity": 2})
    results = [both(moeshard.init("one"), *arguments)] if ranks == 1 else on_ranks(workers, ranks, both, *arguments)
    for same, all_tokens, without_padding in results:
        assert same
        # padding in front of a token takes part in Switch's capacity, so it is computed
        assert without_padding == all_tokens if left else without_padding < all_tokens


def test_only_real_tokens_are_computed():
    model = moeshard.shard(switch_model(), skip_padding=True, progress=False)
    given = ragged(6, 11, 3)
    real_outputs(model, given, "encoder")
    for _, layer in sharded_layers(model):
        assert layer.counts.sum() == given["attention_mask"].sum()


def test_an_inner_encoder_called_alone_skips_too():
    model = moeshard.shard(switch_model("seq2seq"), skip_padding=True, progress=False)
    given = ragged(4, 9, 1)
    with torch.no_grad():
        model.get_encoder()(given["input_ids"], given["attention_mask"])  # by position
    first = sharded_layers(model)[0][1]
    assert first.counts.sum() == given["attention_mask"].sum()


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda mask: None, id="no-mask"),
        pytest.param(lambda mask: mask.float(), id="float"),
        pytest.param(lambda mask: torch.ones_like(mask), id="no-padding"),
    ],
)
def test_a_mask_that_does_not_say_leaves_everything_in(change):
    model = moeshard.shard(switch_model(), skip_padding=True, progress=False)
    given = ragged(4, 9, 1)
    given["attention_mask"] = change(given["attention_mask"])
    with torch.no_grad():
        model(**given)
    assert all(layer.counts.sum() == 36 for _, layer in sharded_layers(model))


def test_a_mask_does_not_outlive_its_call_nor_an_exception():
    model = moeshard.shard(switch_model(), skip_padding=True, progress=False)
    given = ragged(4, 9, 1)
    layer = sharded_layers(model)[0][1]

    def interrupt(*_):
        raise KeyboardInterrupt

    handle = routers(model)[-1].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt), torch.no_grad():
        model(**given)
    handle.remove()
    layer.reset_counts()
    tokens = torch.zeros(4, 9, 48), torch.zeros(4, 9, 1, dtype=torch.int64), torch.ones(4, 9, 1)
    with torch.no_grad():
        layer(*tokens)
    assert layer.counts.sum() == 36


def test_calls_may_be_nested():
    model = moeshard.shard(switch_model(), skip_padding=True, progress=False)
    given, inner = ragged(4, 9, 1), ragged(4, 9, 2)
    expected = real_outputs(model, given, "encoder")[0]
    nested = []

    def call_again(*_):
        if not nested:
            nested.append(None)
            with torch.no_grad():
                model(**inner)

    handle = routers(model)[0].register_forward_hook(call_again)
    assert torch.equal(real_outputs(model, given, "encoder")[0], expected)
    handle.remove()


def test_unshard_gives_the_forward_back_and_keeps_its_signature():
    model = switch_model("seq2seq")
    stacks = model.get_encoder(), model.get_decoder()
    before = [inspect.signature(stack.forward) for stack in stacks]
    moeshard.shard(model, skip_padding=True, progress=False)
    assert ["forward" in vars(stack) for stack in stacks] == [True, True]
    assert [inspect.signature(stack.forward) for stack in stacks] == before
    moeshard.unshard(model)
    assert not any("forward" in vars(stack) for stack in stacks)


def test_a_copy_reads_its_own_masks():
    model = moeshard.shard(switch_model(), skip_padding=True, progress=False)
    clone, given = copy.deepcopy(model), ragged(6, 11, 3)
    assert torch.equal(*(real_outputs(one, given, "encoder")[0] for one in (model, clone)))
    for one in (model, clone):
        for _, layer in sharded_layers(one):
            assert layer.counts.sum() == given["attention_mask"].sum()
    paddings = [{id(layer.padding) for _, layer in sharded_layers(one)} for one in (model, clone)]
    assert not paddings[0] & paddings[1]


def family(group, name):
    """Largest difference at real tokens with and without skipping; slots computed with, slots of real tokens."""
    tokens, computed, choices = [], [], set()
    for skip in (False, True):
        model = family_models.FAMILIES[name]()
        given = family_models.inputs(model, seed=group.rank)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "NLLB-MoE in this version")
            moeshard.shard(model, group=group, skip_padding=skip, progress=False)
        tokens.append(family_models.tokens(model, given))
        layers = sharded_layers(model)
        computed.append([int(layer.counts.sum()) for _, layer in layers])
        choices |= {layer.slots // given["attention_mask"].numel() for _, layer in layers}
    return float((tokens[0] - tokens[1]).abs().max()), *computed, max(choices) * int(given["attention_mask"].sum())


@pytest.mark.parametrize("name", family_models.FAMILIES)
def test_every_family(name):
    difference, everything, without_padding, real = family(moeshard.init("one"), name)
    assert difference == 0
    if name == "nllb":
        assert without_padding == everything
    else:
        assert without_padding == [real] * len(everything) and real < min(everything)


def test_a_block_alone_has_no_mask_to_read():
    block = switch_model().encoder.block[1].layer[-1].mlp
    with pytest.raises(moeshard.ArgumentError, match="skip_padding: no module round"):
        moeshard.shard(block, skip_padding=True, progress=False)


def test_greedy_generation_from_ragged_prompts_is_the_same():
    given, found = ragged(3, 9, 4), []
    for skip in (False, True):
        model = moeshard.shard(switch_model("seq2seq"), skip_padding=skip, progress=False)
        found.append(model.generate(**given, min_new_tokens=5, max_new_tokens=5, do_sample=False))
    assert torch.equal(*found)


def test_a_compiled_model_computes_everything_and_agrees():
    model = moeshard.shard(switch_model(), skip_padding=True, progress=False)
    given = ragged(4, 9, 1)
    expected = real_outputs(model, given, "encoder")[0]
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(real_outputs(compiled, given, "encoder")[0], expected)
