"""Gemma 3 and T5Gemma 2 as Flax NNX modules, used as plain pytrees.

Read in this order: config (architectures), layers (norms, rotary embedding, MLP, embedding), masks (visibility),
attention and backends (several sources of keys under one softmax), stack (blocks, scanned by whole patterns), cache,
then the two models, gemma and t5gemma. `build.make` builds one from its config; `sizes` holds every released size.
"""
