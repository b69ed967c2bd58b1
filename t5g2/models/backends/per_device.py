"""Attention on each device's own rows and heads, for what XLA cannot cut up: kernels, and loops led by data."""

from collections.abc import Callable, Sequence

import jax
from jax.sharding import PartitionSpec as P

from t5g2.core import sharding
from t5g2.core.batch import Sequences
from t5g2.models.masks import Keys, Mask


def per_device(attend: Callable) -> Callable:
    """Returns `attend`, run in jax.shard_map where a mesh of several devices is set.

    Rows and query heads are cut as elsewhere. Key/value heads are cut with the query heads; where the mesh does not
    divide them, every device holds them all and takes the one that its query heads share, and its gradients are summed
    over devices after the backward pass.
    """

    def cut(q_BTNH, query: Sequences, sources: Sequence[tuple[Keys, Mask]], *, scale, softcap, dtype):
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty or mesh.size == 1:
            return attend(q_BTNH, query, sources, scale=scale, softcap=softcap, dtype=dtype)
        heads, kv_heads = q_BTNH.shape[2], sources[0][0].k_BSKH.shape[2]
        q_spec, kv_spec = (
            sharding.spec(("rows", None, axis, None), x.shape, mesh.shape)
            for axis, x in (("heads_act", q_BTNH), ("kv_heads_act", sources[0][0].k_BSKH))
        )
        rows, axes = P(q_spec[0]), q_spec[2]
        local_heads, shared = heads // sharding.parts("heads_act", heads), heads // kv_heads
        # a device's query heads must be all those of some key/value heads, or some of those of one
        if local_heads % shared and shared % local_heads:
            q_spec, kv_spec, axes = rows, rows, None
        one_of_many = axes is not None and kv_spec[2] is None

        # the tokens of the queries are an argument of their own, and are recognised inside by their place
        own = [keys.tokens is query for keys, _ in sources]
        others = [None if same else keys.tokens for same, (keys, _) in zip(own, sources, strict=True)]

        def local(q_BTNH, query, others, keys_values):
            if one_of_many:
                index = jax.lax.axis_index(axes) * local_heads // shared
                take = lambda x: jax.lax.dynamic_slice_in_dim(x, index, 1, axis=2)  # noqa: E731
                keys_values = jax.tree.map(take, keys_values)
            local_sources = [
                (Keys(pair[0], pair[1], query if same else tokens), mask)
                for pair, tokens, same, (_, mask) in zip(keys_values, others, own, sources, strict=True)
            ]
            return attend(q_BTNH, query, local_sources, scale=scale, softcap=softcap, dtype=dtype)

        keys_values = [(keys.k_BSKH, keys.v_BSKH) for keys, _ in sources]
        # the loops differ between devices, and so does what they hold: nothing is known to be equal on all
        run = jax.shard_map(local, in_specs=(q_spec, rows, rows, kv_spec), out_specs=q_spec, check_vma=False)
        return run(q_BTNH, query, others, keys_values)

    return cut
