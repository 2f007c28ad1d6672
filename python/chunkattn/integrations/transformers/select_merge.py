"""Select-and-merge attention: :func:`enable_select_merge`.

The hook on the rotary embedding replaces its angles: by those of CRD NTK where a draw came with the call, else by those
of the true positions, computed in float64, because transformers' own float32 products are off by 0.06 rad near position
2**20.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

import chunkattn
from chunkattn._checks import check_int, check_positive
from chunkattn._ops import has_kernels
from chunkattn.integrations.transformers.attachment import (
    Attachment,
    Forward,
    attach,
    check_supported,
    detach,
    register,
    resolve,
)
from chunkattn.integrations.transformers.cache import SelectMergeLayer, adopt
from chunkattn.integrations.transformers.padding import attend_rows
from chunkattn.rotary import CRDNTK, CyclicRotary, ntk_base, rope_rows

SELECT_MERGE_IMPLEMENTATION = "chunkattn_select_merge"
"""The name under which the attention and mask functions of select-and-merge are registered with transformers."""

_WORDS = {
    "eligibility": ("group", "row"),
    "selection": ("lookahead", "causal"),
    "heads": ("kv", "q"),
    "select_on": ("rotated", "unrotated"),
    "decoding": ("causal", "query"),
}


def enable_select_merge(
    model: nn.Module,
    *,
    region_size: int = 16,
    top_k: int = 384,
    merge: int = 128,
    eligibility: str = "group",
    selection: str = "lookahead",
    heads: str = "kv",
    select_on: str = "rotated",
    decoding: str | None = None,
    ntk_scale: float = 1.0,
) -> None:
    """Makes a loaded Hugging Face causal language model run select-and-merge attention, in training, forward() and
    generate().

    The model is changed in place; :func:`disable_select_merge` puts it back. A second call replaces the settings of the
    first, and :func:`enable_dca` replaces the method. Up to ``(top_k + merge) * region_size`` tokens the attention is
    the model's own. Transformers keeps the attention implementation in the config, so a model needs a config object of
    its own, as from_pretrained makes.

    The first forward over an empty cache, such as a prompt, is computed as without a cache, and what follows goes
    through :class:`chunkattn.SelectMergeCache`, which takes the place of the layers in transformers' dynamic or static
    cache. With gradients enabled no cache is made.

    For training with CRD NTK pass each forward the draw of its step, which then replaces the positions and the base:
    ``model(tokens, labels=tokens, rotary=crd_ntk(model).draw(step, tokens.shape[1], generator))``. Nothing of it stays
    in the model.

    Args:
        model: a Llama, Mistral, Mixtral, Qwen2 (and 2.5), Qwen2-MoE, Qwen3 or Qwen3-MoE model of transformers, with
            any head, or a PEFT model around one. Its rope type is default, linear, llama3 or yarn, and it uses no
            sliding window.
        region_size, top_k, merge, eligibility, selection, heads: see :func:`chunkattn.select`.
        select_on: "rotated": regions are chosen by queries and keys as attention sees them; "unrotated": without
            their positions.
        decoding: how tokens behind a cache choose their regions: "causal", by the group before, or "query", each by its
            own query; see :class:`chunkattn.SelectMergeCache`. Default: "causal" with selection="causal", where
            generation step by step equals one forward over the whole sequence; else "query".
        ntk_scale: lambda of CRD NTK for forwards without a draw, how many times the trained length is covered: the
            base becomes :func:`chunkattn.ntk_base` of the model's. Other than 1 for the rope type default only.

    Raises:
        TypeError, ValueError: the model, its rope type or one of its settings is not supported, or an argument is not
            what is listed above. The model is left as it was.

    Source: arXiv 2410.04211.
    """
    _, decoder = resolve(model)
    check_supported(decoder)
    settings = {
        "region_size": region_size, "top_k": top_k, "merge": merge, "eligibility": eligibility,
        "selection": selection, "heads": heads,
    }  # fmt: skip
    for name in ("region_size", "top_k", "merge"):
        check_int(name, settings[name], 1)
    if decoding is None:
        decoding = "causal" if selection == "causal" else "query"
    words = settings | {"select_on": select_on, "decoding": decoding}
    for name, allowed in _WORDS.items():
        if words[name] not in allowed:
            raise ValueError(f"{name} must be {' or '.join(map(repr, allowed))}, got {words[name]!r}")
    check_positive("ntk_scale", ntk_scale)
    if ntk_scale != 1:
        _check_base(decoder.rotary_emb, "ntk_scale must be 1")
    attach(model, _SelectMerge, settings, select_on, decoding, ntk_scale)


def disable_select_merge(model: nn.Module) -> None:
    """Undoes :func:`enable_select_merge`: removes its hooks and restores the attention. Without it, does nothing.

    Args:
        model: the model that was given to enable_select_merge.

    Raises:
        ValueError: the model is not one that enable_select_merge supports.
    """
    detach(model, _SelectMerge)


def crd_ntk(model: nn.Module, **settings: Any) -> CRDNTK:
    """The CRD NTK of a model: :class:`chunkattn.CRDNTK` with the model's base, rotary dimensions and trained length.

    Args:
        model: as for :func:`enable_select_merge`, of the rope type default.
        settings: those of CRDNTK, which replace the model's.

    Raises:
        TypeError, ValueError: the model has another rope type or is not supported, or a setting is not what CRDNTK
            takes.
    """
    _, decoder = resolve(model)
    rope_type = decoder.rotary_emb.rope_type
    if rope_type != "default":
        raise ValueError(f"model must have the rope_type 'default' for CRD NTK, got {rope_type!r}")
    own = {
        "base": decoder.config.rope_parameters["rope_theta"],
        "rotary_dim": _rotary_dim(decoder.rotary_emb),
        "original_length": decoder.config.max_position_embeddings,
    }
    return CRDNTK(**own | settings)


class _NewTokens:
    """Moves the real tokens of each row of a padded batch to its front, where the cache takes them, and back."""

    def __init__(self, real: Tensor | None):
        """real: bool [B, S]; None without padding."""
        self.order = self.count = None
        if real is not None and not real.all():
            self.order = real.logical_not().int().argsort(dim=1, stable=True)
            self.count = real.sum(dim=1, dtype=torch.int32)

    def to_front(self, x: Tensor) -> Tensor:
        return x if self.order is None else x[self._places(x)]

    def back(self, x: Tensor) -> Tensor:
        if self.order is None:
            return x
        out = torch.empty_like(x)
        out[self._places(x)] = x
        return out

    def count_on(self, device: torch.device) -> Tensor | None:
        return None if self.count is None else self.count.to(device)

    def _places(self, x: Tensor) -> tuple[Tensor, Tensor]:
        order = self.order.to(x.device)
        return torch.arange(len(order), device=x.device)[:, None], order


@dataclass
class _SelectMergeForward(Forward):
    draw: CyclicRotary | None = None
    rows: tuple[Tensor, Tensor] | None = None  # cosines, sines of the new tokens, float32 [1 or B, S, rotary_dim / 2]
    layers: list[SelectMergeLayer] | None = None
    _new_tokens: _NewTokens | None = None

    @property
    def new_tokens(self) -> _NewTokens:
        """Found once for all layers."""
        if self._new_tokens is None:
            self._new_tokens = _NewTokens(self.new)
        return self._new_tokens


@register
class _SelectMerge(Attachment):
    implementation = SELECT_MERGE_IMPLEMENTATION
    method = "select-and-merge attention"
    function = "select_merge"

    def __init__(self, decoder: nn.Module, settings: dict[str, Any], select_on: str, decoding: str, ntk_scale: float):
        super().__init__(decoder)
        self.settings = settings
        self.cache_options = settings | {"selection": decoding}
        self.select_on = select_on
        self.base = None
        if ntk_scale != 1:
            self.base = ntk_base(decoder.config.rope_parameters["rope_theta"], _rotary_dim(self.rotary), ntk_scale)
        self._forward: _SelectMergeForward | None = None

    def hook_rotary(self) -> Any:
        return self.rotary.register_forward_hook(self._replace_angles, with_kwargs=True)

    def wants_length(self, device: torch.device) -> bool:
        return False

    def begin(self, decoder: nn.Module, kwargs: dict[str, Any], tokens: Tensor) -> Forward:
        draw = kwargs.pop("rotary", None)
        cache = kwargs.get("past_key_values")
        if draw is not None:
            _check_draw(draw, self.rotary, tokens.shape[1])
            if cache is not None:
                raise ValueError("rotary must be None with past_key_values: cached keys are at their true positions")
        use_cache = kwargs.get("use_cache")
        if cache is None and (decoder.config.use_cache if use_cache is None else use_cache):
            # The cache has no backward, and what it holds is of no use to forwards at other positions.
            caches = draw is None and has_kernels("select_merge_with_kvcache", tokens.device)
            if torch.is_grad_enabled() or not caches:
                kwargs["use_cache"] = False
            else:
                kwargs["past_key_values"] = cache = DynamicCache(config=decoder.config)
        if cache is not None:
            adopt(cache, self.cache_options, decoder.config.num_hidden_layers)
        self._forward = _SelectMergeForward(self, draw=draw, layers=None if cache is None else cache.layers)
        return self._forward

    def attend(
        self, forward: Forward, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, scale: float | None
    ) -> Tensor:
        """k and v have the tokens of q alone: the cache, if there is one, has the others."""
        select = ()
        if self.select_on == "unrotated":
            with torch.no_grad():
                select = tuple(_unrotate(x, *forward.rows) for x in (q, k))
        layer = None if forward.layers is None else forward.layers[module.layer_idx]
        if layer is None:
            return self._attend(forward, scale, q, k, v, *select)
        # Under autocast queries and keys are float32, and values, like the cache, are not.
        q, k, *select = (x.to(v.dtype) for x in (q, k, *select))
        starts = layer.is_empty
        if starts:
            out = self._attend(forward, scale, q, k, v, *select)
        _check_padding(forward, layer, first=module.layer_idx == 0)
        layer.reserve(q, k)
        new = forward.new_tokens
        arguments = [new.to_front(x) for x in (q, k, v, *select)]
        options = dict(zip(("select_q", "select_k"), arguments[3:], strict=False), new_seqlens=new.count_on(q.device))
        if starts:
            layer.cache.append(*arguments[:3], **options)
        else:
            out = new.back(layer.cache.attend(*arguments[:3], scale=scale, **options))
        layer.advance(q.shape[1])
        return out

    def _attend(self, forward: Forward, scale: float | None, *tensors: Tensor) -> Tensor:
        """Whole sequences: q, k, v and the rows to select on where they are others, [B, S, heads, D]."""

        def attend(q: Tensor, k: Tensor, v: Tensor, select_q: Any = None, select_k: Any = None) -> Tensor:
            return chunkattn.select_merge(q, k, v, scale=scale, select_q=select_q, select_k=select_k, **self.settings)

        if forward.sequences is None:
            return attend(*tensors)
        return attend_rows(
            forward.sequences,
            tensors[0],
            tensors[2].dtype,
            lambda row, tokens: attend(*(x[row, tokens.queries][None] for x in tensors)),
        )

    def _replace_angles(
        self, rotary: nn.Module, args: tuple, kwargs: dict[str, Any], output: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Hook of the rotary embedding, forward(x, position_ids) -> cosines and sines [1 or B, S, rotary_dim]."""
        forward, self._forward = self._forward, None
        positions = kwargs["position_ids"] if "position_ids" in kwargs else args[1]
        if forward.draw is not None:
            rows = forward.draw.rows(positions)
        elif self.base is not None:
            rows = rope_rows(positions, _rotary_dim(rotary), self.base)
        else:
            # The embedding computes with float32 frequencies, whatever dtype the model was cast to.
            rows = rope_rows(positions, _rotary_dim(rotary), inv_freq=rotary.inv_freq.float())
        if self.select_on == "unrotated":
            forward.rows = rows
        return tuple(
            (torch.cat((row, row), dim=-1) * rotary.attention_scaling).to(out.dtype)
            for row, out in zip(rows, output, strict=True)
        )


