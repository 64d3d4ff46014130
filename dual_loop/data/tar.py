"""Files inside tar archives, read in any order without unpacking: an offset index, and ``pread``.

A plain tar is read at the stored offsets. For a gzip-compressed one (whatever its name) ``indexed_gzip`` keeps points
to go on from while it is listed, in a file beside the index; a read then decompresses at most from one to the next.

Member names are compared and shown, never used as paths; links, sparse files and folders inside an archive are left
out. Where an archive is damaged, what comes before the damage is used, and the damage is reported with its place.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import tarfile
import zlib
from collections import OrderedDict
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from dual_loop.data.index import Arrays
from dual_loop.data.index_file import replacing, watch_files
from dual_loop.data.limits import max_pixels, open_file
from dual_loop.data.string_table import StringTable
from dual_loop.errors import EnvironmentProblem, bad_sample, explain

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")

MAX_OPEN = 64
"""Most archives that one process keeps open; 1,000 of SA-1B times many workers would pass the system's limit."""

MAX_POINT_BYTES = 2**27
"""Most bytes of points that one process holds; beyond it, compressed archives are closed, the oldest first."""

_GZIP_MAGIC = b"\x1f\x8b"
_LEAST_SPACING = 2**20
_MAX_POINTS = 2500
_DAMAGE = (tarfile.TarError, OSError, EOFError, ValueError, OverflowError, RecursionError, zlib.error)
_END = 1024  # bytes of zeros that end an archive
_RECORD, _LONGEST_RECORD = 10240, 2**20
"""Archives are filled up to a multiple of one record: of the first size unless their writer was told another."""
_HEADER_BYTES = 2**20  # most of one read while an archive is listed: a header may claim a name of any length


def list_tar(index_dir: str, prefix: str, path: str) -> Arrays:
    """Return the files of one archive whose names without folders begin with ``prefix``: a part of an index.

    Returns:
        ``member_bytes, member_offsets`` (names without folders), ``member_place`` (n, 2) int64 (offset in the
        uncompressed archive, size), ``damage_bytes, damage_offsets`` (one text, empty where the archive is whole),
        and the watched archive. ``index_dir`` keeps the points of a compressed one.

    Raises:
        EnvironmentProblem: it is compressed and ``indexed_gzip`` is not installed, or its points cannot be stored.
    """
    watched = watch_files([Path(path)])
    found: list[tuple[str, int, int]] = []
    if is_compressed(Path(path)):
        with open_compressed(Path(path), Path(index_dir)) as file:
            damage = _list_members(file, prefix, None, found)
            points = _points_path(Path(path), Path(index_dir))
            try:
                with replacing(points) as temporary:
                    file.export_index(filename=str(temporary))
            except OSError as error:
                what = "the points of a compressed archive cannot be stored"
                fix = "set data.index_dir or $DUAL_LOOP_CACHE"
                raise EnvironmentProblem(explain(what, str(points), str(error), "a folder to write in", fix)) from error
    else:
        with open_file(path) as plain:
            damage = _list_members(plain, prefix, os.path.getsize(path), found)
    return {
        **StringTable.from_strings(name for name, _, _ in found).to_arrays("member"),
        "member_place": np.array([place for _, *place in found], np.int64).reshape(-1, 2),
        **StringTable.from_strings([damage]).to_arrays("damage"),
        **watched,
    }


def _list_members(file: Any, prefix: str, size: int | None, found: list[tuple[str, int, int]]) -> str:
    """Add (name, offset, size) of the wanted members to ``found``; return what is damaged, if anything is.

    ``size`` is the archive's, where it is known before the whole of it was read.
    """
    end, bounded = 0, cast(BinaryIO, _Onward(file))
    try:
        with tarfile.open(fileobj=bounded, mode="r:") as archive:
            for member in archive:
                end = member.offset_data + member.size
                if not 0 <= member.size < 2**60:
                    raise ValueError(f"{member.name} claims {member.size} bytes")
                if size is not None and end > size:
                    raise EOFError(f"{member.name} should end at byte {end:,}, the archive ends at {size:,}")
                name = member.name.rsplit("/", 1)[-1]
                if member.isreg() and not member.issparse() and name.startswith(prefix):
                    found.append((name, member.offset_data, member.size))
            end = archive.offset  # type: ignore[attr-defined]
            file.seek(end)
            return _damaged_end(file.read(2 * _LONGEST_RECORD), end)
    except _DAMAGE as error:
        file.seek(0)
        begins = "" if end else f"; it begins with {file.read(40)!r}"
        return f"behind byte {end:,}: {type(error).__name__}: {error}{begins}"


def _damaged_end(rest: bytes, end: int) -> str:
    """Return what is wrong with what follows the last member, which ends at byte ``end``; empty where nothing is.

    An archive ends with two blocks of zeros and is filled up with zeros to a record. tarfile takes for the end a cut
    between two members, a header that is none, and zeros in place of members, as an unfinished download has them.
    """
    at, total = f"behind byte {end:,}: ", end + len(rest)
    if not rest.startswith(bytes(_END)):
        seen = "it breaks off without the blocks of zeros that end an archive" if len(rest) < _END else "no member"
        return at + seen
    record = max(_RECORD, total & -total)  # the largest power of two that the size is a multiple of (``tar -b``)
    if any(rest) or len(rest) > min(_LONGEST_RECORD, _END + -(end + _END) % record):
        return at + "it goes on where an archive has ended (a download that is not complete, or two archives in one)"
    return ""


