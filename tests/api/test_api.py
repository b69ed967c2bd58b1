"""The Python API on tiny folders: values of the models underneath, and the message for every mistake."""

import dataclasses
import json
import shutil
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
from PIL import Image

import t5g2
from t5g2.api import loading
from t5g2.api import model_inputs as api_inputs
from t5g2.api.text_generation import TextOptions
from t5g2.checkpoint import generation_ids, import_folder
from t5g2.checkpoint.folder import open_model, save_model
from t5g2.core import tree
from t5g2.core.batch import Sequences, image_blocks
from t5g2.core.errors import UserError
from t5g2.core.sharding import MeshShape
from t5g2.core.sharding import make as make_mesh
from t5g2.data.images import ImageProcessor
from t5g2.data.tokenizers.byte_level import Bytes
from t5g2.data.tokenizers.registry import from_dict
from t5g2.models.config import TextConfig
from t5g2.models.layers import Compute
from tests import tiny, weights
from tests.data import tokenizer_files

TOKENIZER = Bytes(sentinels=3)
# ids of images among the special tokens of the bytes
IMAGES = dataclasses.replace(tiny.IMAGES, token=7, begin=5, end=6)
GEMMA = dataclasses.replace(tiny.GEMMA3, vocab_size=TOKENIZER.vocab_size, images=IMAGES)
MODELS = {
    "gemma": tiny.GEMMA3,
    "t5gemma2": tiny.T5GEMMA2,
    "gemma_images": GEMMA,
    "t5gemma2_images": dataclasses.replace(
        tiny.T5GEMMA2, encoder=GEMMA, decoder=dataclasses.replace(GEMMA, images=None), eoi_id=6
    ),
    "siglip": tiny.SIGLIP,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Model folders of tiny models by name; those that read images have a tokenizer."""
    root = tmp_path_factory.mktemp("models")
    for name, config in MODELS.items():
        tokenizer = TOKENIZER.to_dict() if name.endswith("images") else None
        save_model(root / name, weights.on_host(config), tokenizer=tokenizer)
    return root


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    """An image of noise, 20 x 30."""
    path = tmp_path_factory.mktemp("photos") / "photo.png"
    pixels = np.random.default_rng(5).integers(0, 256, (20, 30, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def drawn(length, rows=2, seed=0):
    return np.random.default_rng(seed).integers(10, 97, (rows, length))


def stream(tokens, mask, positions=None):
    positions = np.arange(tokens.shape[1])[None].repeat(len(tokens), 0) if positions is None else positions
    return Sequences(*(np.asarray(x, np.int32) for x in (tokens * mask, mask, positions)))


@jax.jit
def logits_of(model, encoder, decoder, images=None):
    """Returns the output of the model underneath."""
    return model.logits(model.hidden(encoder, decoder, images, compute=tiny.FLOAT32))


def test_logits_are_the_models(folders):
    tokens, mask = drawn(9), np.ones((2, 9), int)
    mask[1, :3] = 0
    actual = loading.load(folders / "gemma").logits(tokens, decoder_mask=mask)
    assert actual.dtype == np.float32
    model = weights.model(tiny.GEMMA3)
    expected = logits_of(model, None, stream(tokens, mask))
    np.testing.assert_allclose(actual[mask == 1], np.asarray(expected)[mask == 1], atol=2e-6)


def test_logits_of_an_encoder_decoder_and_its_states(folders):
    tokens, read, mask = drawn(5), drawn(8, seed=1), np.ones((2, 8), bool)
    mask[0, -2:] = False
    loaded, model = loading.load(folders / "t5gemma2"), weights.model(tiny.T5GEMMA2)
    decoder, encoder = stream(tokens, np.ones((2, 5), int)), stream(read, mask)
    actual = loaded.logits(tokens.tolist(), read.tolist(), encoder_mask=mask)
    expected = logits_of(model, encoder, decoder)
    np.testing.assert_allclose(actual, expected, atol=2e-6)
    states = loaded.encode(read, encoder_mask=mask)
    assert (states.shape, states.dtype) == ((2, 8, 32), np.float32)
    expected = jax.jit(lambda model, encoder: model.encode(encoder, compute=tiny.FLOAT32))(model, encoder)
    np.testing.assert_allclose(states[mask], np.asarray(expected)[mask], atol=2e-6)


def test_positions_count_columns_or_tokens(folders):
    """Queries of merged attention are rotated and the encoder's keys are not, so positions themselves matter."""
    tokens, read = drawn(6), drawn(8, seed=1)
    left = np.concatenate([np.zeros((2, 3), int), tokens], axis=1)
    mask = left > 0
    for positions, same in (("raw", False), ("counted", True)):
        model = loading.load(folders / "t5gemma2", positions=positions)
        alone, padded = model.logits(tokens, read), model.logits(left, read, decoder_mask=mask)[:, 3:]
        assert (np.abs(alone - padded).max() < 1e-5) == same


WRONG = [
    (lambda m, t: m.logits([1, 2]), "decoder_tokens is int64[2]; it must be whole numbers of shape [rows, length]"),
    (lambda m, t: m.logits([[1.5]]), "decoder_tokens is float64[1, 1]; it must be whole numbers"),
    (lambda m, t: m.logits([[1], [2, 3]]), "decoder_tokens has rows of different lengths; pad them to one"),
    (lambda m, t: m.logits([[97]]), "decoder_tokens holds the id 97; ids of this model's vocabulary are 0 to 96"),
    (lambda m, t: m.logits([[-1]]), "decoder_tokens holds the id -1"),
    (lambda m, t: m.logits([[3]], decoder_mask=[[1, 1]]), "decoder_mask is int64[1, 2]; it must be bool or 0 and 1 of"),
    (lambda m, t: m.logits([[3]], decoder_mask=[[2]]), "decoder_mask is int64[1, 1]; it must be bool or 0 and 1"),
    (lambda m, t: m.logits([[3]], [[3]]), "encoder_tokens is given, but a decoder-only model has no encoder"),
    (lambda m, t: m.encode([[3]]), "a decoder-only model has no encoder to encode with"),
    (lambda m, t: t.logits([[3]]), "encoder_tokens is missing: this is an encoder-decoder model"),
    (lambda m, t: t.logits([[3]], [[3], [4]]), "encoder_tokens has 2 rows and decoder_tokens 1"),
]


@pytest.mark.parametrize(("use", "message"), WRONG, ids=[message[:40] for _, message in WRONG])
def test_a_mistake_is_an_error(folders, use, message):
    gemma, t5gemma = (loading.load(folders / name) for name in ("gemma", "t5gemma2"))
    with pytest.raises(UserError) as error:
        use(gemma, t5gemma)
    assert message in str(error.value)


def test_an_unknown_choice_is_an_error(folders):
    with pytest.raises(UserError, match="unknown dtype 'bogus' of weights"):
        t5g2.load(folders / "gemma", dtype="bogus")
    with pytest.raises(UserError, match="unknown positions 'count'; did you mean 'counted'"):
        loading.load(folders / "gemma", positions="count")


def with_images(rows):
    """Tokens of rows that have so many images each, and noise for them."""
    image = [5, 7, 7, 7, 7, 6]
    texts = [[2, 20 + row, *image * count, 30, *[40 + row] * 6 * (max(rows) - count)] for row, count in enumerate(rows)]
    draw = np.random.default_rng(1)
    return np.array(texts), [[draw.uniform(-1, 1, (16, 16, 3)) for _ in range(count)] for count in rows]


@pytest.mark.parametrize("name", ["gemma_images", "t5gemma2_images"])
def test_images_take_their_places(folders, name):
    tokens, images = with_images([1, 2, 0])
    loaded, model = loading.load(folders / name), weights.model(MODELS[name])
    array = np.zeros((3, 2, 16, 16, 3), np.float32)
    array[0, 0], array[1, 0], array[1, 1] = images[0][0], *images[1]
    read = stream(tokens, np.ones_like(tokens))
    if name == "gemma_images":
        actual = loaded.logits(tokens, images=images)
        blocks = read._replace(blocks=image_blocks(tokens, 7))
        expected = logits_of(model, None, blocks, array)
    else:
        decoder = drawn(3, rows=3)
        actual = loaded.logits(decoder, tokens, images=images)
        streams = read, stream(decoder, np.ones_like(decoder))
        expected = logits_of(model, *streams, array)
        alone, together = loaded.encode(tokens[1:2], images=array[1:2]), loaded.encode(tokens, images=images)
        np.testing.assert_allclose(alone, together[1:2], atol=1e-5)
    np.testing.assert_allclose(actual, expected, atol=5e-6)


def test_an_image_is_a_file_a_pil_image_or_an_array(folders, photo):
    model = loading.load(folders / "gemma_images")
    tokens, _ = with_images([1])
    with Image.open(photo) as opened:
        pil_image = opened.convert("RGB")
    pixels = np.asarray(pil_image)
    prepared = api_inputs.prepare_image(photo, 16, ImageProcessor())
    given = [[photo]], [[str(photo)]], [photo], [[photo.read_bytes()]], [[pil_image]], [[pixels]], [[prepared]]
    logits = [model.logits(tokens, images=images) for images in (*given, prepared[None, None])]
    for other in logits[1:]:
        np.testing.assert_array_equal(other, logits[0])
    # at its own size an image is not resampled: x / 127.5 - 1
    square = pixels[:16, :16]
    np.testing.assert_array_equal(
        api_inputs.prepare_image(square, 16, ImageProcessor()), square / np.float32(127.5) - np.float32(1)
    )


def test_an_image_of_any_whole_numbers_and_an_open_file(folders, photo):
    model = loading.load(folders / "siglip")
    pixels = np.asarray(Image.open(photo))
    expected = model.embed_images([photo])
    with photo.open("rb") as file:
        np.testing.assert_array_equal(model.embed_images([file]), expected)
    for dtype in (np.int64, np.uint16, np.int16):
        np.testing.assert_array_equal(model.embed_images([pixels.astype(dtype)]), expected)
    with pytest.raises(UserError, match="an image of int64 reaches from 0 to 510; whole numbers are 0 to 255, so"):
        model.embed_images([pixels.astype(np.int64) * 2])
    with pytest.raises(UserError, match="an image of int8 reaches from -1 to -1"):
        model.embed_images([np.full((4, 4, 3), -1, np.int8)])


@pytest.mark.parametrize("single", [lambda p: p, str, Image.open, lambda p: np.asarray(Image.open(p))])
def test_a_single_image_is_not_a_list(folders, photo, single):
    model = loading.load(folders / "siglip")
    with pytest.raises(UserError, match=r"images is one image; give a list of them: \[image\]"):
        model.embed_images(single(photo))
    with pytest.raises(UserError, match="images is empty; give a list of at least one"):
        model.embed_images([])
    for value, kind in ((3, "int"), ({"a": photo}, "dict"), ({photo}, "set"), (np.zeros(3), "ndarray")):
        with pytest.raises(UserError, match=f"images is of type {kind}; give a list of images"):
            model.embed_images(value)


@pytest.mark.parametrize("single", [str, lambda p: p, lambda p: p.read_bytes(), Image.open, lambda p: p.open("rb"),
                                    lambda p: np.asarray(Image.open(p))])  # fmt: skip
def test_rows_of_images_are_no_image(folders, photo, single):
    """Else a path of n letters would be n rows, and an image of n rows of pixels n images."""
    with pytest.raises(UserError, match=r"images is one image; give a list of images for each row: \[\[image\]\]"):
        api_inputs.images(single(photo), 32, 16)
    with pytest.raises(UserError, match="images is one image; give a list of images for each row"):
        api_inputs.with_crops(["a"] * 32, single(photo), 2)
    loading.load(folders / "gemma_images").generate(["a"], images=[single(photo)], max_new_tokens=1)  # of one row


def test_what_has_no_order_is_no_list(photo):
    for value in ({0: photo}, {photo}, 1, np.zeros(2)):
        with pytest.raises(UserError, match=rf"images is of type {type(value).__name__}; give a list for each row"):
            api_inputs.images(value, 1, 16)
    for value in ({"a": 1}, {"a"}, b"a"):
        with pytest.raises(
            UserError, match=rf"prompts is .* of type {type(value).__name__}; it must be a list of text"
        ):
            api_inputs.check_texts("prompts", value)
    for value in (None, {"path": photo}, iter([photo])):
        with pytest.raises(UserError, match=rf"an image is of type {type(value).__name__}; give a file"):
            api_inputs.images([[value]], 1, 16)
    array, counts = api_inputs.images((row for row in [[photo], []]), 2, 16)
    assert (array.shape, counts) == ((2, 1, 16, 16, 3), [1, 0])


def test_an_image_processor_that_was_set_is_saved(folders, photo, tmp_path):
    """It says how the pixels become numbers, as much as a weight does; one that was not set stays as it was given."""
    for name, family in (("gemma_images", "Gemma3"), ("siglip", "Siglip")):
        shutil.copytree(folders / name, tmp_path / name)
        own = tmp_path / name / "processor_config.json"
        own.write_text('{"image_processor": {"resample": 2}, "image_seq_length": 4}')
        model = loading.load(tmp_path / name)
        model.save(tmp_path / f"{name}-same")
        assert (tmp_path / f"{name}-same" / own.name).read_text() == own.read_text()
        model.image_processor = ImageProcessor("nearest", mean=(0.25, 0.5, 0.75))
        model.save(tmp_path / f"{name}-set")
        again = loading.load(tmp_path / f"{name}-set")
        assert again.image_processor == model.image_processor
        assert [file.name for file in again.folder.extra_files if "processor" in file.name] == [
            "preprocessor_config.json"
        ]
        file = json.loads((tmp_path / f"{name}-set" / "preprocessor_config.json").read_text())
        assert (file["image_processor_type"], file["size"]["height"]) == (f"{family}ImageProcessor", 16)
        model.save(tmp_path / f"{name}-hf", format="huggingface")
        assert loading.load(tmp_path / f"{name}-hf").image_processor == model.image_processor


def test_images_are_processed_as_the_folder_says(folders, photo, tmp_path):
    tokens, _ = with_images([1])
    uses = {"gemma_images": lambda m, x: m.logits(tokens, images=[x]), "siglip": lambda m, x: m.embed_images(x)}
    for name, use in uses.items():
        shutil.copytree(folders / name, tmp_path / name)
        settings = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4], "resample": 1}
        (tmp_path / name / "processor_config.json").write_text(json.dumps({"image_processor": settings}))
        model = loading.load(tmp_path / name)
        processor = ImageProcessor("lanczos", mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))
        assert model.image_processor == processor
        assert model.resampling == "lanczos"
        as_given = use(model, [photo])
        np.testing.assert_array_equal(use(model, [api_inputs.prepare_image(photo, 16, processor)]), as_given)
        assert np.abs(use(loading.load(folders / name), [photo]) - as_given).max() > 1e-4
    (tmp_path / "siglip" / "processor_config.json").write_text('{"image_processor": {"do_resize": false}}')
    with pytest.raises(UserError, match=r"processor_config\.json: do_resize = False; supported: true"):
        loading.load(tmp_path / "siglip").embed_images([photo])


