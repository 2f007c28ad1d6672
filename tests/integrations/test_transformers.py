"""enable_dca and disable_dca on tiny random models of every supported family.

The models run in float64, but transformers computes norms and rotary angles in float32 whatever the model's dtype, so
results agree to float32 rounding: measured 2e-6 on logits and activations of order 1 to 10. A wrong rotary row is
off by 0.1.
"""

import copy
import math

import pytest
import torch
from cases import skip_without_kernels
from torch._dynamo.testing import CompileCounterWithBackend

import chunkattn
from chunkattn import reference

transformers = pytest.importorskip("transformers", minversion="5.0")
integration = pytest.importorskip("chunkattn.integrations.transformers")
enable_dca, disable_dca = integration.enable_dca, integration.disable_dca
LengthTemperature = integration.LengthTemperature

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


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tensors this small only lose by threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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


def oracle_table(rotary):
    angles = torch.outer(torch.arange(CHUNK + 1, dtype=torch.float64), rotary.inv_freq.double())
    return angles.cos(), angles.sin()


def check_layers_against_oracle(model, tokens, temperature=None, **settings):
    """Each layer's attention equals the reference on that layer's own queries and keys, taken before rotation."""
    seen = {}
    handles = []
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
    logits(model, tokens)
    for handle in handles:
        handle.remove()
    rotary = model.model.rotary_emb
    cos, sin = oracle_table(rotary)
    for index, layer in enumerate(model.model.layers):
        head_dim = layer.self_attn.head_dim
        q, k, v = (seen[index, name].view(*tokens.shape, -1, head_dim) for name in ("q", "k", "v"))
        expected = reference.dca(
            q,
            k,
            v,
            cos,
            sin,
            scale=rotary.attention_scaling**2 / math.sqrt(head_dim),
            temperature=temperature,
            **settings,
        )
        close(seen[index, "out"], expected.flatten(2))


@pytest.fixture(scope="module")
def llama():
    """An enabled Llama that tests leave as they found it."""
    model = make_model()
    enable_dca(model, CHUNK, LOCAL)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_match_reference_on_unrotated_inputs(family):
    model = make_model(family)
    enable_dca(model, CHUNK, LOCAL)
    check_layers_against_oracle(model, make_tokens(), chunk_size=CHUNK, local_size=LOCAL)


@pytest.mark.parametrize("local_size", [1, 5, 7, 11])
def test_layers_match_reference_for_any_local_size(local_size):
    model = make_model()
    enable_dca(model, CHUNK, local_size)
    check_layers_against_oracle(model, make_tokens(), chunk_size=CHUNK, local_size=local_size)


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


@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES)
def test_scaled_rope_types(rope):
    model = make_model("Qwen3", rope_parameters={"rope_theta": 100.0, **rope})
    tokens = make_tokens()
    plain = logits(model, tokens[:, :STRIDE])
    enable_dca(model, CHUNK, LOCAL)
    close(logits(model, tokens[:, :STRIDE]), plain)
    check_layers_against_oracle(model, tokens, chunk_size=CHUNK, local_size=LOCAL)


