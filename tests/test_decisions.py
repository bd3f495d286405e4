"""Whatever decides, a run resumed at any step decides and ends the same, in one process and in two."""

from __future__ import annotations

import decision_runs
import pytest
from test_distributed import TWO_CPUS, children

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("spec", decision_runs.RUNS)
def test_a_run_resumed_at_any_step_decides_and_ends_the_same(tmp_path, spec):
    whole = decision_runs.outcome(decision_runs.train(tmp_path / "run", spec))
    assert len([r for r in whole[0] if "unfreeze/trainable" in r]) > 1
    for step in range(1, decision_runs.STEPS):
        again = decision_runs.train(tmp_path / "again", spec, tmp_path / "run" / f"checkpoint-{step}")
        assert decision_runs.outcome(again) == whole, step


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> dict:
    return children("decisions", tmp_path_factory.mktemp("decisions"), launcher=TWO_CPUS)[0]


@pytest.mark.parametrize("spec", decision_runs.RUNS)
def test_two_ranks_decide_alike_and_again_after_a_resume(two, spec):
    assert two[spec]["ranks"] == [2, 2]
    assert two[spec]["alike"] and two[spec]["different"] == []
    assert len(two[spec]["phases"]) > 1


def test_ranks_measure_on_other_data_and_agree_on_the_mean(two):
    (first, second), (agreed, other) = two["apart"]["mine"], two["apart"]["agreed"]
    assert agreed == other
    for name, value in agreed.items():
        assert first[name] != second[name] and value == pytest.approx((first[name] + second[name]) / 2, rel=1e-9)
