# SPDX-License-Identifier: Apache-2.0
"""_core.Exchange and the halves of Batch for transports in Python: ranks as threads of this process. Needs no torch."""

import gc
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from core_cases import layer, pack_case
from reference import experts_reference, layer_case, relative_error

from moeshard import _core
from moeshard._core import ArgumentError, CommError, DTypeError, ShapeError


def files(name):
    """What a group of this name has left behind."""
    return [path.name for path in Path("/dev/shm").glob(f"moeshard-{name}-*")]


def connected(ranks, timeout=20.0, name=None):
    """An exchange of each rank, through shared memory."""
    name = name or secrets.token_hex(8)
    with ThreadPoolExecutor(ranks) as pool:
        return list(pool.map(lambda rank: _core.exchange_shm(name, rank, ranks, timeout), range(ranks)))


def on_ranks(ranks, work, *more, timeout=20.0):
    """work(rank, exchange, ...) of every rank at once; exceptions are results."""

    def safely(rank, exchange):
        try:
            return work(rank, exchange, *more)
        except Exception as error:
            return error

    with ThreadPoolExecutor(ranks) as pool:
        return list(pool.map(safely, range(ranks), connected(ranks, timeout)))


def cut(array, ranks):
    """The tokens of each rank: near-equal parts, none for the last rank of four."""
    return np.array_split(array, ranks) if ranks < 4 else [*np.array_split(array, 3), array[:0]]


def pieces(case, ranks):
    parts = [cut(case[name], ranks) for name in ("hidden", "index", "weights")]
    columns = _core.plan_shard(ranks, 1, case["w_out"].shape[2])[:, 0]
    return [
        (*part, pack_case(case, columns=tuple(span)))
        for part, span in zip(zip(*parts, strict=True), columns, strict=True)
    ]


def right_of(case):
    return experts_reference(**{name: case[name] for name in case})


# ---- ranks that share memory ---------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_ranks_together_compute_the_layer(ranks):
    case = layer_case(31, 24, 37, 5, 2, bias=True, dropped=0.1)
    shares = pieces(case, ranks)

    def work(rank, exchange):
        batch, hidden = _core.Batch(), shares[rank][0]
        out = np.full_like(hidden, np.nan)
        for _ in range(3):
            layer(*shares[rank], out, batch, exchange)
        return out, batch.tokens_per_rank.tolist(), batch.counts().tolist()

    found = on_ranks(ranks, work)
    assert relative_error(np.concatenate([out for out, _, _ in found]), right_of(case)) <= 2e-6
    for _, tokens, counts in found:
        assert tokens == [len(hidden) for hidden, *_ in shares]
        assert counts == [(case["index"] == expert).sum() for expert in range(5)]


def test_a_rank_whose_empty_tensors_have_no_address_still_sums_for_the_others():
    torch = pytest.importorskip("torch")
    case = layer_case(6, 8, 12, 3, 2)
    shares = pieces(case, 2)
    both = [case[name] for name in ("hidden", "index", "weights")]

    def work(rank, exchange):
        rows = [torch.from_numpy(x) if rank == 0 else torch.from_numpy(x[:0].copy()) for x in both]
        out = torch.full_like(rows[0], float("nan"))
        assert rank == 0 or out.data_ptr() == 0
        return layer(*rows, shares[rank][3], out, exchange=exchange)

    assert relative_error(on_ranks(2, work)[0], right_of(case)) <= 2e-6


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_replicated_tokens_are_summed_over_ranks(ranks):
    case = layer_case(9, 8, 12, 3, 2)
    shares = pieces(case, ranks)

    def work(rank, exchange):
        batch, out = _core.Batch(), np.empty_like(case["hidden"])
        batch.route(case["hidden"], case["index"], case["weights"], 3, out, replicated=True)
        exchange.gather(batch)
        assert batch.tokens_per_rank.tolist() == [9] + [0] * (ranks - 1)
        batch.group()
        batch.ffn(shares[rank][3])
        exchange.combine(batch)
        return out

    for out in on_ranks(ranks, work):
        assert relative_error(out, right_of(case)) <= 2e-6


