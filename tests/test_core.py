# SPDX-License-Identifier: Apache-2.0
"""_core: the module itself, its threads, and plans. Needs no torch."""

import doctest
import gc
import importlib.machinery
import importlib.util
import inspect
import os
import pickle
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from core_cases import experts, normal, threads_put_back

import moeshard
from moeshard import _core
from moeshard._core import ArgumentError, DTypeError, ShapeError

ROOT = Path(__file__).parent.parent
CLASSES = (_core.Tensor, _core.PackedExperts, _core.Batch, _core.Exchange)


# ---- the module --------------------------------------------------------------------------------------


def test_the_version_is_the_one_of_pyproject():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert _core.__version__ == moeshard.__version__ == project["version"]


def public_objects():
    for name, value in vars(_core).items():
        if not name.startswith("_"):
            yield name, value
            if isinstance(value, type) and not issubclass(value, BaseException):
                yield from ((f"{name}.{member}", thing) for member, thing in vars(value).items() if member[0] != "_")


@pytest.mark.parametrize(("name", "value"), list(public_objects()))
def test_everything_is_documented_and_has_a_signature(name, value):
    assert value.__doc__.strip()
    if inspect.isroutine(value):
        inspect.signature(value)
        assert value.__doc__.strip().splitlines()[0].endswith((".", ":", "'"))


def test_examples_in_the_docstrings_run():
    names = vars(_core)
    finder, runner = doctest.DocTestFinder(), doctest.DocTestRunner()
    for name, value in public_objects():
        for test in finder.find(value, name, globs=dict(names), module=False):
            runner.run(test)
    assert runner.tries >= 6 and not runner.failures


def test_the_stub_is_what_the_extension_is(tmp_path):
    pytest.importorskip("mypy")
    only_in_stub = tmp_path / "only_in_stub"  # __buffer__ can be seen from Python 3.12 on
    only_in_stub.write_text(
        "moeshard._core.DType\nmoeshard._core.Storage\nmoeshard._core.Activation\n(moeshard._core.Tensor.__buffer__)?\n"
    )
    config = tmp_path / "mypy.ini"  # the rest of the package leads to torch, which takes a minute to read
    skipped, untyped = "torch.*,transformers.*", "scipy.*"
    config.write_text(
        f"[mypy]\n[mypy-{skipped}]\nfollow_imports = skip\n[mypy-{untyped}]\nignore_missing_imports = true\n"
    )
    command = [sys.executable, "-m", "mypy.stubtest", "moeshard._core"]
    command += ["--allowlist", only_in_stub, "--mypy-config-file", config]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=ROOT)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_types_are_final_and_immutable(kind):
    with pytest.raises(TypeError, match="not an acceptable base type"):
        type("Sub", (kind,), {})
    with pytest.raises(TypeError, match="cannot set 'answer' attribute of immutable type"):
        kind.answer = 42


def test_an_exchange_is_made_by_functions_only():
    with pytest.raises(TypeError, match="cannot create 'moeshard._core.Exchange' instances"):
        _core.Exchange()


@pytest.mark.parametrize(
    "thing", [_core.Batch(), _core.exchange_one(), experts(), _core.Tensor((2,), "float32")], ids=repr
)
def test_objects_with_memory_of_their_own_are_not_pickled(thing):
    with pytest.raises(TypeError, match="cannot pickle"):
        pickle.dumps(thing)


@pytest.mark.parametrize(
    ("name", "bases"),
    [
        ("MoeshardError", (Exception,)),
        ("ArgumentError", (_core.MoeshardError, ValueError)),
        ("ShapeError", (_core.MoeshardError, ValueError)),
        ("DTypeError", (_core.MoeshardError, TypeError)),
        ("RangeError", (_core.MoeshardError, ValueError)),
        ("CommError", (_core.MoeshardError, RuntimeError)),
        ("RankLost", (_core.CommError,)),
        ("CommTimeout", (_core.CommError,)),
        ("RankMismatch", (_core.CommError,)),
        ("PeerError", (_core.CommError,)),
        ("CudaError", (_core.MoeshardError, RuntimeError)),
    ],
)
def test_exceptions_are_what_their_names_say_and_travel(name, bases):
    error = getattr(_core, name)
    assert error.__bases__ == bases and error is getattr(moeshard, name)
    assert (error.__module__, error.__qualname__) == ("moeshard", name)
    sent = pickle.loads(pickle.dumps(error("rank 3: no")))
    assert type(sent) is error and str(sent) == "rank 3: no"


def second_copy():
    """The extension loaded once more: another module, with its own types and state."""
    loader = importlib.machinery.ExtensionFileLoader("moeshard._core", _core.__file__)
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("moeshard._core", loader))
    loader.exec_module(module)
    return module


