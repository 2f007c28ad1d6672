"""Calls of select and select_merge that are refused, as in test_bad_input.py."""

import math

import pytest
import torch
from bad_calls import BAD_BACKWARD_CALLS, HUGE, REFUSALS, changed, every_other_column, heads_last, smallest_call, to
from cases import skip_without_kernels
from select_merge_cases import SelectMergeCase
from torch._subclasses.fake_tensor import FakeTensorMode

import chunkattn

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


def test_select_merge_without_its_backward_is_refused_before_it_runs():
    if torch._C._dispatch_has_kernel_for_dispatch_key("chunkattn::select_merge_backward", "CUDA"):
        pytest.skip("this build has the backward for CUDA")
    with FakeTensorMode():
        arguments, options = smallest_call("select_merge", torch.device("cuda"))
        with pytest.raises(NotImplementedError, match=r"kernels of select_merge(_backward)? for the CPU only"):
            chunkattn.select_merge(*(x.requires_grad_() for x in arguments), **options)
