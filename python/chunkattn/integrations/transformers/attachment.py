"""What the attention methods share: how one is attached to a model, and what its layers get to know of a forward.

Transformers rotates queries and keys, and caches the keys, before it calls attention. A pre-hook on the decoder finds
each sequence's real tokens and hands them to the layers through the keyword arguments that transformers forwards to its
attention functions; a hook on the rotary embedding makes the positions what the method wants.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from chunkattn.integrations.transformers.padding import (
    SequenceTokens,
    check_positions,
    locate_tokens,
    padding_mask,
)

# Decoders that rotate, update the cache and call the attention interface in this order, with rotate-half RoPE.
_DECODERS = ("LlamaModel", "MistralModel", "MixtralModel", "Qwen2Model", "Qwen2MoeModel", "Qwen3Model", "Qwen3MoeModel")
_SUPPORTED = "Llama, Mistral, Mixtral, Qwen2, Qwen2-MoE, Qwen3 and Qwen3-MoE models"

# The frequencies of these do not depend on the length of the sequence.
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")

_ATTACHED = "_chunkattn"

_IMPLEMENTATIONS: set[str] = set()


@dataclass
class Forward:
    """What the attention layers need to know about one forward of the model."""

    attachment: "Attachment"
    key_length: int | Tensor = 0  # filled cache slots, the new tokens included; int32 [B] where only the device knows
    sequences: list[SequenceTokens] | None = None  # None: no padding
    new: Tensor | None = None  # bool [B, new tokens], the real ones; None: no padding


class Attachment:
    """An attention method on one model: its settings, and the hooks that apply them."""

    implementation: ClassVar[str]
    """The name of its attention and mask functions in transformers."""
    method: ClassVar[str]
    """Its name in messages."""
    function: ClassVar[str]
    """What follows enable_ and disable_."""

    def __init__(self, decoder: nn.Module):
        self.rotary = decoder.rotary_emb
        self.previous_implementation = decoder.config._attn_implementation
        self._handles: list[Any] = []

    def attend(
        self, forward: Forward, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, scale: float | None
    ) -> Tensor:
        """Attention of one layer: q [B, Sq, Hq, D], k and v [B, cache slots, Hkv, D]; returns [B, Sq, Hq, D]."""
        raise NotImplementedError

    def hook_rotary(self) -> Any:
        """Hooks the rotary embedding and returns the handle."""
        raise NotImplementedError

    def begin(self, decoder: nn.Module, kwargs: dict[str, Any], tokens: Tensor) -> Forward:
        """Takes from the decoder's keyword arguments what only this method knows, before the others are read."""
        return Forward(self)

    def wants_length(self, device: torch.device) -> bool:
        """Whether the host must know the length of a static cache."""
        return True

    def attach(self, decoder: nn.Module) -> None:
        self._handles = [
            decoder.register_forward_pre_hook(self._prepare, with_kwargs=True),
            self.hook_rotary(),
        ]
        setattr(decoder, _ATTACHED, self)

    def detach(self, decoder: nn.Module) -> None:
        for handle in self._handles:
            handle.remove()
        delattr(decoder, _ATTACHED)

    def _prepare(self, decoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Pre-hook of the decoder: positions of the new tokens, and where the real tokens are."""
        kwargs = dict(kwargs)
        if args:
            names = list(inspect.signature(type(decoder).forward).parameters)[1:]
            kwargs.update(zip(names, args, strict=False))
        self._check_forward(decoder.config, kwargs)

        tokens = kwargs.get("input_ids") if kwargs.get("input_ids") is not None else kwargs.get("inputs_embeds")
        if tokens is None:
            return (), kwargs
        forward = self.begin(decoder, kwargs, tokens)
        cache = kwargs.get("past_key_values")
        cached = 0 if cache is None else cache.get_seq_length()
        batch, new = tokens.shape[:2]
        # The length of a static cache in use is a tensor. Nobody waits for it unless there is something to check, or
        # nothing that could read it.
        if self.wants_length(tokens.device):
            cached = int(cached)
        device_length = cached + new if isinstance(cached, Tensor) else None
        if kwargs.get("attention_mask") is not None or kwargs.get("position_ids") is not None:
            cached = int(cached)
        key_length = cached + new
        real = padding_mask(kwargs.get("attention_mask"), batch, key_length, tokens.device)

        slots = (torch.arange(new, device=tokens.device) + cached).unsqueeze(0)
        if real is None:
            positions, is_new = slots, None
        else:
            positions, is_new = real.cumsum(dim=1)[:, cached:] - 1, real[:, cached:]
        check_positions(kwargs.get("position_ids"), positions, slots, is_new, self.method)
        kwargs["position_ids"] = positions
        forward.sequences = None if real is None else locate_tokens(real, cached)
        forward.key_length, forward.new = key_length, is_new
        if real is None and device_length is not None:
            forward.key_length = device_length.to(tokens.device, torch.int32).expand(batch).contiguous()
        kwargs["chunkattn_forward"] = forward
        return (), kwargs

    def _check_forward(self, config: Any, kwargs: Mapping[str, Any]) -> None:
        if config._attn_implementation != self.implementation:
            raise ValueError(
                f"the attention implementation was set to {config._attn_implementation!r} while {self.method} is "
                f"enabled; call disable_{self.function}(model) first"
            )
        if kwargs.get("output_attentions", getattr(config, "output_attentions", False)):
            raise ValueError(f"output_attentions must be False: {self.method} does not form the attention weights")
        if kwargs.get("is_causal", getattr(config, "is_causal", None)) is False:
            raise ValueError(f"is_causal must be True with {self.method}, got False")


def _attention(
    attachment: type[Attachment],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    chunkattn_forward: Forward | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function: query [B, Hq, Sq, D], key and value [B, Hkv, cache slots, D]; returns [B, Sq, Hq, D]."""
    if chunkattn_forward is None:
        raise ValueError(
            f"attention implementation {attachment.implementation!r} needs enable_{attachment.function}(model) on the "
            "model that runs; it was set by hand, shared through one config with an enabled model, or the decoder was "
            "called past its hooks"
        )
    if dropout:
        raise ValueError(f"attention_dropout must be 0 to train with {attachment.method}, got {dropout}")
    if sliding_window:
        raise ValueError(f"sliding_window must be None with {attachment.method}, got {sliding_window}")
    q, k, v = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return chunkattn_forward.attachment.attend(chunkattn_forward, module, q, k, v, scaling), None


def _mask(attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    """The mask function: the padding mask [B, tokens] as it is. The decoder's pre-hook has read it."""
    return attention_mask


def register(attachment: type[Attachment]) -> type[Attachment]:
    """Class decorator: makes the method's attention function known to transformers."""
    _IMPLEMENTATIONS.add(attachment.implementation)
    AttentionInterface.register(attachment.implementation, partial(_attention, attachment))
    AttentionMaskInterface.register(attachment.implementation, _mask)
    return attachment


def resolve(model: nn.Module) -> tuple[PreTrainedModel, nn.Module]:
    """The transformers model inside `model` and its decoder. ValueError where no method can be attached to it."""
    causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
    decoder = causal_lm.base_model if isinstance(causal_lm, PreTrainedModel) else None
    names = {cls.__name__ for cls in type(decoder).__mro__ if cls.__module__.startswith("transformers.models.")}
    if names.isdisjoint(_DECODERS):
        raise ValueError(f"model must be one of transformers' {_SUPPORTED}, got {type(causal_lm).__name__}")
    return causal_lm, decoder


def check_supported(decoder: nn.Module) -> None:
    """ValueError where the model has positions or attention that a method cannot compute."""
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
    if config._attn_implementation in _IMPLEMENTATIONS and not hasattr(decoder, _ATTACHED):
        raise ValueError(
            f"the model's config already names {config._attn_implementation!r}: it was set by hand or is shared with "
            "an enabled model; set another attention implementation or give each model its own config"
        )


def detach(model: nn.Module, kind: type[Attachment] = Attachment) -> None:
    """Removes the method that is attached to the model, if it is of this kind, and restores what was there before."""
    causal_lm, decoder = resolve(model)
    attachment = getattr(decoder, _ATTACHED, None)
    if isinstance(attachment, kind):
        attachment.detach(decoder)
        causal_lm.set_attn_implementation(attachment.previous_implementation)


def attach(model: nn.Module, kind: type[Attachment], *settings: Any) -> None:
    """Attaches a method, in place of the one that is attached."""
    causal_lm, decoder = resolve(model)
    detach(model)
    attachment = kind(decoder, *settings)
    causal_lm.set_attn_implementation(kind.implementation)
    if decoder.config._attn_implementation != kind.implementation:
        raise ValueError(f"{type(causal_lm).__name__} does not let its attention implementation be set")
    attachment.attach(decoder)
