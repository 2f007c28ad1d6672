"""enable_select_merge on tiny random models: forward and training."""

import copy
import itertools
import math

import pytest
import torch
from tiny_models import (
    DYNAMIC_ROPES,
    FAMILIES,
    LENGTH,
    ROPES,
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
from chunkattn.integrations.transformers import (
    SELECT_MERGE_IMPLEMENTATION,
    crd_ntk,
    disable_dca,
    disable_select_merge,
    enable_dca,
    enable_select_merge,
)

transformers = pytest.importorskip("transformers")

# Groups of 8 tokens: five of them in LENGTH, the last one and its last region partial.
SIZES = {"region_size": 4, "top_k": 2, "merge": 2}
DENSE = (SIZES["top_k"] + SIZES["merge"]) * SIZES["region_size"]


def make_draw(model, step=3, length=LENGTH, **settings):
    settings = {"base_period": 100, "period_start": 64, "grow_every": 2, **settings}
    return crd_ntk(model, **settings).draw(step, length, torch.Generator().manual_seed(5))


def rotate(x, positions, inv_freq):
    """x [B, S, H, D] turned by float64 angles."""
    angles = torch.outer(positions.double(), inv_freq.double())[None, :, None]
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()), -1)


def check_layers_against_oracle(
    model, tokens, positions=None, inv_freq=None, select_on="rotated", options=SIZES, **kwargs
):
    """Each layer's attention equals the reference on that layer's own queries and keys, taken before rotation."""
    rotary = model.model.rotary_emb
    positions = torch.arange(tokens.shape[1]) if positions is None else positions
    inv_freq = rotary.inv_freq if inv_freq is None else inv_freq
    for q, k, v, out in attention_of_layers(model, tokens, **kwargs):
        turned = [rotate(x, positions, inv_freq) for x in (q, k)]
        rows = {} if select_on == "rotated" else {"select_q": q, "select_k": k}
        scale = rotary.attention_scaling**2 / math.sqrt(q.shape[-1])
        expected, ids = reference.select_merge(*turned, v, scale=scale, return_indices=True, **rows, **options)
        assert (ids[:, :, 3:, 0] >= 0).all()
        close(out, expected.flatten(2))


@pytest.fixture(scope="module")
def select_merge_llama():
    """A Llama with select-and-merge enabled, that tests leave as they found it."""
    model = make_model()
    enable_select_merge(model, **SIZES)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_match_reference_on_unrotated_inputs(family):
    model = make_model(family)
    enable_select_merge(model, **SIZES)
    check_layers_against_oracle(model, make_tokens())


@pytest.mark.parametrize(
    ("eligibility", "selection", "heads", "select_on"),
    list(itertools.product(("group", "row"), ("lookahead", "causal"), ("kv", "q"), ("rotated", "unrotated"))),
)
def test_layers_match_reference_with_every_flag(eligibility, selection, heads, select_on):
    model = make_model()
    options = SIZES | {"eligibility": eligibility, "selection": selection, "heads": heads}
    enable_select_merge(model, **options, select_on=select_on)
    check_layers_against_oracle(model, make_tokens(length=53), select_on=select_on, options=options)


@pytest.mark.parametrize("select_on", ["rotated", "unrotated"])
@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES)
def test_scaled_rope_types(rope, select_on):
    model = make_model("Qwen3", rope_parameters={"rope_theta": 100.0, **rope})
    enable_select_merge(model, **SIZES, select_on=select_on)
    check_layers_against_oracle(model, make_tokens(), select_on=select_on)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_dense_start_equals_untouched_model_and_disable_restores_it(family, implementation):
    model = make_model(family, attn_implementation=implementation)
    tokens = make_tokens()
    config = model.config.to_dict()
    plain = logits(model, tokens)
    enable_select_merge(model, **SIZES)
    sparse = logits(model, tokens)
    close(sparse[:, :DENSE], plain[:, :DENSE])
    assert (sparse - plain)[:, DENSE:].abs().max() > 0.1
    assert model.config.to_dict() == config

    disable_select_merge(model)
    assert torch.equal(logits(model, tokens), plain)
    assert model.config._attn_implementation == implementation
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_methods_replace_each_other_and_are_undone_by_their_own_name():
    model = make_model()
    tokens = make_tokens()
    plain = logits(model, tokens)
    enable_dca(model, 12, 4)
    dual_chunk = logits(model, tokens)
    enable_select_merge(model, **SIZES)
    expected = logits(model, tokens)
    assert (expected - dual_chunk).abs().max() > 0.1
    disable_dca(model)
    assert torch.equal(logits(model, tokens), expected)
    enable_dca(model, 12, 4)
    assert torch.equal(logits(model, tokens), dual_chunk)
    disable_select_merge(model)
    assert torch.equal(logits(model, tokens), dual_chunk)
    disable_dca(model)
    assert torch.equal(logits(model, tokens), plain)


