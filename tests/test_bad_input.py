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


def decode_arguments(device):
    """A call on pages of 16 tokens with room for 48, all arguments given."""
    skip_without_kernels(device, "dca_with_kvcache")
    q, k, v = CASE.but(seqlen_k=20).inputs(device, torch.bfloat16)
    cache = Layout(16).make(CASE, 48, device, torch.bfloat16)
    # Wrong entries among those a sequence does not use are no fault.
    cache["block_table"][0, 2:] = 1000
    options = decode_options(CASE, device)
    return {"q": q, **cache, **options, "k": k, "v": v, "cache_seqlens": lengths(device, 5, 28), "out": q.clone()}


def without_pages(values):
    """The same call on a cache of rows of 48 tokens."""
    return {**values, **Layout().make(CASE, 48, values["q"].device, torch.bfloat16)}


def to_float8(x):
    return x.to(FLOAT8)


BAD_DECODE_CALLS = {
    "q has 3 dimensions": ({"q": lambda x: x[0]}, r"q must have 4 dimensions .* got shape \[20, 4, 16\]"),
    "q is None": ({"q": None}, "q must be a tensor, got NoneType"),
    "q is int64": ({"q": to(torch.int64)}, "q must be .*float16.* got Long"),
    "q is strided": ({"q": every_other_column}, "q must be contiguous in its last .* got stride 2"),
    "k_cache is None": ({"k_cache": None}, "k_cache must be a tensor, got NoneType"),
    "k_cache has 3 dimensions": (
        {"k_cache": lambda x: x[0]},
        r"k_cache must have 4 dimensions \[num_pages, page_size, ",
    ),
    "k_cache is float16": ({"k_cache": to(torch.float16)}, "k_cache must have the dtype of q, bfloat16, or be float8"),
    "k_cache alone is float8": (
        {"k_cache": to_float8},
        "v_cache must have the dtype of k_cache, float8_e4m3fn, got bfl",
    ),
    "k_cache has another head dim": (
        {"k_cache": lambda x: x[..., :8]},
        "k_cache must have the head dimension of q, 16",
    ),
    "k_cache has 3 heads": (
        {name: lambda x: x.repeat(1, 1, 2, 1)[:, :, :3] for name in ("k_cache", "v_cache")},
        "q must have a number of heads that is a multiple of the heads of k_cache, got 4 and 3",
    ),
    "k_cache has empty pages": (
        {name: lambda x: x[:, :0] for name in ("k_cache", "v_cache")},
        "k_cache must have pages of at least 1 token",
    ),
    "k_cache is strided": ({"k_cache": heads_last}, "k_cache must be contiguous in its last dimension"),
    "v_cache has fewer pages": ({"v_cache": lambda x: x[1:]}, "v_cache must have the shape of k_cache"),
    "v_cache is strided": ({"v_cache": every_other_column}, "v_cache must be contiguous in its last dimension"),
    "cache_seqlens is a list": ({"cache_seqlens": [5, 28]}, "cache_seqlens must be a tensor, got list"),
    "cache_seqlens is int64": ({"cache_seqlens": to(torch.int64)}, "cache_seqlens must be int32, got Long"),
    "cache_seqlens has 2 dimensions": ({"cache_seqlens": lambda x: x[None]}, "cache_seqlens must have 1 dimensions"),
    "cache_seqlens has 3 elements": (
        {"cache_seqlens": lambda x: torch.cat((x, x[:1]))},
        "cache_seqlens must have the batch size of q, 2, got 3",
    ),
    "block_table is int64": ({"block_table": to(torch.int64)}, "block_table must be int32, got Long"),
    "block_table has 1 dimension": ({"block_table": lambda x: x[0]}, "block_table must have 2 dimensions"),
    "block_table has 1 row": ({"block_table": lambda x: x[:1]}, "block_table must have the batch size of q, 2, got 1"),
    "block_table is strided": (
        {"block_table": lambda x: x.t().contiguous().t()},
        "block_table must be contiguous in its last dimension",
    ),
    "k without v": ({"v": None}, "k and v must be given together, got k alone"),
    "v without k": ({"k": None}, "k and v must be given together, got v alone"),
    "k is float32": ({"k": to(torch.float32)}, "k must have the dtype of q, bfloat16, got float32"),
    "k has 1 row": ({"k": lambda x: x[:1]}, "k must have the batch size of q, 2, got 1"),
    "k has 1 head": ({"k": lambda x: x[:, :, :1]}, "k must have the heads of k_cache, 2, got 1"),
    "k has another head dim": ({"k": lambda x: x[..., :8]}, "k must have the head dimension of q, 16, got 8"),
    "v is longer": ({"v": lambda x: torch.cat((x, x), 1)}, r"v must have the shape of k, \[2, 20, 2, 16\], got"),
    "v is strided": ({"v": every_other_column}, "v must be contiguous in its last dimension"),
    "k_scale without float8": ({"k_scale": lambda _: torch.ones(2)}, "k_scale must be None unless the cache is float8"),
    "v_scale is a number": ({"v_scale": 0.5}, "v_scale must be a tensor, got float"),
    "out has another shape": ({"out": lambda x: x[:, 1:]}, r"out must have the shape of q, .* got \[2, 19, 4, 16\]"),
    "out is float32": ({"out": to(torch.float32)}, "out must have the dtype of q, bfloat16, got float32"),
    "out is strided": ({"out": every_other_column}, "out must be contiguous in its last dimension"),
    "num_splits is negative": ({"num_splits": -1}, "num_splits must be 0 or more, got -1"),
    "cos lacks the last row": ({"cos": lambda x: x[:-1]}, r"cos must have at least chunk_size \+ 1 = 13 rows, got 12"),
    "local_size is chunk_size": ({"local_size": 12}, "local_size must lie in 1 .. chunk_size - 1, got 12"),
    "scale is 0": ({"scale": 0.0}, "scale must be positive and finite, got 0"),
    "temperature is nan": ({"temperature": math.nan}, "temperature must be positive and finite, got nan"),
    "temperature has 3 elements": (
        {"temperature": lambda x: torch.ones(3, device=x.device)},
        "temperature must have one element per batch row, 2, got 3",
    ),
}