def test_partial_rotary_factor_is_treated_as_the_model_treats_it():
    model = make_model(rope_parameters={"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5})
    tokens = make_tokens(length=STRIDE)
    plain = logits(model, tokens)
    enable_dca(model, CHUNK, LOCAL)
    close(logits(model, tokens), plain)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_first_chunk_equals_untouched_model_and_disable_restores_it(family, implementation):
    model = make_model(family, attn_implementation=implementation)
    tokens = make_tokens()
    config = model.config.to_dict()
    plain = logits(model, tokens)
    enable_dca(model, CHUNK, LOCAL)
    extended = logits(model, tokens)
    close(logits(model, tokens[:, :STRIDE]), plain[:, :STRIDE])
    close(extended[:, :STRIDE], plain[:, :STRIDE])
    assert (extended - plain)[:, CHUNK:].abs().max() > 0.1
    assert model.config.to_dict() == config

    disable_dca(model)
    assert torch.equal(logits(model, tokens), plain)
    assert model.config._attn_implementation == implementation
    assert model.config.to_dict() == config
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_enable_again_replaces_settings_and_disable_is_idempotent():
    model = make_model()
    tokens = make_tokens()
    disable_dca(model)
    plain = logits(model, tokens)
    enable_dca(model, CHUNK, LOCAL)
    expected = logits(model, tokens)
    enable_dca(model, 10, 7)
    assert (logits(model, tokens) - expected).abs().max() > 0.1
    enable_dca(model, CHUNK, LOCAL)
    assert torch.equal(logits(model, tokens), expected)
    disable_dca(model)
    disable_dca(model)
    assert torch.equal(logits(model, tokens), plain)


@pytest.mark.parametrize("family", FAMILIES)
def test_cached_steps_equal_one_forward(family):
    model = make_model(family)
    enable_dca(model, CHUNK, LOCAL)
    tokens = make_tokens()
    expected = logits(model, tokens)
    cache = transformers.DynamicCache(config=model.config)
    pieces = torch.split(tokens, [STRIDE - 1, 1, 1, 1, 11, 1, 1, CHUNK, 1, 1], dim=1)
    assert sum(piece.shape[1] for piece in pieces) == LENGTH
    steps = [logits(model, piece, past_key_values=cache) for piece in pieces]
    close(torch.cat(steps, dim=1), expected)


@pytest.mark.parametrize(
    "options",
    [{}, {"cache_implementation": "static"}, {"prefill_chunk_size": 3}, {"use_cache": False}],
    ids=["dynamic", "static", "chunked-prefill", "no-cache"],
)
def test_greedy_generation_equals_argmax_of_one_forward(llama, options):
    prompt = make_tokens(length=STRIDE - 3)
    sequences = llama.generate(prompt, max_new_tokens=2 * STRIDE + 5, do_sample=False, **options)
    predicted = logits(llama, sequences[:, :-1]).argmax(dim=-1)
    assert torch.equal(predicted[:, prompt.shape[1] - 1 :], sequences[:, prompt.shape[1] :])


def test_beam_search_reorders_the_cache(llama):
    prompt = make_tokens(length=STRIDE - 3)
    options = {"max_new_tokens": STRIDE + 5, "do_sample": False, "num_beams": 3}
    cached, recomputed = (llama.generate(prompt, use_cache=use_cache, **options) for use_cache in (True, False))
    assert torch.equal(cached, recomputed)


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


@pytest.mark.parametrize("positions", [None, "real tokens", "slots"])
@pytest.mark.parametrize("side", ["left", "right", "scattered"])
def test_padded_batch_equals_unpadded_rows(llama, side, positions):
    tokens, mask = padded(side)
    position_ids = {
        None: None,
        "real tokens": (mask.cumsum(1) - 1).masked_fill(mask == 0, 1),
        "slots": torch.arange(LENGTH)[None],
    }[positions]
    batched = logits(llama, tokens, attention_mask=mask, position_ids=position_ids)
    assert batched.isfinite().all()
    for row in range(3):
        real = mask[row].bool()
        close(batched[row, real], logits(llama, tokens[row, real][None])[0])


@pytest.mark.parametrize("side", ["left", "right", "scattered"])
def test_padded_batch_with_cache_equals_unpadded_rows(llama, side):
    tokens, mask = padded(side)
    cache = transformers.DynamicCache(config=llama.config)
    steps, seen = [], 0
    for piece in torch.split(tokens, [20, 1, 10, *[1] * 6], dim=1):
        seen += piece.shape[1]
        steps.append(logits(llama, piece, attention_mask=mask[:, :seen], past_key_values=cache))
    batched = torch.cat(steps, dim=1)
    assert batched.isfinite().all()
    for row in range(3):
        real = mask[row].bool()
        close(batched[row, real], logits(llama, tokens[row, real][None])[0])


@pytest.mark.parametrize("family", ["Llama", "Qwen2"])  # generate() prepares masks differently for these two
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_left_padded_generation_equals_unpadded_rows(family, cache):
    model = make_model(family)
    enable_dca(model, CHUNK, LOCAL)
    tokens, mask = padded("left")
    options = {"max_new_tokens": 5, "do_sample": False, "cache_implementation": cache}
    batched = model.generate(tokens, attention_mask=mask, **options)
    for row in range(3):
        alone = model.generate(tokens[row, mask[row].bool()][None], **options)
        assert torch.equal(batched[row, LENGTH:], alone[0, -5:])


def test_rows_without_real_tokens_and_masks_without_padding(llama):
    tokens = make_tokens()
    expected = logits(llama, tokens)
    assert torch.equal(logits(llama, tokens, attention_mask=torch.ones_like(tokens)), expected)
    mask = torch.ones_like(tokens)
    mask[1] = 0
    batched = logits(llama, tokens, attention_mask=mask)
    assert batched.isfinite().all()
    close(batched[0], expected[0])


def test_embeddings_and_positional_arguments(llama):
    tokens, mask = padded("left")
    expected = logits(llama, tokens, attention_mask=mask)
    embeddings = llama.model.embed_tokens(tokens)
    assert torch.equal(logits(llama, None, inputs_embeds=embeddings, attention_mask=mask), expected)
    with torch.no_grad():
        hidden = llama.model(tokens, mask).last_hidden_state
        assert torch.equal(llama.lm_head(hidden), expected)


def spy_on_dca(monkeypatch):
    calls = []
    original = chunkattn.dca

    def record(*args, **kwargs):
        calls.append(kwargs)
        return original(*args, **kwargs)

    monkeypatch.setattr(chunkattn, "dca", record)
    return calls


@pytest.mark.parametrize(
    ("options", "chunk_size", "local_size"),
    [
        ({"max_position_embeddings": 64}, 48, 8),
        ({"max_position_embeddings": 40, "rope_parameters": ROPES["linear"]}, 30, 5),
        ({"max_position_embeddings": 128, "rope_parameters": {"rope_theta": 1e4, **ROPES["llama3"]}}, 96, 16),
        ({"max_position_embeddings": 32, "rope_parameters": ROPES["yarn"]}, 96, 16),
        ({"max_position_embeddings": 128, "rope_parameters": ROPES["yarn"]}, 96, 16),
    ],
    ids=["default", "linear", "llama3", "yarn", "yarn-length-in-config"],
)
def test_defaults_follow_the_trained_length(monkeypatch, options, chunk_size, local_size):
    model = make_model("Qwen3", **options)
    enable_dca(model)
    calls = spy_on_dca(monkeypatch)
    logits(model, make_tokens(length=4))
    assert calls
    for call in calls:
        assert (call["chunk_size"], call["local_size"], call["temperature"]) == (chunk_size, local_size, 1)


QWEN_1M = {"chunk_size": CHUNK, "local_size": LOCAL, "original_max_position_embeddings": 10}


def test_dual_chunk_attention_config_is_honoured(monkeypatch):
    model = make_model("Qwen2", dual_chunk_attention_config=QWEN_1M)
    enable_dca(model)
    tokens = make_tokens()
    temperature = (0.1 * math.log(LENGTH / 10) + 1) ** 2
    check_layers_against_oracle(model, tokens, temperature, chunk_size=CHUNK, local_size=LOCAL)

    calls = spy_on_dca(monkeypatch)
    logits(model, tokens[:, :10])
    assert calls[-1]["temperature"] == 1
    enable_dca(model, 9, temperature=2.0)
    logits(model, tokens)
    assert [calls[-1][name] for name in ("chunk_size", "local_size", "temperature")] == [9, LOCAL, 2.0]


def test_config_without_original_length_has_no_temperature(monkeypatch):
    model = make_model("Qwen2", dual_chunk_attention_config={"chunk_size": CHUNK, "local_size": LOCAL})
    enable_dca(model)
    calls = spy_on_dca(monkeypatch)
    logits(model, make_tokens())
    assert calls[-1]["temperature"] == 1


def test_length_temperature():
    rule = integration.LengthTemperature(1000)
    assert rule(0) == rule(1) == rule(1000) == 1
    assert rule(8000) == pytest.approx((0.1 * math.log(8) + 1) ** 2)
    lengths = [1, 1000, 1001, 8000, 10**6]
    together = chunkattn.temperature(lengths, 1000)
    assert together.tolist() == pytest.approx([rule(length) for length in lengths], rel=2**-24, abs=0)


def test_temperature_follows_each_sequences_own_length():
    model = make_model()
    enable_dca(model, CHUNK, LOCAL, temperature=integration.LengthTemperature(10))
    tokens, mask = padded("left")
    batched = logits(model, tokens, attention_mask=mask)
    cache = transformers.DynamicCache(config=model.config)
    logits(model, tokens[:, :-1], attention_mask=mask[:, :-1], past_key_values=cache)
    assert logits(model, tokens[:, -1:], attention_mask=mask, past_key_values=cache).isfinite().all()
    for row in range(3):
        real = mask[row].bool()
        close(batched[row, real], logits(model, tokens[row, real][None])[0])


def loss_and_gradients(model, tokens):
    model.zero_grad()
    loss = model(tokens, labels=tokens).loss
    loss.backward()
    return loss.item(), [parameter.grad.clone() for parameter in model.parameters()]


def test_gradients():
    model = make_model().train()
    tokens = make_tokens()
    first_chunk = loss_and_gradients(model, tokens[:, :STRIDE])
    enable_dca(model, CHUNK, LOCAL)
    close(loss_and_gradients(model, tokens[:, :STRIDE]), first_chunk)

    _, gradients = loss_and_gradients(model, tokens)
    for name in ("q_proj", "k_proj", "v_proj"):
        weight = getattr(model.model.layers[0].self_attn, name).weight
        gradient = gradients[[id(parameter) for parameter in model.parameters()].index(id(weight))]
        direction = gradient / gradient.norm()
        losses = []
        for step in (1e-3, -1e-3):
            with torch.no_grad():
                weight += step * direction
                losses.append(model(tokens, labels=tokens).loss.item())
                weight -= step * direction
        assert (losses[0] - losses[1]) / 2e-3 == pytest.approx(gradient.norm().item(), rel=2e-3)


def test_gradients_after_inference_mode():
    model = make_model().train()
    enable_dca(model, CHUNK, LOCAL)
    tokens = make_tokens()
    with torch.inference_mode():
        expected = model(tokens, labels=tokens).loss.item()
    loss, _ = loss_and_gradients(model, tokens)
    assert loss == pytest.approx(expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant):
    model = make_model().train()
    enable_dca(model, CHUNK, LOCAL)
    tokens = make_tokens()
    expected = loss_and_gradients(model, tokens)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    if use_reentrant:
        model.enable_input_require_grads()
    close(loss_and_gradients(model, tokens), expected, atol=1e-9)


def test_peft_model():
    peft = pytest.importorskip("peft")
    model = make_model()
    tokens = make_tokens()
    plain = logits(model, tokens)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    enable_dca(wrapped, CHUNK, LOCAL)
    close(logits(wrapped, tokens)[:, :STRIDE], plain[:, :STRIDE])
    assert (logits(wrapped, tokens) - plain).abs().max() > 0.1
    sequences = wrapped.generate(input_ids=tokens[:, :10], max_new_tokens=STRIDE, do_sample=False)
    predicted = logits(wrapped, sequences[:, :-1]).argmax(dim=-1)
    assert torch.equal(predicted[:, 9:], sequences[:, 10:])
    disable_dca(wrapped)
    assert torch.equal(logits(wrapped, tokens), plain)


def test_other_heads_and_bare_decoders(llama):
    tokens = make_tokens()
    with torch.no_grad():
        expected = llama.model(tokens).last_hidden_state
        for head in ("Model", "ForSequenceClassification"):
            model = make_model(head=head)
            model.base_model.load_state_dict(llama.model.state_dict())
            enable_dca(model, CHUNK, LOCAL)
            assert torch.equal(model.base_model(tokens).last_hidden_state, expected)


def test_copies_and_casts_after_enabling_keep_their_settings():
    model = make_model(dtype=torch.float32)
    cast_before = copy.deepcopy(model).to(torch.bfloat16)
    tokens = make_tokens()
    plain = logits(model, tokens)
    enable_dca(model, CHUNK, LOCAL)
    expected = logits(model, tokens)

    clone = copy.deepcopy(model)
    disable_dca(model)
    assert torch.equal(logits(model, tokens), plain)
    assert torch.equal(logits(clone, tokens), expected)

    enable_dca(cast_before, CHUNK, LOCAL)
    assert torch.equal(logits(clone.to(torch.bfloat16), tokens), logits(cast_before, tokens))


def test_saved_checkpoint_does_not_depend_on_dca(llama, tmp_path):
    llama.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config._attn_implementation == "sdpa"
    tokens = make_tokens()
    enable_dca(loaded, CHUNK, LOCAL)
    close(logits(loaded, tokens), logits(llama, tokens))


@pytest.mark.parametrize("length", [STRIDE, LENGTH])
def test_autocast(length):
    """bfloat16 costs no more than it costs the untouched model (FlashAttention's tolerance rule)."""
    model = make_model(dtype=torch.float32)
    tokens, mask = make_tokens(length=length), torch.ones(2, length, dtype=torch.long)
    mask[1, :3] = 0
    exact = logits(model, tokens, attention_mask=mask)[mask.bool()]
    with torch.autocast("cpu", torch.bfloat16):
        plain = logits(model, tokens, attention_mask=mask)[mask.bool()]
    tolerance = 2 * (plain - exact).abs().max().item()
    enable_dca(model, CHUNK, LOCAL)
    exact = logits(model, tokens, attention_mask=mask)[mask.bool()]
    with torch.autocast("cpu", torch.bfloat16):
        close(logits(model, tokens, attention_mask=mask)[mask.bool()].float(), exact, atol=tolerance)


UNSUPPORTED_MODELS = {
    "GPT2LMHeadModel": ("GPT2Config", {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": VOCAB}),
    "BertModel": (
        "BertConfig",
        {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16},
    ),
    "T5ForConditionalGeneration": ("T5Config", {"d_model": 16, "num_layers": 1, "num_heads": 2, "d_ff": 16, "d_kv": 8}),
    "Gemma2ForCausalLM": (
        "Gemma2Config",
        {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 8, "vocab_size": VOCAB},
    ),
}


@pytest.mark.parametrize("name", UNSUPPORTED_MODELS)
@pytest.mark.parametrize("function", [enable_dca, disable_dca])
def test_unsupported_model(name, function):
    config, options = UNSUPPORTED_MODELS[name]
    model = getattr(transformers, name)(getattr(transformers, config)(**options))
    with pytest.raises(ValueError, match=f"model must be one of .*Llama.*Qwen3.*got {name}"):
        function(model)


def test_unsupported_module():
    with pytest.raises(ValueError, match=r"model must be one of .* got Linear"):
        enable_dca(torch.nn.Linear(2, 2))


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


@pytest.mark.parametrize(
    ("family", "options", "settings", "message"),
    [
        ("Llama", {"rope_parameters": DYNAMIC_ROPES["dynamic"]}, {}, "rope_type must be one of default.*'dynamic'"),
        ("Llama", {"rope_parameters": DYNAMIC_ROPES["longrope"]}, {}, "rope_type must be one of .*yarn.*'longrope'"),
        ("Mistral", {"sliding_window": 16}, {}, "sliding_window must be None, got 16"),
        ("Mixtral", {"sliding_window": 16}, {}, "sliding_window must be None, got 16"),
        ("Qwen2", {"use_sliding_window": True, "max_window_layers": 1}, {}, "sliding_window must be None"),
        ("Qwen2Moe", {"use_sliding_window": True}, {}, "sliding_window must be None"),
        ("Qwen3", {"use_sliding_window": True, "max_window_layers": 1}, {}, "sliding_window must be None"),
        ("Qwen3Moe", {"use_sliding_window": True}, {}, "sliding_window must be None"),
        ("Llama", {}, {"chunk_size": 24.0}, "chunk_size must be an int, got 24.0"),
        ("Llama", {}, {"local_size": True}, "local_size must be an int, got True"),
        ("Llama", {}, {"chunk_size": 9, "local_size": 9}, "local_size must lie between .*local_size=9"),
        ("Llama", {}, {"chunk_size": 9, "local_size": 0}, "local_size must lie between .*local_size=0"),
        ("Llama", {}, {"chunk_size": 2}, "local_size must lie between .*local_size=2 and chunk_size=2"),
        ("Llama", {"max_position_embeddings": 6}, {}, "local_size must lie between .*local_size=0"),
        ("Llama", {}, {"temperature": 0.0}, "temperature must be a positive number or a function"),
        ("Llama", {}, {"temperature": math.nan}, "temperature must be a positive number or a function"),
        ("Llama", {}, {"temperature": "qwen"}, "temperature must be a positive number or a function"),
    ],
)
def test_unsupported_settings_leave_the_model_as_it_was(family, options, settings, message):
    model = make_model(family, **options)
    tokens = make_tokens(length=8)
    plain = logits(model, tokens)
    with pytest.raises(ValueError, match=message):
        enable_dca(model, **settings)
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(logits(model, tokens), plain)


def test_sliding_window_that_no_layer_uses_is_accepted():
    model = make_model("Qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=2)
    enable_dca(model, CHUNK, LOCAL)
    check_layers_against_oracle(model, make_tokens(), chunk_size=CHUNK, local_size=LOCAL)


PACKED = torch.cat((torch.arange(20), torch.arange(LENGTH - 20)))[None]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"output_attentions": True}, "output_attentions must be False"),
        ({"is_causal": False}, "is_causal must be True"),
        ({"position_ids": PACKED}, "position_ids must count .*packed sequences"),
        ({"position_ids": torch.arange(LENGTH)[None] + 3}, "position_ids must count"),
        ({"position_ids": torch.arange(LENGTH)[None, None]}, "position_ids must have shape"),
        ({"attention_mask": torch.ones(2, 1, LENGTH, LENGTH)}, "attention_mask must be a padding mask"),
        ({"attention_mask": torch.ones(2, LENGTH - 1)}, r"attention_mask must be a padding mask .*\[2, 36\]"),
        ({"attention_mask": torch.ones(1, LENGTH)}, "attention_mask must be a padding mask"),
    ],
)
def test_unsupported_calls(llama, call, message):
    with pytest.raises(ValueError, match=message):
        logits(llama, make_tokens(), **call)


def test_right_padded_generation_is_refused(llama):
    tokens, mask = padded("right")
    with pytest.raises(ValueError, match="position_ids must count"):
        llama.generate(tokens, attention_mask=mask, max_new_tokens=2)


def test_attention_dropout_is_refused_in_training():
    model = make_model(attention_dropout=0.1)
    tokens = make_tokens()
    enable_dca(model, CHUNK, LOCAL)
    logits(model, tokens)
    with pytest.raises(ValueError, match=r"attention_dropout must be 0 .*got 0\.1"):
        model.train()(tokens)


def test_attention_implementation_changed_while_enabled():
    model = make_model()
    tokens = make_tokens()
    plain = logits(model, tokens)
    enable_dca(model, CHUNK, LOCAL)
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="set to 'eager' while Dual Chunk Attention is enabled"):
        logits(model, tokens)
    disable_dca(model)
    assert torch.equal(logits(model, tokens), plain)