def test_two_copies_of_the_module_do_not_mix():
    other = second_copy()
    assert other.Batch is not _core.Batch and other.ShapeError is not ShapeError
    before = _core.get_num_threads()
    other.set_num_threads(before + 1)
    assert (_core.get_num_threads(), other.get_num_threads()) == (before, before + 1)
    batch = other.Batch()
    with pytest.raises(TypeError, match="batch: expected moeshard._core.Batch"):
        _core.exchange_one().gather(batch)
    with pytest.raises(other.ShapeError):
        batch.route(normal(2), normal(2), normal(2), 1)
    hidden = other.Tensor((2, 2), "float32")
    assert _core.tensor_info(hidden) == ((2, 2), "float32", (1, 0), True)  # by DLPack, as any other library's
    del other, batch, hidden
    gc.collect()


def python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", f"from moeshard import _core\n{code}"],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
        env={**os.environ, **environment},
    )


@pytest.mark.parametrize("isa", _core.isa_available())
def test_an_instruction_set_can_be_forced(isa):
    assert python("print(_core.isa())", MOESHARD_ISA=isa).stdout.strip() == isa


def test_the_best_instruction_set_is_the_default():
    assert python("print(_core.isa())", MOESHARD_ISA="").stdout.strip() == _core.isa_available()[0]


def test_an_unknown_instruction_set_is_an_error():
    result = python("_core.isa()", MOESHARD_ISA="mmx")
    assert "moeshard.ArgumentError: MOESHARD_ISA=mmx: expected avx512bf16, avx512, avx2 or generic" in result.stderr


# ---- threads -----------------------------------------------------------------------------------------


def test_threads_are_at_first_the_cores_of_the_process():
    code = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
    result = subprocess.run(
        [sys.executable, "-c", code + "from moeshard import _core; print(_core.get_num_threads())"],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
    )
    assert result.stdout.strip() == "1"


def test_the_number_of_threads_can_be_set():
    with threads_put_back():
        for count in (3, 1, 2):
            _core.set_num_threads(count)
            assert _core.get_num_threads() == count


@pytest.mark.parametrize(
    ("count", "error", "message"),
    [
        pytest.param(0, ArgumentError, "threads: got 0, expected 1 to 4096", id="none"),
        pytest.param(-2, ArgumentError, "threads: got -2", id="negative"),
        pytest.param(4097, ArgumentError, "threads: got 4097", id="too-many"),
        pytest.param(2**40, ArgumentError, r"threads: got 1099511627776, expected less than 2\^31", id="2**40"),
        pytest.param("2", TypeError, "int", id="text"),
        pytest.param(2.0, TypeError, "int", id="float"),
    ],
)
def test_a_bad_number_of_threads_changes_nothing(count, error, message):
    before = _core.get_num_threads()
    with pytest.raises(error, match=message):
        _core.set_num_threads(count)
    assert _core.get_num_threads() == before


# ---- plans -------------------------------------------------------------------------------------------


def test_plans_are_int64_tables():
    for table in (
        _core.plan_shard(3, 5, 37),
        _core.plan_shard(3, 5, 37, [3, 2, 1]),
        _core.plan_expert_parallel(3, 5, 37),
        _core.plan_expert_parallel(3, 5, 37, owner=np.array([2, 2, 0, 1, 1], np.uint8)),
        _core.plan_hybrid(3, 5, 37, group=3),
    ):
        assert table.dtype == np.int64 and table.shape == (3, 5, 2) and table.flags.owndata
        assert (table[:, :, 1] - table[:, :, 0]).sum(0).tolist() == [37] * 5
        _core.plan_check(table, 37)
        _core.plan_check(table.tolist(), 37, [1] * 5)


def test_speed_cuts_in_proportion():
    assert _core.plan_shard(2, 1, 8, speed=[3, 1]).tolist() == [[[0, 6]], [[6, 8]]]


