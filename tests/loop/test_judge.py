"""The judge against a small local server: good answers, and every way in which a server can be bad."""

from __future__ import annotations

import dataclasses
import json
import logging
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from dual_loop.config import RewardConfig
from dual_loop.errors import ConfigError
from dual_loop.loop.judge import REST_AFTER, Judge, JudgeError, JudgeQuestion, parse_mark

QUESTIONS = [JudgeQuestion("red circle", ("the red circle",)), JudgeQuestion("blue star", ("star", "a blue star"))]


class Server(ThreadingHTTPServer):
    """Answers as ``mode`` says; ``seen`` holds the requests."""

    daemon_threads = True
    mode = "good"
    raw = b""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.seen: list[dict] = []
        self.headers_seen: list[dict] = []
        self.release = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request, client_address) -> None:
        """Clients that hang up are part of the tests."""


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        self.server.seen.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.server.headers_seen.append(dict(self.headers))
        mode = self.server.mode
        if mode == "raw":
            self.wfile.write(self.server.raw)
            self.close_connection = True
            return
        if mode == "plain" and "response_format" in self.server.seen[-1]:
            self.send_error(400)
            return
        if mode == "structured":
            assert self.server.seen[-1]["response_format"]["type"] == "json_schema"
        if mode == "silent":
            self.server.release.wait(20)
            return
        if mode == "status" or (mode == "flaky" and len(self.server.seen) % 2):
            self.send_error(500)
            return
        content = {"rubbish": "I cannot tell", "high": "42", "structured": '{"mark": 8}'}.get(mode, "8")
        body = json.dumps({"choices": [{"message": {"content": content}}]}).encode()
        if mode == "shape":
            body = b'{"error": "none"}'
        if mode == "no json":
            body = b"<html>"
        if mode == "endless":
            body = b" " * (3 << 20) + body
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if mode == "drip":
            for byte in body:
                self.wfile.write(bytes([byte]))
                self.wfile.flush()
                if self.server.release.wait(0.2):
                    return
            return
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    instance = Server()
    threading.Thread(target=instance.serve_forever, daemon=True).start()
    yield instance
    instance.release.set()
    instance.shutdown()
    instance.server_close()


def judge(server: Server, **options) -> Judge:
    base = RewardConfig(judge_url=server.url, judge_timeout=0.5, judge_deadline=1.5, judge_retries=0)
    return Judge(dataclasses.replace(base, **options))


def test_good_answers(server):
    asked = judge(server, judge_model="mine")
    asked.check()
    assert asked.ask(QUESTIONS) == [0.8, 0.8]
    assert asked.counters == {"judge/asked": 2, "judge/answered": 2, "judge/failed": 0, "judge/skipped": 0}
    assert server.seen[-1]["model"] == "mine"
    assert server.seen[-1]["temperature"] == 0
    assert any("a blue star" in request["messages"][0]["content"] for request in server.seen)
    assert asked.ask([]) == []


@pytest.mark.parametrize("mode", ["silent", "drip", "rubbish", "high", "shape", "no json", "status", "endless"])
def test_bad_answers_are_skipped_and_counted_in_bounded_time(server, mode, caplog):
    server.mode = mode
    asked = judge(server)
    started = time.monotonic()
    with caplog.at_level(logging.WARNING, logger="dual_loop"):
        assert asked.ask(QUESTIONS) == [None, None]
        assert asked.ask(QUESTIONS[:1]) == [None]
    assert time.monotonic() - started < 2 * 1.5 + 3
    assert asked.counters == {"judge/asked": 3, "judge/answered": 0, "judge/failed": 3, "judge/skipped": 0}
    assert caplog.text.count("the judge of captions does not answer") == 1


@pytest.mark.parametrize("mode", ["silent", "rubbish", "status"])
def test_bad_answers_stop_the_run_where_that_was_asked_for(server, mode):
    server.mode = mode
    with pytest.raises(JudgeError, match="judge_url"):
        judge(server, judge_failure="error").ask(QUESTIONS)


def test_a_retry_helps(server):
    server.mode = "flaky"
    assert judge(server, judge_retries=3, judge_workers=1).ask(QUESTIONS[:1]) == [0.8]
    assert len(server.seen) == 2


def test_a_judge_that_dies_is_left_alone_for_a_while(server):
    asked = judge(server)
    assert asked.ask(QUESTIONS) == [0.8, 0.8]
    server.mode = "status"
    for _ in range(REST_AFTER):
        asked.ask(QUESTIONS[:1])
    requests = len(server.seen)
    assert asked.ask(QUESTIONS) == [None, None]
    assert len(server.seen) == requests
    assert asked.counters["judge/skipped"] == 2
    server.mode, asked._resting = "good", 0
    assert asked.ask(QUESTIONS[:1]) == [0.8]


