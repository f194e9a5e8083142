"""What one rank of the pipeline has to do in a step: of which layers, for how many positions at a time."""

from __future__ import annotations

from dataclasses import dataclass

from fourfold.planning.activations import own_keys
from fourfold.planning.job import Job, Recompute
from fourfold.planning.layer_sums import LayerSums, sum_layers
from fourfold.planning.layout import Layout
from fourfold.planning.shape import ModelShape
from fourfold.planning.stages import min_microbatches
from fourfold.planning.states import Part, Stage, outer_part, stage_of


@dataclass(frozen=True, slots=True)
class RankWork:
    """A rank's part of a step.

    Attributes:
        pp_rank: its place in the pipeline; 0 where there is none.
        stage: the layers that it runs.
        layers: sums over them.
        outer: embedding, last norm and head, as far as it has them.
        positions: of a micro-batch on it.
        batches: micro-batches of a step.
    """

    shape: ModelShape
    job: Job
    layout: Layout
    pp_rank: int
    stage: Stage
    layers: LayerSums
    outer: Part
    positions: int
    batches: int

    @classmethod
    def of(
        cls, shape: ModelShape, job: Job, layout: Layout, recompute: Recompute, micro_batch: int, pp_rank: int
    ) -> RankWork:
        """The work of a rank.

        Args:
            micro_batch: positions on a data-parallel rank, before cp ranks share them.
        """
        stage = stage_of(shape, job, layout, pp_rank)
        layers = sum_layers(shape, job, layout, stage, recompute)
        outer = outer_part(shape, job, layout.of_a_layer(), is_first=stage.is_first, is_last=stage.is_last)
        batches = max(-(-job.tokens_per_step // (layout.dp * micro_batch)), 1)
        if layout.pp > 1:
            batches = max(batches, min_microbatches(layout))
        return cls(shape, job, layout, pp_rank, stage, layers, outer, -(-micro_batch // layout.cp), batches)

    @property
    def held(self) -> Part:
        """Everything that it holds."""
        return self.layers.part + self.outer

    @property
    def gradients(self) -> int:
        """Bytes of all gradients of what it holds."""
        return (self.layers.part.trained + self.outer.trained) * self.job.master_bytes

    @property
    def replays(self) -> bool:
        """Whether layers are computed again."""
        return self.layers.replayed > 0

    @property
    def gathered_keys(self) -> int:
        """Bytes of a layer's keys and values of all positions that ranks share."""
        ranks = min(kind.split_by("attention", self.layout.tp) for kind in self.shape.kinds)
        numbers = own_keys(self.shape, ranks) * self.positions * self.layout.cp
        return int(numbers * self.job.compute_bytes)

    @property
    def own_vocabulary(self) -> int:
        """Tokens that it has logits of."""
        return -(-self.shape.vocab // self.layout.tp) if self.layout.shares_vocabulary else self.shape.vocab

    @property
    def scored(self) -> int:
        """Positions of a micro-batch that it has logits of."""
        share = self.job.trained_share
        return max(int(self.positions * share), 1) if self.stage.is_last and share else 0

    @property
    def scored_at_once(self) -> int:
        """Of these, those of a chunk."""
        return min(self.job.chunk, self.scored)

    @property
    def table(self) -> int:
        """Numbers of a rank's part of the embedding, or of the head."""
        return self.shape.vocab * self.shape.hidden // self.layout.tp

    @property
    def trained_head(self) -> int:
        """Numbers of the head's gradient while it is whole; 0 where there is none."""
        return self.table if self.job.tuning == "full" and self.stage.is_last else 0

    @property
    def head_beside_logits(self) -> bool:
        """Whether the gradient of the head is there beside logits: those of the chunks after the first, or those that
        ranks share, which are kept until both gradients are made."""
        return self.scored > self.job.chunk or self.layout.shares_vocabulary
