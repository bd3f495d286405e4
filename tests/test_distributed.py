"""Two CPU processes: what is launched, what every rank holds afterwards, and what was sent between them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import shared
import torch
import trainer_runs

from hf_unfreeze import layer_groups, parse_schedule
from hf_unfreeze._scale import scale_rows
from hf_unfreeze._store import free_memory

LAUNCHED = Path(__file__).parent / "launched"
LAUNCH_FILES = Path(__file__).parent.parent / "recipes" / "launch"

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
# `accelerate launch` without the other commands of accelerate: one of them imports timm, where that is installed
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
TWO_CPUS = [*ACCELERATE, str(LAUNCH_FILES / "two_cpu_processes.yaml")]
# bytes of the tiny BERT's trainable parameters in fp64, by step
SENT = [2584] * 2 + [20376] * 2 + [38168] * 2 + [55960] * 2 + [73752] * 2 + [146200] * 3
EXACT = ["plain", "finds_unused", "static_graph", "bucket_view", "small_buckets", "accumulated",
         "accumulated_bucket_view", "checkpointed", "checkpointed_reentrant", "checkpointed_static_graph",
         "compiled", "compiled_inside", "subgroup"]  # fmt: skip
LOSSY = ["fp16_hook", "bf16_hook", "powersgd_hook"]

pytestmark = pytest.mark.slow
resumes = pytest.mark.skipif(not trainer_runs.RESUMES, reason="transformers 4 resumes on no two CPU processes")


def launch(launcher: list[str], script: Path | str, *arguments: str, timeout: int = 240) -> subprocess.CompletedProcess:
    """Run a script under a launcher; one thread for each process."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [*launcher, str(script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment)


def children(script: str, folder: Path, *scenarios: str, check: bool = True, launcher=TORCHRUN) -> list[dict]:
    """Launch a child on two processes and return what each rank wrote."""
    done = launch(launcher, LAUNCHED / f"{script}.py", str(folder / script), *scenarios)
    paths = [folder / f"{script}.{rank}.json" for rank in range(2)]
    assert all(path.exists() for path in paths), done.stderr[-3000:]
    written = [json.loads(path.read_text()) for path in paths]
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
    assert (result["buckets"][-1] > 1) is (scenario == "small_buckets")


def rows_on_paper(schedule: str, **options) -> dict:
    """What `hf-unfreeze plan --world-size 2` says of the launched model, by the last step of each phase."""
    model = shared.fp64_bert()
    groups = layer_groups(model)
    phases = parse_schedule(schedule).phases(groups)
    last = [phase.start - 1 for phase in phases[1:]] + [shared.STEPS - 1]
    rows = scale_rows(model, groups, [phase.trainable for phase in phases], 2, **options)
    return dict(zip(last, rows, strict=True))


def test_the_bytes_on_paper_are_those_that_two_ranks_reduced(ddp):
    for step, row in rows_on_paper(shared.SCHEDULE).items():
        assert row.reduced_bytes == ddp["plain"]["sent"][step]
        assert row.rank_gradient_bytes == ddp["plain"]["trainable"][step]


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


def test_ranks_that_train_alone_are_told_once(ddp):
    (warning,) = ddp["alone"]["warnings"]
    assert warning.startswith("2 processes, and no DDP or FSDP2") and "ACCELERATE_USE_CPU=true" in warning


@pytest.mark.parametrize("scenario", ["joined", "again"])
def test_ranks_stay_equal(ddp, scenario):
    assert ddp[scenario]["equal"]


def test_a_model_frozen_before_it_was_wrapped_is_refused(ddp):
    result = ddp["frozen_first"]
    for case in ("frozen", "opened", "never"):
        assert result[case].startswith("EnvironmentRefused: DDP reduces 68 of the 73 parameters that will train")
        assert "Wrap it before anything is frozen" in result[case]
    assert result["kept"] == "", "frozen for good is nobody's business"


def test_options_of_ddp_that_keep_a_list_of_parameters_are_refused(ddp):
    assert "mixed_precision in Accelerate's config" in ddp["refused_options"]["mixed_precision"]
    assert "delay_all_reduce_named_params, which gives frozen" in ddp["refused_options"]["delayed"]


