"""Dual Chunk Attention: :func:`enable_dca`.

The hook on the rotary embedding takes positions modulo the stride c = chunk_size - local_size, so that queries and
cached keys arrive rotated at their row of the rotary table, as ``chunkattn.dca(..., q_rotated=True, k_rotated=True)``
expects. Few queries, as in decoding, go through ``chunkattn.dca_with_kvcache`` on transformers' own cache where it has
kernels for their device.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import chunkattn
from chunkattn._ops import has_kernels
from chunkattn._temperature import temperature_of_one
from chunkattn.integrations.transformers.attachment import (
    Attachment,
    Forward,
    attach,
    check_supported,
    detach,
    register,
    resolve,
)
from chunkattn.integrations.transformers.padding import SequenceTokens, attend_rows

ATTN_IMPLEMENTATION = "chunkattn_dca"
"""The name under which the attention and mask functions of Dual Chunk Attention are registered with transformers."""

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
    _, decoder = resolve(model)
    check_supported(decoder)
    config = decoder.config
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

    attach(model, _DualChunk, chunk_size, local_size, temperature)


def disable_dca(model: nn.Module) -> None:
    """Undoes :func:`enable_dca`: removes its hooks and restores the attention implementation. Without it, does nothing.

    Args:
        model: the model that was given to enable_dca.

    Raises:
        ValueError: the model is not one that enable_dca supports.
    """
    detach(model, _DualChunk)


@register
class _DualChunk(Attachment):
    implementation = ATTN_IMPLEMENTATION
    method = "Dual Chunk Attention"
    function = "dca"

    def __init__(
        self,
        decoder: nn.Module,
        chunk_size: int,
        local_size: int,
        temperature: float | Callable[[int], float],
    ):
        super().__init__(decoder)
        self.chunk_size = chunk_size
        self.local_size = local_size
        self.temperature = temperature
        self._table_frequencies: Tensor | None = None
        self._tables: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def hook_rotary(self) -> Any:
        return self.rotary.register_forward_pre_hook(self._wrap_positions, with_kwargs=True)

    def wants_length(self, device: torch.device) -> bool:
        return not has_kernels("dca_with_kvcache", device)

    def attend(
        self, forward: Forward, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, scale: float | None
    ) -> Tensor:
        key_length = forward.key_length
        if not isinstance(key_length, Tensor) and k.shape[1] < key_length:
            raise ValueError(f"past_key_values must keep every key, got {k.shape[1]} keys for {key_length} tokens")
        # Static caches have slots beyond the tokens seen.
        if forward.sequences is None:
            return self._attend(q, k, v, scale, key_length)

        def attend_row(row: int, tokens: SequenceTokens) -> Tensor:
            one = (x[row, where][None] for x, where in ((q, tokens.queries), (k, tokens.keys), (v, tokens.keys)))
            return self._attend(*one, scale, tokens.length)

        # Under autocast q is float32 and v, like the result, is not.
        return attend_rows(forward.sequences, q, v.dtype, attend_row)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None, length: int | Tensor) -> Tensor:
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