def test_the_unchanged_decode_call_is_good(device):
    values = decode_arguments(device)
    assert chunkattn.dca_with_kvcache(**values) is values["out"]
    chunkattn.dca_with_kvcache(**without_pages(values))


@pytest.mark.parametrize("name", BAD_DECODE_CALLS)
def test_bad_decode_calls(device, name):
    edits, message = BAD_DECODE_CALLS[name]
    values = {"k_scale": None, "v_scale": None, **decode_arguments(device)}
    with pytest.raises(REFUSALS, match=message):
        chunkattn.dca_with_kvcache(**changed(values, edits))
    assert values["k_cache"].isnan().all()


BAD_FLOAT8_CALLS = {
    "k_scale is float64": ({"k_scale": lambda x: torch.ones(2, dtype=torch.float64)}, "k_scale must be float32"),
    "k_scale has 3 elements": ({"k_scale": lambda x: torch.ones(3)}, "k_scale must have one element per KV head, 2"),
    "v_scale has 2 dimensions": ({"v_scale": lambda x: torch.ones(2, 1)}, "v_scale must have 1 dimensions"),
    "v_scale is strided": ({"v_scale": lambda x: torch.ones(4)[::2]}, "v_scale must be contiguous"),
}


@pytest.mark.parametrize("name", BAD_FLOAT8_CALLS)
def test_bad_float8_decode_calls(device, name):
    edits, message = BAD_FLOAT8_CALLS[name]
    values = changed(decode_arguments(device), {"k_cache": to_float8, "v_cache": to_float8})
    edits = {name: edit(None).to(device) for name, edit in edits.items()}
    chunkattn.dca_with_kvcache(**values, k_scale=torch.ones(2, device=device))
    with pytest.raises(REFUSALS, match=message):
        chunkattn.dca_with_kvcache(**{**values, **edits})


def test_float8_cache_and_float64():
    values = changed(decode_arguments(torch.device("cpu")), {"k_cache": to_float8, "v_cache": to_float8})
    values = changed(values, {name: to(torch.float64) for name in ("q", "k", "v", "out")})
    with pytest.raises(ValueError, match="q must be float32, bfloat16 or float16 with a float8_e4m3fn cache"):
        chunkattn.dca_with_kvcache(**values)


BAD_CONTENTS = {
    "length beyond the capacity": (
        {"cache_seqlens": lambda x: x + torch.tensor([0, 24], dtype=torch.int32)},
        r"cache_seqlens\[1\] must lie in 0 .. 44, the capacity 64 less 20 new tokens, got 52",
    ),
    "negative length": ({"cache_seqlens": lambda x: x - 6}, r"cache_seqlens\[0\] must lie in 0 .. 44, .* got -1"),
    "negative page": (
        {"block_table": lambda x: x.index_fill(1, torch.tensor(1), -1)},
        r"block_table\[0, 1\] must name one of 9 pages, got -1",
    ),
    "page beyond the pool": (
        {"block_table": lambda x: x.index_fill(1, torch.tensor(2), 9)},
        r"block_table\[1, 2\] must name one of 9 pages, got 9",
    ),
}