def test_enable_again_replaces_settings():
    model = make_model()
    tokens = make_tokens()
    enable_select_merge(model, **SIZES)
    expected = logits(model, tokens)
    enable_select_merge(model, **SIZES | {"top_k": 1})
    assert (logits(model, tokens) - expected).abs().max() > 0.1
    enable_select_merge(model, **SIZES)
    assert torch.equal(logits(model, tokens), expected)


def test_defaults_are_those_of_the_function(monkeypatch):
    model = make_model()
    enable_select_merge(model)
    calls = calls_of(monkeypatch, "select_merge")
    logits(model, make_tokens())
    assert len(calls) == 2
    signature = chunkattn.functional.select_merge.__kwdefaults__
    own = {"scale", "select_q", "select_k"}
    for call in calls:
        assert call.keys() > own
        assert all(call[name] == signature[name] for name in call.keys() - own)


@pytest.mark.parametrize("select_on", ["rotated", "unrotated"])
@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
def test_crd_ntk_replaces_positions_and_base(family, select_on):
    # The offset is drawn below 2**22: angles in float32 would be off by 0.1.
    model = make_model(family)
    tokens = make_tokens()
    enable_select_merge(model, **SIZES, select_on=select_on)
    plain = logits(model, tokens)
    draw = make_draw(model, base_period=1 << 23)
    assert draw.offset > 1 << 16
    rotary_dim = 2 * model.model.rotary_emb.inv_freq.numel()
    assert (draw.rotary_dim, draw.base > 1e4) == (rotary_dim, True)
    inv_freq = draw.base ** (-torch.arange(0, rotary_dim, 2).double() / rotary_dim)
    positions = (torch.arange(LENGTH) + draw.offset) % draw.cycle
    check_layers_against_oracle(model, tokens, positions, inv_freq, select_on, rotary=draw)
    # Nothing of it stays in the model.
    assert torch.equal(logits(model, tokens), plain)


def test_positions_of_crd_ntk_wrap_around():
    model = make_model()
    enable_select_merge(model, **SIZES)
    draw = make_draw(model, base_period=0, period_start=2)
    assert draw.cycle == LENGTH + draw.cycle - LENGTH <= LENGTH + 1
    positions = (torch.arange(LENGTH) + draw.offset) % draw.cycle
    assert positions.diff().min() < 0
    inv_freq = draw.base ** (-torch.arange(0, 16, 2).double() / 16)
    check_layers_against_oracle(model, make_tokens(), positions, inv_freq, rotary=draw)


