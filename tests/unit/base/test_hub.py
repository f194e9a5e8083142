"""Whether the hub can be reached is found out once and soon."""

from __future__ import annotations

import http.server
import socket
import threading
from collections.abc import Iterator

import pytest

from fourfold.base.hub import endpoint, is_offline, why_unreachable


class _Missing(http.server.BaseHTTPRequestHandler):
    """Answers everything with 404, as a mirror does whose root is no page."""

    def do_HEAD(self) -> None:
        self.send_error(404)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """A port of this machine that accepts and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


def _use(monkeypatch: pytest.MonkeyPatch, server: socket.socket) -> None:
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}/")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def test_why_unreachable_when_the_hub_answers_with_an_error_is_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with http.server.HTTPServer(("127.0.0.1", 0), _Missing) as server:
        _use(monkeypatch, server.socket)
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        assert why_unreachable() is None
        thread.join()


def test_why_unreachable_when_the_hub_is_silent_gives_up_in_time(
    monkeypatch: pytest.MonkeyPatch, listener: socket.socket
) -> None:
    _use(monkeypatch, listener)
    monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "0.1")
    assert "timed out" in str(why_unreachable())


def test_why_unreachable_when_nothing_listens_says_so(monkeypatch: pytest.MonkeyPatch, listener: socket.socket) -> None:
    _use(monkeypatch, listener)
    listener.close()
    assert why_unreachable() == "Connection refused"
    monkeypatch.setenv("HF_ENDPOINT", "nowhere")
    assert "HF_ENDPOINT" in str(why_unreachable())


def test_endpoint_and_is_offline_when_the_environment_says_so_follow_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example/")
    assert endpoint() == "https://mirror.example"
    monkeypatch.delenv("HF_ENDPOINT")
    assert endpoint() == "https://huggingface.co"
    monkeypatch.setenv("HF_HUB_OFFLINE", "yes")
    assert is_offline()
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assert not is_offline()