def test_attention_implementation_set_by_hand():
    model = make_model()
    model.set_attn_implementation(integration.ATTN_IMPLEMENTATION)
    with pytest.raises(ValueError, match=r"needs enable_dca\(model\)"):
        logits(model, make_tokens())


def test_config_shared_with_an_enabled_model():
    model = make_model()
    tokens = make_tokens()
    sharing = type(model)(model.config).to(torch.float64).eval()
    plain = logits(sharing, tokens)
    enable_dca(model, CHUNK, LOCAL)
    with pytest.raises(ValueError, match=r"config already names .*shared with an enabled model"):
        enable_dca(sharing, CHUNK, LOCAL)
    with pytest.raises(ValueError, match="shared through one config with an enabled model"):
        logits(sharing, tokens)
    disable_dca(model)
    assert torch.equal(logits(sharing, tokens), plain)


def test_cache_that_drops_keys_is_refused(llama):
    config = copy.deepcopy(llama.config)
    config.sliding_window = 8
    cache = transformers.DynamicCache(config=config)
    tokens = make_tokens()
    logits(llama, tokens[:, :10], past_key_values=cache)
    with pytest.raises(ValueError, match="past_key_values must keep every key, got 8 keys for 11 tokens"):
        logits(llama, tokens[:, 10:11], past_key_values=cache)