@pytest.mark.parametrize("name", BAD_CONTENTS)
def test_bad_contents_on_the_cpu(name):
    edits, message = BAD_CONTENTS[name]
    values = decode_arguments(torch.device("cpu"))
    with pytest.raises(ValueError, match=message):
        chunkattn.dca_with_kvcache(**changed(values, edits))
    assert values["k_cache"].isnan().all()


def test_bad_lengths_of_rows_on_the_cpu():
    values = without_pages(decode_arguments(torch.device("cpu")))
    for seqlens in ((0, 29), (-1, 0), (2**31 - 1, 0)):
        with pytest.raises(ValueError, match=r"cache_seqlens\[.\] must lie in 0 .. 28, the capacity 48 less 20 new"):
            chunkattn.dca_with_kvcache(**{**values, "cache_seqlens": lengths(torch.device("cpu"), *seqlens)})
    with pytest.raises(ValueError, match=r"must lie in 0 .. -48"):
        chunkattn.dca_with_kvcache(**{**values, **{n: values[n].repeat(1, 5, 1, 1)[:, :96] for n in "kv"}})


def test_bad_contents_on_cuda_stay_inside_the_cache(cuda):
    # Only the device knows: the call returns and the other sequence is right.
    for edit in (
        {"cache_seqlens": lambda x: x + torch.tensor([0, 2**30], dtype=torch.int32, device=cuda)},
        {"cache_seqlens": lambda x: x - torch.tensor([0, 2**30], dtype=torch.int32, device=cuda)},
        {"block_table": lambda x: torch.cat((x[:1], x[1:] + 2**30))},
        {"block_table": lambda x: torch.cat((x[:1], x[1:] - 2**30))},
    ):
        good, bad = decode_arguments(cuda), decode_arguments(cuda)
        expected = chunkattn.dca_with_kvcache(**good)
        out = chunkattn.dca_with_kvcache(**changed(bad, edit))
        torch.cuda.synchronize()
        assert torch.equal(out[0], expected[0])


@pytest.mark.parametrize(
    "name", ["k_cache", "v_cache", "cos", "cache_seqlens", "block_table", "k", "temperature", "out"]
)
def test_decode_tensors_of_another_device(device, name):
    values = decode_arguments(device)
    with pytest.raises(ValueError, match=f"{name} must be on the device of q, {device}.*, got meta"):
        chunkattn.dca_with_kvcache(**changed(values, {name: lambda x: x.to("meta")}))


@pytest.mark.parametrize("name", ["q", "k_cache", "k", "cos", "out"])
def test_decode_has_no_gradients(device, name):
    values = decode_arguments(device)
    values[name].requires_grad_()
    with pytest.raises(NotImplementedError, match=f"{name} requires grad, but there is no backward through the cache"):
        chunkattn.dca_with_kvcache(**values)
    with torch.no_grad():
        chunkattn.dca_with_kvcache(**values)


SELECT_MERGE_CASE = SelectMergeCase(21, 2, 4, 2, 8)  # 11 regions in 4 groups


def select_merge_arguments(device):
    skip_without_kernels(device, "select", "select_merge", "select_merge_backward")
    q, k, v = SELECT_MERGE_CASE.inputs(torch.bfloat16, 3, device)
    return {"q": q, "k": k, "v": v, **SELECT_MERGE_CASE.options()}


def region_ids(*shape):
    return torch.zeros(shape, dtype=torch.int32)


LARGEST = (1 << 31) - 1

