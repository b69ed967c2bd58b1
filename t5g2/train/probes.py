"""The probe of a run: its rules, and the weights of a new head beside those of a model folder."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from t5g2.checkpoint.folder import ModelFolder
from t5g2.core import tree
from t5g2.core.errors import UserError
from t5g2.data.config import DataConfig
from t5g2.data.sources.labelled_text import LabelledText
from t5g2.eval.probe_scores import ProbeScores
from t5g2.eval.task_interface import Task
from t5g2.models import build
from t5g2.models.config import DualEncoderConfig, LanguageModelConfig, ModelConfig
from t5g2.models.probe_head import is_of_probe


def check(model: LanguageModelConfig, data: DataConfig, tasks: Sequence[Task]) -> None:
    """Checks that labels come with a probe of the same classes, on a side that reads the texts.

    Raises:
      UserError: they do not; or a task asks for scores that the probe has not.
    """
    for task in tasks:
        if isinstance(task, ProbeScores):
            task.check(model.probe)
    if data.takes_labels != (model.probe is not None):
        found = "the data has labels, and the model no probe"
        if model.probe is not None:
            found = "model.probe is set, and the data has no labels"
        raise UserError(
            f"{found}; set model.probe, and the objective probe (probe_decoder for a decoder-only model) on texts of "
            f"the kind labelled, or leave both out"
        )
    if model.probe is None:
        return
    for source, name in zip(data.sources, data.names, strict=True):
        if (source.objective.lengths(data.chunk_tokens)[0] > 0) != model.is_encoder_decoder:
            objective = "probe" if model.is_encoder_decoder else "probe_decoder"
            kind = "encoder-decoder" if model.is_encoder_decoder else "decoder-only"
            raise UserError(f"source {name!r}: the model is {kind}, so its objective is {objective}")
        if isinstance(source.text, LabelledText) and source.text.classes != model.probe.classes:
            raise UserError(
                f"source {name!r} has the classes {list(source.text.classes)}, and model.probe "
                f"{list(model.probe.classes)}; give both the same, in the same order"
            )


def lacks_probe(folder: ModelFolder, config: ModelConfig) -> bool:
    """True if a folder has the architecture `config`, but for the probe, of which it has another one or none."""
    if isinstance(folder.config, DualEncoderConfig) or isinstance(config, DualEncoderConfig):
        return False
    bodies = [replace(architecture, probe=None) for architecture in (folder.config, config)]
    return config.probe not in (None, folder.config.probe) and bodies[0] == bodies[1]


def with_new_probe(folder: ModelFolder, config: ModelConfig, *, seed: int) -> ModelFolder:
    """Returns a folder of the architecture `config`, but for its probe, with the weights of a new one.

    Args:
      seed: seed of the new weights.
    """
    dtype = next(iter(folder.leaves.values())).dtype
    leaves = tree.leaves(build.abstract(config, dtype))
    new = {key: replace(leaf, read=partial(leaf.new, seed)) for key, leaf in leaves.items() if is_of_probe(key[0])}
    body = {key: leaf for key, leaf in folder.leaves.items() if not is_of_probe(key[0])}
    return replace(folder, config=config, leaves=body | new)
