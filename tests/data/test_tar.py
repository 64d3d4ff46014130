"""SA-1B read from its archives gives what the unpacked files give; damage, links and odd names do no harm."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco

from dual_loop.data import tar
from dual_loop.data.sa1b import Sa1b
from dual_loop.errors import SampleError

pytest.importorskip("indexed_gzip", reason="compressed archives need indexed_gzip")
SIZE = (60, 80)


def write_entry(folder: Path, number: int) -> None:
    random = np.random.default_rng(number)
    pixels = random.integers(0, 256, (*SIZE, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / f"sa_{number}.jpg", quality=90)
    annotations = []
    for region in range(3):
        mask = np.zeros(SIZE, np.uint8, order="F")
        top, left = random.integers(0, 30, 2)
        mask[top : top + 20, left : left + 25] = 1
        code = coco.encode(mask)
        segmentation = {"size": list(SIZE), "counts": code["counts"].decode()}
        annotations.append({"id": 10 * number + region, "segmentation": segmentation, "predicted_iou": 0.9})
    (folder / f"sa_{number}.json").write_text(json.dumps({"image": {}, "annotations": annotations}))


@pytest.fixture
def unpacked(tmp_path: Path) -> Path:
    folder = tmp_path / "unpacked"
    folder.mkdir()
    for number in range(6):
        write_entry(folder, number)
    return folder


def pack(folder: Path, archive: Path, numbers: range, prefix: str = "./", is_compressed: bool = False) -> None:
    archive.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for number in numbers:
            for suffix in ("jpg", "json"):
                tar.add(folder / f"sa_{number}.{suffix}", f"{prefix}sa_{number}.{suffix}")
    data = buffer.getvalue()
    archive.write_bytes(gzip.compress(data) if is_compressed else data)


def archives(unpacked: Path, root: Path, is_compressed: bool) -> Path:
    pack(unpacked, root / "sa_000000.tar", range(3), "./", is_compressed)
    pack(
        unpacked,
        root / "more" / ("sa_000001.tgz" if is_compressed else "sa_000001.tar"),
        range(3, 6),
        "a/b/",
        is_compressed,
    )
    return root


def opened(root: Path, index_dir: Path, **options) -> Sa1b:
    return Sa1b(root, regions_per_image=2, index_dir=index_dir, **options)


def by_stem(source: Sa1b) -> dict[str, tuple]:
    found = {}
    for index in range(len(source)):
        sample = source.load(index, np.random.default_rng(7))
        found[source.entry_id(index).rsplit("/", 1)[-1]] = (sample.image, sample.masks, sample.region_ids)
    return found


def assert_same(seen: dict[str, tuple], expected: dict[str, tuple]) -> None:
    assert seen.keys() == expected.keys()
    for name, (image, masks, names) in expected.items():
        assert np.array_equal(seen[name][0], image)
        assert np.array_equal(seen[name][1], masks)
        assert seen[name][2] == names


@pytest.mark.parametrize("is_compressed", [False, True])
def test_archives_give_what_their_files_give(unpacked, tmp_path, is_compressed):
    root = archives(unpacked, tmp_path / "tars", is_compressed)
    source = opened(root, tmp_path / "index")
    assert_same(by_stem(source), by_stem(opened(unpacked, tmp_path / "index")))
    assert source.damaged_archives == {}
    assert source.entry_id(0).split("/")[0] in ("more", "sa_000000.tar")
    assert source.image_path(0) is None


def test_files_and_archives_together(unpacked, tmp_path):
    root = tmp_path / "mixed"
    pack(unpacked, root / "sa_000000.tar", range(4))
    for number in (4, 5):
        for suffix in ("jpg", "json"):
            shutil.copy(unpacked / f"sa_{number}.{suffix}", root)
    source = opened(root, tmp_path / "index")
    assert_same(by_stem(source), by_stem(opened(unpacked, tmp_path / "index")))
    paths = [source.image_path(index) for index in range(len(source))]
    assert sum(path is not None for path in paths) == 2


@pytest.mark.parametrize("is_compressed", [False, True])
def test_an_archive_is_listed_once_and_again_when_it_changed(unpacked, tmp_path, monkeypatch, is_compressed):
    root = archives(unpacked, tmp_path / "tars", is_compressed)
    first = by_stem(opened(root, tmp_path / "index"))
    monkeypatch.setattr(tar, "_list_members", None)
    assert_same(by_stem(opened(root, tmp_path / "index")), first)
    monkeypatch.undo()
    pack(unpacked, root / "sa_000000.tar", range(2), "./", is_compressed)
    assert len(opened(root, tmp_path / "index")) == 5


def test_a_truncated_archive_gives_what_is_whole_and_says_so(unpacked, tmp_path):
    pack(unpacked, tmp_path / "tars" / "sa_000000.tar", range(3))
    path = tmp_path / "tars" / "sa_000000.tar"
    with tarfile.open(path) as tar:
        cut = tar.getmembers()[-1].offset_data + 5
    os.truncate(path, cut)
    with pytest.warns(UserWarning, match=r"sa_000000.tar.*byte") as caught:
        source = opened(tmp_path / "tars", tmp_path / "index")
    assert "1 damaged in all" in str(caught[0].message)
    assert list(source.damaged_archives) == ["sa_000000.tar"]
    with pytest.warns(UserWarning, match="damaged"):
        opened(tmp_path / "tars", tmp_path / "index")
    whole = [source.load(index, np.random.default_rng(0)) for index in range(2)]
    assert [sample.sample_id for sample in whole] == ["sa_000000.tar/sa_0", "sa_000000.tar/sa_1"]
    assert len(source) == 2
    assert source.left_out["images without a JSON file"] == 1


@pytest.mark.parametrize("is_compressed", [False, True])
@pytest.mark.parametrize("zeros", [False, True])
def test_an_archive_that_lacks_its_end_says_so(unpacked, tmp_path, zeros, is_compressed):
    path = tmp_path / "tars/sa_000000.tar"
    pack(unpacked, path, range(6))
    whole = path.read_bytes()
    with tarfile.open(path) as archive:
        members = archive.getmembers()
    ends = [member.offset_data + (member.size + 511) // 512 * 512 for member in members[1:8]]
    for number, cut in enumerate((*ends, ends[3] + 100, ends[3] + 600, members[5].offset_data + 512)):
        data = whole[:cut] + bytes(len(whole) - cut) * zeros
        path.write_bytes(gzip.compress(data) if is_compressed else data)
        with pytest.warns(UserWarning, match="damaged.*behind byte"):
            Sa1b(path.parent, index_dir=tmp_path / f"index{number}")


def test_whole_archives_of_any_writer_are_not_damaged(unpacked, tmp_path):
    path = tmp_path / "tars/sa_000000.tar"
    for count in range(1, 7):
        pack(unpacked, path, range(count))
        data = path.read_bytes()
        with tarfile.open(path) as archive:
            last = archive.getmembers()[-1]
        end = last.offset_data + (last.size + 511) // 512 * 512
        # Filled up to a record (``tar -b``: of any power of two), or not.
        for length in (len(data), end + 1024, *(-(-(end + 1024) // record) * record for record in (2**15, 2**20))):
            path.write_bytes(data[:length] + bytes(max(0, length - len(data))))
            assert Sa1b(path.parent, index_dir=tmp_path / f"index{count}{length}").damaged_archives == {}
    path.write_bytes(path.read_bytes()[:-1024] + b"x" * 1024)
    with pytest.warns(UserWarning, match="damaged.*goes on"):
        Sa1b(path.parent, index_dir=tmp_path / "index")


def test_an_error_page_is_shown(unpacked, tmp_path):
    pack(unpacked, tmp_path / "tars/sa_000000.tar", range(1))
    (tmp_path / "tars/sa_000001.tar").write_bytes(b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>")
    with pytest.warns(UserWarning, match="begins with b.<.xml"):
        assert len(opened(tmp_path / "tars", tmp_path / "index")) == 1


def test_what_is_unpacked_as_well_as_archived_counts_once(unpacked, tmp_path):
    root = tmp_path / "mixed"
    pack(unpacked, root / "sa_000000.tar", range(4))
    pack(unpacked, root / "copy/sa_000000.tgz", range(2), is_compressed=True)
    for name in ("sa_3.jpg", "sa_3.json", "sa_2.jpg"):  # of sa_2 the image alone
        shutil.copy(unpacked / name, root)
    source = opened(root, tmp_path / "index")
    assert source.left_out["images that are there twice"] == 4
    assert source.left_out["images without a JSON file"] == 0
    assert sorted(source.entry_id(i).rsplit("/", 1)[-1] for i in range(len(source))) == [f"sa_{n}" for n in range(4)]
    assert [source.entry_id(i) for i in range(len(source)) if source.image_path(i)] == ["sa_3"]


def test_images_and_json_in_archives_of_their_own_are_paired(unpacked, tmp_path):
    for name, suffix in (("images", "jpg"), ("annotations", "json")):
        with tarfile.open(tmp_path / f"{name}.tar", "w") as archive:
            for number in range(3):
                archive.add(unpacked / f"sa_{number}.{suffix}", f"x{number}.{suffix}")
    (tmp_path / "tars").mkdir()
    for path in tmp_path.glob("*.tar"):
        path.rename(tmp_path / "tars" / path.name)
    source = opened(tmp_path / "tars", tmp_path / "index")
    assert [source.entry_id(i) for i in range(len(source))] == [f"images.tar/x{n}" for n in range(3)]
    assert source.load(0, np.random.default_rng(0)).num_regions == 2


def test_a_compressed_archive_that_breaks_off(unpacked, tmp_path):
    path = tmp_path / "tars" / "sa_000000.tar"
    pack(unpacked, path, range(6), is_compressed=True)
    os.truncate(path, path.stat().st_size * 2 // 3)
    with pytest.warns(UserWarning, match="damaged"):
        source = opened(tmp_path / "tars", tmp_path / "index")
    good = source.load(0, np.random.default_rng(0))
    expected = opened(unpacked, tmp_path / "index").load(0, np.random.default_rng(0))
    assert np.array_equal(good.image, expected.image)
    assert 1 <= len(source) < 6


def test_an_archive_that_shrank_after_it_was_listed_is_a_bad_sample(unpacked, tmp_path):
    root = archives(unpacked, tmp_path / "tars", False)
    source = opened(root, tmp_path / "index")
    os.truncate(root / "sa_000000.tar", 1000)
    index = next(k for k in range(len(source)) if source.entry_id(k) == "sa_000000.tar/sa_2")
    with pytest.raises(SampleError) as error:
        source.load(index, np.random.default_rng(0))
    assert error.value.reason == "truncated_file"
    assert "sa_000000.tar" in str(error.value)
    (root / "sa_000000.tar").unlink()
    source = pickle.loads(pickle.dumps(source))  # without open files
    with pytest.raises(SampleError) as error:
        source.load(index, np.random.default_rng(0))
    assert error.value.reason == "missing_file"


def test_links_and_names_that_leave_the_root_are_harmless(unpacked, tmp_path):
    root = tmp_path / "tars"
    root.mkdir()
    with tarfile.open(root / "sa_000000.tar", "w") as tar:
        tar.add(unpacked / "sa_0.jpg", "../../../sa_0.jpg")
        tar.add(unpacked / "sa_0.json", "/etc/sa_0.json")
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            link = tarfile.TarInfo("sa_9.jpg")
            link.type, link.linkname = kind, "/etc/passwd"
            tar.addfile(link)
    source = opened(root, tmp_path / "index")
    assert [source.entry_id(k) for k in range(len(source))] == ["sa_000000.tar/sa_0"]
    assert source.load(0, np.random.default_rng(0)).image.shape == (*SIZE, 3)


class Images(torch.utils.data.Dataset):
    def __init__(self, source: Sa1b) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> int:
        return int(self.source.load(index, np.random.default_rng(0)).image.astype(np.int64).sum())


@pytest.mark.parametrize("is_compressed", [False, True])
def test_workers_open_their_own_files(unpacked, tmp_path, is_compressed):
    source = opened(archives(unpacked, tmp_path / "tars", is_compressed), tmp_path / "index")
    expected = [Images(source)[index] for index in range(len(source))]
    loader = torch.utils.data.DataLoader(Images(source), batch_size=None, num_workers=2)
    assert [int(value) for value in loader] == expected
    assert [Images(pickle.loads(pickle.dumps(source)))[index] for index in range(len(source))] == expected


def test_few_files_are_open_at_a_time(unpacked, tmp_path, monkeypatch):
    monkeypatch.setattr(tar, "MAX_OPEN", 2)
    for number in range(5):
        pack(unpacked, tmp_path / "tars" / f"sa_{number:06}.tar", range(number, number + 1))
    source = opened(tmp_path / "tars", tmp_path / "index")
    for index in range(5):
        source.load(index, np.random.default_rng(0))
        assert len(source._shelf._open) <= 2


def test_damaged_points_are_no_reason_to_stop(unpacked, tmp_path):
    root = archives(unpacked, tmp_path / "tars", True)
    expected = by_stem(opened(root, tmp_path / "index"))
    for path in (tmp_path / "index" / "gzip_points").iterdir():
        path.write_bytes(b"nothing")
    assert_same(by_stem(opened(root, tmp_path / "index")), expected)


def test_points_of_compressed_archives_take_little_memory(unpacked, tmp_path, monkeypatch):
    for number in range(4):
        archive = tmp_path / "tars" / f"sa_{number:06}.tar"
        pack(unpacked, archive, range(number, number + 1), is_compressed=True)
    source = opened(tmp_path / "tars", tmp_path / "index")
    sizes = [path.stat().st_size for path in (tmp_path / "index" / "gzip_points").iterdir()]
    monkeypatch.setattr(tar, "MAX_POINT_BYTES", 2 * max(sizes))
    expected = by_stem(opened(unpacked, tmp_path / "index"))
    for index in (0, 1, 2, 3, 0):
        sample = source.load(index, np.random.default_rng(7))
        assert np.array_equal(sample.image, expected[f"sa_{index}"][0])
        assert len(source._shelf._open) <= 2
    assert list(source._shelf._open) == [3, 0]
    monkeypatch.setattr(tar, "MAX_POINT_BYTES", 0)
    source.load(1, np.random.default_rng(0))
    assert list(source._shelf._open) == [1]


def test_large_compressed_archives_have_no_more_points_than_small_ones():
    assert tar.point_spacing(1) == tar.point_spacing(10**9) == 2**20
    for num_bytes in (3 * 10**9, 11 * 10**9, 10**12):
        spacing = tar.point_spacing(num_bytes)
        assert spacing % 2**20 == 0
        assert 0.4 * 2500 < num_bytes / spacing <= 2500
