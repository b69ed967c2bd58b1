"""Every stored tensor is needed and every needed one is stored; copies of tied weights are compared."""

import dataclasses

import numpy as np
import pytest

from t5g2.checkpoint.import_folder import open_foreign
from t5g2.core.errors import UserError
from t5g2.models.config import text_only
from tests import tiny
from tests.checkpoint.foreign_folders import FAMILIES, bits, reconfigure, rewrite, stored

RESPELLED = {
    "gemma3 with images": [
        lambda n: n.replace("vision_model.", ""),
        lambda n: n.replace("language_model.model.", "model.language_model."),
        lambda n: n.replace("language_model.model.", "language_model."),  # Gemma3Model
        lambda n: f"model.{n}" if n.startswith(("vision_tower", "multi_modal")) else n,
    ],
    "t5gemma2 with images": [
        lambda n: n.replace("vision_model.", ""),
        lambda n: n.replace("encoder.layers", "encoder.text_model.layers") if "vision" not in n else n,
        lambda n: n.replace("encoder.embed", "encoder.text_model.embed"),
        lambda n: n.removeprefix("model."),
    ],
    "t5gemma": [lambda n: n.removeprefix("model.")],
    "gemma3": [lambda n: n.removeprefix("model.")],  # Gemma3TextModel
}


@pytest.mark.parametrize("family", RESPELLED)
def test_names_that_are_in_use_are_all_read(tmp_path, hugging_face, family):
    hf_folder = hugging_face(FAMILIES[family])
    plain, tensors = bits(open_foreign(hf_folder)), stored(hf_folder)
    for respell in RESPELLED[family]:
        renamed = {respell(name): array for name, array in tensors.items()}
        changed = len(renamed.keys() - tensors.keys())
        assert changed
        rewrite(hf_folder, renamed)
        opened = open_foreign(hf_folder)
        assert bits(opened) == plain
        assert opened.provenance["notes"] == [f"{changed} tensors are stored under aliases of their names"]


def test_two_names_of_one_tensor(hugging_face):
    hf_folder = hugging_face(tiny.T5GEMMA2)
    tensors = stored(hf_folder)
    rewrite(hf_folder, tensors | {"decoder.norm.weight": tensors["model.decoder.norm.weight"]})
    with pytest.raises(
        UserError, match=r"norm.weight and .*norm.weight, which are two names of one tensor; remove one"
    ):
        open_foreign(hf_folder)


COPIES = {
    "gemma3": {"lm_head.weight": "model.embed_tokens.weight"},
    "gemma3 with images": {"lm_head.weight": "language_model.model.embed_tokens.weight"},
    "t5gemma": {"lm_head.out_proj.weight": "model.decoder.embed_tokens.weight"},
    "t5gemma2": {
        "lm_head.out_proj.weight": "model.encoder.embed_tokens.weight",
        "model.decoder.embed_tokens.weight": "model.encoder.embed_tokens.weight",
        "model.decoder.embed_tokens.eoi_embedding": "model.encoder.embed_tokens.eoi_embedding",
    },
}


@pytest.mark.parametrize("family", COPIES)
def test_copies_of_tied_weights(hugging_face, family):
    hf_folder = hugging_face(FAMILIES[family])
    tensors, plain = stored(hf_folder), bits(open_foreign(hf_folder))
    assert not tensors.keys() & COPIES[family].keys()
    copies = {copy: tensors[original] for copy, original in COPIES[family].items()}
    rewrite(hf_folder, tensors | copies)
    opened = open_foreign(hf_folder)
    assert bits(opened) == plain
    assert [f"{copy} repeats {original}" for copy, original in COPIES[family].items()] == [
        note for note in opened.provenance["notes"] if "repeats" in note
    ]
    for copy, original in COPIES[family].items():
        other = copies[copy].copy()
        other.reshape(-1)[-1] *= -1
        rewrite(hf_folder, tensors | {copy: other})
        with pytest.raises(UserError, match=rf"{copy} and {original} in .* differ, but they are one tied weight; if"):
            open_foreign(hf_folder)
        rewrite(hf_folder, tensors | {copy: other[..., :-1]})
        with pytest.raises(UserError, match="differ, but they are one tied weight"):
            open_foreign(hf_folder)


@pytest.mark.parametrize("family", COPIES)
def test_a_tied_weight_that_is_stored_as_its_copy_alone(hugging_face, family):
    hf_folder = hugging_face(FAMILIES[family])
    tensors, plain = stored(hf_folder), bits(open_foreign(hf_folder))
    copy, original = next(iter(COPIES[family].items()))
    tensors[copy] = tensors.pop(original)
    rewrite(hf_folder, tensors)
    opened = open_foreign(hf_folder)
    assert bits(opened) == plain
    assert f"{original} is stored as {copy}, to which it is tied" in opened.provenance["notes"]


UNUSED = {
    "gemma3": [
        "model.rotary_emb.inv_freq",
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "rotary_emb_local.inv_freq",
    ],
    "gemma2": ["model.rotary_emb.original_inv_freq", "model.embed_tokens.embed_scale"],
    "gemma3 with images": [
        "language_model.model.rotary_emb.full_attention_inv_freq",
        "vision_tower.vision_model.embeddings.position_ids",
        "vision_tower.vision_model.head.probe",
        "model.vision_tower.head.mlp.fc1.bias",
    ],
    "t5gemma2 with images": ["model.encoder.vision_tower.vision_model.head.attention.in_proj_weight"],
    "siglip": ["text_model.embeddings.position_ids", "vision_model.embeddings.position_ids"],
}