def test_crd_ntk_takes_what_the_model_was_trained_with():
    model = make_model("Qwen3", rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    rule = crd_ntk(model, period_start=64)
    assert (rule.base, rule.rotary_dim, rule.original_length) == (500.0, 32, 16)
    assert (rule.period_start, rule.period_max) == (64, 1 << 20)
    assert crd_ntk(model, original_length=4096).original_length == 4096


def test_ntk_scale_is_the_base_of_other_forwards():
    model = make_model()
    tokens = make_tokens()
    enable_select_merge(model, **SIZES, ntk_scale=8.0)
    scaled = logits(model, tokens)
    draw = make_draw(model)
    drawn = logits(model, tokens, rotary=draw)
    enable_select_merge(model, **SIZES)
    assert torch.equal(logits(model, tokens, rotary=draw), drawn)
    base = chunkattn.ntk_base(10000.0, 16, 8.0)
    assert base == pytest.approx(10000 * 8 ** (16 / 14))
    other = make_model(rope_parameters={"rope_type": "default", "rope_theta": base})
    enable_select_merge(other, **SIZES)
    close(logits(other, tokens), scaled)


@pytest.mark.parametrize("drawn", [False, True])
@pytest.mark.parametrize("select_on", ["rotated", "unrotated"])
@pytest.mark.parametrize("side", ["left", "right", "scattered"])
def test_padded_batch_equals_unpadded_rows(side, select_on, drawn):
    model = make_model()
    enable_select_merge(model, **SIZES, select_on=select_on)
    draw = {"rotary": make_draw(model)} if drawn else {}
    tokens, mask = padded(side)
    batched = logits(model, tokens, attention_mask=mask, **draw)
    assert batched.isfinite().all()
    for row in range(3):
        real = mask[row].bool()
        close(batched[row, real], logits(model, tokens[row, real][None], **draw)[0])


def test_gradients():
    model = make_model().train()
    tokens = make_tokens()
    dense = loss_and_gradients(model, tokens[:, :DENSE])
    enable_select_merge(model, **SIZES)
    close(loss_and_gradients(model, tokens[:, :DENSE]), dense)

    draw = make_draw(model)
    _, gradients = loss_and_gradients(model, tokens, rotary=draw)
    for name in ("q_proj", "k_proj", "v_proj"):
        weight = getattr(model.model.layers[0].self_attn, name).weight
        gradient = gradients[[id(parameter) for parameter in model.parameters()].index(id(weight))]
        direction = gradient / gradient.norm()
        losses = []
        for step in (1e-4, -1e-4):
            with torch.no_grad():
                weight += step * direction
                losses.append(model(tokens, labels=tokens, rotary=draw).loss.item())
                weight -= step * direction
        assert (losses[0] - losses[1]) / 2e-4 == pytest.approx(gradient.norm().item(), rel=5e-3)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("select_on", ["rotated", "unrotated"])
def test_gradient_checkpointing(use_reentrant, select_on):
    model = make_model().train()
    enable_select_merge(model, **SIZES, select_on=select_on)
    tokens, draw = make_tokens(), make_draw(model)
    expected = loss_and_gradients(model, tokens, rotary=draw)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    if use_reentrant:
        model.enable_input_require_grads()
    close(loss_and_gradients(model, tokens, rotary=draw), expected, atol=1e-9)


def test_peft_model():
    peft = pytest.importorskip("peft")
    model = make_model()
    tokens = make_tokens()
    plain = logits(model, tokens)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    enable_select_merge(wrapped, **SIZES)
    draw = make_draw(wrapped)
    close(logits(wrapped, tokens)[:, :DENSE], plain[:, :DENSE])
    assert (logits(wrapped, tokens, rotary=draw) - plain).abs().max() > 0.1
    wrapped(tokens, labels=tokens, rotary=draw).loss.backward()
    disable_select_merge(wrapped)
    assert torch.equal(logits(wrapped, tokens), plain)


def test_other_heads_and_bare_decoders(select_merge_llama):
    tokens, draw = make_tokens(), make_draw(select_merge_llama)
    with torch.no_grad():
        expected = select_merge_llama.model(tokens, rotary=draw).last_hidden_state
        for head in ("Model", "ForSequenceClassification"):
            model = make_model(head=head)
            model.base_model.load_state_dict(select_merge_llama.model.state_dict())
            enable_select_merge(model, **SIZES)
            assert torch.equal(model.base_model(tokens, rotary=draw).last_hidden_state, expected)


def test_copies_and_casts_after_enabling_keep_their_settings():
    model = make_model(dtype=torch.float32)
    cast_before = copy.deepcopy(model).to(torch.bfloat16)
    tokens = make_tokens()
    enable_select_merge(model, **SIZES)
    expected = logits(model, tokens)
    clone = copy.deepcopy(model)
    disable_select_merge(model)
    assert torch.equal(logits(clone, tokens), expected)
    enable_select_merge(cast_before, **SIZES)
    assert torch.equal(logits(clone.to(torch.bfloat16), tokens), logits(cast_before, tokens))


def test_autocast():
    """bfloat16 costs no more than it costs the untouched model, where both compute the same."""
    model = make_model(dtype=torch.float32)
    tokens, mask = make_tokens(length=DENSE), torch.ones(2, DENSE, dtype=torch.long)
    mask[1, :3] = 0
    exact = logits(model, tokens, attention_mask=mask)[mask.bool()]
    with torch.autocast("cpu", torch.bfloat16):
        plain = logits(model, tokens, attention_mask=mask)[mask.bool()]
        enable_select_merge(model, **SIZES)
        close(
            logits(model, tokens, attention_mask=mask)[mask.bool()].float(),
            exact,
            atol=2 * (plain - exact).abs().max().item(),
        )


def test_compiled_training_step(select_merge_llama):
    torch.compiler.reset()
    model = copy.deepcopy(select_merge_llama).train()
    tokens, draw = make_tokens(), make_draw(model)
    expected = loss_and_gradients(model, tokens, rotary=draw)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    close(loss_and_gradients(compiled, tokens, rotary=draw), expected)


@pytest.mark.parametrize(
    ("options", "settings", "error", "message"),
    [
        ({"rope_parameters": DYNAMIC_ROPES["dynamic"]}, {}, ValueError, "rope_type must be one of default.*'dynamic'"),
        ({}, {"region_size": 0}, ValueError, "region_size must be at least 1, got 0"),
        ({}, {"top_k": 2.0}, TypeError, r"top_k must be an int, got 2\.0"),
        ({}, {"merge": -1}, ValueError, "merge must be at least 1, got -1"),
        ({}, {"eligibility": "column"}, ValueError, "eligibility must be 'group' or 'row', got 'column'"),
        ({}, {"selection": "both"}, ValueError, "selection must be 'lookahead' or 'causal', got 'both'"),
        ({}, {"heads": "k"}, ValueError, "heads must be 'kv' or 'q', got 'k'"),
        ({}, {"select_on": None}, ValueError, "select_on must be 'rotated' or 'unrotated', got None"),
        ({}, {"ntk_scale": 0.0}, ValueError, r"ntk_scale must be positive and finite, got 0\.0"),
        ({"rope_parameters": ROPES["linear"]}, {"ntk_scale": 2.0}, ValueError, "ntk_scale must be 1 .*got 'linear'"),
    ],
)
def test_unsupported_settings_leave_the_model_as_it_was(options, settings, error, message):
    if "rope_parameters" in options:
        options = {"rope_parameters": {"rope_theta": 100.0, **options["rope_parameters"]}}
    model = make_model(**options)
    tokens = make_tokens(length=8)
    plain = logits(model, tokens)
    with pytest.raises(error, match=message):
        enable_select_merge(model, **settings)
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(logits(model, tokens), plain)


def test_unsupported_draws(select_merge_llama):
    tokens = make_tokens()
    with pytest.raises(TypeError, match=r"rotary must be what CRDNTK.draw returns, got CRDNTK"):
        logits(select_merge_llama, tokens, rotary=crd_ntk(select_merge_llama))
    with pytest.raises(ValueError, match="rotary must have rotary_dim=16, the model's, got 32"):
        logits(select_merge_llama, tokens, rotary=make_draw(select_merge_llama, rotary_dim=32))
    short = make_draw(select_merge_llama, length=10, base_period=0, period_start=2)
    with pytest.raises(ValueError, match=r"rotary must be drawn for the 37 tokens of the call, got one of 1[01] pos"):
        logits(select_merge_llama, tokens, rotary=short)
    linear = make_model(rope_parameters={"rope_theta": 100.0, **ROPES["linear"]})
    with pytest.raises(ValueError, match="model must have the rope_type 'default' for CRD NTK, got 'linear'"):
        crd_ntk(linear)
    enable_select_merge(linear, **SIZES)
    with pytest.raises(ValueError, match=r"rotary must be None .*'linear'"):
        logits(linear, tokens, rotary=make_draw(select_merge_llama))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"output_attentions": True}, "output_attentions must be False"),
        ({"is_causal": False}, "is_causal must be True"),
        ({"position_ids": torch.arange(LENGTH)[None] + 3}, "position_ids must count .*with select-and-merge attention"),
        ({"attention_mask": torch.ones(2, 1, LENGTH, LENGTH)}, "attention_mask must be a padding mask"),
    ],
)
def test_unsupported_calls(select_merge_llama, call, message):
    with pytest.raises(ValueError, match=message):
        logits(select_merge_llama, make_tokens(), **call)


def test_attention_implementation_set_by_hand_or_changed():
    model = make_model()
    model.set_attn_implementation(SELECT_MERGE_IMPLEMENTATION)
    with pytest.raises(ValueError, match=r"needs enable_select_merge\(model\)"):
        logits(model, make_tokens())
    with pytest.raises(ValueError, match="config already names 'chunkattn_select_merge'"):
        enable_dca(model)
    model.set_attn_implementation("sdpa")
    enable_select_merge(model, **SIZES)
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match=r"while select-and-merge attention is enabled; call disable_select_merge\("):
        logits(model, make_tokens())
