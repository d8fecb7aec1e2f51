# SPDX-License-Identifier: Apache-2.0
"""ShardedExperts on 1 to 4 ranks: the formula, the same bits, and errors that reach every rank."""

import numpy as np
import pytest
import torch
from reference import experts_reference, layer_case, relative_error
from workers import on_ranks

import moeshard
from moeshard import Plan, ShardedExperts

NAMES = ("hidden", "index", "weights")


def layer_of(case, group, **kwargs):
    tensors = {k: torch.from_numpy(case[k]) for k in ("w_in", "w_out", "b_in", "b_out") if case[k] is not None}
    return ShardedExperts.from_weights(**tensors, group=group, **kwargs)


def forward(layer, case, rows):
    return layer(*(torch.from_numpy(np.ascontiguousarray(case[name][rows])) for name in NAMES)).numpy()


def own_rows(group, tokens):
    """Rank r's rows when the ranks hold tokens[0], tokens[1] ... of them."""
    first = sum(tokens[: group.rank])
    return slice(first, first + tokens[group.rank])


def run_layer(group, case, tokens, kind, options, repeat=1):
    layer = layer_of(case, group, **kind, **options)
    outputs = [forward(layer, case, own_rows(group, tokens)) for _ in range(repeat)]
    assert all((output == outputs[0]).all() for output in outputs), "other bits on a repeated run"
    return outputs[0], layer.counts, layer.slots, layer.packed.nbytes


def check(workers, ranks, case, tokens, kind=None, bound=2e-6, **options):
    """Run on the ranks (1: here), compare with float64; returns all outputs and the last layer's counts."""
    kind = kind or {}
    if ranks == 1:
        results = [run_layer(moeshard.init("one"), case, tokens, kind, options, repeat=2)]
    else:
        results = on_ranks(workers, ranks, run_layer, case, tokens, kind, options, repeat=2)
    found = np.concatenate([output for output, *_ in results])
    tensors = [case[name] for name in (*NAMES, "w_in", "w_out")]
    expected = experts_reference(*tensors, b_in=case["b_in"], b_out=case["b_out"], **kind)
    assert relative_error(found, expected) <= bound
    return found, results


RANKS = pytest.mark.parametrize("ranks", [1, 2, 3, 4])


@RANKS
@pytest.mark.parametrize("experts", [1, 5, 64])
def test_layer_equals_float64_for_ragged_widths_and_uneven_tokens(workers, ranks, experts):
    case = layer_case(61, 48, 37, experts, 2, dropped=0.1)
    tokens = {1: [61], 2: [50, 11], 3: [0, 61, 0], 4: [20, 0, 1, 40]}[ranks]
    _, results = check(workers, ranks, case, tokens)
    for _, counts, slots, _ in results:
        assert slots == 2 * 61 * 2  # two calls
        assert (counts == 2 * np.bincount(case["index"][case["index"] >= 0], minlength=experts)).all()


@pytest.mark.parametrize("ranks", [1, 2])
def test_layer_error_at_the_real_size(workers, ranks):
    check(workers, ranks, layer_case(96, 768, 3072, 2, 1), [96] if ranks == 1 else [64, 32], bound=2e-6)


