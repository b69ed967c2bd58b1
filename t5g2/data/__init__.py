"""Text in, batches out: sources, tokenizers, virtual streams, packing. NumPy and grain; no jax but in the last step."""
