"""Calls of dca_with_kvcache that are refused, as in test_bad_input.py."""

import math

import pytest
import torch
from bad_calls import CASE, REFUSALS, changed, every_other_column, heads_last, to
from caches import FLOAT8, Layout, decode_options, lengths
from cases import skip_without_kernels

import chunkattn


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
    with device:
        edits = {name: edit(None) for name, edit in edits.items()}
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
        for values in good, bad:
            for name in "k_cache", "v_cache":
                values[name].copy_(torch.linspace(-1, 1, values[name].numel()).view_as(values[name]))
        expected = chunkattn.dca_with_kvcache(**good)
        out = chunkattn.dca_with_kvcache(**changed(bad, edit))
        torch.cuda.synchronize()
        assert expected.isfinite().all()
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
