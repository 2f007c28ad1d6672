"""Caches and generate() with enable_select_merge."""

import copy

import pytest
import torch
from cases import skip_without_kernels
from tiny_models import (
    FAMILIES,
    LENGTH,
    as_near,
    calls_of,
    check_left_padded_generation,
    check_padded_steps,
    close,
    logits,
    make_model,
    make_tokens,
    padded,
    static_steps,
)
from torch._dynamo.testing import CompileCounterWithBackend

import chunkattn
from chunkattn import reference
from chunkattn.integrations.transformers import crd_ntk, disable_select_merge, enable_select_merge, select_merge

transformers = pytest.importorskip("transformers")

# Groups of 8 tokens, and 16 tokens that are dense.
SIZES = {"region_size": 4, "top_k": 2, "merge": 2}
CAUSAL = SIZES | {"selection": "causal"}
PROMPT = 13
OPTIONS = {
    "dynamic": {},
    "static": {"cache_implementation": "static"},
    "chunked-prefill": {"prefill_chunk_size": 3},
    "no-cache": {"use_cache": False},
}


@pytest.fixture(scope="module")
def causal_llama():
    """A Llama whose generation equals its forward, that tests leave as they found it."""
    model = make_model()
    enable_select_merge(model, **CAUSAL)
    return model


def make_cache(model, kind):
    if kind == "static":
        return transformers.StaticCache(config=model.config, max_cache_len=LENGTH)
    return transformers.DynamicCache(config=model.config)


def predicted(model, sequences, prompt):
    return logits(model, sequences[:, :-1]).argmax(dim=-1)[:, prompt - 1 :]


@pytest.mark.parametrize("select_on", ["rotated", "unrotated"])
@pytest.mark.parametrize("family", FAMILIES)
def test_cached_steps_equal_one_forward(family, select_on):
    model = make_model(family)
    enable_select_merge(model, **CAUSAL, select_on=select_on)
    tokens = make_tokens()
    expected = logits(model, tokens)
    cache = transformers.DynamicCache(config=model.config)
    pieces = torch.split(tokens, [7, 1, 1, 1, 11, 1, 1, 12, 1, 1], dim=1)
    assert sum(piece.shape[1] for piece in pieces) == LENGTH
    steps = [logits(model, piece, past_key_values=cache) for piece in pieces]
    close(torch.cat(steps, dim=1), expected)


@pytest.mark.parametrize("heads", ["kv", "q"])
@pytest.mark.parametrize("eligibility", ["group", "row"])
def test_cached_steps_equal_one_forward_with_every_flag(eligibility, heads):
    model = make_model()
    enable_select_merge(model, **CAUSAL, eligibility=eligibility, heads=heads, ntk_scale=4.0)
    tokens = make_tokens(length=53)
    expected = logits(model, tokens)
    cache = transformers.DynamicCache(config=model.config)
    steps = [logits(model, piece, past_key_values=cache) for piece in torch.split(tokens, [20, *[1] * 33], dim=1)]
    close(torch.cat(steps, dim=1), expected)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_greedy_generation_equals_argmax_of_one_forward(causal_llama, options):
    prompt = make_tokens(length=PROMPT)
    sequences = causal_llama.generate(prompt, max_new_tokens=30, do_sample=False, **options)
    assert sequences.shape == (2, PROMPT + 30)
    assert torch.equal(predicted(causal_llama, sequences, PROMPT), sequences[:, PROMPT:])


def test_beam_search_reorders_the_cache(causal_llama):
    prompt = make_tokens(length=PROMPT)
    options = {"max_new_tokens": 25, "do_sample": False, "num_beams": 3}
    cached, recomputed = (causal_llama.generate(prompt, use_cache=use_cache, **options) for use_cache in (True, False))
    assert torch.equal(cached, recomputed)


