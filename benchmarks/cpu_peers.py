"""The peers of cpu_sft.py: what each process does. Each trains when it is its turn, step by step.

Nothing heavy is imported at the top: a peer's memory is to hold what that peer needs.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from step_clock import StepClock


@dataclass(frozen=True)
class Plan:
    """What all peers do alike.

    Attributes:
        config: Fourfold's config; the others take their settings from its keys.
        work: folder of the converted model, the first adapter and the tokenised rows.
        steps: optimizer steps.
        threads: torch's threads.
    """

    config: dict[str, Any]
    work: Path
    steps: int
    threads: int

    @property
    def model(self) -> Path:
        return self.work / "model"

    @property
    def adapter(self) -> Path:
        return self.work / "adapter"

    @property
    def rows(self) -> Path:
        return self.work / "rows.json"


def make_common_files(plan: Plan, _: Connection) -> None:
    """Convert the model, start the adapter and tokenise the rows, once for all peers."""
    import torch

    from fourfold.config.load import load
    from fourfold.dataset.prepare import prepare
    from fourfold.models.adapters import attach
    from fourfold.models.load import load_model
    from fourfold.models.renderer import load_renderer

    run = load(plan.config, verb="train")
    torch.manual_seed(run.training.seed)
    tokenizer, renderer = load_renderer(run)
    data = prepare(run, tokenizer, renderer).train
    assert data is not None
    rows = [sample.sequences[""] for sample in (data[i] for i in range(len(data)))]
    text = json.dumps([{"input_ids": row.input_ids, "labels": row.labels} for row in rows])
    plan.rows.write_text(text, encoding="utf-8")
    model = load_model(run.model, dtype=torch.float32, device=torch.device("cpu"), tokenizer=tokenizer)
    model.save_pretrained(plan.model)
    tokenizer.save_pretrained(plan.model)
    attach(model, run.model, run.tuning, trainable=True).save_pretrained(str(plan.adapter))


def fourfold(plan: Plan, connection: Connection) -> None:
    """This project, through the loop that `fourfold train` runs."""
    import torch

    from fourfold.config.load import load
    from recorder import prepare

    torch.set_num_threads(plan.threads)
    config = {**plan.config, "adapter_name_or_path": str(plan.adapter), "output_dir": str(plan.work / "fourfold")}
    run = load({**config, "overwrite_output_dir": True}, verb="train")
    prepared = prepare(run, _turns(connection))
    prepared.fit()
    connection.send(prepared.clock.steps)


def huggingface(plan: Plan, connection: Connection, *, checkpointing: bool) -> None:
    """Transformers' Trainer with PEFT."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

    torch.set_num_threads(plan.threads)
    rows = json.loads(plan.rows.read_text(encoding="utf-8"))
    config = plan.config
    base = AutoModelForCausalLM.from_pretrained(plan.model, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(plan.adapter), is_trainable=True)
    clock = StepClock(_turns(connection))
    per_step = config["per_device_train_batch_size"] * config["gradient_accumulation_steps"]
    arguments = TrainingArguments(
        output_dir=str(plan.work / "huggingface"),
        per_device_train_batch_size=config["per_device_train_batch_size"],
        gradient_accumulation_steps=config["gradient_accumulation_steps"],
        gradient_checkpointing=checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        learning_rate=config["learning_rate"],
        lr_scheduler_type="constant",
        max_grad_norm=config["max_grad_norm"],
        max_steps=plan.steps,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to="none",
        train_sampling_strategy="sequential",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        data_collator=DataCollatorForSeq2Seq(AutoTokenizer.from_pretrained(plan.model)),
        callbacks=[_clock_callback(clock, [len(row["input_ids"]) for row in rows], per_step)],
    )
    trainer.train()
    connection.send(clock.steps)


def _clock_callback(clock: StepClock, lengths: list[int], per_step: int) -> Any:
    """A TrainerCallback that gives a clock the beat of the Trainer's loop over rows in order."""
    from transformers import TrainerCallback

    class ClockCallback(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            clock.begin()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            steps_per_epoch = -(-len(lengths) // per_step)
            start = ((state.global_step - 1) % steps_per_epoch) * per_step
            clock.end(sum(lengths[start : start + per_step]))

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if logs and "loss" in logs:
                clock.steps[-1].loss = float(logs["loss"])
                clock.steps[-1].grad_norm = float(logs["grad_norm"])

    return ClockCallback()


def _turns(connection: Connection) -> Callable[[], None]:
    """Before each step: say that this peer is ready, and wait for its turn."""

    def turn() -> None:
        connection.send(None)
        connection.recv()

    return turn


PEERS: dict[str, Callable[[Plan, Connection], None]] = {
    "fourfold": fourfold,
    "hf_checkpointing": partial(huggingface, checkpointing=True),
    "hf": partial(huggingface, checkpointing=False),
}
"""What is compared; the second is what the others' speed is measured against."""
