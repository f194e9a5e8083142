"""`make demo`: ask a small model its name, fine-tune it on the identity set, ask again.

What is shown is what anyone can type: `fourfold train examples/quickstart.yaml`, then
`fourfold chat examples/quickstart.yaml adapter_name_or_path=runs/quickstart`.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import fourfold
from fourfold.base.errors import CheckpointError, FourfoldError, RunInterruptedError
from fourfold.base.log import setup_logging
from fourfold.checkpoint.folder import list_checkpoints
from fourfold.config.load import load

CONFIG = Path("examples/quickstart.yaml")
OUTPUT = Path("runs/quickstart")
QUESTIONS = ["Who are you?", "Who made you?"]


def ask(**overrides: object) -> list[str]:
    """The answers of the model, greedy, so that they can be told apart."""
    from fourfold.serve.infer import answer  # after the log is set up: libraries speak while they are imported

    return answer(load(CONFIG, {"do_sample": False, "max_new_tokens": 48, **overrides}, verb="chat"), QUESTIONS)


def train() -> dict[str, Any]:
    """Train anew, or go on where a demo was stopped; returns the figures of the run."""
    if list_checkpoints(OUTPUT) and not (OUTPUT / "train_results.json").exists():
        try:
            return fourfold.train(CONFIG, resume_from_checkpoint=True)
        except CheckpointError as error:
            print(f"{error}\nThe demo begins anew.", file=sys.stderr)
    return fourfold.train(CONFIG, overwrite_output_dir=True)


def main() -> None:
    """Run the demo."""
    setup_logging()
    start = time.perf_counter()
    before = ask()
    results = train()
    after = ask(adapter_name_or_path=str(OUTPUT))
    print()
    for question, old, new in zip(QUESTIONS, before, after, strict=True):
        print(f"{question}\n  before: {old.strip()}\n  after:  {new.strip()}\n")
    print(f"Final training loss {results['train_loss']:.3f}; loss curve: runs/quickstart/training_loss.png")
    print(f"Talk to it: {Path(sys.executable).parent / 'fourfold'} chat {CONFIG} adapter_name_or_path=runs/quickstart")
    print(f"The demo took {time.perf_counter() - start:.0f} s.")


if __name__ == "__main__":
    try:
        main()
    except RunInterruptedError as error:
        print("The demo is stopped; started again it goes on with the step after.", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except FourfoldError as error:
        sys.exit(str(error))
