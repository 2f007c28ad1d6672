"""Caches of select-and-merge attention, and steps over them, that are refused, as in test_bad_input.py."""

import pytest
import torch
from bad_calls import HUGE, REFUSALS, changed, every_other_column, to
from cases import skip_without_kernels
from select_merge_cases import SelectMergeCase

import chunkattn


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
