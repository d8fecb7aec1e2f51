# SPDX-License-Identifier: Apache-2.0
"""_core.Batch on one rank: a layer is the formula; bad input, wrong order and wrong threads are refused. No torch."""

import sys
import threading
import time

import numpy as np
import pytest
from core_cases import EPS, as_tensor, experts, layer, normal, pack_case, threads_put_back, widened, words
from dlpack_producers import Crafted, words_of
from reference import KINDS, experts_reference, layer_case, relative_error

from moeshard import _core
from moeshard._core import ArgumentError, DTypeError, RangeError, ShapeError

# ---- a layer on one rank -------------------------------------------------------------------------------


@pytest.mark.parametrize(("activation", "gated"), KINDS)
@pytest.mark.parametrize("choices", [1, 3])
@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
def test_a_layer_is_the_formula(activation, choices, gated, bias):
    case = layer_case(41, 33, 19, 5, choices, gated=gated, bias=bias, dropped=0.2)
    out = layer(
        case["hidden"],
        case["index"],
        case["weights"],
        pack_case(case, activation=activation),
        np.empty_like(case["hidden"]),
    )
    right = experts_reference(**{k: case[k] for k in case}, activation=activation, gated=gated)
    assert relative_error(out, right) <= 2e-6


@pytest.mark.parametrize("storage", EPS)
@pytest.mark.parametrize("dtype", EPS)
def test_every_mix_of_dtypes_has_the_error_of_the_coarser(dtype, storage):
    case = layer_case(29, 40, 56, 3, 2)
    packed = pack_case(case, storage)
    hidden, out = as_tensor(case["hidden"], dtype), _core.Tensor(case["hidden"].shape, dtype)
    layer(hidden, case["index"].astype(np.int32), case["weights"], packed, out)
    seen = dict(case)
    if dtype != "float32":
        seen["hidden"] = widened(words_of(hidden), dtype)
    if storage != "float32":
        seen |= {name: widened(words(case[name], storage), storage) for name in ("w_in", "w_out")}
    result = np.from_dlpack(out) if dtype == "float32" else widened(words_of(out), dtype)
    # The weights as stored are exact; what is left is float32 arithmetic and one rounding of the result.
    assert relative_error(result, experts_reference(**seen)) <= 2e-6 + (0 if dtype == "float32" else EPS[dtype])


def test_weights_of_16_bits_are_widened():
    case = layer_case(9, 8, 8, 2, 2)
    packed = pack_case(case)
    coarse = case["weights"].astype(np.float16)
    exact = layer(case["hidden"], case["index"], coarse.astype(np.float32), packed, np.empty_like(case["hidden"]))
    assert (layer(case["hidden"], case["index"], coarse, packed, np.empty_like(exact)) == exact).all()


def test_bits_do_not_depend_on_threads_or_neighbours():
    case = layer_case(130, 48, 80, 4, 2)
    packed, found = pack_case(case), []
    with threads_put_back():
        for count in (1, 2, 5):
            _core.set_num_threads(count)
            found.append(layer(case["hidden"], case["index"], case["weights"], packed, np.empty_like(case["hidden"])))
    assert (found[0] == found[1]).all() and (found[0] == found[2]).all()
    some = slice(17, 58)
    part = layer(
        case["hidden"][some], case["index"][some], case["weights"][some], packed, np.empty_like(found[0][some])
    )
    assert (part == found[0][some]).all()


@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize("shape", [(0, 8, 2), (5, 8, 0), (0, 8, 0)], ids=["no-tokens", "no-choices", "nothing"])
def test_nothing_is_a_legal_amount(dtype, shape):
    tokens, d_model, choices = shape
    packed = pack_case(layer_case(1, d_model, 4, 2, 1))
    out = as_tensor(np.ones((tokens, d_model), np.float32), dtype)
    batch = _core.Batch()
    layer(
        _core.Tensor((tokens, d_model), dtype),
        np.zeros((tokens, choices), np.int64),
        np.zeros((tokens, choices), np.float32),
        packed,
        out,
        batch,
    )
    assert (batch.shape, batch.dtype) == (shape, dtype) and batch.counts().tolist() == [0, 0]
    if dtype == "float32":
        assert (np.from_dlpack(out) == 0).all()
    else:
        assert (words_of(out) == 0).all()


