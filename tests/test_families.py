# SPDX-License-Identifier: Apache-2.0
"""Whole models of every family, sharded, against HuggingFace's own: run under transformers 5 and under 4.57."""

import re
import warnings
from pathlib import Path

import family_models
import pytest
import torch
from family_models import FAMILIES, NEW, inputs, tokens
from torch import nn
from workers import on_ranks

import moeshard
from moeshard import adapters
from moeshard.adapters.listed import ListedExperts

RANKS = pytest.mark.parametrize("ranks", [1, 2, 3, 4])
DTYPES = ["float32", "bfloat16", "float16"]
pytestmark = pytest.mark.filterwarnings("ignore:NLLB-MoE in this version")


def shard(model, group, **settings):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "NLLB-MoE in this version")
        return moeshard.shard(model, group=group, progress=False, **settings)


def run(workers, ranks, function, *arguments):
    return (
        [function(moeshard.init("one"), *arguments)] if ranks == 1 else on_ranks(workers, ranks, function, *arguments)
    )


def error(found, expected):
    """Largest difference of each token over the largest value of all."""
    return (found - expected).abs().amax(-1) / expected.abs().max()


def parity(group, family, dtype, changes):
    """Errors against HuggingFace in float32, of HuggingFace's own and of ours, in the dtype."""
    model = FAMILIES[family](**changes)
    given = inputs(model, seed=group.rank)
    exact = tokens(model, given)
    before = {name: parameter.clone() for name, parameter in model.to(getattr(torch, dtype)).named_parameters()}
    theirs = tokens(model, given)
    shard(model, group)
    ours = tokens(model, given)
    moeshard.unshard(model)
    same = all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    return error(theirs, exact), error(ours, exact), error(ours, theirs), same


@RANKS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_sharded_model_equals_huggingface(workers, family, dtype, ranks):
    check(workers, family, dtype, ranks)


def check(workers, family, dtype, ranks, **changes):
    arguments = (family, dtype, changes)
    for theirs, ours, difference, same in run(workers, ranks, parity, *arguments):
        assert same, "unshard gives back other bits"
        if dtype == "float32":
            assert difference.max() <= 1e-5
        else:
            # Rounding may turn a near-tie of a router: a token or two, theirs as well as ours, may be far off.
            assert ours.median() <= 1.5 * theirs.median()
            assert ours.sort().values[:-2].max() <= 1.5 * theirs.max() + 1e-3


@pytest.mark.skipif(not NEW, reason="a model of transformers 5")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_real_layer_shape(workers, dtype):
    real = {"hidden_size": 640, "intermediate_size": 640, "num_local_experts": 128, "num_experts_per_tok": 4}
    check(workers, "privacy_filter", dtype, 2, **real)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("capacity", ["model", None, 2], ids=str)
def test_nllb_capacity(workers, ranks, capacity):
    for difference, dropped, settings in run(workers, ranks, nllb_capacity, capacity):
        assert difference <= 1e-5
        assert (dropped == 0) == (capacity is None)
        assert settings == (0.3, 64), "unshard leaves the router's settings as they were"


def nllb_capacity(group, capacity):
    """Largest difference to HuggingFace with the same rule, number of dropped gates, settings after unshard."""
    model = family_models.nllb(moe_eval_capacity_token_fraction=0.3)
    given = inputs(model, seed=group.rank)
    routers = [module for module in model.modules() if type(module).__name__ == "NllbMoeTop2Router"]
    if capacity != "model":
        for router in routers:
            router.moe_eval_capacity_token_fraction = 1.0 if capacity is None else 0.0
            router.expert_capacity = capacity
    expected = tokens(model, given)
    for router in routers:
        router.moe_eval_capacity_token_fraction, router.expert_capacity = 0.3, 64
    shard(model, group, capacity=capacity)
    kept = []
    handles = [router.register_forward_hook(lambda *call: kept.append(call[2][1])) for router in routers]
    found = tokens(model, given)
    for handle in handles:
        handle.remove()
    mask = given["attention_mask"]
    real = [2 * int(mask.sum()) if len(gates) == mask.numel() else 2 * len(gates) for gates in kept]
    dropped = sum(count - int((gates > 0).sum()) for count, gates in zip(real, kept, strict=True))
    moeshard.unshard(model)
    settings = {(router.moe_eval_capacity_token_fraction, router.expert_capacity) for router in routers}
    return float(error(found, expected).max()), dropped, settings.pop() if len(settings) == 1 else settings


