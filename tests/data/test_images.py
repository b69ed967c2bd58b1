"""Images: every kind of file, every kind of damage, and the same pixels as transformers' processors make."""

import io
import os
import struct
import subprocess
import sys
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from t5g2.core.errors import UserError
from t5g2.data import images
from t5g2.data.images import ImageProcessor, check_images, pan_and_scan, preprocess, read


@pytest.fixture(autouse=True)
def _every_warning_is_an_error():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def picture(height=48, width=64, seed=0):
    """Smooth colours, so that lossy formats keep them."""
    rough = np.random.RandomState(seed).randint(0, 256, (4, 5, 3)).astype(np.uint8)
    return Image.fromarray(rough).resize((width, height), Image.Resampling.BICUBIC)


NEEDS_AVIF = pytest.mark.skipif("AVIF" not in images.FORMATS, reason="this Pillow has no AVIF")


def encoded(image, kind="PNG", **settings):
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return file.getvalue()


@pytest.mark.parametrize(
    ("kind", "settings", "tolerance"),
    [
        ("PNG", {}, 0),
        ("WEBP", {"lossless": True}, 0),
        ("WEBP", {"quality": 95}, 20),
        ("JPEG", {"quality": 95}, 20),
        ("JPEG", {"quality": 95, "progressive": True}, 20),
        ("GIF", {}, 128),  # a palette
        ("BMP", {}, 0),
        ("TIFF", {}, 0),
        ("TIFF", {"compression": "tiff_lzw"}, 0),
        pytest.param("AVIF", {"quality": 95}, 20, marks=NEEDS_AVIF),
    ],
)
def test_formats_from_a_file_and_from_bytes(kind, settings, tolerance, tmp_path):
    data = encoded(picture(), kind, **settings)
    path = tmp_path / "picture"  # the name says nothing
    path.write_bytes(data)
    got = read(path)
    assert (got.dtype, got.shape) == (np.uint8, (48, 64, 3))
    assert got.flags.writeable
    np.testing.assert_allclose(got.astype(int), np.asarray(picture()).astype(int), atol=tolerance)
    np.testing.assert_array_equal(read(str(path)), got)
    np.testing.assert_array_equal(read(data), got)
    with path.open("rb") as file:
        np.testing.assert_array_equal(read(file), got)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_photos_stand_upright(kind, orientation):
    """Stored as the camera saw it, with a tag that says how it was held; shown as it was meant."""
    stored = Image.fromarray(np.kron([[0, 80], [160, 240]], np.ones((16, 24))).astype(np.uint8)).convert("RGB")
    corners = {  # of what is shown, in rows: top left, top right, bottom left, bottom right; EXIF 2.3, 4.6.4
        1: [0, 80, 160, 240],
        2: [80, 0, 240, 160],
        3: [240, 160, 80, 0],
        4: [160, 240, 0, 80],
        5: [0, 160, 80, 240],
        6: [160, 0, 240, 80],
        7: [240, 80, 160, 0],
        8: [80, 240, 0, 160],
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    got = read(encoded(stored, kind, exif=exif))
    assert got.shape == ((32, 48, 3) if orientation < 5 else (48, 32, 3))
    found = [int(got[y, x, 0]) for y in (4, -4) for x in (4, -4)]
    np.testing.assert_allclose(found, corners[orientation], atol=8)


def test_grey_of_every_depth_becomes_three_equal_channels():
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    expected = np.repeat(ramp[:, :, None], 3, axis=2)
    np.testing.assert_array_equal(read(encoded(Image.fromarray(ramp))), expected)
    np.testing.assert_array_equal(read(encoded(Image.fromarray(ramp.astype(np.uint16) * 257))), expected)
    one_bit = Image.fromarray(ramp > 100)
    np.testing.assert_array_equal(read(encoded(one_bit)), np.where(expected > 100, 255, 0))
    between = read(encoded(Image.fromarray(np.full((2, 2), 1000, np.uint16))))
    assert (between == 4).all()  # 1000 / 257 = 3.9


def test_an_open_image_of_pillow_is_read_as_its_file_is(tmp_path):
    grey = (np.arange(12, dtype=np.uint16).reshape(3, 4) * 5957).astype(np.uint16)
    (tmp_path / "grey.png").write_bytes(encoded(Image.fromarray(grey)))
    with Image.open(tmp_path / "grey.png") as opened:
        assert opened.mode == "I;16"
        np.testing.assert_array_equal(images.from_pillow(opened)[:, :, 1], np.round(grey / 257))
    np.testing.assert_array_equal(images.from_pillow(Image.fromarray(grey)), read(tmp_path / "grey.png"))
    palette = picture().quantize(16)
    np.testing.assert_array_equal(images.from_pillow(palette), np.asarray(palette.convert("RGB")))
    with pytest.raises(UserError, match="the image given as a PIL image holds floats, whose range is unknown"):
        images.from_pillow(Image.fromarray(np.ones((2, 2), np.float32)))


def test_an_open_image_that_is_damaged_or_too_large(monkeypatch):
    cut_off = Image.open(io.BytesIO(encoded(picture(), "JPEG")[:-100]))
    with pytest.raises(UserError, match="the JPEG given as a PIL image cannot be read, it is damaged or cut off"):
        images.from_pillow(cut_off)
    with pytest.raises(UserError, match="the image given as a PIL image has 0 x 4 pixels, so it is empty"):
        images.from_pillow(Image.new("RGB", (0, 4)))
    monkeypatch.setattr(images, "MAX_PIXELS", 100)
    with pytest.raises(UserError, match="has 64 x 48 pixels; images have at most 100 pixels"):
        images.from_pillow(picture())


def test_an_open_file_that_gives_no_bytes(tmp_path):
    (tmp_path / "text").write_text("text")
    with (tmp_path / "text").open() as file, pytest.raises(UserError, match="gives str instead of bytes; open it with"):
        read(file)
    with pytest.raises(UserError, match="the image given as an open file cannot be read: I/O operation on closed file"):
        read(file)


def test_palettes_and_transparency():
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255]], np.uint8)
    indices = np.arange(12).reshape(3, 4) % 3
    palette = Image.new("P", (4, 3))
    palette.putdata(indices.ravel().tolist())
    palette.putpalette(colours.ravel().tolist())
    np.testing.assert_array_equal(read(encoded(palette)), colours[indices])
    # a transparency for each colour of the palette: Pillow warns when it is converted at once
    np.testing.assert_array_equal(read(encoded(palette, transparency=bytes([0, 128, 255]))), colours[indices])
    alpha = np.concatenate([colours[indices], np.full((3, 4, 1), 7, np.uint8)], axis=2)
    np.testing.assert_array_equal(read(encoded(Image.fromarray(alpha))), colours[indices])
    grey_alpha = Image.fromarray(np.stack([indices * 90, indices * 0], axis=2).astype(np.uint8))
    assert grey_alpha.mode == "LA"
    np.testing.assert_array_equal(read(encoded(grey_alpha))[:, :, 1], indices * 90)


