"""Dual Chunk Attention for Hugging Face causal language models.

    from chunkattn.integrations.transformers import enable_dca
    enable_dca(model)

Only public interfaces of transformers and torch are used: an attention function and a mask function registered under
``"chunkattn_dca"``, and two forward pre-hooks. Transformers rotates queries and keys, and caches the keys, before it
calls attention. The hook on the rotary embedding takes positions modulo the stride c = chunk_size - local_size, so that
queries and cached keys arrive rotated at their row of the rotary table, as ``chunkattn.dca(..., q_rotated=True,
k_rotated=True)`` expects. The hook on the decoder finds each sequence's real tokens and hands them to the layers
through the keyword arguments that transformers forwards to its attention functions. Few queries, as in decoding, go
through ``chunkattn.dca_with_kvcache`` on transformers' own cache where it has kernels for their device.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import chunkattn
from chunkattn._ops import has_kernels
from chunkattn._temperature import temperature_of_one

try:
    from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
except ImportError as error:
    raise ImportError(
        "chunkattn.integrations.transformers needs transformers 5 or later: pip install 'transformers>=5'"
    ) from error

__all__ = ["ATTN_IMPLEMENTATION", "LengthTemperature", "disable_dca", "enable_dca"]

ATTN_IMPLEMENTATION = "chunkattn_dca"
"""The name under which the attention and mask functions are registered with transformers."""

# Decoders that rotate, update the cache and call the attention interface in this order, with rotate-half RoPE.
_DECODERS = ("LlamaModel", "MistralModel", "MixtralModel", "Qwen2Model", "Qwen2MoeModel", "Qwen3Model", "Qwen3MoeModel")
_SUPPORTED = "Llama, Mistral, Mixtral, Qwen2, Qwen2-MoE, Qwen3 and Qwen3-MoE models"

# The frequencies of these do not depend on the length of the sequence.
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")

_STATE = "_chunkattn_dca"

# Up to so many queries behind a cache are attended by the kernel for decoding, more by the kernel for prefill.
_DECODE_QUERIES = 64


@dataclass(frozen=True)
class LengthTemperature:
    """The logit temperature of Qwen2.5-1M, as :func:`chunkattn.temperature` has it, for one length on the host.

    Attributes:
        original_length: tokens up to which the temperature is 1.
    """

    original_length: int

    def __call__(self, length: int) -> float:
        """The temperature of a sequence of `length` tokens."""
        return temperature_of_one(length, self.original_length)


def enable_dca(
    model: nn.Module,
    chunk_size: int | None = None,
    local_size: int | None = None,
    temperature: float | Callable[[int], float] | None = None,
) -> None:
    """Makes a loaded Hugging Face causal language model run Dual Chunk Attention, in forward() and generate().

    The model is changed in place; :func:`disable_dca` puts it back. A second call replaces the settings of the first.
    Start with an empty cache: cached keys are valid only for the settings they were computed with. Transformers keeps
    the attention implementation in the config, so a model needs a config object of its own, as from_pretrained makes.

    Args:
        model: a Llama, Mistral, Mixtral, Qwen2 (and 2.5), Qwen2-MoE, Qwen3 or Qwen3-MoE model of transformers, with
            any head, or a PEFT model around one. Its rope type is default, linear, llama3 or yarn, and it uses no
            sliding window.
        chunk_size: s of the paper, in tokens; no rotary position exceeds it. Default: the model's
            ``dual_chunk_attention_config`` if it has one (Qwen2.5-1M), else 3P/4 with P the trained length:
            ``max_position_embeddings``, or for yarn ``original_max_position_embeddings * factor``.
        local_size: w of the paper, in tokens, 0 < w < s. Default: as chunk_size, else P/8.
        temperature: multiplies the logits. A number, or a function from a sequence's length in tokens (its cache and
            its new tokens, without padding) to a number, such as :class:`LengthTemperature`. Default: the rule of
            Qwen2.5-1M if the model's ``dual_chunk_attention_config`` names an ``original_max_position_embeddings``,
            else 1. A temperature that varies with the length is that of the current length at each decoding step, so
            that step-by-step generation differs from one forward over the whole sequence.

    Raises:
        ValueError: the model, its rope type or one of its settings is not supported, or chunk_size, local_size or
            temperature is out of range. The model is left as it was.

    Source: arXiv 2402.17463 for the attention and its defaults.
    """
    causal_lm, decoder = _resolve(model)
    _check_supported(decoder)
    config = decoder.config
    if config._attn_implementation == ATTN_IMPLEMENTATION and not hasattr(decoder, _STATE):
        raise ValueError(
            f"the model's config already names {ATTN_IMPLEMENTATION!r}: it was set by hand or is shared with an "
            "enabled model; set another attention implementation or give each model its own config"
        )
    own = getattr(config, "dual_chunk_attention_config", None) or {}
    trained_length = _trained_length(config)
    if chunk_size is None:
        chunk_size = own.get("chunk_size", trained_length * 3 // 4)
    if local_size is None:
        local_size = own.get("local_size", trained_length // 8)
    if temperature is None:
        original_length = own.get("original_max_position_embeddings")
        temperature = LengthTemperature(original_length) if original_length else 1.0
    _check_settings(chunk_size, local_size, temperature)

    disable_dca(model)
    previous = config._attn_implementation
    causal_lm.set_attn_implementation(ATTN_IMPLEMENTATION)
    if config._attn_implementation != ATTN_IMPLEMENTATION:
        raise ValueError(f"{type(causal_lm).__name__} does not let its attention implementation be set")
    state = _DualChunk(chunk_size, local_size, temperature, decoder.rotary_emb, previous)
    state.attach(decoder)


def disable_dca(model: nn.Module) -> None:
    """Undoes :func:`enable_dca`: removes its hooks and restores the attention implementation. Without it, does nothing.

    Args:
        model: the model that was given to enable_dca.

    Raises:
        ValueError: the model is not one that enable_dca supports.
    """
    causal_lm, decoder = _resolve(model)
    state = getattr(decoder, _STATE, None)
    if state is not None:
        state.detach(decoder)
        causal_lm.set_attn_implementation(state.previous_implementation)


@dataclass
class _SequenceTokens:
    """Where the real tokens of one batch row lie."""

    keys: slice | Tensor  # cache slots
    queries: slice | Tensor  # among the new tokens; they are the last of the keys
    length: int  # number of keys


@dataclass
class _Forward:
    """What the attention layers need to know about one forward of the model."""

    dual_chunk: "_DualChunk"
    key_length: int | Tensor  # filled cache slots, the new tokens included; int32 [B] where only the device knows
    sequences: list[_SequenceTokens] | None  # None: no padding


class _DualChunk:
    """The settings of one model and the hooks that apply them."""

    def __init__(
        self,
        chunk_size: int,
        local_size: int,
        temperature: float | Callable[[int], float],
        rotary: nn.Module,
        previous_implementation: str,
    ):
        self.chunk_size = chunk_size
        self.local_size = local_size
        self.temperature = temperature
        self.rotary = rotary
        self.previous_implementation = previous_implementation
        self._handles: list[Any] = []
        self._table_frequencies: Tensor | None = None
        self._tables: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def attach(self, decoder: nn.Module) -> None:
        self._handles = [
            decoder.register_forward_pre_hook(self._prepare, with_kwargs=True),
            self.rotary.register_forward_pre_hook(self._wrap_positions, with_kwargs=True),
        ]
        setattr(decoder, _STATE, self)

    def detach(self, decoder: nn.Module) -> None:
        for handle in self._handles:
            handle.remove()
        delattr(decoder, _STATE)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None, length: int | Tensor) -> Tensor:
        """q [B, Sq, Hq, D], k and v [B, Sk or more, Hkv, D] of sequences of `length` tokens; returns [B, Sq, Hq, D].

        A length that is a tensor, int32 [B], stays on its device.
        """
        needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
        decodes = not needs_grad and has_kernels("dca_with_kvcache", q.device)
        if isinstance(length, Tensor) and not decodes:
            length = int(length[0])
        cos, sin = self._table(q.device)
        options = {
            "chunk_size": self.chunk_size,
            "local_size": self.local_size,
            "scale": scale,
            "temperature": self._temperature_of(length),
            "q_rotated": True,
        }
        if decodes and (isinstance(length, Tensor) or (q.shape[1] <= _DECODE_QUERIES and q.shape[1] < length)):
            # Under autocast queries are float32, and the cache, like the result, is not.
            return chunkattn.dca_with_kvcache(
                q.to(v.dtype), k.to(v.dtype), v, cos, sin, cache_seqlens=length, **options
            )
        return chunkattn.dca(q, k[:, :length], v[:, :length], cos, sin, k_rotated=True, **options)

    def _temperature_of(self, length: int | Tensor) -> float | Tensor:
        if not callable(self.temperature):
            return self.temperature
        if isinstance(length, Tensor):
            if isinstance(self.temperature, LengthTemperature):
                return chunkattn.temperature(length, self.temperature.original_length)
            length = int(length[0])
        return self.temperature(length)

    def _table(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The rotary table on a device. It holds pure rotations: yarn's attention factor is in q and k already."""
        frequencies = self.rotary.inv_freq
        if frequencies is not self._table_frequencies:
            self._table_frequencies = frequencies
            self._tables = {}
        if device not in self._tables:
            # Tensors made in inference mode could not be saved for a later backward.
            with torch.inference_mode(False):
                # The embedding computes with float32 frequencies, whatever dtype the model was cast to.
                self._tables[device] = chunkattn.rope_table(
                    self.chunk_size, 2 * frequencies.numel(), inv_freq=frequencies.float(), device=device
                )
        return self._tables[device]

    def _wrap_positions(self, rotary: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Pre-hook of the rotary embedding, forward(x, position_ids)."""
        stride = self.chunk_size - self.local_size
        if "position_ids" in kwargs:
            return args, {**kwargs, "position_ids": kwargs["position_ids"] % stride}
        x, position_ids, *rest = args
        return (x, position_ids % stride, *rest), kwargs

    def _prepare(self, decoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Pre-hook of the decoder: positions of the new tokens, and where the real tokens are."""
        kwargs = dict(kwargs)
        if args:
            names = list(inspect.signature(type(decoder).forward).parameters)[1:]
            kwargs.update(zip(names, args, strict=False))
        _check_forward(decoder.config, kwargs)

        tokens = kwargs.get("input_ids") if kwargs.get("input_ids") is not None else kwargs.get("inputs_embeds")
        if tokens is None:
            return (), kwargs
        cache = kwargs.get("past_key_values")
        cached = 0 if cache is None else cache.get_seq_length()
        batch, new = tokens.shape[:2]
        # The length of a static cache in use is a tensor. Nobody waits for it unless there is something to check, or
        # nothing that could read it.
        if not has_kernels("dca_with_kvcache", tokens.device):
            cached = int(cached)
        device_length = cached + new if isinstance(cached, Tensor) else None
        if kwargs.get("attention_mask") is not None or kwargs.get("position_ids") is not None:
            cached = int(cached)
        key_length = cached + new
        real = _padding_mask(kwargs.get("attention_mask"), batch, key_length, tokens.device)

        slots = (torch.arange(new, device=tokens.device) + cached).unsqueeze(0)
        if real is None:
            positions, is_new = slots, None
        else:
            positions, is_new = real.cumsum(dim=1)[:, cached:] - 1, real[:, cached:]
        _check_positions(kwargs.get("position_ids"), positions, slots, is_new)
        kwargs["position_ids"] = positions
        sequences = None if real is None else _locate_tokens(real, cached)
        if sequences is None and device_length is not None:
            key_length = device_length.to(tokens.device, torch.int32).expand(batch).contiguous()
        kwargs["dca_forward"] = _Forward(self, key_length, sequences)
        return (), kwargs


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    dca_forward: _Forward | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function: query [B, Hq, Sq, D], key and value [B, Hkv, cache slots, D]; returns [B, Sq, Hq, D]."""
    if dca_forward is None:
        raise ValueError(
            f"attention implementation {ATTN_IMPLEMENTATION!r} needs enable_dca(model) on the model that runs; it was "
            "set by hand, shared through one config with an enabled model, or the decoder was called past its hooks"
        )
    if dropout:
        raise ValueError(f"attention_dropout must be 0 to train with Dual Chunk Attention, got {dropout}")
    if sliding_window:
        raise ValueError(f"sliding_window must be None with Dual Chunk Attention, got {sliding_window}")
    key_length = dca_forward.key_length
    if not isinstance(key_length, Tensor) and key.shape[2] < key_length:
        raise ValueError(f"past_key_values must keep every key, got {key.shape[2]} keys for {key_length} tokens")

    # Static caches have slots beyond the tokens seen.
    q, k, v = (tensor.transpose(1, 2) for tensor in (query, key, value))
    attend = dca_forward.dual_chunk.attend
    if dca_forward.sequences is None:
        return attend(q, k, v, scaling, key_length), None

    out = torch.zeros_like(q, dtype=value.dtype)  # under autocast q is float32 and v, like the result, is not
    for row, tokens in enumerate(dca_forward.sequences):
        q_row, k_row, v_row = q[row, tokens.queries], k[row, tokens.keys], v[row, tokens.keys]
        if q_row.shape[0]:
            out[row, tokens.queries] = attend(q_row[None], k_row[None], v_row[None], scaling, tokens.length)[0]
    return out, None


def _mask(attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    """The mask function: the padding mask [B, tokens] as it is. The decoder's pre-hook has read it."""
    return attention_mask


AttentionInterface.register(ATTN_IMPLEMENTATION, _attention)
AttentionMaskInterface.register(ATTN_IMPLEMENTATION, _mask)


def _resolve(model: nn.Module) -> tuple[PreTrainedModel, nn.Module]:
    """The transformers model inside `model` and its decoder."""
    causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
    decoder = causal_lm.base_model if isinstance(causal_lm, PreTrainedModel) else None
    names = {cls.__name__ for cls in type(decoder).__mro__ if cls.__module__.startswith("transformers.models.")}
    if names.isdisjoint(_DECODERS):
        raise ValueError(f"model must be one of transformers' {_SUPPORTED}, got {type(causal_lm).__name__}")
    return causal_lm, decoder


def _check_supported(decoder: nn.Module) -> None:
    config = decoder.config
    rope_type = decoder.rotary_emb.rope_type
    if rope_type not in _ROPE_TYPES:
        raise ValueError(f"the model's rope_type must be one of {', '.join(_ROPE_TYPES)}, got {rope_type!r}")
    layer_types = getattr(config, "layer_types", None)
    windowed = "sliding_attention" in layer_types if layer_types else bool(getattr(config, "sliding_window", None))
    if windowed:
        raise ValueError(
            f"the model's sliding_window must be None, got {config.sliding_window}; load the model with "
            "sliding_window=None (use_sliding_window=False for Qwen) if it can read all keys"
        )


def _trained_length(config: Any) -> int:
    rope = config.rope_parameters
    if rope["rope_type"] == "yarn" and rope["factor"] is not None:
        return int(rope["original_max_position_embeddings"] * rope["factor"])
    return config.max_position_embeddings


def _check_settings(chunk_size: int, local_size: int, temperature: float | Callable[[int], float]) -> None:
    for name, value in (("chunk_size", chunk_size), ("local_size", local_size)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise ValueError(f"{name} must be an int, got {value!r}")
    if not 0 < local_size < chunk_size:
        raise ValueError(
            f"local_size must lie between 0 and chunk_size, both exclusive, got local_size={local_size} and "
            f"chunk_size={chunk_size}"
        )
    if not callable(temperature) and not (isinstance(temperature, int | float) and 0 < temperature < math.inf):
        raise ValueError(f"temperature must be a positive number or a function of the length, got {temperature!r}")


def _check_forward(config: Any, kwargs: Mapping[str, Any]) -> None:
    if config._attn_implementation != ATTN_IMPLEMENTATION:
        raise ValueError(
            f"the attention implementation was set to {config._attn_implementation!r} while Dual Chunk Attention is "
            "enabled; call disable_dca(model) first"
        )
    if kwargs.get("output_attentions", getattr(config, "output_attentions", False)):
        raise ValueError("output_attentions must be False: Dual Chunk Attention does not form the attention weights")
    if kwargs.get("is_causal", getattr(config, "is_causal", None)) is False:
        raise ValueError("is_causal must be True with Dual Chunk Attention, got False")


def _padding_mask(mask: Any, batch: int, key_length: int, device: torch.device) -> Tensor | None:
    """Boolean [B, key_length], True at real tokens; None without padding."""
    if isinstance(mask, Mapping):  # generate() prepares one per layer type for static caches
        mask = mask["full_attention"]
    if mask is None:
        return None
    if mask.ndim != 2 or mask.shape[0] != batch or mask.shape[1] < key_length:
        raise ValueError(
            f"attention_mask must be a padding mask over cached and new tokens, of shape [{batch}, {key_length}], "
            f"got {list(mask.shape)}"
        )
    real = mask[:, :key_length].to(device=device, dtype=torch.bool)
    return None if real.all() else real


def _check_positions(given: Tensor | None, positions: Tensor, slots: Tensor, is_new: Tensor | None) -> None:
    """Positions that count a row's real tokens pass, and so do those that count its padding too: they are relative."""
    if given is None:
        return
    if given.ndim != 2 or given.shape[1] != slots.shape[1]:
        raise ValueError(
            f"position_ids must have shape [batch, tokens] with {slots.shape[1]} tokens, got {list(given.shape)}"
        )
    given = given.to(positions.device)
    ignored = False if is_new is None else ~is_new
    agrees = [((given == expected) | ignored).all(dim=1) for expected in (positions, slots)]
    if not (agrees[0] | agrees[1]).all():
        raise ValueError(
            "position_ids must count each sequence's tokens from 0, cached ones included; packed sequences and other "
            "positions are not supported with Dual Chunk Attention"
        )


def _locate_tokens(real: Tensor, cached: int) -> list[_SequenceTokens]:
    """The real tokens of each row of the padding mask [B, cached + new]."""
    length = real.shape[1]
    begin = real.int().argmax(dim=1)
    end = length - real.flip(1).int().argmax(dim=1)
    count = real.sum(dim=1)
    sequences = []
    for row, (first, last, tokens) in enumerate(torch.stack((begin, end, count), dim=1).tolist()):
        if last - first == tokens:
            keys = slice(first, last)
            queries = slice(max(first - cached, 0), max(last - cached, 0))
        else:
            # On the CPU: an index from there serves layers on any device.
            keys = real[row].nonzero().flatten().cpu()
            queries = real[row, cached:].nonzero().flatten().cpu()
        sequences.append(_SequenceTokens(keys, queries, tokens))
    return sequences
