"""Select-and-merge attention: :func:`enable_select_merge`.

The hook on the rotary embedding replaces its angles: by those of CRD NTK where a draw came with the call, else by those
of the true positions, computed in float64, because transformers' own float32 products are off by 0.06 rad near position
2**20.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import chunkattn
from chunkattn._checks import check_int, check_positive
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
from chunkattn.rotary import CRDNTK, CyclicRotary, ntk_base, rope_rows

SELECT_MERGE_IMPLEMENTATION = "chunkattn_select_merge"
"""The name under which the attention and mask functions of select-and-merge are registered with transformers."""

_WORDS = {
    "eligibility": ("group", "row"),
    "selection": ("lookahead", "causal"),
    "heads": ("kv", "q"),
    "select_on": ("rotated", "unrotated"),
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
    ntk_scale: float = 1.0,
) -> None:
    """Makes a loaded Hugging Face causal language model run select-and-merge attention, in training and forward().

    The model is changed in place; :func:`disable_select_merge` puts it back. A second call replaces the settings of the
    first, and :func:`enable_dca` replaces the method. Up to ``(top_k + merge) * region_size`` tokens the attention is
    the model's own. Transformers keeps the attention implementation in the config, so a model needs a config object of
    its own, as from_pretrained makes.

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
    for name, word in (settings | {"select_on": select_on}).items():
        if name in _WORDS and word not in _WORDS[name]:
            raise ValueError(f"{name} must be {' or '.join(map(repr, _WORDS[name]))}, got {word!r}")
    check_positive("ntk_scale", ntk_scale)
    if ntk_scale != 1:
        _check_base(decoder.rotary_emb, "ntk_scale must be 1")
    attach(model, _SelectMerge, settings, select_on, ntk_scale)


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


@dataclass
class _SelectMergeForward(Forward):
    draw: CyclicRotary | None = None
    rows: tuple[Tensor, Tensor] | None = (
        None  # cosines and sines of the new tokens, float32 [1 or B, S, rotary_dim / 2]
    )


@register
class _SelectMerge(Attachment):
    implementation = SELECT_MERGE_IMPLEMENTATION
    method = "select-and-merge attention"
    function = "select_merge"

    def __init__(self, decoder: nn.Module, settings: dict[str, Any], select_on: str, ntk_scale: float):
        super().__init__(decoder)
        self.settings = settings
        self.select_on = select_on
        self.base = None
        if ntk_scale != 1:
            self.base = ntk_base(decoder.config.rope_parameters["rope_theta"], _rotary_dim(self.rotary), ntk_scale)
        self._forward: _SelectMergeForward | None = None

    def hook_rotary(self) -> Any:
        return self.rotary.register_forward_hook(self._replace_angles, with_kwargs=True)

    def begin(self, decoder: nn.Module, kwargs: dict[str, Any], tokens: Tensor) -> Forward:
        draw = kwargs.pop("rotary", None)
        if draw is not None:
            _check_draw(draw, self.rotary, tokens.shape[1])
        cache = kwargs.get("past_key_values")
        if cache is not None and cache.get_seq_length():
            raise ValueError("past_key_values must be empty")
        self._forward = _SelectMergeForward(self, draw=draw)
        return self._forward

    def attend(
        self, forward: Forward, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, scale: float | None
    ) -> Tensor:
        """All of a sequence at once: k and v have the tokens of q."""
        select = ()
        if self.select_on == "unrotated":
            with torch.no_grad():
                select = tuple(_unrotate(x, *forward.rows) for x in (q, k))
        if forward.sequences is None:
            return self._attend(scale, q, k, v, *select)

        def attend_row(row: int, tokens: SequenceTokens) -> Tensor:
            return self._attend(scale, *(x[row, tokens.queries][None] for x in (q, k, v, *select)))

        # Under autocast q is float32 and v, like the result, is not.
        return attend_rows(forward.sequences, q, v.dtype, attend_row)

    def _attend(
        self, scale: float | None, q: Tensor, k: Tensor, v: Tensor, select_q: Any = None, select_k: Any = None
    ) -> Tensor:
        return chunkattn.select_merge(q, k, v, scale=scale, select_q=select_q, select_k=select_k, **self.settings)

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