def test_cmyk():
    ink = Image.new("CMYK", (8, 8), (0, 255, 255, 0))  # magenta and yellow: red
    assert read(encoded(ink, "JPEG"))[4, 4].tolist() == pytest.approx([255, 0, 0], abs=4)


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_the_first_frame_of_an_animation(kind):
    first, second = picture(seed=1), picture(seed=2)
    settings = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(first, kind, save_all=True, append_images=[second], **settings)
    assert Image.open(io.BytesIO(data)).n_frames == 2
    np.testing.assert_array_equal(read(data), np.asarray(first))


DICOM = b"\0" * 128 + b"DICM" + b"\2\0" * 100


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (encoded(picture(), "PDF"), "a PDF"),
        (DICOM, "a DICOM file"),
        (b"\0\0\0\x18ftypheic" + b"\0" * 50, "a HEIC"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "an SVG"),
        (b"What is in this picture?", "not an image"),
        (b"\0" * 1000, "not an image"),
        (b"\xff\xd8", "a JPEG that is damaged, cut off or of an unknown kind"),
        (encoded(picture())[:10], "a PNG that is damaged, cut off or of an unknown kind"),
        (encoded(picture(), "WEBP")[:10], "a WebP that is damaged, cut off or of an unknown kind"),
        (encoded(picture(), "GIF")[:8], "a GIF that is damaged, cut off or of an unknown kind"),
        (encoded(picture(), "TIFF")[:8], "a TIFF that is damaged, cut off or of an unknown kind"),
        (b"\0\0\0\x1cftypavif" + b"\0" * 50, "an AVIF that is damaged, cut off or of an unknown kind"),
    ],
)
def test_what_is_no_image_is_named(data, kind, tmp_path):
    path = tmp_path / "scan.jpg"
    path.write_bytes(data)
    with pytest.raises(UserError) as error:
        read(path)
    assert str(error.value) == f"{path} is {kind}; {images.ALLOWED}, so convert it or get it again"


