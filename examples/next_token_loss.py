"""The loss of a causal language model on long sequences, without all of their logits at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

TOKENS_PER_BLOCK = 4096


def next_token_loss(
    model: nn.Module, tokens: Tensor, tokens_per_block: int = TOKENS_PER_BLOCK, **model_inputs: Any
) -> Tensor:
    """Mean nats per token of `tokens` [B, L + 1], each predicted from those before it: the model reads L of them.

    Logits are formed for a block of tokens at a time, and again in the backward: those of 32768 tokens and a vocabulary
    of 32000 would take 4 GB in float32, and their gradients as much.

    model: a causal language model of transformers, or a PEFT model that adapts layers of one.
    model_inputs: more keyword arguments of its forward.
    """
    causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
    hidden = causal_lm.base_model(input_ids=tokens[:, :-1], use_cache=False, **model_inputs).last_hidden_state
    head = causal_lm.get_output_embeddings()
    targets = tokens[:, 1:].flatten()

    def block_loss(block: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(head(block).float(), target, reduction="sum")

    blocks = zip(hidden.flatten(0, 1).split(tokens_per_block), targets.split(tokens_per_block), strict=True)
    return torch.stack([checkpoint(block_loss, *block, use_reentrant=False) for block in blocks]).sum() / len(targets)