def test_rows_travel_bit_for_bit_without_choices():
    parts = [np.random.default_rng(rank).integers(0, 2**16, (rank + 1, 5)).astype(np.uint16) for rank in range(3)]

    def work(rank, exchange):
        batch = _core.Batch()
        batch.route(
            parts[rank].view(np.float16), np.zeros((rank + 1, 0), np.int32), np.zeros((rank + 1, 0), np.float32), 1
        )
        exchange.gather(batch)
        rows = batch.rows()
        exchange.combine(batch)
        return rows, batch.tokens_per_rank.tolist()

    for rows, tokens in on_ranks(3, work):
        assert rows.dtype == np.uint16 and (rows == np.concatenate(parts)).all()
        assert tokens == [1, 2, 3]


def test_an_exchange_says_what_it_is():
    one = _core.exchange_one()
    assert (one.name, one.rank, one.ranks) == ("one", 0, 1)
    for rank, exchange in enumerate(connected(3)):
        assert (exchange.name, exchange.rank, exchange.ranks) == ("shm", rank, 3)
        exchange.close()
        assert (exchange.name, exchange.rank, exchange.ranks) == ("shm", rank, 3)


# ---- failing together ------------------------------------------------------------------------------------


def nothing(rank, exchange, **change):
    """A call of a batch of one token, of which something may differ."""
    batch = _core.Batch()
    arguments = {
        "dtype": np.float32,
        "width": 4,
        "choices": 1,
        "experts": 2,
        "layer": 0,
        "replicated": False,
        "out": False,
    }
    a = {**arguments, **change}
    hidden = np.ones((1, a["width"]), a["dtype"])
    routing = np.zeros((1, a["choices"]), np.int64), np.ones((1, a["choices"]), np.float32)
    batch.route(
        hidden,
        *routing,
        a["experts"],
        np.empty_like(hidden) if a["out"] else None,
        layer=a["layer"],
        replicated=a["replicated"],
    )
    exchange.gather(batch)
    exchange.combine(batch)
    return "done"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"layer": 9}, "the layer is 0 on rank 0 but 9 on rank 1", id="layer"),
        pytest.param({"width": 5}, "the model width D is 4 on rank 0 but 5 on rank 1", id="width"),
        pytest.param({"dtype": np.float16}, "the dtype is float32 on rank 0 but float16 on rank 1", id="dtype"),
        pytest.param({"choices": 2}, "the choices per token K is 1 on rank 0 but 2 on rank 1", id="choices"),
        pytest.param({"experts": 3}, "the number of experts E is 2 on rank 0 but 3 on rank 1", id="experts"),
        pytest.param({"replicated": True}, "replicated is false on rank 0 but true on rank 1", id="replicated"),
    ],
)
def test_ranks_that_disagree_all_say_the_same_and_go_on(change, message):
    def work(rank, exchange):
        with pytest.raises(_core.RankMismatch) as caught:
            nothing(rank, exchange, **(change if rank else {}))
        return str(caught.value), nothing(rank, exchange)

    said = on_ranks(2, work)
    assert said == [(f"ranks disagree in call 1: {message}", "done")] * 2


@pytest.mark.parametrize(
    ("message", "heard"),
    [
        pytest.param("ValueError: no such thing", "ValueError: no such thing", id="plain"),
        pytest.param("", "", id="empty"),
        pytest.param("größer 💥", "größer 💥", id="unicode"),
        pytest.param("a\ud800b", "a?b", id="not-utf-8"),
        pytest.param("ä" * 1000, "ä" * 100, id="cut-in-a-character"),
        pytest.param("%s%n", "%s%n", id="format"),
    ],
)
def test_a_refusal_reaches_the_others_and_all_go_on(message, heard):
    def work(rank, exchange):
        if rank == 1:
            exchange.refuse(message)
            return None, nothing(rank, exchange)
        with pytest.raises(_core.PeerError) as caught:
            nothing(rank, exchange)
        return str(caught.value), nothing(rank, exchange)

    said = on_ranks(3, work)
    for rank in (0, 2):
        assert said[rank][0].startswith(f"rank 1: {heard}") and len(said[rank][0].encode()) < 520
    assert [after for _, after in said] == ["done"] * 3