def calls_of(monkeypatch, name):
    """The keyword arguments of every call of chunkattn's function `name` from now on."""
    calls, function = [], getattr(chunkattn, name)

    def spy(*args, **kwargs):
        calls.append(kwargs)
        return function(*args, **kwargs)

    monkeypatch.setattr(chunkattn, name, spy)
    return calls


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_decodes_over_the_cache(llama, monkeypatch, cache):
    layers = llama.config.num_hidden_layers
    prefill, decode = (calls_of(monkeypatch, name) for name in ("dca", "dca_with_kvcache"))
    llama.generate(make_tokens(), max_new_tokens=4, do_sample=False, cache_implementation=cache)
    assert len(prefill) == layers
    assert len(decode) == 3 * layers
    if cache == "static":  # the length stays on the device
        assert [call["cache_seqlens"].tolist() for call in decode[::layers]] == [[LENGTH + n] * 2 for n in (1, 2, 3)]


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_without_kernels_for_decoding(llama, monkeypatch, cache):
    options = {"max_new_tokens": 4, "do_sample": False, "cache_implementation": cache}
    expected = llama.generate(make_tokens(), **options)
    monkeypatch.setattr(integration, "has_kernels", lambda operator, device: operator != "dca_with_kvcache")
    prefill, decode = (calls_of(monkeypatch, name) for name in ("dca", "dca_with_kvcache"))
    assert torch.equal(llama.generate(make_tokens(), **options), expected)
    assert len(prefill) == 4 * llama.config.num_hidden_layers
    assert not decode


