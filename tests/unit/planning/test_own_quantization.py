"""A checkpoint that is quantised already is planned as it is."""

from __future__ import annotations

from typing import Any

import pytest

from fourfold.base.errors import ConfigError
from fourfold.planning.hardware import build_cluster
from fourfold.planning.job import Job
from fourfold.planning.read_shape import read_shape
from fourfold.planning.search import search
from fourfold.planning.shape import ModelShape
from tiny_models import tiny_config

_FOUR = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_use_double_quant": True}


def _shape(**own: Any) -> ModelShape:
    config = tiny_config("llama")
    config.quantization_config = own
    return read_shape(config)


@pytest.mark.parametrize(
    ("own", "bits", "double"),
    [
        (_FOUR, 4, True),
        ({**_FOUR, "bnb_4bit_use_double_quant": False}, 4, False),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, 8, False),
        ({"quant_method": "mxfp4"}, None, False),  # expanded when it is loaded
    ],
)
def test_bits_when_the_checkpoint_has_them_are_in_the_shape(
    own: dict[str, Any], bits: int | None, double: bool
) -> None:
    shape = _shape(**own)
    assert (shape.own_bits, shape.own_double_quant) == (bits, double)
    assert shape.numel == read_shape(tiny_config("llama")).numel
    assert ModelShape.from_json(shape.as_json()) == shape


def test_shape_when_the_method_cannot_be_trained_is_refused() -> None:
    with pytest.raises(ValueError, match="quantised by gptq, which cannot be trained"):
        _shape(quant_method="gptq")


def test_plan_when_the_checkpoint_is_packed_counts_packed_weights() -> None:
    cluster, job = build_cluster("h100"), Job(double_quant=False)
    own, asked, plain = (
        search(shape, wanted, cluster)
        for shape, wanted in ((_shape(**_FOUR), job), (_shape(), Job(bits=4)), (_shape(), job))
    )
    assert own.job == asked.job == Job(bits=4, double_quant=True)
    assert own.whole == asked.whole
    assert own.whole.terms["parameters"] < plain.whole.terms["parameters"]


@pytest.mark.parametrize(
    ("job", "message"),
    [
        (Job(bits=8), "quantization_bit: 8 contradicts the checkpoint, which is quantised to 4 bits"),
        (Job(tuning="full"), "finetuning_type: full cannot train the 4-bit weights"),
    ],
)
def test_job_when_it_contradicts_the_checkpoint_is_refused(job: Job, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        search(_shape(**_FOUR), job, build_cluster("h100"))
