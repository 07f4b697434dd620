"""How the processes of a training were started, and which ways a cluster cannot be trained."""

from __future__ import annotations

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, parse_flag_from_env

from oneplusn.errors import InvalidRequest

SHARDING = {
    "FSDP": "ACCELERATE_USE_FSDP",
    "DeepSpeed": "ACCELERATE_USE_DEEPSPEED",
    "Megatron-LM": "ACCELERATE_USE_MEGATRON_LM",
}
"""Ways of `accelerate launch` to share out a model -> the variable that asks for it."""


def check_launch() -> None:
    """Refuse forms of distribution that would train something else, or end without an adapter.

    What shards a model writes checkpoints of all its parameters, in forms of its own; those of a
    cluster leave out the frozen base. Several GPUs in one process mean torch's DataParallel, and
    the hooks of its copies look for their gate rows at the model that was copied, where there are
    none.

    Raises:
        InvalidRequest: a sharded model, or one process with several GPUs.
    """
    for name, variable in SHARDING.items():
        if parse_flag_from_env(variable):
            raise InvalidRequest(
                f"{name} cannot checkpoint experts and gates without the frozen base; launch"
                " without it for a whole base in every process, and save memory with dtype:"
                " bfloat16, training.gradient_checkpointing and training.accumulate"
            )
    gpus = torch.cuda.device_count()
    alone = PartialState(cpu=not torch.cuda.is_available()).distributed_type == DistributedType.NO
    if alone and gpus > 1:
        raise InvalidRequest(
            f"one process sees {gpus} GPUs, and the copies that DataParallel makes of a model do"
            " not know the tasks of their rows; start a process for each"
            f" (accelerate launch --num-processes {gpus} -m oneplusn.cli train ...),"
            " or leave one visible (CUDA_VISIBLE_DEVICES=0)"
        )
