"""Trains a tiny model for a few steps under a layout, in forked processes, and collects what must not depend on it."""

from __future__ import annotations

import faulthandler
import gc
import multiprocessing
import os
import pickle
import socket
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
import torch.distributed as dist
from case_teacher import make_teacher
from peft import LoraConfig, PeftModel, get_peft_model

from fourfold.dataset.batch import IGNORE_INDEX, Example, Sample
from fourfold.dataset.collate import CutPolicy, cut, filler
from fourfold.losses.documents import reference_name
from fourfold.losses.kto import KtoSettings
from fourfold.losses.preference import PreferenceKind, PreferenceSettings
from fourfold.losses.teacher import KdSettings
from fourfold.losses.token import TokenLoss
from fourfold.models.adapters import without_adapters
from fourfold.models.forward import StepModel
from fourfold.models.freeze import freeze_choices
from fourfold.models.lora import join_siblings, use_short_forward
from fourfold.models.noise import NoiseKeys, key_dropout
from fourfold.models.patches import peft_noise_ignored
from fourfold.models.targets import decoder_blocks, lora_targets
from fourfold.models.unwrap import TunedModel, base_model
from fourfold.models.value_head import freeze_head, learns_level, new_value_head, reads_logits, reads_values
from fourfold.objectives.dpo import PreferenceObjective
from fourfold.objectives.grpo import ADVANTAGES, OLD_LOGPS, REFERENCE_LOGPS, ROLLOUTS, GroupPolicyObjective
from fourfold.objectives.kd import DistillationObjective
from fourfold.objectives.kto import KtoObjective
from fourfold.objectives.ppo import OLD_VALUES, RETURNS, PolicyValueObjective
from fourfold.objectives.rm import RewardObjective
from fourfold.parallel import host_adamw
from fourfold.parallel.apply import Parallelized, parallelize
from fourfold.parallel.expert_adapters import use_row_adapters
from fourfold.parallel.local_experts import use_local_experts
from fourfold.parallel.mesh import Mesh, build_mesh, single, start_process_group
from fourfold.parallel.offload import offload_activations
from fourfold.parallel.recompute import Recompute
from fourfold.parallel.sharded import full, local
from fourfold.parallel.shares import Share
from fourfold.parallel.stages import VALUE_HEAD
from fourfold.parallel.step import LossFunction, Step, no_figures
from fourfold.planning.layout import Layout
from fourfold.training.clipping import clip_for
from fourfold.training.memory import enable_recompute
from fourfold.training.precision import LossScaler
from tiny_models import quantize, tiny_model

_FORK = multiprocessing.get_context("fork")
_CPU = torch.device("cpu")
STEPS = 5


@dataclass(frozen=True)
class Case:
    """What is trained.

    Attributes:
        family: key of tiny_models.FAMILIES.
        tuning: full, lora or qlora (on 4-bit weights).
        packed: rows packed end to end, or padded.
        max_tokens: positions of a micro-batch; small ones give several micro-batches a step.
        targets: what gets an adapter, as `lora_target` names it; everything if empty.
        router: weight of the experts' load-balancing loss.
        bias_router: make every token choose the first half of the experts (deepseek_v3).
        recompute: what the backward pass computes again; spared: of how many layers nothing.
        dropout: of the adapters' inputs.
        longest: tokens of a sample at most.
        stage: sft and kd leave the first third of a sample out of the loss, pt trains on all of it; rm, dpo and kto
            have two answers to each prompt; grpo and ppo are given their rollouts.
        pref_loss: of stage dpo.
        kd: settings of stage kd.
        teacher_family, teacher_rows: its teacher's family, another one if None, and rows beside the student's.
        offload_activations: move what the backward pass needs to the host.
        shares: tokens from which on the answers of a pair share their prompt; 0 for never.
        scaled: scale the loss as under fp16; in fp32 powers of two change nothing.
        steps: which of the five; the last has a single sample, so that ranks are without.
    """

    family: str = "llama"
    tuning: str = "full"
    packed: bool = True
    max_tokens: int = 64
    overrides: tuple[tuple[str, Any], ...] = ()
    targets: tuple[str, ...] = ()
    router: float = 0.0
    bias_router: bool = False
    recompute: Recompute = "none"
    spared: int = 0
    dropout: float = 0.0
    longest: int = 24
    stage: str = "sft"
    pref_loss: PreferenceKind = "sigmoid"
    kd: KdSettings = field(default_factory=KdSettings)
    teacher_family: str | None = None
    teacher_rows: int = 16
    offload_activations: bool = False
    shares: int = 0
    scaled: bool = False
    steps: tuple[int, ...] = tuple(range(STEPS))


