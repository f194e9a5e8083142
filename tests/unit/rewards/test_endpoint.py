"""A reward model behind an HTTP address, against a server in a thread."""

from __future__ import annotations

import json
import logging
import math
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from fourfold.base.errors import ConfigError
from fourfold.rewards.endpoint import EndpointReward
from fourfold.rewards.notices import Notices
from reward_rollouts import rollouts

GOOD = (200, {"scores": [0.5, -1]})


class Server:
    """Answers with what is queued, the last of it again and again; `requests` holds what it was sent.

    An answer is a status with what becomes JSON or is sent as it is (bytes), "late" for none in time, or "hang up".
    """

    def __init__(self) -> None:
        self.answers: list[Any] = [GOOD]
        self.requests: list[Any] = []
        self.released = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                outer.requests.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                answer = outer.answers.pop(0) if len(outer.answers) > 1 else outer.answers[0]
                if answer == "late":
                    outer.released.wait(5)
                if isinstance(answer, str):
                    return
                status, content = answer
                self.send_response(status)
                self.end_headers()
                self.wfile.write(content if isinstance(content, bytes) else json.dumps(content).encode())

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()
        self.address = f"http://127.0.0.1:{self.http.server_port}/v1/score/evaluation"

    def close(self) -> None:
        self.released.set()
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    running = Server()
    yield running
    running.close()


@pytest.fixture
def reward(server: Server) -> EndpointReward:
    return EndpointReward(server.address, timeout=0.2, pauses=(0.01, 0.02), notices=Notices(lambda: 0.0))


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    caplog.set_level(logging.WARNING)
    return lambda: [record.getMessage() for record in caplog.records]


PAIR = rollouts("yes", "no")


@pytest.mark.parametrize("content", [{"scores": [0.5, -1]}, [0.5, -1], {"id": "x", "scores": [0.5, -1.0]}])
def test_score_when_endpoint_answers_gives_its_scores(server: Server, reward: EndpointReward, content: Any) -> None:
    server.answers = [(200, content)]
    assert reward.score(PAIR) == [0.5, -1.0]
    assert server.requests == [{"model": "model", "messages": ["Q: yes", "Q: no"]}]


def test_score_when_text_is_given_by_the_caller_sends_it(server: Server) -> None:
    reward = EndpointReward(server.address, lambda rollout: f"<s>{rollout.completion}", timeout=2)
    assert reward.score(PAIR) == [0.5, -1.0]
    assert server.requests[0]["messages"] == ["<s>yes", "<s>no"]


def test_score_when_there_are_no_rollouts_asks_nothing(server: Server, reward: EndpointReward) -> None:
    assert reward.score([]) == []
    assert server.requests == []


FAILURES = {
    "late": ("late", "does not answer within 0.2 s"),
    "500": ((500, {}), "answers with status 500 (Internal Server Error)"),
    "429": ((429, {}), "answers with status 429 (Too Many Requests)"),
    "hang up": ("hang up", "broke off the connection (RemoteDisconnected)"),
    "wrong count": ((200, {"scores": [1.0]}), "answers with 1 scores for 2 completions"),
    "no scores": ((200, {"detail": "x"}), 'answers without a list of numbers as "scores"'),
    "text scores": ((200, {"scores": ["1", "2"]}), 'answers without a list of numbers as "scores"'),
    "no JSON": ((200, b"<html>"), "answers with something that is not JSON"),
    "no text": ((200, b"\xff\xfe"), "answers with something that is not JSON"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_score_when_two_tries_fail_makes_a_third(
    server: Server, reward: EndpointReward, warnings: Callable[[], list[str]], name: str
) -> None:
    failure = FAILURES[name][0]
    server.answers = [failure, failure, GOOD]
    assert reward.score(PAIR) == [0.5, -1.0]
    assert len(server.requests) == 3
    assert warnings() == []


@pytest.mark.parametrize("name", FAILURES)
def test_score_when_the_first_call_fails_ends_with_address_and_cause(
    server: Server, reward: EndpointReward, name: str
) -> None:
    failure, cause = FAILURES[name]
    server.answers = [failure]
    with pytest.raises(ConfigError) as caught:
        reward.score(PAIR)
    expected = f"reward_model: {server.address} {cause}. Check the address, and that the server runs."
    assert caught.value.problems == (expected,)
    assert len(server.requests) == 3


@pytest.mark.parametrize("name", FAILURES)
def test_score_when_a_later_call_fails_gives_no_reward_and_warns(
    server: Server, reward: EndpointReward, warnings: Callable[[], list[str]], name: str
) -> None:
    failure, cause = FAILURES[name]
    server.answers = [GOOD, failure, failure, failure, GOOD]
    reward.score(PAIR)
    assert all(math.isnan(score) for score in reward.score(PAIR))
    assert warnings() == [f"reward_model: {server.address} {cause}; 2 completions get no reward."]
    assert reward.score(PAIR) == [0.5, -1.0]


def test_score_when_the_address_is_wrong_does_not_try_again(server: Server, reward: EndpointReward) -> None:
    server.answers = [(404, {})]
    with pytest.raises(ConfigError, match=r"answers with status 404 \(Not Found\)"):
        reward.score(PAIR)
    assert len(server.requests) == 1


def test_score_when_nothing_listens_names_the_cause(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    reward = EndpointReward("http://127.0.0.1:9/", timeout=1, pauses=())
    with pytest.raises(ConfigError, match=r"http://127.0.0.1:9/ cannot be reached \(.*refused"):
        reward.score(PAIR)


def test_score_when_some_are_not_finite_gives_these_no_reward(
    server: Server, reward: EndpointReward, warnings: Callable[[], list[str]]
) -> None:
    server.answers = [(200, b'{"scores": [NaN, 2.0]}'), (200, {"scores": [1.0, None]})]
    first, second = reward.score(PAIR), reward.score(PAIR)
    assert math.isnan(first[0])
    assert math.isnan(second[1])
    assert (first[1], second[0]) == (2.0, 1.0)
    assert len(warnings()) == 1
