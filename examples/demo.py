"""`make demo`: ask a small model its name, fine-tune it on the identity set, ask again.

What is shown is what anyone can type: `fourfold train examples/quickstart.yaml`, then
`fourfold chat examples/quickstart.yaml adapter_name_or_path=runs/quickstart`.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import fourfold
from fourfold.base.errors import FourfoldError
from fourfold.base.log import setup_logging
from fourfold.config.load import load

CONFIG = Path("examples/quickstart.yaml")
QUESTIONS = ["Who are you?", "Who made you?"]


def ask(**overrides: object) -> list[str]:
    """The answers of the model, greedy, so that they can be told apart."""
    from fourfold.serve.infer import answer  # after the log is set up: libraries speak while they are imported

    return answer(load(CONFIG, {"do_sample": False, "max_new_tokens": 48, **overrides}, verb="chat"), QUESTIONS)


def main() -> None:
    """Run the demo."""
    setup_logging()
    start = time.perf_counter()
    before = ask()
    results = fourfold.train(CONFIG, overwrite_output_dir=True)
    after = ask(adapter_name_or_path="runs/quickstart")
    print()
    for question, old, new in zip(QUESTIONS, before, after, strict=True):
        print(f"{question}\n  before: {old.strip()}\n  after:  {new.strip()}\n")
    print(f"Final training loss {results['train_loss']:.3f}; loss curve: runs/quickstart/training_loss.png")
    print(f"Talk to it: {Path(sys.executable).parent / 'fourfold'} chat {CONFIG} adapter_name_or_path=runs/quickstart")
    print(f"The demo took {time.perf_counter() - start:.0f} s.")


if __name__ == "__main__":
    try:
        main()
    except FourfoldError as error:
        sys.exit(str(error))
