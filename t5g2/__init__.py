"""t5g2: turns a decoder-only language model into an encoder-decoder one, and trains it.

The folders, in rows; each imports only from rows below its own:

    cli
    commands
    jobs, sweep
    report
    train, api
    adapt, checkpoint, eval
    data, objectives, models
    core

    commands    one file per subcommand, named as it is typed: flags and run()
    jobs        the work behind subcommands: dry run, verification, teacher logits, evaluations, average of a run
    sweep       several runs as one: parts, order, launchers
    report      reads workdirs and the first batches of data: statistics, tables, plots, pages
    api         the Python API: `t5g2.load(DIR)` returns a model with `logits`, `encode`, `generate` and `save`
    train       the experiment, the optimizer, the step, the loop, the workdir
    eval        generation, log-likelihoods, metrics, tasks
    checkpoint  train states (Orbax), model folders (safetensors), import and export of foreign formats
    adapt       the rules by which every weight of an encoder-decoder model comes from a decoder-only one
    models      Gemma, T5Gemma and SigLIP blocks, attention, the loss head, FLOPs, released sizes
    objectives  causal, PrefixLM, UL2, fine-tuning: pure NumPy, (tokens, rng) -> Example
    data        tokenizers, sources, shards; chunks, packing, virtual streams, the pipeline
    core        the batch contract, leaf paths, sharding, settings, files, errors, logs

`import t5g2` loads none of them: the first use of `t5g2.load` loads jax and flax, and so on.
"""

from typing import TYPE_CHECKING, Any

from t5g2.core.errors import UserError

if TYPE_CHECKING:
    from t5g2.api.loading import load
    from t5g2.eval.generation import Greedy, Sampling, Temperature, TopK, TopP

__version__ = "0.1.0"
__all__ = ["Greedy", "Sampling", "Temperature", "TopK", "TopP", "UserError", "load"]

# a name's module is imported on first use, so that `import t5g2` stays fast
_MODULES = {"load": "t5g2.api.loading"} | dict.fromkeys(
    ("Greedy", "Sampling", "Temperature", "TopK", "TopP"), "t5g2.eval.generation"
)


def __getattr__(name: str) -> Any:
    """Imports a name of `__all__` on first use."""
    if name not in _MODULES:
        raise AttributeError(f"module 't5g2' has no attribute {name!r}; it has {', '.join(__all__)}")
    import importlib

    return getattr(importlib.import_module(_MODULES[name]), name)