class _Onward:
    """A file that is read on and on in short pieces, whatever the headers of its members claim."""

    def __init__(self, file: Any) -> None:
        self._file, self.tell = file, file.tell

    def seek(self, place: int) -> None:
        if place < self._file.tell() - 1:
            raise ValueError("a header points backwards")
        self._file.seek(place)

    def read(self, size: int) -> bytes:
        if not 0 <= size <= _HEADER_BYTES:
            raise ValueError(f"a header of {size:,} bytes")
        return bytes(self._file.read(size))


def is_compressed(path: Path) -> bool:
    """Tell by its first bytes whether an archive is gzip-compressed; names do not tell."""
    try:
        with open_file(path) as file:
            return file.read(2) == _GZIP_MAGIC
    except OSError:
        return False


def point_spacing(num_bytes: int) -> int:
    """Return the distance in bytes between the points of a compressed archive of ``num_bytes``.

    Half of it is decompressed for a read, but points of 32 KiB are all read when an archive is opened: 1 MiB up to
    archives of 2.6 GB, then so many MiB that there are about :data:`_MAX_POINTS` (80 MB).
    """
    return _LEAST_SPACING * max(1, math.ceil(num_bytes / (_MAX_POINTS * _LEAST_SPACING)))


def open_compressed(path: Path, index_dir: Path) -> Any:
    """Open a compressed archive for reading at any offset (needs ``indexed_gzip``), with its points where stored."""
    try:
        from indexed_gzip import IndexedGzipFile
    except ImportError as error:
        fix = "pip install 'dual-loop[archives]', or decompress the archive"
        what = "a compressed archive cannot be read without indexed_gzip"
        raise EnvironmentProblem(explain(what, str(path), fix=fix)) from error
    points = _points_path(path, index_dir)
    options = {"spacing": point_spacing(path.stat().st_size), "drop_handles": False}
    if points.is_file():
        try:
            return IndexedGzipFile(str(path), index_file=str(points), **options)
        except (OSError, ValueError):
            points.unlink(missing_ok=True)  # damaged: reads go from the start, until the archive is listed again
    return IndexedGzipFile(str(path), **options)


def _points_path(path: Path, index_dir: Path) -> Path:
    state = path.stat()
    text = f"{path}\n{state.st_mtime_ns}\n{state.st_size}\n{point_spacing(state.st_size)}"
    return index_dir / "gzip_points" / f"{hashlib.sha256(os.fsencode(text)).hexdigest()[:24]}.gzidx"


class TarShelf:
    """Reads pieces of archives; a process opens its own files, at most :data:`MAX_OPEN` at a time.

    Points of compressed archives (in ``index_dir``) are held in memory, at most :data:`MAX_POINT_BYTES` unless one
    archive has more.
    """

    def __init__(self, root: Path, archives: StringTable, index_dir: Path) -> None:
        self.root, self.archives, self.index_dir = root, archives, index_dir
        self._open: OrderedDict[int, Any] = OrderedDict()
        self._point_bytes: dict[int, int] = {}
        self._pid = os.getpid()

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_open": OrderedDict(), "_point_bytes": {}}

    def read(self, number: int, offset: int, size: int) -> bytes:
        """Return ``size`` bytes of archive ``number`` from ``offset`` on (in the uncompressed archive).

        Raises:
            SampleError: ``missing_file``; ``truncated_file`` where there are fewer bytes, or a compressed one is
                damaged there; ``too_large``.
        """
        if size > (limit := max_pixels()):
            where, expected = f"{self._path(number)} at byte {offset:,}", f"at most {limit:,} bytes (data.max_pixels)"
            raise bad_sample("too_large", "a file in an archive is too large", where, f"{size:,}", expected)
        try:
            file = self._file(number)
            if isinstance(file, io.FileIO):
                data = os.pread(file.fileno(), size, offset)
            else:
                file.seek(offset)
                data = file.read(size)
            if len(data) != size:
                raise EOFError(f"{len(data):,} of {size:,} bytes")
        except FileNotFoundError as error:
            raise bad_sample("missing_file", "an archive is missing", str(self._path(number))) from error
        except _DAMAGE as error:
            where, fix = f"{self._path(number)} at byte {offset:,}", "download this archive again"
            raise bad_sample("truncated_file", "an archive is damaged", where, error, fix=fix) from error
        return data

    def _path(self, number: int) -> Path:
        return self.root / self.archives[number]

    def _file(self, number: int) -> Any:
        """Return the open archive, a ``FileIO`` where it is plain; files are never shared over a fork."""
        if self._pid != os.getpid():
            self._open, self._point_bytes, self._pid = OrderedDict(), {}, os.getpid()
        if number not in self._open:
            path = self._path(number)
            if is_compressed(path):
                self._open[number] = open_compressed(path, self.index_dir)
                points = _points_path(path, self.index_dir)
                self._point_bytes[number] = points.stat().st_size if points.is_file() else 0
            else:
                self._open[number] = open_file(path, buffering=0)
                if hasattr(os, "posix_fadvise"):  # the system fetches all that a read asks for, and nothing behind
                    os.posix_fadvise(self._open[number].fileno(), 0, 0, os.POSIX_FADV_RANDOM)
            # Archives are closed until the limits hold; the newest stays open.
            while len(self._open) > 1 and (
                len(self._open) > MAX_OPEN or sum(self._point_bytes.values()) > MAX_POINT_BYTES
            ):
                oldest, opened = self._open.popitem(last=False)
                self._point_bytes.pop(oldest, None)
                opened.close()
        self._open.move_to_end(number)
        return self._open[number]
