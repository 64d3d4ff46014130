"""RefCOCO: layouts, splits, sentences, polygons and crowd codes, images by id, and pickles that must not run."""

from __future__ import annotations

import copy
import io
import json
import os
import pickle
import struct
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dual_loop.data.masks import encode_rle
from dual_loop.data.refcoco import RefCoco, load_refs
from dual_loop.errors import ConfigError, SampleError

REAL = Path(__file__).resolve().parents[3] / "shared/data/real_samples/ref_seg"
HEIGHT, WIDTH = 30, 40
SPLITS = ("train", "train", "val", "testA")


def square(x: int, y: int, side: int = 8) -> list[int]:
    return [x, y, x + side, y, x + side, y + side, x, y + side]


def crowd_mask() -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[3:7, 20:35] = True
    return mask


def make_instances() -> dict[str, Any]:
    flat = crowd_mask().T.flatten().astype(int)
    edges = np.flatnonzero(np.diff(np.concatenate(([0], flat))))
    counts = np.diff(np.concatenate(([0], edges, [flat.size]))).tolist()
    images, annotations = [], []
    for image_id in range(1, 5):
        name = f"COCO_train2014_{image_id:012d}.jpg"
        images.append({"id": image_id, "file_name": name, "height": HEIGHT, "width": WIDTH})
        shapes = ([square(2, 2), square(6, 6)], {"size": [HEIGHT, WIDTH], "counts": counts}, encode_rle(crowd_mask()))
        for k, shape in enumerate(shapes):
            annotations.append({"id": image_id * 10 + k, "image_id": image_id, "segmentation": shape, "iscrowd": k > 0})
    return {"images": images, "annotations": annotations}


def make_refs() -> list[dict[str, Any]]:
    refs = []
    for image_id, split in enumerate(SPLITS, start=1):
        for k in range(3):
            ref_id = image_id * 100 + k
            sentences = [
                {"sent": f"thing {ref_id} {n}", "raw": "RAW", "sent_id": n, "tokens": []} for n in range(k + 1)
            ]
            refs.append(
                {
                    "ref_id": ref_id,
                    "ann_id": image_id * 10 + k,
                    "image_id": image_id,
                    "category_id": 1,
                    "file_name": f"COCO_train2014_{image_id:012d}_{k}.jpg",
                    "split": split,
                    "sent_ids": list(range(k + 1)),
                    "sentences": sentences,
                }
            )
    return refs[::-1]


def write_dataset(folder: Path, refs: Any = None, instances: Any = None, split_by: str = "unc") -> None:
    images = folder / "coco2014/train2014"
    images.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    for image_id in range(1, 5):
        Image.fromarray(pixels).save(images / f"COCO_train2014_{image_id:012d}.jpg")
    (folder / "instances.json").write_text(json.dumps(make_instances() if instances is None else instances))
    (folder / f"refs({split_by}).p").write_bytes(pickle.dumps(make_refs() if refs is None else refs, protocol=2))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_dataset(tmp_path / "data/refcoco")
    return tmp_path / "data"


def source_of(root: Path, datasets: tuple[str, ...] = ("refcoco",), **options: Any) -> RefCoco:
    return RefCoco(root, datasets, index_dir=root.parent / "cache", **options)


def reason_of(source: RefCoco, index: int = 0) -> str:
    with pytest.raises(SampleError) as caught:
        source.load(index, np.random.default_rng(0))
    return caught.value.reason


def test_an_entry_is_an_image_with_its_references(root: Path) -> None:
    source = source_of(root)
    assert [source.entry_id(i) for i in range(len(source))] == ["refcoco/1", "refcoco/2"]
    sample = source.load_all(1)
    assert sample.region_ids == ("ref200", "ref201", "ref202")
    assert sample.captions[0] == ("thing 200 0",)
    assert sample.captions[2] == ("thing 202 0", "thing 202 1", "thing 202 2")
    assert (sample.source, sample.sample_id, sample.target_image) == ("refcoco", "refcoco/2", None)
    united = np.zeros((HEIGHT, WIDTH), bool)
    united[2:10, 2:10] = united[6:14, 6:14] = True
    assert np.array_equal(sample.masks[0], united), "polygons that overlap are one object"
    assert np.array_equal(sample.masks[1], crowd_mask())
    assert np.array_equal(sample.masks[2], crowd_mask())


def test_the_draw_depends_on_the_generator_alone(root: Path) -> None:
    source = source_of(root, regions_per_image=2)
    draws = [source.load(0, np.random.default_rng(seed)) for seed in range(80)]
    assert len({sample.region_ids for sample in draws}) == 6
    again = pickle.loads(pickle.dumps(source))
    assert all(again.load(0, np.random.default_rng(s)).region_ids == d.region_ids for s, d in enumerate(draws))
    for sample in draws:
        for region, captions in zip(sample.region_ids, sample.captions, strict=True):
            assert captions[0] == f"thing {region[3:]} 0"
    assert source_of(root).load(0, np.random.default_rng(0)).num_regions == 1