def test_peft_model_generates():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(make_model(), peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    enable_select_merge(model, **CAUSAL)
    sequences = model.generate(input_ids=make_tokens(length=PROMPT), max_new_tokens=20, do_sample=False)
    assert torch.equal(predicted(model, sequences, PROMPT), sequences[:, PROMPT:])


@pytest.mark.parametrize("decoding", ["causal", "query"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_prompt_in_lookahead_mode_and_what_follows_it(cache, decoding):
    """The prompt is as without a cache; each step's attention is the oracle's on that layer's own rows."""
    model = make_model()
    enable_select_merge(model, **SIZES, decoding=decoding)
    tokens = make_tokens()
    past = make_cache(model, cache)
    prompt = logits(model, tokens[:, :20], past_key_values=past)
    close(prompt, logits(model, tokens[:, :20], use_cache=False))

    layer = model.model.layers[0]
    twin = reference.SelectMergeCache(2, **SIZES, selection=decoding)
    seen = []
    handles = [
        layer.register_forward_pre_hook(lambda _, args: seen.append(args[0])),
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0])),
    ]
    with torch.no_grad():
        states = layer.input_layernorm(model.model.embed_tokens(tokens))
        q, k, v = (getattr(layer.self_attn, f"{name}_proj")(states).unflatten(2, (-1, 16)) for name in "qkv")
        q, k = (rotate(x, model.model.rotary_emb.inv_freq) for x in (q, k))
    twin.append(q[:, :20], k[:, :20], v[:, :20])
    for n in range(20, LENGTH):
        logits(model, tokens[:, n : n + 1], past_key_values=past)
        expected = twin.attend(*(x[:, n : n + 1] for x in (q, k, v)))
        close(seen[-1], expected.flatten(2))
    for handle in handles:
        handle.remove()
    assert len(seen) == 2 * (LENGTH - 20)


def rotate(x, inv_freq):
    """x [B, S, H, D] turned by float64 angles."""
    angles = torch.outer(torch.arange(x.shape[1]).double(), inv_freq.double())[None, :, None]
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()), -1)


def test_decoding_follows_selection_where_nothing_is_said(monkeypatch):
    made = calls_of(monkeypatch, "SelectMergeCache")
    model = make_model()
    for settings, expected in (({}, "query"), ({"selection": "causal"}, "causal"), ({"decoding": "causal"}, "causal")):
        enable_select_merge(model, **SIZES, **settings)
        logits(model, make_tokens())
        assert made[-1]["selection"] == expected


def test_generation_reads_constant_regions_of_a_cache_that_grows(causal_llama, monkeypatch):
    steps = []
    attend = chunkattn.SelectMergeCache.attend

    def record(cache, q, *args, **kwargs):
        steps.append((q.shape[1], cache.capacity, cache.indices.shape[2]))
        return attend(cache, q, *args, **kwargs)

    monkeypatch.setattr(chunkattn.SelectMergeCache, "attend", record)
    causal_llama.generate(make_tokens(length=250), max_new_tokens=300, do_sample=False)
    assert {new for new, _, _ in steps} == {1}
    assert len(steps) == 2 * 299
    capacities = [capacity for _, capacity, _ in steps]
    assert capacities == sorted(capacities)
    assert 1 < len(set(capacities)) < 4


def test_growth_does_not_change_what_is_generated(causal_llama):
    prompt = make_tokens(length=250)
    sequences = causal_llama.generate(prompt, max_new_tokens=300, do_sample=False)
    assert torch.equal(predicted(causal_llama, sequences, 250), sequences[:, 250:])


@pytest.mark.parametrize("select_on", ["rotated", "unrotated"])
@pytest.mark.parametrize("side", ["left", "right", "scattered"])
def test_padded_batch_with_cache_equals_unpadded_rows(side, select_on):
    model = make_model()
    enable_select_merge(model, **CAUSAL, select_on=select_on)
    check_padded_steps(model, side)


