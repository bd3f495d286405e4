"""Two CPU processes: what is launched, what every rank holds afterwards, and what was sent between them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
LAUNCHED = TESTS / "launched"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
TWO_CPUS = {"distributed_type": "MULTI_GPU", "use_cpu": True, "num_processes": 2, "main_process_port": 0}
# bytes of the tiny BERT's trainable parameters in fp64, by step
SENT = [2584] * 2 + [20376] * 2 + [38168] * 2 + [55960] * 2 + [73752] * 2 + [146200] * 3
EXACT = ["plain", "finds_unused", "static_graph", "bucket_view", "small_buckets", "accumulated",
         "accumulated_bucket_view", "checkpointed", "checkpointed_reentrant", "checkpointed_static_graph",
         "compiled", "subgroup"]  # fmt: skip
LOSSY = ["fp16_hook", "bf16_hook", "powersgd_hook"]

pytestmark = pytest.mark.slow


def launch(launcher: list[str], script: Path | str, *arguments: str, timeout: int = 240) -> subprocess.CompletedProcess:
    """Run a script under a launcher; one thread for each process."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [*launcher, str(script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment)


def children(script: str, folder: Path, *scenarios: str, check: bool = True) -> list[dict]:
    """Launch a child on two processes and return what each rank wrote."""
    done = launch(TORCHRUN, LAUNCHED / f"{script}.py", str(folder / script), *scenarios)
    written = [json.loads((folder / f"{script}.{rank}.json").read_text()) for rank in range(2)]
    errors = [
        result["error"]
        for rank in written
        for result in rank.values()
        if isinstance(result, dict) and "error" in result
    ]
    assert not errors, errors[0]
    assert not check or done.returncode == 0, done.stderr[-3000:]
    assert [rank["world_size"] for rank in written] == [2, 2]
    return written


@pytest.fixture(scope="module")
def ddp(tmp_path_factory) -> dict:
    return children("ddp", tmp_path_factory.mktemp("ddp"))[0]


@pytest.mark.parametrize("scenario", EXACT)
def test_two_ranks_equal_one_process_and_send_what_trains(ddp, scenario):
    result = ddp[scenario]
    assert result["equal"]
    assert result["distance"] < 1e-12
    assert result["sent"] == result["trainable"] == SENT
    assert result["restored"], "after close() DDP reduces everything again"
    assert bool(result["bucket_view"]) is scenario.endswith("bucket_view")


@pytest.mark.parametrize("scenario", LOSSY)
def test_comm_hooks_stay_through_the_phases(ddp, scenario):
    result = ddp[scenario]
    assert result["equal"]
    assert 1e-6 < result["distance"] < 0.2, "compressed, and still the same training"
    assert result["sent"] == result["trainable"]


def test_builtin_comm_hook_stays(ddp):
    assert ddp["builtin_hook"]["hook"] == "BuiltinCommHookType.ALLREDUCE"
    assert ddp["builtin_hook"]["equal"] and ddp["builtin_hook"]["distance"] < 1e-12


def test_peft_sends_the_open_adapters_alone(ddp):
    result = ddp["peft"]
    assert result["equal"] and result["distance"] < 1e-12 and result["restored"]
    assert result["sent"] == result["trainable"]
    assert result["sent"][0] < result["sent"][-1] < SENT[-1] / 8


def test_the_wrapper_is_found_in_the_first_forward(ddp):
    result = ddp["found_in_the_forward"]
    assert result["equal"] and result["distance"] < 1e-12
    assert result["hooks"] == 0


@pytest.mark.parametrize("scenario", ["joined", "again"])
def test_ranks_stay_equal(ddp, scenario):
    assert ddp[scenario]["equal"]


def test_a_model_frozen_before_it_was_wrapped_is_refused(ddp):
    result = ddp["frozen_first"]
    for case in ("frozen", "opened", "never"):
        assert result[case].startswith("EnvironmentRefused: DDP reduces 68 of the 73 parameters that will train")
        assert "Wrap it before anything is frozen" in result[case]
    assert result["kept"] == "", "frozen for good is nobody's business"


def test_without_torchs_private_names_it_falls_back_or_names_the_cure(ddp):
    result = ddp["without_private_names"]
    assert result["equal"]
    assert len(result["warnings"]) == 1 and "sent too, as zeros" in result["warnings"][0]
    assert "ddp_find_unused_parameters=True" in result["refused"]


def test_ranks_that_disagree_all_raise_before_a_weight_moves(tmp_path):
    results = children("disagree", tmp_path, "schedule", "set", "step")[0]
    said = {
        "schedule": ["from step 2 all", "from step 2 block[3], head"],
        "set": ["at step 0 trains head", "at step 0 trains block[3]"],
        "step": ["at step 0 trains head", "at step 3 trains all"],
    }
    for scenario, both in said.items():
        for error in results[scenario]["errors"]:
            assert error.startswith("UnfreezeError: the ranks do not agree on what trains. ")
            assert all(f"'{words}'" in error for words in both)
        assert results[scenario]["moved"] == 0


@pytest.mark.parametrize(
    ("scenario", "message"),
    [
        ("apart", "UnfreezeError: rank 0, at step 2 trains all: of 2 ranks 1 came to a transition before the timeout"),
        ("late", "EnvironmentRefused: a phase begins after a rank has run out of data"),
    ],
)
def test_ranks_that_are_apart_end_with_an_error(tmp_path, scenario, message):
    first, second = children("disagree", tmp_path, scenario, check=False)
    assert first[scenario]["raised"].startswith(message)
    assert second[scenario]["raised"], "the other rank is not left waiting"
