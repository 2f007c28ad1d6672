"""What torch needs to know about the operators beyond their kernels: shapes, gradients and autocast."""

from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor
from torch.library import Library, register_autograd, register_fake

from chunkattn import _ops  # noqa: F401  defines the operators

_library = Library("chunkattn", "FRAGMENT")


def check_gradients(wanted: Iterable[str]) -> None:
    """Raises NotImplementedError when autograd wants the gradient of an argument that has none."""
    for name in wanted:
        if name not in ("q", "k", "v"):
            raise NotImplementedError(
                f"chunkattn: {name} requires grad, but gradients exist for q, k and v only; detach it"
            )


def _check_devices(q: Tensor, **others: Tensor | None) -> None:
    """On real tensors the kernels check this; a meta tensor among them brings the call here instead."""
    for name, tensor in others.items():
        if tensor is not None and tensor.device != q.device:
            raise ValueError(f"chunkattn: {name} must be on the device of q, {q.device}, got {tensor.device}")


@register_fake("chunkattn::dca")
def _dca_fake(
    q, k, v, cos, sin, chunk_size, local_size, scale=None, temperature=None,
    interleaved=False, q_rotated=False, k_rotated=False, deterministic=False,
):  # fmt: skip
    _check_devices(q, k=k, v=v, cos=cos, sin=sin, temperature=temperature)
    batch, seqlen_q, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((batch, heads, seqlen_q), dtype=torch.float32)


@register_fake("chunkattn::dca_backward")
def _dca_backward_fake(
    dout, q, k, v, out, softmax_lse, cos, sin, chunk_size, local_size, scale=None, temperature=None,
    interleaved=False, q_rotated=False, k_rotated=False, deterministic=False,
):  # fmt: skip
    _check_devices(q, dout=dout, k=k, v=v, out=out, softmax_lse=softmax_lse, cos=cos, sin=sin, temperature=temperature)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


@register_fake("chunkattn::dca_varlen")
def _dca_varlen_fake(
    q, k, v, cos, sin, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, chunk_size, local_size, scale=None,
    temperature=None, interleaved=False, q_rotated=False, k_rotated=False, deterministic=False,
):  # fmt: skip
    _check_devices(
        q, k=k, v=v, cos=cos, sin=sin, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, temperature=temperature
    )
    rows, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((heads, rows), dtype=torch.float32)


@register_fake("chunkattn::dca_varlen_backward")
def _dca_varlen_backward_fake(dout, q, k, v, out, softmax_lse, cos, sin, cu_seqlens_q, cu_seqlens_k, *options):
    _check_devices(
        q, dout=dout, k=k, v=v, out=out, softmax_lse=softmax_lse, cos=cos, sin=sin, cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
    )  # fmt: skip
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


@register_fake("chunkattn::dca_with_kvcache")
def _dca_with_kvcache_fake(
    q, k_cache, v_cache, cos, sin, cache_seqlens, chunk_size, local_size, block_table=None, k=None, v=None,
    k_scale=None, v_scale=None, num_splits=0, scale=None, temperature=None, interleaved=False, q_rotated=False,
):  # fmt: skip
    _check_devices(
        q, k_cache=k_cache, v_cache=v_cache, cos=cos, sin=sin, cache_seqlens=cache_seqlens, block_table=block_table,
        k=k, v=v, k_scale=k_scale, v_scale=v_scale, temperature=temperature,
    )  # fmt: skip
    batch, seqlen_q, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((batch, heads, seqlen_q), dtype=torch.float32)


@register_fake("chunkattn::dca_with_kvcache.out")
def _dca_with_kvcache_out_fake(q, *arguments):
    *arguments, out = arguments
    _check_devices(q, out=out)
    return _dca_with_kvcache_fake(q, *arguments)[1]


