"""The teacher of stage kd: whether it goes with the student, and its hidden states while the student is trained."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig, PreTrainedTokenizerBase

from fourfold.base.errors import ConfigError, ModelError
from fourfold.base.log import get_logger
from fourfold.base.units import format_bytes
from fourfold.config.schema import Run
from fourfold.dataset.batch import Batch
from fourfold.dataset.collate import CutPolicy, filler
from fourfold.families.shared_positions import is_exchangeable
from fourfold.losses.token import TokenLoss
from fourfold.models.load import load_config
from fourfold.models.tokenizer import load_tokenizer
from fourfold.parallel.sharded import local
from fourfold.parallel.step import Step
from fourfold.parallel.teacher import TeacherStates
from fourfold.training.build import Built
from fourfold.training.frozen import build_frozen, named_as

log = get_logger(__name__)

_KEYS = {
    "model_name_or_path": "teacher_model",
    "adapter_name_or_path": "teacher_model_adapters",
    "quantization_bit": "teacher_model_quantization_bit",
}
_HEADS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
"""Endings of the names of architectures that predict the next token."""


@dataclass(frozen=True, slots=True)
class LoadedTeacher:
    """A teacher on its rank.

    Attributes:
        step: runs it.
    """

    step: Step

    def states(self, batches: Sequence[Batch]) -> TeacherStates:
        """Its last hidden states; see `Scorer.teacher_states`. Of what sharding has gathered the head stays."""
        found = self.step.states(batches)
        self.step.rest(but_head=True)
        return found


def named_as_teacher() -> AbstractContextManager[None]:
    """Within it, errors of loading and splitting name the teacher's keys."""
    return named_as(_KEYS)


def check_teacher(run: Run, teacher: Run, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Refuse a teacher that cannot teach, before any weights are read.

    Args:
        teacher: `config.second.teacher_run` of the run.
        tokenizer: the student's, with the template's tokens settled.
    Returns:
        whether the teacher can be fed packed rows.
    Raises:
        ModelError: it cannot be loaded, or does not predict the next token.
        ConfigError: its vocabulary is another one.
    """
    with named_as_teacher():
        config = load_config(teacher.model)
        _check_head(config, teacher.model.model_name_or_path or "")
        others = load_tokenizer(teacher.model)
    rows = [each.get_text_config().vocab_size for each in (load_config(run.model), config)]
    _check_vocabulary(teacher.model.model_name_or_path or "", tokenizer, others, *rows)
    positions = config.get_text_config().to_dict().get("max_position_embeddings")
    if positions is not None and run.data.cutoff_len > positions:
        log.warning(
            "cutoff_len: %d is more than the teacher's %d positions. Use cutoff_len: %d, or another teacher.",
            run.data.cutoff_len,
            positions,
            positions,
        )
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    return model_class is not None and is_exchangeable(config, model_class)


def _check_head(config: PreTrainedConfig, name: str) -> None:
    """Refuse a model that does not predict the next token, which Transformers would give a new, random head."""
    named = list(config.architectures or [])
    known = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or "AutoModelForCausalLM" in getattr(config, "auto_map", {})
    if known and (not named or any(architecture.endswith(_HEADS) for architecture in named)):
        return
    kind = named[0] if named else f"{config.model_type} model"
    raise ModelError(
        f"model_name_or_path: {name} is a {kind}, which has no head that predicts the next token. Give a causal "
        "language model."
    )


def _check_vocabulary(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    others: PreTrainedTokenizerBase,
    student_rows: int,
    teacher_rows: int,
) -> None:
    """Refuse another vocabulary than the student's; rows that pad one of the two are no part of it."""
    own, theirs = tokenizer.get_vocab(), others.get_vocab()
    advice = "Give a teacher with the student's tokenizer."
    different = sorted(own.items() ^ theirs.items(), key=lambda item: (item[1], item[0]))
    if different:
        token, number = different[0]
        whose = "the student's" if own.get(token) == number else "the teacher's"
        raise ConfigError(
            f"teacher_model: the tokenizer of {name} has {len(theirs)} tokens and the student's {len(own)}, and they "
            f"differ: token {token!r} with id {number} is only in {whose}. {advice}"
        )
    if teacher_rows < min(student_rows, len(own)):
        raise ConfigError(
            f"teacher_model: {name} has {teacher_rows} rows for the {len(own)} tokens of its tokenizer, and the "
            f"student {student_rows}. {advice}"
        )


def load_teacher(teacher: Run, student: Built, tokenizer: PreTrainedTokenizerBase) -> LoadedTeacher:
    """Load the teacher and split it as the student is.

    Raises:
        ModelError: it cannot be loaded, or its logits cannot be made apart from it.
        ConfigError, PlanError: it does not go with the run's other keys or its layout.
    """
    name = teacher.model.model_name_or_path
    with named_as_teacher():
        built = build_frozen(teacher, student.mesh, tokenizer, beside=student)
        if not built.model.has_plain_head:
            raise ModelError(
                f"model_name_or_path: {name} makes its logits in a way of its own, of a whole sequence at once. Give "
                "another teacher."
            )
    held = sum(local(parameter).nbytes for parameter in built.module.parameters())
    log.info("Teacher: %s, %s on this rank, not trained", name, format_bytes(held))
    policy = CutPolicy(packed=built.model.packed, max_tokens=1)  # of fillers, which the student's step brings along
    return LoadedTeacher(built.step(TokenLoss(), lambda: filler(policy)))
