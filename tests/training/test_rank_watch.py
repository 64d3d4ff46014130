"""What ranks say of each other: three of them in one process, each with threads and connections of its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from dual_loop.errors import ConfigError
from dual_loop.training import rank_watch
from dual_loop.training.rank_watch import Ranks

SIZE = 3
Together = Callable[[Callable[[Ranks], object]], list[object]]


@pytest.fixture
def together(monkeypatch: pytest.MonkeyPatch) -> Iterator[Together]:
    """Call a function for each rank at once, and return what each gave or raised."""
    store, own = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False), threading.local()
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    monkeypatch.setattr(rank_watch.uuid, "uuid4", lambda: SimpleNamespace(hex="run"))
    monkeypatch.setattr(rank_watch.signal, "set_wakeup_fd", lambda *_, **__: None)
    monkeypatch.setattr(rank_watch.os, "register_at_fork", lambda **_: None)
    monkeypatch.setattr(dist, "broadcast_object_list", lambda _: None)
    monkeypatch.setattr(dist, "get_world_size", lambda: SIZE)
    monkeypatch.setattr(dist, "get_rank", lambda: own.rank)
    monkeypatch.setattr(Ranks, "_exit", lambda self, status: (time.sleep(2 * self.period), self._closing.set()))

    def start(rank: int) -> Ranks:
        own.rank = rank
        return Ranks(timeout=2.0)

    with ThreadPoolExecutor(SIZE) as pool:
        all_ranks = list(pool.map(start, range(SIZE)))

        def call(function: Callable[[Ranks], object]) -> list[object]:
            calls = [pool.submit(function, one) for one in all_ranks]
            return [call.exception() or call.result() for call in calls]

        yield call
        for one in all_ranks:
            one._closing.set()


def test_all_wait_for_the_last_however_late_it_is(together: Together) -> None:
    def come(one: Ranks) -> float:
        time.sleep(3.0 if one.rank == 2 else 0.0)  # longer than the time-out
        one.meet("test")
        return time.monotonic()

    times = together(come)
    assert max(times) - min(times) < 0.5
    assert not any(one._closing.is_set() for one in together(lambda one: one))


def test_what_differs_is_named_with_the_ranks_that_have_it(together: Together) -> None:
    def compare(one: Ranks) -> None:
        one.compare({"same": 1})
        one.compare({"same": 1, "rate": 0.5 if one.rank == 1 else 0.1, **({"extra": "x"} if one.rank == 2 else {})})

    for error in together(compare):
        assert isinstance(error, ConfigError)
        assert "rate: 0.1 (rank 0, 2) and 0.5 (rank 1)" in str(error)
        assert "extra: nothing (rank 0, 1) and x (rank 2)" in str(error)
        assert "same: " not in str(error)


def test_a_rank_that_lives_and_does_not_come_is_named(together: Together, capsys: pytest.CaptureFixture[str]) -> None:
    def exchange(one: Ranks) -> float:
        one.doing, one.exchange = f"step {one.rank}", int(one.rank != 2)
        start = time.monotonic()
        one._closing.wait(5)
        return time.monotonic() - start

    first, second, _ = together(exchange)
    assert max(first, second) < 2.0 + 0.5
    text = capsys.readouterr().err
    assert "a rank hangs: awaited in an exchange" in text
    assert "), last: step 2; expected: a sign of life within train.rank_timeout = 2 s" in text


def test_many_short_exchanges_are_no_long_one(together: Together) -> None:
    def exchange(one: Ranks) -> bool:
        for number in range(1, 30):
            one.exchange = number
            time.sleep(0.1)
        return one._closing.is_set()

    assert together(exchange) == [False] * SIZE


def test_a_failure_ends_all(together: Together, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(one: Ranks) -> bool:
        if one.rank == 1:
            one.fail(ConfigError("no room"))
        return one._closing.wait(5)

    assert together(fail) == [True] * SIZE
    text = capsys.readouterr().err
    assert "error: no room" in text
    assert "rank 1 (host" in text
    assert "has ended: no room" in text


def test_a_process_that_is_killed_ends_all(together: Together, capsys: pytest.CaptureFixture[str]) -> None:
    def die(one: Ranks) -> bool:
        if one.rank == 2:
            one._lifelines[0].close()  # as the kernel does
        return one._closing.wait(2.0)

    assert together(die)[0]
    assert "last: starts has ended: its process is gone" in capsys.readouterr().err