def test_text_needs_no_tower(folders, tmp_path):
    """With an unreadable tower the model still reads text, until an image is given."""
    config, model = MODELS["gemma_images"], weights.model(MODELS["gemma_images"])
    # every tensor in a file of its own
    save_model(tmp_path / "model", weights.on_host(config), tokenizer=TOKENIZER.to_dict(), shard_bytes=1)
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())["weight_map"]
    towers = {file for name, file in index.items() if name.startswith(("vision.", "projector."))}
    assert len(towers) == sum(key[0].startswith(("vision.", "projector.")) for key in weights.weights(config))
    loaded = loading.load(tmp_path / "model")
    for file in towers:
        (tmp_path / "model" / file).write_bytes(b"")
    tokens = drawn(5)
    expected = logits_of(model, None, stream(tokens, np.ones_like(tokens)))
    np.testing.assert_allclose(loaded.logits(tokens), expected, atol=2e-6)
    assert loaded.generate(["a", "bc"], max_new_tokens=2)
    assert not hasattr(loaded.params, "vision")
    with pytest.raises((UserError, ValueError, OSError)):
        loaded.read_tower()


def test_the_tower_comes_to_the_weights_that_are_there(folders):
    loaded = loading.load(folders / "gemma_images")
    before = tree.named(loaded.params)
    loaded.read_tower()
    after = tree.named(loaded.params)
    assert all(after[name] is before[name] for name in before)
    for key, leaf in tree.leaves(loaded.params).items():
        np.testing.assert_array_equal(leaf.read(), weights.weights(MODELS["gemma_images"])[key], err_msg=str(key))


