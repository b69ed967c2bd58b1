"""t5g2: a decoder-only language model becomes an encoder-decoder one, and is trained.

The folders, each importing only from those to its right:

    cli, sweep, report -> train -> {eval, checkpoint, adapt} -> {models, objectives, data} -> core

    core        leaf paths, mesh, the batch contract, settings, logs
    models      Gemma and T5Gemma blocks, attention, the tiled loss, FLOPs, released sizes
    objectives  causal, PrefixLM, UL2: pure NumPy, (tokens, rng) -> Example
    data        tokenizers, images, sources, virtual streams, packing, the pipeline
    checkpoint  train states (Orbax), model folders (safetensors), averages
    adapt       the rules by which every weight of an encoder-decoder model comes from a decoder-only one
    eval        generation, metrics, tasks
    train       the experiment, the optimizer, the step, the loop

and api, the Python API: `t5g2.load(DIR)` returns a model with `logits`, `encode`, `generate` and `save` (api/inputs.py
checks its inputs); commands/verify.py compares a model with transformers.

`import t5g2` loads none of them: the first use of `t5g2.load` loads jax and flax, and so on.
"""

from typing import TYPE_CHECKING, Any

from t5g2.core.errors import UserError

if TYPE_CHECKING:
    from t5g2.api import load
    from t5g2.eval.generation import Greedy, Temperature, TopK, TopP

__version__ = "0.1.0"
__all__ = ["Greedy", "Temperature", "TopK", "TopP", "UserError", "load"]

_WHERE = {"load": "t5g2.api"} | dict.fromkeys(("Greedy", "Temperature", "TopK", "TopP"), "t5g2.eval.generation")


def __getattr__(name: str) -> Any:
    """What `__all__` names, imported when it is first asked for."""
    if name not in _WHERE:
        raise AttributeError(f"module 't5g2' has no attribute {name!r}; it has {', '.join(__all__)}")
    import importlib

    return getattr(importlib.import_module(_WHERE[name]), name)
