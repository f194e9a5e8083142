"""TRL's losses on given logits: its trainers' loss methods, run with a stub in place of a model.

The trainers are built without their constructors, which load models and data; each gets the attributes that its loss
method reads. One trainer class is one function here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from trl.experimental.cpo.cpo_trainer import CPOTrainer
from trl.experimental.gkd.gkd_trainer import GKDTrainer
from trl.experimental.orpo.orpo_trainer import ORPOTrainer
from trl.rewards import get_soft_overlong_punishment
from trl.trainer import grpo_trainer
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.kto_trainer import KTOTrainer
from trl.trainer.reward_trainer import RewardTrainer

ACCELERATOR = SimpleNamespace(
    device=torch.device("cpu"),
    num_processes=1,
    process_index=0,
    gather=lambda tensor: tensor,
    gather_for_metrics=lambda tensor: tensor,
    reduce=lambda tensor, reduction: tensor,
)


@dataclass(frozen=True, slots=True)
class Answers:
    """B answers after prompts, padded on the right.

    Attributes:
        input_ids: [B, S].
        mask: [B, S], 1 on answer tokens.
        logits: [B, S, V] of the policy.
        reference_logits: [B, S, V].
    """

    input_ids: Tensor
    mask: Tensor
    logits: Tensor
    reference_logits: Tensor

    def token_logps(self, logits: Tensor) -> Tensor:
        """[B, S - 1] log-probabilities of each next token; 0 where it is not part of an answer."""
        logps = logits[:, :-1].log_softmax(-1).gather(-1, self.input_ids[:, 1:, None]).squeeze(-1)
        return logps * self.mask[:, 1:]

    @property
    def attention_mask(self) -> Tensor:
        """[B, S], 0 on padding."""
        last = (self.mask * torch.arange(self.mask.shape[1])).argmax(-1, keepdim=True)
        return (torch.arange(self.mask.shape[1]) <= last).long()


def make_answers(lengths: Sequence[int], *, prompt: int = 3, seed: int = 0, vocabulary: int = 13) -> Answers:
    """Random answers of the given lengths after prompts of `prompt` tokens."""
    generator = torch.Generator().manual_seed(seed)
    shape = len(lengths), prompt + max(lengths)
    mask = torch.zeros(shape, dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, prompt : prompt + length] = 1
    logits = torch.randn(*shape, vocabulary, generator=generator)
    return Answers(
        input_ids=torch.randint(vocabulary, shape, generator=generator),
        mask=mask,
        logits=logits.requires_grad_(),
        reference_logits=logits.detach() + 0.5 * torch.randn(*shape, vocabulary, generator=generator),
    )


class FusedModel(torch.nn.Module):
    """A model that gives the log-probabilities of its stored logits, as TRL's fused head does."""

    is_gradient_checkpointing = False

    def __init__(self, answers: Answers, logits: Tensor) -> None:
        super().__init__()
        self.answers, self.logits = answers, logits

    def forward(self, **inputs: Any) -> Any:
        """Per-token fields, [B, S - 1]."""
        logps = self.answers.token_logps(self.logits)
        zeros = torch.zeros_like(logps)
        return SimpleNamespace(log_probs=logps, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())


class LogitsModel:
    """A model that gives its stored logits."""

    training = True

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits

    def __call__(self, *inputs: Any, **more: Any) -> Any:
        """logits."""
        return SimpleNamespace(logits=self.logits)


def bare(trainer: type, **attributes: Any) -> Any:
    """A trainer without its constructor."""
    made = object.__new__(trainer)
    common = {
        "accelerator": ACCELERATOR,
        "aux_loss_enabled": False,
        "_metrics": {"train": defaultdict(list)},
        "_total_train_tokens": 0,
        "_tp_size": 1,
        "precompute_ref_logps": True,
    }
    for name, value in (common | attributes).items():
        setattr(made, name, value)
    return made