def test_a_refusal_must_be_text():
    with pytest.raises(TypeError, match="message: expected str, got <class 'int'>"):
        _core.exchange_one().refuse(1)


def test_out_on_some_ranks_only_is_a_mismatch():
    def work(rank, exchange):
        batch, hidden, packed = _core.Batch(), np.ones((1, 8), np.float32), pack_case(layer_case(1, 8, 4, 2, 1))
        batch.route(hidden, np.zeros((1, 1), int), hidden[:, :1], 2, np.empty_like(hidden) if rank else None)
        exchange.gather(batch)
        batch.group()
        batch.ffn(packed)
        with pytest.raises(_core.RankMismatch, match="out is given on rank 1 but not on rank 0"):
            exchange.combine(batch)
        return nothing(rank, exchange)

    assert on_ranks(2, work) == ["done"] * 2


def test_a_rank_that_leaves_is_lost():
    def work(rank, exchange):
        if rank == 1:
            exchange.close()
            return "left"
        start = time.monotonic()
        with pytest.raises(_core.RankLost, match="rank 1"):
            nothing(rank, exchange)
        with pytest.raises(CommError, match="broken"):
            nothing(rank, exchange)
        return time.monotonic() - start

    waited, left, also = on_ranks(3, work)
    assert left == "left" and max(waited, also) < 5


def test_a_rank_that_does_not_come_is_a_timeout():
    def work(rank, exchange):
        if rank == 1:
            time.sleep(1.5)
            return "late"
        with pytest.raises(_core.CommTimeout, match="rank 1"):
            nothing(rank, exchange)
        return "tired"

    assert on_ranks(2, work, timeout=0.4) == ["tired", "late"]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        pytest.param(("x", 2, 2, 1.0), ArgumentError, "rank", id="rank"),
        pytest.param(("x", -1, 2, 1.0), ArgumentError, "rank", id="negative-rank"),
        pytest.param(("x", 0, 0, 1.0), ArgumentError, "rank", id="no-ranks"),
        pytest.param(("x", 2**32, 2**32 + 1, 1.0), ArgumentError, "rank: got 4294967296", id="rank-wrap"),
        pytest.param(("../x", 0, 1, 1.0), ArgumentError, "name", id="path"),
        pytest.param(("", 0, 1, 1.0), ArgumentError, "name", id="no-name"),
        pytest.param(("x\0y", 0, 1, 1.0), ValueError, "null", id="null"),
        pytest.param(("x" * 1000, 0, 1, 1.0), ArgumentError, "name", id="long-name"),
        pytest.param(("x", 0, 1, 0.0), ArgumentError, "timeout", id="no-time"),
        pytest.param(("x", 0, 1, float("nan")), ArgumentError, "timeout", id="nan"),
        pytest.param((1, 0, 1, 1.0), TypeError, "str", id="number"),
        pytest.param((secrets.token_hex(8), 0, 2, 0.3), _core.CommTimeout, "rank 1", id="alone"),
    ],
)
def test_an_exchange_that_cannot_be_is_refused_and_leaves_no_file(arguments, error, message):
    with pytest.raises(error, match=message):
        _core.exchange_shm(*arguments)
    assert not files(arguments[0])


def test_no_file_is_left_while_ranks_are_connected():
    name = secrets.token_hex(8)
    ranks = connected(2, name=name)
    assert not files(name) and len(ranks) == 2


# ---- signals ---------------------------------------------------------------------------------------------


class Alarm(Exception):
    pass


@pytest.fixture
def alarm():
    """In 0.3 seconds, a signal whose handler raises Alarm."""

    def ring(*_):
        raise Alarm

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def test_a_signal_ends_the_wait_for_other_ranks_to_come(alarm):
    name, start = secrets.token_hex(8), time.monotonic()
    with pytest.raises(Alarm):
        _core.exchange_shm(name, 0, 2, 30.0)
    assert time.monotonic() - start < 5 and not files(name)


def test_a_signal_ends_the_wait_in_a_call(alarm):
    first, _second = connected(2)
    start = time.monotonic()
    with pytest.raises(Alarm):
        nothing(0, first)
    assert time.monotonic() - start < 5
    with pytest.raises(CommError, match="broken"):
        nothing(0, first)