@pytest.mark.parametrize("family", ["Llama", "Qwen2"])  # generate() prepares masks differently for these two
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("settings", [SIZES, CAUSAL], ids=["lookahead", "causal"])
def test_left_padded_generation_equals_unpadded_rows(family, cache, settings):
    model = make_model(family)
    enable_select_merge(model, **settings)
    check_left_padded_generation(model, cache, new_tokens=15)


def test_right_padded_generation_is_refused(causal_llama):
    tokens, mask = padded("right")
    with pytest.raises(ValueError, match="position_ids must count"):
        causal_llama.generate(tokens, attention_mask=mask, max_new_tokens=2)


def test_masks_that_disagree_with_the_cache_are_refused(causal_llama):
    tokens, mask = padded("left")
    cache = transformers.DynamicCache(config=causal_llama.config)
    logits(causal_llama, tokens[:, :-1], attention_mask=mask[:, :-1], past_key_values=cache)
    with pytest.raises(ValueError, match="attention_mask must mark the padding of the tokens in past_key_values"):
        logits(causal_llama, tokens[:, -1:], past_key_values=cache)
    other = mask.clone()
    other[1, 0] = 1
    with pytest.raises(ValueError, match=r"must mark the \[37, 25, 6\] tokens .* past_key_values, got \[37, 26, 6\]"):
        logits(causal_llama, tokens[:, -1:], attention_mask=other, past_key_values=cache)
    close(
        logits(causal_llama, tokens[:, -1:], attention_mask=mask, past_key_values=cache),
        logits(causal_llama, tokens, attention_mask=mask)[:, -1:],
    )


def test_autocast(causal_llama):
    model = copy.deepcopy(causal_llama).float()
    tokens = make_tokens()
    cache = transformers.DynamicCache(config=model.config)
    with torch.autocast("cpu", torch.bfloat16):
        logits(model, tokens[:, :20], past_key_values=cache)
        assert logits(model, tokens[:, 20:], past_key_values=cache).isfinite().all()
    assert cache.layers[0].cache.k.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_cache_is_used_again_after_reset(causal_llama, kind):
    tokens = make_tokens()
    cache = make_cache(causal_llama, kind)
    expected = logits(causal_llama, tokens)
    for _ in range(2):
        cache.reset()
        pieces = [logits(causal_llama, piece, past_key_values=cache) for piece in tokens.split([20, 17], dim=1)]
        close(torch.cat(pieces, dim=1), expected)
        assert int(cache.get_seq_length()) == LENGTH


def test_a_forward_returns_a_cache_to_go_on_with(causal_llama):
    tokens = make_tokens()
    with torch.no_grad():
        past = causal_llama(tokens[:, :20]).past_key_values
        last = causal_llama(tokens[:, 20:], past_key_values=past).logits
    close(last, logits(causal_llama, tokens)[:, 20:])
    assert causal_llama(tokens).past_key_values is None, "with gradients there is no cache"
    draw = crd_ntk(causal_llama).draw(0, LENGTH, torch.Generator())
    with torch.no_grad():
        assert causal_llama(tokens, rotary=draw).past_key_values is None
        with pytest.raises(ValueError, match="rotary must be None with past_key_values"):
            causal_llama(tokens, rotary=draw, past_key_values=past)