BAD_SELECTIONS = {
    "q is None": ({"q": None}, "q must be a tensor, got NoneType"),
    "k is a list": ({"k": [1.0]}, "k must be a tensor, got list"),
    "q has 3 dimensions": ({"q": lambda x: x[0]}, r"q must have 4 dimensions .* got shape \[21, 4, 8\]"),
    "k has 5 dimensions": ({"k": lambda x: x[None]}, r"k must have 4 dimensions .* got shape \[1, 2, 21, 2, 8\]"),
    "q is int64": ({"q": to(torch.int64)}, "q must be .*float16.* got Long"),
    "k is float16": ({"k": to(torch.float16)}, "k must have the dtype of q, bfloat16, got float16"),
    "k is of another device": ({"k": to("meta")}, "k must be on the device of q, .*, got meta"),
    "k has another batch size": ({"k": lambda x: x[:1]}, "k must have the batch size of q, 2, got 1"),
    "k is shorter": ({"k": lambda x: x[:, 1:]}, "q must not be longer than k, got seqlen_q 21 and seqlen_k 20"),
    "k is longer": ({"q": lambda x: x[:, 1:]}, "k must have the length of q, 20, got 21"),
    "k has another head dim": ({"k": lambda x: x[..., 1:]}, "k must have the head dimension of q, 8, got 7"),
    "head dim 0": (
        {"q": lambda x: x[..., :0], "k": lambda x: x[..., :0]},
        "q must have a head dimension of at least 1",
    ),
    "heads are no multiple": ({"q": lambda x: x[:, :, :3]}, "q must have .* multiple of the heads of k, got 3 and 2"),
    "q's last dimension is strided": ({"q": every_other_column}, "q must be contiguous in its last .* got stride 2"),
    "k's last dimension is strided": ({"k": heads_last}, "k must be contiguous in its last .* got stride 2"),
    "region_size is 0": ({"region_size": 0}, r"region_size must lie in 1 .. 2\*\*31 - 1, got 0"),
    "region_size is a float": ({"region_size": 2.5}, "region_size"),
    "top_k is 0": ({"top_k": 0}, r"top_k must lie in 1 .. 2\*\*31 - 1, got 0"),
    "top_k is 2**31": ({"top_k": HUGE}, r"top_k must lie in 1 .. 2\*\*31 - 1, got 2147483648"),
    "merge is negative": ({"merge": -1}, r"merge must lie in 1 .. 2\*\*31 - 1, got -1"),
    "merge is 2**31": ({"merge": HUGE}, r"merge must lie in 1 .. 2\*\*31 - 1, got 2147483648"),
    "merge is None": ({"merge": None}, "merge"),
    "eligibility is unknown": ({"eligibility": "rows"}, "eligibility must be 'group' or 'row', got 'rows'"),
    "selection is unknown": ({"selection": "query"}, "selection must be 'lookahead' or 'causal', got 'query'"),
    "heads is unknown": ({"heads": ""}, "heads must be 'kv' or 'q', got ''"),
    "heads is None": ({"heads": None}, "heads"),
}

BAD_SELECT_MERGES = {
    "v is None": ({"v": None}, "v must be a tensor, got NoneType"),
    "v is shorter": ({"v": lambda x: x[:, 1:]}, r"v must have the shape of k, .* got \[2, 20, 2, 8\]"),
    "v is float32": ({"v": to(torch.float32)}, "v must have the dtype of q, bfloat16, got float32"),
    "v is of another device": ({"v": to("meta")}, "v must be on the device of q, .*, got meta"),
    "v's last dimension is strided": ({"v": every_other_column}, "v must be contiguous in its last .* got stride 2"),
    "scale is 0": ({"scale": 0.0}, "scale must be positive and finite, got 0"),
    "scale is nan": ({"scale": math.nan}, "scale must be positive and finite, got nan"),
    "select_q is a number": ({"select_q": 1}, "select_q must be a tensor, got int"),
    "select_q has the heads of k": (
        {"select_q": torch.zeros(2, 21, 2, 8)},
        r"select_q must have the shape of q, \[2, 21, 4, 8\], got \[2, 21, 2, 8\]",
    ),
    "select_k is float32": (
        {"select_k": torch.zeros(2, 21, 2, 8)},
        "select_k must have the dtype of k, torch.bfloat16, got torch.float32",
    ),
    "select_k is of another device": (
        {"select_k": torch.zeros(2, 21, 2, 8, dtype=torch.bfloat16, device="meta")},
        "select_k must have the device of k, .*, got meta",
    ),
}

BAD_INDICES = {
    "indices is a list": ({"indices": [[0]]}, "indices must be a tensor, got list"),
    "indices is int64": ({"indices": region_ids(2, 2, 4, 3).long()}, "indices must be int32, got Long"),
    "indices is float32": ({"indices": region_ids(2, 2, 4, 3).float()}, "indices must be int32, got float32"),
    "indices has 3 dimensions": ({"indices": region_ids(2, 2, 4)}, r"indices must have 4 dim.* got shape \[2, 2, 4\]"),
    "indices lacks a group": (
        {"indices": region_ids(2, 2, 3, 3)},
        r"indices must have shape \[2, 2 or 4, 4, any\], got \[2, 2, 3, 3\]",
    ),
    "indices has another batch size": (
        {"indices": region_ids(1, 2, 4, 3)},
        r"indices must have shape .* got \[1, 2, 4,",
    ),
    "indices is of query heads": (
        {"indices": region_ids(2, 4, 4, 3)},
        r"indices must have a list for each head of k, 2, with heads='kv', got shape \[2, 4, 4, 3\]",
    ),
    "indices is of KV heads": (
        {"indices": region_ids(2, 2, 4, 3), "heads": "q"},
        r"indices must have a list for each head of q, 4, with heads='q', got shape \[2, 2, 4, 3\]",
    ),
    "region_size is 0": ({"indices": region_ids(2, 2, 4, 3), "region_size": 0}, "region_size must lie in .* got 0"),
    "merge is 2**31": ({"indices": region_ids(2, 2, 4, 3), "merge": HUGE}, "merge must lie in .* got 2147483648"),
    "heads is unknown": ({"indices": region_ids(2, 2, 4, 3), "heads": "k"}, "heads must be 'kv' or 'q', got 'k'"),
}


