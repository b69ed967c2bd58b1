"""Origin of the weights of a run: a decoder-only model that is adapted, a model folder, another run, or none."""

from dataclasses import dataclass

from t5g2.adapt.options import AdaptOptions
from t5g2.core import paths
from t5g2.core.errors import UserError


@dataclass(frozen=True)
class Adapt:
    """Weights of a decoder-only model, adapted to an encoder-decoder one.

    Attributes:
      source: folder of the decoder-only model, in any format that `t5g2 import` reads; or two
        folders separated by a comma, the encoder's first. A comma in the name of one that exists is part of it.
      vision: folder of an image tower, if it is not the source's own.
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
      resume: workdir of another run, whose whole state (weights, optimizer, data positions, step) is taken over.
      adapt: a decoder-only model, adapted.
      params: a model folder of this experiment's architecture.
    """

    resume: str | None = None
    adapt: Adapt | None = None
    params: str | None = None

    def __post_init__(self):
        origins = [name for name in ("resume", "adapt", "params") if getattr(self, name) is not None]
        if len(origins) > 1:
            raise UserError(f"{' and '.join(origins)} are both set; weights have one origin, so keep one of them")
