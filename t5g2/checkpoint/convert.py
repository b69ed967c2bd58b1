"""Import and export: folders of other formats as model folders, and back, one tensor in memory at a time.

In: Hugging Face (config.json and safetensors) and the official Flax trees of google-deepmind/gemma. Out: Hugging Face.
Which tensor holds which leaf is in names.py, which config is which in hf_config.py and hf_architecture.py. Nothing is
computed on the way, so import, export and import again give the same bits.
"""

import hashlib
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from t5g2.checkpoint import flax_tree, hf_config_reader, hf_config_writer, names, safetensors_io
from t5g2.checkpoint import folder as folders
from t5g2.checkpoint.folder import ModelFolder
from t5g2.checkpoint.safetensors_io import Tensor
from t5g2.core import files, settings, tree
from t5g2.core.errors import UserError
from t5g2.core.tree import Leaf, LeafKey
from t5g2.models import build, sizes
from t5g2.models.config import (
    DualEncoderConfig,
    EncoderDecoderConfig,
    ModelConfig,
    TextConfig,
    VisionConfig,
    from_dict,
)
from t5g2.models.siglip import VisionTower

CONFIG = "config.json"
GENERATION = "generation_config.json"
WORKDIR = "experiment.json"
ConfigChoice = ModelConfig | str | PathLike | None


# ---- in ----
def open_any(directory: str | PathLike) -> ModelFolder:
    """Opens a model folder, a Hugging Face folder or an official Flax one; no weight is read yet.

    Raises:
      UserError: it is none of them, or as open_model and open_foreign.
    """
    path = Path(directory).absolute()
    return folders.open_model(path) if (path / folders.MODEL).is_file() else open_foreign(path)


def open_foreign(directory: str | PathLike, config: ConfigChoice = None) -> ModelFolder:
    """Opens a Hugging Face or an official Flax folder as if it were a model folder; no weight is read yet.

    Copies of tied weights, where they are stored, are read and compared.

    Args:
      directory: with config.json and safetensors, or an Orbax checkpoint.
      config: the architecture, a size's name or a file like model.json. None = what config.json says, or the released
        size that the shapes of a Flax tree are those of.

    Raises:
      UserError: it is neither; a file is missing or damaged; the architecture is not supported or cannot be found out;
        tensors are missing, surplus or have other shapes; copies of tied weights differ.
    """
    path = Path(directory).absolute()
    if path.is_file():
        raise UserError(f"{path} is a file; give the folder that it is in")
    if not path.is_dir():
        raise UserError(f"{path} does not exist; give a Hugging Face folder, an official Flax one or a model folder")
    if (path / WORKDIR).is_file():
        raise UserError(f"{path} is the workdir of a run: it has an {WORKDIR}. Its model folder is {path / 'model'}")
    given = _given(config)
    if (path / CONFIG).is_file() or any(path.glob("*.safetensors")):
        layout, config, said = _hugging_face(path, given)
        found = safetensors_io.read(path)
    elif flax_tree.is_flax(path):
        found = flax_tree.read(path)
        layout = names.FLAX_T5GEMMA if any(name.startswith("decoder/") for name in found) else names.FLAX_GEMMA
        config = given or _released(path, layout, {name: tensor.shape for name, tensor in found.items()})
        said = "its size" if given is None else "the given config"
    elif any(next(path.glob(pattern), None) for pattern in safetensors_io.PICKLES):
        raise safetensors_io.no_weights(path)
    else:
        raise UserError(
            f"{path} holds no model that is known: neither {CONFIG} and safetensors (Hugging Face), nor an Orbax "
            f"checkpoint (official Flax), nor {folders.MODEL} (a model folder)"
        )
    abstract = tree.leaves(build.abstract(config))
    tensors, notes = _normalised(path, layout, found)
    notes += _passed_over(path, given)
    tied = names.match_tensors(layout, abstract, {name: tensor.shape for name, tensor in tensors.items()})
    notes += _account(f"{path}, by {said}", layout, config, tied, tensors)
    provenance = {
        "kind": "import",
        "source": str(path),
        "layout": layout.title,
        "tensors": len(tied),
        "parameters": sum(math.prod(leaf.shape) for leaf in abstract.values()),
        "notes": notes,
    }
    return ModelFolder(
        path, config, _tokenizer(path), provenance, _leaves(tied, tensors, abstract), folders.extra_files(path)
    )