@pytest.mark.skipif(not NEW, reason="4.57 is right")
def test_nllb_of_transformers_5_is_wrong_and_says_so():
    model = family_models.nllb()
    given = inputs(model)
    right = tokens(model, given)
    for module in model.modules():
        if type(module).__name__ == "NllbMoeExperts":
            del module.forward
    assert error(tokens(model, given), right).max() > 1e-3, "transformers has mended it: drop the warning"
    with pytest.warns(UserWarning, match="other experts than its router chose"):
        moeshard.shard(model, progress=False)
    assert error(tokens(model, given), right).max() <= 1e-5


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not NEW, reason="classes of transformers 5")
@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("gpt_oss", {"limit": 5.0}, "gate: GptOssExperts._apply_gate computes neither.*limit of 7"),
        ("mixtral", {"act_fn": nn.Tanh().eval()}, "gate: _default_apply_gate computes neither act"),
        ("mixtral", {"has_post_expert_norm": True}, "a norm after each expert is not supported"),
    ],
)
def test_what_the_kernels_lack_is_refused_and_named(family, change, message):
    model = FAMILIES[family]()
    experts = next(module for module in model.modules() if adapters.is_stacked(module))
    for name, value in change.items():
        setattr(experts, name, value)
    with pytest.raises(moeshard.ArgumentError, match=message):
        moeshard.shard(model, progress=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_training_mode_is_refused(family):
    model = shard(FAMILIES[family](), moeshard.init("one"))
    given = inputs(model)
    model.train()
    with pytest.raises(moeshard.ArgumentError, match="training mode"):
        tokens(model, given)


@pytest.mark.parametrize("name", adapters._PLAIN)
def test_activations_are_known_by_their_values(name):
    act = adapters._PLAIN[name]
    assert adapters.activation_of(act) == name
    assert adapters.gate_of(lambda both: act(both.chunk(2, -1)[0]) * both.chunk(2, -1)[1], False) == name
    assert adapters.gate_of(lambda both: act(both[..., ::2]) * both[..., 1::2], True) == name


@pytest.mark.parametrize("module", [nn.Tanh(), nn.LeakyReLU(), nn.ReLU6(), nn.Hardswish(), lambda x: x.relu() ** 2])
def test_other_activations_are_refused(module):
    with pytest.raises(moeshard.ArgumentError, match="activation: .* computes none of identity, relu"):
        adapters.activation_of(module)


# ---- a block that moeshard has never seen ----------------------------------------------------------------------------


class FeedForward(nn.Module):
    def __init__(self, bias):
        super().__init__()
        self.up, self.act, self.down = nn.Linear(24, 37, bias), nn.SiLU(), nn.Linear(37, 24, bias)

    def forward(self, x):
        return self.down(self.act(self.up(x)))


class MadeUpBlock(nn.Module):
    def __init__(self, bias):
        super().__init__()
        self.chooser = nn.Linear(24, 5)
        self.pool = nn.ModuleList(FeedForward(bias) for _ in range(5))

    def forward(self, x):
        weights, index = self.chooser(x).softmax(-1).topk(2)
        every = torch.stack([expert(x) for expert in self.pool], -2)
        chosen = every.gather(-2, index[..., None].expand(*index.shape, x.shape[-1]))
        return (weights[..., None] * chosen).sum(-2)


def choose(block, x):
    weights, index = block.chooser(x).softmax(-1).topk(2)
    return index, weights


def made_up(group, bias):
    moeshard.register_adapter(
        MadeUpBlock, ListedExperts(experts="pool", w_in="up", w_out="down", activation="act", route=choose)
    )
    torch.manual_seed(0)
    model = nn.Sequential(MadeUpBlock(bias), nn.LayerNorm(24), MadeUpBlock(bias)).eval()
    x = torch.randn(2, 9, 24, generator=torch.Generator().manual_seed(group.rank))
    with torch.no_grad():
        expected, found = model(x), moeshard.shard(model, group=group, progress=False)(x)
    names = {name for name, _ in model.named_parameters()}
    return float(error(found, expected).max()), names


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("ranks", [1, 3])
def test_a_list_of_experts_in_a_made_up_block(workers, ranks, bias):
    for difference, names in run(workers, ranks, made_up, bias):
        assert difference <= 1e-5
        assert names == {f"{layer}.{kind}" for layer in ("0.chooser", "1", "2.chooser") for kind in ("weight", "bias")}


# ---- experts_implementation="moeshard" -------------------------------------------------------------------------------


@pytest.fixture
def enabled():
    moeshard.enable_transformers()
    moeshard.enable_transformers()  # once more is nothing
    yield
    moeshard.disable_transformers()


@pytest.mark.skipif(not NEW, reason="transformers 5 has the interface")
@pytest.mark.parametrize("family", ["privacy_filter", "gpt_oss", "mixtral", "qwen3_moe"])
def test_experts_implementation(enabled, family):
    model = FAMILIES[family]()
    given = inputs(model)
    expected = tokens(model, given)
    model.set_experts_implementation("moeshard")
    assert error(tokens(model, given), expected).max() <= 1e-5
    with torch.no_grad():
        for parameter in model.parameters():  # packed weights follow the model's
            parameter.mul_(0.9)
    changed = tokens(model, given)
    model.set_experts_implementation("eager")
    assert error(changed, tokens(model, given)).max() <= 1e-5
    assert error(changed, expected).max() > 1e-3


@pytest.mark.skipif(not NEW, reason="transformers 5 has the interface")
def test_experts_implementation_is_for_inference_and_goes_away(enabled):
    model = FAMILIES["mixtral"]()
    model.set_experts_implementation("moeshard")
    with pytest.raises(moeshard.ArgumentError, match="inference only"):
        model(**inputs(model))
    moeshard.disable_transformers()
    with pytest.raises(KeyError, match="`moeshard` is not a valid experts implementation"):
        tokens(model, inputs(model))


@pytest.mark.skipif(not NEW, reason="transformers 5 has the interface")
def test_a_name_that_is_taken():
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    def someone_elses():
        pass

    ALL_EXPERTS_FUNCTIONS.register("moeshard", someone_elses)
    try:
        with pytest.raises(moeshard.ArgumentError, match="already taken by .*someone_elses"):
            moeshard.enable_transformers()
    finally:
        type(ALL_EXPERTS_FUNCTIONS)._global_mapping.pop("moeshard")


@pytest.mark.skipif(NEW, reason="4.57 has no such interface")
def test_older_transformers_are_refused():
    with pytest.raises(moeshard.ArgumentError, match="needs transformers 5"):
        moeshard.enable_transformers()


# ---- the docs --------------------------------------------------------------------------------------------------------


def test_the_table_in_the_docs_is_the_adapters():
    from moeshard.adapters import table

    page = (Path(__file__).parent.parent / "docs/models.md").read_text()
    written = re.search(r"<!-- families -->\n(.*?)\n<!-- end -->", page, re.S)
    assert written and written.group(1) == table.markdown(), "run python -m moeshard.adapters.table docs/models.md"
