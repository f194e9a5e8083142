"""Train and fine-tune language models from one config file.

The verbs of the command line as functions. Each takes a config, which is a YAML or JSON file or a mapping of the same
keys, and further keys that win over it; each raises `fourfold.base.errors.FourfoldError` for what the user has to
settle. `fourfold help KEY` explains a key.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Imported before the function of the same name is defined, so that the module never takes its place.
from fourfold.version import __version__

Config = str | Path | Mapping[str, Any]

__all__ = ["Config", "__version__", "chat", "data", "env", "export", "train", "version"]


def train(config: Config, **overrides: Any) -> dict[str, Any]:
    """Train, evaluate or predict, as the config says; returns the figures of the run."""
    from fourfold.config.begin import begin

    run = begin(config, overrides, "train")
    from fourfold.training import run as training

    return training.train(run)


def chat(config: Config, **overrides: Any) -> None:
    """Talk to a model on the terminal."""
    from fourfold.config.begin import begin

    run = begin(config, overrides, "chat")
    from fourfold.serve import chat as serve

    serve.chat(run)


def export(config: Config, **overrides: Any) -> None:
    """Merge an adapter into its model and write the result to `export_dir`."""
    from fourfold.config.begin import begin

    run = begin(config, overrides, "export")
    from fourfold.checkpoint import export as checkpoint

    checkpoint.export(run)


def data(config: Config, **overrides: Any) -> str:
    """What will be trained, as text: rows, tokens, lengths, and the first example."""
    from fourfold.config.begin import begin

    run = begin(config, overrides, "data")
    from fourfold.cli.data import describe

    return describe(run)


def env() -> str:
    """Versions and devices, for a bug report."""
    from fourfold.cli.env import report

    return report()


def version() -> str:
    """The version of Fourfold."""
    return __version__