@pytest.mark.parametrize("name", MODELS)
def test_what_is_saved_is_what_was_loaded(folders, name, tmp_path):
    loaded = loading.load(folders / name)
    loaded.save(tmp_path / "again")
    again = open_model(tmp_path / "again")
    assert (again.config, again.tokenizer) == (loaded.config, loaded.folder.tokenizer)
    for key, array in weights.weights(MODELS[name]).items():
        np.testing.assert_array_equal(again.leaves[key].read(), array, err_msg=str(key))
    with pytest.raises(UserError, match="exists already"):
        loaded.save(tmp_path / "again")


def test_a_home_folder_is_written_where_it_is_read(folders, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    loading.load(folders / "gemma").save("~/saved")
    assert open_model(tmp_path / "saved").config == tiny.GEMMA3
    with pytest.raises(UserError, match="exists already"):
        loading.load("~/saved").save("~/saved")


@pytest.mark.parametrize("name", ["gemma_images", "t5gemma2_images", "siglip"])
def test_folders_of_hugging_face_are_loaded_as_they_are(folders, name, tmp_path, photo):
    ours = loading.load(folders / name)
    ours.save(tmp_path / "hf", format="huggingface")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf"]
    theirs = loading.load(tmp_path / "hf")
    if name == "siglip":
        np.testing.assert_array_equal(theirs.embed_images([photo]), ours.embed_images([photo]))
        return
    tokens, images = with_images([2])
    read = (tokens,) if name == "gemma_images" else (drawn(4, rows=1), tokens)
    np.testing.assert_array_equal(theirs.logits(*read, images=images), ours.logits(*read, images=images))
    with pytest.raises(UserError, match=r"hf has no tokenizer, so it cannot read text; put its tokenizer.json"):
        theirs.generate(["a"])
    with pytest.raises(UserError, match="unknown format 'hugging'; did you mean 'huggingface'"):
        theirs.save(tmp_path / "x", format="hugging")


@pytest.mark.parametrize("saved_as", ["t5g2", "huggingface"])
@pytest.mark.parametrize("name", ["gemma_images", "t5gemma2_images"])
def test_saving_keeps_the_ids_that_only_config_json_gives(folders, name, saved_as, tmp_path):
    loading.load(folders / name).save(tmp_path / "hf", format="huggingface")
    (tmp_path / "hf" / "generation_config.json").unlink()
    file = tmp_path / "hf" / "config.json"
    given = {"eos_token_id": [1, 19], "bos_token_id": 4, "decoder_start_token_id": 3}
    file.write_text(json.dumps(json.loads(file.read_text()) | given))
    theirs = loading.load(tmp_path / "hf")
    theirs.save(tmp_path / "again", format=saved_as)
    ids = generation_ids.read(tmp_path / "again")
    assert (ids.eos, ids.bos, ids.decoder_start) == ((1, 19), 4, 3)
    assert loading.load(tmp_path / "again").stop_ids == theirs.stop_ids == (1, 19)


def test_weights_are_cast_and_computed_with_as_asked(folders):
    tokens = drawn(5)
    stored = loading.load(folders / "gemma")
    assert stored.compute == Compute(dtype="float32")  # these tests run on a CPU
    half = loading.load(folders / "gemma", dtype="bfloat16", compute=Compute(dtype="bfloat16"))
    assert {leaf.dtype for leaf in tree.leaves(half.params).values()} == {np.dtype(ml_dtypes.bfloat16)}
    actual, exact = half.logits(tokens), stored.logits(tokens)
    assert actual.dtype == np.float32
    assert 1e-5 < np.abs(actual - exact).max() < 0.1 * exact.std()


def test_a_mesh_gives_the_same(folders, devices):
    tokens, images = with_images([1, 0])
    alone = loading.load(folders / "t5gemma2_images")
    cut = loading.load(folders / "t5gemma2_images", mesh=make_mesh(MeshShape(fsdp=2, tensor=2), devices[:4]))
    decoder = drawn(4)
    actual = cut.logits(decoder, tokens, images=images)
    np.testing.assert_allclose(actual, alone.logits(decoder, tokens, images=images), atol=1e-5)
    assert len(jax.tree.leaves(cut.params)[0].sharding.device_set) == 4
    assert cut.generate(["ab"], max_new_tokens=3) == alone.generate(["ab"], max_new_tokens=3)


def test_a_mesh_that_leaves_weights_whole_is_warned_of(folders, devices, caplog):
    loading.load(folders / "gemma", mesh=make_mesh(MeshShape(fsdp=2), devices[:2]))
    assert not caplog.messages
    loading.load(folders / "gemma", mesh=make_mesh(MeshShape(fsdp=3), devices[:3]))
    (warning,) = caplog.messages
    assert warning.startswith("mesh.fsdp = 3 divides no axis of ")
    assert "% of the weights that it should cut are whole on every device along it; set mesh.fsdp to 1" in warning
    caplog.clear()
    loading.load(folders / "gemma", mesh=jax.sharding.Mesh(np.array(devices[:3]), ("fsdp",)))
    assert caplog.messages == [warning], "of a mesh of a caller's own, without the other axes"


def test_prompts_hold_images_where_they_say_so():
    """As transformers' Gemma3Processor: two newlines, start, the image's tokens, end, two newlines."""
    image = [5, 7, 7, 7, 7, 6]
    newlines = TOKENIZER.encode("\n\n").tolist()

    def prompt(text, count):
        return api_inputs.prompt(TOKENIZER, text, count, IMAGES).tolist()

    def ids(text):
        return TOKENIZER.encode(text).tolist()

    assert prompt("hi", 0) == ids("hi")
    assert prompt("hi", 1) == [*newlines, *image, *ids("\n\nhi")]
    assert prompt("a<start_of_image>b", 1) == [*ids("a\n\n"), *image, *ids("\n\nb")]
    two = [*ids("a\n\n"), *image, *ids("\n\n\n\n"), *image, *ids("\n\nb")]
    assert prompt("a<start_of_image><start_of_image>b", 2) == two
    with pytest.raises(UserError, match=r"'a<start_of_image>' has <start_of_image> 1 times and 2 images; write it"):
        prompt("a<start_of_image>", 2)


def test_prompts_are_those_of_the_processor_of_transformers(tmp_path):
    """Newlines of the text and of the image meet in one chunk or in several, as the tokenizer has it."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    ours = from_dict({"kind": "huggingface", "file": str(tokenizer_files.huggingface(tmp_path, t5gemma2=True))})
    fast = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    fast.no_truncation()
    fast.no_padding()
    names = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    named = {f"{name}_token": f"<{name}>" for name in ("bos", "eos", "pad", "unk")}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=fast, extra_special_tokens=names, **named)
    resize = transformers.Gemma3ImageProcessorPil(size={"height": 16, "width": 16})
    processor = transformers.Gemma3Processor(image_processor=resize, tokenizer=tokenizer, image_seq_length=4)
    config = dataclasses.replace(tiny.IMAGES, **{at: ours.id(name) for at, name in PLACES.items()})
    image = np.zeros((20, 30, 3), np.uint8)
    for text, count in (
        ("What is <start_of_image>?", 1),
        ("a\n<start_of_image>\n\nb <start_of_image>", 2),
        ("<start_of_image><start_of_image>", 2),
    ):
        theirs = processor(text=[text], images=[[image] * count])["input_ids"][0]
        assert [2, *api_inputs.prompt(ours, text, count, config).tolist()] == list(theirs), text


def test_options_of_generation(folders, tmp_path):
    """By transformers' names; the stream of an output is its text, and batches of few rows are one of all."""
    model = loading.load(folders / "t5gemma2_images")
    model.stop_ids = ()
    prompts = ["what?", "x" * 40, "and this"]
    options = {"temperature": 1.5, "top_k": 20, "top_p": 0.9, "seed": 2, "max_new_tokens": 6}
    drawn = model.generate(prompts, **options)
    options["log_probs"] = True  # which changes no token
    assert drawn == model.generate(prompts, **options, rows=1)
    assert "".join(model.stream(prompts[0], **options)) == drawn[0]
    assert model.generate(prompts[2:], **options) != drawn[2:]
    [second] = model.outputs(prompts[2:], indices=[2], **options)
    assert second.text == drawn[2]
    assert len(second.log_probs) == len(second.tokens) == 6
    three = model.generate(prompts[:1], num_return_sequences=3, **options)
    assert three[0] == drawn[0]
    assert len(set(three)) == 3
    stop = drawn[0][2:4]
    assert model.generate(prompts[:1], stop=[stop], **options) == [drawn[0][: drawn[0].index(stop)]]
    assert "".join(model.stream(prompts[0], stop=[stop], **options)) == drawn[0][: drawn[0].index(stop)]
    best = model.outputs(prompts, num_beams=2, num_return_sequences=2, max_new_tokens=4)
    assert [best[i].score >= best[i + 1].score for i in (0, 2, 4)] == [True] * 3


def test_a_prompt_longer_than_the_context(folders, monkeypatch, caplog):
    model = loading.load(folders / "gemma_images")
    monkeypatch.setattr(TextConfig, "context", 20)
    long, options = "abcdefghijklmnopqrstuvwxyz", {"max_new_tokens": 4}
    length = len(model.tokenizer.encode(long)) + 1
    told = rf"prompts\[0\] has {length} tokens and max_new_tokens = 4 more, and the model's context is 20; shorten it"
    with pytest.raises(UserError, match=told):
        model.generate([long], **options)
    assert model.generate([long], on_long="truncate_right", **options) == model.generate([long[:15]], **options)
    assert model.generate([long], on_long="truncate_left", **options) == model.generate([long[-15:]], **options)
    skipped, short = model.outputs([long, "ab"], on_long="skip", **options)
    assert skipped.text == ""
    assert "context is 20" in skipped.skipped
    assert (short.text, short.skipped) == (model.generate(["ab"], **options)[0], None)
    caplog.clear()
    assert model.generate([long], on_long="skip", **options) == [""]
    assert list(model.stream(long, on_long="skip", **options)) == []
    assert [record.message.count("context is 20") for record in caplog.records] == [1, 1]
    with pytest.raises(UserError, match=rf"line 7 has {length} tokens and max_new_tokens = 4 more, and the model's"):
        model.check_prompts(["ab", long], [0, 0], TextOptions(max_new_tokens=4), names=["line 3", "line 7"])
    # an encoder-decoder's prompt and output have a context each
    model = loading.load(folders / "t5gemma2_images")
    assert len(model.generate(["ab"], max_new_tokens=20)) == 1
    with pytest.raises(UserError, match="max_new_tokens = 21 is more than the context of the decoder, 20; lower it"):
        model.generate(["ab"], max_new_tokens=21)


PLACES = {"token": "image", "begin": "start_of_image", "end": "end_of_image"}


@pytest.mark.parametrize("name", ["gemma_images", "t5gemma2_images"])
def test_text_and_images_go_in_and_text_comes_out(folders, name, photo):
    model = loading.load(folders / name)
    model.stop_ids = ()
    together = model.generate(["what?", "x", "and <start_of_image> this"], [[photo], [], photo], max_new_tokens=6)
    assert [type(text) for text in together] == [str] * 3
    assert together[1:2] == model.generate(["x"], max_new_tokens=6)
    assert together[0] == model.generate(["<start_of_image>what?"], [[photo]], max_new_tokens=6)[0]
    drawn_ = model.generate(["x"] * 4, sampler=t5g2.Temperature(3.0), seed=1, max_new_tokens=6)
    assert drawn_ == model.generate(["x"] * 4, sampler=t5g2.Temperature(3.0), seed=1, max_new_tokens=6)
    assert len(set(drawn_)) > 1
    assert model.generate([]) == []


@pytest.mark.parametrize("name", ["gemma_images", "t5gemma2_images"])
def test_an_image_token_that_is_spelt_in_a_prompt(tmp_path, photo, name):
    """Beside an image it would shift the image's own tokens; transformers refuses it there too."""
    file = tokenizer_files.huggingface(tmp_path, t5gemma2=True)
    tokenizer = from_dict({"kind": "huggingface", "file": str(file)})
    ids = dataclasses.replace(tiny.IMAGES, **{at: tokenizer.id(name) for at, name in PLACES.items()})
    stack = dataclasses.replace(tiny.GEMMA3, vocab_size=tokenizer.vocab_size, images=ids)
    config = stack
    if name == "t5gemma2_images":
        decoder = dataclasses.replace(stack, images=None)
        config = dataclasses.replace(tiny.T5GEMMA2, encoder=stack, decoder=decoder, eoi_id=ids.end)
    node = {"kind": "huggingface", "file": "tokenizer.json"}
    save_model(tmp_path / "saved", weights.on_host(config), tokenizer=node, extra_files=[file])
    model = loading.load(tmp_path / "saved")
    model.generate(["What is <start_of_image>?"], [[photo]], max_new_tokens=1)
    for prompts, images in (
        (["a", "What is <image_soft_token>?"], [[], [photo]]),
        (["What is <start_of_image>?", "b <image_soft_token>"], [[photo], []]),
    ):
        with pytest.raises(UserError, match=r"prompts\[1\] spells '<image_soft_token>', which stands for a part of an"):
            model.generate(prompts, images, max_new_tokens=1)
    # without images it is a token of the text, as in transformers, if the embedding has a row for it
    model.generate(["b <image_soft_token>"], max_new_tokens=1)
    smaller = dataclasses.replace(stack, vocab_size=ids.token)
    model.folder = dataclasses.replace(model.folder, config=smaller)
    with pytest.raises(UserError, match=rf"token {ids.token}, and the embedding has {ids.token} rows; leave it out"):
        model.generate(["b <image_soft_token>"], max_new_tokens=1)


def test_crops_follow_a_long_image_and_the_prompt_says_so(folders, tmp_path):
    """As transformers' Gemma3Processor words it; a square image has none."""
    long, square = np.zeros((300, 900, 3), np.uint8), np.zeros((300, 300, 3), np.uint8)
    long[:, 300:600] = 255
    texts, images = api_inputs.with_crops(["A <start_of_image> B <start_of_image> C"], [[long, square]], 4)
    start = "<start_of_image>"
    crops = " ".join([start] * 3)
    sentence = f"Here is the original image {start} and here are some crops to help you see better {crops}"
    assert texts == [f"A {sentence} B {start} C"]
    assert [image.shape[1] for image in images[0]] == [900, 300, 300, 300, 300]
    assert images[0][2].min() == 255  # the middle
    with pytest.raises(UserError, match="crops are made of files, PIL images and uint8 arrays"):
        api_inputs.with_crops(["A"], [[np.zeros((16, 16, 3), np.float32)]], 4)
    with pytest.raises(UserError, match="images are given for 1 rows and there are 2"):
        api_inputs.with_crops(["A", "B"], [[long]], 4)
    Image.fromarray(long).save(tmp_path / "long.png")
    model = t5g2.load(folders / "gemma_images")
    for crops in (-1, -(2**40)):
        with pytest.raises(UserError, match=rf"crops = {crops}; it must be at least 0"):
            model.generate(["A"], images=[[tmp_path / "long.png"]], crops=crops, max_new_tokens=2)
    model.generate(["A"], images=[[tmp_path / "long.png"]], crops=2, max_new_tokens=2)


def test_images_of_another_size_than_the_towers(folders, photo):
    model = t5g2.load(folders / "t5gemma2_images", image_size=32)
    assert model.config.encoder.images.vision.image_size == 32
    tokens, _ = with_images([1])
    states = model.encode(tokens, images=[[photo]])
    assert np.isfinite(states).all()
    assert np.abs(states - t5g2.load(folders / "t5gemma2_images").encode(tokens, images=[[photo]])).max() > 1e-3


def test_what_ends_a_text_is_what_the_folder_says(folders, tmp_path):
    plain = loading.load(folders / "gemma_images")
    assert plain.stop_ids == (TOKENIZER.special_tokens.eos,)
    plain.save(tmp_path / "hf", format="huggingface")
    (tmp_path / "hf" / "generation_config.json").write_text('{"eos_token_id": [1, 106]}')
    assert loading.load(tmp_path / "hf").stop_ids == (1, 106)
    (tmp_path / "hf" / "generation_config.json").write_text('{"eos_token_id": 5}')
    assert loading.load(tmp_path / "hf").stop_ids == (5,)
    (tmp_path / "hf" / "generation_config.json").unlink()
    tokenizer_files.huggingface(tmp_path / "hf")
    assert loading.load(tmp_path / "hf").stop_ids == (1,)  # config.json
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    del config["eos_token_id"], config["text_config"]["eos_token_id"]
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    turns = loading.load(tmp_path / "hf")
    assert turns.stop_ids == (1, turns.tokenizer.id("end_of_turn"))


def test_former_names_of_the_ids_read_and_set_them(folders):
    model = loading.load(folders / "gemma_images")
    assert (model.ends, model.suppressed) == (model.stop_ids, ())
    free = model.generate(["x"], max_new_tokens=6)
    # every token ends the text, so no text is left
    model.ends = tuple(range(TOKENIZER.vocab_size))
    assert model.stop_ids == model.ends
    assert model.generate(["x"], max_new_tokens=6) == [""] != free
    model.ends, model.suppressed = (), (5,)
    assert (model.stop_ids, model.suppressed_ids) == ((), (5,))


def test_an_imported_encoder_reads_bos_first(folders, tmp_path):
    ours = loading.load(folders / "t5gemma2_images")
    assert not ours.encoder_bos
    ours.save(tmp_path / "hf", format="huggingface")
    assert loading.load(tmp_path / "hf").encoder_bos
    assert import_folder.import_model(tmp_path / "hf", tmp_path / "imported")
    assert loading.load(tmp_path / "imported").encoder_bos


def test_texts_and_images_are_compared(folders, photo):
    loaded, model = loading.load(folders / "siglip"), weights.model(tiny.SIGLIP)
    texts = np.random.default_rng(2).integers(0, 50, (3, 6))
    text, image = loaded.embed_texts(texts), loaded.embed_images([photo, np.zeros((5, 9, 3), np.uint8)])
    assert (text.shape, image.shape, text.dtype) == ((3, 16), (2, 16), np.float32)
    np.testing.assert_allclose(np.linalg.norm(text, axis=1), 1, rtol=1e-5)
    prepared = api_inputs.prepare_image(photo, 16, ImageProcessor("bicubic"))
    pixels = np.stack([prepared, np.full((16, 16, 3), -1, np.float32)])
    embed = jax.jit(lambda model, pixels: model.embed_images(pixels, compute=tiny.FLOAT32))
    np.testing.assert_allclose(image, embed(model, pixels), atol=1e-6)
    expected = text @ image.T * np.exp(np.asarray(model.logit_scale)) + np.asarray(model.logit_bias)
    similarity = loaded.similarity([photo, np.zeros((5, 9, 3), np.uint8)], texts)
    np.testing.assert_allclose(similarity, expected, atol=1e-5)


def test_zero_shot_classification(folders, photo):
    """The scores are the sigmoids of the similarities with the mean of each class's prompts."""
    model = loading.load(folders / "siglip")
    images = [photo, np.zeros((5, 9, 3), np.uint8)]
    prompts = np.random.default_rng(2).integers(0, 50, (3, 6))
    names, scores = model.classify(images, {"one prompt": prompts[:1], "two prompts": prompts[1:]})
    text = model.embed_texts(prompts)
    mean = (text[1] + text[2]) / np.linalg.norm(text[1] + text[2])
    cosines = model.embed_images(images) @ np.stack([text[0], mean]).T
    logits = cosines * np.exp(model.params.logit_scale[...]) + model.params.logit_bias[...]
    np.testing.assert_allclose(scores, 1 / (1 + np.exp(-logits)), rtol=1e-4)
    assert names == [["one prompt", "two prompts"][i] for i in np.argmax(logits, axis=1)]
    assert model.classify(images, {"only": prompts})[0] == ["only", "only"]


def test_zero_shot_retrieval(folders, photo):
    """By the ranks in the similarities; a text without an image is a wrong candidate."""
    model = loading.load(folders / "siglip")
    images = [photo, np.zeros((5, 9, 3), np.uint8), np.full((4, 4, 3), 255, np.uint8)]
    texts = np.random.default_rng(2).integers(0, 50, (4, 6))
    owners = [0, 0, 2, -1]
    recall = model.retrieve(images, texts, owners, ks=[1, 2, 3])
    scores = model.similarity(images, texts)  # [texts, images]
    text_ranks = [int((scores[t] > scores[t, owner]).sum()) for t, owner in enumerate(owners) if owner >= 0]
    best = {image: max(scores[t, image] for t in range(4) if owners[t] == image) for image in (0, 2)}
    wrong = {image: [scores[t, image] for t in range(4) if owners[t] != image] for image in (0, 2)}
    image_ranks = [sum(score > best[image] for score in wrong[image]) for image in (0, 2)]
    assert recall.text_to_image == {k: np.mean(np.array(text_ranks) < k) for k in (1, 2, 3)}
    assert recall.image_to_text == {k: np.mean(np.array(image_ranks) < k) for k in (1, 2, 3)}


def test_siglip_texts_are_plain_and_padded_with_their_end(tmp_path):
    """Lower case, no punctuation; cut to leave room for </s>, which also pads."""
    tokenizer = Bytes(sentinels=0)
    config = dataclasses.replace(tiny.SIGLIP.text, length=6, vocab_size=300)
    actual = api_inputs.siglip_tokens(tokenizer, ["Hi,  You!", "a"], config)
    assert actual[0].tolist() == [*tokenizer.encode("hi yo").tolist(), 1]
    assert actual[1].tolist() == [*tokenizer.encode("a").tolist(), 1, 1, 1, 1, 1]


def test_siglip_texts_are_those_of_transformers(tmp_path):
    """And of a folder that has its chunks they are embedded as their ids are."""
    text = dataclasses.replace(tiny.SIGLIP.text, vocab_size=300, length=16)
    save_model(tmp_path / "siglip", weights.on_host(dataclasses.replace(tiny.SIGLIP, text=text)))
    tokenizer_files.siglip(tmp_path / "siglip")
    model = loading.load(tmp_path / "siglip")
    texts = ["A photo of, a Cat!", "  two   spaces ", "", "don't. stop-now " * 9]
    ids = api_inputs.siglip_tokens(model.tokenizer, texts, text)
    np.testing.assert_array_equal(model.embed_texts(texts), model.embed_texts(ids))
    transformers = pytest.importorskip("transformers")
    theirs = transformers.SiglipTokenizer(vocab_file=str(tmp_path / "siglip" / "spiece.model"))
    assert ids.tolist() == theirs(texts, padding="max_length", max_length=16, truncation=True)["input_ids"]


def tell(name, use, message):
    return pytest.param(name, use, message, id=message[:50])


@pytest.mark.parametrize(
    ("name", "use", "message"),
    [
        tell(
            "gemma_images", lambda m: m.logits([[2, 7, 7, 7, 7]]), "row 0 has 4 image tokens (id 7) and 0 images, which"
        ),
        tell(
            "gemma_images",
            lambda m: m.logits([[2, 7]], images=[[NOISE]]),
            "row 0 has 1 image tokens (id 7) and 1 images",
        ),
        tell("gemma_images", lambda m: m.logits([[2]], images=[[], []]), "images are given for 2 rows and there are 1"),
        tell(
            "gemma_images", lambda m: m.logits([[2]], images=[[NOISE[:3]]]), "an image is float64[3, 16, 3]; arrays are"
        ),
        tell(
            "gemma_images", lambda m: m.logits([[2]], images=[[9 * NOISE]]), "an image of floats reaches from -9 to 9"
        ),
        tell("gemma_images", lambda m: m.logits([[2]], images=[["/nowhere.png"]]), "'/nowhere.png' cannot be opened"),
        tell("gemma_images", lambda m: m.generate("a"), "prompts is one text; give a list of them"),
        tell(
            "gemma_images", lambda m: m.generate(None), "prompts is None of type NoneType; it must be a list of texts"
        ),
        tell("gemma_images", lambda m: m.generate(["a"], max_new_tokens="3"), "max_new_tokens is '3' of type str; it"),
        tell("gemma_images", lambda m: m.generate(["a"], max_new_tokens=None), "max_new_tokens is None of type"),
        tell("gemma_images", lambda m: m.generate(["a"], crops=-1), "crops = -1; it must be at least 0"),
        tell("gemma_images", lambda m: m.generate(["a"], num_beam=2), "unknown option of generation 'num_beam'; did"),
        tell("gemma_images", lambda m: m.generate(["a"], top_k=3), "top_k: only sampling uses it; give a temperature"),
        tell("gemma_images", lambda m: m.generate(["a"], stop="x"), "stop is one text, 'x'; give a list of them"),
        tell("gemma_images", lambda m: m.generate(["a"], temperature="x"), "temperature is 'x' of type str; it must"),
        tell("gemma_images", lambda m: m.generate(["a"], do_sample=True, temperature=0), "do_sample = True and temper"),
        tell("gemma_images", lambda m: next(m.stream("a", num_beams=2)), "one output can be shown as it is made"),
        tell(
            "gemma_images",
            lambda m: m.generate(["a"], max_new_tokens=2**24),
            "max_new_tokens = 16,777,216 is more than",
        ),
        tell("gemma_images", lambda m: next(m.stream(["a"])), "prompts[0] is ['a'] of type list; it must be a text"),
        tell("gemma_images", lambda m: m.generate(["a"], stop=None), "stop is None of type NoneType; it must be a"),
        tell("gemma_images", lambda m: m.generate(["a"], stop=["\ud800"]), "stop[0] has half of a character, U+D800"),
        tell("gemma_images", lambda m: m.generate(["a"], do_sample="no"), "do_sample is 'no' of type str; it must be"),
        tell("gemma_images", lambda m: m.generate(["a"], log_probs=1), "log_probs is 1 of type int; it must be True"),
        tell("gemma_images", lambda m: m.generate(["a"], sampler="greedy"), "sampler is 'greedy' of type str; it must"),
        tell("gemma_images", lambda m: m.generate(["a"], early_stopping=1), "unknown early_stopping '1'"),
        tell("gemma_images", lambda m: m.generate(["a"], temperature=np.float32(-1)), "temperature = -1.0; it must be"),
        tell(
            "gemma_images", lambda m: m.generate(["a"], temperature=1e-40), "temperature = 1e-40; it must be at least"
        ),
        tell("gemma_images", lambda m: m.outputs(["a"], indices=[0, 1]), "indices is [0, 1]; it must be 1 whole"),
        tell(
            "gemma_images", lambda m: m.outputs(["a"], indices=[2**31]), "indices is [2147483648]; it must be 1 whole"
        ),
        tell("gemma_images", lambda m: m.outputs(["a"], indices=[0.5]), "indices is [0.5]; it must be 1 whole numbers"),
        tell("gemma_images", lambda m: m.generate(["a"], seed=1.5), "seed is 1.5 of type float; it must be a whole"),
        tell(
            "gemma", lambda m: m.logits([[2]], images=[[NOISE]]), "images are given, but this model has no image tower"
        ),
        tell("gemma", lambda m: m.embed_texts(["a"]), "a language model does not embed images and texts"),
        tell("gemma", lambda m: m.generate(["a"]), "gemma has no tokenizer, so it cannot read text"),
        tell("siglip", lambda m: m.logits([[2]]), "a dual encoder has no logits of tokens and generates no text; use"),
        tell("siglip", lambda m: m.generate(["a"]), "a dual encoder has no logits of tokens and generates no text"),
        tell("siglip", lambda m: m.embed_texts(["a"]), "siglip has no SigLIP tokenizer (spiece.model); put it there"),
        tell("siglip", lambda m: m.embed_texts("a"), "texts is one text; give a list of them"),
        tell("siglip", lambda m: m.embed_texts(None), "texts is None of type NoneType; it must be a list of texts"),
        tell("siglip", lambda m: m.embed_texts(["a", None]), "texts[1] is None of type NoneType; it must be a text"),
        tell("siglip", lambda m: m.embed_texts(["\udcff"]), "texts[0] has half of a character, U+DCFF, at place 0"),
        tell("siglip", lambda m: m.classify([NOISE], {}), "classes without a list of prompts: there is no class; give"),
        tell("siglip", lambda m: m.classify([NOISE], {"cat": []}), "classes without a list of prompts: cat; give at"),
        tell("siglip", lambda m: m.classify([NOISE], {"cat": "a cat"}), "classes without a list of prompts: cat"),
        tell("siglip", lambda m: m.retrieve([NOISE], [[5] * 6], [1]), "images of texts are 1 to 1, and there are 1"),
        tell("gemma", lambda m: m.classify([NOISE], {"cat": [[1]]}), "a language model does not embed images and"),
        tell(
            "siglip", lambda m: m.embed_texts([[50] * 6]), "texts is int64[1, 6]; give a list of texts, or ids from 0"
        ),
        tell(
            "siglip",
            lambda m: m.embed_texts([[1, 2]]),
            "texts is int64[1, 2]; give a list of texts, or ids from 0 to 49",
        ),
    ],
)
def test_what_a_model_cannot_do_is_an_error(folders, name, use, message):
    with pytest.raises(UserError) as error:
        use(loading.load(folders / name))
    assert message in str(error.value)


NOISE = np.where(np.arange(16 * 16 * 3).reshape(16, 16, 3) % 2, -1.0, 1.0)


def test_a_folder_that_is_none_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"does not exist; give a Hugging Face folder, an official Flax one or a model"):
        t5g2.load(tmp_path / "nothing")


def test_the_package_loads_what_is_asked_for():
    """`import t5g2` alone brings no jax; its names do."""
    code = "import sys, t5g2; a = 'jax' in sys.modules; t5g2.Greedy(); print(a, 'jax' in sys.modules, dir(t5g2.load))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("False True")
    assert t5g2.load is loading.load
    assert t5g2.UserError is UserError
    with pytest.raises(AttributeError, match="module 't5g2' has no attribute 'Greed'; it has Greedy"):
        t5g2.Greed  # noqa: B018
