"""What FSDP has whole at each moment of a step, and gradients that wait."""

from __future__ import annotations

from dataclasses import dataclass

from fourfold.planning.rank_work import RankWork


@dataclass(frozen=True, slots=True)
class Gathered:
    """Bytes of one rank.

    Attributes:
        begin: at the start of the forward pass, where what was gathered is also still as it arrived.
        forward, loss, backward, end, root: whole weights and gradients at each moment.
        accumulated: gradients of the micro-batches before.
        waiting: what the reduction of the micro-batch before still holds.
        root_gradients: gradients at the last moment, that of the embedding.
    """

    begin: int
    forward: int
    loss: int
    backward: int
    end: int
    root: int
    accumulated: int
    waiting: int
    root_gradients: int

    @classmethod
    def of(cls, work: RankWork) -> Gathered:
        """The figures of a rank; of one that does not shard nothing is gathered."""
        job, layout, layers, root, gradients = work.job, work.layout, work.layers, work.outer, work.gradients
        c, batches = job.compute_bytes, work.batches
        accumulated = gradients if batches > 1 else 0
        if layout.shards == 1:
            return cls(0, 0, 0, 0, layers.largest.cast * c, 0, accumulated, 0, gradients)
        head = work.trained_head
        head_at_loss = head if work.head_beside_logits else 0
        reduced = 4 if job.is_mixed else c
        unit, everything = layers.largest, layers.part.whole + root.whole
        whole_trained = layers.part.whole_trained + root.whole_trained
        if layout.pp > 1:  # all stays gathered, and gradients whole, until the end of the step
            whole = whole_trained * reduced
            sending = max(unit.whole_trained, root.whole_trained) * reduced
            loss, backward = everything + head_at_loss * c, everything + (head + unit.whole_trained) * c
            return cls(everything, everything, loss, backward, everything, everything + sending, whole, 0, whole)
        kept = root.whole if layout.reshards else everything
        root_sent = root.whole_trained * (c + reduced)
        waiting = 0
        if layout.zero == 1 and batches > 1:
            accumulated = whole_trained * reduced
        elif batches > 1:
            waiting = root.whole_trained * reduced
        # a unit that is gathered, the next one on its way, its whole gradients, and those of the one before, on the way
        units = (2 if layout.reshards else 0) * unit.whole
        sent = unit.whole_trained * (c + reduced)
        backward = kept + units + sent + head * c
        end = root.whole + unit.whole + sent + head * c
        before_root = gradients - (root.trained * job.master_bytes if batches == 1 else 0)
        if layout.zero == 1 and batches > 1:
            before_root = gradients + root.whole_trained * reduced
        root_end = root_sent or root.whole
        begin = 2 * (root.whole + unit.whole)
        return cls(begin, kept, kept + head_at_loss * c, backward, end, root_end, accumulated, waiting, before_root)
