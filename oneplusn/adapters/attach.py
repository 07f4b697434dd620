"""Find the linears of a base model that adapters can reach, and wrap them by composition.

Whatever computes `W x` stays what it is (a `torch.nn.Linear`, a `Conv1D`, a quantised or prepacked
form): its output is taken and the site's delta is added in place. Shapes come from `in_features`
and `out_features` (`nx` and `nf` of a `Conv1D`), never from `weight`, which may be packed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn

from oneplusn.errors import OneplusnError
from oneplusn.kernels.ops import gated_delta
from oneplusn.kernels.plan import Plan, Site, SiteSpec, StepHandle

# Leaf names of linears that read the same x within one module, in the order of their slices.
SIBLINGS = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("query", "key", "value"),
    ("w1", "w3"),
)
# A router's outputs pick experts; an adapter made for it would not be a sum of W x and a delta.
ROUTERS = frozenset({"gate", "router", "shared_expert_gate"})


def find_sites(model: nn.Module) -> list[SiteSpec]:
    """List the sites of a model's decoder layers, in the order of its modules.

    A site is a linear in a numbered layer, or several siblings of `SIBLINGS` that read as many
    features. Left out: embeddings and the head (no numbered layer), routers, experts (a numbered
    list within a layer, or 3-D parameters: their rows are not the batch's), and modules used at
    more than one place.
    """
    uses = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    linears: dict[str, tuple[int, int]] = {}
    for path, module in model.named_modules():
        features = _features(module)
        if features and uses[id(module)] == 1 and _in_decoder_layer(path):
            linears[path] = features
    return [_site_spec(paths, linears) for paths in _groups(linears)]


def _features(module: nn.Module) -> tuple[int, int] | None:
    """Read (in, out) features of something that acts as a linear."""
    for names in (("in_features", "out_features"), ("nx", "nf")):
        found = tuple(getattr(module, name, None) for name in names)
        if isinstance(found[0], int) and isinstance(found[1], int):
            return found[0], found[1]
    return None


def _in_decoder_layer(path: str) -> bool:
    parts = path.split(".")
    return sum(part.isdecimal() for part in parts) == 1 and ROUTERS.isdisjoint(parts)


def _groups(linears: Mapping[str, tuple[int, int]]) -> Iterator[tuple[str, ...]]:
    """Yield each linear once, alone or with its siblings."""
    taken: set[str] = set()
    for path, (in_features, _) in linears.items():
        if path in taken:
            continue
        parent, _, leaf = path.rpartition(".")
        names = next((names for names in SIBLINGS if leaf in names), (leaf,))
        paths = (f"{parent}.{name}" for name in names)
        group = tuple(p for p in paths if p in linears and linears[p][0] == in_features)
        taken.update(group)
        yield group


def _site_spec(paths: Sequence[str], linears: Mapping[str, tuple[int, int]]) -> SiteSpec:
    parent = paths[0].rpartition(".")[0]
    leaves = "+".join(path.rpartition(".")[2] for path in paths)
    return SiteSpec(
        name=f"{parent}.{leaves}",
        in_features=linears[paths[0]][0],
        slices=tuple(linears[path][1] for path in paths),
        modules=tuple(paths),
    )


class SiteGroup:
    """The members of one site during a step.

    The first member that is called computes the base outputs of all members and every slice of
    the delta, in one `gated_delta`; the others find theirs waiting. So the model must call each
    member exactly once per step, with the same tensor object. A step without adapted rows takes
    the base linears alone.
    """

    def __init__(self, site: Site, handle: StepHandle) -> None:
        self.site = site
        self.members: list[AdaptedLinear] = []
        self._handle = handle
        self._x: torch.Tensor | None = None
        self._waiting: dict[int, torch.Tensor] = {}

    def output(self, index: int, x: torch.Tensor) -> torch.Tensor:
        """Return member `index`'s output for x `[..., K]`: `[..., N]` of its slice.

        Raises:
            OneplusnError: When x is not the tensor that the waiting outputs were made from, or
                the member was called already.
        """
        step = self._handle.current
        if step is None or step.plan.empty:
            base: torch.Tensor = self.members[index].base(x)
            return base
        if not self._waiting:
            self._compute(x, step.plan)
        elif x is not self._x or index not in self._waiting:
            self._refuse(index)
        y = self._waiting.pop(index)
        if not self._waiting:
            self._x = None
        return y

    def take_leftover(self) -> tuple[str, ...]:
        """Drop the outputs that nobody fetched; return the modules they were for."""
        left = tuple(self.site.spec.modules[index] for index in self._waiting)
        self._waiting.clear()
        self._x = None
        return left

    def _compute(self, x: torch.Tensor, plan: Plan) -> None:
        rows = x.reshape(-1, x.shape[-1])
        if len(rows) != plan.num_rows:
            msg = (
                f"{self.site.spec.name} got {len(rows)} rows in a step of {plan.num_rows}; "
                f"a module that does not see every row of the batch cannot carry adapters"
            )
            raise OneplusnError(msg)
        outputs = [member.base(x) for member in self.members]
        gated_delta([y.view(-1, y.shape[-1]) for y in outputs], rows, self.site, plan)
        self._x = x
        self._waiting.update(enumerate(outputs))

    def _refuse(self, index: int) -> None:
        called = self.site.spec.modules[index]
        left = ", ".join(self.take_leftover())
        msg = (
            f"{called} was called again or with another input while {left} had not been called "
            f"for this step's; siblings of a site must each read the same tensor once a step"
        )
        raise OneplusnError(msg)


class AdaptedLinear(nn.Module):
    """A base linear whose output carries its slice of the site's delta.

    Has no `weight` of its own: code that goes around `forward` fails instead of missing the delta.
    """

    def __init__(self, base: nn.Module, group: SiteGroup) -> None:
        super().__init__()
        self.base = base
        self._group = group
        self._index = len(group.members)
        group.members.append(self)

    @property
    def site(self) -> Site:
        """The site that this linear is a slice of."""
        return self._group.site

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return `base(x)` plus the delta of the current step's plan."""
        return self._group.output(self._index, x)


class AdaptedSite(nn.Module):
    """A base linear that computes all slices of a site side by side, plus the site's delta.

    Attributes:
        base: The linear.
        site: The site.
    """

    def __init__(self, base: nn.Module, site: Site, handle: StepHandle) -> None:
        super().__init__()
        self.base = base
        self.site = site
        self._handle = handle

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return `base(x)` plus the delta of the current step's plan: `[T, K]` -> `[T, N]`."""
        y: torch.Tensor = self.base(x)
        step = self._handle.current
        if step is not None and not step.plan.empty:
            gated_delta(y.split(self.site.spec.slices, dim=-1), x, self.site, step.plan)
        return y


class Attached:
    """The wrapped linears of one model; made by `attach`."""

    def __init__(
        self, model: nn.Module, groups: Sequence[SiteGroup], wrapped: Mapping[str, nn.Module]
    ) -> None:
        self._model = model
        self._groups = tuple(groups)
        self._wrapped = dict(wrapped)

    def check_step_end(self) -> None:
        """Check that every sibling fetched its output; drop what is left.

        Raises:
            OneplusnError: When some did not, so the model's siblings are no site.
        """
        left = [module for group in self._groups for module in group.take_leftover()]
        if left:
            msg = f"not called in this step, though their siblings were: {', '.join(left)}"
            raise OneplusnError(msg)

    def detach(self) -> None:
        """Put the base linears back, as the same module objects."""
        for group in self._groups:
            for path, member in zip(group.site.spec.modules, group.members, strict=True):
                self._model.set_submodule(path, member.base)
        for path, base in self._wrapped.items():
            self._model.set_submodule(path, base)
        self._groups, self._wrapped = (), {}


def attach(model: nn.Module, sites: Mapping[str, Site], handle: StepHandle) -> Attached:
    """Wrap the linears of `sites` in `model`, so that each adds the delta of the current plan.

    While `handle.current` is None or its plan is empty, the model computes exactly what it did.
    Modules keep their identity and parameters, so tied weights stay tied. Where a model has one
    linear for all slices of a site, under the site's name, that one is wrapped.
    """
    groups: list[SiteGroup] = []
    wrapped: dict[str, nn.Module] = {}
    for name, site in sites.items():
        if len(site.spec.modules) > 1 and _has_module(model, name):
            fused = model.get_submodule(name)
            assert _features(fused) == (site.spec.in_features, site.spec.out_features), name
            model.set_submodule(name, AdaptedSite(fused, site, handle))
            wrapped[name] = fused
            continue
        group = SiteGroup(site, handle)
        for path, width in zip(site.spec.modules, site.spec.slices, strict=True):
            base = model.get_submodule(path)
            assert _features(base) == (site.spec.in_features, width), path
            model.set_submodule(path, AdaptedLinear(base, group))
        groups.append(group)
    return Attached(model, groups, wrapped)


def _has_module(model: nn.Module, path: str) -> bool:
    parent, _, leaf = path.rpartition(".")
    return hasattr(model.get_submodule(parent), leaf)