def test_null_is_a_legal_address_of_nothing():
    empty = Crafted(np.zeros((0, 8), np.float32), data=None)
    layer(
        empty,
        Crafted(np.zeros((0, 2), np.int64), data=None),
        Crafted(np.zeros((0, 2), np.float32), data=None),
        pack_case(layer_case(1, 8, 4, 2, 1)),
        empty,
    )


def test_a_batch_tells_what_it_holds():
    case = layer_case(12, 8, 4, 3, 2, dropped=0.3)
    batch, exchange, packed = _core.Batch(), _core.exchange_one(), pack_case(case)
    batch.route(case["hidden"], case["index"], case["weights"], 3, np.empty_like(case["hidden"]), layer=7)
    assert batch.shape == (12, 8, 2)
    index, weights = batch.routing()
    assert index.dtype == np.int32 and weights.dtype == np.float32
    assert (index == case["index"]).all() and (weights == case["weights"]).all()
    exchange.gather(batch)
    assert batch.tokens_per_rank.tolist() == [12]
    assert (batch.rows() == case["hidden"]).all()
    batch.group()
    expected = [(case["index"] == expert).sum() for expert in range(3)]
    assert batch.counts().tolist() == expected
    batch.ffn(packed)
    exchange.combine(batch)
    assert batch.counts().tolist() == expected and batch.tokens_per_rank.tolist() == [12]  # still known
    assert batch.nbytes > 0


def test_memory_grows_to_the_largest_shape_and_stays():
    batch, sizes = _core.Batch(), []
    assert batch.nbytes == 0
    for tokens in (10, 100, 10, 100):
        case = layer_case(tokens, 16, 8, 2, 2)
        layer(case["hidden"], case["index"], case["weights"], pack_case(case), np.empty_like(case["hidden"]), batch)
        sizes.append(batch.nbytes)
    assert sizes[0] < sizes[1] == sizes[2] == sizes[3]


def test_a_forward_pass_leaks_nothing():
    case = layer_case(12, 8, 4, 3, 2)
    batch, exchange, packed, out = _core.Batch(), _core.exchange_one(), pack_case(case), np.empty_like(case["hidden"])
    counts = [
        sys.getrefcount(x) for x in (case["hidden"], case["index"], case["weights"], out, packed, batch, exchange)
    ]

    def forward():
        layer(case["hidden"], case["index"], case["weights"], packed, out, batch, exchange)
        batch.counts(), batch.tokens_per_rank, batch.shape, packed.columns

    forward()
    before = sys.getallocatedblocks()
    for _ in range(200):
        forward()
    assert sys.getallocatedblocks() - before < 20
    assert counts == [
        sys.getrefcount(x) for x in (case["hidden"], case["index"], case["weights"], out, packed, batch, exchange)
    ]


ROUTE = {
    "hidden_states": normal(6, 4),
    "top_k_index": np.zeros((6, 2), np.int64),
    "top_k_weights": np.ones((6, 2), np.float32),
    "num_experts": 3,
    "out": np.zeros((6, 4), np.float32),
}