@dataclass(frozen=True, eq=False)
class TowerFolder:
    """A folder that was opened for its image tower.

    Attributes:
      config: of the tower, as it lies there; `pool` says whether it has the pooling head.
      leaves: everything in the folder, the tower's under "vision.", read when asked for.
    """

    path: Path
    config: VisionConfig
    leaves: Mapping[LeafKey, Leaf] = field(repr=False)


def open_tower(directory: str | PathLike) -> TowerFolder:
    """Opens any folder that has an image tower; no weight is read yet.

    Args:
      directory: as in open_any: Gemma 3 with images, MedGemma, T5Gemma 2 with images, SigLIP, MedSigLIP; or the tower
        alone, as transformers saves it (model_type siglip_vision_model).

    Raises:
      UserError: it has no image tower; as open_any.
    """
    path = Path(directory).absolute()
    if (path / CONFIG).is_file() and not (path / folders.MODEL).is_file():
        data = _json(path / CONFIG)
        if data.get("model_type") == "siglip_vision_model":
            return _tower_alone(path, data)
    opened = open_any(path)
    config = opened.config
    if isinstance(config, DualEncoderConfig):
        return TowerFolder(path, config.vision, opened.leaves)
    images = (config.encoder if isinstance(config, EncoderDecoderConfig) else config).images
    if images is None:
        raise UserError(
            f"{path} is a language model without an image tower; give the folder of one that has it: Gemma 3 with "
            f"images (4b and larger), MedGemma, T5Gemma 2 with images, SigLIP, MedSigLIP, or a tower alone, as "
            f"transformers saves it (siglip_vision_model)"
        )
    return TowerFolder(path, images.vision, opened.leaves)


def _tower_alone(path: Path, data: Mapping[str, Any]) -> TowerFolder:
    try:
        config = hf_config_reader.read_tower(data)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    abstract = tree.leaves({"vision": jax.eval_shape(lambda: VisionTower(config, key=jax.random.key(0)))})
    layout = names.HF_SIGLIP_VISION
    tensors, _ = _normalised(path, layout, safetensors_io.read(path))
    tied = names.match_tensors(layout, abstract, {name: tensor.shape for name, tensor in tensors.items()})
    _account(f"{path}, by {CONFIG}", layout, None, tied, tensors)
    return TowerFolder(path, config, _leaves(tied, tensors, abstract))


def import_model(
    source: str | PathLike,
    out: str | PathLike,
    *,
    config: ConfigChoice = None,
    dtype: Any = None,
    image_size: int | None = None,
) -> ModelFolder:
    """Writes a Hugging Face or an official Flax folder as a model folder, and opens that.

    Args:
      source, config: as in open_foreign.
      out: where the model folder goes; it does not exist.
      dtype: what the weights are cast to: "float32", "bfloat16", "float16"; None = each as it is stored.
      image_size: in pixels, of the images that it is to read, if not what it was trained with; its tower's position
        embeddings are resampled.

    Raises:
      UserError: as open_foreign; `out` exists; an unknown dtype, an image size that does not fit.
    """
    dtype = folders.weight_dtype(dtype)
    files.refuse_existing(out)
    if (Path(source) / folders.MODEL).is_file():
        raise UserError(f"{source} is a model folder already: it has a {folders.MODEL}. Use it as it is, or copy it")
    opened = open_foreign(source, config)
    if image_size is not None:
        opened = folders.with_image_size(opened, image_size)
    tensors = {tree.name(key): _cast(_tensor(leaf), dtype) for key, leaf in opened.leaves.items()}
    notes = {
        folders.MODEL: folders.to_dict(opened.config),
        folders.TOKENIZER: opened.tokenizer,
        folders.PROVENANCE: opened.provenance,
    }
    folders.write_folder(Path(out).absolute(), tensors, notes, extra_files=opened.extra_files)
    return folders.open_model(out)


def _given(config: ConfigChoice) -> ModelConfig | None:
    if config is None or isinstance(config, TextConfig | EncoderDecoderConfig | DualEncoderConfig):
        return config
    path = Path(config)
    if path.suffix != ".json":
        return sizes.size(str(config))
    if not path.is_file():
        raise UserError(f"{path} does not exist; give a size's name, such as gemma3:1b, or a file like model.json")
    return from_dict(_json(path), where=str(path))


