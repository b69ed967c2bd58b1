"""Image processors of folders: the pixels that transformers makes by the same files, and messages for mistakes."""

import json
import warnings

import numpy as np
import pytest
from PIL import Image

from t5g2.core.errors import UserError
from t5g2.data import image_processor
from t5g2.data.images import ImageProcessor, preprocess

SETTINGS = {
    "defaults": {},
    "mean and std": {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]},
    "one mean": {"image_mean": 0.4, "image_std": 0.3},
    "not normalized": {"do_normalize": False},
    "not rescaled": {"do_rescale": False},
    "scale": {"rescale_factor": 0.01},
    "lanczos": {"resample": 1},
    "bilinear": {"resample": 2},
    "bicubic": {"resample": 3},
    "nothing said": {"resample": None, "do_normalize": None, "image_mean": None},
}
PIXELS = np.random.RandomState(0).randint(0, 256, (37, 51, 3)).astype(np.uint8)


def write(folder, settings, nested=False, name="Gemma3ImageProcessor"):
    settings = {"image_processor_type": name, "size": {"height": 20, "width": 20}} | settings
    file = folder / ("processor_config.json" if nested else "preprocessor_config.json")
    file.write_text(json.dumps({"image_processor": settings} if nested else settings))
    return settings


@pytest.mark.parametrize("name", ["Gemma3ImageProcessor", "SiglipImageProcessor"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=list(SETTINGS))
def test_pixels_are_those_of_transformers(tmp_path, settings, name):
    pytest.importorskip("transformers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
        from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
    theirs = {"Gemma3ImageProcessor": Gemma3ImageProcessorPil, "SiglipImageProcessor": SiglipImageProcessorPil}[name]
    write(tmp_path, settings, nested="mean" in str(settings), name=name)
    given = {key: value for key, value in settings.items() if value is not None} | {"size": {"height": 20, "width": 20}}
    expected = theirs(**given)(Image.fromarray(PIXELS), return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    actual = preprocess(PIXELS, 20, image_processor.read(tmp_path, default="nearest"))
    np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-6)


def test_the_nested_file_comes_first(tmp_path):
    assert image_processor.read(tmp_path, default="bicubic") == ImageProcessor("bicubic")
    write(tmp_path, {"resample": 1})
    assert image_processor.read(tmp_path, default="bicubic").resampling == "lanczos"
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_seq_length": 256}))
    assert image_processor.read(tmp_path, default="bicubic").resampling == "lanczos"
    write(tmp_path, {"resample": 0}, nested=True)
    assert image_processor.read(tmp_path, default="bicubic").resampling == "nearest"


def test_a_folder_of_transformers_as_it_saves_it(tmp_path):
    transformers = pytest.importorskip("transformers")
    transformers.SiglipImageProcessor(image_mean=[0.1, 0.2, 0.3], size={"height": 8, "width": 8}).save_pretrained(
        tmp_path
    )
    expected = ImageProcessor("bicubic", mean=(0.1, 0.2, 0.3))
    assert image_processor.read(tmp_path, default="bilinear") == expected
    assert expected.limits == pytest.approx((-0.6, 1.8))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_processor_type": "CLIPImageProcessor"}, "CLIPImageProcessor'; supported: Gemma3ImageProcessor, Sigl"),
        ({"do_resize": False}, "do_resize = False; supported: true"),
        ({"do_center_crop": True}, "do_center_crop = True; supported: false"),
        ({"do_pan_and_scan": True}, "do_pan_and_scan = True; supported: false; give the number of crops"),
        ({"size": {"shortest_edge": 20}}, "size = {'shortest_edge': 20}; supported: a height and a width that are"),
        ({"size": {"height": 20, "width": 30}}, "supported: a height and a width that are equal"),
        ({"resample": 9}, r"resample = 9; supported: Pillow's numbers of filters: 0 \(nearest\), 1 \(lanczos\)"),
        ({"resample": "bicubic"}, "resample = 'bicubic'; supported: Pillow's numbers"),
        ({"image_mean": [0.5, 0.5]}, r"image_mean = \[0.5, 0.5\]; supported: a number, or three of them"),
        ({"image_std": [0.5, 0, 0.5]}, "supported: numbers above 0"),
        ({"rescale_factor": 0}, "rescale_factor = 0; supported: a number above 0"),
        ({"do_normalize": "no"}, "do_normalize = 'no'; supported: true or false"),
        ({"do_rescale": 1}, "do_rescale = 1; supported: true or false"),
    ],
)
def test_what_is_not_supported_is_an_error(tmp_path, settings, message):
    write(tmp_path, settings)
    with pytest.raises(UserError, match=f"preprocessor_config.json: .*{message}"):
        image_processor.read(tmp_path, default="bilinear")


@pytest.mark.parametrize("text", ["", "[]", "{", '{"image_processor": 1}'])
def test_a_damaged_file_is_an_error(tmp_path, text):
    (tmp_path / "processor_config.json").write_text(text)
    with pytest.raises(UserError, match=r"processor_config\.json"):
        image_processor.read(tmp_path, default="bilinear")