def at(array, where, value):
    array = array.copy()
    array[where] = value
    return array


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        pytest.param(
            {"hidden_states": normal(6)}, ShapeError, r"hidden_states: got \[6\], expected \[T, D\]", id="vector"
        ),
        pytest.param(
            {"hidden_states": normal(6, 0), "out": None}, ShapeError, r"hidden_states: got \[6, 0\]", id="no-width"
        ),
        pytest.param(
            {"hidden_states": np.zeros((6, 4))},
            DTypeError,
            "hidden_states: got float64, expected float32, b",
            id="float64",
        ),
        pytest.param(
            {"top_k_index": np.zeros((5, 2), int)},
            ShapeError,
            r"top_k_index: got \[5, 2\], expected \[T=6, K\]",
            id="index-rows",
        ),
        pytest.param(
            {"top_k_index": np.zeros((6, 2), np.int16)},
            DTypeError,
            "top_k_index: got int16, expected int32 or int64",
            id="int16",
        ),
        pytest.param({"top_k_index": np.zeros((6, 2), np.uint64)}, DTypeError, "top_k_index: got uint64", id="uint64"),
        pytest.param(
            {"top_k_index": np.zeros((2, 6), int).T},
            ArgumentError,
            r"top_k_index: got \[6, 2\] with strides \[1, 6\]",
            id="strided",
        ),
        pytest.param(
            {"top_k_weights": normal(6, 3)},
            ShapeError,
            r"top_k_weights: got \[6, 3\], expected \[T=6, K=2\]",
            id="weights",
        ),
        pytest.param(
            {"top_k_weights": np.ones((6, 2), int)},
            DTypeError,
            "top_k_weights: got int64, expected float32",
            id="int-weights",
        ),
        pytest.param({"num_experts": 0}, ArgumentError, "num_experts: got 0, expected 1 to 65536", id="no-experts"),
        pytest.param({"num_experts": 2**32 + 3}, ArgumentError, "num_experts: got 4294967299", id="experts-wrap"),
        pytest.param(
            {"top_k_index": at(ROUTE["top_k_index"], (4, 1), 3)},
            RangeError,
            r"top_k_index\[4, 1\]: got 3, expected -1",
            id="range",
        ),
        pytest.param(
            {"top_k_index": at(ROUTE["top_k_index"], (0, 0), -2)},
            RangeError,
            r"top_k_index\[0, 0\]: got -2",
            id="below",
        ),
        pytest.param(
            {"top_k_index": at(ROUTE["top_k_index"], (0, 0), 2**32)}, RangeError, "got 4294967296", id="index-wrap"
        ),
        pytest.param(
            {"top_k_weights": at(ROUTE["top_k_weights"], (5, 0), np.nan)},
            RangeError,
            r"top_k_weights\[5, 0\]: got nan",
            id="nan",
        ),
        pytest.param(
            {"top_k_weights": at(ROUTE["top_k_weights"], (5, 0), np.inf)},
            RangeError,
            r"top_k_weights\[5, 0\]: got inf",
            id="inf",
        ),
        pytest.param(
            {"top_k_index": np.zeros((6, 65), int), "top_k_weights": normal(6, 65)},
            ShapeError,
            "top_k_index: got K=65 choices, expected 0 to 64",
            id="65-choices",
        ),
        pytest.param(
            {"out": np.zeros((6, 5), np.float32)}, ShapeError, r"out: got \[6, 5\], expected \[T=6, D=4\]", id="out"
        ),
        pytest.param(
            {"out": np.zeros((6, 4), np.float16)}, DTypeError, "out: got float16, expected float32", id="out-dtype"
        ),
        pytest.param({"out": np.zeros((4, 6), np.float32).T}, ArgumentError, "out: .*contiguous", id="out-strided"),
        pytest.param(
            {"out": ROUTE["hidden_states"]}, ArgumentError, "out: got memory that overlaps hidden_states", id="in-place"
        ),
    ],
)
def test_a_bad_route_names_what_is_wrong(change, error, message):
    with pytest.raises(error, match=message):
        _core.Batch().route(**{**ROUTE, **change})


def test_an_out_that_overlaps_by_one_element_is_refused():
    memory = normal(48)
    hidden = memory[:24].reshape(6, 4)
    for start in range(1, 25):
        arguments = {**ROUTE, "hidden_states": hidden, "out": memory[start : start + 24].reshape(6, 4)}
        if start == 24:
            _core.Batch().route(**arguments)
        else:
            with pytest.raises(ArgumentError, match="out: got memory that overlaps"):
                _core.Batch().route(**arguments)


def test_the_weight_of_an_empty_slot_is_not_looked_at():
    index, weights = np.full((6, 2), -1), np.full((6, 2), np.nan, np.float32)
    batch = _core.Batch()
    batch.route(**{**ROUTE, "top_k_index": index, "top_k_weights": weights})


# ---- the order of the steps ------------------------------------------------------------------------------


