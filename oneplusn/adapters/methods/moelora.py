"""MOELoRA (arXiv 2310.18339, sections 3.2 and 3.3): every task mixes the same experts.

    g = softmax(W emb[t])  over all E experts
    y = W x + s * sum over e of g_e B_e (A_e x)

The gate is made from the task's number; the paper argues for that (section 3.3), since a gate
that reads the input would make another weight matrix for every sample.

The published code has two forms: one gate for the model, which its training script uses, and an
embedding and a gate inside every adapted linear. Both are here: `gate_scope: model` and `site`.

Deviations:

* `rank` is that of one expert; the paper's r is the rank of all together, r = E * rank. So the
  rank need not be a multiple of E, and ranks mean the same for every method.
* Its scale is alpha / r with the total r; set `alpha` for that. Unset, s is E, so that an expert
  starts with a factor of 1 as in CGC-LoRA (see there), and both can be compared at one rate.
* `site` has a gate for each group of linears that read the same x, not for each linear.
* A starts normal with 0.01, B at zero, as in the code; `init_std: null` gives LoRA's start.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from oneplusn.adapters.bundle import Expert
from oneplusn.adapters.methods.base import Gate, Method
from oneplusn.adapters.methods.settings import number, one_of, setting, whole
from oneplusn.adapters.methods.softmax import AllSoftmax
from oneplusn.adapters.validation import MAX_EXPERTS


@dataclass(frozen=True)
class MoeLora(Method):
    """MOELoRA over one cluster of tasks."""

    num_experts: int = setting(8, "E, experts that all tasks share", whole(1, MAX_EXPERTS))
    init_std: float | None = setting(
        0.01,
        "A starts normal with this standard deviation",
        number(0, 10).or_none("LoRA's uniform within 1 / sqrt(inputs)"),
    )
    gate_scope: Literal["site", "model"] = setting(
        "model", "one gate for the model, or gates for every site", one_of("site", "model")
    )
    embedding_dim: int = setting(64, "width of the task embedding", whole(1, 4096))

    name: ClassVar[str] = "moelora"
    summary: ClassVar[str] = "shared experts, mixed by a softmax made from the task's number"

    def experts(self) -> tuple[Expert, ...]:
        """Common experts only."""
        return tuple(
            Expert(f"expert-{i}", "common", None, self.rank) for i in range(self.num_experts)
        )

    def own_scales(self) -> Tensor:
        """E."""
        return torch.full((self.num_experts,), float(self.num_experts))

    def alpha_rank(self, expert: Expert) -> int:
        """The rank of all experts together, as in the paper's code."""
        return expert.rank * self.num_experts

    def shared(self) -> nn.Module | None:
        """Nothing: where a gate is made, there is its embedding."""
        return None

    def gate(self, shared: nn.Module | None) -> Gate:
        """An embedding of the tasks and a linear map on it."""
        del shared
        embedding = nn.Embedding(self.num_tasks, self.embedding_dim)
        return AllSoftmax(embedding, self.num_experts, owned=True)