def trl_dpo(answers: Answers, **settings: Any) -> tuple[Tensor, dict[str, float]]:
    """Mean loss and metrics of DPOTrainer; the first half of the answers is chosen, the second rejected."""
    reference_shift = settings.pop("reference_shift", 0.0)
    model = FusedModel(answers, answers.logits)
    defaults = {
        "model": model,
        "ref_model": FusedModel(answers, answers.reference_logits),
        "args": SimpleNamespace(gradient_checkpointing_kwargs=None),
        "precompute_ref_logps": settings.get("ld_alpha") is None,
        "ld_alpha": None,
        "f_divergence_type": "reverse_kl",
        "beta": 0.1,
        "loss_types": ["sigmoid"],
        "loss_weights": [1.0],
        "label_smoothing": 0.0,
        "use_weighting": False,
    }
    trainer = bare(DPOTrainer, **(defaults | settings))
    reference = answers.token_logps(answers.reference_logits).sum(-1) + reference_shift
    chosen, rejected = reference.chunk(2)
    inputs = {
        "input_ids": answers.input_ids,
        "attention_mask": answers.attention_mask,
        "completion_mask": answers.mask,
        "ref_chosen_logps": chosen,
        "ref_rejected_logps": rejected,
    }
    loss = trainer._compute_loss(model, inputs, return_outputs=False)
    return loss, {name: values[-1] for name, values in trainer._metrics["train"].items() if name != "num_tokens"}