def _hugging_face(path: Path, given: ModelConfig | None) -> tuple[names.TensorFormat, ModelConfig, str]:
    """The layout, the config and who says so."""
    if given is not None:
        return hf_config_writer.write(given, dtype="float32")[0], given, "the given config"
    if not (path / CONFIG).is_file():
        raise UserError(
            f"{path} has safetensors but no {CONFIG}, so its architecture is unknown; put the {CONFIG} beside them, or "
            f"say which it is: config = a size's name, such as gemma3:1b, or a file like model.json"
        )
    try:
        layout, config = hf_config_reader.read(_json(path / CONFIG))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return layout, config, CONFIG


def _passed_over(path: Path, given: ModelConfig | None) -> list[str]:
    """What the folder's config.json says that the architecture does not."""
    if not (path / CONFIG).is_file():
        return []
    data = _json(path / CONFIG)
    notes = hf_config_reader.dropout_notes(data)
    if given is None:
        return notes
    try:
        _, said = hf_config_reader.read(data)
    except UserError as error:
        return [*notes, f"{CONFIG} was not used: {error}"]
    lines = tree.difference(settings.flatten(folders.to_dict(said)), settings.flatten(folders.to_dict(given)))
    return [*notes, *(f"the given config overrules {CONFIG}: {line}" for line in lines.splitlines())]