@dataclass(frozen=True)
class Curve:
    """What a run did: losses and gradient norms of each step, gradients of the first, bytes held at the end.

    `shares` tells, by name, of which whole parameter a gradient is a part, where it is one. `metrics` are the first
    step's.
    """

    case: Case
    losses: list[float]
    norms: list[float]
    gradients: dict[str, torch.Tensor]
    local_numel: int
    state_numel: int
    shares: dict[str, Share] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)


def assert_same(curve: Curve, reference: Curve, *, loss: float = 1e-5) -> None:
    """Losses within `loss` at every step, norms within 1e-3 relative, first gradients within 1e-6 of their largest, or
    within twice what rounding makes of one process's own (`rounding_of`).

    Of gradients that are parts of larger ones, the same part of the reference is compared.
    """
    assert_together_same([curve], reference, loss=loss)


def assert_together_same(curves: list[Curve], reference: Curve, *, loss: float = 1e-5) -> None:
    """As one process: losses and norms on every rank, and each parameter's first gradient on one that has it."""
    largest = largest_of(reference)
    seen: set[str] = set()
    for curve in curves:
        assert len(curve.losses) == len(reference.case.steps)
        assert curve.losses == pytest.approx(reference.losses, abs=loss)
        assert curve.norms == pytest.approx(reference.norms, rel=1e-3)
        for name, grad in curve.gradients.items():
            whole = reference.gradients[name]
            part = curve.shares[name].take(whole) if name in curve.shares else whole
            difference = float((part - grad).abs().max()) / largest
            assert difference <= gradient_limit(difference, reference), name
            seen.add(name)
    assert seen == reference.gradients.keys()


def largest_of(reference: Curve) -> float:
    """The largest of the first gradients."""
    return max(float(grad.abs().max()) for grad in reference.gradients.values())


def gradient_limit(difference: float, reference: Curve) -> float:
    """How far first gradients may be from the reference's, relative to the largest; what one process rounds is looked
    at only where a difference is not within the first limit."""
    return 1e-6 if difference <= 1e-6 else max(1e-6, 2 * rounding_of(reference) / largest_of(reference))


def rounding_of(reference: Curve) -> float:
    """By how much the first gradients of one process differ from those that it has in fp64, at most.

    Some processors' matrix products round by more than 1e-6 of the largest gradient, and others by less. Two ways to
    compute the same differ by no more than what each of them is off.
    """
    exact = _in_fp64(reference.case)
    return max(float((exact[name] - grad).abs().max()) for name, grad in reference.gradients.items())


@lru_cache
def _in_fp64(case: Case) -> dict[str, torch.Tensor]:
    return run_ranks(1, lambda: train(case, single(_CPU), exact=True))[0].gradients


def make_model(case: Case, *, exact: bool = False) -> TunedModel:
    """The model of a case; the same weights in every process, in fp64 if they are to be exact."""
    module = _make_tuned(case)
    if exact:
        module.double()
        base_model(module).set_experts_implementation("eager")  # grouped products are none of fp64
    if reads_values(case.stage):
        inner = base_model(module)
        head = new_value_head(inner.config.hidden_size, seed=5, std=0.1)
        if not reads_logits(case.stage):
            freeze_head(module, None)
        head.summary.bias.requires_grad_(learns_level(case.stage))
        inner.add_module(VALUE_HEAD, head)
    return module