@pytest.mark.parametrize("name", BAD_SELECTIONS)
def test_bad_selections(device, name):
    edits, message = BAD_SELECTIONS[name]
    values = changed(select_merge_arguments(device), edits)
    with pytest.raises(REFUSALS, match=message):
        chunkattn.select_merge(**values)
    del values["v"]
    with pytest.raises(REFUSALS, match=message):
        chunkattn.select(**values)


@pytest.mark.parametrize("name", BAD_SELECT_MERGES)
def test_bad_select_merge_calls(device, name):
    edits, message = BAD_SELECT_MERGES[name]
    with pytest.raises(REFUSALS, match=message):
        chunkattn.select_merge(**changed(select_merge_arguments(device), edits))


@pytest.mark.parametrize("name", BAD_INDICES)
def test_bad_indices(device, name):
    edits, message = BAD_INDICES[name]
    ids = edits["indices"]
    edits = edits | {"indices": ids.to(device) if isinstance(ids, torch.Tensor) else ids}
    with pytest.raises(REFUSALS, match=message):
        chunkattn.select_merge(**(select_merge_arguments(device) | edits))


def select_merge_operator_arguments(device):
    q, k, v = (select_merge_arguments(device)[name] for name in "qkv")
    return {"q": q, "k": k, "v": v, "indices": region_ids(2, 2, 4, 3).to(device), "region_size": 2, "merge": 3}


def test_select_merge_operator_refuses(device):
    values = select_merge_operator_arguments(device)
    for name in ("k", "v", "indices"):
        with pytest.raises(ValueError, match=f"{name} must be a tensor, got None"):
            torch.ops.chunkattn.select_merge(**(values | {name: None}))
    for edits, message in (
        ({"indices": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3)}, "indices must be contiguous"),
        ({"indices": lambda x: x[:, :1]}, r"indices must have shape \[2, 2 or 4, 4, any\], got \[2, 1, 4, 3\]"),
        ({"indices": to("meta")}, "indices must be on the device of q, .*, got meta"),
    ):
        with pytest.raises(ValueError, match=message):
            torch.ops.chunkattn.select_merge(**changed(values, edits))


SELECT_MERGE_BACKWARD_CALLS = {
    name: BAD_BACKWARD_CALLS[name]
    for name in (
        "dout is float32",
        "dout is strided",
        "dout is expanded",
        "dout is of another device",
        "out is float16",
        "softmax_lse is float64",
        "softmax_lse is strided",
        "softmax_lse has 2 dimensions",
        "q is int64",
        "k has another batch size",
    )
} | {
    "dout has another shape": ({"dout": lambda x: x[:, 1:]}, r"dout must have the shape of q, .* got \[2, 20, 4, 8\]"),
    "indices is int64": ({"indices": to(torch.int64)}, "indices must be int32, got Long"),
    "scale is negative": ({"scale": -1.0}, "scale must be positive and finite, got -1"),
    "region_size is 2**31": ({"region_size": HUGE}, "region_size must lie in .* got 2147483648"),
}


@pytest.mark.parametrize("name", SELECT_MERGE_BACKWARD_CALLS)
def test_bad_select_merge_backward_calls(device, name):
    edits, message = SELECT_MERGE_BACKWARD_CALLS[name]
    values = select_merge_operator_arguments(device)
    out, softmax_lse = torch.ops.chunkattn.select_merge(**values)
    values |= {"dout": torch.ones_like(out), "out": out, "softmax_lse": softmax_lse}
    torch.ops.chunkattn.select_merge_backward(**values)
    with pytest.raises(REFUSALS, match=message):
        torch.ops.chunkattn.select_merge_backward(**changed(values, edits))


