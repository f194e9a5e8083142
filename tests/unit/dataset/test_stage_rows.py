"""What each stage trains on."""

from __future__ import annotations

import pytest

from fourfold.base import registry
from fourfold.base.errors import ConfigError
from fourfold.dataset.stage_rows import row_kind


@pytest.mark.parametrize("stage", registry.names("fourfold.objectives"))
def test_row_kind_when_the_stage_can_be_trained_is_known(stage: str) -> None:
    assert row_kind(stage)


def test_row_kind_when_the_stage_has_none_lists_those_that_have() -> None:
    with pytest.raises(ConfigError, match=r"stage: no rows are known for 'none'. Use one of: pt, sft, rm"):
        row_kind("none")