def _check_padding(forward: Forward, layer: SelectMergeLayer, first: bool) -> None:
    """The cache keeps no padding, so that what a call says of cached tokens must be what it was told of them."""
    if forward.sequences is None:
        if layer.has_padding:
            raise ValueError("attention_mask must mark the padding of the tokens in past_key_values, got no padding")
        return
    if first and not layer.is_empty:
        counts = [tokens.length for tokens in forward.sequences]
        kept = (layer.cache.seqlens + forward.new.sum(dim=1).to(layer.cache.seqlens.device)).tolist()
        if counts != kept:
            raise ValueError(
                f"attention_mask must mark the {kept} tokens there are with those in past_key_values, got {counts}"
            )
    layer.has_padding = True


def _unrotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, S, H, D] as it was before its rotary_dim first dimensions were turned, d with d + rotary_dim / 2."""
    cos, sin = (row.unsqueeze(2).to(x.device) for row in (cos, sin))
    half = cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    turned = (first * cos + second * sin, second * cos - first * sin, rest)
    return torch.cat([part.to(x.dtype) for part in turned], dim=-1)


def _rotary_dim(rotary: nn.Module) -> int:
    return 2 * rotary.inv_freq.numel()


def _check_base(rotary: nn.Module, rule: str) -> None:
    """NTK changes the base, which alone makes the frequencies of one rope type only."""
    if rotary.rope_type != "default":
        raise ValueError(f"{rule} unless the model's rope_type is 'default', got {rotary.rope_type!r}")


def _check_draw(draw: Any, rotary: nn.Module, length: int) -> None:
    if not isinstance(draw, CyclicRotary):
        raise TypeError(f"rotary must be what CRDNTK.draw returns, got {type(draw).__name__}")
    _check_base(rotary, "rotary must be None")
    if draw.rotary_dim != _rotary_dim(rotary):
        raise ValueError(f"rotary must have rotary_dim={_rotary_dim(rotary)}, the model's, got {draw.rotary_dim}")
    if draw.cycle < length:
        raise ValueError(f"rotary must be drawn for the {length} tokens of the call, got one of {draw.cycle} positions")
