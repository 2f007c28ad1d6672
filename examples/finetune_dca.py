"""Fine-tunes a causal language model of Hugging Face with Dual Chunk Attention, on text longer than it was trained for.

    python examples/finetune_dca.py
    python examples/finetune_dca.py --model meta-llama/Llama-2-7b-hf --lora 8 --length 16384 --gradient-checkpointing

By default the byte-level Llama of extend_context.py, trained on 512 bytes, learns to read 2048: some minutes on two
cores. The text is that of train_byte_llama.py: sources of the installed packages, the standard library held out. The
end of held-out windows is scored before and after, in bits per byte, by how much text stands before it.
"""

from __future__ import annotations

import argparse
import sys

try:
    import finetuning

    from chunkattn.integrations.transformers import enable_dca
except ImportError as error:
    sys.exit(f"finetune_dca.py: {error}; `pip install 'chunkattn[demo]'` installs what it needs")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    finetuning.add_arguments(parser, plot="finetune_dca.png")
    parser.add_argument("--chunk-size", type=int, help="of DCA (default: 3/4 of the model's trained length)")
    parser.add_argument("--local-size", type=int, help="of DCA (default: 1/8 of the model's trained length)")
    args = parser.parse_args(argv)
    finetuning.check_arguments(parser, args)
    return args


METHOD = finetuning.Method(
    "finetune_dca.py", enable=lambda model, args: enable_dca(model, args.chunk_size, args.local_size)
)


def main(argv: list[str] | None = None) -> None:
    finetuning.run(METHOD, parse_arguments(argv))


if __name__ == "__main__":
    main()