def test_an_empty_file_a_folder_and_no_file(tmp_path):
    (tmp_path / "empty.png").touch()
    with pytest.raises(UserError, match=r"empty\.png is empty; images are JPEG, PNG, WebP, GIF, BMP, TIFF or AVIF"):
        read(tmp_path / "empty.png")
    with pytest.raises(UserError, match="is a folder; give the file of one image"):
        read(tmp_path)
    with pytest.raises(UserError, match=r"none\.png' cannot be opened: No such file or directory; give the path"):
        read(tmp_path / "none.png")
    with pytest.raises(UserError, match=r"'a\\x00b' cannot be opened: embedded null byte"):
        read("a\0b")
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(UserError, match=r"pipe\.png is not a file"):
        read(tmp_path / "pipe.png")
    with pytest.raises(UserError, match="the image given as bytes is empty"):
        read(b"")
    with pytest.raises(UserError, match="image 3 of row 1 is empty"):
        read(b"", name="image 3 of row 1")


SETTINGS = [("PNG", {}), ("JPEG", {}), ("JPEG", {"progressive": True}), ("WEBP", {}), ("WEBP", {"lossless": True})]
SETTINGS += [("GIF", {}), ("BMP", {}), ("TIFF", {}), ("TIFF", {"compression": "tiff_adobe_deflate"})]


@pytest.mark.parametrize(("kind", "settings"), SETTINGS)
def test_a_file_cut_off_anywhere_is_whole_or_refused(kind, settings):
    data = encoded(picture(24, 32), kind, **settings)
    whole, refused = read(data), 0
    for length in range(len(data)):
        try:
            got = read(data[:length])
        except UserError:
            refused += 1
        else:
            np.testing.assert_array_equal(got, whole)
    assert refused >= len(data) - 12  # a PNG's last chunk may be missing


@pytest.mark.parametrize(("kind", "settings"), SETTINGS)
def test_damage_anywhere_is_read_or_refused_and_nothing_else(kind, settings):
    data, draw = encoded(picture(24, 32), kind, **settings), np.random.RandomState(0)
    refused = 0
    for _ in range(400):
        damaged = bytearray(data)
        for at in draw.randint(0, len(data), draw.randint(1, 5)):
            damaged[at] = draw.randint(256)
        try:
            assert read(bytes(damaged)).dtype == np.uint8
        except UserError:
            refused += 1
    assert refused > {"PNG": 350, "BMP": 2}.get(kind, 5)  # its chunks have checksums; those of others would do no harm