def test_an_optimizer_that_divides_its_state_trains_and_is_refused_rates_for_groups(ddp):
    result = ddp["sharded_optimizer"]
    assert result["equal"] and result["distance"] < 1e-12
    assert result["refused"].startswith("OptimizerError: ZeroRedundancyOptimizer copies its param groups one by one")


def test_without_torchs_private_names_it_falls_back_or_names_the_cure(ddp):
    result = ddp["without_private_names"]
    assert result["equal"]
    assert len(result["warnings"]) == 1 and "sent too, as zeros" in result["warnings"][0]
    assert "ddp_find_unused_parameters=True" in result["refused"]


def test_ranks_with_other_metrics_and_other_gradients_decide_alike(tmp_path):
    result = children("evaluations", tmp_path)[0]
    for criterion in ("own", "fisher"):
        first, second = result["chosen"][criterion]
        assert first == second and result["chosen"][f"{criterion} equal"]
    assert result["chosen"]["own"][0][1][1] == ["block[1]", "head"], "5 + 5 is more than 9 + 0"
    for scenario in ("alike", "apart"):
        first, second = result[scenario]["phases"]
        assert first == second and result[scenario]["equal"], scenario
        assert [start for start, *_ in first] == [0, 4, 7, 9] and "going back to it" in first[-1][2]
    assert result["alike"]["phases"] == result["apart"]["phases"]
    assert result["resumed"] == result["apart"], "from the state that one rank has saved"


