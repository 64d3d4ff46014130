"""What guards the page: names of the server, passwords, a queue with an end, uploads that go, threads that wait."""

from __future__ import annotations

import http.client
import os
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dual_loop.cli import main
from dual_loop.commands.serve import read_auth
from dual_loop.errors import ConfigError, PromptError
from dual_loop.serve import demo_app
from dual_loop.serve.demo_app import DemoPage, Session, import_gradio, is_own_host, serve
from dual_loop.serve.predictor import Predictor
from dual_loop.testing.scenes import generate_scene

NAMES = frozenset({"demo.example.org"})


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    return Predictor.load(device="cpu")


@pytest.fixture
def address(predictor: Predictor, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, int]]:
    """A server that asks for a password, as ``serve`` starts it, in this process."""
    pytest.importorskip("gradio", reason="the demo needs gradio (the extra [demo])")
    gr, started, options = import_gradio(), [], {}
    launch = gr.Blocks.launch

    def without_waiting(self, **given):
        started.append(self)
        options.update(given)
        return launch(self, **given, prevent_thread_lock=True)

    monkeypatch.setattr(gr.Blocks, "launch", without_waiting)
    with demo_app.socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    serve(predictor, "127.0.0.1", port, "tiny", auth=("me", "word"), max_queue=3, allow_host=["demo.example.org"])
    assert started[0]._queue.max_size == 3
    assert started[0]._queue.default_concurrency_limit == predictor.images_at_once
    yield "127.0.0.1", port
    started[0].close()
    assert options["max_file_size"] == "20mb"


def ask(address: tuple[str, int], host: str, path: str = "/", method: str = "GET") -> int:
    connection = http.client.HTTPConnection(*address, timeout=60)
    connection.putrequest(method, path, skip_host=True)
    if host:
        connection.putheader("Host", host)
    connection.endheaders()
    status = connection.getresponse().status
    connection.close()
    return status


def test_other_names_and_visitors_without_password_are_refused(address: tuple[str, int]) -> None:
    port = address[1]
    for host in (f"127.0.0.1:{port}", f"localhost:{port}", "demo.example.org", "[::1]"):
        assert ask(address, host) == 200, host
    for host in ("rebound.example.net", f"127.0.0.1.example.net:{port}", "", "localhost@evil.org", "localhost/x"):
        assert ask(address, host) in (400, 421), host
        assert ask(address, host, "/gradio_api/info") in (400, 421), host
    for path, method in (("/config", "GET"), ("/gradio_api/upload", "POST"), ("/gradio_api/queue/join", "POST")):
        assert ask(address, "localhost", path, method) == 401, path


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


def test_the_flags_reach_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    served: list[tuple[str, dict]] = []
    monkeypatch.setattr(demo_app, "import_gradio", lambda: None)
    monkeypatch.setattr(demo_app, "check_port", lambda host, port: None)
    monkeypatch.setattr(demo_app, "serve", lambda *arguments, **options: served.append((arguments[1], options)))
    monkeypatch.setattr(
        Predictor, "load", lambda *a, **b: SimpleNamespace(loaded=SimpleNamespace(origin={"path": "x"}))
    )
    assert main(["serve", "--auth", "me:word", "--max_queue", "5", "--allow_host", "a.org", "b.org"]) == 0
    options = {"auth": ("me", "word"), "max_queue": 5, "allow_host": ["a.org", "b.org"]}
    assert served == [("127.0.0.1", options)], "this machine alone, unless --host says otherwise"


def test_what_visitors_send_is_the_servers_own_and_goes_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gradio", reason="the demo needs gradio (the extra [demo])")
    at_exit: list[tuple] = []
    monkeypatch.delenv("GRADIO_TEMP_DIR", raising=False)
    monkeypatch.setattr(demo_app.atexit, "register", lambda run, *paths, **_: at_exit.append((run, *paths)))
    import_gradio()
    folder = Path(os.environ["GRADIO_TEMP_DIR"])
    assert folder.stat().st_mode & 0o077 == 0
    [(remove, path)] = at_exit
    remove(path)
    assert not folder.exists()


def test_uploads_go_when_they_were_read_and_nothing_else_does(
    predictor: Predictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gradio", reason="the demo needs gradio (the extra [demo])")
    page = DemoPage(import_gradio(), predictor, "tiny")
    assert page.app.delete_cache == (60, demo_app.KEEP_SECONDS)
    scene = generate_scene(1003)
    sent, own = tmp_path / "sent", tmp_path / "own"
    for folder in (sent, own):
        folder.mkdir()
        Image.fromarray(np.asarray(scene.masks[0]).astype(np.uint8) * 255).save(folder / "m.png")
        (folder / "broken.png").write_bytes(b"no picture")
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(sent))
    editor = {"background": scene.image, "layers": []}
    for names in (["m.png"], ["broken.png"]):
        page.on_add(Session(), editor, [str(folder / name) for folder in (sent, own) for name in names])
    assert [path.name for path in sent.iterdir()] == []
    assert sorted(path.name for path in own.iterdir()) == ["broken.png", "m.png"]


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
