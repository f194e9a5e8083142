"""The value head: where it reads, what is trained beside it, and its file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fourfold.base.errors import CheckpointError, ConfigError, ModelError
from fourfold.checkpoint.resume import load_weights
from fourfold.config.model import ModelConfig
from fourfold.config.tuning import TuningConfig
from fourfold.dataset.batch import IGNORE_INDEX, Example, Sample
from fourfold.dataset.collate import CutPolicy, cut, filler
from fourfold.models.adapters import attach, identify_base
from fourfold.models.forward import StepModel
from fourfold.models.unwrap import TunedModel, base_model
from fourfold.models.value_head import FILE, ValueHead, add_value_head, check_value_head, new_value_head
from fourfold.models.weights import save_model
from fourfold.parallel.loss import Outputs, document_values
from fourfold.parallel.shares import Shares
from fourfold.parallel.stages import value_head_of
from tiny_models import Load, save_tiny_model

TUNINGS = {
    "full": TuningConfig(finetuning_type="full"),
    "freeze": TuningConfig(finetuning_type="freeze", freeze_trainable_layers=1),
    "lora": TuningConfig(lora_rank=4),
}


def rewards(load: Load, tuning: TuningConfig, seed: int = 3, folder: Path | None = None) -> TunedModel:
    """A reward model that is trained."""
    model, config = load() if folder is None else load(folder)
    module = attach(model, config, tuning, trainable=True, reads_logits=False)
    add_value_head(module, config, seed=seed, trains_bias=False)
    return module


def head_of(module: TunedModel) -> ValueHead:
    head = value_head_of(base_model(module))
    assert isinstance(head, ValueHead)
    return head


def pairs(*lengths: tuple[int, int]) -> list[Sample]:
    """Samples of two sequences, of tokens that differ from place to place."""
    found, token = [], 3
    for index, sizes in enumerate(lengths):
        examples = []
        for size in sizes:
            ids = [(token + i) % 300 for i in range(size)]
            token += size
            examples.append(Example(ids, [IGNORE_INDEX] * size))
        found.append(Sample(dict(zip(("chosen", "rejected"), examples, strict=True)), index))
    return found


# Where it reads.


@pytest.mark.parametrize("packed", [True, False])
def test_values_when_read_are_those_of_each_sequence_alone_at_its_last_token(packed: bool, load: Load) -> None:
    module = rewards(load, TUNINGS["full"]).eval()
    samples = pairs((5, 7), (3, 4))
    [batch] = cut(samples, CutPolicy(packed=packed, max_tokens=100, multiple=8))
    with torch.no_grad():
        values = document_values(StepModel(module, packed=packed)(batch), batch)
        inner, head = base_model(module), head_of(module)
        for number, (index, role) in enumerate(batch.samples):
            if packed and number >= 4:
                continue  # fills the row up
            ids = list(samples[index].sequences.values())[role].input_ids
            boundaries = {"lengths": (len(ids),)} if packed else {}
            hidden = inner(input_ids=torch.tensor([ids]), hidden_only=True, **boundaries).last_hidden_state[0, -1]
            expected = hidden @ head.summary.weight[0] + head.summary.bias[0]
            assert float(values[number]) == pytest.approx(float(expected), abs=1e-5)


@pytest.mark.parametrize("packed", [True, False])
def test_values_when_written_out_by_hand_are_read_at_the_ends(packed: bool) -> None:
    """Hidden states that say where they are, and a head that reads them out: 10 * row + column."""
    [batch] = cut(pairs((2, 3), (1, 4)), CutPolicy(packed=packed, max_tokens=100, multiple=6))
    rows, columns = batch.input_ids.shape
    hidden = (10.0 * torch.arange(rows)[:, None] + torch.arange(columns))[..., None]
    values = document_values(Outputs(hidden, lambda x: x, value=lambda x: x.squeeze(-1)), batch)
    expected = [1.0, 4.0, 5.0, 9.0, 11.0] if packed else [1.0, 12.0, 20.0, 33.0]
    assert values.tolist() == expected


def test_values_when_a_batch_only_fills_up_still_give_the_head_a_gradient() -> None:
    """Replicas wait for the gradient of every trained weight."""
    head = new_value_head(4, seed=0)
    batch = filler(CutPolicy(packed=True, max_tokens=8))
    outputs = Outputs(torch.ones(1, batch.input_ids.shape[1], 4), lambda x: x, value=head)
    (document_values(outputs, batch)[torch.empty(0, dtype=torch.int64)].sum() * 1.0).backward()
    assert head.summary.weight.grad is not None
    assert float(head.summary.weight.grad.abs().sum()) == 0.0


def test_value_head_under_autocast_computes_in_fp32() -> None:
    head, hidden = new_value_head(64, seed=0), torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", torch.bfloat16):
        found = head(hidden)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, hidden @ head.summary.weight[0], rtol=1e-6, atol=1e-6)


# What is made and trained.


def test_value_head_when_new_depends_on_the_seed_alone() -> None:
    one = new_value_head(4096, seed=1).summary.weight
    torch.manual_seed(99)
    assert torch.equal(new_value_head(4096, seed=1).summary.weight, one)
    assert not torch.equal(new_value_head(4096, seed=2).summary.weight, one)
    assert float(one.detach().std()) == pytest.approx(0.02, rel=0.05)
    assert float(new_value_head(4096, seed=1).summary.bias.detach()) == 0.0


@pytest.mark.parametrize("tuning", sorted(TUNINGS))
def test_value_head_when_attached_is_trained_and_the_logits_head_is_not(tuning: str, load: Load) -> None:
    module = rewards(load, TUNINGS[tuning])
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    assert [name for name in trained if "v_head" in name] == [
        f"{'base_model.model.' if tuning == 'lora' else ''}v_head.summary.weight"
    ]
    assert len(trained) > 1
    assert not any("lm_head" in name for name in trained)


def test_full_tuning_when_the_head_is_the_embedding_trains_it(load: Load, tmp_path: Path) -> None:
    module = rewards(load, TUNINGS["full"], folder=save_tiny_model(tmp_path, "qwen3"))
    assert base_model(module).get_input_embeddings().weight.requires_grad


def test_full_tuning_when_the_head_is_not_trained_leaves_its_dtype(load: Load, llama_folder: Path) -> None:
    """No fp32 master is made of it."""
    model, config = load()
    model = model.to(torch.bfloat16)
    attach(model, config, TUNINGS["full"], trainable=True, reads_logits=False)
    assert {p.dtype for p in model.get_output_embeddings().parameters()} == {torch.bfloat16}
    assert model.get_input_embeddings().weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("tuning", "key"),
    [
        (TuningConfig(lora_target=("lm_head", "q_proj")), "lora_target"),
        (TuningConfig(lora_target=("q_proj",), additional_target=("lm_head",)), "additional_target"),
        (TuningConfig(finetuning_type="freeze", freeze_extra_modules=("lm_head",)), "freeze_extra_modules"),
    ],
)
def test_attach_when_asked_to_train_a_head_that_nothing_reads_refuses(
    tuning: TuningConfig, key: str, load: Load
) -> None:
    model, config = load()
    with pytest.raises(ConfigError, match=f"{key}: has the head trained, which gets no gradient.*Leave the head out"):
        attach(model, config, tuning, trainable=True, reads_logits=False)


# Its file.


@pytest.mark.parametrize("tuning", sorted(TUNINGS))
def test_reward_model_when_saved_has_a_file_of_its_own_under_the_usual_names(
    tuning: str, load: Load, tmp_path: Path
) -> None:
    module = rewards(load, TUNINGS[tuning])
    save_model(module, tmp_path)
    found = load_file(tmp_path / FILE)
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == {
        "v_head.summary.weight": (1, 32),
        "v_head.summary.bias": (1,),
    }
    assert torch.equal(found["v_head.summary.weight"], head_of(module).summary.weight)
    others = tmp_path / ("adapter_model.safetensors" if tuning == "lora" else "model.safetensors")
    assert not any("v_head" in name for name in load_file(others))


def test_model_without_a_value_head_when_saved_writes_none(load: Load, tmp_path: Path) -> None:
    model, _ = load()
    save_model(model, tmp_path)
    assert not (tmp_path / FILE).exists()


@pytest.mark.parametrize("tuning", sorted(TUNINGS))
def test_value_head_when_its_model_is_loaded_again_is_the_saved_one(
    tuning: str, load: Load, llama_folder: Path, tmp_path: Path
) -> None:
    module = rewards(load, TUNINGS[tuning], seed=3)
    saved = head_of(module).summary.weight.detach().clone()
    _, config = load()
    save_model(module, tmp_path, base=identify_base(config, TUNINGS[tuning]) if tuning == "lora" else None)
    keys = {"adapter_name_or_path": (str(tmp_path),)} if tuning == "lora" else {}
    again = ModelConfig(model_name_or_path=str(llama_folder if tuning == "lora" else tmp_path), **keys)
    model, _ = load()
    add_value_head(model, again, seed=4, trainable=False, required=True)
    assert torch.equal(head_of(model).summary.weight, saved)
    assert not head_of(model).summary.weight.requires_grad


def test_value_head_when_adapter_and_base_have_one_is_the_adapters(
    load: Load, llama_folder: Path, tmp_path: Path
) -> None:
    for folder, value in (("base", 1.0), ("adapter", 2.0)):
        (tmp_path / folder).mkdir()
        weights = {"v_head.summary.weight": torch.full((1, 32), value), "v_head.summary.bias": torch.zeros(1)}
        save_file(weights, tmp_path / folder / FILE)
    model, _ = load()
    config = ModelConfig(
        model_name_or_path=str(tmp_path / "base"), adapter_name_or_path=(str(tmp_path / "adapter"), str(llama_folder))
    )
    add_value_head(model, config, seed=0)
    assert float(head_of(model).summary.weight.detach()[0, 0]) == 2.0


def test_value_head_when_there_is_none_and_one_is_needed_names_the_file(load: Load, llama_folder: Path) -> None:
    model, config = load()
    with pytest.raises(ModelError) as caught:
        add_value_head(model, config, seed=0, required=True)
    assert str(caught.value) == (
        f"model_name_or_path: {llama_folder} has no value_head.safetensors, so it is no reward model. Train one with "
        "stage: rm and do_train: true, or name the folder of one."
    )
    with pytest.raises(ModelError, match=f"^reward_model: {llama_folder} has no"):
        check_value_head(config, "reward_model")
    gone = ModelConfig(model_name_or_path=str(llama_folder), adapter_name_or_path=("/no/such/folder",))
    with pytest.raises(ModelError, match="^reward_model: there is no folder /no/such/folder"):
        check_value_head(gone, "reward_model")


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ({"v_head.summary.weight": torch.zeros(1, 32)}, r"has no v_head\.summary\.bias"),
        (
            {"v_head.summary.weight": torch.zeros(1, 16), "v_head.summary.bias": torch.zeros(1)},
            r"v_head\.summary\.weight has the shape \[1, 16\], and this model needs \[1, 32\]",
        ),
        (None, "value_head.safetensors cannot be loaded"),
    ],
)
def test_value_head_when_its_file_is_wrong_says_how(
    weights: dict[str, Tensor] | None, expected: str, load: Load, tmp_path: Path
) -> None:
    if weights is None:
        (tmp_path / FILE).write_bytes(b"not safetensors")
    else:
        save_file(weights, tmp_path / FILE)
    model, _ = load()
    with pytest.raises(ModelError, match=expected):
        add_value_head(model, ModelConfig(model_name_or_path=str(tmp_path)), seed=0)


@pytest.mark.parametrize("tuning", sorted(TUNINGS))
def test_checkpoint_when_put_back_restores_the_value_head(tuning: str, load: Load, tmp_path: Path) -> None:
    save_model(rewards(load, TUNINGS[tuning], seed=3), tmp_path)
    module = rewards(load, TUNINGS[tuning], seed=4)
    load_weights(module, tmp_path, Shares())
    assert torch.equal(head_of(module).summary.weight, new_value_head(32, seed=3, std=0.2).summary.weight)


def test_checkpoint_when_it_has_no_value_head_is_refused(load: Load, tmp_path: Path) -> None:
    save_model(rewards(load, TUNINGS["lora"]), tmp_path)
    (tmp_path / FILE).unlink()
    with pytest.raises(CheckpointError, match=r"value_head\.safetensors: is missing; the checkpoint holds no reward"):
        load_weights(rewards(load, TUNINGS["lora"]), tmp_path, Shares())


def test_bias_when_a_stage_compares_values_only_gets_no_gradient_but_rounding(load: Load) -> None:
    """Why stage rm does not train it: the loss of a pair is a function of r_chosen - r_rejected."""
    module = rewards(load, TUNINGS["full"])
    head_of(module).summary.bias.requires_grad_(True)
    [batch] = cut(pairs((5, 7)), CutPolicy(packed=True, max_tokens=100))
    chosen, rejected = document_values(StepModel(module, packed=True)(batch), batch)
    torch.nn.functional.softplus(rejected - chosen).backward()
    grad = head_of(module).summary.bias.grad
    assert grad is not None
    assert float(grad) == pytest.approx(0.0, abs=1e-7)
    assert float(head_of(module).summary.weight.grad.abs().max()) > 1e-3  # type: ignore[union-attr]