def test_ranks_that_disagree_all_raise_before_a_weight_moves(tmp_path):
    results = children("disagree", tmp_path, "schedule", "set", "step", "options", "sharded")[0]
    said = {
        "schedule": ["from step 2 all", "from step 2 block[3], head"],
        "set": ["at step 0 trains head", "at step 0 trains block[3]"],
        "step": ["at step 0 trains head", "at step 3 trains all"],
        "options": ["with layer_decay=0.9", "with no options"],
        "sharded": ["at step 0 trains head", "at step 0 trains block[3]"],
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


@pytest.fixture(scope="module")
def trainer(tmp_path_factory) -> tuple[dict, Path]:
    """The Trainer's runs on one process in here, then the same on two."""
    folder = tmp_path_factory.mktemp("trainer")
    for name, options in trainer_runs.RUNS.items():
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`gradient_checkpointing", FutureWarning)
            saved = {"save_strategy": "steps", "save_steps": 8} if name == "plain" else {}
            one = trainer_runs.make(folder / ("one" if name == "plain" else name), **saved, **options)
            one.train()
            torch.save(one.model.state_dict(), folder / f"{name}-one.pt")
    return children("trainer", folder, launcher=TWO_CPUS)[0], folder


def distance(folder: Path, name: str, other: str) -> float:
    mine, theirs = (torch.load(folder / f"{file}.pt") for file in (name, other))
    return max(float((mine[key] - theirs[key]).abs().max()) for key in theirs)


@pytest.mark.parametrize("name", trainer_runs.RUNS)
def test_the_trainer_on_two_ranks_equals_one_process(trainer, name):
    results, folder = trainer
    result = results[name]
    assert result["ranks"] == [2, 2] and result["wrapper"] == "DistributedDataParallel"
    assert [trainable for _, trainable in result["phases"]] == [
        "head", "block[3], head", "block[2:4], head", "all", "embeddings, block[1:4], head",
    ]  # fmt: skip
    assert result["equal"] and result["restored"]
    assert result["sent"] == result["trainable"] and len(set(result["sent"])) == 5
    assert distance(folder, name, f"{name}-one") < 1e-12


@pytest.mark.parametrize("name", trainer_runs.CACHES)
def test_two_ranks_with_a_cache_end_as_without(trainer, name):
    results, folder = trainer
    result = results[name]
    assert result["ranks"] == [2, 2] and result["off"] == ["", ""] and result["equal"]
    assert distance(folder, name, "plain") < 1e-10
    examples = 28
    if name == "in_memory":  # what the other has computed is not at hand
        assert all(examples / 2 < misses <= examples for misses in result["misses"])
        assert all(most == pytest.approx(free_memory() / 4 / 2, rel=0.5) for most in result["max_bytes"])
    else:  # nobody computes what the other has
        assert sum(result["misses"]) == (examples if name == "on_disk" else 0)
    assert all(hits > 0 for hits in result["hits"])


@resumes
@pytest.mark.parametrize("name", ["plain_resumed", "accumulated_resumed"])
def test_a_two_rank_run_resumed_at_any_step_ends_in_the_same_bits(trainer, name):
    assert trainer[0][name]["different"] == []


@resumes
def test_a_checkpoint_of_one_process_goes_on_with_two(trainer):
    results, folder = trainer
    assert results["from_one"]["equal"]
    assert distance(folder, "from_one", "plain-one") < 1e-12


@resumes
def test_a_run_goes_from_one_process_to_two_and_back_through_the_same_phases(trainer):
    results, folder = trainer
    one = trainer_runs.make(folder / "and_back")
    one.train(resume_from_checkpoint=str(folder / "from_one" / "checkpoint-16"))
    torch.save(one.model.state_dict(), folder / "and_back.pt")
    assert distance(folder, "and_back", "plain-one") < 1e-12
    phases = [(r["step"], r["unfreeze/trainable"]) for r in one.state.log_history if "unfreeze/phase" in r]
    assert [list(phase) for phase in phases] == results["plain"]["phases"]


@pytest.fixture(scope="module")
def fsdp(tmp_path_factory) -> dict:
    return children("fsdp", tmp_path_factory.mktemp("fsdp"))[0]


@pytest.mark.parametrize(
    "scenario", ["plain", "evaluated", "activations", "kept_whole", "mixed_precision", "offloaded"]
)
def test_fsdp2_equals_one_process_and_reduces_what_trains(fsdp, scenario):
    result = fsdp[scenario]
    low, high = (1e-6, 0.2) if scenario == "mixed_precision" else (0, 1e-12)
    assert low <= result["distance"] < high
    assert result["sent"] == result["trainable"] and len(set(result["sent"])) == 5
    assert result["restored"]


def test_the_bytes_on_paper_are_those_that_fsdp2_gathered_and_reduced(fsdp):
    rows = rows_on_paper(fsdp["plain"]["schedule"], sharded=True)
    assert len(rows) == 5
    for step, row in rows.items():
        assert row.reduced_bytes == fsdp["plain"]["sent"][step]
        assert row.gathered_bytes == fsdp["plain"]["gathered"][step]
        assert row.rank_weight_bytes == fsdp["plain"]["held"]


@pytest.mark.parametrize("scenario", ["sharded_state", "full_state"])
def test_fsdp2_resumes_in_every_phase_to_the_same_bits(fsdp, scenario):
    assert fsdp[scenario]["different"] == [[], []]
    assert fsdp[scenario]["kept"] == [4, 20, 36, 73, 73], "saving gives frozen parameters no state to carry on"


def test_fsdp1_is_refused_with_the_cure(fsdp):
    assert (
        fsdp["fsdp1"]["raised"].startswith("EnvironmentRefused: FSDP1") and "fsdp_version: 2" in fsdp["fsdp1"]["raised"]
    )


@pytest.fixture(scope="module")
def accelerated(tmp_path_factory) -> dict:
    return children("fsdp_accelerate", tmp_path_factory.mktemp("accelerated"))[0]


@resumes
@pytest.mark.parametrize("scenario", ["in_a_loop", "in_the_trainer"])
def test_fsdp2_of_accelerate_shards_resumes_to_the_same_bits_and_equals_ddp(accelerated, scenario):
    result = accelerated[scenario]
    assert result["units"] > 4, "each block and the root"
    assert result["different"] == [[], []]
    assert result["by_itself"] == "DistributedDataParallel", "accelerate shards on CPUs now: as_of_gpus() can go"
    assert result["distance"] < 1e-12
    assert scenario == "in_a_loop" or len(result["phases"]) == 5
