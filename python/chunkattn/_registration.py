"""What torch needs to know about the operators beyond their kernels: shapes, gradients and autocast."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.library import Library, register_autograd, register_fake

from chunkattn import _ops  # noqa: F401  defines the operators

_ARGUMENTS = ("q", "k", "v", "cos", "sin", "chunk_size", "local_size", "scale", "temperature")

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


def _readable(dout: Tensor) -> Tensor:
    """Gradients may be expanded, as by sum(): kernels read contiguous rows."""
    return dout if dout.stride(-1) == 1 else dout.contiguous()


def _dca_setup_context(ctx, inputs, output) -> None:
    q, k, v, cos, sin, chunk_size, local_size, scale, temperature, *flags = inputs
    # chunkattn.dca has asked before the launch; this is for direct calls of the operator.
    wanted = (name for name, needed in zip(_ARGUMENTS, ctx.needs_input_grad, strict=False) if needed)
    check_gradients(wanted)
    out, softmax_lse = output
    ctx.mark_non_differentiable(softmax_lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, out, softmax_lse, cos, sin, temperature)
    ctx.options = (chunk_size, local_size, scale), flags


def _dca_backward(ctx, dout, _):
    if dout is None:
        return (None,) * len(ctx.needs_input_grad)
    *tensors, temperature = ctx.saved_tensors
    sizes, flags = ctx.options
    grads = torch.ops.chunkattn.dca_backward(_readable(dout), *tensors, *sizes, temperature, *flags)
    return *grads, *(None for _ in ctx.needs_input_grad[3:])


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


def _select_merge_setup_context(ctx, inputs, output) -> None:
    q, k, v, indices, *ctx.options = inputs
    out, softmax_lse = output
    ctx.mark_non_differentiable(softmax_lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, out, softmax_lse, indices)


def _select_merge_backward(ctx, dout, _):
    if dout is None:
        return (None,) * len(ctx.needs_input_grad)
    grads = torch.ops.chunkattn.select_merge_backward(_readable(dout), *ctx.saved_tensors, *ctx.options)
    return *grads, *(None for _ in ctx.needs_input_grad[3:])


def _refuse_double_backward(operator: str):
    def backward(ctx, *grads):
        raise NotImplementedError(
            f"chunkattn: {operator} has no second derivative; call backward without create_graph=True"
        )

    return backward


register_autograd("chunkattn::dca", _dca_backward, setup_context=_dca_setup_context)
register_autograd("chunkattn::dca_backward", _refuse_double_backward("dca"))
register_autograd("chunkattn::select_merge", _select_merge_backward, setup_context=_select_merge_setup_context)
register_autograd("chunkattn::select_merge_backward", _refuse_double_backward("select_merge"))


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


# Of dca the table and the temperature stay float32.
for _operator, _count in (("dca", 3), ("select", 2), ("select_merge", 3)):
    _library.impl(_operator, _autocast(_operator, _count, "cpu"), "AutocastCPU")
    _library.impl(_operator, _autocast(_operator, _count, "cuda"), "AutocastCUDA")
