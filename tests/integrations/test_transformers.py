"""enable_dca and disable_dca on tiny random models of every supported family."""

import copy
import math

import pytest
import torch
from tiny_models import (
    CHUNK,
    DYNAMIC_ROPES,
    FAMILIES,
    LENGTH,
    LOCAL,
    ROPES,
    STRIDE,
    VOCAB,
    attention_of_layers,
    calls_of,
    close,
    logits,
    loss_and_gradients,
    make_model,
    make_tokens,
    padded,
)

import chunkattn
from chunkattn import reference
from chunkattn.integrations.transformers import ATTN_IMPLEMENTATION, LengthTemperature, disable_dca, enable_dca

transformers = pytest.importorskip("transformers")


def oracle_table(rotary):
    angles = torch.outer(torch.arange(CHUNK + 1, dtype=torch.float64), rotary.inv_freq.double())
    return angles.cos(), angles.sin()


def check_layers_against_oracle(model, tokens, temperature=None, **settings):
    """Each layer's attention equals the reference on that layer's own queries and keys, taken before rotation."""
    rotary = model.model.rotary_emb
    cos, sin = oracle_table(rotary)
    for q, k, v, out in attention_of_layers(model, tokens):
        scale = rotary.attention_scaling**2 / math.sqrt(q.shape[-1])
        expected = reference.dca(q, k, v, cos, sin, scale=scale, temperature=temperature, **settings)
        close(out, expected.flatten(2))


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
    calls = calls_of(monkeypatch, "dca")
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

    calls = calls_of(monkeypatch, "dca")
    logits(model, tokens[:, :10])
    assert calls[-1]["temperature"] == 1
    enable_dca(model, 9, temperature=2.0)
    logits(model, tokens)
    assert [calls[-1][name] for name in ("chunk_size", "local_size", "temperature")] == [9, LOCAL, 2.0]


def test_config_without_original_length_has_no_temperature(monkeypatch):
    model = make_model("Qwen2", dual_chunk_attention_config={"chunk_size": CHUNK, "local_size": LOCAL})
    enable_dca(model)
    calls = calls_of(monkeypatch, "dca")
    logits(model, make_tokens())
    assert calls[-1]["temperature"] == 1


def test_length_temperature():
    rule = LengthTemperature(1000)
    assert rule(0) == rule(1) == rule(1000) == 1
    assert rule(8000) == pytest.approx((0.1 * math.log(8) + 1) ** 2)
    lengths = [1, 1000, 1001, 8000, 10**6]
    together = chunkattn.temperature(lengths, 1000)
    assert together.tolist() == pytest.approx([rule(length) for length in lengths], rel=2**-24, abs=0)


def test_temperature_follows_each_sequences_own_length():
    model = make_model()
    enable_dca(model, CHUNK, LOCAL, temperature=LengthTemperature(10))
    tokens, mask = padded("left")
    batched = logits(model, tokens, attention_mask=mask)
    cache = transformers.DynamicCache(config=model.config)
    logits(model, tokens[:, :-1], attention_mask=mask[:, :-1], past_key_values=cache)
    assert logits(model, tokens[:, -1:], attention_mask=mask, past_key_values=cache).isfinite().all()
    for row in range(3):
        real = mask[row].bool()
        close(batched[row, real], logits(model, tokens[row, real][None])[0])


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
    model.set_attn_implementation(ATTN_IMPLEMENTATION)
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