def trl_pairs(trainer: type, answers: Answers, **settings: Any) -> tuple[Tensor, dict[str, float]]:
    """Mean loss and metrics of CPOTrainer or ORPOTrainer on answers of one width."""
    made = bare(trainer, is_encoder_decoder=False, padding_value=0, pad_token_id=0, **settings)
    batch: dict[str, Tensor] = {}
    labels = answers.input_ids.masked_fill(answers.mask == 0, -100)
    for name, rows in {"chosen": slice(None, len(labels) // 2), "rejected": slice(len(labels) // 2, None)}.items():
        batch[f"{name}_input_ids"] = answers.input_ids[rows]
        batch[f"{name}_attention_mask"] = answers.attention_mask[rows]
        batch[f"{name}_labels"] = labels[rows]
    return made.get_batch_loss_metrics(LogitsModel(answers.logits), batch)


def trl_orpo(answers: Answers, beta: float) -> tuple[Tensor, dict[str, float]]:
    """ORPOTrainer; its SFT loss is a mean over prompt and answer of all pairs."""
    return trl_pairs(ORPOTrainer, answers, beta=beta)


def trl_simpo(answers: Answers, beta: float, gamma: float) -> tuple[Tensor, dict[str, float]]:
    """CPOTrainer with the loss SimPO and no SFT loss."""
    return trl_pairs(
        CPOTrainer,
        answers,
        loss_type="simpo",
        beta=beta,
        simpo_gamma=gamma,
        label_smoothing=0.0,
        alpha=0.0,
        cpo_alpha=0,
    )


def trl_smoothed_sigmoid(margins: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """[P] conservative losses of log-ratios' differences: CPOTrainer's, as DPOTrainer has none."""
    trainer = bare(CPOTrainer, loss_type="sigmoid", beta=beta, label_smoothing=label_smoothing, alpha=0.0)
    return trainer.cpo_loss(margins, torch.zeros_like(margins))[0]


def trl_kto(
    answers: Answers, desirable: Tensor, kl_answers: Answers, **settings: Any
) -> tuple[Tensor, dict[str, float]]:
    """Mean loss and metrics of KTOTrainer."""
    model = FusedModel(answers, answers.logits)
    trainer = bare(KTOTrainer, model=model, loss_type="kto", calculate_KL=True, **settings)
    inputs = {
        "input_ids": answers.input_ids,
        "attention_mask": answers.attention_mask,
        "completion_mask": answers.mask,
        "label": desirable,
        "ref_logps": answers.token_logps(answers.reference_logits).sum(-1),
        "ref_KL_logps": kl_answers.token_logps(kl_answers.reference_logits).sum(-1),
        "KL_input_ids": kl_answers.input_ids,
        "KL_attention_mask": kl_answers.attention_mask,
        "KL_completion_mask": kl_answers.mask,
    }
    trainer._compute_kl_logps = lambda model, batch: kl_answers.token_logps(kl_answers.logits).sum(-1).detach()
    loss = trainer._compute_loss(model, inputs, return_outputs=False)
    return loss, {name: values[-1] for name, values in trainer._metrics["train"].items() if name != "num_tokens"}


def trl_reward(rewards: Tensor, margin: Tensor | None, centering: float | None) -> tuple[Tensor, dict[str, float]]:
    """Mean loss and metrics of RewardTrainer on [2P] rewards, chosen first."""
    model = LogitsModel(rewards[:, None])
    trainer = bare(RewardTrainer, model=model, args=SimpleNamespace(center_rewards_coefficient=centering))
    inputs: dict[str, Any] = {"attention_mask": torch.ones(len(rewards), 1)}
    if margin is not None:
        inputs["margin"] = margin
    loss = trainer.compute_loss(model, inputs)
    return loss, {name: values[-1] for name, values in trainer._metrics["train"].items() if name != "num_tokens"}


def trl_grpo(
    logps: Tensor, mask: Tensor, advantages: Tensor, old_logps: Tensor, reference_logps: Tensor, **settings: Any
) -> tuple[Tensor, dict[str, float]]:
    """Loss and metrics of GRPOTrainer on [B, T] log-probabilities of completions."""
    trainer = bare(
        GRPOTrainer,
        model=SimpleNamespace(training=True),
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1),
        current_gradient_accumulation_steps=1,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm=False,
        _entropy_bonus_enabled=False,
        **settings,
    )
    trainer._get_per_token_logps_and_entropies = lambda *args, **more: (logps, torch.zeros_like(logps), None)
    ids = torch.zeros(mask.shape, dtype=torch.long)
    inputs = {
        "prompt_ids": ids[:, :1],
        "prompt_mask": ids[:, :1],
        "completion_ids": ids,
        "completion_mask": mask,
        "advantages": advantages,
        "old_per_token_logps": old_logps,
        "ref_per_token_logps": reference_logps,
        "num_items_in_batch": mask.sum(),
    }
    loss = trainer._compute_loss(trainer.model, inputs)
    return loss, {name: values[-1] for name, values in trainer._metrics["train"].items()}


def trl_group_advantages(rewards: Tensor, weights: Tensor, group_size: int, scaling: str) -> tuple[Tensor, float]:
    """[B] advantages of GRPOTrainer from [B, F] rewards, and the share of rollouts in groups without spread."""
    names = [f"function {index}" for index in range(rewards.shape[1])]
    trainer = bare(
        GRPOTrainer,
        model=SimpleNamespace(training=True, is_gradient_checkpointing=False),
        args=SimpleNamespace(
            per_device_train_batch_size=len(rewards),
            steps_per_generation=1,
            gradient_accumulation_steps=1,
            gradient_checkpointing_kwargs=None,
        ),
        environment_factories=None,
        environments=None,
        tools=None,
        num_iterations=1,
        _tokenizer=SimpleNamespace(pad_token_id=0),
        pad_to_multiple_of=None,
        mask_truncated_completions=False,
        use_vllm=False,
        beta=0.0,
        num_generations=group_size,
        multi_objective_aggregation="sum_then_normalize",
        reward_weights=weights,
        scale_rewards=scaling,
        reward_func_names=names,
        _logs={"prompt": [], "completion": [], "advantages": [], "rewards": defaultdict(list)},
        _pending_extra_logs={},
        _pending_metrics={},
    )
    ones = [[1]] * len(rewards)
    trainer._generate = lambda prompts: (ones, ones, None, ["word"] * len(rewards), None, {}, None, None)
    trainer._calculate_rewards = lambda *args: rewards
    with patch.object(grpo_trainer, "gather_object", lambda things: things):
        output = trainer._generate_and_score_completions([{"prompt": "word"}] * len(rewards))
    return output["advantages"], trainer._metrics["train"]["frac_reward_zero_std"][-1]


def trl_overlong(lengths: Sequence[int], max_length: int, buffer: int) -> list[float]:
    """DAPO's penalty of completions of these lengths."""
    return get_soft_overlong_punishment(max_length, buffer)([[0] * length for length in lengths])


def trl_divergence(student: Tensor, teacher: Tensor, beta: float, temperature: float) -> Tensor:
    """[N] generalised Jensen-Shannon divergences of GKDTrainer."""
    loss = GKDTrainer.generalized_jsd_loss(student, teacher, beta=beta, temperature=temperature, reduction="none")
    return loss.sum(-1)
