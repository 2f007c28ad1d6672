"""What the benchmarks of attention share: finding, checking and timing the implementations."""

import argparse
import time
from dataclasses import dataclass

import common
import peers
import torch
from common import DcaSetting, Shape, console

import chunkattn

DENSE = ("fa3", "cudnn", "fa2", "flex", "sdpa")


@dataclass
class Case:
    """One implementation at one shape."""

    impl: str
    setting: DcaSetting | None  # None: dense
    call: object
    max_error: float | None = None
    workspace_mib: float | None = None

    def __str__(self):
        return f"{self.impl} {self.setting or 'dense'}"


class Call:
    def __init__(self, function, *inputs):
        self.function, self.inputs = function, inputs

    def prepare(self):
        """Makes, outside what is measured, what the call needs."""

    def __call__(self):
        return self.function(*self.inputs)

    def results(self):
        """What a call computes, as the oracle wants it."""
        return self()


class Lazy(Call):
    """A call that ``function`` makes, and compiles, when it is first needed, so that a failure belongs to its case."""

    made = None

    def prepare(self):
        if self.made is None:
            self.made = super().__call__()

    def __call__(self):
        self.prepare()
        return self.made()


def check(case, oracle):
    """Runs a case once, fills in its error and its memory. Returns what is wrong with it, or None."""
    cuda = oracle.likes[0].is_cuda
    case.call.prepare()
    # The allocator hands the blocks that are freed here to the results: what is not written stays NaN.
    spoiled = [torch.full_like(like, float("nan")) for like in oracle.likes]
    del spoiled
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    results = case.call.results()
    results = (results,) if isinstance(results, torch.Tensor) else results
    if cuda:
        torch.cuda.synchronize()
        written = sum(x.numel() * x.element_size() for x in results)
        case.workspace_mib = round((torch.cuda.max_memory_allocated() - before - written) / 2**20, 1)
    for name, result, like in zip(oracle.names, results, oracle.likes, strict=True):
        if result.shape != like.shape:
            return f"{name} has shape {list(result.shape)}, expected {list(like.shape)}"
        if not torch.isfinite(result).all():
            return f"{name} has elements that are not finite or were not written"
    case.max_error, wrong = oracle.compare(results, case.setting)
    return f"{wrong} is wrong: largest error where sampled {case.max_error:.3g}" if wrong else None


