"""Runs the ops on small, varied problems and compares them with the oracle. Made to be run under compute-sanitizer:

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python tests/gpu/sanitize_sweep.py

Without torch's caching allocator every tensor is an allocation of its own, so that an access past its end is seen.
Inputs and expected outputs are made on the CPU: the ops' kernels are nearly all that runs on the device. There, every
problem runs on the kernels it takes by default and on the portable ones; every other one has its gradients summed in a
fixed order.
"""

import argparse
import sys
from dataclasses import dataclass, fields

import torch

import chunkattn
from chunkattn import reference


@dataclass(frozen=True)
class Problem:
    seq_q: int
    seq_k: int
    head_dim: int
    chunk_size: int
    local_size: int
    batch: int = 1
    heads: int = 2
    kv_heads: int = 2
    rotary_dim: int | None = None  # None: all of head_dim
    dtype: torch.dtype = torch.bfloat16
    layout: str = "bshd"
    interleaved: bool = False
    q_rotated: bool = False
    k_rotated: bool = False
    temperature: bool = False

    def __str__(self):
        values = {field.name: (getattr(self, field.name), field.default) for field in fields(self)}
        return " ".join(f"{name}={value}" for name, (value, default) in values.items() if value != default)


# layout bhsd: a transposed view. padded: rows longer than the head by one element, which no 16-byte access fits, and a
# first element off every alignment but the dtype's own.
PROBLEMS = [
    Problem(1, 1, 64, 32, 8),
    Problem(1, 300, 64, 96, 32),
    Problem(7, 7, 64, 5, 2),
    Problem(63, 63, 64, 96, 32),
    Problem(64, 64, 128, 96, 32),
    Problem(65, 65, 128, 96, 32),
    Problem(129, 129, 128, 64, 16, heads=4, kv_heads=1),
    Problem(200, 200, 256, 96, 32),
    Problem(257, 257, 64, 100, 37, batch=2, heads=6, kv_heads=2),
    Problem(320, 320, 128, 400, 16),
    Problem(300, 300, 128, 130, 129),
    Problem(300, 300, 128, 130, 1),
    Problem(150, 150, 64, 90, 80),
    Problem(33, 290, 128, 100, 36),
    Problem(100, 333, 256, 77, 13, heads=4, kv_heads=2),
    Problem(5, 260, 64, 64, 32, batch=3),
    Problem(128, 1000, 128, 300, 44),
    Problem(190, 190, 96, 64, 16),
    Problem(190, 190, 40, 64, 16),
    Problem(90, 90, 160, 64, 16, heads=4, kv_heads=2),
    Problem(90, 90, 72, 48, 16, rotary_dim=24),
    Problem(140, 140, 128, 96, 32, rotary_dim=64),
    Problem(140, 140, 64, 96, 32, rotary_dim=2),
    Problem(140, 140, 256, 96, 32, rotary_dim=64, interleaved=True),
    Problem(180, 180, 128, 96, 32, interleaved=True),
    Problem(180, 180, 128, 96, 32, layout="bhsd"),
    Problem(180, 180, 128, 96, 32, layout="padded"),
    Problem(70, 180, 64, 96, 32, layout="padded", heads=4, kv_heads=2, interleaved=True),
    Problem(180, 180, 256, 96, 32, layout="padded", dtype=torch.float16),
    Problem(180, 180, 128, 96, 32, dtype=torch.float16),
    Problem(180, 180, 64, 96, 32, q_rotated=True, k_rotated=True),
    Problem(60, 180, 128, 96, 32, batch=2, k_rotated=True, temperature=True),
    Problem(180, 180, 128, 96, 32, q_rotated=True, layout="padded"),
]


def place(x, layout, device):
    """Copies x [B, S, H, D] to the device with the strides of a layout."""
    batch, seq, heads, head_dim = x.shape
    if layout == "bhsd":
        return x.transpose(1, 2).contiguous().to(device).transpose(1, 2)
    if layout == "padded":
        rows = torch.full((batch, seq, heads, head_dim + 1), float("nan"), dtype=x.dtype)
        rows[..., 1:] = x
        return rows.to(device)[..., 1:]
    return x.to(device)


