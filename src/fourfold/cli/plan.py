"""`fourfold plan`: what fits, what is fastest and why, before anything runs."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fourfold.base.errors import ConfigError, ModelError, PlanError, first_line
from fourfold.base.log import get_logger
from fourfold.cli.hardware import Gpu, Gpus, HardwareFile, Nodes, cluster_of
from fourfold.cli.session import Words, clear_errors

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from fourfold.config.rules import Verb
    from fourfold.config.schema import Run
    from fourfold.planning.hardware import Cluster
    from fourfold.planning.search import Plan
    from fourfold.planning.shape import ModelShape

log = get_logger(__name__)

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Plot = Annotated[str | None, typer.Option("--plot", metavar="FILE.png", help="Draw the memory of each layout.")]
Write = Annotated[bool, typer.Option("--write", help="Put the best layout's lines into FILE.")]


@dataclass(frozen=True, slots=True)
class _Asked:
    """A config that was read.

    Attributes:
        file: that it came from; None for words alone.
    """

    run: Run
    file: Path | None


def plan(
    words: Words = None,
    gpu: Gpu = None,
    gpus: Gpus = None,
    nodes: Nodes = None,
    hardware: HardwareFile = None,
    as_json: AsJson = False,
    plot: Plot = None,
    write: Write = False,
) -> None:
    """Tell what fits, what is fastest and why, before the run; exit code 1 where nothing fits."""
    with clear_errors():
        asked = _read("plan", words)
        if write and asked.file is None:
            raise ConfigError("write: needs a config file to write to. Write `fourfold plan FILE.yaml --write`.")
        cluster = cluster_of(gpu, gpus, nodes, hardware, nproc=asked.run.parallel.nproc)
        found = plan_run(asked.run, cluster)
        _show(found, as_json)
        if plot is not None:
            from fourfold.planning.draw import draw

            draw(found, Path(plot))
            log.info("Drawn: %s", plot)
        if write and asked.file is not None:
            _write(found, asked.file)
        if found.best is None:
            raise typer.Exit(1)


def plan_run(run: Run, cluster: Cluster, *, eager: bool = False) -> Plan:
    """The plan of a run's job on a cluster, from the shape of its model; what is unusual is logged.

    Args:
        eager: layers are taken to run as they are, though the run may compile them.
    Raises:
        ModelError: no such model, or one whose shape cannot be read.
        PlanError: sizes or a dtype that cannot work.
    """
    from fourfold.config.second import teacher_run
    from fourfold.planning.job import Job, Teacher
    from fourfold.planning.known_shape import find_shape
    from fourfold.planning.search import search
    from fourfold.planning.wishes import Wishes

    for note in cluster.notes:
        log.warning("%s", note)
    shape = find_shape(run.model, _reader(run))
    _warn(run, cluster, shape)
    job = Job.of(run)
    teacher = teacher_run(run)
    if teacher is not None:
        job = replace(job, teacher=Teacher.of(teacher, find_shape(teacher.model, _reader(teacher, "teacher_model"))))
        log.info("The teacher's memory is in the plan, its time is not.")
    wishes = Wishes.of(run)
    return search(shape, job, cluster, replace(wishes, compiles=False) if eager else wishes)


def read_run(verb: Verb, words: Sequence[str] | None) -> Run:
    """The run to plan. It needs a model and nothing else: no data, no output folder.

    Raises:
        ConfigError: with every problem of the keys.
    """
    return _read(verb, words).run


def _read(verb: Verb, words: Sequence[str] | None) -> _Asked:
    """The run to plan. It needs a model and nothing else: no data, no output folder.

    Raises:
        ConfigError: with every problem of the keys.
    """
    if not words:
        raise ConfigError(f"{verb}: needs a config. Write `fourfold {verb} FILE.yaml`, or give keys as key=value.")
    from fourfold.config.begin import begin

    has_file = not words[0].startswith("--") and "=" not in words[0]
    run = begin(words[0] if has_file else None, words[1:] if has_file else words, verb)
    return _Asked(run, Path(words[0]) if has_file else None)


def _reader(run: Run, key: str = "model_name_or_path") -> Callable[[], ModelShape]:
    """Reads the shape of a run's model with torch, where it is not known yet.

    Args:
        key: that names the model, for messages.
    """

    def read() -> ModelShape:
        from fourfold.base.hub import settle_hub
        from fourfold.config.paths import names_hub

        if names_hub(run):
            settle_hub()
        from fourfold.planning.read_shape import read_shape

        name = run.model.model_name_or_path
        try:
            return read_shape(_load_config(run), trust_remote_code=run.model.trust_remote_code)
        except (ValueError, AttributeError, KeyError) as error:
            reason = first_line(error)
            raise ModelError(
                f"{key}: {name} is not a causal language model whose shape can be read ({reason}). "
                "Use a model that Transformers has a causal language model for."
            ) from error

    return read


def _load_config(run: Run) -> PreTrainedConfig:
    """The model's config as Transformers has it: what `models.load` does, less what the shape does not depend on.

    That module imports all that loading weights takes, which is a second more.
    """
    from transformers import AutoConfig

    from fourfold.families.composite import language_model_of
    from fourfold.models.source import explained, gguf_path, hub_options, model_name

    name = model_name(run.model, weights=False)
    path = gguf_path(name)
    if path is not None:
        from fourfold.models.gguf_model import load_gguf_config

        return load_gguf_config(path)
    with explained(name, "the config"):
        return language_model_of(AutoConfig.from_pretrained(name, **hub_options(run.model)))


def _warn(run: Run, cluster: Cluster, shape: ModelShape) -> None:
    cutoff, context = run.data.cutoff_len, shape.max_positions
    if context and cutoff > context and run.model.rope_scaling is None:
        log.warning(
            "cutoff_len: %d is more than the %d positions of the model. Use cutoff_len: %d, or rope_scaling.",
            cutoff, context, context,
        )  # fmt: skip
    training = run.training
    if not (training.bf16 or training.fp16 or training.pure_bf16):
        log.warning("bf16: is false, and so is fp16, so this plans for fp32. Use %s: true.", cluster.device.best_half)


def _show(found: Plan, as_json: bool) -> None:
    from fourfold.planning import report

    if as_json:
        print(json.dumps(report.as_json(found), indent=2))
        return
    text = report.as_text(found)
    if not sys.stdout.isatty():
        print(text)
        return
    from rich.console import Console
    from rich.text import Text

    console = Console(width=report.WIDTH, highlight=False)
    for line in text.splitlines():
        style = "bold" if line[:2].isupper() else "green" if line.startswith(" 1 ") else ""
        console.print(Text(line, style=style))


def _write(found: Plan, file: Path) -> None:
    from fourfold.planning.report import best_config
    from fourfold.planning.write_config import write_config

    keys = best_config(found)
    if keys is None or found.best is None:
        raise PlanError(f"write: nothing fits, so {file} was left as it is. Make one of the changes above.")
    write_config(file, keys, found.best.layout)
    log.info("Written into %s: %s", file, ", ".join(keys))
