"""How to install what is missing is told as the README tells it: an index's `fourfold` is another project's."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from fourfold.base.errors import ConfigError
from fourfold.config.load import load
from fourfold.trackers.interface import import_service
from fourfold.training.optimizers import adamw_8bit

_ROOT = Path(__file__).parents[3]
_KEYS = {"model_name_or_path": "m", "dataset": "d", "output_dir": "o"}


def test_optimizer_when_its_package_is_missing_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim.adamw", None)
    with pytest.raises(ConfigError, match=r"Run `pip install -e '\.\[quant\]'` in Fourfold's folder\."):
        adamw_8bit.build([], torch.nn.Linear(1, 1), load(_KEYS, verb="train"))


def test_service_when_it_is_missing_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match="Install it with `pip install x`, or leave it out"):
        import_service("wandb", "`pip install x`")


def test_extras_when_named_in_source_are_there_and_never_fetched_from_an_index() -> None:
    extras = tomllib.loads((_ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    sources = [path.read_text(encoding="utf-8") for path in (_ROOT / "src" / "fourfold").rglob("*.py")]
    assert not [text for text in sources if "fourfold[" in text]
    named = {name for text in sources for name in re.findall(r"install_extra\(['\"](\w+)['\"]\)", text)}
    assert {"quant", "kernels", "wandb"} <= named <= set(extras)