def make_inputs(problem, seed):
    """q, k, v, cos, sin on the CPU, and the keyword arguments of the op."""
    generator = torch.Generator().manual_seed(seed)
    q_size = (problem.batch, problem.seq_q, problem.heads, problem.head_dim)
    k_size = (problem.batch, problem.seq_k, problem.kv_heads, problem.head_dim)
    q, k, v = (torch.randn(size, generator=generator).to(problem.dtype) for size in (q_size, k_size, k_size))
    table = chunkattn.rope_table(problem.chunk_size, problem.rotary_dim or problem.head_dim, device="cpu")
    options = {
        name: getattr(problem, name) for name in ("chunk_size", "local_size", "interleaved", "q_rotated", "k_rotated")
    }
    if problem.temperature:
        options["temperature"] = torch.rand(problem.batch, generator=generator) + 0.5
    return (q, k, v, *table), options


NAMES = ("out", "lse", "dq", "dk", "dv")


def differentiate(function, qkv, dout, rest, options):
    """(out, lse, dq, dk, dv) of the op or of the oracle."""
    qkv = tuple(x.requires_grad_() for x in qkv)
    out, lse = function(*qkv, *rest, **options, return_lse=True)
    return out.detach(), lse.detach(), *torch.autograd.grad(out, qkv, dout)


def expect(problem, tensors, dout, options):
    """(out, lse, dq, dk and dv in float64, the tolerance of each)."""
    double = tuple(x.double() for x in tensors[:3])
    expected = differentiate(reference.dca, double, dout.double(), tensors[3:], options)
    plain = differentiate(reference.dca, tuple(x.clone() for x in tensors[:3]), dout, tensors[3:], options)
    # FlashAttention's rule: at most twice the error of plain torch in the same dtype, and a rounding.
    rounding = torch.finfo(problem.dtype).eps
    errors = [(low.double() - want).abs().max().item() for low, want in zip(plain, expected, strict=True)]
    sizes = [max(1.0, want.abs().max().item()) for want in expected]
    return expected, [2 * error + rounding * size for error, size in zip(errors, sizes, strict=True)]


def run(problem, tensors, dout, options, device):
    """(out, lse, dq, dk, dv) of the op."""
    qkv, rest = [place(x, problem.layout, device) for x in tensors[:3]], [x.to(device) for x in tensors[3:]]
    if problem.temperature:
        options = options | {"temperature": options["temperature"].to(device)}
    return differentiate(chunkattn.dca, qkv, place(dout, problem.layout, device), rest, options)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    device = torch.device(parser.parse_args(argv).device)
    kernels = ["auto", "portable"] if device.type == "cuda" else ["cpu"]
    wrong = 0
    for seed, problem in enumerate(PROBLEMS):
        tensors, options = make_inputs(problem, seed)
        dout = torch.randn(tensors[0].shape, generator=torch.Generator().manual_seed(~seed)).to(problem.dtype)
        expected, tolerances = expect(problem, tensors, dout, options)
        options["deterministic"] = seed % 2 == 1
        for kernel in kernels:
            if device.type == "cuda":
                torch.ops.chunkattn.force_kernel(kernel)
            found = run(problem, tensors, dout, options, device)
            errors = [(got.cpu().double() - want).abs().max().item() for got, want in zip(found, expected, strict=True)]
            good = all(error <= tolerance for error, tolerance in zip(errors, tolerances, strict=True))
            wrong += not good
            figures = ", ".join(
                f"{name} {error:.1e} of {tolerance:.1e}"
                for name, error, tolerance in zip(NAMES, errors, tolerances, strict=True)
            )
            print(f"{'ok' if good else 'WRONG'} {kernel}: {figures}: {problem}", flush=True)
    print(f"{len(PROBLEMS)} problems, {wrong} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
