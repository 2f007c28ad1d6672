"""Calls that are refused: an exception whose message names the argument, what it got and what it takes."""

import math

import pytest
import torch
from bad_calls import (
    BAD_BACKWARD_CALLS,
    CASE,
    HUGE,
    REFUSALS,
    changed,
    columns,
    every_other_column,
    heads_last,
    smallest_call,
    to,
)
from torch._subclasses.fake_tensor import FakeTensorMode

import chunkattn


def arguments(device):
    q, k, v = CASE.inputs(device, torch.bfloat16)
    return {"q": q, "k": k, "v": v, **CASE.options(device)}


# Name of the call: what differs from a good one, and the message.
BAD_CALLS = {
    "q has 3 dimensions": ({"q": lambda x: x[0]}, r"q must have 4 dimensions .* got shape \[20, 4, 16\]"),
    "q has 5 dimensions": ({"q": lambda x: x[None]}, r"q must have 4 dimensions .* got shape \[1, 2, 20, 4, 16\]"),
    "q is a scalar": ({"q": lambda x: x.sum()}, r"q must have 4 dimensions .* got shape \[\]"),
    "k has 3 dimensions": ({"k": lambda x: x[0]}, r"k must have 4 dimensions .* got shape \[33, 2, 16\]"),
    "v has 3 dimensions": ({"v": lambda x: x[0]}, r"v must have 4 dimensions .* got shape \[33, 2, 16\]"),
    "cos has 1 dimension": ({"cos": lambda x: x[0]}, r"cos must have 2 dimensions .* got shape \[8\]"),
    "cos has 3 dimensions": ({"cos": lambda x: x[None]}, r"cos must have 2 dimensions .* got shape \[1, 13, 8\]"),
    "sin has 1 dimension": ({"sin": lambda x: x[0]}, r"sin must have 2 dimensions .* got shape \[8\]"),
    "q is None": ({"q": None}, "q must be a tensor, got NoneType"),
    "k is None": ({"k": None}, "k must be a tensor, got NoneType"),
    "v is a list": ({"v": lambda x: x.tolist()}, "v must be a tensor, got list"),
    "cos is a number": ({"cos": 1.0}, "cos must be a tensor, got float"),
    "q is int64": ({"q": to(torch.int64)}, "q must be .*float16.* got Long"),
    "q is bool": ({"q": to(torch.bool)}, "q must be .*float16.* got Bool"),
    "q is complex": ({"q": to(torch.complex64)}, "q must be .*float16.* got ComplexFloat"),
    "q is float8": ({"q": to(torch.float8_e4m3fn)}, "q must be .*float16.* got float8_e4m3fn"),
    "k is float16": ({"k": to(torch.float16)}, "k must have the dtype of q, bfloat16, got float16"),
    "k is float32": ({"k": to(torch.float32)}, "k must have the dtype of q, bfloat16, got float32"),
    "v is float32": ({"v": to(torch.float32)}, "v must have the dtype of q, bfloat16, got float32"),
    "v is int32": ({"v": to(torch.int32)}, "v must have the dtype of q, bfloat16, got Int"),
    "cos is float64": ({"cos": to(torch.float64)}, "cos must be float32, got float64"),
    "cos is bfloat16": ({"cos": to(torch.bfloat16)}, "cos must be float32, got bfloat16"),
    "sin is float16": ({"sin": to(torch.float16)}, "sin must be float32, got float16"),
    "k has another batch size": ({"k": lambda x: x[:1]}, "k must have the batch size of q, 2, got 1"),
    "v has another batch size": ({"v": lambda x: x[:1]}, r"v must have the shape of k, .* got \[1, 33, 2, 16\]"),
    "k has another head dim": ({"k": lambda x: x[..., :8]}, "k must have the head dimension of q, 16, got 8"),
    "q has another head dim": ({"q": lambda x: x[..., :8]}, "k must have the head dimension of q, 8, got 16"),
    "v has another head dim": ({"v": lambda x: x[..., :8]}, r"v must have the shape of k, .* got \[2, 33, 2, 8\]"),
    "v has another length": ({"v": lambda x: x[:, 1:]}, r"v must have the shape of k, .* got \[2, 32, 2, 16\]"),
    "v has other heads": ({"v": lambda x: x[:, :, :1]}, r"v must have the shape of k, .* got \[2, 33, 1, 16\]"),
    "heads are no multiple": ({"q": lambda x: x[:, :, :3]}, "q must have .* multiple of the heads of k, got 3 and 2"),
    "fewer heads than kv heads": ({"q": lambda x: x[:, :, :1]}, "q must have .* multiple .* got 1 and 2"),
    "no kv heads": (
        {"k": lambda x: x[:, :, :0], "v": lambda x: x[:, :, :0]},
        "q must have .* multiple of the heads of k, got 4 and 0",
    ),
    "q is longer than k": (
        {"k": lambda x: x[:, :19], "v": lambda x: x[:, :19]},
        "q must not be longer than k, got seqlen_q 20 and seqlen_k 19",
    ),
    "no keys": ({"k": lambda x: x[:, :0], "v": lambda x: x[:, :0]}, "q must not be longer than k, .* seqlen_k 0"),
    "head dim 0": (
        {name: lambda x: x[..., :0] for name in "qkv"},
        r"q must have a head dimension of at least 1, got shape \[2, 20, 4, 0\]",
    ),
    "k has 2**31 tokens": (
        {name: lambda x: x[:, :1].expand(-1, HUGE, -1, -1) for name in "kv"},
        r"k must have sizes below 2\*\*31, got shape \[2, 2147483648, 2, 16\]",
    ),
    "q has 2**31 heads": (
        {"q": lambda x: x[:, :, :1].expand(-1, -1, HUGE, -1)},
        r"q must have sizes below 2\*\*31, got shape \[2, 20, 2147483648, 16\]",
    ),
    "q's last dimension is strided": ({"q": every_other_column}, "q must be contiguous in its last .* got stride 2"),
    "k's last dimension is strided": ({"k": heads_last}, "k must be contiguous in its last .* got stride 2"),
    "v's last dimension is strided": ({"v": every_other_column}, "v must be contiguous in its last .* got stride 2"),
    "q's last dimension is expanded": (
        {"q": lambda x: x[..., :1].expand_as(x)},
        "q must be contiguous in its last dimension, got stride 0",
    ),
    "cos's last dimension is strided": ({"cos": every_other_column}, "cos must be contiguous in its last .* stride 2"),
    "sin's last dimension is strided": ({"sin": every_other_column}, "sin must be contiguous in its last .* stride 2"),
    "sin has another row stride": (
        {"sin": lambda x: torch.cat((x, x), dim=1)[:, :8]},
        "sin must have the row stride of cos, 8, got 16",
    ),
    "chunk_size is 0": ({"chunk_size": 0}, r"chunk_size must lie in 2 .. 2\*\*30, got 0"),
    "chunk_size is 1": ({"chunk_size": 1}, r"chunk_size must lie in 2 .. 2\*\*30, got 1"),
    "chunk_size is negative": ({"chunk_size": -12}, r"chunk_size must lie in 2 .. 2\*\*30, got -12"),
    "chunk_size is above 2**30": ({"chunk_size": 2**30 + 1}, r"chunk_size must lie in .* got 1073741825"),
    "chunk_size is a float": ({"chunk_size": 12.5}, "chunk_size"),
    "chunk_size is None": ({"chunk_size": None}, "chunk_size"),
    "local_size is 0": ({"local_size": 0}, "local_size must lie in 1 .. chunk_size - 1, got 0 with chunk_size 12"),
    "local_size is negative": ({"local_size": -1}, "local_size must lie in 1 .. chunk_size - 1, got -1"),
    "local_size is chunk_size": ({"local_size": 12}, "local_size must lie in 1 .. chunk_size - 1, got 12"),
    "local_size is above chunk_size": ({"local_size": 40}, "local_size must lie in 1 .. chunk_size - 1, got 40"),
    "cos lacks the last row": ({"cos": lambda x: x[:-1]}, r"cos must have at least chunk_size \+ 1 = 13 rows, got 12"),
    "sin lacks the last row": ({"sin": lambda x: x[:-1]}, r"sin must have at least chunk_size \+ 1 = 13 rows, got 12"),
    "cos has no rows": ({"cos": lambda x: x[:0]}, r"cos must have at least chunk_size \+ 1 = 13 rows, got 0"),
    "the table is too wide": (
        {"cos": columns(9), "sin": columns(9)},
        r"cos must have rotary_dim / 2 columns with rotary_dim in 2 .. head_dim = 16, got 9",
    ),
    "the table is as wide as the head": ({"cos": columns(16), "sin": columns(16)}, "cos must have .* got 16 columns"),
    "the table is empty": ({"cos": columns(0), "sin": columns(0)}, "cos must have .* got 0 columns"),
    "sin is narrower": ({"sin": columns(7)}, r"sin must have the shape of cos, \[13, 8\], got \[13, 7\]"),
    "sin has more rows": (
        {"sin": lambda x: torch.cat((x, x))},
        r"sin must have the shape of cos, \[13, 8\], got \[26, 8\]",
    ),
    "scale is 0": ({"scale": 0.0}, "scale must be positive and finite, got 0"),
    "scale is negative": ({"scale": -0.5}, "scale must be positive and finite, got -0.5"),
    "scale is infinite": ({"scale": math.inf}, "scale must be positive and finite, got inf"),
    "scale is nan": ({"scale": math.nan}, "scale must be positive and finite, got nan"),
    "temperature is 0": ({"temperature": 0.0}, "temperature must be positive and finite, got 0.0"),
    "temperature is negative": ({"temperature": -1.0}, "temperature must be positive and finite, got -1.0"),
    "temperature is infinite": ({"temperature": math.inf}, "temperature must be positive and finite, got inf"),
    "temperature is nan": ({"temperature": math.nan}, "temperature must be positive and finite, got nan"),
    "interleaved is a string": ({"interleaved": "yes"}, "interleaved"),
    "temperature is a scalar tensor": (
        {"temperature": lambda x: x[0]},
        r"temperature must have 1 .* got shape \[\]",
    ),
    "temperature is a matrix": (
        {"temperature": lambda x: x[None]},
        r"temperature must have 1 .* got shape \[1, 2\]",
    ),
    "temperature has 1 element": ({"temperature": lambda x: x[:1]}, "temperature must have one .* batch row, 2, got 1"),
    "temperature has 4 elements": (
        {"temperature": lambda x: torch.cat((x, x))},
        "temperature must have one element per batch row, 2, got 4",
    ),
    "temperature is float64": ({"temperature": to(torch.float64)}, "temperature must be float32, got float64"),
    "temperature is bfloat16": ({"temperature": to(torch.bfloat16)}, "temperature must be float32, got bfloat16"),
    "temperature is int64": ({"temperature": to(torch.int64)}, "temperature must be float32, got Long"),
    "temperature is expanded": (
        {"temperature": lambda x: x[:1].expand(2)},
        "temperature must be contiguous in its last dimension, got stride 0",
    ),
    "temperature is strided": ({"temperature": every_other_column}, "temperature must be contiguous .* got stride 2"),
}


