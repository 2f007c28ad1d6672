"""What the benchmarks share: shapes, timing, the header that says where numbers come from, result files and tables.

A result file is JSON: ``header`` (machine, versions, source tree, ceilings), ``rows`` (one per measurement), ``absent``
(implementation to reason) and ``failed`` (what was tried and broke). A row is ``{impl, pass, batch, heads, kv_heads,
seq_q, seq_k, head_dim, dtype, chunk_size, local_size, ms, ms_spread, tflops or gbps, max_error}`` with null where a
field has no meaning: dense attention has no chunk_size. Rows of decoding say how the ``cache`` lies in memory.
"""

import importlib.metadata
import json
import os
import platform
import random
import re
import subprocess
import time
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
BACKWARD_FLOPS = 2.5  # of the forward's: five products instead of two
FLOPS = {"forward": 1, "backward": BACKWARD_FLOPS, "forward+backward": 1 + BACKWARD_FLOPS}

# Logs are not terminals: without a fixed width rich would fold the tables at 80 columns.
console = Console(width=None if os.isatty(1) else 120, soft_wrap=False)


@dataclass(frozen=True)
class Shape:
    """A causal attention problem. Queries are aligned with the last keys."""

    batch: int
    heads: int
    kv_heads: int
    seq_q: int
    seq_k: int
    head_dim: int
    dtype: str = "bfloat16"

    PATTERN = re.compile(r"(?:b(\d+)-)?s(\d+k?)(?:/(\d+k?))?-h(\d+)(?:/(\d+))?-d(\d+)")

    @classmethod
    def parse(cls, text, dtype="bfloat16"):
        """Reads ``[bBATCH-]sSEQ[/SEQ_K]-hHEADS[/KV_HEADS]-dDIM``, as in ``s32k-h32/8-d128``; k stands for 1024."""
        match = cls.PATTERN.fullmatch(text)
        if not match:
            raise ValueError(f"shape must look like s32k-h32/8-d128 or b2-s1/4096-h8-d64, got {text!r}")
        batch, seq_q, seq_k, heads, kv_heads, head_dim = match.groups()
        seq_q, seq_k = _length(seq_q), _length(seq_k or seq_q)
        heads, kv_heads = int(heads), int(kv_heads or heads)
        if seq_q > seq_k or heads % kv_heads:
            raise ValueError(f"shape must have seq_q <= seq_k and heads a multiple of kv_heads, got {text!r}")
        return cls(int(batch or 1), heads, kv_heads, seq_q, seq_k, int(head_dim), dtype)

    def __str__(self):
        batch = f"b{self.batch}-" if self.batch > 1 else ""
        seq = f"{self.seq_q}/{self.seq_k}" if self.seq_q != self.seq_k else f"{self.seq_q}"
        heads = f"{self.heads}/{self.kv_heads}" if self.heads != self.kv_heads else f"{self.heads}"
        return f"{batch}s{seq}-h{heads}-d{self.head_dim}"

    def flops(self, pass_="forward"):
        """Causal FLOPs, as FlashAttention counts them: 2 B H N N D for N queries and N keys."""
        pairs = self.seq_q * (self.seq_k - self.seq_q / 2)
        return 4 * self.batch * self.heads * pairs * self.head_dim * FLOPS.get(pass_, 1)

    def random_inputs(self, device, seed=0):
        """q [B, Sq, H, D], k and v [B, Sk, Hkv, D], normally distributed."""
        generator = torch.Generator(device).manual_seed(seed)
        q_size = (self.batch, self.seq_q, self.heads, self.head_dim)
        k_size = (self.batch, self.seq_k, self.kv_heads, self.head_dim)
        dtype = getattr(torch, self.dtype)
        return tuple(torch.randn(s, generator=generator, device=device, dtype=dtype) for s in (q_size, k_size, k_size))


@dataclass(frozen=True)
class DcaSetting:
    chunk_size: int
    local_size: int

    @classmethod
    def parse(cls, text, seq):
        """Reads ``CHUNK:LOCAL``, or ``one`` for a single chunk that holds all of ``seq``."""
        if text == "one":
            return cls(seq + 512, 512)
        match = re.fullmatch(r"(\d+):(\d+)", text)
        if not match or not 0 < int(match[2]) < int(match[1]):
            raise ValueError(f"a DCA setting must be CHUNK:LOCAL with 0 < LOCAL < CHUNK, or one, got {text!r}")
        return cls(int(match[1]), int(match[2]))

    def __str__(self):
        return f"{self.chunk_size}:{self.local_size}"

    @property
    def stride(self):
        return self.chunk_size - self.local_size