def test_control_c_is_a_keyboard_interrupt():
    name = secrets.token_hex(8)
    code = f"from moeshard import _core\nprint('ready', flush=True)\n_core.exchange_shm('{name}', 0, 2, 60.0)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=10)
    finally:
        process.kill()
    assert errors.strip().endswith("KeyboardInterrupt") and not files(name)


# ---- one thread at a time; what is over is over --------------------------------------------------------------


def test_what_is_in_use_by_another_thread_says_so():
    first, second = connected(2)
    batches = [_core.Batch(), _core.Batch()]
    out = [np.empty((1, 8), np.float32) for _ in batches]
    packed = pack_case(layer_case(1, 8, 4, 2, 1))
    for batch, place in zip(batches, out, strict=True):
        batch.route(np.ones((1, 8), np.float32), np.zeros((1, 1), int), np.ones((1, 1), np.float32), 2, place)
    waiting = threading.Thread(target=first.gather, args=(batches[0],))
    waiting.start()
    time.sleep(0.2)  # it waits for the second rank, holding both
    for call in (
        batches[0].group, batches[0].rows, batches[0].routing, batches[0].counts, batches[0].combine_choices,
        lambda: batches[0].ffn(packed), lambda: batches[0].shape, lambda: batches[0].nbytes,
        lambda: batches[0].tokens_per_rank, lambda: batches[0].header(1), lambda: second.gather(batches[0]),
        lambda: batches[0].route(out[1], np.zeros((1, 0), int), out[1][:, :0], 1),
        lambda: batches[0].gather_from(0, [1], out[1], np.zeros((1, 1), np.int32), out[1][:, :1].copy()),
    ):  # fmt: skip
        with pytest.raises(ArgumentError, match="^batch is in use by another thread$"):
            call()
    for call in (
        first.close,
        lambda: first.refuse("x"),
        lambda: first.gather(batches[1]),
        lambda: first.combine(batches[1]),
    ):
        with pytest.raises(ArgumentError, match="^exchange is in use by another thread$"):
            call()
    second.gather(batches[1])  # the failures above have changed nothing
    waiting.join()
    for batch in batches:
        batch.group()
        batch.ffn(packed)
    waiting = threading.Thread(target=first.combine, args=(batches[0],))
    waiting.start()
    second.combine(batches[1])
    waiting.join()
    assert (out[0] == out[1]).all()


def gathered(exchange, tokens=4):
    batch = _core.Batch()
    rows = np.ones((tokens, 8), np.float32)
    batch.route(rows, np.zeros((tokens, 1), int), np.ones((tokens, 1), np.float32), 2, np.empty_like(rows))
    exchange.gather(batch)
    return batch


@pytest.mark.parametrize("kind", ["one", "shm"])
@pytest.mark.parametrize("end", ["close", "refuse"])
def test_rows_are_not_touched_after_their_call_is_over(kind, end):
    exchange = _core.exchange_one() if kind == "one" else connected(1)[0]
    batch = gathered(exchange)
    batch.group()
    getattr(exchange, end)(*["over"] * (end == "refuse"))
    for call in (batch.group, batch.rows, lambda: batch.ffn(pack_case(layer_case(1, 8, 4, 2, 1)))):
        with pytest.raises(
            ArgumentError, match="the exchange was used for another call since, or closed: gather again"
        ):
            call()
    assert batch.shape == (4, 8, 1)
    _core.exchange_one().gather(batch)  # its tokens are still there
    assert (batch.rows() == 1).all()


@pytest.mark.parametrize("kind", ["one", "shm"])
def test_an_exchange_that_nobody_names_lives_as_long_as_its_rows(kind):
    batch = gathered(_core.exchange_one() if kind == "one" else connected(1)[0])
    gc.collect()
    assert (batch.rows() == 1).all()
    batch.group()


