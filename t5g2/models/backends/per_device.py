"""Attention on each device's own rows, heads and columns, for what XLA cannot cut up: kernels, loops led by data."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from t5g2.core import sharding
from t5g2.core.batch import Sequences
from t5g2.models.backends import cut_columns
from t5g2.models.masks import Keys, Mask


class _Places(NamedTuple):
    """Mesh axes that attention is cut over.

    Attributes:
      queries: of each axis of q_BTNH and of the output.
      keys: of each axis of the keys and values of each source.
      columns: mesh axes that the columns of keys are cut over, or None, and their parts.
      head: () -> the one of its key/value heads that a device's query heads share; None = they have all of theirs.
    """

    queries: P
    keys: list[P]
    columns: Any
    parts: int
    head: Callable[[], Array] | None


def per_device(attend: Callable, *, combines: bool = False) -> Callable:
    """Returns `attend`, run in jax.shard_map where a mesh of several devices is set.

    Rows and query heads are cut as elsewhere. Key/value heads are cut with the query heads; where the mesh does not
    divide them, every device holds them all and takes the one that its query heads share, and its gradients are summed
    over devices after the backward pass. Columns are cut as `cut_columns` says.

    Args:
      combines: `attend` has the argument `combine`: mesh axes over which it combines parts of one softmax.
    """
    over_columns = cut_columns.attend_combined if combines else cut_columns.attend_with_queries_cut

    def cut(q_BTNH, query: Sequences, sources: Sequence[tuple[Keys, Mask]], *, scale, softcap, dtype):
        options = {"scale": scale, "softcap": softcap, "dtype": dtype}
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty or mesh.size == 1:
            return attend(q_BTNH, query, sources, **options)
        places = _places(q_BTNH, query, sources)
        # the tokens of the queries are an argument of their own, and are recognised inside by their place
        own = [keys.tokens is query for keys, _ in sources]
        others = [None if same else keys.tokens for same, (keys, _) in zip(own, sources, strict=True)]

        def local(q_BTNH, query, others, keys_values, offsets):
            if (head := places.head) is not None:
                take = lambda x: jax.lax.dynamic_slice_in_dim(x, head(), 1, axis=2)  # noqa: E731
                keys_values = jax.tree.map(take, keys_values)
            local_sources = [
                (Keys(pair[0], pair[1], query if same else tokens, score_offset=offset), mask)
                for pair, tokens, same, offset, (_, mask) in zip(
                    keys_values, others, own, offsets, sources, strict=True
                )
            ]
            if places.columns is None:
                return attend(q_BTNH, query, local_sources, **options)
            over = {"axes": places.columns, "parts": places.parts}
            if places.queries[1] is not None:
                return cut_columns.attend_own(attend, q_BTNH, query, *local_sources[0], **over, **options)
            here = [spec[1] is not None for spec in places.keys]
            return over_columns(attend, q_BTNH, query, local_sources, here, **over, **options)

        keys_values = [(keys.k_BSKH, keys.v_BSKH) for keys, _ in sources]
        offsets = [keys.score_offset for keys, _ in sources]
        rows = P(places.queries[0])
        in_specs = (places.queries, rows, rows, [(spec, spec) for spec in places.keys], P())
        # the loops differ between devices, and so does what they hold: nothing is known to be equal on all
        run = jax.shard_map(local, in_specs=in_specs, out_specs=places.queries, check_vma=False)
        return run(q_BTNH, query, others, keys_values, offsets)

    return cut


def _places(q_BTNH: Array, query: Sequences, sources: Sequence[tuple[Keys, Mask]]) -> _Places:
    """Returns what the current mesh cuts."""
    mesh = jax.sharding.get_abstract_mesh().shape
    heads, kv_heads = q_BTNH.shape[2], sources[0][0].k_BSKH.shape[2]
    axis = next((keys.axis for keys, _ in sources if keys.tokens is query), "length")
    q_spec = sharding.spec(("rows", axis, "heads_act", None), q_BTNH.shape, mesh)
    specs = [sharding.spec(("rows", x.axis, "kv_heads_act", None), x.k_BSKH.shape, mesh) for x, _ in sources]
    columns = next((spec[1] for spec in specs if spec[1] is not None), None)
    parts = max(sharding.parts(keys.axis, keys.k_BSKH.shape[1]) for keys, _ in sources)
    local_heads, shared = heads // sharding.parts("heads_act", heads), heads // kv_heads
    # a device's query heads must be all those of some key/value heads, or some of those of one
    if local_heads % shared and shared % local_heads:
        return _Places(P(*q_spec[:2]), [P(*spec[:2]) for spec in specs], columns, parts, None)
    head = None
    if q_spec[2] is not None and specs[0][2] is None:
        head = lambda: jax.lax.axis_index(q_spec[2]) * local_heads // shared  # noqa: E731
    return _Places(q_spec, specs, columns, parts, head)
