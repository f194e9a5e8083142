"""The page of models says what the tests have: which families, and which axes each is split by.

FOURFOLD_UPDATE_GOLDEN=1 writes the table anew.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from transformers import CONFIG_MAPPING

from family_axes import axes_of, packs
from tiny_models import EVERY_FAMILY

_PAGE = Path(__file__).parents[2] / "docs" / "models.md"
_TABLE = re.compile(r"(?<=<!-- table -->\n).*?(?=<!-- end -->)", re.DOTALL)
_NAMES = {
    "apertus": "Apertus",
    "arcee": "Arcee AFM",
    "bamba": "Bamba",
    "bloom": "BLOOM",
    "codegen": "CodeGen",
    "cohere": "Command R",
    "cohere2": "Command R7B, Command A",
    "deepseek_v2": "DeepSeek-V2, DeepSeek-Coder-V2",
    "deepseek_v3": "DeepSeek-V3, R1, Kimi K2, Moonlight",
    "deepseek_v32": "DeepSeek-V3.2",
    "doge": "Doge",
    "dots1": "dots.llm1",
    "ernie4_5": "ERNIE 4.5, dense",
    "ernie4_5_moe": "ERNIE 4.5 MoE",
    "exaone": "EXAONE 3 and 3.5",
    "exaone4": "EXAONE 4",
    "exaone_moe": "K-EXAONE",
    "falcon": "Falcon",
    "falcon_h1": "Falcon-H1",
    "gemma": "Gemma",
    "gemma2": "Gemma 2",
    "gemma3_text": "Gemma 3",
    "gemma4_text": "Gemma 4",
    "glm": "GLM-4-9B",
    "glm4": "GLM-4-0414, GLM-Z1",
    "glm4_moe": "GLM-4.5, 4.6 and 4.7",
    "glm4_moe_lite": "GLM-4.7-Flash",
    "glm_moe_dsa": "GLM-5",
    "gpt2": "GPT-2",
    "gpt_bigcode": "StarCoder, SantaCoder",
    "gpt_neox": "Pythia, GPT-NeoX",
    "gpt_oss": "gpt-oss",
    "gptj": "GPT-J",
    "granite": "Granite 3",
    "granitemoe": "Granite 3 MoE",
    "granitemoehybrid": "Granite 4",
    "granitemoeshared": "Granite MoE with shared experts",
    "helium": "Helium",
    "hunyuan_v1_dense": "Hunyuan, dense",
    "hunyuan_v1_moe": "Hunyuan-A13B",
    "hy_v3": "Hunyuan 3",
    "internlm3": "InternLM3",
    "lfm2": "LFM2",
    "lfm2_moe": "LFM2 MoE",
    "llama": "Llama 1 to 3.3, Yi, SmolLM 1 and 2, DeepSeek-R1-Distill, and others",
    "mimo_v2_flash": "MiMo-V2-Flash",
    "minimax_m2": "MiniMax-M2",
    "ministral": "Ministral 8B",
    "ministral3": "Ministral 3",
    "mistral": "Mistral 7B, Nemo, Small",
    "mixtral": "Mixtral",
    "nanochat": "nanochat",
    "olmo": "OLMo",
    "olmo2": "OLMo 2",
    "olmo3": "OLMo 3",
    "olmo_hybrid": "OLMo Hybrid",
    "olmoe": "OLMoE",
    "opt": "OPT",
    "phi": "Phi-1 to 2",
    "phi3": "Phi-3 and 4",
    "qwen2": "Qwen1.5 to 2.5, QwQ",
    "qwen2_moe": "Qwen1.5-MoE, Qwen2-57B-A14B",
    "qwen3": "Qwen3, dense",
    "qwen3_5_moe_text": "Qwen3.5, with experts",
    "qwen3_5_text": "Qwen3.5, dense",
    "qwen3_moe": "Qwen3-30B-A3B, 235B-A22B, Qwen3-Coder",
    "qwen3_next": "Qwen3-Next",
    "seed_oss": "Seed-OSS",
    "smollm3": "SmolLM3",
    "stablelm": "StableLM",
    "starcoder2": "StarCoder2",
}


def _row(family: str) -> str:
    axes = axes_of(family)
    found = (packs(family), *(axis in axes for axis in ("tp", "pp", "cp", "ep")))
    marks = " | ".join("yes" if each else "" for each in found)
    return f"| `{family}` | {_NAMES[family]} | {marks} |"


def _rendered() -> str:
    head = "| family | for example | packed rows | `tp` | `pp` | `cp` | `ep` |\n|---|---|---|---|---|---|---|"
    return "\n".join((head, *(_row(name) for name in sorted(_NAMES)))) + "\n"


def test_page_of_models_is_what_is_tested() -> None:
    if not _NAMES.keys() <= set(CONFIG_MAPPING.keys()):
        pytest.skip("this version of Transformers lacks some of them")
    assert EVERY_FAMILY.keys() == _NAMES.keys()
    page, table = _PAGE.read_text(encoding="utf-8"), _rendered()
    if os.environ.get("FOURFOLD_UPDATE_GOLDEN"):
        page = _TABLE.sub(lambda _: table, page)
        _PAGE.write_text(page, encoding="utf-8")
    found = _TABLE.search(page)
    assert found is not None
    assert found[0] == table
