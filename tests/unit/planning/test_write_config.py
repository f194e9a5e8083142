"""Keys are put into a user's file, and the rest of it stays."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fourfold.base.errors import PlanError
from fourfold.config.load import load
from fourfold.planning.config_lines import config_of
from fourfold.planning.layout import Layout, resolve_layout
from fourfold.planning.predictor import Form
from fourfold.planning.write_config import write_config

LAYOUT = Layout(dp_shard=4, tp=2)
KEYS = config_of(Form(LAYOUT, "selective", 4096))

PLAIN = """\
# my run
model_name_or_path: some/model  # the base
strategy: auto   # let it choose
bf16: true
"""


def _written(tmp_path: Path, text: str, name: str = "run.yaml") -> str:
    file = tmp_path / name
    file.write_text(text, encoding="utf-8")
    write_config(file, KEYS, LAYOUT)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    run = load(file)
    assert resolve_layout(run.parallel, 8) == LAYOUT
    assert (run.parallel.recompute, run.training.micro_batch_tokens) == ("selective", 4096)
    return file.read_text(encoding="utf-8")


def test_yaml_when_keys_are_new_has_them_at_the_end(tmp_path: Path) -> None:
    assert _written(tmp_path, PLAIN) == (
        "# my run\n"
        "model_name_or_path: some/model  # the base\n"
        "strategy: fsdp   # let it choose\n"
        "bf16: true\n"
        "\n"
        "parallel:\n  dp_shard: 4\n  tp: 2\n  recompute: selective\n"
        "micro_batch_tokens: 4096\n"
    )


def test_yaml_when_it_has_the_mapping_changes_its_lines(tmp_path: Path) -> None:
    text = (
        "parallel:          # layout\n    # sizes\n    tp: 2      # mine\n    recompute: auto  # ?\n"
        "\n# data\ncutoff_len: 512\nmicro_batch_tokens: 1\n"
    )
    assert _written(tmp_path, text) == (
        "parallel:          # layout\n    # sizes\n    tp: 2      # mine\n    recompute: selective  # ?\n"
        "    dp_shard: 4\n"
        "\n# data\ncutoff_len: 512\nmicro_batch_tokens: 4096\n"
        "\nstrategy: fsdp\n"
    )


@pytest.mark.parametrize(
    "text",
    [
        "parallel: {tp: 2, recompute: auto}\nbf16: true\n",
        "parallel: {tp: 2,\n  recompute: auto}\nbf16: true\n",
        "parallel:\nbf16: true\n",
        "parallel.tp: 2\nparallel.recompute: full\n",
        "",
    ],
)
def test_yaml_when_written_otherwise_means_the_plan_then(tmp_path: Path, text: str) -> None:
    _written(tmp_path, text)


def test_json_when_written_keeps_its_order_and_indent(tmp_path: Path) -> None:
    text = '{\n    "bf16": true,\n    "parallel": {"tp": 2, "ep": null},\n    "strategy": "auto"\n}\n'
    written = _written(tmp_path, text, "run.json")
    assert list(json.loads(written)) == ["bf16", "parallel", "strategy", "micro_batch_tokens"]
    assert json.loads(written)["parallel"] == {"tp": 2, "ep": None, "dp_shard": 4, "recompute": "selective"}
    assert written.splitlines()[1] == '    "bf16": true,'


@pytest.mark.parametrize(
    "text", ["parallel:\n  pp: 2\n", "deepspeed_zero_stage: 2\n", "parallel:\n  recompute:\n    - 1\n"]
)
def test_write_when_the_file_contradicts_the_plan_leaves_it(tmp_path: Path, text: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(PlanError, match="left as it"):
        write_config(file, KEYS, LAYOUT)
    assert file.read_text(encoding="utf-8") == text
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]
