"""Caches and generate() with enable_dca."""

import copy

import pytest
import torch
from cases import skip_without_kernels
from tiny_models import (
    CHUNK,
    FAMILIES,
    LENGTH,
    LOCAL,
    STRIDE,
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

from chunkattn.integrations.transformers import LengthTemperature, dca, enable_dca

transformers = pytest.importorskip("transformers")


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


@pytest.mark.parametrize("side", ["left", "right", "scattered"])
def test_padded_batch_with_cache_equals_unpadded_rows(llama, side):
    check_padded_steps(llama, side)


@pytest.mark.parametrize("family", ["Llama", "Qwen2"])  # generate() prepares masks differently for these two
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_left_padded_generation_equals_unpadded_rows(family, cache):
    model = make_model(family)
    enable_dca(model, CHUNK, LOCAL)
    check_left_padded_generation(model, cache, new_tokens=5)


def test_right_padded_generation_is_refused(llama):
    tokens, mask = padded("right")
    with pytest.raises(ValueError, match="position_ids must count"):
        llama.generate(tokens, attention_mask=mask, max_new_tokens=2)


def test_cache_that_drops_keys_is_refused(llama):
    config = copy.deepcopy(llama.config)
    config.sliding_window = 8
    cache = transformers.DynamicCache(config=config)
    tokens = make_tokens()
    logits(llama, tokens[:, :10], past_key_values=cache)
    with pytest.raises(ValueError, match="past_key_values must keep every key, got 8 keys for 11 tokens"):
        logits(llama, tokens[:, 10:11], past_key_values=cache)


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
    monkeypatch.setattr(dca, "has_kernels", lambda operator, device: operator != "dca_with_kvcache")
    prefill, decode = (calls_of(monkeypatch, name) for name in ("dca", "dca_with_kvcache"))
    assert torch.equal(llama.generate(make_tokens(), **options), expected)
    assert len(prefill) == 4 * llama.config.num_hidden_layers
    assert not decode


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
    as_near(static_steps(model, compiled, tokens, 20), eager, logits(copy.deepcopy(model).cpu().float(), tokens.cpu()))
    options = {"max_new_tokens": 2 * STRIDE, "do_sample": False}
    sequences = model.generate(tokens, cache_implementation="static", **options)
    assert sequences.shape == (2, LENGTH + 2 * STRIDE)
