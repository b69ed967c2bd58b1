"""Origin of the weights of a run: a decoder-only model that is adapted, a model as it is, another run, or none."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from t5g2.adapt.options import AdaptOptions
from t5g2.checkpoint import hub, source_folder
from t5g2.core import paths
from t5g2.core.errors import UserError


@dataclass(frozen=True)
class Adapt:
    """Weights of a decoder-only model, adapted to an encoder-decoder one.

    Attributes:
      source: folder of the decoder-only model, in any format that `t5g2 import` reads, or its GGUF file; or two of
        them separated by a comma, the encoder's first. A comma in the name of one that exists is part of it. Each may
        be a model of the hub, hf://OWNER/NAME[@REVISION].
      vision: folder or address of an image tower, if it is not the source's own.
      choices: options that the architectures leave open.
    """

    source: str
    vision: str | None = None
    choices: AdaptOptions = AdaptOptions()

    def __post_init__(self):
        if len(self.sources) > 2 or not all(self.sources):
            raise UserError(f"source = {self.source!r}; give one folder, or two separated by a comma: ENCODER,DECODER")

    @property
    def sources(self) -> list[str]:
        """One folder for encoder and decoder, or one for each."""
        return paths.split(self.source)

    @property
    def folders(self) -> list[str]:
        """All folders that are read."""
        return self.sources + ([] if self.vision is None else [self.vision])


@dataclass(frozen=True)
class Init:
    """Origin of the weights: at most one; none = new weights. A checkpoint in the workdir comes before all of them.

    Attributes:
      resume: workdir of another run, whose whole state (weights, optimizer, data positions, step) is taken over; no
        model and no address.
      adapt: a decoder-only model, adapted.
      params: a model of this experiment's architecture: a model folder, a Hugging Face folder, an official Flax one, a
        GGUF file, or the address of one of them at the hub.
    """

    resume: str | None = None
    adapt: Adapt | None = None
    params: str | None = None

    def __post_init__(self):
        origins = [name for name in ("resume", "adapt", "params") if getattr(self, name) is not None]
        if len(origins) > 1:
            raise UserError(f"{' and '.join(origins)} are both set; weights have one origin, so keep one of them")
        # before anything is made of the other settings, such as a tokenizer that comes with the weights
        resume = self.resume or ""
        if hub.is_address(resume) or resume.lower().endswith(".gguf"):
            what = "an address of the hub" if hub.is_address(resume) else "a GGUF file"
            raise UserError(
                f"resume = {resume!r} is {what}, and a run goes on from a workdir with its checkpoints; give the "
                f"workdir's folder, or begin with the weights alone: init.params"
            )


# the settings that name folders of models, as keys of an experiment
MODELS = (("init", "params"), ("init", "adapt", "source"), ("init", "adapt", "vision"), ("distill", "teacher"))


def pinned(node: Mapping[str, Any]) -> dict[str, Any]:
    """Returns an experiment's plain data in which each address of the hub names a commit.

    A run so records which weights it began with, and takes the same when it is resumed from what it recorded.

    Raises:
      UserError, MachineError: as hub.pinned.
    """
    for keys in MODELS:
        node = _pinned_at(node, keys)
    return dict(node)


def _pinned_at(node: Any, keys: tuple[str, ...]) -> Any:
    if not keys:
        return source_folder.pinned(node) if isinstance(node, str) else node
    if not isinstance(node, Mapping) or keys[0] not in node:
        return node
    return {**node, keys[0]: _pinned_at(node[keys[0]], keys[1:])}