def test_a_flipped_bit_in_the_pixels_of_a_png_is_seen():
    data = bytearray(encoded(picture(), compress_level=0))
    data[len(data) // 2] ^= 1
    with pytest.raises(UserError, match="damaged or cut off"):
        read(bytes(data))


def png_of(width, height):
    """The head of a PNG that says it is so large, and no pixels."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_bombs():
    """An image that Pillow would warn of and read, and one that it would refuse."""
    assert images.MAX_PIXELS == Image.MAX_IMAGE_PIXELS
    most = "images have at most 89478485 pixels, so make it smaller"
    with pytest.raises(UserError, match=f"bytes has 10000 x 9000 pixels; {most}"):
        read(png_of(10_000, 9_000))
    with pytest.raises(UserError, match=f"declares more than 178956970 pixels; {most}"):
        read(png_of(100_000, 100_000))
    with pytest.raises(UserError, match="damaged or cut off"):
        read(png_of(100, 100))


def test_a_huge_file_is_not_read_to_its_end(monkeypatch, tmp_path):
    monkeypatch.setattr(images, "MAX_BYTES", 2**20)
    with (tmp_path / "huge.png").open("wb") as file:
        file.truncate(2**40)  # a hole, which takes no space
    with pytest.raises(UserError, match=r"huge\.png has more than 1 MiB"):
        read(tmp_path / "huge.png")


def test_values():
    """0, 127.5 and 255 are -1, 0 and 1."""
    assert preprocess(np.zeros((2, 3, 3), np.uint8), 4).tolist() == np.full((4, 4, 3), -1.0).tolist()
    white = preprocess(np.full((2, 3, 3), 255, np.uint8), 4)
    assert (white.dtype, white.min(), white.max()) == (np.float32, 1.0, 1.0)
    levels = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    np.testing.assert_allclose(preprocess(levels, 16), levels / 127.5 - 1, atol=1e-7)


def test_the_aspect_ratio_is_ignored_and_small_details_are_averaged():
    wide = np.zeros((10, 400, 3), np.uint8)
    wide[:, 200:] = 200
    got = preprocess(wide, 20)
    assert got.shape == (20, 20, 3)
    np.testing.assert_allclose(got[:, 0], -1)
    np.testing.assert_allclose(got[:, -1], 200 / 127.5 - 1, atol=1e-6)
    checkers = (255 * (np.indices((256, 256)).sum(axis=0) % 2)).astype(np.uint8)[:, :, None].repeat(3, axis=2)
    assert np.abs(preprocess(checkers, 16)).max() < 0.01  # and not the -1 and 1 of single pixels


def test_resamplings_differ_and_others_are_refused():
    given = np.asarray(picture())
    assert np.abs(preprocess(given, 20) - preprocess(given, 20, ImageProcessor("bicubic"))).max() > 0.01
    with pytest.raises(UserError, match=r"unknown resampling 'bilinaer' of ImageProcessor; did you mean 'bilinear'\?"):
        preprocess(given, 20, ImageProcessor("bilinaer"))
    with pytest.raises(UserError, match=r"the image is float64\[2, 2, 3\]; it must be uint8\[height, width, 3\]"):
        preprocess(np.zeros((2, 2, 3)), 20)
    with pytest.raises(UserError, match=r"the image is uint8\[0, 2, 3\]"):
        preprocess(np.zeros((0, 2, 3), np.uint8), 20)


def test_crops_of_the_example():
    given = np.arange(300 * 600 * 3).reshape(300, 600, 3).astype(np.uint8)
    left, right = pan_and_scan(given)
    np.testing.assert_array_equal(left, given[:, :300])
    np.testing.assert_array_equal(right, given[:, 300:])
    upper, lower = pan_and_scan(given.transpose(1, 0, 2))
    np.testing.assert_array_equal(lower, given.transpose(1, 0, 2)[300:])
    assert upper.shape == (300, 300, 3)
    assert pan_and_scan(given[:, :350]) == []  # ratio 1.17
    assert pan_and_scan(given[:255, :]) == []  # crops 255 pixels high


def test_counts_of_images():
    tokens = np.array([[5, 8, 8, 9, 8, 8], [5, 8, 8, 9, 9, 9], [5, 5, 5, 5, 5, 5]])
    check_images(tokens, 8, tokens_per_image=2, images_per_row=[2, 1, 0])
    check_images(np.zeros((0, 6), int), 8, tokens_per_image=2, images_per_row=[])
    with pytest.raises(UserError, match=r"row 1 has 2 image tokens \(id 8\) and 2 images, which take 4 \(2 each\)"):
        check_images(tokens, 8, tokens_per_image=2, images_per_row=[2, 2, 0])
    with pytest.raises(UserError, match=r"row 0 has 4 image tokens \(id 8\) and 0 images, which take 0"):
        check_images(tokens, 8, tokens_per_image=2, images_per_row=[0, 0, 0])
    with pytest.raises(UserError, match="images are given for 2 rows and there are 3 rows of tokens"):
        check_images(tokens, 8, tokens_per_image=2, images_per_row=[2, 1])


def test_no_jax():
    code = "import sys, t5g2.data.images; print([m for m in ('jax', 'flax', 'torch') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.fixture(scope="module")
def transformers():
    """transformers' processors need no torch; they are not installed everywhere."""
    if not (os.environ.get("CI") and sys.version_info[:2] == (3, 11)):
        pytest.importorskip("transformers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers
        from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
        from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
    transformers.gemma3, transformers.siglip = Gemma3ImageProcessorPil, SiglipImageProcessorPil
    return transformers


HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "return_tensors": "np"}
SHAPES = [(48, 64), (97, 31), (20, 20), (7, 211), (300, 301)]


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(("kind", "resampling"), [("gemma3", "bilinear"), ("siglip", "bicubic")])
def test_pixels_are_those_of_transformers(transformers, kind, resampling):
    process = getattr(transformers, kind)()
    for size in (20, 56):
        for number, shape in enumerate(SHAPES):
            given = picture(*shape, seed=number)
            said = process(given, size={"height": size, "width": size}, **HALF)["pixel_values"]
            got = preprocess(np.asarray(given), size, ImageProcessor(resampling))
            np.testing.assert_allclose(got, np.asarray(said)[0].transpose(1, 2, 0), atol=3e-7)
    # the whole of what is uint8 in between is the same
    np.testing.assert_array_equal(np.round((got + 1) * 127.5) % 1, 0)


@pytest.mark.filterwarnings("default")
def test_files_are_read_as_transformers_reads_them(transformers, tmp_path):
    from transformers.image_utils import load_image

    exif = Image.Exif()
    exif[0x0112] = 6
    kinds = {
        "a.jpg": encoded(picture(), "JPEG", exif=exif),
        "b.png": encoded(picture().convert("RGBA")),
        "c.webp": encoded(picture(), "WEBP"),
        "d.png": encoded(picture().convert("L")),
        "e.png": encoded(picture().quantize(16)),
        "f.jpg": encoded(picture().convert("CMYK"), "JPEG"),
    }
    for name, data in kinds.items():
        (tmp_path / name).write_bytes(data)
        np.testing.assert_array_equal(read(tmp_path / name), np.asarray(load_image(str(tmp_path / name))), err_msg=name)


@pytest.mark.filterwarnings("default")
def test_crops_are_those_of_transformers(transformers):
    process = transformers.gemma3()
    shapes = [(300, 600), (600, 300), (256, 306), (256, 307), (255, 2000), (300, 360), (300, 359), (257, 1000)]
    shapes += [(1000, 257), (511, 512), (512, 1536), (700, 2450), (2451, 700), (513, 514), (400, 10_000), (640, 767)]
    found = set()
    for height, width in shapes:
        given = np.random.RandomState(height).randint(0, 256, (height, width, 3)).astype(np.uint8)
        for crops in (4, 2, 6):
            said = process.pan_and_scan(given.transpose(2, 0, 1), 256, crops, 1.2)
            got = pan_and_scan(given, max_crops=crops)
            assert len(got) == len(said), (height, width)
            found.add(len(got))
            for ours, theirs in zip(got, said, strict=True):
                np.testing.assert_array_equal(ours, theirs.transpose(1, 2, 0))
    assert found == {0, 2, 3, 4, 6}