def test_data_sets_are_entries_of_their_own(root: Path) -> None:
    write_dataset(root / "refcoco+")
    write_dataset(root / "refcocog", split_by="umd")
    source = RefCoco(root, index_dir=root.parent / "cache")
    assert source.datasets == ("refcoco", "refcoco+", "refcocog")
    assert [source.entry_id(i) for i in range(6)] == [f"{d}/{i}" for d in source.datasets for i in (1, 2)]
    assert source.load_all(5).sample_id == "refcocog/2"
    write_dataset(root / "refcocog", refs=make_refs()[-3:], split_by="google")
    google = source_of(root, ("refcocog:google", "refcocog", "refcocog:umd"))
    assert google.datasets == ("refcocog:google", "refcocog")
    assert [google.entry_id(i) for i in range(3)] == ["refcocog:google/1", "refcocog/1", "refcocog/2"]


def test_raw_stands_in_for_sent_and_blank_sentences_go(root: Path) -> None:
    refs = make_refs()[-1:]
    refs[0]["sentences"] = [{"raw": "The Man"}, {"sent": "  "}, {"sent": " left man "}]
    write_dataset(root / "refcoco", refs)
    assert source_of(root).load_all(0).captions == (("The Man", "left man"),)


def test_splits(root: Path) -> None:
    assert source_of(root, split="val").entry_id(0) == "refcoco/3"
    with pytest.raises(ConfigError, match="refcoco: testA, train, val") as caught:
        source_of(root, split="tset")
    assert "tset" in str(caught.value)
    write_dataset(root / "refcoco+", refs=make_refs()[-3:])
    assert len(source_of(root, ("refcoco", "refcoco+"), split="testA")) == 1


def test_absent_data_sets_are_left_out_aloud(root: Path) -> None:
    with pytest.warns(UserWarning, match=r"no folder for refcoco\+, refcocog"):
        source = RefCoco(root, index_dir=root.parent / "cache")
    assert source.datasets == ("refcoco",)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        source_of(root)


def test_bad_roots_and_parts_are_explained(root: Path) -> None:
    with pytest.raises(ConfigError, match=r"none of refcocog/"):
        source_of(root, ("refcocog",))
    with pytest.raises(ConfigError, match="unknown RefCOCO data set"):
        source_of(root, ("refcoko",))
    with pytest.raises(ConfigError, match="empty list"):
        source_of(root, ())
    with pytest.raises(ConfigError, match="does not exist"):
        source_of(root / "absent")
    with pytest.raises(ConfigError, match=r"refs\(google\)\.p"):
        source_of(root, ("refcoco:google",))
    (root / "refcoco/instances.json").rename(root / "instances.json")
    with pytest.raises(ConfigError, match=r"instances\.json"):
        source_of(root)


