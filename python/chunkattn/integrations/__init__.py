"""Dual Chunk Attention inside other libraries. Import the one you use: chunkattn.integrations.transformers."""
