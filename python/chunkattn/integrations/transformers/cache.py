"""Layers of a transformers cache that keep what select-and-merge attention needs to go on."""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, StaticLayer

import chunkattn

_TENSORS = ("k", "v", "region_sums", "query_sums", "indices", "seqlens")


class SelectMergeLayer(CacheLayerMixin):
    """One layer of a cache: a :class:`chunkattn.SelectMergeCache`, made when the first tokens come.

    Transformers' attention modules update the cache before they call attention, and without the queries, which choose
    regions. So update() hands keys and values on, and the attention function appends them.

    Args:
        options: of SelectMergeCache.
        max_cache_len: tokens there is room for from the start, as in a static cache, whose length then stays on the
            device. None: the layer grows, by copies to more room.
    """

    is_sliding = False
    supports_early_init = False

    def __init__(self, options: dict[str, Any], max_cache_len: int | None = None):
        super().__init__()
        self.options = options
        self.max_cache_len = max_cache_len
        self.cache: chunkattn.SelectMergeCache | None = None
        self.has_padding = False
        self.is_empty = True
        self.is_awaited = False  # by attention that will append what update() is given
        self._length: int | Tensor = 0  # slots: padding counts here, and nowhere in the cache

    @property
    def is_compileable(self) -> bool:
        return self.max_cache_len is not None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise ValueError("past_key_values of select-and-merge attention cannot be initialized early")

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_awaited:
            raise ValueError(
                "past_key_values belong to a model with select-and-merge attention enabled: start with an empty cache"
            )
        return key_states, value_states

    def get_seq_length(self) -> int | Tensor:
        return self._length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._length + query_length if self.max_cache_len is None else self.max_cache_len, 0

    def get_max_length(self) -> int:
        return -1 if self.max_cache_len is None else self.max_cache_len

    def reset(self) -> None:
        self.is_empty, self.has_padding = True, False
        if self.cache is not None:
            self.cache.reset()
        if isinstance(self._length, Tensor):
            self._length.zero_()
        else:
            self._length = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.cache is not None:
            for name in _TENSORS:
                tensor = getattr(self.cache, name)
                setattr(self.cache, name, tensor.index_select(0, indices.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.cache is not None:
            self.batch_select_indices(torch.arange(len(self.cache.seqlens)).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        raise ValueError(
            "past_key_values of select-and-merge attention cannot give up tokens, as assisted generation asks"
        )

    def reserve(self, q: Tensor, k: Tensor) -> None:
        """Makes room for the tokens of q [B, S, Hq, D] and k [B, S, Hkv, D], which is of the dtype of the cache."""
        if self.cache is None:
            self.cache = self._make(self.max_cache_len or _room(k.shape[1]), q, k)
            self._mark_static()
        elif self.max_cache_len is None and self._length + k.shape[1] > self.cache.capacity:
            old, self.cache = self.cache, self._make(_room(self._length + k.shape[1]), q, k)
            for name in _TENSORS:
                source, target = getattr(old, name), getattr(self.cache, name)
                target[tuple(map(slice, source.shape))] = source
        if len(self.cache.seqlens) != len(k):
            raise ValueError(
                f"past_key_values must have the sequences of the call, got {len(self.cache.seqlens)} for {len(k)}"
            )

    def advance(self, tokens: int) -> None:
        """Counts slots that attention has appended."""
        self.is_empty = self.is_awaited = False
        if isinstance(self._length, Tensor):
            self._length.add_(tokens)
        else:
            self._length += tokens

    def _make(self, capacity: int, q: Tensor, k: Tensor) -> chunkattn.SelectMergeCache:
        batch, _, kv_heads, head_dim = k.shape
        sizes = {"batch": batch, "kv_heads": kv_heads, "head_dim": head_dim, "capacity": capacity}
        # Tensors made in inference mode could not be written to outside of it.
        with torch.inference_mode(False):
            return chunkattn.SelectMergeCache(
                **sizes, query_heads=q.shape[2], dtype=k.dtype, device=k.device, **self.options
            )

    def _mark_static(self) -> None:
        """A static cache's tensors keep their addresses, which torch.compile needs to know for CUDA graphs."""
        if self.max_cache_len is None:
            return
        with torch.inference_mode(False):
            self._length = torch.tensor(0, device=self.cache.k.device)
        if not torch.compiler.is_compiling():
            for tensor in (self._length, *(getattr(self.cache, name) for name in _TENSORS)):
                torch._dynamo.mark_static_address(tensor)


def _room(tokens: int) -> int:
    """The capacity of a layer that grows and has to hold this many tokens."""
    return tokens + max(256, tokens // 4)


def adopt(cache: Cache, options: dict[str, Any], layers: int) -> None:
    """Gives a transformers cache these layers, in place of its own empty ones, before a forward of the model.

    Raises:
        ValueError: the cache holds tokens that other attention or other settings have put there, or it is of a kind
            that has no counterpart.
    """
    own = [layer for layer in cache.layers if isinstance(layer, SelectMergeLayer)]
    if not (own and len(own) == len(cache.layers) and own[0].options == options):
        cache.layers = [SelectMergeLayer(options, _check_replaceable(cache, own)) for _ in range(layers)]
    for layer in cache.layers:
        layer.is_awaited = True


def _check_replaceable(cache: Cache, own: list[SelectMergeLayer]) -> int | None:
    """The length of a cache that holds nothing, None where it grows."""
    if own and all(layer.is_empty for layer in own):
        return own[0].max_cache_len
    if own or int(cache.get_seq_length()):
        raise ValueError(
            "past_key_values must be empty or filled by a model with the same settings of select-and-merge attention, "
            f"got a {type(cache).__name__} with {int(cache.get_seq_length())} tokens of other attention"
        )
    if getattr(cache, "offloading", False) or not _kinds(cache) <= {DynamicLayer, StaticLayer}:
        kinds = ", ".join(sorted(kind.__name__ for kind in _kinds(cache)))
        raise ValueError(
            "past_key_values must be a dynamic or static cache that is not offloaded with select-and-merge attention, "
            f"got a {type(cache).__name__} of {kinds}"
        )
    return cache.layers[0].get_max_length() if StaticLayer in _kinds(cache) else None


def _kinds(cache: Cache) -> set[type]:
    return {type(layer) for layer in cache.layers} or {cache.layer_class_to_replicate}
