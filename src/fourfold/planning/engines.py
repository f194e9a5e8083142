"""What runs the layers of a step, as far as their time hangs on it: as they are, compiled, or replayed as graphs; and
which of these a run will choose (training/fast.py)."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fourfold.config.training import TrainingConfig
from fourfold.planning.device import Device
from fourfold.planning.job import EngineName, Job
from fourfold.planning.layout import Layout
from fourfold.planning.shape import ModelShape

STEPS_TO_PAY = 60
"""Optimizer steps from which compiling, some 20 to 60 s where nothing is cached, is made up for."""


@dataclass(frozen=True, slots=True)
class Engine:
    """What runs the layers.

    Attributes:
        name: for people.
        launch_ops: of the host, for each kernel: in units of the time that it takes for one small operator.
        kernels, traffic: share of the kernels and of the bytes between products that fusion leaves.
        attention: from how many tokens of a document on fused attention is how much faster; the longest first.
        adapters: share of what adapters cost that is left.
        linear: dtype of the products of a layer's plain matrices if it is not the job's, e.g. fp8.
        repeats_last: whether a layer that is computed again repeats its last product, which no gradient needs.
    """

    name: str
    launch_ops: float = 2.84
    kernels: float = 1.0
    traffic: float = 1.0
    attention: tuple[tuple[int, float], ...] = ()
    adapters: float = 1.0
    linear: str | None = None
    repeats_last: bool = True

    @property
    def leaves_experts(self) -> bool:
        """Whether experts run as they are."""
        return self.name in ("eager", "around")

    def attention_speed(self, document: int) -> float:
        """How much faster fused attention over documents of so many tokens is than PyTorch's own."""
        return next((speed for least, speed in self.attention if document >= least), 1.0)


EAGER = Engine("eager")
"""The engine as it is. A kernel of a layer comes with allocations, views and autograd's own work: 27 us each on a host
that takes 9.5 us for a small operator (`benchmarks/host_time.py`, pure bf16)."""
COMPILED = Engine(
    "compiled",
    kernels=0.25,
    traffic=0.3,
    attention=((16_384, 1.6), (2048, 1.35), (0, 1.6)),
    adapters=0.2,
    repeats_last=False,
)
"""Layers compiled by torch: fitted to runs on an H100 (benchmarks/results/gpu_h100.json): Llama-3-8B with LoRA,
Llama-3.2-3B in full, Qwen3-30B-A3B of 8 layers. Siblings have one pair of thin products (models/lora.py)."""
_NEW_CARDS = ("h", "b", "gb")
"""Names of cards of Hopper and later."""
AROUND = replace(COMPILED, name="around")
"""The same of what lies around experts, which run as they are but for their gate."""
REPLAYED = replace(COMPILED, name="replayed", launch_ops=0.0, kernels=0.1)
"""The same, replayed as graphs: nothing is left for the host, and 0.4 us between two kernels instead of 1.3."""
ENGINES = {"eager": EAGER, "compiled": COMPILED, "around": AROUND, "replayed": REPLAYED}
_SAVED_IN_CONTEXT = 0.4
"""Of what compiling saves between products, what is left where layers are compiled around attention over positions
that ranks share: Llama-3-8B, LoRA, one row of 65,536 over 4 H100, 5.42 to 5.12 s (allgather), 6.36 to 5.97 (ulysses, on
a slower host)."""


def engine_in(layout: Layout, engine: Engine) -> Engine:
    """What runs layers under a layout."""
    if layout.cp == 1 or engine is EAGER:
        return engine
    shares = {name: 1 - _SAVED_IN_CONTEXT * (1 - getattr(engine, name)) for name in ("kernels", "traffic", "adapters")}
    return replace(engine, **shares)


def has_flash(device: Device) -> bool:
    """Whether a card has torch's attention kernel of documents' offsets; bf16 is a sign of its generation."""
    return "bf16" in device.dense


def has_own_attention(device: Device) -> bool:
    """Whether a card runs the kernels of parallel/document_kernel.py, and cuDNN's newest for equal documents."""
    return device.name.startswith(_NEW_CARDS)


def wants_compiled(training: TrainingConfig, max_steps: int | None) -> bool:
    """Whether a run asks for compiled layers, by its key or since they pay in a run of so many steps.

    Args:
        max_steps: None where it is not known, and taken to be enough.
    """
    if training.torch_compile is not None:
        return training.torch_compile
    # casts to float8 cost more than they save where nothing joins them
    return training.fp8 or max_steps is None or max_steps >= STEPS_TO_PAY


def why_apart(layout: Layout, compute: str) -> str | None:
    """Why layers are compiled around their experts and not with them; None where they are compiled with them.

    Args:
        compute: dtype, e.g. bf16.
    """
    if layout.ep * layout.tp > 1:
        return "ranks share them"
    return "their products are compiled in bf16 alone" if compute != "bf16" else None


def compiled_engine(shape: ModelShape, layout: Layout, compute: str) -> EngineName:
    """What runs layers that are compiled."""
    return "around" if shape.experts and why_apart(layout, compute) is not None else "compiled"


def engine_of(
    shape: ModelShape, job: Job, layout: Layout, device: Device, *, compiles: bool, replays: bool
) -> EngineName:
    """What will run the layers of a job.

    Args:
        compiles, replays: whether the run's keys allow for it.
    """
    goes = not layout.splits_backward and layout.offload == "none"
    fits = job.packed and shape.by_offsets and job.compute != "fp32" and has_flash(device)
    if not (compiles and goes and fits) or (shape.caps_scores and not has_own_attention(device)):
        return "eager"
    plain = layout.world_size == 1 and job.tuning == "lora" and not shape.experts and not shape.carries_state
    return "replayed" if replays and plain else compiled_engine(shape, layout, job.compute)
