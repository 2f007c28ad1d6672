"""Where the real tokens of a batch lie, and the positions transformers gives them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class SequenceTokens:
    """Where the real tokens of one batch row lie."""

    keys: slice | Tensor  # cache slots
    queries: slice | Tensor  # among the new tokens; they are the last of the keys
    length: int  # number of keys


def padding_mask(mask: Any, batch: int, key_length: int, device: torch.device) -> Tensor | None:
    """Boolean [B, key_length], True at real tokens; None without padding."""
    if isinstance(mask, Mapping):  # generate() prepares one per layer type for static caches
        mask = mask["full_attention"]
    if mask is None:
        return None
    if mask.ndim != 2 or mask.shape[0] != batch or mask.shape[1] < key_length:
        raise ValueError(
            f"attention_mask must be a padding mask over cached and new tokens, of shape [{batch}, {key_length}], "
            f"got {list(mask.shape)}"
        )
    real = mask[:, :key_length].to(device=device, dtype=torch.bool)
    return None if real.all() else real


def check_positions(given: Tensor | None, positions: Tensor, slots: Tensor, is_new: Tensor | None, method: str) -> None:
    """Positions that count a row's real tokens pass, and so do those that count its padding too: they are relative."""
    if given is None:
        return
    if given.ndim != 2 or given.shape[1] != slots.shape[1]:
        raise ValueError(
            f"position_ids must have shape [batch, tokens] with {slots.shape[1]} tokens, got {list(given.shape)}"
        )
    given = given.to(positions.device)
    ignored = False if is_new is None else ~is_new
    agrees = [((given == expected) | ignored).all(dim=1) for expected in (positions, slots)]
    if not (agrees[0] | agrees[1]).all():
        raise ValueError(
            "position_ids must count each sequence's tokens from 0, cached ones included; packed sequences and other "
            f"positions are not supported with {method}"
        )


def locate_tokens(real: Tensor, cached: int) -> list[SequenceTokens]:
    """The real tokens of each row of the padding mask [B, cached + new]."""
    length = real.shape[1]
    begin = real.int().argmax(dim=1)
    end = length - real.flip(1).int().argmax(dim=1)
    count = real.sum(dim=1)
    sequences = []
    for row, (first, last, tokens) in enumerate(torch.stack((begin, end, count), dim=1).tolist()):
        if last - first == tokens:
            keys = slice(first, last)
            queries = slice(max(first - cached, 0), max(last - cached, 0))
        else:
            # On the CPU: an index from there serves layers on any device.
            keys = real[row].nonzero().flatten().cpu()
            queries = real[row, cached:].nonzero().flatten().cpu()
        sequences.append(SequenceTokens(keys, queries, tokens))
    return sequences


def attend_rows(
    sequences: list[SequenceTokens], q: Tensor, dtype: torch.dtype, attend: Callable[[int, SequenceTokens], Tensor]
) -> Tensor:
    """Attention of a padded batch, one row after the other; the rows of padding are 0.

    attend(row, tokens) returns [1, queries, Hq, D] for a row's real queries, those q [B, S, Hq, D] has at
    tokens.queries; the result is [B, S, Hq, D] of dtype.
    """
    out = torch.zeros_like(q, dtype=dtype)
    for row, tokens in enumerate(sequences):
        if q[row, tokens.queries].shape[0]:
            out[row, tokens.queries] = attend(row, tokens)[0]
    return out
