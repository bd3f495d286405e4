"""DDP in every configuration: two ranks against one process on the same global batch, and the bytes they send."""

from __future__ import annotations

import copy
import warnings
from functools import partial

import peft
import torch
import torch.distributed as dist
from shared import (
    SCHEDULE,
    batch,
    distance,
    end,
    fp64_bert,
    message,
    ranks_equal,
    run,
    start,
    train,
)
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parallel.distributed import _MixedPrecision

from hf_unfreeze import Unfreezer

rank, world = start()


def counting(inner) -> tuple:
    """A comm hook of the user's own, and the bytes of every bucket it saw."""
    sent: list[int] = []

    def counted(state, bucket):
        sent.append(bucket.buffer().nbytes)
        return inner(state, bucket)

    return counted, sent


def compare(
    schedule=SCHEDULE,
    micros=1,
    checkpointing=None,
    prepare=lambda model: model,
    compiled=False,
    inside=False,
    hook=default_hooks.allreduce_hook,
    state=None,
    builtin=None,
    **options,
) -> dict:
    """Train with and without DDP from the same weights, and tell what differs."""
    whole = prepare(fp64_bert())
    if checkpointing is not None:
        name = next(
            n for n in ("activation_checkpointing_enable", "gradient_checkpointing_enable") if hasattr(whole, n)
        )
        getattr(whole, name)({"use_reentrant": checkpointing})
    whole.train()
    model = copy.deepcopy(whole)
    optimizer = torch.optim.AdamW(whole.parameters(), lr=1e-2)
    train(whole, Unfreezer(whole, optimizer, schedule, layer_decay=0.9), optimizer, micros=micros)

    ddp = DistributedDataParallel(torch.compile(model, backend="eager") if inside else model, **options)
    counted, sent = counting(hook)
    if builtin is None:
        ddp.register_comm_hook(state, counted)
    else:
        ddp._register_builtin_comm_hook(builtin)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    wrapped = torch.compile(ddp, backend="eager") if compiled else ddp
    unfreezer = Unfreezer(wrapped, optimizer, schedule, layer_decay=0.9)
    trainable: list[int] = []
    bytes_of_step: list[int] = []
    buckets: list[int] = []

    def after(step: int) -> None:
        bytes_of_step.append(sum(sent))
        buckets.append(len(sent))
        sent.clear()
        trainable.append(sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad))

    train(wrapped, unfreezer, optimizer, rank, micros=micros, after=after)
    data = ddp._get_ddp_logging_data()
    result = {
        "equal": ranks_equal(model), "distance": distance(model, whole), "sent": bytes_of_step, "trainable": trainable,
        "hook": data.get("comm_hook"), "bucket_view": data["gradient_as_bucket_view"], "buckets": buckets,
    }  # fmt: skip
    unfreezer.close()
    held = ddp._get_ddp_logging_data()["num_parameter_tensors"]
    return {**result, "restored": held == sum(p.requires_grad for p in ddp.parameters())}


def lora(model):
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["query", "value"], task_type="SEQ_CLS"))


def power() -> powerSGD_hook.PowerSGDState:
    return powerSGD_hook.PowerSGDState(None, start_powerSGD_iter=2, min_compression_rate=1)


