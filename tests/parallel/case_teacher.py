"""The teacher of a case of stage kd."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from fourfold.dataset.collate import CutPolicy, filler
from fourfold.losses.token import TokenLoss
from fourfold.models.forward import StepModel
from fourfold.models.targets import decoder_blocks
from fourfold.parallel.apply import parallelize
from fourfold.parallel.mesh import Mesh
from fourfold.parallel.step import Step
from fourfold.training.frozen import layout_of_frozen
from fourfold.training.teacher import LoadedTeacher
from tiny_models import MOE_FAMILIES, quantize, tiny_model

if TYPE_CHECKING:
    from harness import Case

_CPU = torch.device("cpu")


def make_teacher(case: Case, mesh: Mesh, vocab_size: int) -> LoadedTeacher:
    """A wider and deeper model than the case's own, with another number of rows that pad the vocabulary.

    Args:
        vocab_size: of the case's own.
    """
    own = {**dict(case.overrides), "hidden_size": 128, "vocab_size": vocab_size + case.teacher_rows}
    own["num_hidden_layers"] = own.get("num_hidden_layers", 2) + 1
    family = case.teacher_family or ("qwen3" if case.family == "llama" else "llama")
    module = tiny_model(family, seed=5, **own)
    if case.tuning == "qlora":
        quantize(module)
    module.requires_grad_(False)
    mesh = replace(mesh, layout=layout_of_frozen(mesh.layout, has_experts=family in MOE_FAMILIES))
    model = StepModel(module, packed=case.packed)
    split = parallelize(module, list(decoder_blocks(module)[1]), mesh, compute=None, vocabulary=vocab_size)
    model.take(split)
    step = Step(
        model,
        TokenLoss(),
        _CPU,
        nullcontext,
        lambda: filler(CutPolicy(packed=case.packed, max_tokens=1)),
        sync=split.sync,
        reducer=split.reducer,
        localize=split.localize,
        staged=split.staged(model),
        module=module,
    )
    return LoadedTeacher(step)