def _normalised(
    path: Path, layout: names.TensorFormat, found: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors under the table's names, and what was renamed."""
    spelled: dict[str, str] = {}
    for name in found:
        known = layout.canonical_name(name)
        if known in spelled:
            raise UserError(
                f"{path} holds {spelled[known]} and {name}, which are two names of one tensor; remove one of them"
            )
        spelled[known] = name
    renamed = sum(known != name for known, name in spelled.items())
    notes = [f"{renamed} tensors stood under other names that are in use for them"] if renamed else []
    return {known: found[name] for known, name in spelled.items()}, notes


def _account(
    where: str,
    layout: names.TensorFormat,
    config: ModelConfig | None,
    tied: list[names.TensorMatch],
    tensors: Mapping[str, Tensor],
) -> list[str]:
    """Raises UserError unless every tensor is needed and every needed one is there; returns what was passed over."""
    wanted = {one.name: list(one.shape) for one in tied}
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    notes = []
    for copy, original in layout.copies.items():
        if copy in tensors and copy not in wanted and original in tensors:
            _compare(where, copy, original, tensors)
            notes.append(f"{copy} repeats {original}")
            del shapes[copy]
    for name, shape in _placeholders(layout, config).items():
        if shapes.get(name) == list(shape) and name not in wanted:
            notes.append(f"{name} is a placeholder")
            del shapes[name]
    if wanted != shapes:
        raise UserError(
            f"the tensors in {where}, are not those of {layout.title} (needed -> found):\n"
            f"{tree.difference(wanted, shapes)}{_hints(layout, wanted, shapes)}"
        )
    for one in tied:
        rows, kept = one.shape[0] if one.shape else 0, one.shapes[0][0] if one.shapes[0] else 0
        if one.axes.rows and rows != kept:
            notes.append(f"{one.name} has {rows} rows, of which the first {kept} are the vocabulary; the rest was cut")
    return notes


def _hints(layout: names.TensorFormat, wanted: Mapping[str, list[int]], found: Mapping[str, list[int]]) -> str:
    """What field of the config a difference points at."""
    hints = ""
    for name, shape in wanted.items():
        table = name.endswith(("embed_tokens.weight", "input_embedding", "token_embedding.weight"))
        if table and found.get(name, shape) != shape:
            hints += f"\nvocab_size = {shape[0]} and hidden_size = {shape[1]} contradict {name}, {found[name]}"
    for copy in layout.copies:
        if copy in wanted and copy not in found:
            hints += f"\ntie_word_embeddings = false needs {copy}; if the weights are tied, say true"
    return hints


def _compare(where: str, copy: str, original: str, tensors: Mapping[str, Tensor]) -> None:
    """Raises UserError if a copy of tied weights is not one, bit for bit; one of them is in memory at a time."""
    hashes = []
    for name in (copy, original):
        tensor = tensors[name]
        data = np.ascontiguousarray(tensor.read()).reshape(-1).view(np.uint8)
        hashes.append((tensor.shape, str(tensor.dtype), hashlib.sha256(data.data).hexdigest()))
        del data
    if hashes[0] != hashes[1]:
        raise UserError(
            f"{copy} and {original} in {where}, differ, but they are one tied weight; if they are meant to differ, say "
            f"tie_word_embeddings = false in {CONFIG} (with every weight that this unties); otherwise remove {copy}"
        )


def _leaves(
    tied: list[names.TensorMatch], tensors: Mapping[str, Tensor], abstract: Mapping[LeafKey, Leaf]
) -> dict[LeafKey, Leaf]:
    """The leaves that the tensors hold, in the tensors' order."""
    last = _Last()
    leaves = {}
    for one in tied:
        tensor = tensors[one.name]
        for index, key in enumerate(one.keys):
            read = _reader(one, index, tensor.read if len(one.keys) == 1 else last.of(one.name, tensor.read))
            leaves[key] = replace(abstract[key], dtype=tensor.dtype, read=read)
    return leaves


def _reader(one: names.TensorMatch, index: int, read: Callable[[], np.ndarray]) -> Callable[[], np.ndarray]:
    return lambda: one.axes.to_leaf(read(), one.shapes, index)


class _Last:
    """Keeps the tensor that was read last, of those that hold several leaves: they are mostly read in turn."""

    def __init__(self):
        self.name, self.array = "", np.empty(0)

    def of(self, name: str, read: Callable[[], np.ndarray]) -> Callable[[], np.ndarray]:
        """`read`, of which the last answer is kept."""

        def kept() -> np.ndarray:
            if self.name != name:
                self.array = np.empty(0)  # gone before the next one comes
                self.name, self.array = name, read()
            return self.array

        return kept


def _released(path: Path, layout: names.TensorFormat, found: Mapping[str, names.Shape]) -> ModelConfig:
    """The released size whose tensors have these names and shapes.

    Raises:
      UserError: there is none, or there are several.
    """
    fitting: dict[str, ModelConfig] = {}
    for name, config in _variants(layout, found):
        leaves = tree.leaves(build.abstract(config))
        tied = names.match_tensors(layout, leaves, found)
        if {one.name: one.shape for one in tied} == found and config not in fitting.values():
            fitting[name] = config
    if len(fitting) == 1:
        return next(iter(fitting.values()))
    tables = ", ".join(f"{name} {list(shape)}" for name, shape in sorted(found.items()) if "input_embedding" in name)
    layers = len({match for name in found for match in re.findall(r"(?:\w+coder/)?layer_\d+/", name)})
    what = f"could be any of {', '.join(fitting)}" if fitting else "is none of the released sizes"
    raise UserError(
        f"{path} ({layout.title}: {tables or 'no embedding'}; {layers} layers) {what}; say which architecture it has: "
        f"config = a size's name, such as gemma3:1b, or a file like model.json"
    )


def _variants(layout: names.TensorFormat, found: Mapping[str, names.Shape]) -> Iterator[tuple[str, ModelConfig]]:
    """Released sizes as a Flax tree would hold them: of its width and depth, with images if it has them."""
    images = any(name.startswith("vision_encoder/") for name in found)
    for name, config in sizes.SIZES.items():
        if isinstance(config, TextConfig) and layout is names.FLAX_GEMMA:
            # the rows after 262144 were added in transformers, for the image token
            rows = min(config.vocab_size, 262_144)
            variant = replace(config, vocab_size=rows, images=config.images if images else None)
            tables, layer = {"embedder/input_embedding": variant.width}, f"layer_{variant.layers - 1}/"
        elif isinstance(config, EncoderDecoderConfig) and config.cross == "separate" and layout is names.FLAX_T5GEMMA:
            variant = config
            tables = {
                f"{side}/embedder/input_embedding": getattr(config, side).width for side in ("encoder", "decoder")
            }
            layer = f"decoder/layer_{config.decoder.layers - 1}/"
        else:
            continue
        widths = {table: found[table][1] for table in tables if table in found}
        if widths == tables and any(name.startswith(layer) for name in found):
            yield name, variant


# ---- out ----
def export_model(
    model_dir: str | PathLike, out: str | PathLike, *, dtype: Any = None, shard_bytes: int = 5 * 10**9
) -> list[str]:
    """Writes a model as a Hugging Face folder that transformers loads: config.json, safetensors, the carried files.

    Returns what transformers computes otherwise, if anything.

    Args:
      model_dir: a model folder; what open_foreign opens serves as well.
      out: where the folder goes; it does not exist.
      dtype: what the weights are cast to; None = each as it is stored.
      shard_bytes: where the next file of weights begins.

    Raises:
      UserError: `out` exists; transformers has no architecture for this model; an unknown dtype; as open_any.
    """
    dtype = folders.weight_dtype(dtype)
    files.refuse_existing(out)
    opened = open_any(model_dir)
    special_tokens, generation = _generation(opened)
    stored = {str(_cast(_tensor(leaf), dtype).dtype) for leaf in opened.leaves.values()}
    # transformers casts all weights to one dtype when it loads them; float32 holds every other
    one_dtype = stored.pop() if len(stored) == 1 else "float32"
    layout, data = hf_config_writer.write(opened.config, dtype=one_dtype, special_tokens=special_tokens)
    tensors = {}
    for one in names.match_tensors(layout, opened.leaves):
        tensors[one.name] = _cast(_joined(one, opened.leaves), dtype)
    for name, shape in _placeholders(layout, opened.config).items():
        if name not in tensors:
            tensors[name] = Tensor(shape, np.dtype(one_dtype), _zeros(shape, one_dtype))
    folders.write_folder(
        Path(out).absolute(),
        tensors,
        {CONFIG: data, GENERATION: generation},
        extra_files=opened.extra_files,
        shard_bytes=shard_bytes,
        single=safetensors_io.SINGLE,
        metadata={"format": "pt"},
    )
    return hf_config_writer.deviations(opened.config)


def _generation(opened: ModelFolder) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Ids of the special tokens, and the generation_config.json to write: None if one is carried, or has no use."""
    special_tokens = dict(hf_config_writer.SPECIAL_TOKEN_IDS)
    file = next((file for file in opened.extra_files if file.name == GENERATION), None)
    if file is not None:
        said = _json(file)
        return special_tokens | {name: said[name] for name in special_tokens if said.get(name) is not None}, None
    return special_tokens, None if isinstance(opened.config, DualEncoderConfig) else special_tokens


def _placeholders(layout: names.TensorFormat, config: ModelConfig | None) -> dict[str, names.Shape]:
    """Tensors that transformers' class has, and the model, being without images or an end-of-image token, has not."""
    if layout is not names.HF_T5GEMMA2 or not isinstance(config, EncoderDecoderConfig):
        return {}
    width = config.encoder.width
    tower = hf_config_writer.empty_tower(width) if config.encoder.images is None else {}
    sides = ("encoder",) if config.tied_embedding else ("encoder", "decoder")
    eoi = {f"model.{side}.embed_tokens.eoi_embedding": (width,) for side in sides} if config.eoi_id is None else {}
    return tower | eoi


def _joined(one: names.TensorMatch, leaves: Mapping[LeafKey, Leaf]) -> Tensor:
    parts = [leaves[key] for key in one.keys]
    return Tensor(one.shape, np.dtype(parts[0].dtype), lambda: one.axes.to_tensor([part.read() for part in parts]))


def _zeros(shape: names.Shape, dtype: str) -> Callable[[], np.ndarray]:
    return lambda: np.zeros(shape, jnp.dtype(dtype))


def _tensor(leaf: Leaf) -> Tensor:
    return Tensor(leaf.shape, np.dtype(leaf.dtype), leaf.read)


def _cast(tensor: Tensor, dtype: Any) -> Tensor:
    if dtype is None or tensor.dtype == jnp.dtype(dtype):
        return tensor
    return Tensor(tensor.shape, jnp.dtype(dtype), lambda: tensor.read().astype(jnp.dtype(dtype)))


def _tokenizer(path: Path) -> dict[str, Any] | None:
    """What data/tokenizers/registry.py makes a tokenizer of; its file lies beside."""
    for kind, name in (("huggingface", "tokenizer.json"), ("sentencepiece", "tokenizer.model")):
        if (path / name).is_file():
            with (path / name).open("rb") as file:
                return {"kind": kind, "file": name, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
    return None


def _json(path: Path) -> dict[str, Any]:
    try:
        data = safetensors_io.parse_json(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); download it again") from None
    if not isinstance(data, dict):
        raise UserError(f"{path} holds {type(data).__name__}, not an object; download it again")
    return data
