"""The compiled parts of a decoder layer compute what the modules of transformers do."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import silu
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from oneplusn.kernels.cpu_layer import rms_norm, rotate, silu_mul
from tolerances import assert_close

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def draw(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (torch.randn(shape, generator=generator) * scale).to(dtype)


def norm(weight: torch.Tensor, eps: float = 1e-6) -> LlamaRMSNorm:
    module = LlamaRMSNorm(len(weight), eps)
    module.weight.data = weight
    return module


@pytest.mark.parametrize("width", [4, 31, 32, 100, 576])
@DTYPES
def test_rms_norm(width: int, dtype: torch.dtype) -> None:
    h, weight = draw(5, width, dtype=dtype), draw(width, dtype=dtype)
    before = h.clone()
    assert_close(rms_norm(h, weight, 1e-6), norm(weight)(h))
    assert torch.equal(h, before)


@DTYPES
def test_rms_norm_of_a_sum_keeps_the_sum(dtype: torch.dtype) -> None:
    h, added, weight = (draw(n, 70, dtype=dtype) for n in (3, 3, 1))
    expected = h + added
    assert_close(rms_norm(h, weight[0], 1e-6, added=added), norm(weight[0])(expected))
    assert torch.equal(h, expected)


@pytest.mark.parametrize("dim", [8, 24, 64, 128])
@pytest.mark.parametrize("with_norms", [False, True])
@DTYPES
def test_rotate(dim: int, with_norms: bool, dtype: torch.dtype) -> None:
    rows, heads, kv_heads = 4, 3, 2
    x = draw(rows, (heads + 2 * kv_heads) * dim, dtype=dtype)
    angles = draw(rows, dim // 2, dtype=torch.float32, scale=3.0).repeat(1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    norms = (draw(dim, dtype=dtype), draw(dim, dtype=dtype) + 1) if with_norms else None
    q, k, v = (
        part.view(rows, -1, dim)
        for part in x.clone().split([heads * dim, kv_heads * dim, kv_heads * dim], dim=1)
    )
    if norms is not None:
        q, k = norm(norms[0])(q), norm(norms[1])(k)
    # In fp32 behind the norm, as the compiled rotation rounds once.
    turned = apply_rotary_pos_emb(
        *(z.float().transpose(0, 1)[None] for z in (q, k)), cos.float()[None], sin.float()[None]
    )
    expected = torch.cat([*(z[0].transpose(0, 1) for z in turned), v.float()], dim=1)

    rotate(x, cos, sin, heads=(heads, kv_heads), norms=norms, eps=1e-6)

    assert_close(x.view(rows, -1, dim), expected)
    assert torch.equal(x.view(rows, -1, dim)[:, heads + kv_heads :], v)


@pytest.mark.parametrize("width", [3, 32, 33, 1536])
@DTYPES
def test_silu_mul(width: int, dtype: torch.dtype) -> None:
    x = draw(3, 2 * width, dtype=dtype, scale=4.0)
    assert_close(silu_mul(x), silu(x[:, :width]) * x[:, width:])


@pytest.mark.parametrize("value", [-1e30, -100.0, -88.0, -0.0, 0.0, 88.0, 1e30, torch.inf])
def test_silu_at_the_ends(value: float) -> None:
    x = torch.tensor([[value] * 40 + [1.0] * 40])
    assert_close(silu_mul(x), silu(x[:, :40]))


def test_values_that_are_not_finite_stay_in_their_row() -> None:
    x = draw(3, 64, dtype=torch.float32)
    x[1, 5] = torch.nan
    assert rms_norm(x, torch.ones(64), 1e-6).isnan().any(dim=1).tolist() == [False, True, False]
    assert silu_mul(x).isnan().any(dim=1).tolist() == [False, True, False]
