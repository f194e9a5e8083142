"""The table of keys as text."""

from __future__ import annotations

from pathlib import Path

import pytest

from fourfold.base.errors import ConfigError
from fourfold.config.render import WIDTH, key_help, overview, pages
from fourfold.config.schema import table

DOCS = Path(__file__).parents[3] / "docs"


def test_pages_when_written_anew_are_what_the_repository_holds() -> None:
    for path, text in pages(DOCS).items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name}: run `python -m fourfold.config.render docs`"


@pytest.mark.parametrize("name", list(table()))
def test_key_help_when_asked_for_any_key_fits_the_terminal(name: str) -> None:
    text = key_help(name)
    assert text.startswith(name)
    assert table()[name].spec.help.split()[0] in text
    assert max(map(len, text.splitlines())) <= WIDTH


def test_key_help_when_a_key_has_a_folder_lists_its_values() -> None:
    assert "Values: adafactor, " in key_help("optim")
    assert "Same as adamw_torch: adamw_torch_fused" in key_help("optim")


def test_key_help_when_asked_for_a_group_lists_its_keys() -> None:
    assert "lora_rank (8): Rank of the adapters." in key_help("lora")


def test_key_help_when_there_is_no_such_key_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="Did you mean cutoff_len"):
        key_help("cutof_len")


def test_overview_when_printed_names_every_own_key() -> None:
    text = overview()
    assert all(name in text for name in ("cutoff_len", "parallel.tp", "lora_rank"))
    assert max(map(len, text.splitlines())) <= WIDTH
