"""Training with dca goes where training with the oracle goes: the loss of 100 steps, to the noise of the dtype."""

import pytest
import torch
from torch import Tensor

import chunkattn

pytest.importorskip("transformers", minversion="5")
from transformers import LlamaConfig, LlamaForCausalLM

from chunkattn.integrations.transformers import enable_dca

CHUNK, LOCAL = 32, 8
LENGTH = 3 * (CHUNK - LOCAL) + 7  # three chunks and a part of one
STEPS = 100
VOCABULARY = 32
FLOAT32_NOISE = 1e-5  # of the loss, in nats

DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.bfloat16,)}


def make_model(device: torch.device) -> LlamaForCausalLM:
    """Grouped heads of 64, which Hopper's own kernels take."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=64,
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    enable_dca(model, CHUNK, LOCAL)
    return model.to(device).train()


def make_batches() -> Tensor:
    """[batches, 2, LENGTH]: a sequence repeats itself after a distance of its own, within a chunk and across them."""
    generator = torch.Generator().manual_seed(1)
    sequences = []
    for period in (9, 20, 33, 41, 50, 64, 70, 90):
        pattern = torch.randint(VOCABULARY, (period,), generator=generator)
        sequences.append(pattern.repeat(LENGTH // period + 1)[:LENGTH])
    return torch.stack(sequences).view(4, 2, LENGTH)


def train(device: torch.device, dtype: torch.dtype) -> Tensor:
    """The loss of every step, float64 [STEPS]. Weights are float32; dtype is that of autocast."""
    model = make_model(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)
    batches = make_batches().to(device)
    losses = []
    for step in range(STEPS):
        tokens = batches[step % len(batches)]
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses).double().cpu()


def oracle(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, **options) -> Tensor:
    """chunkattn.reference.dca, cast by autocast as the operator is."""
    device = q.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else q.dtype
    with torch.autocast(device, enabled=False):
        return chunkattn.reference.dca(q.to(dtype), k.to(dtype), v.to(dtype), cos, sin, **options)


def test_loss_follows_the_oracles(device, monkeypatch):
    ours = {dtype: train(device, dtype) for dtype in DTYPES[device.type]}
    monkeypatch.setattr(chunkattn, "dca", oracle)
    exact = train(device, torch.float32)
    assert exact[-4:].mean() < 0.4 * exact[:4].mean(), "the task must be one that is learned"
    for dtype, losses in ours.items():
        plain = exact if dtype == torch.float32 else train(device, dtype)
        # A mean over steps: each one's difference is noise, that of a wrong gradient grows.
        difference, noise = ((x - y).abs().mean().item() for x, y in ((losses, plain), (plain, exact)))
        assert difference <= 2 * noise + FLOAT32_NOISE, (
            f"{dtype}: {difference:.2g} from the oracle, whose own noise is {noise:.2g}"
        )
