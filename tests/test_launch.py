# SPDX-License-Identifier: Apache-2.0
"""launch: functions on worker processes, their errors, their output, and nothing left behind."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

import moeshard


@pytest.fixture(scope="module")
def two():
    with moeshard.launch(2, timeout=30) as ranks:
        yield ranks


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


def wait_until(condition, seconds=5.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


def shared_memory():
    return set(Path("/dev/shm").glob("moeshard-*"))


# ---- functions --------------------------------------------------------------------------------------


def test_results_come_in_rank_order(two):
    offset = 100  # a closure
    assert two.run(lambda x, *, y: (moeshard.init().rank, x + y + offset), 1, y=2) == [(0, 103), (1, 103)]
    assert len(two) == two.size == 2 and two.run(os.getpid) == two.pids


def test_tensors_travel_both_ways(two):
    import torch

    tensor = torch.randn(3, 4).bfloat16()
    for result in two.run(lambda x: {"twice": 2 * x}, tensor):
        assert torch.equal(result["twice"], 2 * tensor)


def test_the_group_is_all_workers_through_shared_memory(two):
    assert two.run(lambda: (moeshard.init().size, moeshard.init().backend)) == [(2, "shm")] * 2
    assert two.run(lambda: moeshard.init().all_gather(bytes([moeshard.init().rank]))) == [[b"\0", b"\1"]] * 2


def test_state_outlives_a_run(two):
    from moeshard import worker_state

    def put():
        worker_state["seen"] = os.getpid()

    two.run(put)
    assert two.run(lambda: moeshard.worker_state["seen"]) == two.pids
    assert "seen" not in worker_state, "every process has its own"


def test_a_script_needs_no_main_guard_and_its_classes_travel(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent("""
        import moeshard
        class Point:
            def __init__(self, x): self.x = x
        def double(point): return Point(2 * point.x)
        print("once")
        with moeshard.launch(2) as ranks:
            results = ranks.run(double, Point(21))
            assert all(isinstance(p, Point) and p.x == 42 for p in results)
        """)
    )
    result = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60)
    assert (result.stdout, result.returncode) == ("once\n", 0), result.stderr


def test_without_cloudpickle_module_functions_work_and_others_say_what_to_install(two, monkeypatch):
    monkeypatch.setitem(sys.modules, "cloudpickle", None)
    assert two.run(os.getpid) == two.pids
    with pytest.raises(moeshard.ArgumentError, match="pip install cloudpickle"):
        two.run(lambda: 1)

    def mine():
        pass

    mine.__module__ = "__main__"
    with pytest.raises(moeshard.ArgumentError, match="__main__.*pip install cloudpickle"):
        two.run(mine)


def test_what_cannot_be_sent_is_refused_and_the_ranks_go_on(two):
    import threading

    lock = threading.Lock()
    with pytest.raises(moeshard.ArgumentError, match="cannot be sent.*lock"):
        two.run(lambda: lock)
    with pytest.raises(moeshard.ArgumentError, match="cannot be sent.*lock"):
        two.run(lambda: __import__("threading").Lock())
    assert two.run(os.getpid) == two.pids


def test_cores_and_threads_are_divided():
    cores = sorted(os.sched_getaffinity(0))

    def found():
        import torch

        names = ("OMP_NUM_THREADS", "MOESHARD_NUM_THREADS", "OMP_WAIT_POLICY", "MINE")
        return sorted(os.sched_getaffinity(0)), torch.get_num_threads(), [os.environ[name] for name in names]

    with moeshard.launch(2, env={"MINE": "yes"}) as ranks:
        results = ranks.run(found)
    if len(cores) > 1:
        assert sorted(results[0][0] + results[1][0]) == cores
    for own, torch_threads, variables in results:
        assert torch_threads == len(own) and variables == [str(len(own))] * 2 + ["passive", "yes"]
    assert sorted(os.sched_getaffinity(0)) == cores
    with moeshard.launch(1, threads=3) as ranks:
        assert ranks.run(lambda: os.environ["MOESHARD_NUM_THREADS"]) == ["3"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": 0}, "n: expected an integer from 1 to 1024, got 0"),
        ({"n": "2"}, "n: .*'2'"),
        ({"n": 1, "threads": 0}, "threads: .*0"),
        ({"n": 1, "timeout": 0}, "timeout: .*positive.*0"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(moeshard.ArgumentError, match=message):
        moeshard.launch(**arguments)


# ---- output -------------------------------------------------------------------------------------------


def test_what_workers_print_is_shown_in_whole_lines(two, capsys):
    def talk():
        import sys

        for line in range(200):
            print(f"rank {moeshard.init().rank} line {line:03d} " + "x" * 100)
        print("to stderr", file=sys.stderr)
        os.write(1, b"from C\n")
        print("no newline", end="")

    two.run(talk)
    lines = capsys.readouterr().out.split("\n")
    for rank in range(2):
        assert [x for x in lines if x.startswith(f"rank {rank}")] == [
            f"rank {rank} line {line:03d} " + "x" * 100 for line in range(200)
        ]
    assert lines.count("to stderr") == lines.count("from C") == 2
    assert "".join(lines).count("no newline") == 2


# ---- errors -----------------------------------------------------------------------------------------


class TwoArguments(Exception):
    def __init__(self, a, b):
        super().__init__(f"{a} and {b}")


def test_an_exception_comes_back_as_its_type_with_rank_and_traceback(two):
    def fail():
        if moeshard.init().rank == 1:
            return {}["missing"]

    with pytest.raises(KeyError, match="missing") as caught:
        two.run(fail)
    notes = "".join(caught.value.__notes__)
    assert "rank 1 of 2" in notes and 'return {}["missing"]' in notes and "_worker.py" not in notes
    assert two.run(os.getpid) == two.pids


def test_an_exception_that_cannot_be_pickled_keeps_its_name_and_text(two):
    def fail():
        raise TwoArguments(1, 2)

    with pytest.raises(RuntimeError, match="TwoArguments: 1 and 2"):
        two.run(fail)


def test_exit_and_interrupt_in_a_worker_do_not_end_the_caller(two):
    for error in (SystemExit(3), KeyboardInterrupt()):

        def fail(error=error):
            raise error

        with pytest.raises(RuntimeError, match=type(error).__name__):
            two.run(fail)
    assert two.run(os.getpid) == two.pids


def test_ranks_that_did_not_notice_an_error_make_a_new_group_too():
    def fail():
        if moeshard.init().rank == 1:
            raise ValueError("the cause")
        time.sleep(2)  # longer than the others are waited for, and no collective call

    with moeshard.launch(3, timeout=5) as ranks:
        with pytest.raises(ValueError, match="the cause"):
            ranks.run(fail)
        assert ranks.run(lambda: moeshard.init().all_gather(b"again")) == [[b"again"] * 3] * 3


def test_the_cause_is_raised_not_its_echo_and_nobody_waits_for_the_timeout(two):
    def fail():
        group = moeshard.init()
        if group.rank == 1:
            raise ValueError("the cause")
        group.barrier()

    start = time.monotonic()
    with pytest.raises(ValueError, match="the cause") as caught:
        two.run(fail)
    assert time.monotonic() - start < 5
    assert "rank 0: RankLost" in "".join(caught.value.__notes__)
    assert two.run(lambda: moeshard.init().all_gather(b"again")) == [[b"again"] * 2] * 2


# ---- death --------------------------------------------------------------------------------------------


def wait_in_collective(victim, how):
    group = moeshard.init()
    group.barrier()
    if group.rank == victim:
        if how == "exit":
            os._exit(7)
        os.kill(os.getpid(), getattr(signal, how))
    while True:
        group.barrier()


@pytest.mark.parametrize(
    ("how", "said"),
    [("SIGKILL", "killed by SIGKILL"), ("SIGSEGV", "killed by SIGSEGV"), ("exit", "exited with status 7")],
)
def test_a_killed_rank_is_named_within_two_seconds_and_nothing_is_left(how, said):
    before = shared_memory()
    ranks = moeshard.launch(3)
    ranks.run(lambda: moeshard.init().barrier())
    start = time.monotonic()
    with pytest.raises(
        moeshard.RankLost, match=rf"rank 1 of 3 \(process {ranks.pids[1]}\) was killed by|exited"
    ) as caught:
        ranks.run(wait_in_collective, 1, how)
    assert said in str(caught.value)
    assert time.monotonic() - start < 2
    assert not any(map(alive, ranks.pids)) and shared_memory() <= before
    with pytest.raises(moeshard.CommError, match="closed.*launch again"):
        ranks.run(os.getpid)


def test_a_rank_killed_between_runs_is_named():
    with moeshard.launch(2) as ranks:
        os.kill(ranks.pids[0], signal.SIGKILL)
        wait_until(lambda: not alive(ranks.pids[0]))
        with pytest.raises(moeshard.RankLost, match="rank 0 of 2.*SIGKILL"):
            ranks.run(os.getpid)
    assert not any(map(alive, ranks.pids))


def test_shared_memory_of_ranks_killed_while_they_meet_is_removed():
    with moeshard.launch(2) as ranks:
        name = ranks.run(lambda: moeshard.group.launched.name)[0]
        file = Path(f"/dev/shm/moeshard-{name}-1-0")  # as a rank leaves it that is killed before all have met
        for pid in ranks.pids:
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not any(map(alive, ranks.pids)))
        file.touch()
    assert not file.exists()


def test_a_worker_that_cannot_start_shows_why(capsys):
    with pytest.raises(moeshard.RankLost, match="rank 0 of 1 .*exited with status 1"):
        moeshard.launch(1, env={"PYTHONPATH": "/nowhere", "PYTHONSAFEPATH": "1", "PYTHONHOME": "/nowhere"})
    assert "encodings" in capsys.readouterr().out


PROGRAM = """
import os, sys, time, moeshard
def work():
    group = moeshard.init()
    while True:
        group.barrier()