def test_debugging_reports_ids_that_are_ignored(device, monkeypatch):
    values = select_merge_operator_arguments(device)
    good = torch.tensor([[-1, -1, -1], [0, 2, -1], [5, 0, 0], [8, -1, 1]], dtype=torch.int32, device=device)
    ids = good.repeat(2, 2, 1, 1)
    values["indices"] = ids
    expected = torch.ops.chunkattn.select_merge(**values)[0]
    monkeypatch.setenv("CHUNKATTN_DEBUG", "1")
    assert torch.equal(torch.ops.chunkattn.select_merge(**values)[0], expected)

    ids[1, 0, 2, 1] = 6  # of the group itself
    rule = "indices must hold -1 and ids of regions before their group, got"
    with pytest.raises(ValueError, match=rf"{rule} 1 other, 6 at \[1, 0, 2, 1\], whose group begins at region 6"):
        torch.ops.chunkattn.select_merge(**values)
    ids[1, 1, 3, 2] = LARGEST
    ids[0, 1, 0, 0] = 0
    ids[1, 1, 1, 0] = -2
    message = rf"{rule} 4 others, first 0 at \[0, 1, 0, 0\], whose group begins at region 0"
    with pytest.raises(ValueError, match=message):
        torch.ops.chunkattn.select_merge(**values)
    with pytest.raises(ValueError, match=message):
        chunkattn.select_merge(**(select_merge_arguments(device) | {"indices": ids}))
    monkeypatch.setenv("CHUNKATTN_DEBUG", "0")
    torch.ops.chunkattn.select_merge(**values)


def cache_arguments(device, **options):
    """A cache for 64 tokens that has 30, and rows of 5."""
    skip_without_kernels(device, "select_merge_with_kvcache")
    options = {"region_size": 4, "top_k": 3, "merge": 2, "dtype": torch.bfloat16, "device": device} | options
    cache = chunkattn.SelectMergeCache(2, 2, 8, 64, **options)
    q, k, v = SelectMergeCase(35, 2, 4, 2, 8).inputs(torch.bfloat16, 3, device)
    cache.append(q[:, :30], k[:, :30], v[:, :30])
    return cache, {"q": q[:, 30:], "k": k[:, 30:], "v": v[:, 30:]}


BAD_STEPS = {
    "q is None": ({"q": None}, "q must be a tensor, got NoneType"),
    "v is a list": ({"v": lambda x: x.tolist()}, "v must be a tensor, got list"),
    "q has 3 dimensions": ({"q": lambda x: x[0]}, r"q must have 4 dimensions .* got shape \[5, 4, 8\]"),
    "q is float16": ({"q": to(torch.float16)}, "k must have the dtype of q, float16, got bfloat16"),
    "all are float16": (
        {name: to(torch.float16) for name in ("q", "k", "v")},
        "k_cache must have the dtype of q, float16, got bfloat16",
    ),
    "q is longer": (
        {"k": lambda x: x[:, 1:], "v": lambda x: x[:, 1:]},
        "q must not be longer than k, got .* 5 and .* 4",
    ),
    "k is longer": ({"q": lambda x: x[:, 1:]}, "k must have the length of q, 4, got 5"),
    "k has 1 head": (
        {"k": lambda x: x[:, :, :1], "v": lambda x: x[:, :, :1]},
        "k must have the heads of k_cache, 2, got 1",
    ),
    "q has 3 heads": ({"q": lambda x: x[:, :, :3]}, "q must have .* multiple of the heads of k, got 3 and 2"),
    "q has 1 row": ({"q": lambda x: x[:1]}, "k must have the batch size of q, 1, got 2"),
    "all have 1 row": (
        {name: lambda x: x[:1] for name in ("q", "k", "v")},
        "seqlens must have the batch size of q, 1, got 2",
    ),
    "head dim 7": (
        {name: lambda x: x[..., :7] for name in ("q", "k", "v")},
        "k_cache must have the head dimension of q, 7, got 8",
    ),
    "v has another shape": ({"v": lambda x: x[:, 1:]}, r"v must have the shape of k, .* got \[2, 4, 2, 8\]"),
    "q is strided": ({"q": every_other_column}, "q must be contiguous in its last .* got stride 2"),
    "select_q has the heads of k": (
        {"select_q": torch.zeros(2, 5, 2, 8)},
        r"select_q must have the shape of q, \[2, 5, 4, 8\], got \[2, 5, 2, 8\]",
    ),
    "select_k is float32": (
        {"select_k": torch.zeros(2, 5, 2, 8)},
        "select_k must have the dtype of k, torch.bfloat16, got torch.float32",
    ),
    "new_seqlens is a number": ({"new_seqlens": 3}, "new_seqlens must be a tensor, got int"),
    "new_seqlens is int64": ({"new_seqlens": torch.tensor([1, 2])}, "new_seqlens must be int32, got Long"),
    "new_seqlens has 3 elements": (
        {"new_seqlens": torch.ones(3, dtype=torch.int32)},
        "new_seqlens must have the batch size of q, 2, got 3",
    ),
    "scale is 0": ({"scale": 0.0}, "scale must be positive and finite, got 0"),
    "out has another shape": (
        {"out": torch.zeros(2, 4, 4, 8, dtype=torch.bfloat16)},
        r"out must have the shape of q, .* got \[2, 4, 4, 8\]",
    ),
    "out is float32": ({"out": torch.zeros(2, 5, 4, 8)}, "out must have the dtype of q, bfloat16, got float32"),
}

