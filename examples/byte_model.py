"""The examples' byte-level Llama: its shape, its checkpoint, and how well it reads."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

CHECKPOINT = Path(__file__).parent / "byte_llama"
TRAINED_LENGTH = 512
SCORED_BYTES = 256  # of each window, the last ones


def byte_llama_config() -> LlamaConfig:
    """3.3 million parameters. A token is a byte; byte 0 separates files and there are no other special tokens."""
    return LlamaConfig(
        vocab_size=256,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=TRAINED_LENGTH,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )


def save(model: LlamaForCausalLM, folder: Path, dtype: torch.dtype) -> None:
    """Writes config.json and model.safetensors, the weights as `dtype`."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    model.config.dtype = dtype
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)


def load(folder: Path, dtype: torch.dtype, device: str, **config_changes) -> LlamaForCausalLM:
    """The model in `folder`, in eval mode. Raises FileNotFoundError when the folder holds no checkpoint."""
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"no checkpoint in {folder}: {name} is missing; train_byte_llama.py makes one")
    logging.disable_progress_bar()
    model = LlamaForCausalLM.from_pretrained(folder, dtype=dtype, **config_changes)
    return model.to(device).eval()


@torch.inference_mode()
def bits_per_byte(model: LlamaForCausalLM, windows: torch.Tensor) -> torch.Tensor:
    """Mean bits the model needs for each of the last SCORED_BYTES bytes, given all bytes of the window before it.

    windows: uint8 [B, L], L > SCORED_BYTES. Returns float64 [B] on the CPU.
    """
    tokens = windows.to(model.device, torch.long)
    targets = tokens[:, -SCORED_BYTES:]
    logits = model(input_ids=tokens[:, :-1], logits_to_keep=SCORED_BYTES, use_cache=False).logits
    nats = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
    return nats.view_as(targets).double().mean(1).cpu() / math.log(2)
