"""``python -m chunkattn info``: what is installed, what it was compiled for, and which kernel a shape takes."""

from __future__ import annotations

import argparse
import platform
import shutil
import subprocess
from collections.abc import Callable, Iterator

import torch

from chunkattn import _core

DTYPES = ("bfloat16", "float16", "float32", "float64")
CUDA_DTYPES = ("bfloat16", "float16")

Row = tuple[str, str]


def positive(text: str) -> int:
    """An argument that counts something."""
    value = int(text) if text.isdigit() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}; it takes a number from 1 on")
    return value


def device_capability(text: str) -> int:
    """ "9.0" or "90" as 90."""
    digits = text.replace(".", "")
    if not digits.isdigit() or not 80 <= int(digits) <= 999:
        raise argparse.ArgumentTypeError(f"got {text!r}; it takes a compute capability from 8.0 on, such as 9.0")
    return int(digits)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="chunkattn", description="Dual Chunk Attention.")
    commands = parser.add_subparsers(dest="command", required=True)
    info = commands.add_parser(
        "info",
        help="versions, devices, compiled architectures and kernels",
        description="Prints versions, devices, compiled architectures and kernels; with --seq also which kernel a "
        "shape takes.",
    )
    shape = info.add_argument_group("shape")
    shape.add_argument("--seq", type=positive, help="queries, Sq")
    shape.add_argument("--seq-k", type=positive, help="keys, Sk >= Sq; default: as many as queries")
    shape.add_argument("--batch", type=positive, default=1, help="default: %(default)s")
    shape.add_argument("--heads", type=positive, default=32, help="query heads; default: %(default)s")
    shape.add_argument("--kv-heads", type=positive, help="key and value heads; default: as many as query heads")
    shape.add_argument("--head-dim", type=positive, default=128, help="default: %(default)s")
    shape.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="default: %(default)s")
    shape.add_argument("--chunk", type=positive, default=3072, help="chunk_size; default: %(default)s")
    shape.add_argument("--local", type=positive, default=512, help="local_size; default: %(default)s")
    shape.add_argument(
        "--capability", type=device_capability, help="a device's; default: each CUDA device here, or 9.0"
    )
    return parser


def check_shape(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Fills in what follows from other options; ends with one sentence for a shape that no kernel can take."""
    args.seq_k = args.seq_k or args.seq
    args.kv_heads = args.kv_heads or args.heads
    if args.seq_k < args.seq:
        parser.error(f"argument --seq-k: got {args.seq_k}; it takes --seq, {args.seq}, or more")
    if args.heads % args.kv_heads:
        parser.error(f"argument --kv-heads: got {args.kv_heads}; it takes a divisor of --heads, {args.heads}")
    if args.local >= args.chunk:
        parser.error(f"argument --local: got {args.local}; it takes less than --chunk, {args.chunk}")


def architecture_name(line: str) -> str:
    """ "90a-real" as "sm_90a", "90-virtual" as "compute_90 (PTX)"."""
    number, kind = line.split("-")
    return f"sm_{number}" if kind == "real" else f"compute_{number} (PTX)"


def driver_version() -> str:
    """The NVIDIA driver, or why there is none to name."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "none found"
    command = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 and done.stdout else "not running"


def version_rows() -> Iterator[Row]:
    build = _core.build_info()
    yield "chunkattn", build["version"]
    yield "python", platform.python_version()
    yield "torch", f"{torch.__version__} (built with {build['torch']})"
    yield "compiler", build["compiler"]
    yield "CUDA toolkit", build["cuda"] or "none: built for the CPU alone"
    yield "architectures", ", ".join(map(architecture_name, build["cuda_architectures"])) or "none"
    yield "driver", driver_version()


def device_rows() -> Iterator[Row]:
    yield "cpu", f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        memory = device.total_memory / 2**30
        yield f"cuda:{index}", f"{device.name}, sm_{device.major}{device.minor}, {memory:.0f} GiB"


def plan_text(plan: _core.KernelPlan) -> str:
    return (
        f"{plan.name}, head_dim {plan.head_dim_padded}: tiles of {plan.tile_m} queries and {plan.tile_n} keys, "
        f"{plan.warps} warps, stages {plan.stages}, {plan.shared_memory // 1024} KiB shared memory"
    )


def kernel_rows() -> Iterator[Row]:
    yield "cpu", "forward, backward: " + ", ".join(DTYPES)
    for plan in _core.compiled_kernels():
        yield "cuda", f"{plan_text(plan)} ({', '.join(CUDA_DTYPES)})"


def capabilities(args: argparse.Namespace) -> list[int]:
    """The compute capabilities to plan for."""
    if args.capability:
        return [args.capability]
    found = (torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count()))
    return sorted({major * 10 + minor for major, minor in found}) or [90]


def shape_rows(args: argparse.Namespace) -> Iterator[Row]:
    """The kernel the shape takes on each device, and how its queries are cut."""
    geometry = _core.ChunkGeometry(args.chunk, args.local)
    yield "q", f"[{args.batch}, {args.seq}, {args.heads}, {args.head_dim}] {args.dtype}"
    yield "k, v", f"[{args.batch}, {args.seq_k}, {args.kv_heads}, {args.head_dim}] {args.dtype}"
    yield "chunks", f"{-(-args.seq_k // geometry.stride)} of {geometry.stride} tokens, chunk_size - local_size"
    yield "cpu", "forward, backward"
    for capability in capabilities(args):
        if args.dtype not in CUDA_DTYPES:
            yield f"sm_{capability}", f"no kernel: CUDA takes {' and '.join(CUDA_DTYPES)}, got {args.dtype}"
            continue
        yield f"sm_{capability}", cuda_plan(args, geometry, capability, _core.plan_forward)
        yield f"sm_{capability}", cuda_plan(args, geometry, capability, _core.plan_backward)


def cuda_plan(args: argparse.Namespace, geometry: _core.ChunkGeometry, capability: int, find_plan: Callable) -> str:
    """The kernel that find_plan, a function of _core, names for the shape, and how many query tiles it makes."""
    try:
        plan = find_plan(
            batch=args.batch,
            seqlen_q=args.seq,
            seqlen_k=args.seq_k,
            heads=args.heads,
            kv_heads=args.kv_heads,
            head_dim=args.head_dim,
            compute_capability=capability,
        )
    except ValueError as error:
        return f"no kernel: {error}"
    queries = len(_core.QueryTiling(geometry, args.seq_k - args.seq, args.seq_k, plan.tile_m))
    keys = len(_core.QueryTiling(geometry, 0, args.seq_k, plan.tile_n))
    # A block of the forward owns a tile of queries, one of the backward a tile of keys.
    forward = find_plan is _core.plan_forward
    work = args.batch * (queries * args.heads if forward else keys * args.kv_heads)
    absent = "" if _core.build_info()["cuda"] else "; not compiled into this build"
    return f"{plan_text(plan)}; {f'{queries} query' if forward else f'{keys} key'} tiles, {work} tiles of work{absent}"


def print_rows(title: str, rows: Iterator[Row]) -> None:
    print(title)
    for name, text in rows:
        print(f"  {name:<14} {text}")


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = make_parser()
    args = parser.parse_args(arguments)
    if args.seq:
        check_shape(parser, args)
    print_rows("versions", version_rows())
    print_rows("devices", device_rows())
    print_rows("kernels", kernel_rows())
    if args.seq:
        print_rows("shape", shape_rows(args))
    return 0
