"""What Triton's interpreter computes right, and what wrong: the reason that kernels have a switch UPCAST."""

import pytest
import torch
import triton
import triton.language as tl

from vivace.kernels.gpu.launcher import Config, Launcher

pytestmark = pytest.mark.triton
SIZE = 16


@triton.jit
def product(
    out,  # [16, 16] fp32 or int32
    x,  # [16, 16]
    y,  # [16, 16]
    SUMS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    at = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)
    left, right = tl.load(x + at), tl.load(y + at)
    if UPCAST:
        left, right = left.to(tl.float32), right.to(tl.float32)
    tl.store(out + at, tl.dot(left, right, out_dtype=SUMS))


@triton.jit
def doubled(
    out,  # [16, 16] fp32
    x,  # [16, 16]
    UPCAST: tl.constexpr,
):
    at = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)
    value = tl.load(x + at)
    if UPCAST:
        value = value.to(tl.float32)
    tl.store(out + at, (value + value).to(tl.float32))


def error_of_product(dtype, upcast):
    """Relative to the largest number, against fp64."""
    torch.manual_seed(0)
    x, y = (torch.randn(SIZE, SIZE).mul(3).to(dtype) for _ in range(2))
    is_whole = dtype is torch.int8
    out = torch.empty(SIZE, SIZE, dtype=torch.int32 if is_whole else torch.float32)
    constexprs = {"SUMS": tl.int32 if is_whole else tl.float32, "UPCAST": upcast}
    Launcher("cpu").launch(product, (1,), (out, x, y), constexprs, Config())
    want = x.double() @ y.double()
    return float((out.double() - want).abs().max() / want.abs().max())


@pytest.mark.parametrize(
    ("dtype", "most"),
    [
        (torch.float32, 1e-6),
        (torch.float16, 1e-3),  # it adds up in fp16
        (torch.int8, 0),
        (torch.float8_e4m3fn, 1e-3),
    ],
    ids=str,
)
def test_a_product_is_right_without_help(dtype, most):
    assert error_of_product(dtype, upcast=False) <= most


def test_a_bf16_product_is_right_only_when_it_is_widened():
    assert error_of_product(torch.bfloat16, upcast=Launcher("cpu").upcast) < 1e-6
    assert not error_of_product(torch.bfloat16, upcast=False) < 1  # wild, or not a number


def test_bf16_sums_are_right_only_when_they_are_widened():
    x = torch.full((SIZE, SIZE), 1.5, dtype=torch.bfloat16)
    outs = []
    for upcast in (True, False):
        out = torch.empty(SIZE, SIZE)
        Launcher("cpu").launch(doubled, (1,), (out, x), {"UPCAST": upcast}, Config())
        outs.append(out)
    assert (outs[0] == 3).all() and not (outs[1] == 3).any()
