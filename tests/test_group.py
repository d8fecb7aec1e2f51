# SPDX-License-Identifier: Apache-2.0
"""Groups: how ranks find each other, talk, disagree and lose each other."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from reference import experts_reference, layer_case, relative_error
from workers import on_ranks, subgroup

import moeshard
from moeshard import group as group_module
from moeshard.exchange_torch import TorchExchange

HERE = Path(__file__).parent


def over_gloo(ranks, path, timeout=None):
    """A group over torch.distributed in the first workers of a launch."""
    import torch.distributed as dist

    if group_module.launched.rank >= ranks:
        return None
    if not dist.is_initialized():
        dist.init_process_group("gloo", init_method=f"file://{path}", rank=group_module.launched.rank, world_size=ranks)
    return moeshard.init("torch", timeout=timeout)


# ---- init -----------------------------------------------------------------------------------------


def test_one_process_is_one_rank_and_the_default_is_kept():
    group = moeshard.init()
    assert (group.rank, group.size, group.backend) == (0, 1, "one")
    assert moeshard.init() is group and moeshard.init("one") is group
    group.close()
    assert group.closed and moeshard.init() is not group


def test_backends_that_need_ranks_say_how_to_get_them(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    for backend in ("shm", "torch"):
        with pytest.raises(moeshard.ArgumentError, match=f"'{backend}' needs ranks.*torchrun.*moeshard.launch"):
            moeshard.init(backend)
    with pytest.raises(moeshard.ArgumentError, match="'one', 'shm' or 'torch', got 'mpi'"):
        moeshard.init("mpi")
    with pytest.raises(moeshard.ArgumentError, match="timeout.*positive.*0"):
        moeshard.init("one", timeout=0) if moeshard.init().close() is None else None


def test_torchrun_finds_shared_memory_and_torch_is_bit_equal(tmp_path):
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0", "--standalone",
        str(HERE / "torchrun_ranks.py"), str(tmp_path / "found"),
    ]  # fmt: skip
    before = set(Path("/dev/shm").glob("moeshard-*"))
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    for rank in range(2):
        found = json.loads((tmp_path / f"found.{rank}").read_text())
        for key, backend in (("auto", "shm"), ("torch", "torch")):
            assert found[key][:2] == [2, backend]
            assert found[key][2] < 2e-6
        assert found["same bits"]
    assert set(Path("/dev/shm").glob("moeshard-*")) <= before, "no name is left"


def hosts_differ(ranks, path):
    """Ranks that believe to be on different hosts."""
    true, group_module._host_digest = group_module._host_digest, lambda: bytes([group_module.launched.rank]) * 32
    try:
        import torch.distributed as dist

        if not dist.is_initialized():
            dist.init_process_group(
                "gloo", init_method=f"file://{path}", rank=group_module.launched.rank, world_size=ranks
            )
        with moeshard.init(process_group=dist.group.WORLD) as group:
            found = group.backend, group.all_gather(bytes([group.rank]))
        with pytest.raises(
            moeshard.CommError, match="'shm' needs all ranks on one host, but rank 1 is not on rank 0's"
        ):
            moeshard.init("shm", process_group=dist.group.WORLD)
        return found
    finally:
        group_module._host_digest = true


def test_ranks_of_different_hosts_use_torch(tmp_path):
    with moeshard.launch(2) as ranks:
        assert ranks.run(hosts_differ, 2, tmp_path / "store") == [("torch", [b"\0", b"\1"])] * 2


# ---- talking ---------------------------------------------------------------------------------------


def gathers(group):
    import torch

    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16).view(-1, 64)[group.rank :]
    rows = group.gather_rows(bits)
    same = (rows[group.rank] == bits.view(torch.uint16).numpy()).all() and [len(r) for r in rows] == list(
        range(1024, 1024 - group.size, -1)
    )
    messages = group.all_gather(os.urandom(0) if group.rank == 0 else bytes([group.rank]) * 5000 * group.rank)
    return bool(same), [(len(m), set(m)) for m in messages]


def gathers_over_gloo(ranks, path):
    group = over_gloo(ranks, path)
    return group and gathers(group)


@pytest.mark.parametrize("exchange", ["shm", "torch"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_bytes_and_rows_arrive_bit_for_bit(workers, tmp_path, exchange, ranks):
    if exchange == "shm":
        results = on_ranks(workers, ranks, gathers)
    else:
        with moeshard.launch(ranks) as own:
            results = own.run(gathers_over_gloo, ranks, tmp_path / "store")
    for same, messages in results:
        assert same
        assert messages == [(5000 * rank, {rank} if rank else set()) for rank in range(ranks)]


def one_rank_gathers():
    return moeshard.init("one").all_gather(b"x" * 10_000)


def test_one_rank_gathers_its_own():
    assert one_rank_gathers() == [b"x" * 10_000]


def half_fails(group):
    with group.all_or_none():
        if group.rank == 1:
            raise LookupError("no such thing")


def disagrees(group):
    group.agree({"colour": "blue", "size": str(group.rank // 2)})


def test_all_or_none_and_agree_reach_every_rank(workers):
    with pytest.raises(LookupError, match="no such thing") as caught:
        on_ranks(workers, 3, half_fails)
    assert "PeerError: rank 1: LookupError: no such thing" in "".join(caught.value.__notes__)
    with pytest.raises(moeshard.RankMismatch, match="size: 0 on rank 0 but 1 on rank 2"):
        on_ranks(workers, 3, disagrees)
    assert all(same for same, _ in on_ranks(workers, 3, gathers)), "the group goes on"


def test_a_closed_group_says_what_to_do():
    group = group_module._alone()
    layer = moeshard.ShardedExperts.from_weights(torch.ones(1, 2, 4), torch.ones(1, 4, 2), group=group)
    group.close()
    assert "closed" in repr(group)
    for call in (group.barrier, lambda: layer(torch.ones(1, 4), torch.zeros(1, 1).long(), torch.ones(1, 1))):
        with pytest.raises(moeshard.CommError, match=r"closed \(by close.*moeshard.init\(\)"):
            call()


# ---- torch.distributed -----------------------------------------------------------------------------


def layer_over_gloo(ranks, path, case, tokens, dtype, replicated):
    group = over_gloo(ranks, path)
    assert isinstance(group.exchange, TorchExchange)
    first = sum(tokens[: group.rank])
    rows = slice(None) if replicated else slice(first, first + tokens[group.rank])
    layer = moeshard.ShardedExperts.from_weights(
        torch.from_numpy(case["w_in"]),
        torch.from_numpy(case["w_out"]),
        group=group,
        tokens="replicated" if replicated else "local",
    )
    inputs = [torch.from_numpy(case[name])[rows] for name in ("hidden", "index", "weights")]
    inputs[0] = inputs[0].to(dtype)
    output = layer(*inputs)
    layer.group = subgroup(ranks)  # the same layer through shared memory
    assert torch.equal(layer(*inputs), output), "other bits than through shared memory"
    return output.float().numpy()


@pytest.fixture(scope="module")
def gloo(tmp_path_factory):
    with moeshard.launch(3, timeout=30) as ranks:
        yield ranks, tmp_path_factory.mktemp("gloo") / "store"


@pytest.mark.parametrize("tokens", [(4, 13, 3), (0, 20, 0), (0, 0, 0)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_layer_over_gloo_equals_float64(gloo, tokens, dtype):
    ranks, path = gloo
    case = layer_case(20, 24, 37, 5, 2, dropped=0.1)
    case["hidden"] = torch.from_numpy(case["hidden"]).to(dtype).float().numpy()
    case = {**case, **{name: case[name][: sum(tokens)] for name in ("hidden", "index", "weights")}}
    found = np.concatenate(ranks.run(layer_over_gloo, 3, path, case, tokens, dtype, False))
    expected = experts_reference(*(case[name] for name in ("hidden", "index", "weights", "w_in", "w_out")))
    assert relative_error(found, expected) <= {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]


def test_replicated_tokens_over_gloo(gloo):
    ranks, path = gloo
    case = layer_case(20, 24, 37, 5, 2)
    expected = experts_reference(*(case[name] for name in ("hidden", "index", "weights", "w_in", "w_out")))
    for found in ranks.run(layer_over_gloo, 3, path, case, (), torch.float32, True):
        assert relative_error(found, expected) < 2e-6


def refuses_over_gloo(ranks, path):
    """A rank that cannot take part in gather, then one that cannot in combine; then all go on."""
    group, said = over_gloo(ranks, path), []
    for failing in (0, 1):
        try:
            if failing == 0:
                half_fails(group)
            else:
                group.batch.route(
                    np.ones((2, 4), np.float32), np.zeros((2, 1), np.int64), np.ones((2, 1), np.float32), 1,
                    np.empty((2, 4), np.float32),
                )  # fmt: skip
                group.gather(group.batch)
                with group.refusing():
                    if group.rank == 1:
                        raise LookupError("later")
                    group.batch.group()
                    columns = np.array([[0, 2]] if group.rank == 0 else [[2, 2]])
                    group.batch.ffn(
                        moeshard.ExpertWeights([np.ones((2, 4), np.float32)], [np.ones((4, 2), np.float32)]).pack(
                            columns, moeshard.experts.Sizes(1, 4, 2, "float32"), "float32"
                        )
                    )
                group.combine(group.batch)
        except Exception as error:
            said.append(f"{type(error).__name__}: {error}")
    return said, group.all_gather(b"on")


def test_refusals_over_gloo_reach_every_rank_and_the_group_goes_on(gloo):
    ranks, path = gloo
    for rank, (said, after) in enumerate(ranks.run(refuses_over_gloo, 3, path)):
        echo = "" if rank == 1 else "PeerError: rank 1: "
        assert said == [f"{echo}LookupError: no such thing", f"{echo}LookupError: later"]
        assert after == [b"on"] * 3


def mismatch_over_gloo(ranks, path):
    group = over_gloo(ranks, path)
    group.gather_rows(np.ones((3, 4 + group.rank), np.float32))


def test_a_mismatch_over_gloo_is_the_same_error_and_the_group_goes_on(gloo):
    ranks, path = gloo
    with pytest.raises(moeshard.RankMismatch, match="model width D is 4 on rank 0 but 5 on"):
        ranks.run(mismatch_over_gloo, 3, path)
    assert ranks.run(lambda: moeshard.init("torch").all_gather(b"on")) == [[b"on"] * 3] * 3


# ---- losing ranks ------------------------------------------------------------------------------------


def first_dies(backend, path, how):
    """Rank 1 goes in the middle of things; what the others see, and after how long."""
    group = over_gloo(3, path, timeout=4) if backend == "torch" else subgroup(3)
    group.barrier()
    if group.rank == 1:
        if how == "closes":
            return group.close()
        os.kill(os.getpid(), signal.SIGKILL if how == "dies" else signal.SIGSTOP)
    start = time.monotonic()
    try:
        while True:
            group.barrier()
    except moeshard.CommError as error:
        return type(error).__name__, str(error), time.monotonic() - start, group.closed, bool(error.__cause__)


def ranks_without(how, backend, path):
    """Start three ranks by hand, so that the death of one does not end the others."""
    code = (
        "import sys, json; from test_group import first_dies; from moeshard import group\n"
        "rank, name, backend, path, how = int(sys.argv[1]), *sys.argv[2:]\n"
        "group.launched = group.Launched(name, rank, 3, 4.0)\n"
        "print(json.dumps(first_dies(backend, path, how)))"
    )
    name = f"test-{os.getpid()}-{time.monotonic_ns()}"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), *filter(None, sys.path)]), "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [sys.executable, "-c", code, str(rank), name, backend, str(path), how],
            env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(3)
    ]  # fmt: skip


def comes_alone(path):
    """Only rank 0 wants a group."""
    if group_module.launched.rank == 0:
        moeshard.init() if path is None else over_gloo(2, path)
    elif path is not None:
        import torch.distributed as dist

        dist.init_process_group("gloo", init_method=f"file://{path}", rank=1, world_size=2)


@pytest.mark.parametrize("backend", ["shm", "torch"])
def test_a_rank_that_does_not_come_is_a_timeout(tmp_path, backend):
    with moeshard.launch(2, timeout=2) as ranks:
        start = time.monotonic()
        with pytest.raises(moeshard.CommTimeout):
            ranks.run(comes_alone, tmp_path / "store" if backend == "torch" else None)
        assert time.monotonic() - start < 8


@pytest.mark.parametrize("backend", ["shm", "torch"])
@pytest.mark.parametrize(
    ("how", "error", "within"), [("stops", "CommTimeout", 7), ("closes", "RankLost", 2), ("dies", "RankLost", 2)]
)
def test_a_rank_that_is_gone_is_noticed(tmp_path, backend, how, error, within):
    processes = ranks_without(how, backend, tmp_path / "store")
    try:
        for rank in (0, 2):
            out, err = processes[rank].communicate(timeout=60)
            assert processes[rank].returncode == 0, err
            kind, message, seconds, closed, caused = json.loads(out.splitlines()[-1])
            # over gloo the first to notice leaves too, and may be what the other notices
            assert kind == error or (backend == "torch" and kind == "RankLost"), message
            assert "rank 1" in message or backend == "torch"
            assert seconds < within and closed
            assert caused == (backend == "torch"), "the error of torch.distributed is the cause"
    finally:
        for process in processes:
            process.kill()
            process.communicate()