def test_a_reduced_image_keeps_regions_masks_and_captions(root: Path) -> None:
    source = source_of(root, regions_per_image=2)
    full = source.load(0, np.random.default_rng(3))
    reduced = source.load_reduced(0, np.random.default_rng(3), lambda height, width: (8, 8))
    assert reduced.image_reduction > 1
    assert reduced.image.shape[:2] == tuple(-(-side // reduced.image_reduction) for side in (HEIGHT, WIDTH))
    assert np.array_equal(reduced.masks, full.masks)
    assert (reduced.region_ids, reduced.captions) == (full.region_ids, full.captions)


def test_images_elsewhere_and_bare_names(root: Path, tmp_path: Path) -> None:
    folder = root / "refcoco/coco2014/train2014"
    folder.rename(tmp_path / "photos")
    with pytest.raises(ConfigError, match="refcoco_images"):
        source_of(root)
    source = source_of(root, images=tmp_path / "photos")
    plain = source.load_all(0).image
    (tmp_path / "photos/COCO_train2014_000000000001.jpg").rename(tmp_path / "photos/000000000001.jpg")
    assert np.array_equal(source.load_all(0).image, plain)
    (root / "coco2014").mkdir()
    (tmp_path / "photos").rename(root / "coco2014/train2014")
    shared = source_of(root)
    assert np.array_equal(shared.load_all(0).image, plain)
    (root / "coco2014/train2014/000000000001.jpg").unlink()
    assert reason_of(shared) == "missing_file"


def test_images_are_found_where_instances_uses_bare_names(root: Path) -> None:
    instances = make_instances()
    for image in instances["images"]:
        image["file_name"] = f"{image['id']:012d}.jpg"
    write_dataset(root / "refcoco", instances=instances)
    assert source_of(root).load_all(0).num_regions == 3


def test_exif_is_never_applied(root: Path) -> None:
    path = root / "refcoco/coco2014/train2014/COCO_train2014_000000000001.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(path).copy().save(path, exif=exif)
    assert source_of(root).load_all(0).image.shape == (HEIGHT, WIDTH, 3)


def test_image_names_cannot_leave_the_folder(root: Path) -> None:
    instances = make_instances()
    instances["images"][0]["file_name"] = "../../../refcoco/coco2014/train2014/COCO_train2014_000000000002.jpg"
    write_dataset(root / "refcoco", instances=instances)
    assert reason_of(source_of(root)) == "unsafe_path"


@pytest.mark.parametrize(
    ("segmentation", "reason"),
    [
        ([[1, 1, 5, 5]], "bad_polygon"),
        ({"size": [HEIGHT, WIDTH], "counts": "zzz"}, "broken_rle"),
        ({"size": [WIDTH, HEIGHT], "counts": [0, HEIGHT * WIDTH]}, "size_mismatch"),
        ({"size": [HEIGHT, WIDTH], "counts": [HEIGHT * WIDTH]}, "no_region_left"),
    ],
)
def test_bad_masks_name_their_reason(root: Path, segmentation: Any, reason: str) -> None:
    instances = make_instances()
    instances["annotations"][0]["segmentation"] = segmentation
    write_dataset(root / "refcoco", refs=make_refs()[-1:], instances=instances)
    source = source_of(root)
    assert reason_of(source) == reason
    with pytest.raises(SampleError) as caught:
        source.load_all(0)
    assert caught.value.reason == ("empty_mask" if reason == "no_region_left" else reason)


def test_an_empty_mask_is_passed_over(root: Path) -> None:
    instances = make_instances()
    instances["annotations"][0]["segmentation"] = {"size": [HEIGHT, WIDTH], "counts": [HEIGHT * WIDTH]}
    write_dataset(root / "refcoco", instances=instances)
    source = source_of(root, regions_per_image=3)
    for seed in range(5):
        assert sorted(source.load(0, np.random.default_rng(seed)).region_ids) == ["ref101", "ref102"]


def test_an_image_of_another_size_is_a_mismatch(root: Path) -> None:
    path = root / "refcoco/coco2014/train2014/COCO_train2014_000000000001.jpg"
    Image.new("L", (WIDTH * 2, HEIGHT * 2)).save(path)
    assert reason_of(source_of(root)) == "size_mismatch"
    Image.new("L", (WIDTH + 2, HEIGHT)).save(path)
    sample = source_of(root).load_all(0)
    assert sample.image.shape == (HEIGHT, WIDTH + 2, 3)
    assert sample.masks.shape[1:] == (HEIGHT, WIDTH + 2)


def test_cap_keeps_entries(root: Path) -> None:
    assert len(source_of(root, max_samples=1)) == 1
    assert len(source_of(root, max_samples=9)) == 2
    with pytest.raises(ConfigError, match="refcoco_max_samples"):
        source_of(root, max_samples=0)


def test_the_second_start_does_not_parse_again(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = source_of(root)
    monkeypatch.setattr("dual_loop.data.refcoco.load_refs", lambda path: pytest.fail("parsed again"))
    assert source_of(root, split="val").entry_id(0) == "refcoco/3"
    assert len(source_of(root)) == len(first)


# --- pickles ---------------------------------------------------------------------------------------------------------


class Runs:
    """Pickles to a call of ``function``."""

    def __init__(self, function: Any, argument: str) -> None:
        self.call = function, (argument,)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_that_asks_for_code_is_refused(root: Path, tmp_path: Path, protocol: int) -> None:
    proof = tmp_path / "proof"
    refs = make_refs()
    refs[5]["sentences"].append(Runs(os.mkdir, str(proof)))
    (root / "refcoco/refs(unc).p").write_bytes(pickle.dumps(refs, protocol=protocol))
    with pytest.raises(ConfigError, match=rf"asks for the global {os.mkdir.__module__}\.mkdir"):
        source_of(root)
    assert not proof.exists()


@pytest.mark.parametrize(
    "harmless",
    [np.float64(1.0), np.array([1]), {1, 2}.__class__, Path("x"), complex(1, 2), bytearray(b"x")],
    ids=lambda value: type(value).__name__,
)
def test_even_harmless_globals_are_refused(tmp_path: Path, harmless: Any) -> None:
    path = tmp_path / "refs(unc).p"
    path.write_bytes(pickle.dumps([harmless], protocol=2))
    with pytest.raises(ConfigError, match="asks for the global"):
        load_refs(path)


def test_extension_codes_and_persistent_ids_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "refs(unc).p"
    for code in (b"\x80\x02\x82\x01.", b"Pid\n."):
        path.write_bytes(code)
        with pytest.raises(ConfigError, match="refs file"):
            load_refs(path)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_every_protocol_is_read(tmp_path: Path, protocol: int) -> None:
    path = tmp_path / "refs(unc).p"
    path.write_bytes(pickle.dumps(make_refs(), protocol=protocol))
    assert load_refs(path) == make_refs()


def test_python2_byte_strings_become_text(tmp_path: Path) -> None:
    def text(value: str) -> bytes:  # BINSTRING, what Python 2's cPickle wrote for str
        return b"T" + struct.pack("<i", len(value)) + value.encode("latin1")

    def number(value: int) -> bytes:
        return b"J" + struct.pack("<i", value)

    long_number = b"\x8a\x05" + (2**33).to_bytes(5, "little")  # LONG1, Python 2's long
    sentence = b"}(" + text("sent") + text("caf\xe9 man") + b"u"
    pairs = [
        *((text("ref_id"), number(7)), (text("ann_id"), long_number), (text("image_id"), number(1))),
        *((text("split"), text("train")), (text("sentences"), b"](" + sentence + b"e")),
    ]
    record = b"}(" + b"".join(key + value for key, value in pairs) + b"u"
    path = tmp_path / "refs(unc).p"
    path.write_bytes(b"\x80\x02](" + record + b"e.")
    (ref,) = load_refs(path)
    assert ref["ann_id"] == 2**33
    assert ref["sentences"] == [{"sent": "café man"}]


def test_damaged_pickles_are_refused_without_a_crash(tmp_path: Path) -> None:
    path = tmp_path / "refs(unc).p"
    whole = pickle.dumps(make_refs(), protocol=2)
    for length in range(0, len(whole) - 1, 41):
        path.write_bytes(whole[:length])
        with pytest.raises(ConfigError, match="refs"):
            load_refs(path)
    path.write_bytes(b"(" * 200_000)
    with pytest.raises(ConfigError, match="refs"):
        load_refs(path)


@pytest.mark.parametrize(
    "change",
    [{"ref_id": "7"}, {"image_id": True}, {"ann_id": [1]}, {"split": None}, {"sentences": {}}, {"sentences": [{}]}],
)
def test_other_structures_are_refused(root: Path, change: dict[str, Any]) -> None:
    refs = copy.deepcopy(make_refs())
    refs[4].update(change)
    write_dataset(root / "refcoco", refs)
    with pytest.raises(ConfigError, match="reference 4"):
        source_of(root)


@pytest.mark.parametrize("refs", [[], {}, "abc", 5, [5]])
def test_other_top_levels_are_refused(root: Path, refs: Any) -> None:
    write_dataset(root / "refcoco", refs if refs != [] else None)
    (root / "refcoco/refs(unc).p").write_bytes(pickle.dumps(refs))
    with pytest.raises(ConfigError, match="structure"):
        source_of(root)


@pytest.mark.parametrize("key", ["image_id", "ann_id"])
def test_references_to_nowhere_are_refused(root: Path, key: str) -> None:
    refs = make_refs()
    refs[0][key] = 999
    write_dataset(root / "refcoco", refs)
    with pytest.raises(ConfigError, match=f"unknown {key}"):
        source_of(root)


@pytest.mark.parametrize("text", ["", "[]", '{"images": []}', '{"images": [{}], "annotations": []}', "[" * 100_000])
def test_broken_instances_are_refused(root: Path, text: str) -> None:
    (root / "refcoco/instances.json").write_text(text)
    with pytest.raises(ConfigError, match=r"instances\.json"):
        source_of(root)


def test_the_attack_of_the_tests_is_real(tmp_path: Path) -> None:
    """Without the guard the pickle of the tests does run: so the refusals above prove something."""
    proof = tmp_path / "proof"
    pickle.load(io.BytesIO(pickle.dumps(Runs(os.mkdir, str(proof)))))
    assert proof.is_dir()


@pytest.mark.skipif(not REAL.is_dir(), reason="the real samples are not beside the repository")
@pytest.mark.parametrize("split", ["train", "val", "testA"])
def test_real_samples_load(tmp_path: Path, split: str) -> None:
    source = RefCoco(REAL, split=split, index_dir=tmp_path)
    num_regions = 0
    for index in range(len(source)):
        sample = source.load_all(index)
        num_regions += sample.num_regions
        assert sample.masks.any((1, 2)).all()
        assert all(sample.captions)
    assert num_regions > 0