def test_only_the_batch_that_was_gathered_can_be_combined():
    exchange = _core.exchange_one()
    first = gathered(exchange)
    other = gathered(_core.exchange_one())
    with pytest.raises(ArgumentError, match="combine: not the batch that this exchange gathered last"):
        exchange.combine(other)
    with pytest.raises(ArgumentError, match="gather: call 1 is still open, combine .or refuse. it first"):
        exchange.gather(other)
    with pytest.raises(ArgumentError, match="combine: not the batch that this exchange gathered last"):
        exchange.combine(first)  # a gather that fails ends what it found


def test_a_closed_exchange_says_so():
    exchange = _core.exchange_one()
    batch = _core.Batch()
    batch.route(np.ones((1, 8), np.float32), np.zeros((1, 1), int), np.ones((1, 1), np.float32), 2)
    exchange.close()
    exchange.close()
    for call in (lambda: exchange.gather(batch), lambda: exchange.combine(batch), lambda: exchange.refuse("x")):
        with pytest.raises(CommError, match="^the exchange is closed$"):
            call()


@pytest.mark.parametrize("thing", [None, 1, _core.exchange_one()], ids=["none", "number", "exchange"])
def test_only_a_batch_can_be_gathered(thing):
    for call in (_core.exchange_one().gather, _core.exchange_one().combine):
        with pytest.raises(TypeError, match="batch: expected moeshard._core.Batch, got"):
            call(thing)


def test_a_forked_child_does_not_take_the_group_with_it():
    first, second = connected(2)
    child = os.fork()
    if child == 0:
        first.close()
        os._exit(0)
    os.waitpid(child, 0)
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(nothing, range(2), (first, second))) == ["done"] * 2


# ---- a transport written in Python ---------------------------------------------------------------------------


class Carrier:
    """All-gathers and all-to-alls between batches of one process, as torch.distributed would."""

    def __init__(self, batches):
        self.batches = batches

    def gather(self, call=1, hidden=None):
        _core.header_check(np.stack([batch.header(call) for batch in self.batches]))
        tokens = [batch.shape[0] for batch in self.batches]
        routing = [batch.routing() for batch in self.batches]
        index, weights = (np.concatenate(parts) for parts in zip(*routing, strict=True))
        for rank, batch in enumerate(self.batches):
            batch.gather_from(rank, tokens, hidden, index, weights)

    def combine(self):
        tokens = np.cumsum([0] + [batch.shape[0] for batch in self.batches])
        partials = [batch.combine_choices() for batch in self.batches]
        for rank, batch in enumerate(self.batches):
            batch.combine_ranks([partial[tokens[rank] : tokens[rank + 1]] for partial in partials])


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("choices", [1, 3])
def test_a_transport_in_python_computes_the_layer(ranks, choices):
    case = layer_case(31, 24, 37, 5, choices, bias=True, dropped=0.1)
    shares = pieces(case, ranks)
    batches, outs = [_core.Batch() for _ in range(ranks)], [np.full_like(share[0], np.nan) for share in shares]
    carrier = Carrier(batches)
    for call in range(2):
        for batch, (hidden, index, weights, _), out in zip(batches, shares, outs, strict=True):
            batch.route(hidden, index, weights, 5, out)
        carrier.gather(call, case["hidden"])
        for batch, share in zip(batches, shares, strict=True):
            batch.group()
            batch.ffn(share[3])
        carrier.combine()
    assert relative_error(np.concatenate(outs), right_of(case)) <= 2e-6


