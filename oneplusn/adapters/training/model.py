"""A frozen base with the trainable experts and gates of one cluster beside its linears."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from oneplusn.adapters.bundle import Bundle
from oneplusn.adapters.checks import shown
from oneplusn.adapters.methods.base import Delta, ExpertDelta, Gate, Method
from oneplusn.errors import InvalidRequest
from oneplusn.kernels.plan import SiteSpec

Hook = Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]

GATE_ERROR = 1e-4
"""How far gate rows may be from those of a bundle that was loaded."""


class ClusterModel(nn.Module):
    """The base plus one cluster under training.

    Holds the experts of every adapted linear, and one gate module per site (siblings that read
    the same x share a gate) or one for the model. The base is frozen. It is a submodule, so that
    it moves and is sharded with the rest, but its weights are no part of `state_dict`.

    Sequences of one batch, and tokens of one packed sequence, may belong to different tasks: gate
    rows are made once per forward, and every linear multiplies all rows with all experts.

    Attributes:
        base: the frozen base; called by itself, it computes what it did without the cluster.
        method: what the experts and gates are.
        sites: where they are.
        shared: what the gates share, or None.
        gates: one per site, or one.
        deltas: one per linear, in the order of `module_paths`.
        module_paths: paths of the adapted linears.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        method: Method,
        sites: Sequence[SiteSpec],
        *,
        dropout: float | None = None,
    ) -> None:
        """Freeze the base and hook the experts to its linears.

        Args:
            base: any decoder.
            method: what the cluster's experts and gates are.
            sites: where, as `find_sites` lists them.
            dropout: share of an expert's inputs dropped in training; None is the method's.

        Raises:
            InvalidRequest: no site, or a site that the method's settings do not fit.
        """
        super().__init__()
        if not sites:
            raise InvalidRequest(
                f"no linear of {type(base).__name__} matches the targets; list others, or none to"
                " take all linears of the decoder layers",
                param="targets",
            )
        base.requires_grad_(requires_grad=False)
        self.base = base
        self.method = method
        self.sites = tuple(sites)
        self.dropout = method.dropout if dropout is None else dropout
        self.shared = method.shared()
        per_site = method.gate_scope == "site"
        self.gates = nn.ModuleList(
            method.gate(self.shared) for _ in range(len(self.sites) if per_site else 1)
        )
        self.deltas = nn.ModuleList()
        self.module_paths: list[str] = []
        self._gate_index: list[int] = []
        self._rows: list[Tensor] | None = None
        self._hooks = []
        self._base_was_training = base.training
        for index, site in enumerate(self.sites):
            for path, width in zip(site.modules, site.slices, strict=True):
                linear = base.get_submodule(path)
                delta = method.delta(site.in_features, width)
                self.deltas.append(delta)
                self.module_paths.append(path)
                self._gate_index.append(index if per_site else 0)
                hook = self._adder(delta, self._gate_index[-1])
                self._hooks.append(linear.register_forward_hook(hook))
        for part in (self.shared, self.gates, self.deltas):
            if part is not None:
                part.to(base.device)
        # torch has no types for these two.
        self.register_state_dict_post_hook(_leave_out_base)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_post_hook(_miss_no_base)  # type: ignore[no-untyped-call]

    def _adder(self, delta: Delta, gate: int) -> Hook:
        def add(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if self._rows is None:
                return output
            rows = self._rows[gate]
            x = _by_sequence(inputs[0], len(rows))
            if self.training and self.dropout:
                x = functional.dropout(x, self.dropout)
            return output + delta.mix(x, rows).to(output.dtype).view_as(output)

        return add

    def forward(
        self,
        input_ids: Tensor,
        task_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        **options: Any,  # noqa: ANN401 - what the base takes
    ) -> Any:  # noqa: ANN401 - the base's output class
        """Run the base with each row's own gates.

        Args:
            input_ids: [B, T] int64.
            task_ids: [B] int64, index into the method's tasks; [B, T] where sequences are packed.
            attention_mask: [B, T].
            position_ids: [B, T]; where they start again, a packed sequence begins.
            labels: [B, T], -100 where there is no loss.
            options: further arguments of the base, as `num_items_in_batch` for its loss.

        Returns:
            The base's output; `.loss` when labels are given.
        """
        given = {"attention_mask": attention_mask, "position_ids": position_ids, "labels": labels}
        options.update({name: value for name, value in given.items() if value is not None})
        with self.using(task_ids):
            return self.base(input_ids=input_ids, use_cache=False, **options)

    @contextmanager
    def using(self, task_ids: Tensor) -> Iterator[None]:
        """Let the base compute these tasks [B] or [B, T] while the context lasts.

        `with model.using(task_ids): model.base.generate(...)` is generation with the cluster.
        """
        with self._restored(self._gate_rows(task_ids)):
            yield

    def _gate_rows(self, task_ids: Tensor) -> list[Tensor]:
        """Return the prepared rows [B, 1 or T, W] of every gate.

        Autocast would round the gates, and what is exported is not rounded.
        """
        layout = self.deltas[0]
        assert isinstance(layout, Delta)
        with torch.autocast(task_ids.device.type, enabled=False):
            tables = [layout.prepare(gate()) for gate in self.gates]
            rows = [functional.embedding(task_ids, table) for table in tables]
        return rows if task_ids.dim() == 2 else [each.unsqueeze(1) for each in rows]

    @contextmanager
    def _restored(self, rows: list[Tensor] | None) -> Iterator[None]:
        before = self._rows
        self._rows = rows
        try:
            yield
        finally:
            self._rows = before

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: Mapping[str, Any] | None = None,
        **options: Any,  # noqa: ANN401 - the base's own
    ) -> None:
        """Make the base compute its layers again in the backward pass instead of keeping them.

        That runs outside this forward, perhaps after another one, so every checkpoint keeps the
        gate rows that it was made under. Only the form without re-entrant backward can do that.
        """
        kwargs = {
            **(activation_checkpointing_kwargs or {}),
            "use_reentrant": False,
            "context_fn": self._checkpoint_contexts,
        }
        if hasattr(self.base, "activation_checkpointing_enable"):
            self.base.activation_checkpointing_enable(kwargs, **options)
        else:
            self.base.gradient_checkpointing_enable(kwargs, **options)

    def gradient_checkpointing_enable(
        self,
        gradient_checkpointing_kwargs: Mapping[str, Any] | None = None,
        **options: Any,  # noqa: ANN401 - the base's own
    ) -> None:
        """Do the same under the name that transformers had before 5.20."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **options)

    def _checkpoint_contexts(
        self,
    ) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), self._restored(self._rows)

    def gate_parameters(self) -> list[nn.Parameter]:
        """The parameters that make gate rows, which learn at a rate of their own."""
        shared = [] if self.shared is None else list(self.shared.parameters())
        return [*shared, *self.gates.parameters()]

    def expert_parameters(self) -> list[nn.Parameter]:
        """The factors A and B."""
        return list(self.deltas.parameters())

    def detach(self) -> None:
        """Take the hooks off the base and leave it as it was, but frozen."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self.base.train(self._base_was_training)

    @torch.no_grad()
    def gate_rows(self) -> list[Tensor]:
        """Return every gate's rows as they are exported, noise off."""
        rows = []
        for gate in self.gates:
            training = gate.training
            gate.eval()
            rows.append(gate())
            gate.train(training)
        return rows

    @torch.no_grad()
    def bundle(
        self,
        *,
        base_fingerprint: str | None,
        dtype: torch.dtype,
        metadata: Mapping[str, str] | None = None,
    ) -> Bundle:
        """Return what the server loads: factors in `dtype`, one static gate row per task."""
        rows = self.gate_rows()
        modules = {}
        for path, delta, gate in zip(self.module_paths, self.deltas, self._gate_index, strict=True):
            assert isinstance(delta, Delta)
            modules[path] = self.method.export(delta, rows[gate], dtype)
        return Bundle(
            method=self.method.name,
            tasks=self.method.tasks,
            experts=self.method.exported_experts(),
            modules=modules,
            base=base_fingerprint,
            metadata=metadata or {},
        )

    @torch.no_grad()
    def load_bundle(self, bundle: Bundle) -> None:
        """Start from an adapter of the same layout; on an error nothing is promised of the state.

        Raises:
            InvalidRequest: other tasks, experts or modules, or gates that the method cannot have.
        """
        self._check_layout(bundle)
        for path, delta in zip(self.module_paths, self.deltas, strict=True):
            module = bundle.modules[path]
            assert isinstance(delta, ExpertDelta)
            same = module.ranks == delta.ranks and torch.equal(module.scale, delta.scales)
            if not same or module.a.shape != delta.a.shape or module.b.shape != delta.b.shape:
                raise InvalidRequest(
                    f"{path}: the adapter has ranks {shown(list(module.ranks))} and scales"
                    f" {shown(module.scale.tolist())}, {self.method.name} as it is set here has"
                    f" {shown(list(delta.ranks))} and {shown(delta.scales.tolist())}; set the same"
                )
            delta.a.copy_(module.a)
            delta.b.copy_(module.b)
        rows = [bundle.modules[path].gate for path in self.module_paths]
        for gate, index in zip(self.gates, range(len(self.gates)), strict=True):
            assert isinstance(gate, Gate)
            gate.load(rows[self._gate_index.index(index)].to(self.base.device))
        made = self.gate_rows()
        for path, index, expected in zip(self.module_paths, self._gate_index, rows, strict=True):
            error = (made[index].cpu() - expected).abs().max().item()
            if error > GATE_ERROR:
                raise InvalidRequest(
                    f"{path}: the gates of {self.method.name} come within {error:.2g} of the"
                    f" adapter's, and {GATE_ERROR:g} is the limit; train with the method and the"
                    " settings that made it"
                )

    def _check_layout(self, bundle: Bundle) -> None:
        experts = self.method.experts()
        if experts != self.method.exported_experts():
            raise InvalidRequest(
                f"an adapter of {self.method.name} holds mixed factors, from which its skills"
                " cannot be had back; resume from a checkpoint of the training instead"
            )
        expected = (self.method.tasks, experts, set(self.module_paths))
        found = (bundle.tasks, bundle.experts, set(bundle.modules))
        for what, ours, theirs in zip(
            ("tasks", "experts", "modules"), expected, found, strict=True
        ):
            if ours != theirs:
                raise InvalidRequest(
                    f"the adapter's {what} are {shown(theirs)}, and those here {shown(ours)};"
                    " set method, tasks and targets as when it was trained"
                )


def _by_sequence(x: Tensor, num_sequences: int) -> Tensor:
    """View what a linear reads as [B, T, K]; some bases flatten it to [B * T, K].

    Raises:
        InvalidRequest: it is neither, so nobody knows which of its rows are whose.
    """
    if x.dim() == 2:
        return x.view(num_sequences, -1, x.shape[-1])
    if x.dim() != 3 or x.shape[0] != num_sequences:
        raise InvalidRequest(
            f"a linear reads {list(x.shape)} where the batch has {num_sequences} sequences; tasks"
            " cannot be told apart there, so leave its module out of the targets",
            param="targets",
        )
    return x


def _leave_out_base(
    _module: nn.Module, state: dict[str, Any], prefix: str, _metadata: object
) -> None:
    """Take the base out of a state: a checkpoint holds what was trained."""
    for name in [name for name in state if name.startswith(f"{prefix}base.")]:
        del state[name]


def _miss_no_base(_module: nn.Module, keys: Any) -> None:  # noqa: ANN401 - torch's private tuple
    """Let a state without the base be complete."""
    keys.missing_keys[:] = [name for name in keys.missing_keys if not name.startswith("base.")]