def test_nobody_there():
    free = Server()
    url = free.url
    free.server_close()
    config = RewardConfig(judge_url=url, judge_timeout=0.5, judge_deadline=1.0, judge_retries=1)
    assert Judge(config).ask(QUESTIONS[:1]) == [None]
    Judge(config).check()
    with pytest.raises(JudgeError, match=url.split("//")[1]):
        Judge(dataclasses.replace(config, judge_failure="error")).check()


ANSWERS = {
    "nested": b'{"choices": ' + b"[" * 200_000,
    "nested message": b'{"choices": [{"message": {"content": "' + b"[" * 200_000 + b'"}}]}',
    "null": b"null",
    "number": b"9" * 5000,
    "surrogate": b'{"choices": [{"message": {"content": "\\ud800"}}]}',
    "not text": b"\xff\xfe\x00",
}
RAW = {
    "no http": b"SSH-2.0-OpenSSH_9.6\r\n",
    "bad length": b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n8",
    "cut": b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n8",
    "bad chunks": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n8",
    "long line": b"HTTP/1.1 200 OK\r\nX: " + b"x" * 100_000 + b"\r\n\r\n",
    "many headers": b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 500 + b"\r\n",
}


@pytest.mark.parametrize("name", [*ANSWERS, *RAW])
def test_garbage_is_counted_at_once(server, name):
    server.mode, content = "raw", ANSWERS.get(name, b"")
    server.raw = RAW.get(name) or b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(content), content)
    asked = judge(server, judge_timeout=20.0, judge_deadline=24.0)
    started = time.monotonic()
    assert asked.ask(QUESTIONS) == [None, None]
    assert time.monotonic() - started < 5
    assert asked.counters["judge/failed"] == 2


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_no_redirection_is_followed(server, monkeypatch, code):
    other = Server()
    threading.Thread(target=other.serve_forever, daemon=True).start()
    monkeypatch.setenv("MY_KEY", "secret")
    server.mode, target = "raw", other.url.encode()
    server.raw = b"HTTP/1.1 %d Moved\r\nLocation: %s\r\nContent-Length: 0\r\n\r\n" % (code, target)
    other.do_GET_seen = []
    monkeypatch.setattr(
        Handler, "do_GET", lambda self: self.server.do_GET_seen.append(dict(self.headers)), raising=False
    )
    try:
        assert judge(server, judge_key_variable="MY_KEY").ask(QUESTIONS[:1]) == [None]
        assert other.headers_seen + other.do_GET_seen == []
    finally:
        other.shutdown()
        other.server_close()


def test_a_mark_is_asked_for_by_schema_where_the_server_takes_it(server):
    server.mode = "structured"
    assert judge(server).ask(QUESTIONS) == [0.8, 0.8]
    server.mode, asked = "plain", judge(server, judge_workers=1)
    assert asked.ask(QUESTIONS[:1]) == [0.8]
    server.seen.clear()
    assert asked.ask(QUESTIONS) == [0.8, 0.8]
    assert not any("response_format" in request for request in server.seen)


def test_addresses_and_keys(server, monkeypatch):
    for url in (None, "file:///etc/passwd", "ftp://host/v1", "localhost"):
        with pytest.raises(ConfigError, match="URL"):
            Judge(RewardConfig(judge_url=url))
    monkeypatch.delenv("MY_KEY", raising=False)
    with pytest.raises(ConfigError, match="MY_KEY"):
        Judge(RewardConfig(judge_url=server.url, judge_key_variable="MY_KEY"))
    monkeypatch.setenv("MY_KEY", "secret")
    judge(server, judge_key_variable="MY_KEY").ask(QUESTIONS[:1])
    assert server.headers_seen[-1]["Authorization"] == "Bearer secret"
    server.mode = "status"
    with pytest.raises(JudgeError) as caught:
        judge(server, judge_key_variable="MY_KEY", judge_failure="error").ask(QUESTIONS[:1])
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "mark"), [("8", 0.8), (" 10.", 1.0), ("7.5/10", 0.75), ("0", 0.0), ('{"mark": 7}', 0.7)]
)
def test_marks(text, mark):
    assert parse_mark(text) == mark


@pytest.mark.parametrize(
    "text",
    ["", "eleven", "11", "-3", "8 out of ten thousand", "nan", "8 9", '{"mark": 11}', '{"mark": "8"}', '{"x": 8}'],
)
def test_rubbish_is_no_mark(text):
    with pytest.raises(ValueError, match="no number"):
        parse_mark(text)
