"""What torch needs to know about the operators beyond their kernels: shapes, gradients and autocast."""

from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor
from torch.library import Library, register_autograd, register_fake

from chunkattn import _ops  # noqa: F401  defines the operators

_ARGUMENTS = ("q", "k", "v", "cos", "sin", "chunk_size", "local_size", "scale", "temperature")
_VARLEN_ARGUMENTS = (*_ARGUMENTS[:5], "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", *_ARGUMENTS[5:])

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


def _setup_context(names: tuple[str, ...], ctx, inputs, output) -> None:
    """names: of the arguments in the order of the operator, up to the temperature; the flags follow."""
    # The function has asked before the launch; this is for direct calls of the operator.
    wanted = (name for name, needed in zip(names, ctx.needs_input_grad, strict=False) if needed)
    check_gradients(wanted)
    out, softmax_lse = output
    ctx.mark_non_differentiable(softmax_lse)
    ctx.set_materialize_grads(False)
    q, k, v, *middle, temperature = inputs[: len(names)]
    tensors = [argument for argument in middle if isinstance(argument, Tensor)]
    ctx.save_for_backward(q, k, v, out, softmax_lse, *tensors, temperature)
    ctx.options = middle[len(tensors) :], inputs[len(names) :]


def _backward(operator, ctx, dout, _):
    if dout is None:
        return (None,) * len(ctx.needs_input_grad)
    *tensors, temperature = ctx.saved_tensors
    sizes, flags = ctx.options
    if dout.stride(-1) != 1:  # expanded, as by sum()
        dout = dout.contiguous()
    grads = operator(dout, *tensors, *sizes, temperature, *flags)
    return *grads, *(None for _ in ctx.needs_input_grad[3:])


def _dca_double_backward(ctx, *grads):
    raise NotImplementedError("chunkattn: dca has no second derivative; call backward without create_graph=True")


for _name, _names in (("dca", _ARGUMENTS), ("dca_varlen", _VARLEN_ARGUMENTS)):
    register_autograd(
        f"chunkattn::{_name}",
        partial(_backward, getattr(torch.ops.chunkattn, f"{_name}_backward")),
        setup_context=partial(_setup_context, _names),
    )
    register_autograd(f"chunkattn::{_name}_backward", _dca_double_backward)


def _autocast(operator, device_type: str):
    """q, k and v in the dtype of autocast; the table and the temperature stay float32."""

    def cast_and_call(q, k, v, *rest):
        dtype = torch.get_autocast_dtype(device_type)
        with torch.autocast(device_type, enabled=False):
            return operator(*(_cast(tensor, device_type, dtype) for tensor in (q, k, v)), *rest)

    return cast_and_call


def _cast(tensor: Tensor, device_type: str, dtype: torch.dtype) -> Tensor:
    """As torch does for its own operators: float64 and tensors of other devices are left alone."""
    eligible = tensor.is_floating_point() and tensor.dtype != torch.float64 and tensor.device.type == device_type
    return tensor.to(dtype) if eligible else tensor


for _name in ("dca", "dca_varlen"):
    for _device_type, _key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
        _library.impl(_name, _autocast(getattr(torch.ops.chunkattn, _name), _device_type), _key)