BAD_CACHES = {
    "seqlens is int64": ({"seqlens": to(torch.int64)}, "seqlens must be int32, got Long"),
    "indices is int64": ({"indices": to(torch.int64)}, "indices must be int32, got Long"),
    "indices has 3 heads": (
        {"indices": lambda x: x[:, :1].repeat(1, 3, 1)},
        "indices must have a list for each of 2 KV heads or 4 query heads",
    ),
    "indices is strided": ({"indices": every_other_column}, "indices must be contiguous"),
    "k is strided": ({"k": every_other_column}, "k_cache must be contiguous in its last dimension"),
    "v is shorter": ({"v": lambda x: x[:, 1:]}, "v_cache must have the shape of k_cache"),
    "region_sums is bfloat16": ({"region_sums": to(torch.bfloat16)}, "region_sums must be float32 .* got bfloat16"),
    "region_sums lacks a region": (
        {"region_sums": lambda x: x[:, :, 1:].contiguous()},
        r"region_sums must have shape \[2, 2, 16, 8\], got \[2, 2, 15, 8\]",
    ),
    "query_sums lacks a head": (
        {"query_sums": lambda x: x[:, 1:].contiguous()},
        r"query_sums must have shape \[2, 2, 2, 8\], got \[2, 1, 2, 8\]",
    ),
    "query_sums is strided": ({"query_sums": every_other_column}, "query_sums must be contiguous"),
    "capacity is larger": ({"capacity": 65}, "capacity must lie in 0 .. 64, the rows of a sequence, .* got 65"),
    "region_size is 0": ({"region_size": 0}, r"region_size must lie in 1 .. 2\*\*31 - 1, got 0"),
    "merge is another": ({"merge": 3}, r"query_sums must have shape \[2, 2, 3, 8\], got \[2, 2, 2, 8\]"),
    "selection is another": ({"selection": "query"}, r"query_sums must have shape \[2, 2, 0, 8\], got"),
    "eligibility is unknown": ({"eligibility": "rows"}, "eligibility must be 'group' or 'row', got 'rows'"),
    "block_table is int64": ({"block_table": torch.zeros(2, 1).long()}, "block_table must be int32, got Long"),
}

BAD_CACHE_OPTIONS = {
    "region_size is 0": ({"region_size": 0}, "region_size must be at least 1, got 0"),
    "top_k is a float": ({"top_k": 2.5}, "top_k must be an int, got 2.5"),
    "merge is 2**31": ({"merge": HUGE}, r"merge must be below 2\*\*31, got 2147483648"),
    "eligibility is unknown": ({"eligibility": "rows"}, "eligibility must be 'group' or 'row', got 'rows'"),
    "selection is unknown": ({"selection": "lookahead"}, "selection must be 'causal' or 'query', got 'lookahead'"),
    "heads is unknown": ({"heads": ""}, "heads must be 'kv' or 'q', got ''"),
    "query_heads are missing": ({"heads": "q"}, "query_heads must be given with heads='q', got None"),
    "query_heads are no multiple": (
        {"heads": "q", "query_heads": 3},
        "query_heads must be a multiple of kv_heads, 2, got 3",
    ),
    "num_pages without pages": ({"num_pages": 3}, "num_pages must be None without page_size, got int"),
    "a page cuts a region": ({"page_size": 6}, "page_size must be a multiple of region_size, 4, got 6"),
    "too few pages": ({"page_size": 8, "num_pages": 15}, "num_pages must be at least 16, 8 for each .* got 15"),
    "block_table is int64": (
        {"page_size": 8, "block_table": torch.zeros(2, 8).long()},
        r"block_table must be int32 of shape \[2, 8\], got torch.int64 of shape \[2, 8\]",
    ),
    "block_table is narrow": (
        {"page_size": 8, "block_table": torch.zeros(2, 7, dtype=torch.int32)},
        r"block_table must be int32 of shape \[2, 8\], got torch.int32 of shape \[2, 7\]",
    ),
}


def on_device(edits, device):
    return {name: edit.to(device) if isinstance(edit, torch.Tensor) else edit for name, edit in edits.items()}


def contents(cache):
    tensors = (cache.k, cache.v, cache.region_sums, cache.query_sums, cache.indices, cache.seqlens)
    return [x.clone() for x in tensors]