class Benchmark:
    """Checks and times every implementation at every shape. A benchmark says which there are.

    An oracle has ``names`` and ``likes``, of the results and tensors of their shapes, and ``compare(results, setting)``
    that returns the largest absolute error and the name of a result that is wrong, or None.
    """

    pass_ = None  # of the rows
    ours: tuple[str, ...]
    composed: tuple[str, ...]
    find_plan = None  # the function of chunkattn._core that names the kernel

    def make_inputs(self, shape):
        """The tensors calls take."""
        return shape.random_inputs(self.device)

    def make_oracle(self, inputs, table):
        raise NotImplementedError

    def make_call(self, impl, inputs, table, setting):
        """A :class:`Call` of an implementation; setting None: dense."""
        raise NotImplementedError

    def row_shape(self, case, shape):
        """What a case computes at a shape."""
        return shape

    def __init__(self, options):
        self.options = options
        self.device = torch.device(options.device)
        self.clock = common.make_clock(self.device)
        self.rows, self.failed = [], []
        self.names, self.engines, self.absent = self.find_peers()
        common.print_absent(self.absent)
        self.ceilings = None if options.once else common.measure_ceilings(self.device, self.clock)
        self.header = common.make_header(
            self.pass_, self.device, self.ceilings, rounds=options.rounds, seconds=options.seconds
        )
        console.print(self.header)

    def find_peers(self):
        engines, absent = peers.find_engines(self.device, self.options.fa3)
        absent |= {f"composed-{name}": reason for name, reason in absent.items() if f"composed-{name}" in self.composed}
        try:
            self.portable = peers.find_portable_kernel(self.device, self.find_plan)
        except peers.Absent as reason:
            absent["chunkattn-portable"] = str(reason)
        if self.device.type == "cpu":
            absent["flex"] = "runs on CUDA only"
            names = ["sdpa", "composed-sdpa", "chunkattn"]
        else:
            names = [name for name in DENSE + self.composed + self.ours if not name.endswith("sdpa")]
        if not self.options.flex and "flex" not in (self.options.impls or []):
            absent.setdefault("flex", "compiles for a minute per shape; asked for with --flex")
        if self.options.impls:
            absent |= {name: "not selected" for name in names if name not in self.options.impls and name not in absent}
        return [name for name in names if name not in absent], engines, absent

    def make_cases(self, inputs, table, settings):
        """The cases of one shape. Composed DCA is timed with the first setting only."""
        cases = []
        for name in self.names:
            taken = [None] if name in DENSE else settings[:1] if name in self.composed else settings
            cases += [Case(name, setting, self.make_call(name, inputs, table, setting)) for setting in taken]
        return cases

    def run_shape(self, shape, setting_texts):
        """Checks and times every implementation at one shape."""
        inputs = self.make_inputs(shape)
        settings = [DcaSetting.parse(text, shape.seq_k) for text in setting_texts]
        table = chunkattn.rope_table(max(s.chunk_size for s in settings), shape.head_dim, device=self.device)
        oracle = self.make_oracle(inputs, table)
        working = []
        for case in self.make_cases(inputs, table, settings):
            problem = self.attempt(case, oracle)
            if problem is None:
                working.append(case)
            else:
                self.failed.append({"impl": case.impl, "shape": str(shape), "setting": str(case.setting or "dense")})
                self.failed[-1]["error"] = problem
                console.print(f"failed: {case} at {shape}: {problem}", markup=False, highlight=False)
        if self.options.once:
            return
        calls = {index: case.call for index, case in enumerate(working)}
        timings = common.time_interleaved(calls, self.clock, rounds=self.options.rounds, seconds=self.options.seconds)
        rows = [
            common.make_row(
                case.impl,
                self.pass_,
                self.row_shape(case, shape),
                timings[index],
                setting=case.setting,
                max_error=case.max_error,
                workspace_mib=case.workspace_mib,
            )
            for index, case in enumerate(working)
        ]
        common.print_rows(f"{self.pass_} {shape} {shape.dtype}", rows, self.ceilings)
        self.rows += rows

    def attempt(self, case, oracle):
        """What is wrong with a case, or None. An error that leaves the GPU unusable is raised."""
        if self.options.no_check:
            case.call()
            return None
        try:
            return check(case, oracle)
        except Exception as error:
            if self.device.type == "cuda":
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"

    def run(self, shapes):
        """Runs every shape that fits the time limit. The result file is complete after each."""
        start = time.monotonic()
        for shape, settings in shapes.items():
            try:
                if self.options.time_limit and time.monotonic() - start > self.options.time_limit:
                    error = "not run: the time limit was reached"
                    self.failed.append({"impl": "all", "shape": str(shape), "error": error})
                    console.print(f"{shape}: {error}", markup=False, highlight=False)
                else:
                    self.run_shape(shape, settings)
            finally:
                self.write()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        console.print(f"{len(self.rows)} rows, {len(self.failed)} failures, {time.monotonic() - start:.0f} s")
        return all(failure["impl"] not in [*self.ours, "all"] for failure in self.failed)

    def write(self):
        if self.options.json:
            common.write_results(self.options.json, self.header, self.rows, self.absent, self.failed)


def parse_arguments(argv, description, benchmark):
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shape", nargs="+", help="such as s32k-h32/8-d128; default: the published table")
    parser.add_argument("--dca", nargs="+", metavar="CHUNK:LOCAL", help="DCA settings; one: a single chunk")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    impls = DENSE + benchmark.composed + benchmark.ours
    parser.add_argument("--impls", nargs="+", choices=impls, help="default: all there are")
    parser.add_argument("--flex", action="store_true", help="time FlexAttention too")
    parser.add_argument("--fa3", metavar="DIR", help="folder with FlashAttention-3: see peers.load_fa3")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.5, help="time for each implementation at each shape")
    parser.add_argument("--time-limit", type=float, help="seconds after which no further shape is begun")
    parser.add_argument("--no-check", action="store_true", help="time without comparing with the reference")
    parser.add_argument("--once", action="store_true", help="run everything once without timing, for a profiler")
    parser.add_argument("--json", metavar="PATH", help="result file")
    return parser.parse_args(argv)


def run(argv, description, benchmark, cuda_table, cpu_table, kind=Shape):
    """The command line of a benchmark; returns the exit status. Tables: shape to its DCA settings. kind: of shapes."""
    options = parse_arguments(argv, description, benchmark)
    table = cuda_table if torch.device(options.device).type == "cuda" else cpu_table
    names = options.shape or list(table)
    shapes = {kind.parse(name, options.dtype): options.dca or table.get(name, ["3072:512"]) for name in names}
    if any(shape.seq_q != shape.seq_k for shape in shapes):
        raise SystemExit(f"benchmark_{benchmark.pass_} takes shapes with as many queries as keys")
    with torch.no_grad():
        good = benchmark(options).run(shapes)
    return 0 if good else 1
