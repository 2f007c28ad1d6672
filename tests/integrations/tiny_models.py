"""Tiny random models of every supported family, and how they are run and compared.

The models run in float64, but transformers computes norms and rotary angles in float32 whatever the model's dtype, so
results agree to float32 rounding: measured 2e-6 on logits and activations of order 1 to 10. A wrong rotary row is
off by 0.1.
"""

import pytest
import torch

import chunkattn

transformers = pytest.importorskip("transformers", minversion="5.0")

ATOL = 1e-5
VOCAB = 61
CHUNK, LOCAL = 12, 4
STRIDE = CHUNK - LOCAL
LENGTH = 37  # four chunk boundaries, none of them at the end

# transformers' fused experts have no float64.
MOE = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "experts_implementation": "eager",
}
FAMILIES = {
    "Llama": {},
    "Mistral": {"sliding_window": None},
    "Mixtral": {"sliding_window": None, **MOE},
    "Qwen2": {},
    "Qwen2Moe": {"shared_expert_intermediate_size": 32, **MOE},
    "Qwen3": {"head_dim": 32},
    "Qwen3Moe": {"head_dim": 32, **MOE},
}
ROPES = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
}
DYNAMIC_ROPES = {
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "longrope": {
        "rope_type": "longrope",
        "factor": 2.0,
        "short_factor": [1.0] * 8,
        "long_factor": [2.0] * 8,
        "original_max_position_embeddings": 16,
    },
}


def make_model(family="Llama", dtype=torch.float64, head="ForCausalLM", **options):
    options = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 96,
        "vocab_size": VOCAB,
        "max_position_embeddings": 16,
        "initializer_range": 0.2,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": None,
        **FAMILIES[family],
        **options,
    }
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**options)
    return getattr(transformers, f"{family}{head}")(config).to(dtype).eval()


def make_tokens(batch=2, length=LENGTH, seed=1):
    return torch.randint(1, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model, tokens, **kwargs):
    return model(tokens, **kwargs).logits


def close(actual, expected, atol=ATOL):
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def as_near(actual, peer, reference, factor=2):
    """Asserts that 16-bit results are as near to a float32 reference as others of the same dtype are, by a factor."""
    error, peer_error = ((x.cpu().float() - reference).abs().max().item() for x in (actual, peer))
    assert error <= factor * peer_error


def static_steps(model, step, tokens, prompt):
    """Logits of tokens read through a static cache, those after the prompt one by one by `step`."""
    cache = transformers.StaticCache(config=model.config, max_cache_len=tokens.shape[1] + 5)
    pieces = [logits(model, tokens[:, :prompt], past_key_values=cache)]
    with torch.no_grad():
        for n in range(prompt, tokens.shape[1]):
            # The next replay of a CUDA graph overwrites what this one returned.
            pieces.append(step(tokens[:, n : n + 1], past_key_values=cache).logits.clone())
    return torch.cat(pieces, dim=1)


def padded(side):
    """Tokens [3, LENGTH] and a mask whose rows hold 37, 25 and 6 real tokens."""
    tokens, mask = make_tokens(3), torch.ones(3, LENGTH, dtype=torch.long)
    for row, count in ((1, 25), (2, 6)):
        if side == "left":
            mask[row, : LENGTH - count] = 0
        elif side == "right":
            mask[row, count:] = 0
        else:
            mask[row, torch.randperm(LENGTH, generator=torch.Generator().manual_seed(row))[count:]] = 0
    return tokens * mask, mask


def check_padded_steps(model, side):
    """A padded batch that is read through a cache piece by piece scores as each row without padding."""
    tokens, mask = padded(side)
    cache = transformers.DynamicCache(config=model.config)
    steps, seen = [], 0
    for piece in torch.split(tokens, [20, 1, 10, *[1] * 6], dim=1):
        seen += piece.shape[1]
        steps.append(logits(model, piece, attention_mask=mask[:, :seen], past_key_values=cache))
    batched = torch.cat(steps, dim=1)
    assert batched.isfinite().all()
    for row in range(3):
        real = mask[row].bool()
        close(batched[row, real], logits(model, tokens[row, real][None])[0])


def check_left_padded_generation(model, cache, new_tokens):
    """generate() from a left-padded batch says what it says from each row without padding."""
    tokens, mask = padded("left")
    options = {"max_new_tokens": new_tokens, "do_sample": False, "cache_implementation": cache}
    batched = model.generate(tokens, attention_mask=mask, **options)
    for row in range(3):
        alone = model.generate(tokens[row, mask[row].bool()][None], **options)
        assert torch.equal(batched[row, LENGTH:], alone[0, -new_tokens:])


def loss_and_gradients(model, tokens, **kwargs):
    model.zero_grad()
    loss = model(tokens, labels=tokens, **kwargs).loss
    loss.backward()
    return loss.item(), [parameter.grad.clone() for parameter in model.parameters()]


def calls_of(monkeypatch, name):
    """The keyword arguments of every call of chunkattn's function `name` from now on."""
    calls, function = [], getattr(chunkattn, name)

    def spy(*args, **kwargs):
        calls.append(kwargs)
        return function(*args, **kwargs)

    monkeypatch.setattr(chunkattn, name, spy)
    return calls


@torch.no_grad()
def attention_of_layers(model, tokens, **kwargs):
    """For each layer: q, k and v before rotation, [B, S, heads, D], and what attention returned, [B, S, Hq * D]."""
    seen, handles = {}, []
    for index, layer in enumerate(model.model.layers):
        attention = layer.self_attn
        for name in ("q", "k", "v"):
            source = getattr(attention, f"{name}_norm", None) or getattr(attention, f"{name}_proj")
            handles.append(
                source.register_forward_hook(lambda _, __, out, key=(index, name): seen.__setitem__(key, out))
            )
        handles.append(
            attention.o_proj.register_forward_pre_hook(
                lambda _, args, key=(index, "out"): seen.__setitem__(key, args[0])
            )
        )
    model(tokens, **kwargs)
    for handle in handles:
        handle.remove()
    head_dim = model.model.layers[0].self_attn.head_dim
    return [
        (*(seen[index, name].view(*tokens.shape, -1, head_dim) for name in "qkv"), seen[index, "out"])
        for index in range(len(model.model.layers))
    ]
