"""One run, one folder: ``run.lock`` says who writes a run folder, and another start waits or refuses.

The file holds host, process and its start time, and comes into being by a hard link, whole and in one step, also on
NFS; ``flock`` is not relied on. The holder touches it every few seconds. A lock is stale where its process is gone from
this host (``kill -9``), or where nobody touched it for a while (a lock of another host or container): it is taken over.
A holder that was suspended so long that another took its lock ends when it finds out.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from dual_loop.errors import ConfigError, EnvironmentProblem, explain

LOCK_NAME = "run.lock"
BEAT_SECONDS = 5.0
SILENT_SECONDS = 60.0
"""A lock that nobody touched for so long is stale; so long a resumed run waits for one that is held."""


@dataclass(frozen=True)
class Holder:
    """Who holds a lock: ``place`` tells hosts, boots and containers apart, ``started`` processes of the same number."""

    host: str
    place: str
    pid: int
    started: float
    token: str

    def is_gone(self) -> bool:
        """Say whether the process is known to have ended; of other places nothing is known."""
        if self.place != _place():
            return False
        try:
            is_ended = psutil.Process(self.pid).status() == psutil.STATUS_ZOMBIE
            return bool(is_ended or _started(self.pid) != self.started)
        except (psutil.NoSuchProcess, FileNotFoundError):
            return True


def _started(pid: int) -> float:
    """Return when a process started: on Linux in ticks since the boot, which no change of the clock moves."""
    if Path("/proc/self/stat").exists():
        return float(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    return float(psutil.Process(pid).create_time())


def _place() -> str:
    parts = [socket.gethostname()]
    with suppress(OSError):  # no such files outside of Linux
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
    return " ".join(parts)


@contextmanager
def holding(folder: str | Path, waits: bool) -> Iterator[None]:
    """Hold the lock of a run folder for the length of a ``with`` block; the folder is made where it is missing.

    Args:
        waits: wait for a lock that is held, as a requeued run does, before refusing.

    Raises:
        ConfigError: another process writes there.
        EnvironmentProblem: the folder cannot be written.
    """
    path = Path(folder) / LOCK_NAME
    own = Holder(socket.gethostname(), _place(), os.getpid(), _started(os.getpid()), uuid.uuid4().hex)
    was_there = path.parent.exists()
    try:
        _take(path, own, waits)
    except OSError as error:
        what, fix = "the run folder cannot be locked", "choose another --output_dir"
        raise EnvironmentProblem(explain(what, str(path), error, fix=fix)) from error
    closing = threading.Event()
    threading.Thread(target=_beat, args=(path, own, closing), name="run_lock", daemon=True).start()
    try:
        yield
    finally:
        closing.set()
        with suppress(OSError):
            if _read(path)[0] == own:
                path.unlink()
            if not was_there:
                path.parent.rmdir()  # only where a start that was refused left it empty


def _take(path: Path, own: Holder, waits: bool) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    written = path.with_name(f".{LOCK_NAME}.{own.token}")
    written.write_text(json.dumps(asdict(own)), encoding="utf-8")
    start = touched_at = time.monotonic()
    last, told = None, False
    try:
        while True:
            with suppress(FileExistsError):
                os.link(written, path)
                return
            holder, touched = _read(path)
            now = time.monotonic()
            # Only changes count, so that clocks need not agree.
            if (holder, touched) != last:
                last, touched_at = (holder, touched), now
            elsewhere = holder is None or holder.place != own.place
            if (holder is not None and holder.is_gone()) or (elsewhere and now - touched_at > SILENT_SECONDS):
                _remove_stale(path, holder)
                continue
            is_alive = not elsewhere or touched_at > start + BEAT_SECONDS / 2
            if is_alive and (not waits or now - start > SILENT_SECONDS):
                who = f"process {holder.pid} on {holder.host}" if holder else "a process that it does not name"
                fix = "wait for it or end it, or choose another --output_dir"
                raise ConfigError(explain("another run writes this folder", str(path), who, "no other writer", fix))
            if not told:
                print(f"{path} is held by {holder}: waiting up to {SILENT_SECONDS:g} s", file=sys.stderr, flush=True)
                told = True
            time.sleep(min(1.0, BEAT_SECONDS / 5))
    finally:
        written.unlink(missing_ok=True)


def _read(path: Path) -> tuple[Holder | None, float]:
    """Return who holds a lock, None where that cannot be read, and when it was touched."""
    try:
        with path.open(encoding="utf-8") as stream:  # opening asks an NFS server anew
            touched = os.fstat(stream.fileno()).st_mtime
            return Holder(**json.load(stream)), touched
    except FileNotFoundError:
        return None, 0.0
    except (ValueError, TypeError):
        return None, path.stat().st_mtime if path.exists() else 0.0


def _remove_stale(path: Path, holder: Holder | None) -> None:
    """Take a stale lock away, if it is still there; one start at a time may, or one would take a new lock away."""
    claim = path.with_name(f".{LOCK_NAME}.removing")
    try:
        claim.mkdir()
    except FileExistsError:
        with suppress(OSError):
            if time.time() - claim.stat().st_mtime > SILENT_SECONDS:
                claim.rmdir()  # of a start that was killed right here
        time.sleep(0.05)
        return
    try:
        if path.exists() and _read(path)[0] == holder:
            path.unlink()
            if holder:
                print(f"took over {path} of process {holder.pid} on {holder.host}, which is gone", file=sys.stderr)
    finally:
        claim.rmdir()


def _beat(path: Path, own: Holder, closing: threading.Event) -> None:
    """Touch the lock until it is given back; end the process where another has taken it."""
    while not closing.wait(BEAT_SECONDS):
        with suppress(OSError):  # a server that is away for a while
            holder = _read(path)[0]
            if holder == own:
                os.utime(path)
            elif not closing.is_set():
                what, fix = "another process took over the run folder", "this one was silent for too long; see that one"
                print(f"error: {explain(what, str(path), holder, own, fix)}", file=sys.stderr, flush=True)
                os._exit(2)
