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


class Captured(Call):
    """``times`` calls, on a GPU as one CUDA graph that is replayed, so that the device never waits for the host."""

    def __init__(self, device, function, *inputs, times=1):
        super().__init__(function, *inputs)
        self.times = times
        self.on_gpu = torch.device(device).type == "cuda"
        self.graph = self.result = None

    def prepare(self):
        if self.graph is not None or not self.on_gpu:
            return
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # what the first calls set up is no part of the graph
            for _ in range(2):
                super().__call__()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.run()
        self.graph = graph

    def run(self):
        for _ in range(self.times):
            self.result = super().__call__()

    def __call__(self):
        self.prepare()
        if self.graph is None:
            self.run()
        else:
            self.graph.replay()
        return self.result


def check(case, oracle):
    """Runs a case once, fills in its error and its memory. Returns what is wrong with it, or None."""
    cuda = oracle.likes[0].is_cuda
    case.call.prepare()
    # The allocator hands the blocks that are freed here to the results: what is not written stays NaN, or -2.
    spoiled = [torch.full_like(like, float("nan") if like.is_floating_point() else -2) for like in oracle.likes]
    del spoiled
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    results = case.call.results()
    results = (results,) if isinstance(results, torch.Tensor) else results
    if cuda:
        torch.cuda.synchronize()
    if cuda and not isinstance(case.call, Captured):  # a graph has its memory since it was captured
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
    dense = DENSE
    takes_steps = False  # shapes with one query
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

    @staticmethod
    def add_arguments(parser):
        """Adds the benchmark's own arguments."""

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
        if "chunkattn-portable" in self.ours:
            try:
                self.portable = peers.find_portable_kernel(self.device, self.find_plan)
            except peers.Absent as reason:
                absent["chunkattn-portable"] = str(reason)
        if self.device.type == "cpu":
            absent["flex"] = "runs on CUDA only"
            names = ["sdpa", "composed-sdpa", "chunkattn"]
        else:
            names = [name for name in self.dense + self.composed + self.ours if not name.endswith("sdpa")]
        if not self.options.flex and "flex" not in (self.options.impls or []):
            absent.setdefault("flex", "compiles for every shape; asked for with --flex")
        if self.options.impls:
            absent |= {name: "not selected" for name in names if name not in self.options.impls and name not in absent}
        known = self.dense + self.composed + self.ours
        absent = {name: reason for name, reason in absent.items() if name in known}
        return [name for name in names if name not in absent], engines, absent

    def make_cases(self, inputs, table, settings):
        """The cases of one shape. Composed DCA is timed with the first setting only."""
        cases = []
        for name in self.names:
            taken = [None] if name in self.dense else settings[:1] if name in self.composed else settings
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
        rows = [self.make_row(case, shape, timings[index]) for index, case in enumerate(working)]
        common.print_rows(f"{self.pass_} {shape} {shape.dtype}", rows, self.ceilings)
        self.rows += rows

    def make_row(self, case, shape, timing, **extra):
        """The row of a case; extra as for :func:`common.make_row`."""
        known = {"setting": case.setting, "max_error": case.max_error, "workspace_mib": case.workspace_mib}
        return common.make_row(case.impl, self.pass_, shape, timing, **known, **extra)

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


def make_parser(description, benchmark):
    """The options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shape", nargs="+", help="such as s32k-h32/8-d128; default: the published table")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    impls = benchmark.dense + benchmark.composed + benchmark.ours
    parser.add_argument("--impls", nargs="+", choices=impls, help="default: all there are")
    parser.add_argument("--flex", action="store_true", help="time FlexAttention too")
    parser.add_argument("--fa3", metavar="DIR", help="folder with FlashAttention-3: see peers.load_fa3")
    parser.add_argument("--rounds", type=int, default=25, help="at most; slow shapes have fewer")
    parser.add_argument("--seconds", type=float, default=0.5, help="time for each implementation at each shape")
    parser.add_argument("--time-limit", type=float, help="seconds after which no further shape is begun")
    parser.add_argument("--no-check", action="store_true", help="time without comparing with the reference")
    parser.add_argument("--once", action="store_true", help="run everything once without timing, for a profiler")
    parser.add_argument("--json", metavar="PATH", help="result file")
    benchmark.add_arguments(parser)
    return parser


def run(argv, description, benchmark, cuda_table, cpu_table, kind=Shape):
    """The command line of a benchmark; returns the exit status. Tables: shape to its DCA settings. kind: of shapes."""
    parser = make_parser(description, benchmark)
    parser.add_argument("--dca", nargs="+", metavar="CHUNK:LOCAL", help="DCA settings; one: a single chunk")
    options = parser.parse_args(argv)
    return run_table(benchmark, options, cuda_table, cpu_table, options.dca, ["3072:512"], kind)


def run_table(benchmark, options, cuda_table, cpu_table, settings, default, kind=Shape):
    """Runs the shapes that were asked for, or those of the device's table, with ``settings``, or the table's, or the
    default; returns the exit status."""
    table = cuda_table if torch.device(options.device).type == "cuda" else cpu_table
    names = options.shape or list(table)
    shapes = {kind.parse(name, options.dtype): settings or table.get(name, default) for name in names}
    if any(shape.seq_q != shape.seq_k and not (benchmark.takes_steps and shape.seq_q == 1) for shape in shapes):
        kinds = "one query or as many" if benchmark.takes_steps else "as many"
        raise SystemExit(f"benchmark_{benchmark.pass_} takes shapes with {kinds} queries as keys")
    with torch.no_grad():
        good = benchmark(options).run(shapes)
    return 0 if good else 1