@pytest.mark.parametrize("family", UNUSED)
def test_buffers_and_unused_pooling_heads_are_left_out(hugging_face, family):
    hf_folder = hugging_face(FAMILIES[family])
    tensors, plain = stored(hf_folder), bits(open_foreign(hf_folder))
    rewrite(hf_folder, tensors | {name: np.arange(4) for name in UNUSED[family]})
    opened = open_foreign(hf_folder)
    assert bits(opened) == plain
    [note] = [note for note in opened.provenance["notes"] if "does not use" in note]
    assert note.startswith(f"{len(UNUSED[family])} tensors that the model does not use were left out: ")
    # nothing else passes as a buffer
    rewrite(hf_folder, tensors | {"model.freq": np.arange(4)})
    with pytest.raises(UserError, match=r"surplus  model\.freq"):
        open_foreign(hf_folder)


@pytest.mark.parametrize("family", ["gemma3 with images", "t5gemma2 with images"])
def test_a_wrapper_without_weights_of_its_tower_is_a_model_of_text(hugging_face, family):
    hf_folder = hugging_face(FAMILIES[family])
    tensors, whole = stored(hf_folder), open_foreign(hf_folder)
    text = {name: x for name, x in tensors.items() if "vision_tower" not in name and "projector" not in name}
    rewrite(hf_folder, text)
    opened = open_foreign(hf_folder)
    assert opened.config == text_only(whole.config)
    assert bits(opened).items() <= bits(whole).items()
    assert "config.json has an image tower and the folder no weights of it: text only" in opened.provenance["notes"]
    # a part of a tower is a damaged one
    rewrite(hf_folder, text | {name: x for name, x in tensors.items() if "projector" in name})
    with pytest.raises(UserError, match=r"missing  .*vision_tower"):
        open_foreign(hf_folder)


def test_every_difference_of_tensors_is_named(hugging_face):
    hf_folder = hugging_face(tiny.GEMMA3)
    tensors = stored(hf_folder)
    tensors["score.weight"] = tensors.pop("model.norm.weight")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.0.mlp.up_proj.weight"] = np.zeros((32, 48), np.float32)
    rewrite(hf_folder, tensors)
    with pytest.raises(UserError) as caught:
        open_foreign(hf_folder)
    first, *lines = str(caught.value).splitlines()
    where = f"{hf_folder}, according to config.json"
    assert first == f"the tensors in {where}, are not those of Hugging Face Gemma (needed -> stored):"
    assert lines == [
        "missing  model.layers.1.mlp.up_proj.weight: [48, 32]",
        "missing  model.norm.weight: [32]",
        "surplus  score.weight: [32]",
        "changed  model.layers.0.mlp.up_proj.weight: [48, 32] -> [32, 48]",
    ]


def test_a_config_that_contradicts_the_tensors(hugging_face):
    hf_folder = hugging_face(tiny.GEMMA3)
    reconfigure(hf_folder, hidden_size=40)
    with pytest.raises(
        UserError, match=r"size = 97 and hidden_size = 40 contradict model.embed_tokens.weight, \[97, 32"
    ):
        open_foreign(hf_folder)
    reconfigure(hf_folder, hidden_size=32, vocab_size=96)
    with pytest.raises(UserError, match=r"vocab_size = 96 and hidden_size = 32 contradict model.embed_tokens.weight"):
        open_foreign(hf_folder)
    reconfigure(hf_folder, vocab_size=97, tie_word_embeddings=False)
    with pytest.raises(UserError, match=r"tie_word_embeddings = false needs lm_head.weight; if the weights are tied"):
        open_foreign(hf_folder)
    reconfigure(hf_folder, tie_word_embeddings=True, attention_bias=True)
    with pytest.raises(UserError, match=rf"{hf_folder}: config.json: attention_bias = True; supported: False"):
        open_foreign(hf_folder)


def test_embeddings_of_a_token_that_a_model_has_not(hugging_face):
    hf_folder = hugging_face(dataclasses.replace(tiny.T5GEMMA2, eoi_id=None))
    notes = open_foreign(hf_folder).provenance["notes"]
    assert len(notes) == 2
    assert notes[1] == (
        "model.encoder.embed_tokens.eoi_embedding, which transformers always has, left out: there is no such token"
    )


def test_placeholders_are_only_what_they_are(hugging_face):
    """A text-only T5Gemma 2 has an empty tower in transformers; a real one is not passed over."""
    hf_folder = hugging_face(tiny.T5GEMMA2)
    tensors = stored(hf_folder)
    assert "model.encoder.vision_tower.vision_model.post_layernorm.weight" in tensors
    assert open_foreign(hf_folder).provenance["notes"] == [
        "7 tensors of an empty image tower, which transformers always has, were left out"
    ]
    rewrite(hf_folder, {name: array for name, array in tensors.items() if "vision" not in name})
    open_foreign(hf_folder)
    tensors["model.encoder.vision_tower.vision_model.post_layernorm.weight"] = np.zeros(16, np.float32)
    rewrite(hf_folder, tensors)
    with pytest.raises(
        UserError, match=r"surplus  model.encoder.vision_tower.vision_model.post_layernorm.weight: \[16"
    ):
        open_foreign(hf_folder)