ranks = moeshard.launch(2)
print(*ranks.pids, flush=True)
{body}
"""


@pytest.fixture
def program():
    """Start PROGRAM with a body; the process and the pids of its workers."""
    started = []

    def start(body):
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM.format(body=body)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        started.append(process)
        return process, [int(pid) for pid in process.stdout.readline().split()]

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("body", ["ranks.run(work)", "ranks.run(time.sleep, 60)", "time.sleep(60)"])
def test_ctrl_c_leaves_no_process_and_no_shared_memory(program, body):
    before = shared_memory()
    process, pids = program(body)
    time.sleep(0.7)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, err = process.communicate(timeout=20)
    assert process.returncode == -signal.SIGINT and "KeyboardInterrupt" in err
    assert not any(map(alive, pids)) and shared_memory() <= before


@pytest.mark.parametrize("body", ["ranks.run(work)", "ranks.run(time.sleep, 60)", "time.sleep(60)"])
def test_a_killed_parent_leaves_no_process_and_no_shared_memory(program, body):
    before = shared_memory()
    process, pids = program(body)
    time.sleep(0.7)
    process.kill()
    wait_until(lambda: not any(map(alive, pids)), 4)
    wait_until(lambda: shared_memory() <= before, 2)


def test_a_program_that_forgets_to_close_ends_its_workers(program):
    process, pids = program("pass")
    assert process.wait(20) == 0
    wait_until(lambda: not any(map(alive, pids)))


def test_close_is_legal_twice_and_repr_tells():
    ranks = moeshard.launch(1)
    assert repr(ranks) == "Ranks(size=1)"
    ranks.close()
    ranks.close()
    assert repr(ranks) == "Ranks(size=1, closed)"
