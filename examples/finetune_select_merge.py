"""Fine-tunes a causal language model of Hugging Face with select-and-merge attention and CRD NTK, on long text.

    python examples/finetune_select_merge.py
    python examples/finetune_select_merge.py --model meta-llama/Llama-2-7b-hf --length 32768 --gradient-checkpointing
    python examples/finetune_select_merge.py --shape llama2-7b

By default LoRA adapters teach the byte-level Llama of extend_context.py, trained on 512 bytes, to read 2048: some
minutes on two cores. Each step shows it its windows at other positions and with another rotary base, drawn by CRD NTK.
Text and scores are those of finetune_dca.py; held-out text is read at its true positions, with the base of --ntk-scale.
--shape trains a model of random weights, llama2-7b in the setting of arXiv 2410.04211 (32768 tokens, 384 regions of 16
tokens for groups of 128), to see what it takes: text is read as bytes then, and scores mean nothing.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

try:
    import finetuning
    import torch
    from torch import nn
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

    from chunkattn.integrations.transformers import crd_ntk, enable_select_merge
except ImportError as error:
    sys.exit(f"finetune_select_merge.py: {error}; `pip install 'chunkattn[demo]' peft` installs what it needs")

SHAPES = {
    "llama2-7b": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
    },
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
    },
}

# What --shape llama2-7b sets: the lengths of arXiv 2410.04211, and as many steps as show what one takes.
PAPER = {"length": 32768, "top_k": 384, "merge": 128, "gradient_checkpointing": True}
PAPER |= {"base_period": 8, "steps": 10, "samples": 1}

# P of CRD NTK in trained lengths, those of arXiv 2410.04211 for a model trained on 4096 tokens.
PERIOD_START, PERIOD_MAX = 8, 256


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    finetuning.add_arguments(parser, plot="finetune_select_merge.png", batch=1)
    parser.set_defaults(lora=8, learning_rate=2e-3)
    parser.add_argument("--shape", choices=SHAPES, help="train a model of random weights of this shape instead")
    parser.add_argument("--region-size", type=int, default=16, help="tokens of a region (default: %(default)s)")
    parser.add_argument("--top-k", type=int, default=24, help="regions selected (default: %(default)s)")
    parser.add_argument("--merge", type=int, default=8, help="regions of a group (default: %(default)s)")
    parser.add_argument("--selection", choices=("lookahead", "causal"), default="causal", help="default: %(default)s")
    parser.add_argument("--no-crd-ntk", action="store_true", help="train at the true positions, with --ntk-scale")
    parser.add_argument(
        "--base-period",
        type=int,
        default=2,
        metavar="N",
        help="M0 of CRD NTK in trained lengths (default: %(default)s)",
    )
    parser.add_argument("--grow-every", type=int, default=2000, help="steps between doublings of CRD NTK's period")
    parser.add_argument("--ntk-scale", type=float, help="lambda when reading (default: 2 * length / trained length)")
    parser.add_argument("--full", action="store_true", help="train the weights, not adapters")
    if parser.parse_known_args(argv)[0].shape == "llama2-7b":
        parser.set_defaults(**PAPER)
    args = parser.parse_args(argv)
    args.lora = None if args.full else args.lora
    finetuning.check_arguments(parser, args)
    return args


def load(args: argparse.Namespace) -> tuple[nn.Module, PreTrainedTokenizerBase | None]:
    if args.shape is None:
        return finetuning.load_model(args)
    with torch.device(args.device):
        dtype = getattr(torch, args.dtype) if args.lora else torch.float32
        return LlamaForCausalLM._from_config(LlamaConfig(**SHAPES[args.shape]), dtype=dtype), None


def enable(model: nn.Module, args: argparse.Namespace) -> None:
    if args.ntk_scale is None:
        args.ntk_scale = max(1.0, 2 * args.length / model.config.max_position_embeddings)
    enable_select_merge(
        model,
        region_size=args.region_size,
        top_k=args.top_k,
        merge=args.merge,
        selection=args.selection,
        ntk_scale=args.ntk_scale,
    )


def draw_positions(model: nn.Module, step: int, args: argparse.Namespace) -> dict[str, Any]:
    """The positions and the base of one step: nothing but the step changes from one to the next."""
    if args.no_crd_ntk:
        return {}
    trained_length = model.config.max_position_embeddings
    rule = crd_ntk(
        model,
        base_period=args.base_period * trained_length,
        period_start=PERIOD_START * trained_length,
        period_max=PERIOD_MAX * trained_length,
        grow_every=args.grow_every,
    )
    return {"rotary": rule.draw(step, args.length, torch.Generator().manual_seed(args.seed))}


METHOD = finetuning.Method("finetune_select_merge.py", enable=enable, model_inputs=draw_positions, load=load)


def main(argv: list[str] | None = None) -> None:
    finetuning.run(METHOD, parse_arguments(argv))


if __name__ == "__main__":
    main()