def _length(text):
    return int(text[:-1]) * 1024 if text.endswith("k") else int(text)


@dataclass(frozen=True)
class Timing:
    samples: tuple[float, ...]  # milliseconds

    @property
    def ms(self):
        return median(self.samples)

    @property
    def spread(self):
        """Milliseconds between the 10th and the 90th percentile."""
        ordered = sorted(self.samples)
        last = len(ordered) - 1
        return ordered[round(0.9 * last)] - ordered[round(0.1 * last)]


class CudaClock:
    """Times calls by CUDA events, each with a cold L2 cache.

    A buffer four times the size of the cache is read before each call. Reading, not writing: lines left dirty would be
    written back during the call. While the buffer is read, the host gets ahead of the device, so launch latency is
    hidden as it is in a model, unless a call is made of many short launches.
    """

    def __init__(self, device):
        cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or 64 << 20
        self.device = device
        self.buffer = torch.ones(cache, dtype=torch.float32, device=device)
        self.sum = torch.empty((), dtype=torch.float32, device=device)

    def __call__(self, function, repeats):
        """Milliseconds of each of ``repeats`` calls."""
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        for start, end in events:
            torch.sum(self.buffer, dim=0, out=self.sum)
            start.record()
            function()
            end.record()
        torch.cuda.synchronize(self.device)
        return [start.elapsed_time(end) for start, end in events]


class CpuClock:
    def __call__(self, function, repeats):
        """Milliseconds of each of ``repeats`` calls."""
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            function()
            times.append((time.perf_counter() - start) * 1e3)
        return times


def make_clock(device):
    return CudaClock(device) if torch.device(device).type == "cuda" else CpuClock()


def time_interleaved(functions, clock, *, rounds=11, fewest_rounds=5, seconds=0.7):
    """Times functions against each other: every round runs each of them, in another order each time.

    Clocks move under load, so times taken one implementation after the other do not compare. Nor would they in a fixed
    order: after a slow kernel that leaves the device cool, the next finds higher clocks.

    Args:
        functions: name to function without arguments. Each is called once to warm up.
        clock: from :func:`make_clock`.
        rounds: how many there are, so many samples at least are taken of each. The power budget follows what ran just
            before, so many short rounds compare better than a few long ones.
        fewest_rounds: how many there are of functions so slow that more would not fit in ``seconds``.
        seconds: roughly how long each function runs in all rounds together.

    Returns:
        name to :class:`Timing`.
    """
    estimates = {}
    for name, function in functions.items():
        clock(function, 1)
        estimates[name] = max(clock(function, 1)[0] / 1e3, 1e-6)
    rounds = min(rounds, max(fewest_rounds, int(seconds / max(estimates.values()))))
    repeats = {name: max(1, min(100, int(seconds / rounds / estimate))) for name, estimate in estimates.items()}
    names = list(functions)
    samples = {name: [] for name in names}
    for turn in range(rounds):
        for name in random.Random(turn).sample(names, len(names)):
            samples[name] += clock(functions[name], repeats[name])
    return {name: Timing(tuple(samples[name])) for name in names}


def measure_ceilings(device, clock, repeats=30):
    """What the machine does at best: the rate of a large matrix product and of a large copy (bytes read + written)."""
    cuda = torch.device(device).type == "cuda"
    size, dtype, copied = (8192, torch.bfloat16, 1 << 30) if cuda else (1024, torch.float32, 1 << 26)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    source = torch.randint(0, 255, (copied,), device=device, dtype=torch.uint8)
    product, copy = torch.empty_like(a), torch.empty_like(source)
    functions = {"matmul": lambda: torch.mm(a, b, out=product), "copy": lambda: copy.copy_(source)}
    for function in functions.values():
        clock(function, 3)
    timings = {name: Timing(tuple(clock(function, repeats))) for name, function in functions.items()}
    return {
        "matmul_tflops": _significant(2 * size**3 / timings["matmul"].ms / 1e9),
        "matmul": f"{size}^3 {str(dtype).removeprefix('torch.')}",
        "copy_gbps": _significant(2 * copied / timings["copy"].ms / 1e6),
    }


