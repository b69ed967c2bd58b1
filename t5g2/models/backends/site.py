"""One kind of attention in a model, described for the choice of a backend."""

from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Array

from t5g2.core.batch import Sequences
from t5g2.core.sharding import parts
from t5g2.models.backends.cut_columns import local_columns
from t5g2.models.masks import ALL, Keys, Mask


@dataclass(frozen=True)
class Site:
    """One kind of attention in a model: everything that a choice depends on. Shapes are those on one device.

    Attributes:
      queries: number of queries of a row.
      keys: number of keys of each source.
      masks: the mask of each source.
      own: index of the source whose tokens are the queries' own, in the order of their columns; None = there is none.
      blocks: queries have block ids, within which attention is bidirectional.
      dtype: type of queries, keys and values.
      combined: the keys are parts of all keys, and the parts of the softmax are combined over devices.
      score_offset: an offset is added to the scores of a source.
    """

    rows: int
    queries: int
    keys: tuple[int, ...]
    masks: tuple[Mask, ...]
    own: int | None
    heads: int
    head_size: int
    softcap: bool
    blocks: bool
    dtype: str
    combined: bool = False
    score_offset: bool = False

    @classmethod
    def of(cls, q_BTNH: Array, query: Sequences, sources: Sequence[tuple[Keys, Mask]], softcap: float | None) -> "Site":
        """Returns the site of a call of attention."""
        rows, length, heads, size = q_BTNH.shape
        own = [i for i, (keys, _) in enumerate(sources) if keys.tokens is query]
        masks = tuple(mask for _, mask in sources)
        keys = [(keys.k_BSKH.shape[1], keys.axis) for keys, _ in sources]
        blocks = query.blocks is not None
        here = local_columns(length, keys, masks, own=own[0] if own else None, blocks=blocks)
        return cls(
            rows=rows // parts("rows", rows),
            queries=here.queries,
            keys=here.keys,
            masks=masks,
            own=here.own,
            heads=heads // parts("heads_act", heads),
            head_size=size,
            softcap=softcap is not None,
            blocks=blocks,
            dtype=str(q_BTNH.dtype),
            combined=here.combined,
            score_offset=any(keys.score_offset is not None for keys, _ in sources),
        )

    @property
    def scores(self) -> int:
        """The number of pairs of a query and a key, over all rows and heads."""
        return self.rows * self.heads * self.queries * sum(self.keys)

    @property
    def columns_suffice(self) -> bool:
        """True if columns decide what is visible within a segment, where `columns.in_order` holds."""
        return not self.blocks and all(i == self.own or mask == ALL for i, mask in enumerate(self.masks))
