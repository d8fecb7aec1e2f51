# SPDX-License-Identifier: Apache-2.0
"""What torch does with a sharded model: compile, export, copy, move, pickle, hooks, modes; and what it must refuse."""

import copy
import gc
import pickle

import pytest
import torch
from reference import experts_reference, layer_case, relative_error
from switch_models import batch, compare, run, switch_model
from workers import on_ranks

import moeshard
from moeshard import ShardedExperts

NAMES = ("hidden", "index", "weights")


def case_of(dtype=torch.float32, tokens=12):
    case = layer_case(tokens, 8, 12, 3, 2)
    layer = ShardedExperts.from_weights(
        torch.from_numpy(case["w_in"]), torch.from_numpy(case["w_out"]), group=moeshard.init("one"), dtype=dtype
    )
    return layer, [torch.from_numpy(case[name]) for name in NAMES], case


# ---- compile and export -----------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def no_graphs_of_other_tests():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Around(torch.nn.Module):
    """A router, a layer, and what comes after."""

    def __init__(self, experts):
        super().__init__()
        self.gate = torch.nn.Linear(8, 3)
        self.experts = experts

    def forward(self, x):
        weights, index = self.gate(x).softmax(-1).topk(2)
        return self.experts(x, index, weights) * 2 + x


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compile_has_one_graph_and_the_same_bits(backend):
    layer, (hidden, *_), _ = case_of()
    model = Around(layer).eval()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad():
        for tokens in (12, 5, 0):
            assert torch.equal(compiled(hidden[:tokens]), model(hidden[:tokens]))
    with torch.inference_mode():
        assert torch.equal(compiled(hidden[:7]), model(hidden[:7]))


def test_compiled_layers_count_tokens_and_refuse_bad_ones():
    layer, (hidden, index, weights), _ = case_of()
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    with torch.no_grad():
        compiled(hidden, index, weights)
        assert layer.slots == 24
        with pytest.raises(moeshard.RangeError, match="top_k_index"):
            compiled(hidden, index + 3, weights)


def test_the_operator_passes_torchs_own_checks():
    layer, inputs, _ = case_of()
    torch.library.opcheck(torch.ops.moeshard.experts.default, (*inputs, layer.number), test_utils="test_schema")
    torch.library.opcheck(torch.ops.moeshard.experts.default, (*inputs, layer.number), test_utils="test_faketensor")


def breaks_of(model, inputs):
    """Why dynamo would break a graph, one text for each place."""
    found = torch._dynamo.explain(model)(**inputs)
    return [str(reason) for reason in found.break_reasons]


def compiled_model(group):
    """A whole Switch encoder, compiled on every rank; the largest difference, and breaks that are ours."""
    model, inputs = switch_model(num_experts=5), batch(2, 5, seed=group.rank)
    moeshard.shard(model, group=group, progress=False)
    expected = run(model, inputs).outputs[0]
    with torch.no_grad():
        breaks = breaks_of(model, inputs)
        torch._dynamo.reset()
        found = torch.compile(model, backend="eager")(**inputs).last_hidden_state
    return float((found - expected).abs().max() / expected.abs().max()), [b for b in breaks if "moeshard" in b]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_compiled_model_does_not_break_at_the_layer(workers, ranks):
    results = [compiled_model(moeshard.init("one"))] if ranks == 1 else on_ranks(workers, ranks, compiled_model)
    for difference, breaks in results:
        assert difference < 1e-6 and not breaks


@pytest.mark.parametrize("strict", [True, False])
def test_export_keeps_the_layer_as_one_operator(strict):
    layer, (hidden, *_), _ = case_of()
    model = Around(layer).eval()
    with torch.no_grad():
        rows = torch.export.Dim("rows", min=2, max=64)
        program = torch.export.export(model, (hidden,), dynamic_shapes=({0: rows},), strict=strict)
        assert "moeshard.experts" in str(program.graph)
        for tokens in (12, 5):
            assert torch.equal(program.module()(hidden[:tokens]), model(hidden[:tokens]))
    assert sorted(program.state_dict) == ["gate.bias", "gate.weight"]


def test_a_program_whose_layer_is_gone_says_so():
    layer, (hidden, *_), _ = case_of()
    model = Around(layer).eval()
    with torch.no_grad():
        module = torch.export.export(model, (hidden,), strict=False).module()
        del model, layer
        gc.collect()
        with pytest.raises(moeshard.ArgumentError, match="not in this process.*save_pretrained"):
            module(hidden)


# ---- copies -----------------------------------------------------------------------------------------------


