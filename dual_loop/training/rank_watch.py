"""What ranks know of each other beside their collectives: who lives, what each one does, and whether they are alike.

A collective is aborted by its time-out and cannot say who is missing. So a thread of every rank writes a record into
the launcher's store twice a second, and reads those of the others:

* a rank that is silent, or lets others wait in an exchange, for most of ``train.rank_timeout`` is named by the others,
  which then end;
* a rank that fails says why, and the others end with it; one that is killed closes a connection, and they end too;
* where one rank works alone (an index, a checkpoint), the others wait in the store for as long as it takes;
* what has to be the same on all ranks is compared before anything is built.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Mapping
from datetime import timedelta
from typing import Any, NoReturn

import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from dual_loop.errors import ConfigError, DualLoopError, explain, listed
from dual_loop.training.stop import SAME_WISH_SECONDS

SHARE_OF_TIMEOUT = 0.8
"""Of ``train.rank_timeout``: the collective itself fails at the end of it, and says less."""
SILENT_WHEN_STOPPING = 5.0
"""Seconds of silence after which a rank that was told to stop waits for another no longer."""
MAX_SHOWN = 160
"""Characters of a value in a message."""


class Ranks:
    """The ranks of this run, seen from this one; there is one in a process, where there are several ranks.

    Args:
        timeout: ``train.rank_timeout``, in seconds.
    """

    def __init__(self, timeout: float) -> None:
        self.rank, self.size, self.timeout = dist.get_rank(), dist.get_world_size(), timeout
        self.limit, self.period = SHARE_OF_TIMEOUT * timeout, min(0.5, timeout / 20)
        # Launchers keep their store when they start the ranks again.
        name = [uuid.uuid4().hex]
        dist.broadcast_object_list(name)
        self.prefix, self.num_meetings, self.num_exchanges = name[0], 0, 0
        self.doing, self.exchange, self.failure = "starts", 0, ("", 0)
        self.records: list[dict[str, Any]] = [{} for _ in range(self.size)]
        self.silent, self.rounds = [0.0] * self.size, 0
        self.signalled: float | None = None
        # A call that waits holds its connection, so each thread has one.
        self.store, self._beats = self._connect(), self._connect()
        self._closing, self.is_ending = threading.Event(), False
        self._signals, writes = os.pipe()
        for end in (self._signals, writes):
            os.set_blocking(end, False)
        # Python's own handlers do not run while a collective waits; this pipe hears signals even then.
        signal.set_wakeup_fd(writes, warn_on_full_buffer=False)
        os.register_at_fork(after_in_child=self._forget)
        self._write_record(0)
        self._lifelines = self._tie()
        self.meet("start")
        self.records = [json.loads(self.store.get(f"record/{rank}")) for rank in range(self.size)]
        for run in (self._beat, self._watch):
            threading.Thread(target=run, name=f"ranks{run.__name__}", daemon=True).start()

    def _connect(self) -> Any:
        address, port = os.environ.get("MASTER_ADDR", "127.0.0.1"), int(os.environ["MASTER_PORT"])
        store = TCPStore(address, port, timeout=timedelta(seconds=self.timeout), wait_for_workers=False)
        return PrefixStore(self.prefix, store)

    def _tie(self) -> dict[int, socket.socket]:
        """Return a connection to rank 0, or from there to every rank: nobody writes, and it ends with the process."""
        if self.rank > 0:
            line = socket.create_connection(json.loads(self.store.get("lifeline")), self.timeout)
            line.sendall(self.rank.to_bytes(4, "big"))
            lines = {0: line}
        else:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as route:
                route.connect((os.environ.get("MASTER_ADDR", "127.0.0.1"), 1))  # sends nothing, finds the own address
                address = route.getsockname()[0]
            with socket.create_server((address, 0), backlog=self.size) as server:
                server.settimeout(self.timeout)
                self.store.set("lifeline", json.dumps(server.getsockname()[:2]))
                accepted = [server.accept()[0] for _ in range(self.size - 1)]
            lines = {int.from_bytes(line.recv(4, socket.MSG_WAITALL), "big"): line for line in accepted}
        for line in lines.values():
            line.setblocking(False)
        return lines

    def _forget(self) -> None:
        """Leave signals and connections to the rank itself, in a process that loads its data."""
        signal.set_wakeup_fd(-1)
        for line in self._lifelines.values():
            line.close()

    # ---- what the main thread calls ----------------------------------------------------------------------------------

    def meet(self, what: str) -> None:
        """Return when every rank has called it, however long that takes while all of them live."""
        before, self.doing = self.doing, f"waits for the others: {what}"
        self.num_meetings += 1
        key, pause = f"meeting/{self.num_meetings}", 0.001
        here = self.store.add(key, 1)
        while here < self.size:
            time.sleep(pause)
            pause = min(2 * pause, 0.2)
            here = self.store.add(key, 0)
        self.doing = before

    def compare(self, values: Mapping[str, object]) -> None:
        """Raise on all ranks where they differ in a value.

        Raises:
            ConfigError: names what differs, and which rank has which value.
        """
        key = f"values/{self.num_meetings}"
        self.store.set(f"{key}/{self.rank}", json.dumps({name: str(value) for name, value in values.items()}))
        self.meet("comparison")
        every = [json.loads(self.store.get(f"{key}/{rank}")) for rank in range(self.size)]
        different = []
        for name in dict.fromkeys(name for own in every for name in own):
            holders: dict[str, list[int]] = {}
            for rank, own in enumerate(every):
                holders.setdefault(own.get(name, "nothing"), []).append(rank)
            if len(holders) > 1:
                shown = [f"{value[:MAX_SHOWN]} (rank {listed(ranks)})" for value, ranks in holders.items()]
                different.append(f"{name}: {' and '.join(shown)}")
        if different:
            what, fix = "the ranks differ", "give every rank the same flags, files and packages"
            seen, expected = "\n  ".join(["", *different]), "the same on all ranks"
            raise ConfigError(explain(what, seen=seen, expected=expected, fix=fix))

    def fail(self, error: BaseException) -> NoReturn:
        """Print why this rank ends, tell the others, and end; a collective that waits would keep it from leaving."""
        status = 2 if isinstance(error, DualLoopError) else 1
        if status == 1:
            time.sleep(4 * self.period)  # a broken collective follows from another rank's failure, which _watch prints
        self.failure = (f"{'' if status == 2 else type(error).__name__ + ': '}{error}", status)
        if status == 2:
            print(f"error: {error}", file=sys.stderr)
        else:
            traceback.print_exception(error)
            print("what the ranks did last:", *map(self._who, range(self.size)), sep="\n  ", file=sys.stderr)
        self._exit(status)

    def close(self) -> None:
        """Leave when all do; the rank that may hold the store leaves last."""
        self.is_ending = True
        self.meet("end")
        self._closing.set()
        self.store.add("left", 1)
        while self.rank == 0 and self.store.add("left", 0) < self.size:
            time.sleep(0.01)
        signal.set_wakeup_fd(-1)

    # ---- threads -----------------------------------------------------------------------------------------------------

    def _write_record(self, number: int) -> None:
        doing = f"{self.doing}{', in an exchange' if self.exchange else ''}"
        own = {"number": number, "host": socket.gethostname(), "pid": os.getpid(), "doing": doing}
        record = {**own, "exchange": self.exchange, "failure": self.failure}
        self._beats.set(f"record/{self.rank}", json.dumps(record))

    def _beat(self) -> None:
        """Write the own record and read the others', again and again."""
        keys, number = [f"record/{rank}" for rank in range(self.size)], 0
        while not self._closing.wait(self.period):
            number += 1
            try:
                self._write_record(number)
                found = [json.loads(text) for text in self._beats.multi_get(keys)]
            except (RuntimeError, ValueError):  # the store is gone, which is silence
                return
            for rank, (old, new) in enumerate(zip(self.records, found, strict=True)):
                if old.get("number") != new["number"]:
                    self.silent[rank] = 0.0
            self.records, self.rounds = found, number

    def _watch(self) -> None:
        """End the process where another rank has failed or is silent. Counts its own turns: it may be suspended too."""
        rounds, without_store, exchange, waited = 0, 0.0, 0, 0.0
        while not self._closing.wait(self.period):
            self._hear_signals()
            limit = self.limit if self.signalled is None else min(self.limit, SILENT_WHEN_STOPPING)
            self.silent = [seconds + self.period for seconds in self.silent]
            waited = waited + self.period if exchange and exchange == self.exchange else 0.0
            without_store = without_store + self.period if rounds == self.rounds else 0.0
            exchange, rounds = self.exchange, self.rounds
            others = [rank for rank in range(self.size) if rank != self.rank]
            for rank in others:
                is_gone = rank in self._lifelines and not self.is_ending and self._is_gone(rank)
                if is_gone:
                    time.sleep(2 * self.period)  # its last record may be on its way
                message, status = self.records[rank].get("failure", ("", 0))
                if (is_gone or message) and not self._closing.is_set():
                    self._end(f"{self._who(rank)} has ended: {message or 'its process is gone'}", status or 1)
            if without_store > limit:
                self._name([0], f"silent for {without_store:.0f} s, or else the launcher's store is")
            silent = [rank for rank in others if self.silent[rank] > limit]
            if silent and without_store == 0:
                self._name(silent, f"silent for {max(self.silent[rank] for rank in silent):.0f} s")
            if waited > self.limit:
                missing = [rank for rank in others if not self.records[rank].get("exchange")]
                self._name(missing or others, f"awaited in an exchange for {waited:.0f} s")

    def _is_gone(self, rank: int) -> bool:
        try:
            return not self._lifelines[rank].recv(1)
        except BlockingIOError:
            return False
        except OSError:
            return True

    def _hear_signals(self) -> None:
        try:
            heard = os.read(self._signals, 64)
        except BlockingIOError:
            return
        if self.signalled is None:
            self.signalled = time.monotonic()
        elif time.monotonic() - self.signalled > SAME_WISH_SECONDS:
            os._exit(128 + heard[-1])  # the second one

    def _name(self, ranks: list[int], what: str) -> NoReturn:
        names = "\n  ".join(["", *map(self._who, ranks)])
        expected = f"a sign of life within train.rank_timeout = {self.timeout:g} s"
        fix = "look at that process and its machine; go on with --resume auto, or raise train.rank_timeout"
        self._end(explain(f"a rank hangs: {what}", names, expected=expected, fix=fix), 2)

    def _end(self, message: str, status: int) -> NoReturn:
        print(f"error: {message}", file=sys.stderr)
        self._exit(status)

    def _exit(self, status: int) -> NoReturn:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        time.sleep(3 * self.period)  # the others read why, from a store that this process may hold
        os._exit(status)

    def _who(self, rank: int) -> str:
        record = self.records[rank]
        return f"rank {rank} (host {record.get('host')}, pid {record.get('pid')}), last: {record.get('doing')}"
