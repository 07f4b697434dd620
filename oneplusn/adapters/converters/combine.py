"""Make one adapter of several: side by side, or several LoRAs as one task by weights.

    cat      sum over i of w_i * s_i * B_i A_i                       outputs are summed; exact
    linear   (sum of sqrt|w_i s_i| B_i) (sum of +-sqrt|w_i s_i| A_i)  factors are mixed
    lorahub  s_0 * (sum of w_i B_i) (sum of w_i A_i)                  factors are mixed

`cat` and `linear` are those of PEFT's `add_weighted_adapter`, with s_i = alpha / r of each; the
sign of w_i s_i goes to A. `lorahub` is what LoRAHub (arXiv 2307.13269) composes and its search
weighs: every tensor of the state dict by the same weight, read with the configuration of the first.

Deviation: with rsLoRA adapters, PEFT 0.21 keeps `use_rslora` in what it merges and so multiplies
`cat` and `linear` by the square root of the new rank; here they stay what they say.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from oneplusn.adapters.bundle import Bundle, Expert, ModuleDelta
from oneplusn.adapters.checks import check_name, shown
from oneplusn.adapters.edits import blended_gates, merge
from oneplusn.errors import AdapterIncompatible, InvalidRequest


class Lora(NamedTuple):
    """What a plain LoRA has at one module: scale * B A, with B [N, r] and A [r, K]."""

    a: Tensor
    b: Tensor
    scale: float


Mix = Callable[[Sequence[Lora], Sequence[float]], Lora]


class Semantics(NamedTuple):
    """One meaning of "these LoRAs by these weights".

    Attributes:
        summary: one line for the help.
        mix: mixes the LoRAs of one module; None where outputs are summed instead.
        needs_all: every LoRA must adapt the same modules.
    """

    summary: str
    mix: Mix | None = None
    needs_all: bool = False


def linear(loras: Sequence[Lora], weights: Sequence[float]) -> Lora:
    """Mix factors with the square root of weight times scale on both sides, the sign on A."""
    products = [weight * lora.scale for weight, lora in zip(weights, loras, strict=True)]
    roots = [math.sqrt(abs(product)) for product in products]
    signed = [math.copysign(r, product) for r, product in zip(roots, products, strict=True)]
    return Lora(
        a=_weighted_sum([lora.a for lora in loras], signed),
        b=_weighted_sum([lora.b for lora in loras], roots),
        scale=1.0,
    )


def lorahub(loras: Sequence[Lora], weights: Sequence[float]) -> Lora:
    """Mix factors with the weight itself on both sides, at the scale of the first."""
    return Lora(
        a=_weighted_sum([lora.a for lora in loras], weights),
        b=_weighted_sum([lora.b for lora in loras], weights),
        scale=loras[0].scale,
    )


SEMANTICS: dict[str, Semantics] = {
    "cat": Semantics("sum of outputs, as PEFT's cat: exact, keeps every LoRA as an expert"),
    "linear": Semantics("factors mixed by roots, as PEFT's linear: one LoRA of their rank", linear),
    "lorahub": Semantics(
        "factors mixed by the weights, as LoRAHub composes: one LoRA of their rank",
        lorahub,
        needs_all=True,
    ),
}


def renamed(bundle: Bundle, tasks: Sequence[str]) -> Bundle:
    """Give all tasks other names, in their order, and experts that are called after them too.

    Raises:
        InvalidRequest: there are more or fewer names than tasks.
        AdapterInvalid: a name cannot be one, or occurs twice.
    """
    if len(tasks) != len(bundle.tasks):
        raise InvalidRequest(
            f"{len(tasks)} names for {len(bundle.tasks)} tasks ({shown(', '.join(bundle.tasks))});"
            " give one for each, in this order",
            param="task",
        )
    for task in tasks:
        check_name(task, "task name")
    new = dict(zip(bundle.tasks, tasks, strict=True))
    return replace(
        bundle,
        tasks=tuple(tasks),
        experts=tuple(
            replace(
                expert,
                name=new.get(expert.name, expert.name),
                owner=None if expert.owner is None else new[expert.owner],
            )
            for expert in bundle.experts
        ),
        defaults={new[task]: values for task, values in bundle.defaults.items()},
        metadata={_note_key(key, new): text for key, text in bundle.metadata.items()},
    )


def side_by_side(bundles: Sequence[Bundle]) -> Bundle:
    """Put adapters together as one that has all their tasks; factors in fp32 if dtypes differ.

    Raises:
        AdapterExists: a task name occurs twice.
        AdapterIncompatible: modules have different shapes.
    """
    if len(bundles) == 1:
        return bundles[0]
    dtypes = {delta.a.dtype for bundle in bundles for delta in bundle.modules.values()}
    return merge(bundles, dtype=None if len(dtypes) == 1 else torch.float32)


def blend(
    bundles: Sequence[Bundle], weights: Sequence[float], semantics: str, *, task: str
) -> Bundle:
    """Make one task of several plain LoRAs by weights.

    Args:
        bundles: each with one task and one expert.
        weights: one for each; any sign and size.
        semantics: a key of `SEMANTICS`.
        task: name of the task that comes out.

    Raises:
        InvalidRequest: the numbers differ, or a weight is not finite or 0.
        AdapterIncompatible: one is no plain LoRA, or they do not fit each other.
        AdapterInvalid: the name cannot be one.
    """
    check_name(task, "task name")
    if len(weights) != len(bundles):
        raise InvalidRequest(
            f"{len(weights)} weights for {len(bundles)} LoRAs; give one for each, in their order",
            param="weights",
        )
    for weight in weights:
        if weight == 0 or not math.isfinite(weight):
            raise InvalidRequest(
                f"weight {weight}: give a finite number that is not 0, and leave out the LoRA that"
                " is to add nothing",
                param="weights",
            )
    numbered = [_numbered(bundle, index) for index, bundle in enumerate(bundles)]
    how = SEMANTICS[semantics]
    if how.mix is None:
        tasks = [bundle.tasks[0] for bundle in numbered]
        return _summed(side_by_side(numbered), dict(zip(tasks, weights, strict=True)), task)
    return _mixed(numbered, weights, how, task)


def _numbered(bundle: Bundle, index: int) -> Bundle:
    """Give a plain LoRA's task a name that no other has; the expert keeps the one it had.

    Raises:
        AdapterIncompatible: it is more than a plain LoRA.
    """
    if len(bundle.tasks) != 1 or len(bundle.experts) != 1:
        raise AdapterIncompatible(
            f"the adapter of {shown(', '.join(bundle.tasks))} has {len(bundle.tasks)} tasks and"
            f" {len(bundle.experts)} experts, and only plain LoRAs are mixed by weights; take out"
            " the task as a plain LoRA first, with `oneplusn convert out`"
        )
    number = f"lora-{index}"
    (expert,) = bundle.experts
    owned = Expert(expert.name, "own", number, expert.rank)
    return replace(bundle, tasks=(number,), experts=(owned,), defaults={})


def _summed(joined: Bundle, weights: dict[str, float], task: str) -> Bundle:
    """Keep all experts, and make their tasks one whose gate row is the weighted sum."""
    rows = blended_gates(joined, weights)
    return replace(
        joined,
        tasks=(task,),
        experts=tuple(replace(expert, owner=task) for expert in joined.experts),
        modules={
            path: replace(delta, gate=rows[path].unsqueeze(0))
            for path, delta in joined.modules.items()
        },
    )


def _mixed(
    bundles: Sequence[Bundle], weights: Sequence[float], semantics: Semantics, task: str
) -> Bundle:
    """Mix the LoRAs of every module into one."""
    joined = side_by_side(bundles)  # checks that they fit one base
    assert semantics.mix is not None
    modules = {}
    for path in joined.modules:
        there = [index for index, bundle in enumerate(bundles) if path in bundle.modules]
        loras = [_lora(bundles[index].modules[path]) for index in there]
        _check_mixable(path, loras, len(bundles) if semantics.needs_all else len(there))
        mixed = semantics.mix(loras, [weights[index] for index in there])
        modules[path] = ModuleDelta(
            a=mixed.a,
            b=mixed.b,
            ranks=(len(mixed.a),),
            gate=torch.ones(1, 1),
            scale=torch.tensor([mixed.scale]),
        )
    rank = max(delta.ranks[0] for delta in modules.values())
    return replace(
        joined, tasks=(task,), experts=(Expert(task, "own", task, rank),), modules=modules
    )


def _lora(delta: ModuleDelta) -> Lora:
    return Lora(delta.a, delta.b, delta.weights.item())


def _check_mixable(path: str, loras: Sequence[Lora], wanted: int) -> None:
    if len(loras) < wanted:
        raise AdapterIncompatible(
            f"{len(loras)} of {wanted} LoRAs adapt {path}, and these semantics need all to adapt"
            " the same modules; leave the others out, or take 'cat'"
        )
    ranks = {len(lora.a) for lora in loras}
    if len(ranks) > 1:
        raise AdapterIncompatible(
            f"at {path} the LoRAs have ranks {sorted(ranks)}, and factors are mixed at one rank"
            " only; take 'cat', which sums outputs, and cut it with `convert out --svd`"
        )


def _weighted_sum(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Sum tensors by weights, fp32."""
    factors = torch.tensor(weights, dtype=torch.float32).view(-1, 1, 1)
    return (torch.stack([tensor.float() for tensor in tensors]) * factors).sum(0)


def _note_key(key: str, new: dict[str, str]) -> str:
    """Rename the key of a task's description."""
    what, _, task = key.partition(".")
    return f"{what}.{new[task]}" if what == "description" and task in new else key