def alone(count=4, choices=2, batch=None, out=True, **change):
    """A batch of one rank, gathered by gather_from."""
    case = layer_case(count, 8, 4, 2, choices)
    batch = batch or _core.Batch()
    batch.route(case["hidden"], case["index"], case["weights"], 2, np.empty_like(case["hidden"]) if out else None)
    arguments = {
        "rank": 0, "tokens": [count], "hidden_states": case["hidden"],
        "top_k_index": case["index"].astype(np.int32), "top_k_weights": case["weights"],
    }  # fmt: skip
    batch.gather_from(**{**arguments, **change})
    return batch, pack_case(case)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        pytest.param({"tokens": [3]}, ShapeError, r"hidden_states: got \[4, 8\], expected \[N=3, D=8\]", id="rows"),
        pytest.param(
            {"tokens": [3, 1]}, ArgumentError, r"rank 0 routed 4 tokens, but tokens\[0\] is 3", id="own-tokens"
        ),
        pytest.param(
            {"tokens": [5, -1]}, ArgumentError, r"tokens\[1\]: got -1, expected the tokens of a rank", id="negative"
        ),
        pytest.param({"tokens": [2**62, 2**62]}, ArgumentError, r"tokens\[1\]: got 4611686018427387904", id="overflow"),
        pytest.param({"tokens": []}, (ShapeError, DTypeError), "tokens: ", id="no-ranks"),
        pytest.param({"tokens": 4}, ShapeError, r"tokens: got \[\], expected \[R\]", id="scalar"),
        pytest.param({"tokens": [4.0]}, DTypeError, r"tokens: expected integers \[R\]", id="floats"),
        pytest.param({"rank": 1}, ArgumentError, "got rank 1 of 1, expected 0 <= rank < ranks", id="rank"),
        pytest.param({"rank": -1}, ArgumentError, "got rank -1 of 1", id="negative-rank"),
        pytest.param(
            {"hidden_states": np.ones((4, 8), np.float16)},
            DTypeError,
            "hidden_states: got float16, expected float32",
            id="dtype",
        ),
        pytest.param(
            {"hidden_states": np.ones((4, 7), np.float32)}, ShapeError, r"hidden_states: got \[4, 7\]", id="width"
        ),
        pytest.param(
            {"top_k_index": np.zeros((4, 2), np.int64)},
            DTypeError,
            "top_k_index: got int64, expected int32",
            id="int64",
        ),
        pytest.param(
            {"top_k_index": np.zeros((4, 1), np.int32)},
            ShapeError,
            r"top_k_index: got \[4, 1\], expected \[N=4, K=2\]",
            id="choices",
        ),
        pytest.param(
            {"top_k_weights": np.ones((2, 4), np.float32).T}, ArgumentError, "top_k_weights: .*contiguous", id="strided"
        ),
    ],
)
def test_rows_that_do_not_fit_are_named(change, error, message):
    with pytest.raises(error, match=message):
        alone(**change)


def test_a_gathered_index_out_of_range_is_found_before_it_is_used():
    batch, _ = alone(top_k_index=np.array([[0, 1], [1, 2], [0, 0], [-1, 0]], np.int32))
    with pytest.raises(_core.RangeError, match="top_k_index of gathered token 1: got 2, expected -1 to 1"):
        batch.group()


def test_gathered_arrays_are_kept_until_combine():
    hidden = layer_case(4, 8, 4, 2, 2)["hidden"].copy()
    count = sys.getrefcount(hidden)
    batch, packed = alone(hidden_states=hidden)
    assert sys.getrefcount(hidden) == count + 1
    batch.group()
    batch.ffn(packed)
    batch.combine_ranks([batch.combine_choices()])
    assert sys.getrefcount(hidden) == count


def test_gathering_again_forgets_the_group():
    batch, packed = alone()
    batch.group()
    index, weights = batch.routing()
    batch.gather_from(0, [4], np.ones((4, 8), np.float32), index, weights)
    with pytest.raises(ArgumentError, match="ffn: nothing was grouped since the last gather"):
        batch.ffn(packed)


def test_an_exchange_is_not_combined_in_halves():
    batch = gathered(_core.exchange_one())
    for call in (batch.combine_choices, lambda: batch.combine_ranks([])):
        with pytest.raises(ArgumentError, match="the rows were gathered by an exchange, call its combine"):
            call()
    batch, _ = alone()
    with pytest.raises(ArgumentError, match="combine: not the batch that this exchange gathered last"):
        _core.exchange_one().combine(batch)


def summed(**arguments):
    batch, packed = alone(**arguments)
    batch.group()
    batch.ffn(packed)
    return batch


def test_partial_outputs_are_the_batchs_memory_until_it_needs_it_again():
    batch = summed()
    first, second = batch.combine_choices(), batch.combine_choices()
    assert np.shares_memory(first, second) and first.shape == (4, 8) and first.dtype == np.float32
    before = first.copy()
    del second
    large = summed(batch=batch, count=4000)
    assert large.combine_choices().shape == (4000, 8)
    assert (first == before).all() and not np.shares_memory(first, batch.combine_choices())
    view = batch.combine_choices()[10:20, 2:4]
    before = view.copy()
    del batch, large
    gc.collect()
    np.full((4000, 8), 7, np.float32)
    assert (view == before).all()


