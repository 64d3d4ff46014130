"""What would harm the process that reads it: files that never end, sizes that nothing backs, JSON without an end."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dual_loop.config import DataConfig
from dual_loop.data.images import open_image_file, read_picture
from dual_loop.data.limits import RefusedFile, open_file, parse_json, read_file, read_lines
from dual_loop.data.masks import decode_rle, decode_segmentation
from dual_loop.data.masks_dir import MasksDir
from dual_loop.data.refcoco_index import load_refs
from dual_loop.data.sav import SavPairs
from dual_loop.data.tar import list_tar
from dual_loop.errors import ConfigError, SampleError, explain, shorten

SQUARE = [10, 10, 60, 10, 60, 60, 10, 60]


def refused(call) -> SampleError:
    with pytest.raises(SampleError) as caught:
        call()
    return caught.value


@pytest.fixture
def small_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dual_loop.data.limits._in_use", DataConfig(max_pixels=1000, max_file_mb=1))


# --- which files are opened ------------------------------------------------------------------------------------------


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/zero")
    for path, kind in ((tmp_path / "pipe", "FIFO"), (Path("/dev/zero"), "device"), (tmp_path / "link", "device")):
        with pytest.raises(RefusedFile, match=kind):
            open_file(path)
        error = refused(lambda path=path: read_picture(path, apply_exif=False))
        assert error.reason == "not_an_image"
        assert kind in str(error)
    with pytest.raises(RefusedFile, match="folder"):
        open_file(tmp_path)
    with pytest.raises(RefusedFile, match="name"):
        open_file("a\0b")
    with pytest.raises(RefusedFile, match="name"):
        open_file("\ud800")


def test_a_file_is_read_up_to_the_limit(tmp_path: Path, small_limit: None) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b" " * (1 << 20))
    assert len(read_file(path)) == 1 << 20
    path.write_bytes(b" " * ((1 << 20) + 1))
    with pytest.raises(RefusedFile, match=r"1,048,577 bytes, more than the limit of 1,048,576 \(data\.max_file_mb\)"):
        read_file(path)
    with pytest.raises(RefusedFile, match="line of more than 5 bytes"):
        list(read_lines(io.BytesIO(b"1234\n12345\n"), 5))


@pytest.mark.parametrize(
    "text", [b"[" * 100_000, b'{"a":' * 100_000, "[" * 5000, b"1" * 5000, b"\xff\xfe1", b"\x80", b"", "{"], ids=str
)
def test_faults_of_json_are_one_error(text: bytes | str) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        parse_json(text)


def test_a_byte_order_mark_is_passed_over() -> None:
    assert parse_json(b"\xef\xbb\xbf[1]") == parse_json("\ufeff[1]") == parse_json("[1]".encode("utf-16")) == [1]


# --- sizes -----------------------------------------------------------------------------------------------------------


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("width", "height"), [(100_000, 100_000), (12_000, 10_001), (1, 70_000), (2**31 - 1, 1)])
def test_the_size_of_an_image_is_looked_at_before_it_is_decoded(tmp_path: Path, width: int, height: int) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(png_header(width, height))
    for error in (refused(lambda: read_picture(path, False)), refused(lambda: open_image_file(path))):
        assert error.reason == "too_large"
        assert all(text in str(error) for text in ("a.png", "data.max_pixels", "120,000,000"))


def test_the_limit_is_a_setting(tmp_path: Path, small_limit: None) -> None:
    for size in ((25, 40), (25, 41)):
        Image.new("RGB", size).save(tmp_path / f"{size[1]}.png")
    assert read_picture(tmp_path / "40.png", False).size == (40, 25)
    assert refused(lambda: read_picture(tmp_path / "41.png", False)).reason == "too_large"
    assert decode_rle({"size": [25, 40], "counts": [1000]}, "here").shape == (25, 40)
    assert "at most 1,000" in str(refused(lambda: decode_rle({"size": [25, 41], "counts": [1025]}, "here")))
    assert "at most 1,000" in str(refused(lambda: decode_segmentation([SQUARE], 25, 41, "here")))


def test_programs_are_not_started_for_an_image(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n")
    assert refused(lambda: read_picture(path, False)).reason == "not_an_image"


@pytest.mark.parametrize("side", [100_000, 200_000, 2**31, 2**70, -5, 0])
def test_masks_are_not_drawn_at_sizes_that_only_a_file_claims(side: int) -> None:
    assert refused(lambda: decode_segmentation([SQUARE], side, side, "a.json")).reason == "too_large"
    assert refused(lambda: decode_rle({"size": [side, side], "counts": [side * side]}, "a.json")).reason == "broken_rle"


def test_an_outline_is_not_drawn_that_runs_to_and_fro_without_end() -> None:
    polygon = [0, 0, 20_000, 0, 0, 1] * 2000
    error = refused(lambda: decode_segmentation([polygon], 10_000, 10_000, "a.json"))
    assert error.reason == "bad_polygon"
    assert "outline" in str(error)


def test_a_code_longer_than_any_mask_needs_is_refused() -> None:
    assert "too long" in str(refused(lambda: decode_rle({"size": [9, 9], "counts": "0" * (1 << 24)}, "a.json")))


def test_arrays_that_expand_are_not_decompressed(tmp_path: Path) -> None:
    path = tmp_path / "masklet_data_0.npz"
    small = io.BytesIO()
    np.save(small, np.zeros((4, 5), np.uint8))
    headers = {
        "too_large": [
            "{'descr': '|u1', 'fortran_order': False, 'shape': (100000, 100000, 3)}",
            "{'descr': '|S2000000000', 'fortran_order': False, 'shape': (1,)}",
        ],
        "bad_array": ["{'descr': '|O', 'fortran_order': False, 'shape': (4, 5, 3)}"],
        "truncated_file": [
            "{'descr': '|u1', 'fortran_order': False, 'shape': (-1, 5, 3)}",
            "{'descr': '|u1', 'fortran_order': False, 'shape': (4, 5, 3)}",
            "{" + " " * 20_000 + "}",
            "(" * 5000,
        ],
    }
    for reason, texts in headers.items():
        for text in texts:
            array = b"\x93NUMPY\1\0" + struct.pack("<H", len(text) + 1) + text.encode() + b"\n" + b"\0" * 59
            with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
                for key in ("frame1", "mask1", "frame2", "mask2"):
                    archive.writestr(f"{key}.npy", array if key == "frame1" else small.getvalue())
            error = refused(lambda: SavPairs(tmp_path, index_dir=tmp_path / "i").load(0, np.random.default_rng(0)))
            assert error.reason == reason, text[:60]
            assert "masklet_data_0.npz" in str(error)


def test_messages_show_the_beginning_of_a_value_however_deep_or_long_it_is() -> None:
    deep: object = []
    for _ in range(100_000):
        deep = [deep]
    for value in (deep, "x" * 10**7, 10**6000, list(range(10**6)), {"a": "\ud800"}):
        assert len(shorten(value)) <= 60
    explain("a", "\ud800", "\ud800", "\ud800").encode()


def test_json_of_an_image_is_bounded(tmp_path: Path) -> None:
    from dual_loop.data.reader import read_annotations

    path = tmp_path / "sa_1.json"
    path.write_text(json.dumps([0] * 12_000_000))
    assert "more than the limit" in str(refused(lambda: read_annotations(path, str(path))))


@pytest.mark.parametrize("bomb", [b"]r\xff\xff\xff\x0f.", b"]p268435455\n.", b"\x96\0\0\0\0\4\0\0\0."], ids=str)
def test_a_pickle_of_some_bytes_takes_no_gigabytes(tmp_path: Path, bomb: bytes) -> None:
    path = tmp_path / "refs(unc).p"
    path.write_bytes(b"\x80\2" + bomb)
    code = "import sys; from pathlib import Path; from dual_loop.data.refcoco_index import load_refs\n"
    code += "try: load_refs(Path(sys.argv[1]))\nexcept Exception as error: print(type(error).__name__)\n"
    code += "print(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])"
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    name, peak = done.stdout.split()
    assert name == "ConfigError"
    assert int(peak) < 2**20  # KiB; ru_maxrss would count the memory of this process as well


def test_a_pickle_that_holds_one_text_a_thousand_times_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "refs(unc).p"
    one = {"sent": "x" * 10_000}
    ref = {"ref_id": 1, "ann_id": 1, "image_id": 1, "split": "train", "sentences": [one] * 1000}
    path.write_bytes(pickle.dumps([ref] * 1000))
    with pytest.raises(ConfigError, match="again and again"):
        load_refs(path)


@pytest.mark.parametrize("size", [-512, -(2**40), 2**80])
def test_a_header_of_an_archive_cannot_lead_back(tmp_path: Path, size: int) -> None:
    header = bytearray(tarfile.TarInfo("./sa_1.jpg").tobuf())
    header[124:136] = (size % 2**96).to_bytes(12, "big")
    header[124] = 0x80 if size > 0 else 0xFF
    for kind in (b"0", b"x", b"L"):
        header[156:157] = kind
        header[148:156] = b"%06o\0 " % (sum(header[:148]) + 8 * 32 + sum(header[156:]))
        (tmp_path / "sa_0.tar").write_bytes(bytes(header) * 3 + bytes(1024))
        assert list_tar(str(tmp_path), "sa_", str(tmp_path / "sa_0.tar"))["damage_bytes"].size > 0


def test_half_a_character_in_a_caption_is_one_bad_region(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    Image.new("RGB", (80, 80)).save(tmp_path / "images/a.png")
    regions = [{"id": i, "image_id": 1, "segmentation": [SQUARE], "caption": t} for i, t in enumerate(("a", "\ud83d"))]
    images = [{"id": 1, "file_name": "a.png", "height": 80, "width": 80}]
    (tmp_path / "a.json").write_text(json.dumps({"images": images, "annotations": regions}))
    sample = MasksDir(tmp_path, regions_per_image=2, index_dir=tmp_path / "i").load(0, np.random.default_rng(0))
    assert sample.captions == (("a",),)
    assert [region.reason for region in sample.passed_over] == ["broken_text"]
