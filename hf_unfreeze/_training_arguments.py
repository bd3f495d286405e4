"""The arguments of UnfreezeCallback as a dataclass, for scripts that parse them."""

from __future__ import annotations

from dataclasses import dataclass, field

from .schedule import RECOMMENDED

__all__ = ["UnfreezeArguments"]


@dataclass
class UnfreezeArguments:
    """Arguments of UnfreezeCallback for ``HfArgumentParser``, beside ``TrainingArguments``.

    Example:
        >>> parser = HfArgumentParser((UnfreezeArguments, TrainingArguments))
        >>> unfreeze_args, training_args = parser.parse_args_into_dataclasses()
        >>> Trainer(..., args=training_args, callbacks=[UnfreezeCallback.from_arguments(unfreeze_args)])

    Each field means what the argument of that name means for ``UnfreezeCallback``; ``help`` tells it in short.
    """

    schedule: str | None = field(
        default=None,
        metadata={
            "help": "What trains when: 'head@0, block[-4:]@1ep, all@50%%' or a named schedule. Left out, "
            f"{RECOMMENDED.replace('%', '%%')} and, on a CPU, the cache in memory."
        },
    )
    layer_decay: str = field(
        default="1.0", metadata={"help": "Factor on the rate from each level to the one below it: 0.9, or 0.35->1.0."}
    )
    block_warmup: str | None = field(
        default=None, metadata={"help": "Time over which a newly opened group warms up: 50step, 0.1ep or 2%%."}
    )
    frozen_eval: bool = field(
        default=True, metadata={"help": "Run frozen modules in eval mode (no dropout, BatchNorm statistics at rest)."}
    )
    pull: float = field(
        default=0.0, metadata={"help": "Pull of opened weights back to the pretrained ones (L2-SP), e.g. 0.01."}
    )
    dropout: float = field(default=0.0, metadata={"help": "Least dropout probability of opened modules."})
    group_weight_decay: str | None = field(
        default=None, metadata={"help": "Weight decay of some groups: 'head=0.1, block[0:4]=0'."}
    )
    drop_state: bool = field(
        default=False, metadata={"help": "Forget the optimizer's state of what is frozen again, to free its memory."}
    )
    offload_state: bool = field(
        default=False, metadata={"help": "Keep the optimizer's state of what is frozen in main memory."}
    )
    reinitialize: str | None = field(
        default=None, metadata={"help": "Groups drawn anew before the first step: 'block[-2:]'."}
    )
    prefix_dtype: str | None = field(
        default=None,
        metadata={"help": "Compute the frozen blocks at the bottom in bfloat16 or float16: faster, and not exact."},
    )
    cache: str | None = field(
        default=None,
        metadata={"help": "Keep what frozen blocks compute for an example: memory, disk, disk:FOLDER or off."},
    )