def routed(**change):
    batch = _core.Batch()
    batch.route(**{**ROUTE, **change})
    return batch


@pytest.mark.parametrize(
    ("call", "message"),
    [
        pytest.param(lambda b: b.group(), "group: nothing was gathered since the last route", id="group"),
        pytest.param(lambda b: b.ffn(experts()), "ffn: nothing was gathered since the last route", id="ffn"),
        pytest.param(lambda b: b.rows(), "rows: nothing was gathered", id="rows"),
        pytest.param(lambda b: b.counts(), "counts: nothing was grouped since the last gather", id="counts"),
        pytest.param(lambda b: b.tokens_per_rank, "tokens_per_rank: nothing was gathered", id="tokens_per_rank"),
        pytest.param(lambda b: b.combine_choices(), "combine_choices: nothing was gathered", id="combine_choices"),
        pytest.param(lambda b: b.combine_ranks([]), "combine_ranks: nothing was gathered", id="combine_ranks"),
        pytest.param(
            lambda b: _core.exchange_one().combine(b),
            "combine: not the batch that this exchange gathered last",
            id="combine",
        ),
    ],
)
def test_a_step_too_early_is_refused(call, message):
    with pytest.raises(ArgumentError, match=message):
        call(routed())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        pytest.param(
            lambda b: _core.exchange_one().gather(b), "gather: the batch holds no tokens, call route first", id="gather"
        ),
        pytest.param(lambda b: _core.exchange_one().combine(b), "combine: the batch holds no tokens", id="combine"),
        pytest.param(lambda b: b.header(1), "header: the batch holds no tokens", id="header"),
        pytest.param(lambda b: b.routing(), "routing: the batch holds no tokens", id="routing"),
        pytest.param(
            lambda b: b.gather_from(0, [0], normal(0, 4), np.zeros((0, 1), np.int32), normal(0, 1)),
            "gather_from: the batch holds no tokens",
            id="gather_from",
        ),
    ],
)
@pytest.mark.parametrize("used", [False, True], ids=["new", "combined"])
def test_a_step_without_tokens_is_refused(call, message, used):
    batch = _core.Batch()
    if used:
        case = layer_case(6, 4, 4, 3, 2)
        layer(case["hidden"], case["index"], case["weights"], pack_case(case), np.empty_like(case["hidden"]), batch)
    with pytest.raises(ArgumentError, match=message):
        call(batch)


def test_a_second_gather_forgets_the_group_of_the_first():
    case = layer_case(20, 4, 4, 3, 2)
    batch, exchange, packed = _core.Batch(), _core.exchange_one(), pack_case(case)
    batch.route(case["hidden"], case["index"], case["weights"], 3, np.empty_like(case["hidden"]))
    exchange.gather(batch)
    batch.group()
    exchange.refuse("once more")
    with pytest.raises(
        ArgumentError, match="ffn: the exchange was used for another call since, or closed: gather again"
    ):
        batch.ffn(packed)
    exchange.gather(batch)
    with pytest.raises(ArgumentError, match="ffn: nothing was grouped since the last gather"):
        batch.ffn(packed)
    with pytest.raises(ArgumentError, match="counts: nothing was grouped"):
        batch.counts()
    exchange.refuse("and again")


def test_a_failed_route_leaves_nothing_behind():
    batch = routed()
    with pytest.raises(RangeError):
        batch.route(**{**ROUTE, "top_k_index": np.full((6, 2), 99)})
    assert batch.shape == (0, 0, 0)
    for call in (batch.routing, lambda: batch.header(1), lambda: _core.exchange_one().gather(batch)):
        with pytest.raises(ArgumentError, match="call route first"):
            call()


def test_ffn_without_combine_choices_or_out_of_order_is_refused():
    case = layer_case(6, 4, 4, 3, 2)
    batch, exchange = _core.Batch(), _core.exchange_one()
    batch.route(case["hidden"], case["index"], case["weights"], 3, np.empty_like(case["hidden"]))
    exchange.gather(batch)
    with pytest.raises(ArgumentError, match="combine: ffn has not run since the last gather"):
        exchange.combine(batch)