def test_caches_that_cannot_be_used(causal_llama):
    tokens = make_tokens()
    plain = make_model()
    filled = transformers.DynamicCache(config=plain.config)
    logits(plain, tokens, past_key_values=filled)
    with pytest.raises(ValueError, match=r"past_key_values must be empty or filled .* DynamicCache with 37 tokens"):
        logits(causal_llama, tokens, past_key_values=filled)

    other = make_model()
    enable_select_merge(other, **CAUSAL | {"top_k": 3})
    past = transformers.DynamicCache(config=other.config)
    logits(other, tokens, past_key_values=past)
    with pytest.raises(ValueError, match="past_key_values must be empty or filled by a model with the same settings"):
        logits(causal_llama, tokens, past_key_values=past)
    past.reset()
    close(logits(causal_llama, tokens, past_key_values=past), logits(causal_llama, tokens))

    windowed = copy.deepcopy(causal_llama.config)
    windowed.sliding_window = 8
    with pytest.raises(ValueError, match=r"must be a dynamic or static cache .* DynamicSlidingWindowLayer"):
        logits(causal_llama, tokens, past_key_values=transformers.DynamicCache(config=windowed))
    with pytest.raises(ValueError, match="past_key_values must have the sequences of the call, got 2 for 1"):
        logits(causal_llama, tokens[:1], past_key_values=past)
    with pytest.raises(ValueError, match=r"past_key_values .* cannot give up tokens"):
        past.crop(1)


def test_disabled_model_takes_no_cache_of_select_and_merge():
    model = make_model()
    tokens = make_tokens()
    plain = model.generate(tokens, max_new_tokens=5, do_sample=False)
    enable_select_merge(model, **SIZES)
    past = transformers.DynamicCache(config=model.config)
    logits(model, tokens[:, :20], past_key_values=past)
    disable_select_merge(model)
    assert torch.equal(model.generate(tokens, max_new_tokens=5, do_sample=False), plain)
    with pytest.raises(ValueError, match="past_key_values belong to a model with select-and-merge attention enabled"):
        logits(model, tokens[:, 20:], past_key_values=past)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_cache_filled_in_inference_mode(causal_llama, kind):
    tokens = make_tokens()
    cache = make_cache(causal_llama, kind)
    with torch.inference_mode():
        causal_llama(tokens[:, :20], past_key_values=cache)
    close(logits(causal_llama, tokens[:, 20:], past_key_values=cache), logits(causal_llama, tokens)[:, 20:])


def test_compiled_decoding_over_a_static_cache(causal_llama):
    # Compiled once: neither the growing length nor what is in the cache makes another graph.
    torch.compiler.reset()
    tokens = make_tokens()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(causal_llama, fullgraph=True, backend=counter)
    close(static_steps(causal_llama, compiled, tokens, 20), logits(causal_llama, tokens))
    assert counter.frame_count == 1


def test_a_static_cache_is_used_without_waiting_for_its_length(causal_llama, monkeypatch):
    tokens = make_tokens()
    cache = transformers.StaticCache(config=causal_llama.config, max_cache_len=LENGTH)
    logits(causal_llama, tokens[:, :-1], past_key_values=cache)
    with monkeypatch.context() as patch:
        for name in ("item", "__int__", "__bool__", "tolist", "__index__"):
            patch.setattr(torch.Tensor, name, lambda *_: pytest.fail("the host waited for the device"))
        last = logits(causal_llama, tokens[:, -1:], past_key_values=cache)
    close(last, logits(causal_llama, tokens)[:, -1:])


def test_a_device_without_kernels_for_decoding_reads_without_a_cache(causal_llama, monkeypatch):
    tokens = make_tokens()
    expected = logits(causal_llama, tokens)
    monkeypatch.setattr(select_merge, "has_kernels", lambda operator, device: False)
    with torch.no_grad():
        result = causal_llama(tokens)
    assert result.past_key_values is None
    assert torch.equal(result.logits, expected)


def test_generation_on_cuda(cuda):
    skip_without_kernels(cuda, "select_merge_with_kvcache")
    model = make_model(dtype=torch.bfloat16, head_dim=64).to(cuda)
    enable_select_merge(model, **CAUSAL)
    tokens = make_tokens().to(cuda)
    for options in OPTIONS.values():
        sequences = model.generate(tokens, max_new_tokens=20, do_sample=False, **options)
        assert sequences.shape == (2, LENGTH + 20)
    steps = static_steps(model, model, tokens, 20)
    as_near(steps, logits(model, tokens), logits(copy.deepcopy(model).cpu().float(), tokens.cpu()))
