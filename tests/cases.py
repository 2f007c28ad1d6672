"""Inputs for the operators, and the comparison with the oracle that most tests make."""

from dataclasses import dataclass, fields, replace

import pytest
import torch
from tolerance import assert_within_rule
from torch import Tensor

import chunkattn

DTYPES = {
    "cpu": (torch.float64, torch.float32, torch.bfloat16, torch.float16),
    "cuda": (torch.bfloat16, torch.float16),
}


def dtypes(device: torch.device) -> tuple[torch.dtype, ...]:
    return DTYPES[device.type]


def skip_without_kernels(device: torch.device, *operators: str) -> torch.device:
    """Skips the test where this build lacks a kernel that it needs, and returns the device."""
    for operator in operators:
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"chunkattn::{operator}", device.type.upper()):
            pytest.skip(f"chunkattn has no kernels of {operator} for {device.type}")
    return device


@dataclass(frozen=True, repr=False)
class Case:
    """One call of dca. The defaults are small and meet every regime: c = 27, three and a half chunks."""

    seqlen_q: int = 95
    seqlen_k: int | None = None  # default: seqlen_q
    batch: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    rotary_dim: int | None = None  # default: head_dim, or one less if that is odd
    chunk_size: int = 40
    local_size: int = 13
    scale: float | None = None
    temperature: float | tuple[float, ...] | None = None
    interleaved: bool = False
    q_rotated: bool = False
    k_rotated: bool = False
    deterministic: bool = False

    def __repr__(self) -> str:
        """Names what differs from the defaults: the name of a parametrised test."""
        changed = (f for f in fields(self) if getattr(self, f.name) != f.default)
        return ",".join(f"{f.name}={getattr(self, f.name)}" for f in changed) or "default"

    @property
    def stride(self) -> int:
        return self.chunk_size - self.local_size

    def but(self, **changes) -> "Case":
        return replace(self, **changes)

    def inputs(self, device: torch.device, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v, standard normal, drawn in float64 on the CPU and rounded: the same numbers on every device."""
        generator = torch.Generator().manual_seed(seed)
        seqlen_k = self.seqlen_q if self.seqlen_k is None else self.seqlen_k
        q_shape = (self.batch, self.seqlen_q, self.heads, self.head_dim)
        k_shape = (self.batch, seqlen_k, self.kv_heads, self.head_dim)
        return tuple(
            torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)
            for shape in (q_shape, k_shape, k_shape)
        )

    def options(self, device: torch.device) -> dict:
        """The remaining arguments of chunkattn.dca, as keywords."""
        rotary_dim = self.head_dim // 2 * 2 if self.rotary_dim is None else self.rotary_dim
        cos, sin = chunkattn.rope_table(self.chunk_size, rotary_dim, device=device)
        temperature = self.temperature
        if isinstance(temperature, tuple):
            temperature = torch.tensor(temperature, device=device)
        return {
            "cos": cos,
            "sin": sin,
            "chunk_size": self.chunk_size,
            "local_size": self.local_size,
            "scale": self.scale,
            "temperature": temperature,
            "interleaved": self.interleaved,
            "q_rotated": self.q_rotated,
            "k_rotated": self.k_rotated,
            "deterministic": self.deterministic,
        }


def check_forward(qkv: tuple[Tensor, Tensor, Tensor], options: dict, attention: str = "dca") -> Tensor:
    """Calls chunkattn.<attention>, compares out and lse with the oracle, returns out."""
    function, reference = getattr(chunkattn, attention), getattr(chunkattn.reference, attention)
    out, lse = function(*qkv, **options, return_lse=True)
    q = qkv[0]
    assert out.dtype == q.dtype
    assert out.is_contiguous()
    assert lse.dtype == torch.float32
    assert lse.is_contiguous()
    oracle, oracle_lse = reference(*(x.double() for x in qkv), **options, return_lse=True)
    plain, plain_lse = reference(*qkv, **options, return_lse=True)
    assert_within_rule(out, oracle, plain, "out")
    # lse is float32, but its logits carry the rounding of q and k after their rotation.
    ulps = max(4.0, torch.finfo(q.dtype).eps / torch.finfo(torch.float32).eps / 2)
    assert_within_rule(lse, oracle_lse, plain_lse, "lse", ulps=ulps)
    return out


def gradients(function, qkv: tuple[Tensor, Tensor, Tensor], dout: Tensor, options: dict) -> tuple[Tensor, ...]:
    qkv = tuple(x.detach().requires_grad_() for x in qkv)
    return torch.autograd.grad(function(*qkv, **options), qkv, dout)


def _worse(a: Tensor, b: Tensor, oracle: Tensor) -> Tensor:
    """Whichever lies further from the oracle."""
    return max(a, b, key=lambda x: (x.double() - oracle).abs().max().item()) if oracle.numel() else a


def check_backward(
    qkv: tuple[Tensor, Tensor, Tensor], dout: Tensor, options: dict, attention: str = "dca"
) -> tuple[Tensor, ...]:
    """Calls chunkattn.<attention>, compares its gradients with the oracle's, returns them."""
    grads = gradients(getattr(chunkattn, attention), qkv, dout, options)
    check_gradients(grads, qkv, dout, options, attention)
    return grads


def check_gradients(
    grads: tuple[Tensor, ...], qkv: tuple[Tensor, Tensor, Tensor], dout: Tensor, options: dict, attention: str = "dca"
) -> None:
    """Compares gradients with those autograd finds for the oracle.

    The backward's formula takes delta = rowsum(dout * out) from the forward's output, which is rounded to the dtype of
    the inputs; autograd of the plain formula does not. What the rounding alone changes in the oracle's gradients counts
    as an error of the plain formula: a shift of delta is a gradient of the log-sum-exp.
    """
    reference = getattr(chunkattn.reference, attention)
    plain = gradients(reference, qkv, dout, options)
    exact_qkv = tuple(x.detach().double().requires_grad_() for x in qkv)
    exact_dout = dout.double()
    out, lse = reference(*exact_qkv, **options, return_lse=True)
    oracle = torch.autograd.grad(out, exact_qkv, exact_dout, retain_graph=True)
    shift = ((out - out.to(dout.dtype).double()) * exact_dout).sum(-1).transpose(1, 2).detach()
    rounded_out = torch.autograd.grad((out, lse), exact_qkv, (exact_dout, shift.to(lse.dtype)))
    for name, ours, exact, torchs, shifted, other in zip(
        ("dq", "dk", "dv"), grads, oracle, plain, rounded_out, (qkv[1], qkv[0], None), strict=True
    ):
        assert ours.dtype == dout.dtype
        terms = 1.0
        if other is not None and dout.numel() and torch.finfo(dout.dtype).bits >= 32:
            # dP - delta may cancel whatever was summed. 16-bit types sum in float32, far below their own ulps.
            terms = max(terms, _dlogits(out, exact_dout, options) * other.abs().max().item())
        assert_within_rule(ours, exact, _worse(torchs, shifted, exact), name, terms=terms)


def assert_same_gradients(ours, theirs) -> None:
    """dq but for one ulp, which another order of its float32 sum may round away, dk and dv bitwise."""
    dq, expected = ours[0].float(), theirs[0].float()
    summed = expected.abs().max() / 32  # what is left where terms cancel carries the noise of larger ones
    assert ((dq - expected).abs() <= torch.finfo(ours[0].dtype).eps * (expected.abs() + summed)).all()
    for a, b in zip(ours[1:], theirs[1:], strict=True):
        assert torch.equal(a, b)


def _dlogits(out: Tensor, dout: Tensor, options: dict) -> float:
    """Magnitude of the terms of delta, times what the logits are multiplied by."""
    scale = out.shape[-1] ** -0.5 if options.get("scale") is None else options["scale"]
    temperature = options.get("temperature")
    temperature = 1.0 if temperature is None else torch.as_tensor(temperature).max().item()
    return scale * temperature * (dout * out.detach()).norm(dim=-1).max().item()
