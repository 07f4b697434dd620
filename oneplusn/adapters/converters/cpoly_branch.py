"""Read what the authors' own code of C-Poly saves (arXiv 2312.03248; a branch of PEFT).

It is `peft_type: POLY` with a `poly_type`, S common skills and one specific skill per task:

    cpoly          w[j] = [ Poly's common weights | c_module_logits[j, :], raw ]
    cpoly_simple   w[j] = [ Poly's common weights | 1 for the task's own skill, 0 else ]
    delta_j = (1 / r) * (x A_j) B_j,  over S + J skills; specific weights are alike in all splits

The specific weights are used as they are: they may be negative or above 1, and do not count in the
sum to 1. The code mixes factors, though Eq. 1 of the paper sums outputs; what was trained by it is
read as it was trained. (The branch as published fails on more than one task, for want of an
expansion over the batch; whoever trained with it has repaired that, which this follows.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from oneplusn.adapters.bundle import Bundle
from oneplusn.adapters.converters.peft_poly import Take, common_weights, mixed, poly_fields
from oneplusn.adapters.converters.source import Source

SPECIFIC = "poly_router.c_module_logits"

LEARNED, FIXED = "cpoly", "cpoly_simple"
POLY_TYPES = (LEARNED, FIXED)


def read(source: Source) -> Bundle:
    """Convert what the branch saved into a bundle with one plain LoRA per task.

    Raises:
        AdapterInvalid: with a code that names the reason.
    """
    fields = poly_fields(source)
    num_tasks = fields.n_tasks
    is_learned = fields.poly_type == LEARNED

    def weights(take_part: Take) -> Tensor:
        common = common_weights(fields, take_part)
        specific = torch.eye(num_tasks)
        if is_learned:
            specific = take_part(SPECIFIC, (num_tasks, num_tasks)).float()
        spread = specific.unsqueeze(1).expand(-1, fields.n_splits, -1)
        return torch.cat([common, spread], dim=-1)

    return mixed(
        source,
        fields,
        weights,
        num_skills=fields.n_skills + num_tasks,
        method="c-poly",
        more_parts=(SPECIFIC,) if is_learned else (),
    )