def found_in_the_forward() -> dict:
    """Unfreezer is given the bare model before DDP wraps it."""
    model = fp64_bert().train()
    whole = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(whole.parameters(), lr=1e-2)
    train(whole, Unfreezer(whole, optimizer, SCHEDULE), optimizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    unfreezer = Unfreezer(model, optimizer, SCHEDULE)
    train(DistributedDataParallel(model), unfreezer, optimizer, rank)
    return {"equal": ranks_equal(model), "distance": distance(model, whole), "hooks": len(model._forward_pre_hooks)}


def alone() -> dict:
    """Launched on two processes, and not wrapped."""
    model = fp64_bert().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(model, Unfreezer(model, optimizer, SCHEDULE), optimizer, rank)
    return {"warnings": [str(warning.message) for warning in caught]}


def joined() -> dict:
    """Rank 1 has fewer batches; the last phase begins before it runs out."""
    model = fp64_bert().train()
    ddp = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    unfreezer = Unfreezer(ddp, optimizer, "head@0, block[-2:]@3step")
    with ddp.join():
        train(ddp, unfreezer, optimizer, rank, range(6 - rank))
    return {"equal": ranks_equal(model)}


def frozen_first() -> dict:
    model = fp64_bert()
    optimizer = torch.optim.AdamW(model.parameters())
    model.bert.embeddings.requires_grad_(False)
    ddp = DistributedDataParallel(model)
    frozen = message(lambda: Unfreezer(ddp, optimizer, SCHEDULE))
    model.requires_grad_(True)
    opened = message(lambda: Unfreezer(ddp, optimizer, SCHEDULE))
    never = message(lambda: Unfreezer(ddp, optimizer, "head@0, block[-1]@2step"))
    model.bert.embeddings.requires_grad_(False)
    return {"frozen": frozen, "opened": opened, "never": never,
            "kept": message(lambda: Unfreezer(ddp, optimizer, "head@0, block[-1]@2step").close())}  # fmt: skip


def again() -> dict:
    """A second run on the same wrapper, and one of DDP alone after it."""
    model = fp64_bert().train()
    ddp = DistributedDataParallel(model)
    equal = []
    for schedule in (SCHEDULE, SCHEDULE, None):
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        if schedule is None:
            for step in range(3):
                ddp(**batch(step, rank=rank)).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        else:
            unfreezer = Unfreezer(ddp, optimizer, schedule)
            train(ddp, unfreezer, optimizer, rank)
            unfreezer.close()
        equal.append(ranks_equal(model))
    return {"equal": all(equal)}


def refused_options() -> dict:
    """Options under which DDP keeps a list of parameters of its own."""
    late = fp64_bert()
    wrapped = {
        "mixed_precision": DistributedDataParallel(fp64_bert(), mixed_precision=_MixedPrecision(torch.float32)),
        "delayed": DistributedDataParallel(
            late, delay_all_reduce_named_params=[("classifier.weight", late.classifier.weight)],
            param_to_hook_all_reduce=late.classifier.bias,
        ),
    }  # fmt: skip
    return {
        name: message(lambda ddp=ddp: Unfreezer(ddp, torch.optim.SGD(ddp.parameters(), lr=1e-2), SCHEDULE))
        for name, ddp in wrapped.items()
    }


def sharded_optimizer() -> dict:
    """torch's optimizer that divides its state among the ranks, beside one process; and with rates for groups."""
    whole = fp64_bert().train()
    optimizer = torch.optim.AdamW(whole.parameters(), lr=1e-2)
    train(whole, Unfreezer(whole, optimizer, SCHEDULE), optimizer)
    model = fp64_bert().train()
    ddp = DistributedDataParallel(model)
    optimizer = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=torch.optim.AdamW, lr=1e-2)
    unfreezer = Unfreezer(ddp, optimizer, SCHEDULE)
    train(ddp, unfreezer, optimizer, rank)
    unfreezer.close()
    result = {"equal": ranks_equal(model), "distance": distance(model, whole)}
    unfreezer = Unfreezer(ddp, optimizer, SCHEDULE, layer_decay=0.9)
    return {**result, "refused": message(lambda: train(ddp, unfreezer, optimizer, rank))}


def without_private_names() -> dict:
    """A release of torch in which the reducer cannot be rebuilt."""
    wrapped = {key: DistributedDataParallel(fp64_bert().train(), find_unused_parameters=key == "finds")
               for key in ("finds", "does not")}  # fmt: skip
    private = DistributedDataParallel._build_params_for_reducer
    del DistributedDataParallel._build_params_for_reducer
    try:
        model = wrapped["finds"].module
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            unfreezer = Unfreezer(wrapped["finds"], optimizer, SCHEDULE)
            train(wrapped["finds"], unfreezer, optimizer, rank)
            unfreezer.close()
        other = torch.optim.AdamW(wrapped["does not"].parameters())
        refused = message(lambda: Unfreezer(wrapped["does not"], other, SCHEDULE))
    finally:
        DistributedDataParallel._build_params_for_reducer = private
    return {"equal": ranks_equal(model), "warnings": [str(w.message) for w in caught], "refused": refused}


SCENARIOS = {
    "plain": compare,
    "finds_unused": partial(compare, find_unused_parameters=True),
    "static_graph": partial(compare, static_graph=True),
    "bucket_view": partial(compare, gradient_as_bucket_view=True),
    "small_buckets": partial(compare, bucket_cap_mb=0.01),
    "accumulated": partial(compare, micros=3),
    "accumulated_bucket_view": partial(compare, micros=3, gradient_as_bucket_view=True, static_graph=False),
    "checkpointed": partial(compare, checkpointing=False),
    "checkpointed_reentrant": partial(compare, checkpointing=True),
    "checkpointed_static_graph": partial(compare, checkpointing=True, static_graph=True),
    "compiled": partial(compare, compiled=True),
    "compiled_inside": partial(compare, inside=True),
    "peft": partial(compare, prepare=lora),
    "subgroup": lambda: compare(process_group=dist.new_group([0, 1])),
    "fp16_hook": partial(compare, hook=default_hooks.fp16_compress_hook),
    "bf16_hook": partial(compare, hook=default_hooks.bf16_compress_hook),
    "powersgd_hook": lambda: compare("head@0, all@6step", hook=powerSGD_hook.powerSGD_hook, state=power()),
    "builtin_hook": partial(compare, builtin=dist.BuiltinCommHookType.ALLREDUCE),
    "found_in_the_forward": found_in_the_forward,
    "alone": alone,
    "joined": joined,
    "frozen_first": frozen_first,
    "again": again,
    "refused_options": refused_options,
    "sharded_optimizer": sharded_optimizer,
    "without_private_names": without_private_names,
}

run(SCENARIOS)
end()