def _make_tuned(case: Case) -> TunedModel:
    model = tiny_model(case.family, **dict(case.overrides)).train()
    if case.bias_router:
        for name, bias in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                bias[: len(bias) // 2] = 10.0
    if case.tuning == "full":
        freeze_choices(model)
        return model
    if case.tuning == "qlora":
        quantize(model)
    torch.manual_seed(7)
    targets = lora_targets(model, case.targets or ("all",))
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=list(targets.modules),
        target_parameters=list(targets.parameters) or None,
        init_lora_weights=False,
        lora_dropout=case.dropout,
        task_type="CAUSAL_LM",
    )
    with peft_noise_ignored():
        tuned = get_peft_model(model, config)
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:  # as small beside the base as adapters become, so that its rounding is not magnified
            parameter.data *= 0.1
    assert isinstance(tuned, PeftModel)
    return tuned


def objective_of(case: Case) -> LossFunction:
    """What a case trains; full tuning finds the reference's log-probabilities with the samples."""
    stored = case.tuning == "full"
    if case.stage == "dpo":
        long_weight = 0.5 if case.pref_loss == "sigmoid" else None
        beta = 1.0 if case.pref_loss in ("ipo", "sppo") else 0.1  # 1 / beta squared would leave no digits to compare
        settings = PreferenceSettings(case.pref_loss, beta, bco_weight=0.2 if case.pref_loss == "hinge" else 0.0)
        return PreferenceObjective(settings, sft_weight=0.1, long_weight=long_weight, stored=stored)
    if case.stage == "kto":
        return KtoObjective(KtoSettings(undesirable_weight=1.5), sft_weight=0.1, stored=stored)
    if case.stage == "grpo":
        gspo = case.tuning == "lora"
        return GroupPolicyObjective(clip_high=0.28, sequence_level=gspo, kl_weight=0.05, temperature=0.9)
    if case.stage == "ppo":
        return PolicyValueObjective(temperature=0.9)
    if case.stage == "rm":
        return RewardObjective(case.router)
    labels = TokenLoss(router_coefficient=case.router)
    return DistillationObjective(case.kd, labels) if case.stage == "kd" else labels


