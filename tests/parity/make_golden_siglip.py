"""Writes golden/siglip.npz: outputs of transformers' SigLIP for some of the cases, for machines without torch.

python -m tests.parity.make_golden_siglip
"""

from pathlib import Path

import numpy as np
import torch
import transformers

from tests.parity import siglip_cases as cases
from tests.parity import siglip_reference as reference

FILE = Path(__file__).parent / "golden" / "siglip.npz"


@torch.no_grad()
def main():
    arrays = {"transformers": np.array(transformers.__version__)}
    for name in cases.GOLDEN:
        if name in cases.TOWERS:
            model = cases.tower(name)
            output = reference.run_tower(reference.tower(model), cases.images(cases.TOWERS[name]))
            arrays[f"tower: {name}"], arrays[f"tower: {name}: weights"] = output.numpy(), cases.checksum(model)
        if name in cases.DUALS:
            model, config = cases.dual_encoder(name), cases.DUALS[name]
            output = reference.run_dual(reference.dual_encoder(model), cases.texts(config), cases.images(config.vision))
            arrays[f"dual: {name}"] = output.logits_per_text.numpy()
            arrays[f"dual: {name}: weights"] = cases.checksum(model)
        if name in cases.PROJECTORS:
            config, width = cases.PROJECTORS[name]
            model = cases.projector(name)
            output = reference.run_projector(reference.projector(model, width), cases.patches(config))
            arrays[f"projector: {name}"] = output.numpy()
            arrays[f"projector: {name}: weights"] = cases.checksum(model)
    np.savez_compressed(FILE, **arrays)
    print(f"{FILE}: {FILE.stat().st_size / 1000:.0f} kB, {len(cases.GOLDEN)} cases")


if __name__ == "__main__":
    main()