@pytest.mark.parametrize("name", BAD_STEPS)
def test_bad_steps(device, name):
    edits, message = BAD_STEPS[name]
    cache, values = cache_arguments(device)
    before = contents(cache)
    with pytest.raises(REFUSALS, match=message):
        cache.attend(**changed(values, on_device(edits, device)))
    assert all(map(torch.equal, before, contents(cache)))
    cache.attend(**values)


@pytest.mark.parametrize("name", BAD_CACHES)
def test_bad_caches(device, name):
    edits, message = BAD_CACHES[name]
    cache, values = cache_arguments(device)
    for attribute, edit in on_device(edits, device).items():
        setattr(cache, attribute, edit(getattr(cache, attribute)) if callable(edit) else edit)
    with pytest.raises(REFUSALS, match=message):
        cache.attend(**values)
    with pytest.raises(REFUSALS, match=message):
        cache.append(**values)


@pytest.mark.parametrize("name", BAD_CACHE_OPTIONS)
def test_bad_cache_options(name):
    edits, message = BAD_CACHE_OPTIONS[name]
    with pytest.raises(REFUSALS, match=message):
        cache_arguments(torch.device("cpu"), **edits)


@pytest.mark.parametrize("page_size", [None, 8])
def test_bad_cache_contents_on_the_cpu(page_size):
    for edit, message in (
        (lambda c: c.seqlens.__setitem__(1, 60), r"seqlens\[1\] must lie in 0 .. 59, the capacity 64 less 5 .* got 60"),
        (lambda c: c.seqlens.__setitem__(0, -1), r"seqlens\[0\] must lie in 0 .. 59, .* got -1"),
    ):
        cache, values = cache_arguments(torch.device("cpu"), page_size=page_size)
        edit(cache)
        before = contents(cache)
        with pytest.raises(ValueError, match=message):
            cache.attend(**values)
        assert all(map(torch.equal, before, contents(cache)))
    cache, values = cache_arguments(torch.device("cpu"), page_size=page_size)
    with pytest.raises(ValueError, match=r"new_seqlens\[1\] must lie in 0 .. 5, the tokens of q, got 6"):
        cache.attend(**values, new_seqlens=torch.tensor([0, 6], dtype=torch.int32))
    if page_size is not None:
        cache.block_table[1, 4] = 16
        with pytest.raises(ValueError, match=r"block_table\[1, 4\] must name one of 16 pages, got 16"):
            cache.attend(**values)


def test_steps_on_another_device(device):
    cache, values = cache_arguments(device)
    for name in ("k", "v"):
        with pytest.raises(ValueError, match=f"{name} must be on the device of q, {device}.*, got meta"):
            cache.attend(**changed(values, {name: lambda x: x.to("meta")}))
    cache.region_sums = cache.region_sums.to("meta")
    with pytest.raises(ValueError, match=f"region_sums must be on the device of q, {device}.*, got meta"):
        cache.attend(**values)


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_steps_have_no_gradients(device, name):
    cache, values = cache_arguments(device)
    values[name] = values[name].clone().requires_grad_()
    with pytest.raises(NotImplementedError, match=f"{name} requires grad, but there is no backward through the cache"):
        cache.attend(**values)
    with torch.no_grad():
        cache.attend(**values)


def smallest_call(name, device):
    """Positional and keyword arguments of chunkattn.<name>."""
    shape = (8, 2, 4) if name == "dca_varlen" else (1, 8, 2, 4)
    q, k, v = (torch.empty(shape, dtype=torch.bfloat16, device=device) for _ in range(3))
    if name in ("select", "select_merge"):
        return ((q, k) if name == "select" else (q, k, v)), {}
    table = torch.empty(5, 2, device=device)
    options = {"cos": table, "sin": table, "chunk_size": 4, "local_size": 1}
    if name == "dca_with_kvcache":
        return (q, k, v), {**options, "cache_seqlens": 8}
    offsets = torch.empty(2, dtype=torch.int32, device=device)
    packing = {"cu_seqlens_q": offsets, "cu_seqlens_k": offsets, "max_seqlen_q": 8, "max_seqlen_k": 8}
    return (q, k, v), {**options, **packing}


@pytest.mark.parametrize("name", ["dca_varlen", "dca_with_kvcache", "select", "select_merge"])
def test_devices_without_kernels_are_refused(name):
    if torch._C._dispatch_has_kernel_for_dispatch_key(f"chunkattn::{name}", "CUDA"):
        pytest.skip("this build has kernels for CUDA")
    with FakeTensorMode():
        arguments, options = smallest_call(name, torch.device("cuda"))
        message = f"q is on cuda:0, but this build of chunkattn has kernels of {name} for the CPU only"
        with pytest.raises(NotImplementedError, match=message):
            getattr(chunkattn, name)(*arguments, **options)