def test_copies_are_counted():
    table = [[[0, 8], [0, 4], [0, 0]], [[0, 8], [4, 8], [0, 0]]]
    _core.plan_check(table, 8, copies=[2, 1, 0])
    assert _core.plan_work(table, [10, 10, 10], [2, 1, 0]).tolist() == [80.0, 80.0]
    assert _core.plan_work(table, [10, 10, 10]).tolist() == [120.0, 120.0]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        pytest.param(
            lambda: _core.plan_shard(0, 1, 1), ArgumentError, "ranks: got 0, expected 1 to 1024", id="no-rank"
        ),
        pytest.param(lambda: _core.plan_shard(2000, 1, 1), ArgumentError, "ranks: got 2000", id="ranks"),
        pytest.param(
            lambda: _core.plan_shard(2**32 + 1, 1, 1), ArgumentError, "ranks: got 4294967297", id="ranks-wrap"
        ),
        pytest.param(
            lambda: _core.plan_shard(1, -1, 1), ArgumentError, "num_experts: got -1, expected 1", id="experts"
        ),
        pytest.param(lambda: _core.plan_shard(1, 1, 0), ArgumentError, "d_ff: got 0, expected at least 1", id="d_ff"),
        pytest.param(
            lambda: _core.plan_shard(2, 1, 1, [1]), ShapeError, r"speed: got \[1\], expected \[R=2\]", id="one-speed"
        ),
        pytest.param(lambda: _core.plan_shard(2, 1, 1, [1, 0]), ArgumentError, r"speed\[1\]: got 0", id="stopped"),
        pytest.param(lambda: _core.plan_shard(2, 1, 1, [1, np.nan]), ArgumentError, r"speed\[1\]: got nan", id="nan"),
        pytest.param(
            lambda: _core.plan_shard(2, 1, 1, ["a", "b"]), DTypeError, r"speed: expected numbers \[R=2\]: ", id="text"
        ),
        pytest.param(
            lambda: _core.plan_expert_parallel(2, 2, 1, [0]),
            ShapeError,
            r"owner: got \[1\], expected \[E=2\]",
            id="owners",
        ),
        pytest.param(
            lambda: _core.plan_expert_parallel(2, 1, 1, [2]),
            ArgumentError,
            r"owner\[0\]: got 2, expected 0 to 1",
            id="owner",
        ),
        pytest.param(
            lambda: _core.plan_expert_parallel(2, 1, 1, [0.5]),
            DTypeError,
            r"owner: expected integers \[E=1\]: ",
            id="half",
        ),
        pytest.param(
            lambda: _core.plan_expert_parallel(2, 1, 1, [2**40]),
            ArgumentError,
            "owner: got 1099511627776",
            id="owner-wrap",
        ),
        pytest.param(
            lambda: _core.plan_hybrid(4, 2, 8, 3),
            ArgumentError,
            "group: got 3, expected a divisor of ranks=4",
            id="group",
        ),
        pytest.param(lambda: _core.plan_hybrid(4, 2, 8, 0), ArgumentError, "group: got 0", id="no-group"),
        pytest.param(
            lambda: _core.plan_check([[0, 1]], 1),
            ShapeError,
            r"columns: got \[1, 2\], expected \[R, E, 2\]",
            id="2-dims",
        ),
        pytest.param(
            lambda: _core.plan_check(np.zeros((0, 1, 2), int), 1),
            ShapeError,
            r"columns: got \[0, 1, 2\]",
            id="no-ranks",
        ),
        pytest.param(
            lambda: _core.plan_check(np.zeros((1025, 1, 2), int), 1), ShapeError, "expected at most", id="1025-ranks"
        ),
        pytest.param(
            lambda: _core.plan_check([[[0.0, 1.0]]], 1),
            DTypeError,
            r"columns: expected integers \[R, E, 2\]: ",
            id="floats",
        ),
        pytest.param(
            lambda: _core.plan_check([[[0], [1, 2]]], 1), DTypeError, "columns: expected integers", id="ragged"
        ),
        pytest.param(lambda: _core.plan_check(None, 1), DTypeError, "columns: expected integers", id="none"),
        pytest.param(
            lambda: _core.plan_check([[[0, 1]]], 0), ArgumentError, "d_ff: got 0, expected at least 1", id="check-d_ff"
        ),
        pytest.param(
            lambda: _core.plan_check([[[0, 3]], [[2, 8]]], 8),
            ArgumentError,
            r"expert 0, columns \[2, 3\): held by 2 ranks, expected 1",
            id="twice",
        ),
        pytest.param(
            lambda: _core.plan_check([[[0, 3]], [[4, 8]]], 8),
            ArgumentError,
            r"expert 0, columns \[3, 4\): held by 0 ranks, expected 1",
            id="gap",
        ),
        pytest.param(
            lambda: _core.plan_check([[[0, 8]]], 8, [1, 1]),
            ShapeError,
            r"copies: got \[2\], expected \[E=1\]",
            id="copies",
        ),
        pytest.param(
            lambda: _core.plan_work([[[0, 8]]], [1, 2]), ShapeError, r"counts: got \[2\], expected \[E=1\]", id="counts"
        ),
    ],
)
def test_a_bad_plan_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_machine_limits_are_rates_that_this_cpu_can_have() -> None:
    flops, dot_flops, read = _core.measure_machine(0.0)
    assert 1e8 < flops < 1e15 and 1e8 < read < 1e14
    assert (dot_flops > 0) == (_core.isa() == "avx512bf16")


@pytest.mark.parametrize("seconds", [-1.0, 61.0, float("nan")])
def test_machine_limits_refuse_a_time_out_of_range(seconds: float) -> None:
    with pytest.raises(moeshard.ArgumentError, match="seconds: got"):
        _core.measure_machine(seconds)
