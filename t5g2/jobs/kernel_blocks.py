"""The blocks that the attention kernel of TPUs goes through: all but those that its mask hides as a whole."""

import math
from collections.abc import Mapping

import numpy as np

from t5g2.models.backends.site import Site


def site_of(scope: str, sites: Mapping[str, Site]) -> Site | None:
    """Returns the site that a dotted scope is of, `decoder.local` of `decoder.local.merged`; None if there is none."""
    side, *rest = scope.split(".")
    return sites.get(f"{side}.cross" if "cross" in rest else ".".join([side, *rest[:1]]))


def visible_pairs(site: Site, q_block: int, k_block: int) -> int:
    """Returns the pairs of a query and a key in blocks of which the mask shows any, of one row and one head.

    Keys of other sources come first; all of them are visible, as far as the mask knows.
    """
    before = sum(keys for i, keys in enumerate(site.keys) if i != site.own)
    first_query = np.arange(0, site.queries, q_block)[:, None]
    first_key = np.arange(0, sum(site.keys), k_block)[None, :]
    visible = np.broadcast_to(first_key < before, (len(first_query), first_key.shape[1]))
    if site.own is not None:
        mask = site.masks[site.own]
        # how far the keys of a block are ahead of the queries of another: at least, and at most
        least = first_key - before - (first_query + q_block - 1)
        most = first_key + k_block - 1 - before - first_query
        left = math.inf if mask.left is None else mask.left
        right = min(0 if mask.causal else math.inf, math.inf if mask.right is None else mask.right)
        visible = visible | ((most >= -left) & (least <= right))
    return int(np.sum(visible)) * q_block * k_block
