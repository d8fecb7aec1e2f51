# SPDX-License-Identifier: Apache-2.0
"""report: what was routed, who worked how much, in text, HTML, rich and JSON."""

import io
import json

import numpy as np
import pytest
from switch_models import batch, run, switch_model
from workers import on_ranks

import moeshard
from moeshard import Plan
from moeshard.tables import Tabular


def reported(group):
    model = moeshard.shard(switch_model(num_experts=8, expert_capacity=4), group=group, progress=False)
    inputs = batch(4, 12, seed=group.rank, padded=False)
    record = run(model, inputs)
    chosen = [np.bincount(c[c >= 0].numpy(), minlength=8).tolist() for c in record.chosen]
    dropped = [int((c < 0).sum()) for c in record.chosen]
    report = moeshard.report(model)
    return report.to_dict(), chosen, dropped, str(report), report._repr_html_()


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_report_counts_the_tokens_of_all_ranks(workers, ranks):
    results = [reported(moeshard.init("one"))] if ranks == 1 else on_ranks(workers, ranks, reported)
    for rank, (report, *_) in enumerate(results):
        assert (report["rank"], report["ranks"]) == (rank, ranks)
        for number, layer in enumerate(report["layers"]):
            histogram = np.sum([chosen[number] for _, chosen, *_ in results], axis=0)
            assert layer["histogram"] == histogram.tolist()
            assert layer["slots"] == ranks * 48
            assert layer["dropped"] == sum(dropped[number] for _, _, dropped, *_ in results) > 0
            expected = Plan.expert_parallel(ranks, 8, 37).share(histogram)
            np.testing.assert_allclose(layer["share_of_work_expert_parallel"], expected)
            assert np.ptp(layer["share_of_work"]) <= 1 / 37
        assert sum(report["share_of_work"]) == pytest.approx(1)
        json.dumps(report)


def test_report_prints_as_text_html_and_rich():
    from rich.console import Console

    *_, text, html = reported(moeshard.init("one"))
    assert "moeshard: 2 MoE layers on 1 rank" in text.splitlines()[0]
    assert "encoder.block.1.layer.1.mlp " in text and "expert parallel" in text
    assert html.count("<tr>") == 3 and "encoder.block.3.layer.1.mlp" in html and "<caption>" in html
    console = Console(record=True, width=200, file=io.StringIO())
    console.print(moeshard.report(moeshard.shard(switch_model(), progress=False)))
    assert "hottest expert" in console.export_text()


def test_report_before_the_first_token_is_empty_and_legal():
    report = moeshard.report(moeshard.shard(switch_model(), progress=False))
    assert report.to_dict()["share_of_work"] == [0.0]
    assert "none" in str(report)


def test_report_of_a_model_that_is_not_sharded_says_so():
    with pytest.raises(moeshard.ArgumentError, match="not sharded.*moeshard.shard"):
        moeshard.report(switch_model())


class Table(Tabular):
    """Two rows, or none."""

    columns = ("layer", "tokens", "of peak")

    def __init__(self, rows=()):
        self.rows = rows

    def title(self):
        return "more <than> none"

    def cells(self):
        return iter(self.rows)


def test_numbers_stand_to_the_right_and_html_is_escaped():
    table = Table([("<first>", "7", "-"), ("second", "1,234", "50%")])
    assert str(table).splitlines() == [
        "more <than> none",
        "layer    tokens  of peak",
        "<first>       7        -",
        "second    1,234      50%",
    ]
    html = table._repr_html_()
    assert "more &lt;than&gt; none" in html and "&lt;first&gt;" in html
    assert html.count("text-align: left") == 3 and html.count("text-align: right") == 6


def test_a_table_without_rows_has_its_heading():
    assert str(Table()).splitlines() == ["more <than> none", "layer  tokens  of peak"]
    assert Table()._repr_html_().count("<th ") == 3