def copied(group):
    """A copy of a sharded model; then either is unsharded, and the other goes on working."""
    model, inputs = switch_model(num_experts=5), batch(2, 5)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    moeshard.shard(model, group=group, progress=False)
    expected = run(model, inputs).outputs[0]
    clone = copy.deepcopy(model)
    again = copy.deepcopy(clone)
    facts = [torch.equal(run(clone, inputs).outputs[0], expected)]
    layers = [[m for m in one.modules() if isinstance(m, ShardedExperts)] for one in (model, clone)]
    facts.append(
        all(a is not b and a.packed is b.packed and a.number != b.number for a, b in zip(*layers, strict=True))
    )
    facts.append([layer.slots for layer in layers[0]] == [layer.slots // 2 for layer in layers[1]])
    del layers
    moeshard.unshard(model)
    facts.append(all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items()))
    facts.append(torch.equal(run(clone, inputs).outputs[0], expected))
    moeshard.unshard(clone)
    del model, clone
    gc.collect()
    facts.append(not any(m.is_shared for m in again.modules() if isinstance(m, ShardedExperts)))
    facts.append(torch.equal(run(again, inputs).outputs[0], expected))
    again = moeshard.unshard(again)
    facts.append(all(torch.equal(tensor, weights[name]) for name, tensor in again.state_dict().items()))
    return facts


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_deep_copy_computes_with_the_same_packed_weights(workers, ranks):
    for facts in [copied(moeshard.init("one"))] if ranks == 1 else on_ranks(workers, ranks, copied):
        assert all(facts), facts


def test_a_copys_hooks_and_router_are_its_own():
    model, inputs = moeshard.shard(switch_model(), progress=False), batch(2, 5)
    expected = run(model, inputs).outputs[0]
    clone, seen = copy.deepcopy(model), []
    for module in clone.modules():
        if isinstance(module, ShardedExperts):
            module.register_forward_hook(lambda *_: seen.append(1))
    for name, parameter in clone.named_parameters():
        if "classifier" in name:
            parameter.data.zero_()
    run(clone, inputs)
    assert len(seen) == 2
    assert torch.equal(run(model, inputs).outputs[0], expected) and len(seen) == 2


def test_pickling_is_refused_with_advice(tmp_path):
    model = moeshard.shard(switch_model(), progress=False)
    for attempt in (lambda: pickle.dumps(model), lambda: torch.save(model, tmp_path / "model")):
        with pytest.raises(pickle.PicklingError, match=r"save_pretrained\(model, path\).*from_pretrained"):
            attempt()


# ---- state_dict -------------------------------------------------------------------------------------------


def test_state_dict_never_comes_without_the_experts(tmp_path):
    model = moeshard.shard(switch_model(), progress=False)
    for attempt in (model.state_dict, lambda: model.save_pretrained(tmp_path)):
        with pytest.raises(
            moeshard.ArgumentError, match=r"block\.1.*moeshard\.state_dict.*save_pretrained.*collective"
        ):
            attempt()
    assert not list(tmp_path.glob("*.safetensors"))
    live = model.state_dict(keep_vars=True)  # the live parameters, for tools
    assert live.keys() == dict(model.named_parameters(remove_duplicate=False)).keys()


@pytest.mark.parametrize("strict", [True, False])
def test_load_state_dict_never_forgets_the_experts(strict):
    whole = switch_model()
    weights = whole.state_dict()
    model = moeshard.shard(switch_model(), progress=False)
    with pytest.raises(moeshard.ArgumentError, match="load_state_dict: encoder.block.1.*unshard"):
        model.load_state_dict(weights, strict=strict)
    others = {name: tensor for name, tensor in weights.items() if "experts." not in name}
    model.load_state_dict(others, strict=True)


# ---- to -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "move",
    [
        pytest.param(lambda model: model.to("meta"), id="meta"),
        pytest.param(lambda model: model.to(torch.device("meta"), torch.bfloat16), id="meta-and-dtype"),
        pytest.param(lambda model: model.to_empty(device="meta"), id="to_empty"),
    ],
)
def test_experts_stay_on_their_device(move):
    layer, inputs, _ = case_of()
    expected = layer(*inputs)
    with pytest.raises(moeshard.ArgumentError, match="to: sharded experts stay on cpu.*meta.*unshard"):
        move(layer)
    with pytest.raises(moeshard.ArgumentError, match="to: sharded experts stay on cpu.*meta.*unshard"):
        move(moeshard.shard(switch_model(), progress=False))
    assert torch.equal(layer(*inputs), expected)
    assert layer.to("cpu") is layer and layer.cpu() is layer and layer.share_memory() is layer


def converted(group, dtype, how):
    """model.to(dtype) after shard, against before it."""
    inputs = batch(2, 5)
    before, after = switch_model(num_experts=5).to(dtype), switch_model(num_experts=5)
    moeshard.shard(before, group=group, progress=False)
    moeshard.shard(after, group=group, progress=False)
    clone = copy.deepcopy(after) if how == "copied" else None
    expected = run(after, inputs).outputs[0]
    after.to(dtype)
    sizes = [[m.packed.nbytes for m in model.modules() if isinstance(m, ShardedExperts)] for model in (before, after)]
    facts = [sizes[0] == sizes[1]]
    facts.append(torch.equal(run(before, inputs).outputs[0], run(after, inputs).outputs[0]))
    if clone is not None:
        facts.append(torch.equal(run(clone, inputs).outputs[0], expected))
    one, other = moeshard.unshard(before).state_dict(), moeshard.unshard(after).state_dict()
    facts.append(all(one[n].dtype == other[n].dtype and torch.equal(one[n], other[n]) for n in one))
    return facts


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("how", ["alone", "copied"])
def test_to_another_dtype_is_the_same_as_before_shard(workers, ranks, dtype, how):
    arguments = (dtype, how)
    here = [converted(moeshard.init("one"), *arguments)] if ranks == 1 else None
    for facts in here or on_ranks(workers, ranks, converted, *arguments):
        assert all(facts), facts