@RANKS
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_biases_are_added_once_whatever_the_number_of_ranks(workers, ranks, gated):
    case = layer_case(40, 24, 33, 6, 3, gated=gated, bias=True)
    tokens = np.diff(np.linspace(0, 40, ranks + 1).astype(int)).tolist()
    check(workers, ranks, case, tokens, {"activation": "silu", "gated": gated})


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_every_valid_table_gives_the_same_output(workers, ranks):
    case = layer_case(60, 32, 36, 6, 2)
    tokens = [60 // ranks] * ranks
    whole = Plan.expert_parallel(ranks, 6, 36, [ranks - 1] * 6)
    reverse = Plan.from_columns(Plan.shard(ranks, 6, 36).columns[::-1], 36)
    uneven = Plan.shard(ranks, 6, 36, speed=list(range(1, ranks + 1)))
    first, _ = check(workers, ranks, case, tokens)
    for plan in ("expert_parallel", whole, reverse, uneven):
        found, _ = check(workers, ranks, case, tokens, plan=plan)
        assert relative_error(found, first) < 2e-6


def test_memory_of_a_rank_is_its_share(workers):
    case = layer_case(8, 64, 256, 8, 1)
    _, results = check(workers, 4, case, [2, 2, 2, 2])
    everything = case["w_in"].nbytes + case["w_out"].nbytes
    assert all(everything / 4 <= nbytes <= 1.05 * everything / 4 for *_, nbytes in results)


def replicated_case(group, case):
    layer = layer_of(case, group, tokens="replicated")
    return forward(layer, case, slice(None)), layer.counts, layer.slots


@pytest.mark.parametrize("ranks", [2, 3])
def test_replicated_tokens_are_computed_once(workers, ranks):
    case = layer_case(30, 32, 37, 5, 2)
    expected = experts_reference(*(case[name] for name in (*NAMES, "w_in", "w_out")))
    for output, counts, slots in on_ranks(workers, ranks, replicated_case, case):
        assert relative_error(output, expected) < 2e-6
        assert slots == counts.sum() == 60


def replicated_but_different(group, case):
    layer = layer_of(case, group, tokens="replicated")
    case["index"][3, 0] = (case["index"][3, 0] + group.rank) % 5
    forward(layer, case, slice(None))


def test_replicated_tokens_that_differ_are_a_mismatch(workers):
    with pytest.raises(moeshard.RankMismatch, match="routing of the replicated tokens"):
        on_ranks(workers, 2, replicated_but_different, layer_case(30, 32, 37, 5, 2))


# ---- the same bits -------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 7, 300])
def test_bits_do_not_depend_on_the_number_of_threads(monkeypatch, tokens):
    case = layer_case(tokens, 96, 200, 4, 2)
    layer = layer_of(case, moeshard.init("one"))
    outputs = []
    for threads in (1, 2, 3, 5):
        monkeypatch.setenv("MOESHARD_NUM_THREADS", str(threads))
        outputs.append(forward(layer, case, slice(None)))
        assert moeshard._core.get_num_threads() == threads
    assert all((output == outputs[0]).all() for output in outputs)


@pytest.mark.parametrize("d_ff", [37, 3072])
def test_bits_of_a_token_do_not_depend_on_its_neighbours(d_ff):
    case = layer_case(200, 64, d_ff, 3, 2)
    layer = layer_of(case, moeshard.init("one"))
    together = forward(layer, case, slice(None))
    for rows in (slice(0, 1), slice(5, 6), slice(199, 200), slice(10, 17), slice(100, 200), np.arange(199, -1, -1)):
        assert (forward(layer, case, rows) == together[rows]).all()


def with_other_neighbours(group, case):
    layer = layer_of(case, group)
    first = forward(layer, case, slice(0, 10))
    other = forward(layer, case, slice(0, 10) if group.rank == 0 else slice(20, 57))
    return group.rank != 0 or bool((first == other).all())


@pytest.mark.parametrize("ranks", [2, 4])
def test_bits_of_a_token_do_not_depend_on_the_other_ranks_tokens(workers, ranks):
    assert all(on_ranks(workers, ranks, with_other_neighbours, layer_case(60, 64, 37, 5, 2)))


# ---- inputs and errors ------------------------------------------------------------------------------


@pytest.fixture
def layer():
    return layer_of(layer_case(1, 8, 12, 3, 1), moeshard.init("one"))


@pytest.fixture
def inputs():
    case = layer_case(12, 8, 12, 3, 2)
    return [torch.from_numpy(case[name]) for name in NAMES]


def test_shape_and_dtype_of_hidden_states_are_kept(layer, inputs):
    hidden, index, weights = inputs
    flat = layer(hidden, index, weights)
    shaped = layer(hidden.view(3, 4, 8), index.view(3, 4, 2), weights)
    assert shaped.shape == (3, 4, 8) and (shaped.view(12, 8) == flat).all()
    for dtype in (torch.bfloat16, torch.float16):
        assert layer(hidden.to(dtype), index.int(), weights.to(dtype)).dtype == dtype


def test_no_tokens_give_no_output(layer):
    assert layer(torch.empty(2, 0, 8), torch.empty(0, 1, dtype=torch.long), torch.empty(0, 1)).shape == (2, 0, 8)


def test_strided_inputs_equal_contiguous_ones(layer, inputs):
    hidden, index, weights = inputs
    expected = layer(hidden, index, weights)
    strided = (hidden.T.contiguous().T, index.repeat(1, 2)[:, :2], weights.repeat_interleave(2, 0)[::2])
    assert not any(tensor.is_contiguous() for tensor in strided)
    assert (layer(*strided) == expected).all()


def test_inference_mode_gives_the_same(layer, inputs):
    expected = layer(*inputs)
    with torch.inference_mode():
        assert (layer(*[tensor.clone() for tensor in inputs]) == expected).all()


@pytest.mark.parametrize(
    ("position", "change", "error", "message"),
    [
        pytest.param(0, lambda x: x[:, :7], moeshard.ShapeError, r"hidden_states.*8.*\[12, 7\]", id="width"),
        pytest.param(0, lambda x: x.double(), moeshard.DTypeError, "hidden_states.*float64", id="float64"),
        pytest.param(0, lambda x: x.numpy(), moeshard.DTypeError, "hidden_states.*ndarray", id="numpy"),
        pytest.param(0, lambda x: x.to("meta"), moeshard.ArgumentError, "hidden_states.*CPU.*meta", id="device"),
        pytest.param(
            0, lambda x: x.clone().requires_grad_(), moeshard.ArgumentError, "hidden_states.*no_grad", id="grad"
        ),
        pytest.param(
            2, lambda x: x.clone().requires_grad_(), moeshard.ArgumentError, "top_k_weights.*no_grad", id="w-grad"
        ),
        pytest.param(1, lambda x: x[:5], moeshard.ShapeError, "top_k_index", id="fewer-rows"),
        pytest.param(1, lambda x: x[:, :0], moeshard.ShapeError, "top_k_index.*at least one", id="no-choice"),
        pytest.param(1, lambda x: x + 3, moeshard.RangeError, "top_k_index", id="index-too-large"),
        pytest.param(1, lambda x: x.float(), moeshard.DTypeError, "top_k_index", id="float-index"),
        pytest.param(2, lambda x: x[:, :1], moeshard.ShapeError, "top_k_weights", id="fewer-weights"),
        pytest.param(2, lambda x: x * float("inf"), moeshard.RangeError, "top_k_weights", id="infinite-weight"),
    ],
)
def test_bad_input_names_argument_and_value(layer, inputs, position, change, error, message):
    inputs[position] = change(inputs[position])
    with pytest.raises(error, match=message):
        layer(*inputs)


def bad_then_good(group, case):
    """Rank 1 passes a bad index, then all pass good ones."""
    layer = layer_of(case, group)
    bad = {**case, "index": case["index"] + 100} if group.rank == 1 else case
    try:
        forward(layer, bad, slice(None))
    except moeshard.MoeshardError as error:
        said = f"{type(error).__name__}: {error}"
    return said, forward(layer, case, slice(None))


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_bad_input_on_one_rank_reaches_all_and_the_group_goes_on(workers, ranks):
    case = layer_case(12, 8, 12, 3, 2)
    expected = experts_reference(*(case[name] for name in (*NAMES, "w_in", "w_out")))
    for rank, (said, output) in enumerate(on_ranks(workers, ranks, bad_then_good, case)):
        assert said.startswith("RangeError: top_k_index" if rank == 1 else "PeerError: rank 1: RangeError: top_k_index")
        assert relative_error(output, expected) < 2e-6


class Interrupt:
    """A counter whose use is interrupted, as by Ctrl-C after ffn."""

    def __iadd__(self, counts):
        raise KeyboardInterrupt


def interrupt(group, case, where):
    layer = layer_of(case, group)
    expected = forward(layer, case, slice(None))
    if group.rank == 0:
        if where == "in ffn":
            counts, layer._counts = layer._counts, Interrupt()
        else:
            gather = group.gather

            def interrupted(batch):
                gather(batch)
                raise KeyboardInterrupt

            group.gather = interrupted
    try:
        forward(layer, case, slice(None))
    except KeyboardInterrupt:
        said = "KeyboardInterrupt"
        if where == "in ffn":
            layer._counts = counts
        else:
            group.gather = gather
    except moeshard.CommError as error:
        said = type(error).__name__
    return said, group.closed, None if group.closed else bool((forward(layer, case, slice(None)) == expected).all())


@pytest.mark.parametrize("where", ["in ffn", "after gather"])
def test_an_interrupted_call_is_forgotten_alone_and_closes_a_group_of_ranks(workers, where):
    case = layer_case(12, 8, 12, 3, 2)
    assert interrupt(moeshard.init("one"), case, where) == ("KeyboardInterrupt", False, True)
    assert on_ranks(workers, 2, interrupt, case, where) == [("KeyboardInterrupt", True, None), ("RankLost", True, None)]


def test_threads_of_one_rank_take_turns():
    from concurrent.futures import ThreadPoolExecutor

    case = layer_case(200, 32, 64, 3, 2)
    layer = layer_of(case, moeshard.init("one"))
    packed = moeshard.pack(case["w_in"], case["w_out"])
    expected = forward(layer, case, slice(None))
    with ThreadPoolExecutor(4) as pool:
        first = [pool.submit(forward, layer, case, slice(None)) for _ in range(20)]
        second = [pool.submit(packed, *(case[name] for name in NAMES)) for _ in range(20)]
        assert all((future.result() == expected).all() for future in first + second)


def different_layers(group, case):
    layers = [layer_of(case, group), layer_of(case, group)]
    forward(layers[group.rank % 2], case, slice(None))


def test_ranks_in_different_layers_are_a_mismatch(workers):
    with pytest.raises(moeshard.RankMismatch, match="layer") as caught:
        on_ranks(workers, 2, different_layers, layer_case(12, 8, 12, 3, 2))
    assert "rank" in str(caught.value)


def different_weights_shapes(group):
    layer_of(layer_case(1, 8, 12 + group.rank, 3, 1), group)


def test_layers_of_different_sizes_are_a_mismatch(workers):
    with pytest.raises(moeshard.RankMismatch, match=r"the layer: .*d_ff=12.* on rank 0 but .*d_ff=13.* on rank 1"):
        on_ranks(workers, 2, different_weights_shapes)


def test_bad_options_name_the_accepted_ones(inputs):
    case = layer_case(1, 8, 12, 3, 1)
    for options, error, message in (
        ({"tokens": "global"}, moeshard.ArgumentError, "tokens.*'local'.*'global'"),
        ({"plan": "ep"}, moeshard.ArgumentError, "plan.*'expert_parallel'.*'ep'"),
        ({"dtype": torch.int16}, moeshard.DTypeError, "dtype.*bfloat16.*int8.*int16"),
        ({"plan": Plan.shard(2, 3, 12)}, moeshard.ShapeError, r"plan.*\(1, 3, 12\).*\(2, 3, 12\)"),
    ):
        with pytest.raises(error, match=message):
            layer_of(case, moeshard.init("one"), **options)


def test_a_bad_number_of_threads_is_named(layer, inputs, monkeypatch):
    monkeypatch.setenv("MOESHARD_NUM_THREADS", "many")
    with pytest.raises(moeshard.ArgumentError, match="MOESHARD_NUM_THREADS.*'many'"):
        layer(*inputs)


def test_counts_can_be_reset(layer, inputs):
    layer(*inputs)
    assert layer.slots == layer.counts.sum() == 24
    layer.reset_counts()
    assert layer.slots == layer.counts.sum() == 0


def test_a_layer_tells_what_it_is(layer):
    assert "num_experts=3, d_model=8, d_ff=12, dtype=float32, activation=relu" in repr(layer)
    assert "rank=0 of 1" in repr(layer)


def test_a_layer_has_no_parameters_and_says_so(layer):
    assert not list(layer.parameters())
    with pytest.raises(moeshard.ArgumentError, match="state_dict: .*spread over the ranks.*moeshard.state_dict"):
        layer.state_dict()


def test_storage_in_16_bits_halves_the_memory_and_rounds_once():
    case = layer_case(20, 64, 128, 3, 2)
    wide, narrow = (layer_of(case, moeshard.init("one"), dtype=dtype) for dtype in (None, "bfloat16"))
    assert narrow.packed.nbytes < 0.55 * wide.packed.nbytes
    rounded = {**case, **{n: torch.from_numpy(case[n]).bfloat16().float().numpy() for n in ("w_in", "w_out")}}
    expected = experts_reference(*(rounded[name] for name in (*NAMES, "w_in", "w_out")))
    assert relative_error(forward(narrow, case, slice(None)), expected) < 2e-6
