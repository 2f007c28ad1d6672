"""Key-value caches for the tests of decoding: every layout, with NaN in every slot that was never written."""

from dataclasses import dataclass

import torch
from cases import Case
from tolerance import assert_within_rule
from torch import Tensor

import chunkattn

FLOAT8 = torch.float8_e4m3fn


def poison(tensor: Tensor) -> Tensor:
    """Fills a tensor with NaN, float8 included, and returns it."""
    return tensor.copy_(torch.full_like(tensor, torch.nan, dtype=torch.float32).to(tensor.dtype))


@dataclass(frozen=True)
class Layout:
    """How a cache lies in memory. page_size None: one block of memory for each sequence."""

    page_size: int | None = None
    heads_first: bool = False  # as Hugging Face's static cache

    def __repr__(self) -> str:
        return ("heads-first-" if self.heads_first else "") + (f"pages-{self.page_size}" if self.page_size else "rows")

    def make(self, case: Case, capacity: int, device: torch.device, dtype: torch.dtype, seed: int = 0) -> dict:
        """k_cache, v_cache and block_table for case.batch sequences of up to `capacity` tokens, as keywords.

        Pages are shuffled, a few belong to nobody, and the table has a column more than any sequence may use.
        """
        if self.page_size is None:
            block_table, rows, columns = None, case.batch, capacity
        else:
            width = -(-capacity // self.page_size)
            rows, columns = case.batch * width + 3, self.page_size
            order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
            nowhere = torch.full((case.batch, 1), -1, dtype=torch.int32)
            table = order[: case.batch * width].reshape(case.batch, width)
            block_table = torch.cat((table, nowhere), dim=1).to(device)
        caches = []
        for _ in "kv":
            if self.heads_first:
                cache = torch.empty(rows, case.kv_heads, columns, case.head_dim, dtype=dtype, device=device)
                cache = cache.transpose(1, 2)
            else:
                cache = torch.empty(rows, columns, case.kv_heads, case.head_dim, dtype=dtype, device=device)
            caches.append(poison(cache))
        return {"k_cache": caches[0], "v_cache": caches[1], "block_table": block_table}


LAYOUTS = [
    Layout(),
    Layout(heads_first=True),
    *(Layout(page_size) for page_size in (16, 17, 48, 64, 128, 256)),
    Layout(32, heads_first=True),
]


def decode_options(case: Case, device: torch.device) -> dict:
    """The arguments of dca_with_kvcache that are those of dca."""
    options = case.options(device)
    return {name: value for name, value in options.items() if name not in ("k_rotated", "deterministic")}


def lengths(device: torch.device, *values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def fill(cache: dict, case: Case, k: Tensor, v: Tensor, seqlens: Tensor, options: dict) -> None:
    """Writes the first tokens of raw k and v [B, S, Hkv, D] to a cache, by the twin in plain torch."""
    for row, length in enumerate(seqlens.tolist()):
        one = dict(cache)
        for name in ("block_table",) if cache["block_table"] is not None else ("k_cache", "v_cache"):
            one[name] = cache[name][row : row + 1]
        no_queries = k.new_empty(1, 0, case.heads, case.head_dim)
        new = {"k": k[row : row + 1, :length], "v": v[row : row + 1, :length]}
        chunkattn.reference.dca_with_kvcache(no_queries, **one, **options, **new, cache_seqlens=0)


def raw_bytes(tensor: Tensor) -> Tensor:
    """For bitwise comparisons, in which NaN equals itself."""
    return tensor.clone(memory_format=torch.contiguous_format).view(torch.uint8)


def assert_lse_within_rule(lse: Tensor, oracle: Tensor, plain: Tensor, dtype: torch.dtype) -> None:
    """As check_forward has it, where rows that see no key have -inf."""
    unseeing = oracle == -torch.inf
    assert torch.equal(lse == -torch.inf, unseeing)
    ulps = max(4.0, torch.finfo(dtype).eps / torch.finfo(torch.float32).eps / 2)
    lse, oracle, plain = (x.masked_fill(unseeing, 0) for x in (lse, oracle, plain))
    assert_within_rule(lse, oracle, plain, "lse", ulps=ulps)


def check_decode(q: Tensor, cache: dict, arguments: dict) -> Tensor:
    """Calls dca_with_kvcache, compares out, lse and the cache with the twin in float64, returns out.

    With a float8 cache the twin attends to what the call has appended: a tie may round either way.
    """
    float8 = cache["k_cache"].dtype == FLOAT8
    pristine = {name: None if x is None else x.clone() for name, x in cache.items()}
    out, lse = chunkattn.dca_with_kvcache(q, **cache, **arguments, return_lse=True)
    assert out.dtype == q.dtype
    assert out.is_contiguous()
    assert lse.dtype == torch.float32
    assert lse.is_contiguous()

    read = arguments
    twin_cache = pristine
    if float8:
        new = arguments.get("k")
        read = {**arguments, "k": None, "v": None}
        read["cache_seqlens"] = arguments["cache_seqlens"] + (0 if new is None else new.shape[1])
        twin_cache = cache
    twin = chunkattn.reference.dca_with_kvcache
    plain_cache = {name: None if x is None else x.clone() for name, x in twin_cache.items()}
    plain, plain_lse = twin(q, **plain_cache, **read, return_lse=True)
    exact_cache = twin_cache
    if not float8:
        exact_cache = {name: x.double() if name != "block_table" else x for name, x in pristine.items()}
    exact = {name: x.double() if name in ("k", "v") and x is not None else x for name, x in read.items()}
    oracle, oracle_lse = twin(q.double(), **exact_cache, **exact, return_lse=True)
    assert_within_rule(out, oracle, plain, "out")
    assert_lse_within_rule(lse, oracle_lse, plain_lse, q.dtype)
    if not float8:
        for name in ("k_cache", "v_cache"):
            written = ~exact_cache[name].isnan()
            assert torch.equal(~cache[name].isnan(), written), f"{name} has other slots written"
            results = (x[name].masked_fill(~written, 0) for x in (cache, exact_cache, plain_cache))
            assert_within_rule(*results, name)
    return out
