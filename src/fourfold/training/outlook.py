"""What the planner is told of a run that is about to train: its GPUs, the shape of its model, its job."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace

import torch

from fourfold.base.errors import ModelError, PlanError, first_line
from fourfold.config.schema import Run
from fourfold.config.second import teacher_run
from fourfold.models.load import load_config
from fourfold.models.unwrap import TunedModel, base_model
from fourfold.parallel.mesh import local_device
from fourfold.planning.cost import estimate_cost
from fourfold.planning.detect import Card, cluster_of_cards
from fourfold.planning.estimate import LOADED, Cost, Memory
from fourfold.planning.hardware import Cluster, build_cluster
from fourfold.planning.held import held_by
from fourfold.planning.job import EngineName, Job, Recompute, Teacher
from fourfold.planning.keeps import Keeps, room_for_step, what_fits
from fourfold.planning.known_shape import find_shape
from fourfold.planning.layout import Layout
from fourfold.planning.memory import estimate_memory
from fourfold.planning.read_shape import read_shape
from fourfold.planning.shape import ModelShape
from fourfold.training.step_sizes import StepSizes


def cluster_of_job(run: Run, world_size: int) -> Cluster | None:
    """The GPUs of a job, all taken to be like this machine's; None if it computes on CPUs.

    What `planning.detect` asks the driver's tools is asked of torch here, which has it at hand.

    Raises:
        PlanError: machines have different numbers of processes.
    """
    if local_device(run.training.use_cpu).type != "cuda":
        return None
    properties = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    found = cluster_of_cards([Card(each.name, each.total_memory, 0) for each in properties])
    env = os.environ
    per_node = int(env.get("LOCAL_WORLD_SIZE", 0)) or max(world_size // int(env.get("NNODES") or 1), 1)
    nodes, rest = divmod(world_size, per_node)
    if rest:
        raise PlanError(f"nproc: {world_size} processes are not the same number on each machine, {per_node} here.")
    return build_cluster(found.device, per_node, nodes, notes=found.notes)


def shape_of(run: Run) -> ModelShape:
    """The shape of a run's model.

    Raises:
        ModelError: it cannot be read.
    """
    model = run.model
    try:
        return find_shape(model, lambda: read_shape(load_config(model), trust_remote_code=model.trust_remote_code))
    except (ValueError, AttributeError, KeyError, TypeError, RuntimeError, ImportError) as error:
        reason = first_line(error)
        raise ModelError(f"the shape of {model.model_name_or_path} cannot be read ({reason})") from error


def job_of(run: Run, *, dp: int = 1) -> Job:
    """The job of a run, with its teacher.

    Args:
        dp: as of `Job.of`.
    Raises:
        ModelError: the teacher's shape cannot be read.
    """
    job, teacher = Job.of(run, dp=dp), teacher_run(run)
    return job if teacher is None else replace(job, teacher=Teacher.of(teacher, shape_of(teacher)))


@dataclass(frozen=True)
class Outlook:
    """A loaded run as the planner sees it.

    Attributes:
        job: with the steps that are to be expected on average.
        heaviest: the same with the largest of them.
        pp_rank: this rank's place in the pipeline.
    """

    shape: ModelShape
    job: Job
    heaviest: Job
    layout: Layout
    cluster: Cluster
    pp_rank: int = 0

    @classmethod
    def of(
        cls,
        run: Run,
        module: TunedModel,
        layout: Layout,
        cluster: Cluster,
        sizes: StepSizes,
        *,
        packed: bool,
        document: float,
        pp_rank: int = 0,
        engine: EngineName = "eager",
    ) -> Outlook:
        """From the loaded model and the real lengths.

        Args:
            packed: whether rows are laid end to end.
            document: mean tokens of what attention sees together.
            engine: what runs the layers.
        Raises:
            ModelError: the model's shape cannot be read.
        """
        sequence = max(round(document), 1)
        known = replace(job_of(run, dp=layout.dp), sequence=sequence, packed=packed)
        known = replace(known, bits=_packed_bits(module), engine=engine)
        mean, most = (math.ceil(layout.dp * tokens / sequence) for tokens in (sizes.mean, sizes.step))
        job, heaviest = (replace(known, sequences_per_step=max(count, 1)) for count in (mean, most))
        return cls(shape_of(run), job, heaviest, layout, cluster, pp_rank)

    def memory(self, recompute: Recompute, micro_batch: int) -> Memory:
        """Of the most loaded rank of the job, with micro-batches of so many tokens on a data-parallel rank."""
        return self._memory(recompute, micro_batch, None)

    def memory_of_rank(self, recompute: Recompute, micro_batch: int) -> Memory:
        """The same of this rank."""
        return self._memory(recompute, max(micro_batch, 1), self.pp_rank)

    def joins_gradients(self, recompute: Recompute, micro_batch: int) -> bool:
        """Whether this rank reserves less if FSDP's shards of gradients lie with the rest."""
        return self.memory_of_rank(recompute, micro_batch).joins_gradients

    def to_come(self, recompute: Recompute, micro_batch: int) -> int:
        """Bytes that a step takes on this rank beside the loaded model."""
        found = self.memory_of_rank(recompute, micro_batch)
        return sum(size for name, size in found.terms.items() if name not in LOADED)

    def _memory(self, recompute: Recompute, micro_batch: int, rank: int | None) -> Memory:
        device = self.cluster.device
        return estimate_memory(self.shape, self.heaviest, self.layout, recompute, micro_batch, rank=rank, device=device)

    def keeping(self, keeps: Keeps) -> Outlook:
        """The same run where just so much is kept."""
        return replace(self, job=keeps.job(self.job), heaviest=keeps.job(self.heaviest))

    def what_fits(self, recompute: Recompute, micro_batch: int, free: int, *, spares: bool = True) -> Keeps:
        """What there is room for beside a step.

        Args:
            micro_batch: positions of the largest.
            free: bytes of the device, beside the loaded model.
            spares: as of `keeps.what_fits`.
        """
        left = room_for_step(free) + self.loaded()

        def fits(keeps: Keeps) -> bool:
            after = self.keeping(keeps)
            return after.loaded() + after.to_come(recompute, micro_batch) <= left

        layers = self.shape.num_layers
        return what_fits(self.heaviest, self.layout, recompute, micro_batch, layers, fits, spares=spares)

    def loaded(self) -> int:
        """Bytes of the loaded model on this rank."""
        found = self.memory("none", 1)
        return sum(size for name, size in found.terms.items() if name in LOADED)

    def not_seen(self, trained_bytes: int) -> int:
        """Bytes of gradients and optimizer state of what is trained on this rank beyond what the planner knows of.

        Args:
            trained_bytes: of all that is trained.
        """
        unknown = max(trained_bytes - held_by(self.shape, self.job, self.layout, self.pp_rank).gradients, 0)
        return unknown * {"none": 3, "optimizer": 1, "params": 0}[self.layout.offload]

    def cost(self, recompute: Recompute, max_tokens: int) -> Cost:
        """Of an average step.

        Raises:
            PlanError: the device lacks the compute dtype.
        """
        return estimate_cost(self.shape, self.job, self.layout, self.cluster, recompute, max_tokens)


def _packed_bits(module: TunedModel) -> int | None:
    """Bits of the loaded model's linear layers, whether packed now or in the checkpoint."""
    own = base_model(module).config.to_dict().get("quantization_config") or {}
    for bits in (4, 8):
        if own.get(f"load_in_{bits}bit") or own.get(f"_load_in_{bits}bit"):
            return bits
    return None
