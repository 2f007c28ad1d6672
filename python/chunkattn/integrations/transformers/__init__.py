"""Attention methods for Hugging Face causal language models.

    from chunkattn.integrations.transformers import enable_dca, enable_select_merge
    enable_dca(model)  # reads past its trained length without training
    enable_select_merge(model)  # a token costs the same however long the sequence is; to be trained with

Only public interfaces of transformers and torch are used: attention and mask functions registered by name, and forward
hooks on the decoder and on its rotary embedding.
"""

try:
    import transformers as _transformers
    from transformers import AttentionInterface as _introduced_with_version_5
except ImportError as error:
    raise ImportError(
        "chunkattn.integrations.transformers needs transformers 5 or later: pip install 'transformers>=5'"
    ) from error

from chunkattn.integrations.transformers.dca import ATTN_IMPLEMENTATION, LengthTemperature, disable_dca, enable_dca
from chunkattn.integrations.transformers.select_merge import (
    SELECT_MERGE_IMPLEMENTATION,
    crd_ntk,
    disable_select_merge,
    enable_select_merge,
)

__all__ = [
    "ATTN_IMPLEMENTATION",
    "SELECT_MERGE_IMPLEMENTATION",
    "LengthTemperature",
    "crd_ntk",
    "disable_dca",
    "disable_select_merge",
    "enable_dca",
    "enable_select_merge",
]
