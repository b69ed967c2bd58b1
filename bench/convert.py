"""Memory that import and export take: a checkpoint of 4 GB, each step in a fresh process.

The checkpoint has the shapes of Gemma 3 1B, with more layers, in bfloat16; its largest tensor is the embedding, 0.6 GB.
Memory is the most that was resident (VmHWM in /proc/self/status) less what was resident when everything was imported
and nothing was loaded, in 10^9 bytes; pages of a file that is mapped count. Everything is written to the temporary
folder (TMPDIR), 8 GB at most at a time, and removed.

Must: import and export at most 1.2 GB. Measured on 2 CPU cores, jax 0.10.2, 4.04 GB of bfloat16 (GB over idle):

    read every tensor with the safetensors library (mmap, 2 GB shards)   2.02
    read every tensor                                                    0.60
    read and write every tensor                                          0.60
    import                                                               0.61
    export                                                               0.61
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"

import ml_dtypes
import numpy as np
import safetensors

from t5g2.checkpoint import export_folder, flax_tree, hf_config_writer, import_folder, names, safetensors_io
from t5g2.checkpoint.tensor import Tensor
from t5g2.core import tree
from t5g2.models import build, sizes

LAYERS = 64
SHARD_BYTES = 2 * 10**9
LIMIT = 1.2e9
NEEDED = 9 * 10**9


def make(out: Path) -> dict[str, float]:
    """A Hugging Face folder of a pattern that every tensor begins elsewhere; the sizes of it."""
    config = replace(sizes.size("gemma3:1b"), layers=LAYERS)
    layout, data = hf_config_writer.write(config, dtype="bfloat16")
    tied = names.match_tensors(layout, tree.leaves(build.abstract(config)))

    def tensor(number: int, shape: tuple[int, ...]) -> Tensor:
        def pattern() -> np.ndarray:
            count = np.arange(number, number + int(np.prod(shape)), dtype=np.uint32)
            return (count % 0x4000).astype(np.uint16).view(ml_dtypes.bfloat16).reshape(shape)  # finite, all of them

        return Tensor(shape, np.dtype(ml_dtypes.bfloat16), pattern)

    tensors = {one.name: tensor(number, one.shape) for number, one in enumerate(tied)}
    safetensors_io.write(out, tensors, shard_bytes=SHARD_BYTES, metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(data))
    sizes_bytes = [tensor.size_bytes for tensor in tensors.values()]
    return {"all": sum(sizes_bytes) / 1e9, "largest": max(sizes_bytes) / 1e9}


def look_at_all(source: Path, out: Path):
    for tensor in safetensors_io.read(source).values():
        tensor.read()[..., -1].sum()


def look_at_all_mapped(source: Path, out: Path):
    for path in sorted(source.glob("*.safetensors")):
        with safetensors.safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                file.get_tensor(name)[..., -1].sum()


def write_again(source: Path, out: Path):
    out.mkdir()
    safetensors_io.write(out, safetensors_io.read(source), shard_bytes=SHARD_BYTES)


def import_(source: Path, out: Path):
    import_folder.import_model(source, out)


def export(source: Path, out: Path):
    export_folder.export_model(source, out)


STEPS = {
    "read every tensor with the safetensors library": look_at_all_mapped,
    "read every tensor": look_at_all,
    "read and write every tensor": write_again,
    "import": import_,
    "export": export,
}


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process, bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def measured(step: str, source: Path, out: Path) -> float:
    """The memory that the step took over the idle process, in a process of its own, in 10^9 bytes."""
    done = subprocess.run([sys.executable, __file__, step, source, out], check=True, stdout=subprocess.PIPE, text=True)
    return int(done.stdout.split()[-1]) / 1e9


def main():
    if not Path("/proc/self/status").exists():
        print("memory is read from /proc/self/status, which only Linux has")
        return
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        if (free := shutil.disk_usage(folder).free) < NEEDED:
            sys.exit(f"{folder} has {free / 1e9:.1f} GB of space; {NEEDED / 1e9:.0f} are needed (TMPDIR says where)")
        source, again, model, out = (folder / name for name in ("source", "again", "model", "out"))
        source.mkdir()
        size = make(source)
        print(f"{size['all']:.2f} GB, of which the largest tensor {size['largest']:.2f}\n", flush=True)
        print("| step | memory over idle, GB | times the largest tensor |\n|---|---|---|", flush=True)
        for step in STEPS:
            if step == "export":
                shutil.rmtree(source)
            start, end = (model, out) if step == "export" else (source, model if step == "import" else again)
            took = measured(step, start, end)
            shutil.rmtree(again, ignore_errors=True)
            missed = " (must be 1.20)" if step in ("import", "export") and took > LIMIT / 1e9 else ""
            print(f"| {step} | {took:.2f}{missed} | {took / size['largest']:.2f} |", flush=True)


if __name__ == "__main__":
    if len(sys.argv) == 1:
        main()
    else:
        assert flax_tree  # imported where it is used by `import`: part of the idle process
        idle = resident("VmRSS")
        STEPS[sys.argv[1]](Path(sys.argv[2]), Path(sys.argv[3]))
        print(resident("VmHWM") - idle)