def static_steps(model, step, tokens, prompt):
    """Logits of tokens read through a static cache, those after the prompt one by one by `step`."""
    cache = transformers.StaticCache(config=model.config, max_cache_len=tokens.shape[1] + 5)
    pieces = [logits(model, tokens[:, :prompt], past_key_values=cache)]
    with torch.no_grad():
        for n in range(prompt, tokens.shape[1]):
            # The next replay of a CUDA graph overwrites what this one returned.
            pieces.append(step(tokens[:, n : n + 1], past_key_values=cache).logits.clone())
    return torch.cat(pieces, dim=1)


@pytest.mark.parametrize("prompt", [1, STRIDE - 1, 20])
def test_static_cache_step_by_step_equals_one_forward(llama, prompt):
    tokens = make_tokens()
    close(static_steps(llama, llama, tokens, prompt), logits(llama, tokens))


def test_a_static_cache_is_used_without_waiting_for_its_length(llama, monkeypatch):
    tokens = make_tokens()
    cache = transformers.StaticCache(config=llama.config, max_cache_len=LENGTH)
    logits(llama, tokens[:, :-1], past_key_values=cache)
    with monkeypatch.context() as patch:
        for name in ("item", "__int__", "__bool__", "tolist", "__index__"):
            patch.setattr(torch.Tensor, name, lambda *_: pytest.fail("the host waited for the device"))
        last = logits(llama, tokens[:, -1:], past_key_values=cache)
    close(last, logits(llama, tokens)[:, -1:])