def git_tree():
    """(hash of the source tree, whether files differ from it); None where unknown.

    Where the repository's history is not at hand, CHUNKATTN_GIT_TREE or the file .git_tree names the tree, with the
    suffix -dirty when it had changes.
    """
    given = os.environ.get("CHUNKATTN_GIT_TREE", "").strip()
    record = ROOT / ".git_tree"
    if not given and record.is_file():
        given = record.read_text().strip()
    if given:
        return given.removesuffix("-dirty"), given.endswith("-dirty")
    if not (ROOT / ".git").exists():
        return None, None
    tree = _output("git", "-C", str(ROOT), "rev-parse", "--verify", "--quiet", "HEAD^{tree}")
    status = _output("git", "-C", str(ROOT), "status", "--porcelain")
    return tree or None, None if status is None else bool(status)


def make_header(benchmark, device, ceilings=None, **settings):
    """Where and how the numbers were measured. ``settings`` are the benchmark's own, such as rounds."""
    cuda = torch.device(device).type == "cuda"
    tree, dirty = git_tree()
    return {
        "benchmark": benchmark,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "gpu": torch.cuda.get_device_name(device) if cuda else None,
        "driver": _driver() if cuda else None,
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        "python": platform.python_version(),
        "chunkattn": _package_version("chunkattn"),
        "git_tree": tree,
        "dirty": dirty,
        "ceilings": ceilings,
        **settings,
    }


def make_row(impl, pass_, shape, timing, *, setting=None, bytes_moved=None, flops=None, max_error=None, **extra):
    """A row of a result file. With ``bytes_moved`` the rate is in GB/s, otherwise in TFLOP/s: of ``flops``, or of
    causal attention's."""
    if bytes_moved is None:
        flops = shape.flops(pass_) if flops is None else flops
        rate = {"tflops": _significant(flops / timing.ms / 1e9)}
    else:
        rate = {"gbps": _significant(bytes_moved / timing.ms / 1e6)}
    return {
        "impl": impl,
        "pass": pass_,
        **asdict(shape),
        "chunk_size": setting.chunk_size if setting else None,
        "local_size": setting.local_size if setting else None,
        "ms": _significant(timing.ms, 5),
        "ms_spread": _significant(timing.spread),
        **rate,
        "max_error": None if max_error is None else _significant(max_error, 3),
        **extra,
    }


def write_results(path, header, rows, absent=None, failed=None):
    """Writes a result file whole or not at all. One line per row, so that a diff reads like a table."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join("  " + json.dumps(row) for row in rows)
    body = (
        f'{{"header": {json.dumps(header, indent=1)},\n"rows": [\n{lines}\n],\n'
        f'"absent": {json.dumps(absent or {}, indent=1)},\n"failed": {json.dumps(failed or [], indent=1)}}}\n'
    )
    part = path.with_name(path.name + ".part")
    part.write_text(body)
    os.replace(part, path)


def read_results(path):
    return json.loads(Path(path).read_text())


def row_shape(row):
    """The :class:`Shape` of a row."""
    return Shape(*(row[field] for field in Shape.__dataclass_fields__))


def print_rows(title, rows, ceilings=None):
    """Prints rows of one shape as a table."""
    table = Table(title=title, title_justify="left")
    table.add_column("impl")
    columns = ["chunk:local", "ms", "spread", "rate", "of ceiling", "max error"]
    for name in columns:
        table.add_column(name, justify="right")
    for row in rows:
        setting = f"{row['chunk_size']}:{row['local_size']}" if row["chunk_size"] else "dense"
        unit, ceiling = ("tflops", "matmul_tflops") if "tflops" in row else ("gbps", "copy_gbps")
        share = f"{row[unit] / ceilings[ceiling]:.1%}" if ceilings else ""
        rate = f"{row[unit]:.4g} {'TFLOP/s' if unit == 'tflops' else 'GB/s'}"
        error = "" if row["max_error"] is None else f"{row['max_error']:.2e}"
        impl = f"{row['impl']}, {row['cache']}" if row.get("cache") else row["impl"]
        table.add_row(impl, setting, f"{row['ms']:.4g}", f"{row['ms_spread']:.2g}", rate, share, error)
    console.print(table)


def print_absent(absent):
    """Says which implementations are not measured, and why."""
    for name, reason in absent.items():
        console.print(f"absent: {name}: {reason}", markup=False, highlight=False)


def _significant(value, digits=4):
    return float(f"{value:.{digits}g}")


def _output(*command):
    """What a command prints, or None when it fails or is not there."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _driver():
    found = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return found.splitlines()[0] if found else None


def _cpu_name():
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        match = None
    return match[1] if match else platform.processor() or platform.machine()


def _package_version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
