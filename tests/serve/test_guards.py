"""What guards the page: names of the server, passwords, a queue with an end, threads that wait."""

from __future__ import annotations

import base64
import http.client
import json
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from dual_loop.cli import main
from dual_loop.commands.serve import read_auth
from dual_loop.errors import ConfigError, PromptError
from dual_loop.serve import demo_app
from dual_loop.serve.demo_app import PageServer, is_own_host
from dual_loop.serve.predictor import Predictor
from dual_loop.testing.scenes import generate_scene

NAMES = frozenset({"demo.example.org"})


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    return Predictor.load(device="cpu")


@pytest.fixture(scope="module")
def server(predictor: Predictor) -> Iterator[PageServer]:
    """A server that asks for a password and takes few questions, in this process."""
    with PageServer("127.0.0.1", 0, auth=("me", "wörd"), max_queue=1, allow_host=["Demo.example.org"]) as server:
        thread = threading.Thread(target=server.run, args=(predictor, "tiny <b>"))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def ask(
    server: PageServer, path: str = "/", body: bytes | None = None, host: str | None = "localhost", **headers: str
) -> tuple[int, bytes, http.client.HTTPMessage]:
    """Ask with the password, unless ``Authorization`` says otherwise; return status, body and headers."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    connection.putrequest("GET" if body is None else "POST", path, skip_host=True)
    if host is not None:
        connection.putheader("Host", host)
    length = {} if body is None else {"Content-Type": "application/json", "Content-Length": str(len(body))}
    known = {"Authorization": "Basic " + base64.b64encode("me:wörd".encode()).decode(), **length}
    for name, value in {**known, **{name.replace("_", "-"): value for name, value in headers.items()}}.items():
        connection.putheader(name, value)
    connection.endheaders(body)
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, content, answer.headers


def test_other_names_are_refused(server: PageServer) -> None:
    port = server.server_port
    for host in (f"127.0.0.1:{port}", f"localhost:{port}", "demo.example.org", "[::1]"):
        assert ask(server, host=host)[0] == 200, host
    for host in ("rebound.example.net", f"127.0.0.1.example.net:{port}", "", None, "localhost@evil.org", "localhost/x"):
        assert ask(server, host=host)[0] == 421, host
        assert ask(server, "/loop", b"{}", host=host)[0] == 421, host


def test_visitors_without_password_are_refused(server: PageServer) -> None:
    for given in ("", "Basic bWU6bm8=", "Bearer x", "Basic \xff"):
        for path, body in (("/", None), ("/page.js", None), ("/loop", b"{}")):
            status, _, headers = ask(server, path, body, Authorization=given)
            assert status == 401, (given, path)
            assert headers["WWW-Authenticate"].startswith("Basic")


def test_the_page_may_load_nothing_from_elsewhere(server: PageServer) -> None:
    page = b""
    for path in ("/", "/page.css", "/page.js", "/example/0.png", "/absent", "/../pyproject.toml"):
        status, content, headers = ask(server, path)
        assert status == (404 if path in ("/absent", "/../pyproject.toml") else 200)
        policy = headers["Content-Security-Policy"]
        assert policy.startswith("default-src 'none'; script-src 'self';")
        assert "unsafe" not in policy
        assert headers["X-Content-Type-Options"] == "nosniff"
        page += content if path.rpartition(".")[2] != "png" else b""
    assert b"tiny &lt;b&gt;" in page
    assert b"http" not in page.replace(b'"http', b"")
    assert b"knows generated symbols only" in page


def test_questions_that_are_none_are_refused(server: PageServer) -> None:
    assert ask(server, "/shutdown", b"{}")[0] == 404
    assert ask(server, "/loop", b"{}", Content_Type="text/plain")[0] == 415, "a form of another site can send that"
    for length in ("", "-1", "1e3", str(demo_app.MAX_BODY + 1)):
        assert ask(server, "/loop", b"{}", Content_Length=length)[0] == 413
    for body in (b"{", b"[]", b"\xff", b"[" * 100_000):
        status, content, _ = ask(server, "/loop", body)
        assert status == 400
        assert "cannot be read" in json.loads(content)["error"]
    status, content, _ = ask(server, "/loop", b"{}")
    assert (status, json.loads(content)["error"][:16]) == (400, "no image is open")


def test_the_queue_has_an_end(server: PageServer, monkeypatch: pytest.MonkeyPatch) -> None:
    go, places = threading.Event(), 1 + Predictor.images_at_once
    monkeypatch.setitem(server.questions, "/loop", lambda asked: {"waited": go.wait(20)})
    with ThreadPoolExecutor(places) as pool:
        held = [pool.submit(ask, server, "/loop", b"{}") for _ in range(places)]
        while server.places._value:
            time.sleep(0.001)
        assert ask(server, "/loop", b"{}")[0] == 503
        assert ask(server, "/")[0] == 200
        go.set()
        assert [one.result()[0] for one in held] == [200] * places
    assert ask(server, "/loop", b"{}")[0] == 200


def test_a_fault_of_the_server_is_told_and_leaves_it_running(
    server: PageServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(server.questions, "/loop", lambda asked: 1 / 0)
    for _ in range(2 + Predictor.images_at_once):
        assert ask(server, "/loop", b"{}")[0] == 500
    assert "ZeroDivisionError" in capsys.readouterr().err


@pytest.mark.parametrize(
    "header", ["localhost", "LOCALHOST:80", "127.0.0.1:7860", "10.0.0.7", "[fe80::1]:80", "localhost."]
)
def test_own_names(header: str) -> None:
    assert is_own_host(header, NAMES)


@pytest.mark.parametrize(
    "header", ["evil.org", "localhost.evil.org", "[", "a:b:c", "127.0.0.1@evil.org", "evil.org?localhost"]
)
def test_names_of_others(header: str) -> None:
    assert not is_own_host(header, NAMES)


def test_names_and_passwords(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert read_auth("me:a:b") == ("me", "a:b")
    (tmp_path / "auth").write_text("me:word\nmore")
    assert read_auth(f"@{tmp_path / 'auth'}") == ("me", "word")
    for text in ("secret", ":secret", "secret:", f"@{tmp_path / 'absent'}"):
        with pytest.raises(ConfigError) as caught:
            read_auth(text)
        assert "secret" not in str(caught.value)
    assert main(["serve", "--max_queue", "0"]) == 2
    assert "--max_queue" in capsys.readouterr().err


def test_threads_get_their_own_answers(predictor: Predictor) -> None:
    scenes = [generate_scene(1000 + number) for number in range(5)]
    alone = [predictor.loop(scene.image, np.asarray(scene.masks)) for scene in scenes]
    wrong: list[str] = []

    def visit(place: int) -> None:
        try:
            for number in range(4):
                scene, expected = scenes[(place + number) % 5], alone[(place + number) % 5]
                found = predictor.loop(scene.image, np.asarray(scene.masks))
                if found.captions != expected.captions or not np.array_equal(found.masks, expected.masks):
                    wrong.append(f"{found.captions} for {expected.captions}")
                predictor.segment(scene.image, "a red circle")
        except Exception as error:  # a thread's error would be lost
            wrong.append(repr(error))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=visit, args=(place,)) for place in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert wrong == []


def test_questions_that_wait_are_answered_together_and_never_swapped(
    predictor: Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    scenes = [generate_scene(1000 + number) for number in range(5)]
    texts = [scene.captions[0] for scene in scenes]
    segmented = [predictor.segment(scene.image, text)[0].mask for scene, text in zip(scenes, texts, strict=True)]
    texts[3] = "[SEG]"  # a fault of this one alone
    del segmented[3]
    captions = [predictor.caption(scene.image, np.asarray(scene.masks)) for scene in scenes]
    see, sizes, first_is_in, go = predictor.model.see, [], threading.Event(), threading.Event()

    def see_when_all_wait(batch):
        sizes.append(batch.num_images)
        first_is_in.set()
        go.wait(20)
        return see(batch)

    monkeypatch.setattr(predictor.model, "see", see_when_all_wait)
    with ThreadPoolExecutor(20) as pool:
        first = pool.submit(predictor.caption, scenes[0].image, np.asarray(scenes[0].masks))
        first_is_in.wait(20)
        asked = [pool.submit(predictor.caption, scene.image, np.asarray(scene.masks)) for scene in scenes]
        told = [pool.submit(predictor.segment, scene.image, text) for scene, text in zip(scenes, texts, strict=True)]
        while len(predictor._waiting) < 11:
            time.sleep(0.001)
        go.set()
        assert first.result() == captions[0]
        assert [one.result() for one in asked] == captions
        with pytest.raises(PromptError):
            told.pop(3).result()
        for found, expected in zip(told, segmented, strict=True):
            assert np.array_equal(found.result()[0].mask, expected)
    # One alone; five captions; five texts, of which one is at fault, and then each of them alone.
    assert sorted(sizes) == [1] * sizes.count(1) + [5, 5]
    assert sizes.count(1) == 1 + 5
    assert predictor._waiting == []


def test_one_thread_at_a_time_is_in_the_model(predictor: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    see, inside, most, scene = predictor.model.see, [], [], generate_scene(1003)

    def slow_see(batch):
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.05)
        try:
            return see(batch)
        finally:
            inside.pop()

    monkeypatch.setattr(predictor.model, "see", slow_see)
    asks = [lambda: predictor.caption(scene.image, scene.masks[0]), lambda: predictor.segment(scene.image, "a star")]
    threads = [threading.Thread(target=ask) for ask in asks * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) == 1
