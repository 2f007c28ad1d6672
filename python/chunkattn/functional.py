"""The public functions, on top of the operators."""

import math

import torch
from torch import Tensor

from chunkattn import _core
from chunkattn._registration import check_gradients

_HAS_CUDA_KERNELS = _core.build_info()["cuda"] is not None


def dca(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    chunk_size: int,
    local_size: int,
    scale: float | None = None,
    temperature: float | Tensor | None = None,
    interleaved: bool = False,
    q_rotated: bool = False,
    k_rotated: bool = False,
    deterministic: bool | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Dual Chunk Attention (arXiv 2402.17463): causal attention whose rotary positions never exceed chunk_size.

    With the stride c = chunk_size - local_size, a query at position i and a key at position j <= i lie
    ``i // c - j // c`` chunks apart. The key is rotated at row ``j % c``; the query at row ``i % c`` within a chunk, at
    ``min(i % c + c, chunk_size)`` for the chunk before and at ``min(2 * c - 1, chunk_size)`` for all earlier ones. One
    softmax runs over all of them. Queries are aligned to the end of the keys: query n of Sq has position Sk - Sq + n,
    which covers prefill, chunked prefill and decoding. For Sk <= c this is ordinary causal attention with RoPE.

    Args:
        q: [B, Sq, Hq, D].
        k, v: [B, Sk, Hkv, D], Sq <= Sk, Hq a multiple of Hkv. q, k and v share a dtype (CPU: float64, float32, bfloat16
            or float16; CUDA: bfloat16 or float16, D <= 256) and a device. Their last dimension is contiguous, other
            strides are free. Under autocast they are cast to its dtype; nothing else is.
        cos, sin: float32 [>= chunk_size + 1, rotary_dim / 2], see :func:`chunkattn.rope_table`. The first rotary_dim
            dimensions of each head are rotated, the others pass through.
        chunk_size: s of the paper.
        local_size: w of the paper, 0 < local_size < chunk_size.
        scale: factor of the logits, default 1 / sqrt(D).
        temperature: a further positive factor of the logits, one for all or float32 [B] for each sequence
            (Qwen2.5-1M, arXiv 2501.15383: ``max(1, 0.1 * ln(L / L_trained) + 1) ** 2``).
        interleaved: rotate pairs (2d, 2d + 1), as GPT-J, instead of (d, d + rotary_dim / 2), as NeoX.
        q_rotated: q arrives rotated at row ``i % c``.
        k_rotated: k arrives rotated at row ``j % c``.
        deterministic: make gradients repeat bit by bit, at some cost on CUDA, where dQ is otherwise summed in whatever
            order blocks finish; the output and the gradients on the CPU always do. None:
            ``torch.are_deterministic_algorithms_enabled()``.
        return_lse: also return the log-sum-exp of the logits.

    Returns:
        out [B, Sq, Hq, D], contiguous, in the dtype of q. With return_lse also lse, float32 [B, Hq, Sq], natural
        logarithm, not differentiable. Gradients flow to q, k and v.

    Raises:
        TypeError, ValueError: an argument is not what is listed above.
        NotImplementedError: this build has no kernels for the device, or a gradient is asked for that does not exist.
    """
    tensors = {"q": q, "k": k, "v": v, "cos": cos, "sin": sin}
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"chunkattn: {name} must be a tensor, got {type(tensor).__name__}")
    if isinstance(temperature, Tensor):
        tensors["temperature"] = temperature
    elif temperature is not None:
        if not 0 < temperature < math.inf:
            raise ValueError(f"chunkattn: temperature must be positive and finite, got {temperature}")
        if scale is None:
            scale = 1 / math.sqrt(max(1, q.shape[-1]))
        scale, temperature = scale * temperature, None
    if q.is_cuda and not _HAS_CUDA_KERNELS:
        raise NotImplementedError(
            f"chunkattn: q is on {q.device}, but this build of chunkattn has kernels for the CPU only; build it again "
            "with nvcc"
        )
    if torch.is_grad_enabled():
        check_gradients(name for name, tensor in tensors.items() if tensor.requires_grad)
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    out, lse = torch.ops.chunkattn.dca(
        q, k, v, cos, sin, chunk_size, local_size, scale, temperature, interleaved, q_rotated, k_rotated, deterministic
    )
    return (out, lse) if return_lse else out