@pytest.mark.parametrize(
    ("packed", "message"),
    [
        pytest.param(
            lambda: experts(d_model=5), "experts: got num_experts=1, d_model=5, expected 3, 4 as routed", id="width"
        ),
        pytest.param(lambda: experts([[0, 4]] * 2), "experts: got num_experts=2, d_model=4", id="number"),
    ],
)
def test_experts_of_another_layer_are_refused(packed, message):
    batch, exchange = routed(), _core.exchange_one()
    exchange.gather(batch)
    batch.group()
    with pytest.raises(ShapeError, match=message):
        batch.ffn(packed())
    with pytest.raises(TypeError, match="experts: expected moeshard._core.PackedExperts"):
        batch.ffn(None)


# ---- threads of Python -----------------------------------------------------------------------------------


def test_the_gil_is_free_while_experts_compute():
    case = layer_case(512, 512, 1024, 2, 2)
    packed, out = pack_case(case), np.empty_like(case["hidden"])
    batch, exchange = _core.Batch(), _core.exchange_one()
    batch.route(case["hidden"], case["index"], case["weights"], 2, out)
    exchange.gather(batch)
    batch.group()
    gaps = []
    for _ in range(5):  # a busy machine may take the core away once, not always
        seconds, done = [], threading.Event()

        def compute(seconds=seconds, done=done):
            start = time.perf_counter()
            for _ in range(4):
                batch.ffn(packed)
            seconds.append(time.perf_counter() - start)
            done.set()

        thread = threading.Thread(target=compute)
        last, longest = time.perf_counter(), 0.0
        thread.start()
        while not done.is_set():
            now = time.perf_counter()
            longest, last = max(longest, now - last), now
        thread.join()
        gaps.append(longest / seconds[0])
    assert min(gaps) < 0.2  # with the GIL held it is 0.25 or more: one call of four


def test_threads_with_batches_of_their_own_share_experts_and_pool():
    case = layer_case(64, 32, 48, 4, 2)
    packed, failures = pack_case(case), []
    right = layer(case["hidden"], case["index"], case["weights"], packed, np.empty_like(case["hidden"]))

    done = threading.Event()

    def work():
        try:
            batch, exchange, out = _core.Batch(), _core.exchange_one(), np.empty_like(right)
            while not done.is_set():
                layer(case["hidden"], case["index"], case["weights"], packed, out, batch, exchange)
                assert (out == right).all()
        except BaseException as error:
            failures.append(error)

    workers = [threading.Thread(target=work) for _ in range(4)]
    with threads_put_back():
        for worker in workers:
            worker.start()
        for change in range(100):  # pools change under running calls
            _core.set_num_threads(1 + change % 3)
        done.set()
        for worker in workers:
            worker.join()
    assert not failures


def test_a_batch_used_by_many_threads_raises_and_does_not_crash():
    case = layer_case(64, 32, 48, 4, 2)
    packed, batch, exchange = pack_case(case), _core.Batch(), _core.exchange_one()
    outcomes, stop = set(), time.monotonic() + 2

    def hammer():
        out = np.empty_like(case["hidden"])
        while time.monotonic() < stop:
            for call in (
                lambda: batch.route(case["hidden"], case["index"], case["weights"], 4, out),
                lambda: exchange.gather(batch),
                batch.group,
                lambda: batch.ffn(packed),
                batch.rows,
                batch.counts,
                lambda: exchange.combine(batch),
                lambda: exchange.refuse("x"),
            ):
                try:
                    call()
                    outcomes.add("ok")
                except ArgumentError as error:
                    outcomes.add(str(error))

    workers = [threading.Thread(target=hammer) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert {"ok", "batch is in use by another thread"} <= outcomes


def test_a_tensor_may_use_the_batch_it_is_being_given_to():
    batch = _core.Batch()

    class Reenters:
        def __dlpack__(self, **kwargs):
            batch.route(**ROUTE)
            return ROUTE["hidden_states"].__dlpack__(**kwargs)

    batch.route(**{**ROUTE, "hidden_states": Reenters()})
    assert batch.shape == (6, 4, 2)
