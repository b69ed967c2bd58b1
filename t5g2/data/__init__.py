"""Batches from text: sources, tokenizers, virtual streams, packing. NumPy and grain; jax only in the last step."""
