"""SigLIP models of odd shapes that are compared with transformers, with weights and inputs that any NumPy makes alike.

NumPy draws everything: the golden file is checked where neither torch nor transformers is installed.
"""

import functools
import zlib
from dataclasses import replace

import jax
import numpy as np

from t5g2.core import tree
from t5g2.models.config import DualEncoderConfig, ImageConfig, VisionConfig
from t5g2.models.siglip import Projector, Siglip, VisionTower
from tests.tiny import SIGLIP, VISION

ODD = VisionConfig(width=15, layers=3, mlp_width=7, heads=3, image_size=21, patch_size=3)
TOWERS = {
    "tiny": VISION,
    "pooled": replace(VISION, pool=True),
    "one patch": replace(VISION, image_size=4, pool=True),
    "one head": replace(VISION, heads=1, mlp_width=1),
    "odd": ODD,
    "odd, pooled": replace(ODD, pool=True, norm_eps=1e-2),
    "heads of two": replace(VISION, width=24, heads=12, layers=1, norm_eps=1e-3),
    "deep": replace(VISION, layers=6, image_size=14, patch_size=7, pool=True),
    "patches of one pixel": replace(VISION, image_size=5, patch_size=1),
    # 576 patches, in two tiles of 288 queries
    "several tiles": replace(VISION, layers=2, image_size=48, patch_size=2, pool=True),
}
TEXT = SIGLIP.text


def dual(vision: VisionConfig = SIGLIP.vision, **text) -> DualEncoderConfig:
    """A dual encoder; its texts are projected to the images' width."""
    return DualEncoderConfig(vision, replace(TEXT, projection=vision.width, **text))


DUALS = {
    "tiny": SIGLIP,
    "one token": dual(length=1),
    "one head": dual(heads=1, layers=1),
    "long": dual(length=33, vocab_size=11),
    "odd": dual(TOWERS["odd, pooled"], width=27, heads=9, mlp_width=5, norm_eps=1e-2),
    "deep text": dual(TOWERS["one patch"], layers=5),
    "deep images": dual(TOWERS["deep"], layers=1, width=8, heads=2),
    "wide text": dual(replace(VISION, width=6, heads=2, pool=True), width=48, heads=3),
}


def images_config(side: int, tokens: int, **vision) -> ImageConfig:
    """Of a tower with side x side patches."""
    tower = replace(VISION, **({"image_size": 4 * side} | vision))
    return ImageConfig(tower, token=8, begin=6, end=7, tokens=tokens)


# by patches along a side and tokens; and the width of the language model
PROJECTORS = {
    "4 to 4": (images_config(4, 4), 32),
    "4 to 16": (images_config(4, 16), 5),
    "4 to 1": (images_config(4, 1), 16),
    "6 to 4": (images_config(6, 4, width=9, heads=1), 17),
    "6 to 9": (images_config(6, 9, norm_eps=1e-2), 1),
    "7 to 1": (images_config(7, 1), 32),
    "9 to 9": (images_config(9, 9, width=2), 64),
    "64 to 256": (images_config(64, 256, width=6), 12),
}
GOLDEN = ("tiny", "pooled", "odd", "odd, pooled", "long", "deep text", "4 to 4", "6 to 9")


@functools.cache
def _shapes(kind, *settings):
    return jax.tree.flatten(jax.eval_shape(lambda: kind(*settings, key=jax.random.key(0))))


def filled(kind, *settings):
    """The module that kind(*settings, key=…) gives, with weights that all matter."""
    leaves, structure = _shapes(kind, *settings)
    abstract = jax.tree.unflatten(structure, leaves)
    shapes = {key: leaf.shape for key, leaf in tree.leaves(abstract).items()}
    return tree.build(abstract, lambda key: _draw(key, shapes[key]))


def tower(name: str) -> VisionTower:
    return filled(VisionTower, TOWERS[name])


def dual_encoder(name: str) -> Siglip:
    return filled(Siglip, DUALS[name])


def projector(name: str) -> Projector:
    config, width = PROJECTORS[name]
    return filled(Projector, config, width)


def images(config: VisionConfig) -> np.ndarray:
    """Three images; every value is one that bfloat16 holds."""
    draw = np.random.RandomState(3)
    return (draw.randint(-127, 128, (3, config.image_size, config.image_size, 3)) / 128).astype(np.float32)


def patches(config: ImageConfig) -> np.ndarray:
    """Outputs that a tower might give for three images."""
    draw = np.random.RandomState(4)
    return (draw.randint(-255, 256, (3, config.vision.patches, config.vision.width)) / 128).astype(np.float32)


def texts(config: DualEncoderConfig) -> np.ndarray:
    """Four texts; the second ends in padding, with the same token three times."""
    tokens = np.random.RandomState(5).randint(0, config.text.vocab_size, (4, config.text.length))
    tokens[1, -3:] = 1
    return tokens.astype(np.int32)


def checksum(model) -> int:
    """A number that is another one if any bit of the weights is."""
    return zlib.crc32(b"".join(leaf.read().tobytes() for leaf in tree.leaves(jax.device_get(model)).values()))


def _draw(key: tree.LeafKey, shape: tuple[int, ...]) -> np.ndarray:
    """Seeded by its own name; kernels keep the size of what goes through them."""
    path, _ = key
    draw = np.random.RandomState(zlib.crc32(tree.name(key).encode()))
    centre, spread = 0.0, 0.2
    if path.endswith("kernel"):
        inputs = {"patches.kernel": 3, "attention.o.kernel": 2}
        spread = np.prod(shape[: next((n for end, n in inputs.items() if path.endswith(end)), 1)]) ** -0.5
        if path.endswith(("q.kernel", "k.kernel")):
            spread *= 1.5  # attention that prefers some
    elif path.endswith(("table", "positions", "probe")):
        spread = 0.7
    elif path.endswith("scale") and path != "norm.scale":  # that of the projector is added to one
        centre = 1.0
    return (centre + spread * draw.standard_normal(shape)).astype(np.float32)
