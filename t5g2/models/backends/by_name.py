"""The attention backends by name.

All but the reference run on each device's own rows, heads and columns (`per_device`).
"""

from t5g2.models.backends import blockwise, cudnn, reference, splash
from t5g2.models.backends.per_device import per_device

BACKENDS = {
    # XLA cuts it up itself
    "reference": reference.attend,
    "blockwise": per_device(blockwise.attend, combines=True),
    "splash": per_device(splash.attend),
    "cudnn": per_device(cudnn.attend),
}