@register_fake("chunkattn::select")
def _select_fake(q, k, region_size, top_k, merge, eligibility="group", selection="lookahead", heads="kv"):
    _check_devices(q, k=k)
    # Sizes below 1 are for the kernels to refuse.
    groups = -(-q.shape[1] // max(1, region_size * merge))
    index_heads = q.shape[2] if heads == "q" else k.shape[2]
    return q.new_empty((q.shape[0], index_heads, groups, top_k), dtype=torch.int32)


@register_fake("chunkattn::select_merge")
def _select_merge_fake(q, k, v, indices, region_size, merge, scale=None, deterministic=False):
    _check_devices(q, k=k, v=v, indices=indices)
    batch, seqlen, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((batch, heads, seqlen), dtype=torch.float32)


@register_fake("chunkattn::select_merge_backward")
def _select_merge_backward_fake(
    dout, q, k, v, out, softmax_lse, indices, region_size, merge, scale=None, deterministic=False
):
    _check_devices(q, dout=dout, k=k, v=v, out=out, softmax_lse=softmax_lse, indices=indices)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


@register_fake("chunkattn::select_merge_append")
def _select_merge_append_fake(
    q, k, v, k_cache, v_cache, region_sums, query_sums, indices, seqlens, capacity, region_size, merge,
    eligibility="group", selection="causal", block_table=None, select_q=None, select_k=None, new_seqlens=None,
):  # fmt: skip
    _check_devices(
        q, k=k, v=v, k_cache=k_cache, v_cache=v_cache, region_sums=region_sums, query_sums=query_sums, indices=indices,
        seqlens=seqlens, block_table=block_table, select_q=select_q, select_k=select_k, new_seqlens=new_seqlens,
    )  # fmt: skip


@register_fake("chunkattn::select_merge_with_kvcache")
def _select_merge_with_kvcache_fake(
    q, k, v, k_cache, v_cache, region_sums, query_sums, indices, seqlens, capacity, region_size, merge,
    eligibility="group", selection="causal", block_table=None, select_q=None, select_k=None, new_seqlens=None,
    scale=None,
):  # fmt: skip
    _select_merge_append_fake(
        q, k, v, k_cache, v_cache, region_sums, query_sums, indices, seqlens, capacity, region_size, merge, eligibility,
        selection, block_table, select_q, select_k, new_seqlens,
    )  # fmt: skip
    batch, seqlen, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((batch, heads, seqlen), dtype=torch.float32)


@register_fake("chunkattn::select_merge_with_kvcache.out")
def _select_merge_with_kvcache_out_fake(q, *arguments):
    *arguments, out = arguments
    _check_devices(q, out=out)
    return _select_merge_with_kvcache_fake(q, *arguments)[1]


def _names(operator: str) -> list[str]:
    return [argument.name for argument in getattr(torch.ops.chunkattn, operator).default._schema.arguments]


def _setup_context(operator: str, ctx, inputs, output) -> None:
    # The function has asked before the launch; this is for direct calls of the operator.
    check_gradients(name for name, needed in zip(_names(operator), ctx.needs_input_grad, strict=False) if needed)
    out, softmax_lse = output
    ctx.mark_non_differentiable(softmax_lse)
    ctx.set_materialize_grads(False)
    ctx.are_tensors = [isinstance(argument, Tensor) for argument in inputs]
    ctx.others = [argument for argument in inputs if not isinstance(argument, Tensor)]
    ctx.save_for_backward(out, softmax_lse, *(argument for argument in inputs if isinstance(argument, Tensor)))


def _backward(operator: str, ctx, dout, _):
    """The operator's backward takes dout, q, k, v, out, softmax_lse, then what the operator takes after v."""
    if dout is None:
        return (None,) * len(ctx.needs_input_grad)
    if dout.stride(-1) != 1:  # expanded, as by sum()
        dout = dout.contiguous()
    out, softmax_lse, *tensors = ctx.saved_tensors
    tensors, others = iter(tensors), iter(ctx.others)
    q, k, v, *rest = [next(tensors if is_tensor else others) for is_tensor in ctx.are_tensors]
    grads = getattr(torch.ops.chunkattn, f"{operator}_backward")(dout, q, k, v, out, softmax_lse, *rest)
    return *grads, *(None for _ in ctx.needs_input_grad[3:])


def _refuse_double_backward(operator: str, ctx, *grads):
    raise NotImplementedError(
        f"chunkattn: {operator} has no second derivative; call backward without create_graph=True"
    )


for _operator in ("dca", "dca_varlen", "select_merge"):
    register_autograd(
        f"chunkattn::{_operator}", partial(_backward, _operator), setup_context=partial(_setup_context, _operator)
    )
    register_autograd(f"chunkattn::{_operator}_backward", partial(_refuse_double_backward, _operator))


def _autocast(operator: str, count: int, device_type: str):
    """The first `count` arguments, tensors, in the dtype of autocast; the others as they are."""

    def call(*arguments):
        dtype = torch.get_autocast_dtype(device_type)
        tensors = (_cast(tensor, device_type, dtype) for tensor in arguments[:count])
        with torch.autocast(device_type, enabled=False):
            return getattr(torch.ops.chunkattn, operator)(*tensors, *arguments[count:])

    return call


def _cast(tensor: Tensor, device_type: str, dtype: torch.dtype) -> Tensor:
    """As torch does for its own operators: float64 and tensors of other devices are left alone."""
    eligible = tensor.is_floating_point() and tensor.dtype != torch.float64 and tensor.device.type == device_type
    return tensor.to(dtype) if eligible else tensor


# Rotary tables and temperatures stay float32.
for _operator, _count in (("dca", 3), ("dca_varlen", 3), ("select", 2), ("select_merge", 3)):
    _library.impl(_operator, _autocast(_operator, _count, "cpu"), "AutocastCPU")
    _library.impl(_operator, _autocast(_operator, _count, "cuda"), "AutocastCUDA")
