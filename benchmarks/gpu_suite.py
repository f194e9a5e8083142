"""Runs the test suite with the machine's own torch and transformers, on its CPU and on its GPU."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
TESTS = ("tests/contract/test_packing.py", "tests/contract/test_families.py", "tests/unit", "tests/gpu")
_SHOWN_CHARACTERS = 1500


def families(args: argparse.Namespace) -> bool:
    """Run the tests; where there is a GPU, once without and once with it. False if one failed."""
    tests = TESTS[:1] if args.tiny else TESTS
    results = []
    for on_gpu in (False, True) if torch.cuda.is_available() else (False,):
        found = run_suite(args.out, tests, on_gpu=on_gpu, workers=args.workers, timeout_s=args.timeout)
        results.append(found)
        count = f"{found['tests']} tests on the {found['device']}, {len(found['failures'])} failed"
        print(f"families: {count}, exit status {found['exit_status']}", flush=True)
        for failure in found["failures"]:
            print(f"   {failure['test']}\n      {failure['text'][-300:]}", flush=True)
    (args.out / "families.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    return all(found["exit_status"] == 0 for found in results)


def run_suite(out: Path, tests: tuple[str, ...], *, on_gpu: bool, workers: int, timeout_s: float) -> dict[str, Any]:
    """Run pytest over `tests`; its log and junit file go to `out`.

    Args:
        on_gpu: whether the tests may see the GPU.
        workers: processes, through pytest-xdist; 0 for none.
    Returns:
        counts, the failures with the end of their text, and pytest's exit status.
    """
    name = "gpu" if on_gpu else "cpu"
    report, log = out / f"suite_{name}.xml", out / f"suite_{name}.log"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *tests]
    if workers:
        command[3:3] = ["-n", str(workers)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    if not on_gpu:
        env["CUDA_VISIBLE_DEVICES"] = "-1"
    with log.open("w", encoding="utf-8") as output:
        try:
            status = subprocess.run(
                command, cwd=ROOT, env=env, stdout=output, stderr=subprocess.STDOUT, timeout=timeout_s, check=False
            ).returncode
        except subprocess.TimeoutExpired:
            status = None
    return {"device": name, "exit_status": status, **_counts(report)}


def _counts(report: Path) -> dict[str, Any]:
    if not report.exists():
        return {"failures": [], "tests": None}
    cases = list(ElementTree.parse(report).iter("testcase"))
    failed = [(case, found) for case in cases for found in case if found.tag in ("failure", "error")]
    return {
        "tests": len(cases),
        "skipped": sum(found.tag == "skipped" for case in cases for found in case),
        "failures": [
            {"test": f"{case.get('classname')}::{case.get('name')}", "text": (found.text or "")[-_SHOWN_CHARACTERS:]}
            for case, found in failed
        ],
    }
