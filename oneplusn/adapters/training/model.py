"""A frozen base with the trainable experts and gates of one cluster beside its linears."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from oneplusn.adapters.bundle import Bundle, ModuleDelta
from oneplusn.adapters.methods.base import ExpertDelta, Method
from oneplusn.kernels.plan import SiteSpec

Hook = Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]


class ClusterModel(nn.Module):
    """The base plus one cluster under training.

    Owns the experts of every adapted linear and one gate module per site (siblings that read the
    same x share a gate). The base's parameters are frozen and are not part of this module's state.
    Sequences of one batch may belong to different tasks.
    """

    def __init__(self, base: PreTrainedModel, method: Method, sites: Sequence[SiteSpec]) -> None:
        """Freeze the base and hook the experts to its linears."""
        super().__init__()
        base.requires_grad_(requires_grad=False)
        self._base = [base]  # a list, so that the base's weights are not registered here
        self.method = method
        self.sites = tuple(sites)
        self.shared = method.shared()
        self.gates = [method.gate(self.shared) for _ in self.sites]
        self.deltas: list[ExpertDelta] = []
        self.module_paths: list[str] = []
        self._rows: list[Tensor] = []
        self._hooks = []
        scales = method.scales()
        for index, site in enumerate(self.sites):
            for path, width in zip(site.modules, site.slices, strict=True):
                delta = ExpertDelta(site.in_features, width, method.experts(), scales)
                self.deltas.append(delta)
                self.module_paths.append(path)
                linear = base.get_submodule(path)
                self._hooks.append(linear.register_forward_hook(self._adder(delta, index)))
        self._registered = nn.ModuleList([*self.gates, *self.deltas])

    def _adder(self, delta: ExpertDelta, site: int) -> Hook:
        def add(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            added: Tensor = delta(inputs[0], self._rows[site])
            return output + added.to(output.dtype)

        return add

    @property
    def base(self) -> PreTrainedModel:
        """The frozen base."""
        return self._base[0]

    def forward(
        self,
        input_ids: Tensor,
        task_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Any:  # noqa: ANN401 - the base's output class
        """Run the base with each sequence's own gate row.

        Args:
            input_ids: [B, T] int64.
            task_ids: [B] int64, index into the method's tasks.
            attention_mask: [B, T].
            labels: [B, T], -100 where there is no loss.

        Returns:
            The base's output; `.loss` when labels are given.
        """
        self._rows = [gate()[task_ids] for gate in self.gates]
        return self.base(input_ids=input_ids, attention_mask=attention_mask, labels=labels)

    def gate_parameters(self) -> list[nn.Parameter]:
        """The parameters that make gate rows, which learn at a rate of their own."""
        shared = [] if self.shared is None else list(self.shared.parameters())
        return [*shared, *(p for gate in self.gates for p in gate.parameters())]

    def expert_parameters(self) -> list[nn.Parameter]:
        """The factors A and B."""
        return [parameter for delta in self.deltas for parameter in delta.parameters()]

    def detach(self) -> None:
        """Take the hooks off the base."""
        for hook in self._hooks:
            hook.remove()

    @torch.no_grad()
    def bundle(self, *, base_fingerprint: str | None, dtype: torch.dtype) -> Bundle:
        """Return what the server loads: factors in `dtype`, one static gate row per task."""
        training = self.training
        self.eval()
        experts = self.method.experts()
        ranks = tuple(expert.rank for expert in experts)
        scales = self.method.scales()
        rows = {
            path: gate().clone()
            for site, gate in zip(self.sites, self.gates, strict=True)
            for path in site.modules
        }
        modules = {
            path: ModuleDelta(
                a=delta.a.detach().to(dtype),
                b=delta.b.detach().to(dtype),
                ranks=ranks,
                gate=rows[path],
                scale=scales.clone(),
            )
            for path, delta in zip(self.module_paths, self.deltas, strict=True)
        }
        self.train(training)
        return Bundle(
            method=self.method.name,
            tasks=self.method.tasks,
            experts=experts,
            modules=modules,
            base=base_fingerprint,
        )