def test_a_storage_that_was_chosen_stays():
    model = moeshard.shard(switch_model(), dtype="int8", progress=False)
    model.bfloat16()
    layers = [module for module in model.modules() if isinstance(module, ShardedExperts)]
    assert {layer.packed.dtype for layer in layers} == {"int8"}
    assert {p.dtype for p in moeshard.unshard(model).encoder.block[1].parameters()} == {torch.bfloat16}


def test_biases_are_rounded_to_the_new_dtype_too():
    case = layer_case(12, 8, 12, 3, 2, gated=True, bias=True)
    tensors = {name: torch.from_numpy(case[name]) for name in ("w_in", "w_out", "b_in", "b_out")}
    inputs = [torch.from_numpy(case[name]) for name in NAMES]
    options = {"gated": True, "activation": "silu", "group": moeshard.init("one")}
    layer = ShardedExperts.from_weights(**tensors, **options)
    right = ShardedExperts.from_weights(**{name: tensor.bfloat16() for name, tensor in tensors.items()}, **options)
    assert not torch.equal(layer(*inputs), right(*inputs))
    assert torch.equal(layer.to(torch.bfloat16)(*inputs), right(*inputs))


def test_a_dtype_that_experts_cannot_have_is_named():
    layer, _, _ = case_of()
    with pytest.raises(moeshard.DTypeError, match="float32, bfloat16, float16.*float64"):
        layer.double()


# ---- modes, hooks, outputs ------------------------------------------------------------------------------------


def test_train_is_refused_when_it_is_called_and_eval_puts_it_right():
    model, inputs = moeshard.shard(switch_model(), progress=False), batch(2, 5)
    expected = run(model, inputs).outputs[0]
    model.train()
    with pytest.raises(moeshard.ArgumentError, match=r"training mode.*model\.eval\(\)"):
        run(model, inputs)
    assert torch.equal(run(model.eval(), inputs).outputs[0], expected)


def test_inference_mode_gives_the_same_bits():
    model, inputs = moeshard.shard(switch_model(), progress=False), batch(2, 5)
    expected = run(model, inputs).outputs[0]
    with torch.inference_mode():
        assert torch.equal(model(**inputs).last_hidden_state, expected)


def test_hooks_of_the_block_see_what_they_saw_and_can_be_removed():
    model, inputs, seen = switch_model(), batch(1, 5), []
    block = model.encoder.block[1].layer[-1].mlp
    handles = [
        block.register_forward_pre_hook(lambda module, args: seen.append(("before", args[0].shape))),
        block.register_forward_pre_hook(lambda *_: seen.append("keywords"), with_kwargs=True),
        block.register_forward_hook(lambda module, args, out: seen.append(("after", type(out), out[0].shape))),
        block.register_forward_hook(lambda *_: seen.append("always"), always_call=True),
    ]
    run(model, inputs)
    expected, seen[:] = list(seen), []
    assert len(expected) == 4
    run(moeshard.shard(model, progress=False), inputs)
    assert seen == expected
    for handle in handles:
        handle.remove()
    seen.clear()
    run(model, inputs)
    run(moeshard.unshard(model), inputs)
    assert not seen


@pytest.mark.parametrize("kind", ["encoder", "seq2seq"])
def test_outputs_are_huggingfaces_own_objects(kind):
    model, inputs = switch_model(kind), batch(2, 5)
    if kind == "seq2seq":
        inputs["labels"] = inputs["input_ids"]
    options = {"output_router_logits": True, "output_hidden_states": True, "output_attentions": True}
    with torch.no_grad():
        expected = model(**inputs, **options)
        found = moeshard.shard(model, progress=False)(**inputs, **options)
    assert type(found) is type(expected) and list(found) == list(expected)
    flat = [torch.utils._pytree.tree_flatten(dict(output)) for output in (expected, found)]
    assert flat[0][1] == flat[1][1]
    for before, after in zip(flat[0][0], flat[1][0], strict=True):
        if isinstance(before, torch.Tensor):
            assert after.shape == before.shape and after.dtype == before.dtype
            assert torch.allclose(after.float(), before.float(), atol=1e-4)


def test_layers_are_still_right_after_all_that():
    layer, inputs, case = case_of()
    expected = experts_reference(*(case[name] for name in (*NAMES, "w_in", "w_out")))
    assert relative_error(copy.deepcopy(layer)(*inputs).numpy(), expected) < 2e-6
    assert (
        compare(run(switch_model(), batch(2, 5)), run(moeshard.shard(switch_model(), progress=False), batch(2, 5)))[0]
        < 1e-5
    )
