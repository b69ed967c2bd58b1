"""t5g2: a decoder-only language model becomes an encoder-decoder one, and is trained.

The folders, each importing only from those to its right:

    cli, sweep, report -> train -> {eval, checkpoint, adapt} -> {models, objectives, data} -> core

    core        leaf paths, mesh, the batch contract, settings, logs
    models      Gemma and T5Gemma blocks, attention, the tiled loss, FLOPs, released sizes
    objectives  causal, PrefixLM, UL2: pure NumPy, (tokens, rng) -> Example
    data        tokenizer, sources, virtual streams, packing, the pipeline
    checkpoint  train states (Orbax), model folders (safetensors), averages
    adapt       the rules by which every weight of an encoder-decoder model comes from a decoder-only one
    eval        generation, metrics, tasks
    train       the experiment, the optimizer, the step, the loop

`import t5g2` loads none of them: `from t5g2.models import t5gemma` loads jax and flax, and so on.
"""

__version__ = "0.1.0"
