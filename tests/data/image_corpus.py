"""Small pictures and texts about them, in each of the files that sources read; made when a test runs."""

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from t5g2.data.image_tokens import ImageRows
from t5g2.data.sources.image_text import ImageJsonl, ImageParquet, WebDataset

SIZE = 16
# ids of data.tokenizer.Bytes; 4 tokens an image
ROWS = ImageRows(per_row=3, size=SIZE, tokens=4, token=7, begin=5, end=6)
COLORS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "white": (255, 255, 255), "grey": (90, 90, 90)}
NAMES = tuple(COLORS)
# (text, colors of its images)
RECORDS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("this is red", ("red",)),
    ("here <start_of_image> is green", ("green",)),
    ("<start_of_image> and <start_of_image> are blue and white", ("blue", "white")),
    ("no picture at all here", ()),
    ("grey it is", ("grey",)),
)


def picture(color: str, *, format: str = "PNG", size: tuple[int, int] = (20, 14)) -> bytes:
    """The file of a picture: one color, and a few pixels of noise that follow from it."""
    pixels = np.full((*size, 3), COLORS[color], np.uint8)
    rng = np.random.default_rng(NAMES.index(color))
    pixels[rng.integers(0, size[0], 9), rng.integers(0, size[1], 9)] = rng.integers(0, 256, (9, 3))
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, format)
    return out.getvalue()


def marked(text: str, count: int) -> str:
    """A text as documents give it: it says where each image is."""
    return text if "<start_of_image>" in text or not count else "<start_of_image>" * count + text


def jsonl(folder: Path, records: Sequence[tuple[str, Sequence[str]]] = RECORDS) -> ImageJsonl:
    """A file of lines in a folder, and pictures in a folder beside it."""
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    lines = []
    for text, colors in records:
        for color in colors:
            (folder / "pictures" / f"{color}.png").write_bytes(picture(color))
        lines.append(json.dumps({"text": text, "images": [f"pictures/{color}.png" for color in colors]}))
    (folder / "corpus.jsonl").write_text("\n".join(lines) + "\n")
    return ImageJsonl(str(folder))


def parquet(folder: Path, records: Sequence[tuple[str, Sequence[str]]] = RECORDS, *, structs: bool) -> ImageParquet:
    """Two files of rows with the pictures' bytes, or with Hugging Face's structs of them."""
    import pyarrow
    from pyarrow import parquet as files

    folder.mkdir(parents=True, exist_ok=True)
    for number, part in enumerate((records[:2], records[2:])):
        cells = [[picture(color) for color in colors] for _, colors in part]
        images = [[{"bytes": data, "path": "a.png"} for data in cell] for cell in cells] if structs else cells
        table = pyarrow.table({"text": [text for text, _ in part], "images": images})
        files.write_table(table, folder / f"{number}.parquet")
    return ImageParquet(str(folder))


def webdataset(folder: Path, records: Sequence[tuple[str, Sequence[str]]] = RECORDS) -> WebDataset:
    """Two tar files of samples; those without an image are left out."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, part in enumerate((records[:2], records[2:])):
        with tarfile.open(folder / f"{number}.tar", "w") as out:
            for key, (text, colors) in enumerate(part):
                if colors:
                    members = {"txt": text.encode()} | {f"{i}.png": picture(c) for i, c in enumerate(colors)}
                    add(out, f"{key:04}", members)
    return WebDataset(str(folder))


def add(archive: tarfile.TarFile, key: str, members: dict[str, bytes]) -> None:
    """Adds a sample."""
    for ending, data in members.items():
        info = tarfile.TarInfo(f"{key}.{ending}")
        info.size = len(data)
        archive.addfile(info, io.BytesIO(data))