def _rollout(ids: list[int], index: int, stage: str) -> Sample:
    """A prompt and its answer, with what was found out about it before."""
    prompt, answer = ids[: len(ids) // 3 + 1], ids[len(ids) // 3 + 1 :]
    before, size = [0.0] * len(prompt), len(answer)
    of_tokens = {
        ADVANTAGES: [(-1.0) ** index * (1 + index % 3)] * size,
        OLD_LOGPS: [-5.0 - 0.1 * (n % 5) for n in range(size)],
        REFERENCE_LOGPS: [-5.2] * size,
    }
    weight, extras = 1 / size, {ROLLOUTS: 1.0}
    if stage == "ppo":  # each token has an advantage of its own; some ratios and some values are clipped, others not
        of_tokens = {
            ADVANTAGES: [(-1.0) ** (index + n) * (1 + n % 3) / 2 for n in range(size)],
            OLD_LOGPS: [-5.6 - 0.2 * (n % 5) for n in range(size)],
            OLD_VALUES: [0.3 * (n % 4) - 0.4 for n in range(size)],
            RETURNS: [0.5 * ((index + n) % 3) - 0.6 for n in range(size)],
        }
        weight, extras = 1.0, {}
    numbers = {name: before + found for name, found in of_tokens.items()}
    example = Example(ids, [IGNORE_INDEX] * len(prompt) + answer, weights=before + [weight] * size, numbers=numbers)
    return Sample({"": example}, index, extras)


def _with_two_answers(ids: list[int], index: int, stage: str) -> Sample:
    """A prompt, the answer, and another one: its end is left out and what is left is turned round."""
    prompt, answer = ids[: len(ids) // 3 + 1], ids[len(ids) // 3 + 1 :]
    other = answer[: max(len(answer) * 2 // 3, 1)][::-1]
    examples = [Example(prompt + found, [IGNORE_INDEX] * len(prompt) + found) for found in (answer, other)]
    roles = ("response", "kl") if stage == "kto" else ("chosen", "rejected")
    numbers = {reference_name(role): -5.1 * len(found) for role, found in zip(roles, (answer, other), strict=True)}
    if stage == "kto":
        numbers["desirable"] = float(index % 3 > 0)
    return Sample(dict(zip(roles, examples, strict=True)), index, numbers)


def make_steps(vocab_size: int, longest: int = 24, stage: str = "sft") -> list[list[Sample]]:
    """Five steps of 7 or 8 samples of uneven lengths; the last has a single sample."""
    generator = torch.Generator().manual_seed(11)
    steps, index = [], 0
    for count in (8, 7, 8, 8, 1):
        samples = []
        for _ in range(count):
            length = int(torch.randint(4, longest + 1, (1,), generator=generator))
            ids = torch.randint(3, vocab_size, (length,), generator=generator).tolist()
            if stage in ("rm", "dpo", "kto"):
                samples.append(_with_two_answers(ids, index, stage))
            elif stage in ("grpo", "ppo"):
                samples.append(_rollout(ids, index, stage))
            else:
                prompt = 0 if stage == "pt" else length // 3
                samples.append(Sample({"": Example(ids, [IGNORE_INDEX] * prompt + ids[prompt:])}, index))
            index += 1
        steps.append(samples)
    return steps


def train(
    case: Case,
    mesh: Mesh,
    before: Callable[[StepModel, Parallelized], None] | None = None,
    ask: Callable[[Step, CutPolicy], None] | None = None,
    *,
    exact: bool = False,
) -> Curve:
    """Five AdamW steps or those of the case, each with the samples that belong to this data-parallel rank.

    Args:
        before: called before each step.
        ask: called before the first one.
        exact: in fp64.
    """
    module = make_model(case, exact=exact)
    if not mesh.layout.splits_backward:
        use_short_forward(module)
    if mesh.layout.world_size == 1:  # so that what runs alone on a GPU is compared with every layout
        join_siblings(module)
    else:  # alone they run as Transformers has them
        use_local_experts(module)
        use_row_adapters(module)
    noise = NoiseKeys(seed=3)
    key_dropout(module, noise)
    model = StepModel(module, packed=case.packed, balance_experts=case.router > 0, noise=noise)
    inner = base_model(module)
    split = parallelize(inner, list(decoder_blocks(inner)[1]), mesh, compute=None)
    model.take(split)
    if case.offload_activations:
        offload_activations(inner, list(decoder_blocks(inner)[1]), smallest=1)
    if case.recompute != "none":
        enable_recompute(module, case.recompute, noise, case.spared)
    policy = CutPolicy(
        packed=case.packed,
        max_tokens=case.max_tokens,
        multiple=split.multiple,
        min_batches=split.min_batches,
        shares_prompts=case.shares,
    )
    scaler = LossScaler(_CPU) if case.scaled else None
    step = Step(
        model,
        objective_of(case),
        _CPU,
        nullcontext,
        lambda: filler(policy),
        scale=None if scaler is None else scaler.scale,
        sync=split.sync,
        reducer=split.reducer,
        localize=split.localize,
        finish=split.finish,
        observe=no_figures if split.load is None else split.load.figures,
        staged=split.staged(model),
        module=module,
        reference=partial(without_adapters, module),
        teacher=make_teacher(case, mesh, inner.config.vocab_size) if case.stage == "kd" else None,
    )
    if ask is not None:
        ask(step, policy)
        step.rest()
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = _optimizer(parameters, mesh.layout)
    losses, norms, gradients, metrics = [], [], {}, {}
    num_tokens = inner.config.vocab_size + (min(case.teacher_rows, 0) if case.stage == "kd" else 0)
    every = make_steps(num_tokens, case.longest, case.stage)
    for number, samples in enumerate(every[step] for step in case.steps):
        if before is not None:
            before(model, split)
        mine = samples[mesh.dp_rank :: mesh.layout.dp]
        optimizer.zero_grad()
        result = step.forward_backward(cut(mine, policy))
        losses.append(result.loss)
        if scaler is not None:
            scaler.unscale_(optimizer)
        if number == 0:
            metrics = dict(result.metrics)
            found = ((name, p.grad) for name, p in module.named_parameters() if p.requires_grad)
            gradients = {name: full(grad).clone() for name, grad in found if grad is not None}
        norms.append(float(clip_for(optimizer, parameters, 1.0, split.gradient_norm)))
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
    noted = split.shares.by_parameter(inner)
    shares = {name: replace(noted[p], sum_over=None) for name, p in module.named_parameters() if p in noted}
    return Curve(case, losses, norms, gradients, _numel(module.parameters()), _state_numel(optimizer), shares, metrics)


def _optimizer(parameters: list[torch.nn.Parameter], layout: Layout) -> torch.optim.Optimizer:
    if layout.offload == "none":
        return torch.optim.AdamW(parameters, lr=1e-3)
    groups = [{"params": parameters}]
    return host_adamw.AdamW(groups, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2)


def _numel(parameters: Any) -> int:
    return sum(local(p).numel() for p in parameters)


def _state_numel(optimizer: torch.optim.Optimizer) -> int:
    states = (value for state in optimizer.state.values() for value in state.values())
    return sum(local(value).numel() for value in states if isinstance(value, torch.Tensor) and value.ndim)


def alone(case: Case) -> Curve:
    """The reference: one process, no process group.

    A forked one, too: where there is a GPU, autograd's threads do not survive a fork of the process that has used it.
    """
    return run_ranks(1, lambda: train(case, single(_CPU)))[0]


def under(case: Case, layout: Layout) -> list[Curve]:
    """The curve of every rank of a layout."""
    return run_ranks(layout.world_size, lambda: train(case, build_mesh(layout, _CPU)))


def run_ranks(world_size: int, work: Callable[[], Any]) -> list[Any]:
    """Run `work` in forked processes that form a gloo job; returns what each rank returned."""
    with TemporaryDirectory() as folder:
        return _run_ranks(world_size, work, [Path(folder, str(rank)) for rank in range(world_size)])


def _run_ranks(world_size: int, work: Callable[[], Any], crashes: list[Path]) -> list[Any]:
    port = _free_port()
    pipes, processes = [], []
    for rank in range(world_size):
        reader, writer = _FORK.Pipe(duplex=False)
        process = _FORK.Process(target=_rank, args=(rank, world_size, port, work, writer, crashes[rank]))
        process.start()
        writer.close()
        pipes.append(reader)
        processes.append(process)
    results: list[Any] = []
    try:
        for reader in pipes:
            try:
                results.append(pickle.loads(reader.recv_bytes()))
            except EOFError:
                results.append(f"ended without a word\n{crashes[len(results)].read_text()}")
    finally:
        for process in processes:
            process.join(10)
            process.kill()
    failures = [
        f"rank {rank}, exit code {process.exitcode}: {found}"
        for rank, (found, process) in enumerate(zip(results, processes, strict=True))
        if isinstance(found, str)
    ]
    assert not failures, "\n".join(failures)
    return results


def _free_port() -> int:
    """A port that nobody listens on, below those that the system hands out to whoever connects."""
    while True:
        port = 20000 + (os.getpid() * 7 + _free_port.calls * 13) % 12000
        _free_port.calls += 1
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port


_free_port.calls = 0  # type: ignore[attr-defined]


def _rank(rank: int, world_size: int, port: int, work: Callable[[], Any], writer: Any, crash: Path) -> None:
    gc.freeze()  # what the parent made is looked at no more, and stays in the memory that all share
    faulthandler.enable(crash.open("w"))  # where a signal that ends this process is told
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    code = 0
    try:
        start_process_group(_CPU, 60)
        result = work()
        dist.barrier()
        writer.send_bytes(pickle.dumps(result))
    except BaseException:
        code = 1
        writer.send_bytes(pickle.dumps(traceback.format_exc()))
    writer.close()
    os._exit(code)
