# SPDX-License-Identifier: Apache-2.0
"""The planner: layouts that win where they should, reasons, files, and messages that say what would do."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

import moeshard
from moeshard import ModelPlan, Plan
from moeshard.planner import Device, LayerShape, Link, ModelShape, machine, model_shape, simulate
from moeshard.planner.histograms import loads, skewed
from moeshard.planner.machines import CPU, PRESETS, Machine, calibration_file, load, save, this_machine
from moeshard.planner.maps import Point, best, draw, flip_map
from moeshard.planner.planning import KINDS, predict
from moeshard.planner.shapes import PRESETS as MODELS
from moeshard.planner.simulation import Disorder

LAYER = LayerShape("layer", 16, 64, 256)
GPUS = machine("h100")


def kind_of(layer):
    return next(other.kind for other in layer.alternatives if other.layout == layer.layout)


def widths(plan):
    return plan.columns[:, :, 1] - plan.columns[:, :, 0]


# ---- which layout wins ------------------------------------------------------------------------------------


def test_one_rank_has_nothing_to_choose():
    found = moeshard.plan("switch-base-8", ranks=1, tokens=100, devices=CPU).layers[0]
    assert found.plan == Plan.shard(1, 8, 3072)
    assert found.times.gather < 1e-3 and "One rank" in found.why


def test_skew_on_fast_links_is_cut_and_slow_links_keep_experts_whole():
    many = LayerShape("layer", 16, 64, 4096)
    fast = GPUS.with_links(inside=Link(0, 0, 1e15))
    slow = GPUS.with_links(inside=Link(0, 0, 1e8))
    cut = moeshard.plan(many, ranks=4, tokens=4000, histogram="0.9:0.05", devices=fast).layers[0]
    whole = moeshard.plan(many, ranks=4, tokens=4000, devices=slow).layers[0]
    assert kind_of(cut) in ("shard", "hot_sharded")
    assert widths(cut.plan)[:, 0].tolist() == [1024] * 4  # the hot expert
    assert kind_of(whole) in ("expert_parallel", "balanced")
    assert whole.times.sparse and not cut.times.sparse | (kind_of(cut) != "shard")


def test_balanced_owners_put_two_hot_experts_on_two_ranks():
    histogram = np.ones(8)
    histogram[:2] = 50
    slow = GPUS.with_links(inside=Link(0, 0, 1e7))
    layer = LayerShape("layer", 8, 512, 64)
    found = moeshard.plan(layer, ranks=2, tokens=4096, histogram=histogram, devices=slow, layout="balanced").layers[0]
    owners = widths(found.plan).argmax(axis=0)
    assert owners[0] != owners[1]
    assert found.plan.work(histogram.astype(int)).max() <= 1.1 * found.plan.work(histogram.astype(int)).min()


def test_ranks_of_different_speed_get_widths_by_speed():
    slow = replace(GPUS.devices[0], flops=GPUS.devices[0].flops / 2, bandwidth=GPUS.devices[0].bandwidth / 2)
    mixed = replace(machine([GPUS.devices[0], slow]), idle_rows=0.0, panel=1)
    found = moeshard.plan(LayerShape("layer", 8, 512, 3000), ranks=2, tokens=4096, devices=mixed, layout="uneven")
    first, second = widths(found.layers[0].plan)[:, 0]
    assert first / second == pytest.approx(2, rel=0.02)
    assert found.layers[0].ffn[0] == pytest.approx(found.layers[0].ffn[1], rel=0.02)


def test_memory_rules_out_what_does_not_fit():
    layer = LayerShape("layer", 4, 64, 256)
    histogram = [1, 1, 1, 97]
    small = replace(GPUS, devices=(replace(GPUS.devices[0], memory=0.52 * layer.weight_bytes),), copies=True)
    found = moeshard.plan(layer, ranks=2, tokens=1000, histogram=histogram, devices=small).layers[0]
    assert found.memory.max() <= 0.52 * layer.weight_bytes
    assert any(not other.fits for other in found.alternatives)


def test_tiny_layers_are_proven_best():
    slow = CPU.with_links(inside=Link(1e-3, 0, 1e6))
    found = moeshard.plan(LayerShape("layer", 4, 800, 4), ranks=3, tokens=500, histogram=[5, 3, 1, 1], devices=slow)
    assert found.layers[0].proven
    assert not moeshard.plan(LAYER, ranks=3, tokens=50, devices=CPU).layers[0].proven


@pytest.mark.parametrize("layout", KINDS[:-1])
def test_every_family_can_be_asked_for(layout):
    devices = replace(GPUS, copies=True, devices=(GPUS.devices[0],) * 3 + (replace(GPUS.devices[0], flops=1e13),))
    found = moeshard.plan(LAYER, ranks=4, tokens=500, histogram="0.6:0.1", devices=devices, layout=layout).layers[0]
    assert kind_of(found) == layout
    assert "asked for" in found.why
    times, each = predict(LAYER, found.plan, loads(model_shape(LAYER), "0.6:0.1", 2000)[0], np.full(4, 500.0), devices)
    assert times == found.times
    np.testing.assert_array_equal(each[1], found.memory)


def test_auto_is_never_slower_than_any_family_by_more_than_its_margin():
    rng = np.random.default_rng(0)
    for _ in range(12):
        ranks, tokens = int(rng.choice([2, 4, 6])), int(rng.choice([16, 300, 5000]))
        histogram = rng.random(16) ** 6 + 1e-3
        auto = moeshard.plan(LAYER, ranks=ranks, tokens=tokens, histogram=histogram, devices=CPU).seconds
        for layout in ("shard", "expert_parallel", "balanced", "hot_sharded", "hot_copied"):
            other = moeshard.plan(
                LAYER, ranks=ranks, tokens=tokens, histogram=histogram, devices=CPU, layout=layout
            ).seconds
            assert auto <= other * 1.031, layout


def test_cuda_engines_get_no_copies():
    found = moeshard.plan(LAYER, ranks=4, tokens=500, histogram="0.9:0.07", devices="h100")
    assert all(other.kind != "hot_copied" for other in found.layers[0].alternatives)
    with pytest.raises(moeshard.ArgumentError, match="no copies of experts are planned for .*h100"):
        moeshard.plan(LAYER, ranks=4, tokens=500, devices="h100", layout="hot_copied")
    simulated = simulate(LAYER, ranks=4, tokens=500, histogram="0.9:0.07", devices="h100", disorder=Disorder(steps=2))
    assert all("copy" not in run.layout for run in simulated.runs)
    tiny = moeshard.plan(LayerShape("layer", 3, 64, 4), ranks=3, tokens=500, histogram=[9, 1, 1], devices="h100")
    assert (tiny.layers[0].plan.copies == 1).all()


def test_hosts_move_the_choice_between_links():
    spread = moeshard.plan(LAYER, ranks=4, tokens=500, devices="h100", hosts=4, layout="shard").layers[0]
    together = moeshard.plan(LAYER, ranks=4, tokens=500, devices="h100", hosts=1, layout="shard").layers[0]
    assert spread.times.gather > together.times.gather


def test_equal_layers_are_planned_once_and_named():
    found = moeshard.plan("switch-base-128", ranks=4, tokens=30000, histogram="0.6:0.1", devices=CPU)
    assert [layer.name for layer in found.layers] == [f"encoder.block.{i}.layer.1.mlp" for i in range(1, 12, 2)]
    assert all(layer.plan is found.layers[0].plan for layer in found.layers)
    histogram = np.ones((6, 128))
    histogram[3, 0] = 1000
    uneven = moeshard.plan("switch-base-128", ranks=4, tokens=30000, histogram=histogram, devices=CPU)
    assert uneven.layers[3].times != uneven.layers[0].times


# ---- inputs ------------------------------------------------------------------------------------------------


def test_presets_are_the_models():
    assert {"switch-base-8", "switch-base-256", "switch-c-2048", "nllb-moe-54b", "nomic-embed-v2-moe"} <= set(MODELS)
    billions = {
        "switch-c-2048": 0.785e12,
        "nllb-moe-54b": 25.8e9,
        "privacy-filter": 1.26e9,
        "nomic-embed-v2-moe": 0.227e9,
    }
    for name, parameters in billions.items():  # of the encoder's experts
        shape = model_shape(name)
        found = sum(s.num_experts * s.matrices * s.d_model * s.d_ff for s in shape.layers)
        assert found == pytest.approx(parameters, rel=0.01), name


@pytest.mark.parametrize("name", ["switch-base-8", "nllb-moe-54b", "nomic-embed-v2-moe", "privacy-filter"])
def test_configs_give_the_presets(name):
    configs = {
        "switch-base-8": {
            "model_type": "switch_transformers", "num_layers": 12, "num_sparse_encoder_layers": 6,
            "encoder_sparse_step": 2, "num_experts": 8, "d_model": 768, "d_ff": 3072,
        },
        "nllb-moe-54b": {
            "model_type": "nllb-moe", "encoder_layers": 24, "encoder_sparse_step": 4, "num_experts": 128,
            "d_model": 2048, "encoder_ffn_dim": 8192, "torch_dtype": "float32",
        },
        "nomic-embed-v2-moe": {
            "model_type": "nomic_bert", "n_layer": 12, "moe_every_n_layers": 2, "num_experts": 8, "moe_top_k": 2,
            "n_embd": 768, "n_inner": 3072,
        },
        "privacy-filter": {
            "model_type": "openai_privacy_filter", "num_hidden_layers": 8, "num_local_experts": 128,
            "hidden_size": 640, "intermediate_size": 640, "num_experts_per_tok": 4, "dtype": "bfloat16",
        },
    }  # fmt: skip
    assert model_shape(configs[name]).layers == model_shape(name).layers


def test_histograms_come_in_many_forms():
    model = ModelShape("m", (LAYER, replace(LAYER, name="other")))
    table = np.arange(32).reshape(2, 16) + 1
    report = SimpleNamespace(
        layers=[SimpleNamespace(name=n, histogram=h) for n, h in zip(("layer", "other"), table, strict=True)]
    )
    for form in (table, table.tolist(), {"layer": table[0], "other": table[1]}, report):
        found = loads(model, form, 100)
        np.testing.assert_allclose(found, 100 * table / table.sum(axis=1, keepdims=True))
    np.testing.assert_allclose(loads(model, table[0], 100)[1], 100 * table[0] / table[0].sum())
    assert skewed(128, 0.6, 0.1)[:13].sum() == pytest.approx(0.6)
    assert loads(model, None, 160)[0].tolist() == [10.0] * 16


@pytest.mark.parametrize(
    ("request_", "error", "message"),
    [
        pytest.param({"ranks": 0}, moeshard.ArgumentError, "from 1 to 1024, got 0", id="ranks"),
        pytest.param({"ranks": 2.5}, moeshard.ArgumentError, "ranks.*2.5", id="fraction"),
        pytest.param({"tokens": -1}, moeshard.ArgumentError, "tokens.*-1", id="tokens"),
        pytest.param({"tokens": 0}, moeshard.ArgumentError, "at least one token", id="no-token"),
        pytest.param({"tokens": [1, 2, 3]}, moeshard.ShapeError, r"tokens.*\[2\].*\[3\]", id="tokens-of-others"),
        pytest.param({"histogram": np.ones(8)}, moeshard.ShapeError, r"'layer'.*\[16\].*\[8\]", id="histogram-of-8"),
        pytest.param({"histogram": np.ones((3, 16))}, moeshard.ShapeError, r"\[1 layers.*\[3, 16\]", id="three-layers"),
        pytest.param({"histogram": np.zeros(16)}, moeshard.ArgumentError, "all numbers are 0", id="nobody"),
        pytest.param({"histogram": [*[1] * 15, -1]}, moeshard.ArgumentError, "expert 15.*-1", id="negative"),
        pytest.param({"histogram": [*[1] * 15, math.nan]}, moeshard.ArgumentError, "expert 15.*nan", id="nan"),
        pytest.param({"histogram": {"l": [1]}}, moeshard.ArgumentError, "no layer 'layer', only l$", id="name"),
        pytest.param({"histogram": "0.6"}, moeshard.ArgumentError, "SHARE:PART", id="half-a-skew"),
        pytest.param({"histogram": "60:0.1"}, moeshard.ArgumentError, "0.6:0.1", id="percent"),
        pytest.param({"histogram": "words"}, moeshard.ArgumentError, "SHARE:PART", id="words"),
        pytest.param({"devices": "h9000"}, moeshard.ArgumentError, "'h9000'.*h100", id="device"),
        pytest.param({"devices": ["h100"]}, moeshard.ArgumentError, None, id="one-device"),
        pytest.param({"devices": ["cpu", "cpu"]}, moeshard.ArgumentError, "cores", id="cores-in-a-list"),
        pytest.param({"devices": ["h100"] * 3}, moeshard.ArgumentError, "each of 2 ranks, got 3", id="three-devices"),
        pytest.param({"hosts": 3}, moeshard.ArgumentError, "hosts.*ranks=2.*3", id="hosts"),
        pytest.param({"layout": "tensor"}, moeshard.ArgumentError, "layout.*auto.*'tensor'", id="layout"),
        pytest.param({"layout": "uneven"}, moeshard.ArgumentError, "'uneven' is not there for 2 ranks", id="alike"),
    ],
)
def test_bad_requests_name_what_is_wrong(request_, error, message):
    request = {"ranks": 2, "tokens": 10, "devices": CPU} | request_
    if message is None:  # one entry serves all ranks
        assert moeshard.plan(LAYER, **request).ranks == 2
        return
    with pytest.raises(error, match=message):
        moeshard.plan(LAYER, **request)


def test_a_token_cannot_choose_an_expert_twice():
    with pytest.raises(moeshard.ArgumentError, match="top_k=2 at most 50%"):
        moeshard.plan(replace(LAYER, top_k=2), ranks=2, tokens=10, histogram=[*[1] * 15, 85], devices=CPU)


def test_too_little_memory_says_what_would_do():
    with pytest.raises(moeshard.RangeError) as caught:
        moeshard.plan("switch-base-128", ranks=2, tokens=10, devices=replace(GPUS, devices=(device_of(3e9),)))
    text = str(caught.value)
    assert "13.5 GiB" in text and "5.59 GiB" in text  # of experts, of both ranks
    needed = int(text.partition("ranks=")[2].split()[0])
    fits = replace(GPUS, devices=(device_of(3e9),))
    assert moeshard.plan("switch-base-128", ranks=needed, tokens=10, devices=fits).ranks == needed
    with pytest.raises(moeshard.RangeError):
        moeshard.plan("switch-base-128", ranks=needed - 1, tokens=10, devices=fits)
    with pytest.raises(moeshard.RangeError, match="hosts=3 of this size"):
        moeshard.plan("switch-base-128", ranks=6, tokens=10, devices=replace(CPU, devices=(device_of(6e9),)))
    with pytest.raises(moeshard.RangeError, match="dtype=bfloat16"):
        moeshard.plan("switch-base-128", ranks=2, tokens=10, devices=replace(GPUS, devices=(device_of(4e9),)))


def device_of(memory):
    return replace(GPUS.devices[0], memory=memory)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        pytest.param("gpt-5", "no preset 'gpt-5'.*switch-base-8", id="preset"),
        pytest.param({"model_type": "bert"}, "'bert'.*switch_transformers", id="bert"),
        pytest.param({"model_type": "nllb-moe"}, "no 'encoder_sparse_step'", id="half-a-config"),
        pytest.param(3, "got int", id="number"),
        pytest.param([LAYER, LAYER], "all different", id="twice"),
    ],
)
def test_bad_models_are_named(model, message):
    with pytest.raises(moeshard.ArgumentError, match=message):
        model_shape(model)


@pytest.mark.parametrize(
    ("field", "value"), [("num_experts", 0), ("d_ff", -1), ("top_k", 17), ("dtype", "float64"), ("d_model", 2.0)]
)
def test_bad_layers_are_named(field, value):
    with pytest.raises(moeshard.ArgumentError, match=field):
        replace(LAYER, **{field: value})


# ---- what comes out ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found():
    histogram = np.ones((2, 16))
    histogram[1, 3] = 40
    model = ModelShape("m", (LAYER, replace(LAYER, name="encoder.other")))
    return moeshard.plan(model, ranks=4, tokens=[5, 0, 70, 9], histogram=histogram, devices=CPU)


def test_a_plan_prints_as_table_html_and_rich(found):
    text = str(found)
    assert text.startswith("moeshard plan: m, 4 ranks") and "route" in text and "encoder.other" in text
    assert all(layer.why in " ".join(text.split()) for layer in found.layers)
    assert "<table>" in found._repr_html_() and "<p>layer: " in found._repr_html_()
    assert "chosen" in found.alternatives()
    assert repr(found) == "ModelPlan(m, ranks=4, layers=2)"


def test_a_plan_survives_json(found, tmp_path):
    found.save(tmp_path / "plan.json")
    again = ModelPlan.load(tmp_path / "plan.json")
    assert again.to_dict() == found.to_dict()
    for ours, theirs in zip(found.layers, again.layers, strict=True):
        assert ours.plan == theirs.plan and ours.times == theirs.times and ours.alternatives == theirs.alternatives
    assert str(again) == str(found)


def test_files_that_are_no_plans_say_so(found, tmp_path):
    good = found.to_dict()
    table = dict(good["tables"][0], columns="AAAA")
    for bad, message in (
        ("{", "JSON"),
        ("[]", "no format"),
        (json.dumps({"format": "moeshard plan", "version": 99}), "version 99"),
        (json.dumps({"format": "moeshard plan", "version": 1}), "KeyError"),
        (json.dumps({**good, "tables": [table]}), "not a plan"),
        (json.dumps({**good, "layers": [{**good["layers"][0], "table": 7}]}), "IndexError"),
    ):
        with pytest.raises(moeshard.ArgumentError, match=message):
            ModelPlan.from_json(bad)
    shifted = {**good["tables"][0], "d_ff": 255}
    with pytest.raises(moeshard.ArgumentError):
        ModelPlan.from_json(json.dumps({**good, "tables": [shifted, *good["tables"][1:]]}))


def test_layers_are_found_by_name(found):
    assert found.for_layer("encoder.other") is found.layers[1].plan
    assert found.for_layer("model.encoder.other") is found.layers[1].plan
    assert found.for_layer("other") is found.layers[1].plan
    with pytest.raises(moeshard.ArgumentError, match="no layer 'third', only layer, encoder.other"):
        found.for_layer("third")
    with pytest.raises(moeshard.ArgumentError, match="the model has no layer; it has encoder.other"):
        found.check_layers(["encoder.other"])
    found.check_layers(["model.layer", "model.encoder.other"])


def test_planning_needs_no_torch():
    code = (
        "import sys, moeshard; str(moeshard.plan('switch-base-8', ranks=2, tokens=9, devices='cpu'));"
        "sys.exit(any(name in sys.modules for name in ('torch', 'matplotlib', 'rich')))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


# ---- machines ------------------------------------------------------------------------------------------------


def test_presets_name_their_sources():
    for name in PRESETS:
        found = machine(name)
        assert found.devices[0].source and found.source, name


def test_a_calibration_comes_back(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert calibration_file() == tmp_path / "moeshard" / "machine.json"
    assert "not calibrated" in this_machine().source
    ours = replace(CPU, name="ours", cores=len(__import__("os").sched_getaffinity(0)))
    save(ours, calibration_file())
    assert machine() == ours == load(calibration_file())[0]
    assert machine(str(calibration_file())) == ours
    document = json.loads(calibration_file().read_text())
    calibration_file().write_text(json.dumps({**document, "cpu": "abacus"}))
    assert "calibrated for abacus" in this_machine().source
    for bad, message in (("{", "JSON"), ("{}", "not a file"), (json.dumps({**document, "version": 2}), "version 2")):
        calibration_file().write_text(bad)
        assert message in this_machine().source  # planning goes on with the preset
        with pytest.raises(moeshard.ArgumentError, match=message):
            load(calibration_file())


def test_machines_survive_a_dict():
    for name in PRESETS:
        assert Machine.from_dict(json.loads(json.dumps(machine(name).to_dict()))) == machine(name)


@pytest.mark.parametrize("field", ["flops", "bandwidth", "memory"])
def test_devices_must_be_able_to_do_something(field):
    with pytest.raises(moeshard.ArgumentError, match=field):
        replace(Device("d", 1.0, 1.0, 1.0, 1.0), **{field: 0.0})


def test_ranks_of_a_host_share_its_cores():
    two = CPU.arrays(2, "float32", np.full(2, math.inf))
    four = CPU.arrays(4, "float32", np.full(4, math.inf))
    assert (two[0] == 2 * four[0][0]).all()
    assert CPU.memory(4).sum() == pytest.approx(CPU.devices[0].memory)


# ---- on paper ------------------------------------------------------------------------------------------------


def test_drift_does_not_hurt_shard_but_hurts_owners_chosen_for_one_histogram():
    request = {"ranks": 4, "tokens": 4000, "histogram": "0.6:0.1", "devices": replace(CPU, cores=8)}
    steady = simulate(LAYER, **request, disorder=Disorder(steps=30))
    moving = simulate(LAYER, **request, disorder=Disorder(steps=30, drift=True))
    mean = [{run.layout: run.seconds.mean() for run in s.runs} for s in (steady, moving)]
    assert mean[1]["shard"] == pytest.approx(mean[0]["shard"], rel=0.05)
    assert mean[1]["expert parallel, balanced"] > mean[0]["expert parallel, balanced"]
    assert "change with every step" in str(moving) and "p99" in str(moving)


def test_a_thousand_ranks_and_two_thousand_experts_can_be_simulated():
    layer = LayerShape("layer", 2048, 2080, 6144, dtype="bfloat16")
    found = simulate(layer, ranks=1024, tokens=1024, devices="h100", disorder=Disorder(steps=2))
    assert len(found.runs) >= 3
    assert all(np.isfinite(run.seconds).all() and (run.seconds > 0).all() for run in found.runs)


def test_bad_disorder_is_named():
    with pytest.raises(moeshard.ArgumentError, match="slow_chance"):
        simulate(LAYER, ranks=2, tokens=10, devices=CPU, disorder=Disorder(slow_chance=2))


def test_the_map_flips_and_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    layer = LayerShape("layer", 16, 256, 1024)
    panels = flip_map(layer, machine("h100"), Point(ranks=16, tokens=1024, top_k=1, skew=0.6))
    kinds = {cell.kind for panel in panels for row in panel.cells for cell in row if cell}
    assert "shard" in kinds and len(kinds) > 1
    draw(panels, "title", tmp_path / "map.png")
    assert (tmp_path / "map.png").stat().st_size > 10_000
    assert best(layer, machine("h100"), Point(2, 64, 8, 0.9)) is None  # a token would choose the hot experts twice
    moeshard.plan(layer, ranks=4, tokens=64, devices=CPU).plot(tmp_path / "plan.png")
    assert (tmp_path / "plan.png").stat().st_size > 5_000


# ---- the command ---------------------------------------------------------------------------------------------


def test_the_command_of_the_issue(capsys, monkeypatch, tmp_path):
    from moeshard.cli import main

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    words = "plan --preset switch-base-128 --ranks 4 --tokens 30000 --skew 0.6:0.1 --all --simulate --steps 3".split()
    assert main([*words, "--json", str(tmp_path / "p.json")]) == 0
    said = capsys.readouterr().out
    assert "switch-base-128, 4 ranks" in said and "layouts considered" in said and "moeshard simulation" in said
    assert ModelPlan.load(tmp_path / "p.json").ranks == 4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--layer 8,64", "E,D,F,K"),
        ("--layer 8,64,256,1 --preset switch-base-8", "expected one of"),
        ("--gated", "--gated"),
        ("--ranks 0", "ranks"),
        ("--skew 1", "SHARE:PART"),
        ("--straggler 1 --simulate", "--straggler"),
        ("--histogram counts.txt", ".npy, .json or .npz"),
        ("--config /no/such/file", "No such file"),
    ],
)
def test_bad_commands_fail_with_a_line(words, message, capsys):
    from moeshard.cli import main

    assert main(["plan", *words.split()]) == 1
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def test_the_command_reads_layers_configs_and_histograms(capsys, tmp_path):
    from moeshard.cli import main

    np.save(tmp_path / "h.npy", np.arange(1, 9))
    (tmp_path / "c.json").write_text(
        json.dumps({"model_type": "nomic_bert", "n_layer": 4, "moe_every_n_layers": 2, "num_experts": 8,
                    "moe_top_k": 2, "n_embd": 64, "n_inner": 128})
    )  # fmt: skip
    assert main(["plan", "--config", str(tmp_path / "c.json"), "--histogram", str(tmp_path / "h.npy")]) == 0
    assert main("plan --layer 8,64,128,2 --gated --dtype int8 --devices a100 --ranks 16 --hosts 2".split()) == 0
    assert "2 hosts" in capsys.readouterr().out
