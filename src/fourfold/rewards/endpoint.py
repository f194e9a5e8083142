"""A reward model behind an HTTP address (`reward_model_type: api`).

The protocol is LLaMA-Factory's: POST `{"model": "model", "messages": [text, ...]}`, where each text is a prompt with
its completion; the answer is `{"scores": [number, ...]}`. A bare list of numbers is understood as well.
"""

from __future__ import annotations

import http.client
import json
import math
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from typing import TypeAlias

from fourfold.base.errors import ConfigError
from fourfold.rewards.interface import Rollout
from fourfold.rewards.model import NAME
from fourfold.rewards.notices import Notices

TextOf: TypeAlias = Callable[[Rollout], str]
"""What the endpoint is given of a rollout."""

_TEMPORARY = frozenset({408, 425, 429})
"""Statuses below 500 after which another try may do better."""


class _NoScoresError(Exception):
    """A try that brought no scores: `cause` in words, `final` if another one would bring none either."""

    def __init__(self, cause: str, *, final: bool = False) -> None:
        super().__init__(cause)
        self.final = final


class EndpointReward:
    """Scores rollouts by an HTTP endpoint.

    Args:
        address: begins with http:// or https://.
        text_of: what is sent of a rollout; by default its prompt and completion.
        timeout: seconds that a try waits for the server.
        pauses: seconds between tries, one more of which is made than there are pauses.
        notices: where warnings go.
    """

    name = NAME

    def __init__(
        self,
        address: str,
        text_of: TextOf | None = None,
        *,
        timeout: float = 30.0,
        pauses: Sequence[float] = (1.0, 4.0),
        notices: Notices | None = None,
    ) -> None:
        self._address = address
        self._text_of = text_of or (lambda rollout: rollout.prompt + rollout.completion)
        self._timeout = timeout
        self._pauses = tuple(pauses)
        self._notices = notices or Notices()
        self._proven = False

    def score(self, rollouts: Sequence[Rollout]) -> list[float]:
        """The endpoint's scores; NaN, with a warning, for all of them when it does not answer.

        Raises:
            ConfigError: it does not answer the first call.
        """
        if not rollouts:
            return []
        texts = [self._text_of(rollout) for rollout in rollouts]
        try:
            scores = self._ask_patiently(texts)
        except _NoScoresError as error:
            problem = f"reward_model: {self._address} {error}"
            if not self._proven:
                raise ConfigError(f"{problem}. Check the address, and that the server runs.") from error
            self._notices.tell(f"{problem}; {len(texts)} completions get no reward.", len(texts))
            return [math.nan] * len(texts)
        self._proven = True
        lost = sum(not math.isfinite(score) for score in scores)
        if lost:
            problem = f"reward_model: {self._address} gave no finite score for {lost} of {len(texts)} completions"
            self._notices.tell(f"{problem}; they get no reward.", lost)
        return [score if math.isfinite(score) else math.nan for score in scores]

    def _ask_patiently(self, texts: Sequence[str]) -> list[float]:
        for pause in self._pauses:
            try:
                return self._ask(texts)
            except _NoScoresError as error:
                if error.final:
                    raise
            time.sleep(pause)
        return self._ask(texts)

    def _ask(self, texts: Sequence[str]) -> list[float]:
        """One try.

        Raises:
            _NoScoresError: for whatever reason.
        """
        body = json.dumps({"model": "model", "messages": list(texts)}).encode()
        request = urllib.request.Request(self._address, body, {"Content-Type": "application/json"}, method="POST")
        try:
            with urllib.request.urlopen(request, timeout=self._timeout) as response:
                answer = json.loads(response.read())
        except urllib.error.HTTPError as error:
            error.close()
            final = 400 <= error.code < 500 and error.code not in _TEMPORARY
            raise _NoScoresError(f"answers with status {error.code} ({error.reason})", final=final) from error
        except TimeoutError as error:
            raise _NoScoresError(self._late()) from error
        except urllib.error.URLError as error:
            late = isinstance(error.reason, TimeoutError)
            raise _NoScoresError(self._late() if late else f"cannot be reached ({error.reason})") from error
        except (OSError, http.client.HTTPException) as error:
            raise _NoScoresError(f"broke off the connection ({type(error).__name__})") from error
        except ValueError as error:  # also text that is not UTF-8
            raise _NoScoresError("answers with something that is not JSON") from error
        return _scores(answer, len(texts))

    def _late(self) -> str:
        return f"does not answer within {self._timeout:g} s"


def _scores(answer: object, expected: int) -> list[float]:
    scores = answer.get("scores") if isinstance(answer, dict) else answer
    if not isinstance(scores, list) or not all(_is_score(score) for score in scores):
        raise _NoScoresError('answers without a list of numbers as "scores"')
    if len(scores) != expected:
        raise _NoScoresError(f"answers with {len(scores)} scores for {expected} completions")
    return [math.nan if score is None else float(score) for score in scores]


def _is_score(score: object) -> bool:
    return score is None or (isinstance(score, int | float) and not isinstance(score, bool))