def test_without_arrays_in_use_memory_is_not_given_away():
    batch = summed()
    sizes = [batch.nbytes]
    for _ in range(3):
        del_me = batch.combine_choices()
        del del_me
        summed(batch=batch)
        sizes.append(batch.nbytes)
    assert len(set(sizes)) == 1


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        pytest.param(
            lambda b, p: b.combine_ranks([]),
            ShapeError,
            "parts: got 0 arrays, expected one of each of the 1 ranks",
            id="none",
        ),
        pytest.param(lambda b, p: b.combine_ranks([p, p]), ShapeError, "parts: got 2 arrays", id="two"),
        pytest.param(
            lambda b, p: b.combine_ranks([p[:3]]), ShapeError, r"parts: got \[3, 8\], expected \[T=4, D=8\]", id="rows"
        ),
        pytest.param(
            lambda b, p: b.combine_ranks([p.astype(np.float16)]),
            DTypeError,
            "parts: got float16, expected float32",
            id="dtype",
        ),
        pytest.param(
            lambda b, p: b.combine_ranks([np.asfortranarray(p)]), ArgumentError, "parts: .*contiguous", id="strided"
        ),
        pytest.param(lambda b, p: b.combine_ranks(3), TypeError, "len", id="number"),
        pytest.param(lambda b, p: b.combine_ranks("p"), DTypeError, "parts: got str, expected a tensor", id="text"),
    ],
)
def test_parts_that_do_not_fit_are_named_and_the_call_stays_open(call, error, message):
    batch = summed()
    partial = batch.combine_choices()
    with pytest.raises(error, match=message):
        call(batch, partial)
    batch.combine_ranks(np.stack([partial]))  # any sequence


def test_without_ffn_there_is_nothing_to_combine():
    batch, _ = alone()
    with pytest.raises(ArgumentError, match="combine: ffn has not run since the last gather"):
        batch.combine_choices()


def test_no_tokens_are_combined_too():
    batch = summed(count=0)
    partial = batch.combine_choices()
    assert partial.shape == (0, 8)
    batch.combine_ranks([partial])


# ---- headers -------------------------------------------------------------------------------------------------


def test_a_header_is_the_struct_of_the_core():
    batch = _core.Batch()
    batch.route(np.ones((3, 8), np.float16), np.zeros((3, 2), int), np.ones((3, 2), np.float32), 5, layer=-7)
    words = batch.header(11)
    assert words.dtype == np.int64 and words.tolist() == [11, -7, 3, 8, 2, 5, 2, 0, 0]
    with pytest.raises(ArgumentError, match="call: got -1, expected at least 0"):
        batch.header(-1)


def test_the_routing_of_replicated_tokens_is_compared():
    headers = []
    for expert in (0, 1):
        batch = _core.Batch()
        batch.route(
            np.ones((1, 8), np.float32), np.full((1, 1), expert), np.ones((1, 1), np.float32), 2, replicated=True
        )
        headers.append(batch.header(3))
    _core.header_check([headers[0], headers[0]])
    with pytest.raises(
        _core.RankMismatch, match="call 3: the routing of the replicated tokens .* on rank 0 but .* on rank 1"
    ):
        _core.header_check(headers)


@pytest.mark.parametrize(
    ("headers", "error", "message"),
    [
        pytest.param(np.zeros((2, 8), int), ShapeError, r"headers: got \[2, 8\], expected \[R, 9\]", id="words"),
        pytest.param(np.zeros((0, 9), int), ShapeError, r"headers: got \[0, 9\]", id="no-ranks"),
        pytest.param(np.zeros((2, 9)), DTypeError, "headers: expected integers", id="floats"),
        pytest.param(np.zeros((1025, 9), int), ArgumentError, "got 1025 ranks, expected 1 to 1024", id="1025-ranks"),
    ],
)
def test_bad_headers_are_refused(headers, error, message):
    with pytest.raises(error, match=message):
        _core.header_check(headers)
