"""Writes golden/logits.npz: outputs of transformers for some of the cases, for machines without torch.

python -m tests.parity.make_golden
"""

import tempfile
from pathlib import Path

import numpy as np
import transformers

from tests import weights
from tests.parity import cases, reference

FILE = Path(__file__).parent / "golden" / "logits.npz"


def main():
    arrays = {"transformers": np.array(transformers.__version__)}
    for name, case in cases.GOLDEN.items():
        with tempfile.TemporaryDirectory() as folder:
            model = reference.make(weights.model(case.config), Path(folder))
        arrays[name] = reference.run(model, case).detach().numpy()
        arrays[f"{name}: weights"] = np.array(weights.checksum(case.config))
    np.savez_compressed(FILE, **arrays)
    print(f"{FILE}: {FILE.stat().st_size / 1000:.0f} kB, {len(cases.GOLDEN)} cases")


if __name__ == "__main__":
    main()