def test_the_unchanged_call_is_good(device):
    out = chunkattn.dca(**arguments(device))
    assert out.shape == (2, 20, 4, 16)


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls(device, name):
    edits, message = BAD_CALLS[name]
    with pytest.raises(REFUSALS, match=message):
        chunkattn.dca(**changed(arguments(device), edits))


@pytest.mark.parametrize("name", ["k", "v", "cos", "sin"])
def test_operator_refuses_none(device, name):
    with pytest.raises(ValueError, match=f"{name} must be a tensor, got None"):
        torch.ops.chunkattn.dca(**changed(arguments(device), {name: None}))


@pytest.mark.parametrize("name", ["k", "v", "cos", "sin", "temperature"])
def test_tensors_of_another_device(device, name):
    # A tensor without data is of another device than any.
    values = arguments(device)
    with pytest.raises(ValueError, match=f"{name} must be on the device of q, {device}.*, got meta"):
        chunkattn.dca(**changed(values, {name: lambda x: x.to("meta")}))


@pytest.mark.parametrize("name", ["q", "k", "v", "cos", "sin", "temperature"])
def test_cpu_tensors_among_cuda_tensors(cuda, name):
    values = arguments(cuda)
    at_fault = "k" if name == "q" else name
    with pytest.raises(ValueError, match=f"{at_fault} must be on the device of q, .*, got "):
        chunkattn.dca(**changed(values, {name: lambda x: x.cpu()}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtypes_without_cuda_kernels(cuda, dtype):
    edits = {name: to(dtype) for name in "qkv"}
    with pytest.raises(ValueError, match="q must be bfloat16 or float16 on CUDA, got float"):
        chunkattn.dca(**changed(arguments(cuda), edits))


@pytest.mark.parametrize("head_dim", [257, 320, 512])
def test_head_dims_without_cuda_kernels(cuda, head_dim):
    case = CASE.but(head_dim=head_dim)
    with pytest.raises(ValueError, match=f"q must have a head dimension of at most 256 on CUDA, got {head_dim}"):
        chunkattn.dca(*case.inputs(cuda, torch.bfloat16), **case.options(cuda))


@pytest.mark.parametrize("name", ["cos", "sin", "temperature"])
def test_gradients_that_do_not_exist(device, name):
    values = arguments(device)
    values[name].requires_grad_()
    with pytest.raises(NotImplementedError, match=f"{name} requires grad, but gradients exist for q, k and v only"):
        chunkattn.dca(**values)
    with pytest.raises(NotImplementedError, match=f"{name} requires grad"):
        torch.ops.chunkattn.dca(**values)
    with torch.no_grad():
        chunkattn.dca(**values)


def backward_arguments(device):
    values = arguments(device)
    out, softmax_lse = chunkattn.dca(**values, return_lse=True)
    return values | {"dout": torch.ones_like(out), "out": out, "softmax_lse": softmax_lse}


@pytest.mark.parametrize("name", BAD_BACKWARD_CALLS)
def test_bad_backward_calls(device, name):
    edits, message = BAD_BACKWARD_CALLS[name]
    values = backward_arguments(device)
    torch.ops.chunkattn.dca_backward(**values)
    with pytest.raises(REFUSALS, match=message):
        torch.ops.chunkattn.dca_backward(**changed(values, edits))


@pytest.mark.parametrize("name", ["dca_varlen", "dca_with_kvcache", "select", "select_merge"])
def test_devices_without_kernels_are_refused(name):
    if torch._C._dispatch_has_kernel_for_dispatch_key(f"chunkattn::{name}", "CUDA"):
        pytest.skip("this build has kernels for CUDA")
    with FakeTensorMode():
        arguments, options = smallest_call(name, torch.device("cuda"))
        message = f"q is on cuda:0, but this build of chunkattn has kernels of {name} for the CPU only"
        with pytest.raises(NotImplementedError, match=message):
            getattr(chunkattn, name)(*arguments, **options)