def test_static_cache_and_a_temperature_of_the_length():
    # Each step has the temperature of its own length, whichever cache it reads and wherever the length is known.
    model = make_model()
    tokens = make_tokens()
    enable_dca(model, CHUNK, LOCAL, temperature=LengthTemperature(8))
    cache = transformers.DynamicCache(config=model.config)
    pieces = torch.split(tokens, [20, *[1] * (LENGTH - 20)], dim=1)
    expected = torch.cat([logits(model, piece, past_key_values=cache) for piece in pieces], dim=1)
    close(static_steps(model, model, tokens, 20), expected)
    enable_dca(model, CHUNK, LOCAL, temperature=lambda length: LengthTemperature(8)(length))
    close(static_steps(model, model, tokens, 20), expected)


def test_compiled_decoding_over_a_static_cache(llama):
    # Compiled once: neither the growing length nor what is in the cache makes another graph.
    torch.compiler.reset()
    tokens = make_tokens()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(llama, fullgraph=True, backend=counter)
    close(static_steps(llama, compiled, tokens, 20), logits(llama, tokens))
    assert counter.frame_count == 1


def test_generation_with_a_compiled_forward_on_cuda(cuda):
    # generate() compiles with reduce-overhead, CUDA graphs, by itself for a static cache on a GPU.
    skip_without_kernels(cuda, "dca_with_kvcache")
    torch.compiler.reset()
    model = make_model(dtype=torch.bfloat16, head_dim=64).to(cuda)
    enable_dca(model, CHUNK, LOCAL)
    tokens = make_tokens().to(cuda)
    compiled = torch.compile(model, fullgraph=True, mode="reduce-overhead")
    eager = static_steps(model, model, tokens, 20)
    torch.testing.assert_close(static_steps(model, compiled, tokens, 20), eager, rtol=0, atol=0.05)
    options = {"max_new_tokens": 2 * STRIDE, "do_sample": False}
    sequences = model.generate(tokens, cache_implementation="static", **options)
    assert sequences.shape == (2, LENGTH + 2 * STRIDE)
