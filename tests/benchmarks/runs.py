"""Short runs of the benchmarks, and the fields of what they write."""

import json

import benchmark_backward
import benchmark_forward
import benchmark_varlen

ROW_FIELDS = {"impl", "pass", "batch", "heads", "kv_heads", "seq_q", "seq_k", "head_dim", "dtype", "chunk_size"}
ROW_FIELDS |= {"local_size", "ms", "ms_spread", "tflops", "max_error"}
HEADER_FIELDS = {"gpu", "driver", "torch", "cuda", "chunkattn", "git_tree", "dirty", "date", "ceilings"}


def run_benchmark(benchmark, path, *arguments):
    quick = ["--device", "cpu", "--shape", "s150-h4/2-d16", "--seconds", "0", "--rounds", "2"]
    status = benchmark.main([*quick, "--json", str(path), *arguments])
    return status, json.loads(path.read_text())


def run_forward(path, *arguments):
    return run_benchmark(benchmark_forward, path, *arguments)


def run_backward(path, *arguments):
    return run_benchmark(benchmark_backward, path, *arguments)


def run_varlen(path, *arguments):
    return run_benchmark(benchmark_varlen, path, "--shape", "b3-s96-h4/2-d16", "--dca", "64:16", *arguments)
