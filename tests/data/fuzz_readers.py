"""Readers on damaged and made-up files: ``python fuzz_readers.py FOLDER [SECONDS] [SEED]``.

Whatever a file holds, reading it gives samples, or one of the package's errors with the place in its message: no other
exception, no signal, at most 1.5 GiB of memory. ``test_fuzz.py`` runs it in a process of its own. Without a seed
hypothesis draws the same files every time; the seconds are shared by the targets, and one that is out of time passes.
"""

from __future__ import annotations

import copy
import io
import json
import math
import pickle
import resource
import shutil
import struct
import sys
import tarfile
import time
import traceback
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from PIL import Image, features
from refcoco_files import make_instances, make_refs, write_dataset
from video_maker import write_masklets, write_video

from dual_loop.data import sav_video
from dual_loop.data.coco_masks import encode_rle
from dual_loop.data.eval_sets import EvalSetReader
from dual_loop.data.images import open_image_file, read_picture
from dual_loop.data.masks import decode_rle, decode_segmentation
from dual_loop.data.masks_dir import MasksDir, read_mask_file
from dual_loop.data.open_images import OpenImages
from dual_loop.data.ref_parquet import RefParquet
from dual_loop.data.refcoco import RefCoco
from dual_loop.data.sa1b import Sa1b
from dual_loop.data.sav import SavPairs
from dual_loop.data.sav_video import SavVideos
from dual_loop.errors import ConfigError, SampleError
from dual_loop.evaluation.runner import read_predictions

MOST_MEMORY = 1.5 * 2**30
MOST_ADDRESSES = 16 * 2**30  # what runs away ends here; libraries reserve more than they use
EXAMPLES = 2000
H, W = 20, 30
DEEP = {"@400": "[" * 400 + "]" * 400, "@990": "[" * 990 + "]" * 990, "@9999": "[" * 9999}
ODD: list[Any] = [
    *(None, True, False, 0, 1, -1, 2**31, 2**63, 2**70, -(2**70), 10**400, 1.5, 480.0, 1e308),
    *(math.inf, -math.inf, math.nan, "", "x", "1", "\ud800", "\0", "../../x", "/dev/zero", "a" * 300, "é", ".", "a/b"),
    *([], {}, [[]], [None], {"a": 1}, [1, 2, 3, 4], [[0, 0, 1e9, 0, 0, 1e9]], "[]", 100_000, *DEEP),
    *({"size": [100_000, 100_000], "counts": [10**10]}, {"size": [H, W], "counts": "0" * 99}, {"size": None}),
]
MASK = np.zeros((H, W), bool)
MASK[4:12, 5:15] = True
POLYGON = [5.0, 4.0, 15.0, 4.0, 15.0, 12.0, 5.0, 12.0]


# --- how files are damaged -------------------------------------------------------------------------------------------


def places_of(tree: Any) -> Iterator[tuple[Any, Any]]:
    for key in list(tree) if isinstance(tree, dict) else range(len(tree)):
        yield tree, key
        if isinstance(tree[key], (dict, list)):
            yield from places_of(tree[key])


@st.composite
def trees(draw: st.DrawFn, tree: Any, odd: list[Any] = ODD) -> Any:
    """Draw ``tree`` with one to four values replaced, removed or doubled."""
    root = [copy.deepcopy(tree)]
    for _ in range(draw(st.integers(1, 4))):
        places = list(places_of(root))
        container, key = places[draw(st.integers(0, len(places) - 1))]
        if draw(st.integers(0, 5)) or container is root:
            container[key] = copy.deepcopy(draw(st.sampled_from(odd)))
        elif isinstance(container, list) and draw(st.booleans()):
            container.append(copy.deepcopy(container[key]))
        else:
            del container[key]
    return root[0]


def dumped(tree: Any) -> bytes:
    text = json.dumps(tree)
    for name, deep in DEEP.items():
        text = text.replace(f'"{name}"', deep)
    return text.encode()


@st.composite
def damaged(draw: st.DrawFn, data: bytes) -> bytes:
    """Draw ``data`` with one to five places overwritten, cut out, doubled, or the end cut off."""
    found = bytearray(data)
    for _ in range(draw(st.integers(1, 5))):
        place, kind = draw(st.integers(0, len(found))), draw(st.integers(0, 5))
        if kind <= 2:
            number = draw(st.sampled_from([0, 1, 0x7F, 0xFF, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1]))
            width = draw(st.sampled_from([1, 2, 4]))
            found[place : place + width] = number.to_bytes(8, draw(st.sampled_from(["little", "big"])))[:width]
        elif kind == 3:
            found[place : place + draw(st.integers(1, 64))] = draw(st.binary(max_size=16))
        elif kind == 4:
            found[place:place] = found[place : place + draw(st.integers(1, 64))]
        else:
            del found[place:]
    return bytes(found)


def json_files(tree: Any) -> st.SearchStrategy[bytes]:
    return trees(tree).map(dumped) | damaged(dumped(tree))


@st.composite
def png_files(draw: st.DrawFn) -> bytes:
    """Draw PNG files whose checksums are right, with any header."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    side = st.integers(0, 40) | st.sampled_from([0, 1, 300, 65_535, 65_536, 100_000, 2**31 - 1, 2**32 - 1])
    depth, colour = draw(st.sampled_from([1, 2, 4, 8, 16, 3])), draw(st.sampled_from([0, 2, 3, 4, 6, 1]))
    rest = (depth, colour, 0, 0, draw(st.integers(0, 1)))
    chunks = [chunk(b"IHDR", struct.pack(">IIBBBBB", draw(side), draw(side), *rest))]
    for _ in range(draw(st.integers(0, 3))):
        kind = draw(st.sampled_from([b"PLTE", b"tRNS", b"gAMA", b"iCCP", b"zTXt", b"iTXt", b"eXIf", b"acTL", b"fcTL"]))
        chunks.append(chunk(kind, draw(st.binary(max_size=40))))
    pixels = draw(st.sampled_from([b"", b"\0" * 3000, b"\0\1\2\3" * 800, b"\0" * 2**20]) | st.binary(max_size=100))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks) + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")


def picture(format: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (H, W, 3), dtype=np.uint8)
    Image.fromarray(noise).save(stream, format, **options)
    return stream.getvalue()


def png(values: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(values).save(stream, "PNG")
    return stream.getvalue()


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=True)
    return stream.getvalue()


PAIR = {
    "frame1": npy(np.zeros((H, W, 3), np.uint8)),
    "mask1": npy(MASK),
    "frame2": npy(np.ones((H, W, 3), np.float32)),
    "mask2": npy(MASK.astype(np.uint8) * 255),
}


@st.composite
def npy_files(draw: st.DrawFn) -> bytes:
    """Draw arrays of any shape and dtype, damaged headers among them."""
    side = st.integers(0, 3) | st.sampled_from([H, W, -1, 10**5, 2**31, 2**63, 2**70])
    shape = draw(st.lists(side, max_size=4).map(tuple))
    dtype = draw(st.sampled_from(["|u1", "<f8", "|O", "<c16", "|S9999999", "<M8[s]", ">i8", "|V4", "<f2", "|b1"]))
    text = f"{{'descr': '{dtype}', 'fortran_order': {draw(st.booleans())}, 'shape': {shape}}}".encode()
    text = draw(st.just(text) | damaged(text))
    version = draw(st.sampled_from([b"\1\0", b"\2\0", b"\3\0"]))
    size = struct.pack("<H" if version == b"\1\0" else "<I", len(text))
    return b"\x93NUMPY" + version + size + text + b"\0" * draw(st.sampled_from([0, 600, 2**16]))


@st.composite
def npz_files(draw: st.DrawFn) -> bytes:
    """Draw npz archives whose checksums are right, with arrays of any shape and dtype, damaged headers among them."""
    stream = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(stream, "w", draw(st.sampled_from([0, 8, 12, 14]))) as archive:
        warnings.simplefilter("ignore")  # of a name that is there twice
        for name in draw(st.permutations([*PAIR, "frame3", "mask3", draw(st.sampled_from([*PAIR]))])):
            data = PAIR.get(name, PAIR["mask1"])
            if not draw(st.integers(0, 3)):
                data = draw(npy_files())
            archive.writestr(f"{name}.npy", data)
    return draw(st.just(stream.getvalue()) | damaged(stream.getvalue()))


@st.composite
def tar_files(draw: st.DrawFn, members: dict[str, bytes]) -> bytes:
    """Draw archives whose checksums are right, with any size, kind and name in the headers."""
    data = b""
    for name, content in members.items():
        member = tarfile.TarInfo(name)
        member.size = len(content)
        header = bytearray(member.tobuf(tarfile.GNU_FORMAT))
        if not draw(st.integers(0, 2)):
            number = draw(st.sampled_from([0, 1, 511, 10**6, 2**33, 2**62, 2**80, -1, -512, -(2**40)]))
            header[124:136] = b"\xff" + (number % 2**88).to_bytes(11, "big")
            header[124] = 0x80 if number >= 0 else 0xFF
        if not draw(st.integers(0, 2)):
            header[156:157] = draw(st.sampled_from([b"x", b"g", b"L", b"K", b"S", b"1", b"2", b"5", b"X", b"\0", b"V"]))
        if not draw(st.integers(0, 3)):
            start = draw(st.integers(0, 499))
            header[start : start + 12] = draw(st.binary(min_size=12, max_size=12))
        header[148:156] = b"%06o\0 " % (sum(header[:148]) + 8 * 32 + sum(header[156:]))
        content = draw(st.just(content) | st.just(b"30 size=99999999999999\n22 GNU.sparse.major=1\n" + content))
        data += bytes(header) + content + b"\0" * (-len(content) % 512)
    data += b"\0" * draw(st.sampled_from([1024, 0, 10_240]))
    return draw(st.just(data) | damaged(data) | st.just(_gzipped(data)))


def _gzipped(data: bytes) -> bytes:
    stream = zlib.compressobj(wbits=31)
    return stream.compress(data) + stream.flush()


@st.composite
def pickles(draw: st.DrawFn) -> bytes:
    odd = [value for value in ODD if not isinstance(value, str) or value not in DEEP] + [
        b"x",
        (1,),
        {1},
        np.int64(3),
        1j,
        bytearray(9),
    ]
    refs = draw(trees(make_refs()[:4], odd))
    data = pickle.dumps(refs, draw(st.integers(0, 5)))
    bombs = [b"]r\xff\xff\xff\x0f.", b"\x96" + (2**34).to_bytes(8, "little") + b".", b"]p268435455\n.", b"(" * 9999]
    return draw(st.just(data) | damaged(data) | st.sampled_from([b"\x80\2" + bomb for bomb in bombs]))


# --- what is read ----------------------------------------------------------------------------------------------------


class Room:
    """A folder that is made anew for every file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def fresh(self, **files: bytes) -> Path:
        shutil.rmtree(self.folder, ignore_errors=True)
        for function in (sav_video.video_times, sav_video._kept_record):
            function.cache_clear()  # both go by the path
        for name, data in files.items():
            self.write(name, data)
        return self.folder

    def write(self, name: str, data: bytes) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def attempt(call: Callable[[], Any], place: str = "") -> Any:
    """Call; an error of the package is fine where its message can be printed and names the file."""
    try:
        return call()
    except (SampleError, ConfigError) as error:
        str(error).encode()
        if place not in str(error):
            raise LookupError(f"{place} is not named: {error}") from error
        return None
    finally:
        assert peak() < MOST_MEMORY, f"{peak() / 2**30:.2f} GiB"


def peak() -> int:
    """Return the most memory of this program in bytes; ``ru_maxrss`` would count that of the one that started it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


def read_all(open_reader: Callable[[], Any], place: str) -> None:
    """Open a reader, and read up to four entries in every way that it has."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reader = attempt(open_reader, place)
        for index in range(min(4, len(reader) if reader is not None else 0)):
            reader.entry_id(index)
            attempt(lambda index=index: reader.image_path(index), place)
            calls = [lambda index=index: reader.load(index, np.random.default_rng(0))]
            if hasattr(reader, "load_all"):
                calls.append(lambda index=index: reader.load_all(index))
            for call in calls:
                sample = attempt(call, place)
                if sample is not None:
                    json.dumps([sample.sample_id, sample.region_ids, sample.captions], ensure_ascii=False).encode()


JPEG = picture("JPEG")
COCO = {
    "images": [{"id": k, "file_name": f"{k}.jpg", "height": H, "width": W} for k in (1, 2)],
    "annotations": [
        {"id": 1, "image_id": 1, "category_id": 1, "segmentation": [POLYGON], "caption": "a box", "iscrowd": 0},
        {"id": 2, "image_id": 1, "category_id": 2, "segmentation": encode_rle(MASK), "captions": ["a", "b"]},
        {"id": 3, "image_id": 2, "category_id": 1, "segmentation": {"size": [H, W], "counts": [100, 200, 300]}},
    ],
    "categories": [{"id": 1, "name": "box"}, {"id": 2, "name": "bag"}],
}
SA1B = {
    "image": {"image_id": 1, "file_name": "sa_1.jpg", "height": H, "width": W},
    "annotations": [
        {"id": k, "segmentation": encode_rle(MASK), "predicted_iou": 0.9, "stability_score": 0.9} for k in range(2)
    ],
}
LABELME = {
    **{"version": "5.0", "imagePath": "1.jpg", "imageHeight": H, "imageWidth": W},
    "shapes": [{"label": "box", "points": [[5, 4], [15, 4], [15, 12]], "shape_type": "polygon"}],
}
LINE = {"image": "images/a.jpg", "segmentation": [POLYGON], "caption": "a box", "id": "1"}
RECORD = {
    "name": "refcoco/1#ref1",
    "sentences": [{"text": "a box", "mask": encode_rle(MASK)}],
    "target": encode_rle(MASK),
}
CSV = b"MaskPath,ImageID,LabelName,BoxID\na_m01_b0.png,a,/m/01,b0\na_m02_b1.png,a,/m/02,b1\nb_m01_b0.png,b,/m/01,b0\n"


def make_targets(folder: Path) -> dict[str, tuple[st.SearchStrategy[Any], Callable[[Any], None]]]:
    room, index = Room(folder / "data"), folder / "index"
    video = folder / "video.mp4"
    folder.mkdir(parents=True, exist_ok=True)
    write_video(video, 13)
    write_masklets(folder / "masklets.json", 4)
    masklets = json.loads((folder / "masklets.json").read_text())

    def masks(name: str) -> Callable[[bytes], None]:
        def read(data: bytes) -> None:
            root = room.fresh(**{name: data, "images/1.jpg": JPEG, "images/2.jpg": JPEG, "images/a.jpg": JPEG})
            if name == "captions.json" or name.startswith("masks/"):
                room.write("masks/1.png", png(MASK.astype(np.uint8)))
                room.write("masks/2.png", png(MASK.astype(np.uint8) + 1))
            read_all(lambda: MasksDir(root, None, 4, index_dir=index), str(root))

        return read

    def mask_file(data: bytes) -> None:
        masks("masks/a.png")(data)
        attempt(lambda: read_mask_file(room.folder / "masks/a.png"), "a.png")

    def image(data: bytes) -> None:
        path = room.fresh(**{"a.png": data}) / "a.png"
        for exif in (False, True):
            attempt(lambda exif=exif: read_picture(path, exif), "a.png")
        attempt(lambda: read_picture(path, False, needed=lambda height, width: (5, 5)), "a.png")
        attempt(lambda: read_picture(io.BytesIO(data), False, "a.png"), "a.png")
        attempt(lambda: open_image_file(path), "a.png")

    def sa1b(data: bytes) -> None:
        root = room.fresh(**{"sa_1.json": data, "sa_1.jpg": JPEG})
        read_all(lambda: Sa1b(root, None, 4, 0.0, 1.0, 0.5, 0.5, index_dir=index), str(root))

    def tar(data: bytes) -> None:
        root = room.fresh(**{"sa_000001.tar": data, "sa_9.jpg": JPEG})
        read_all(lambda: Sa1b(root, None, 4, 0.0, 1.0, index_dir=index), str(root))

    def instances(data: bytes) -> None:
        refcoco(data, pickle.dumps(make_refs(), 2))

    def grefcoco(data: bytes) -> None:
        root = room.fresh()
        write_dataset(root / "grefcoco", [])
        room.write("grefcoco/grefs(unc).json", data)
        read_all(lambda: RefCoco(root, ("grefcoco",), regions_per_image=4, index_dir=index), str(root))

    def references(data: bytes) -> None:
        refcoco(json.dumps(make_instances()).encode(), data)

    def refcoco(annotations: bytes, refs: bytes) -> None:
        root = room.fresh()
        write_dataset(root / "refcoco", [], {})
        room.write("refcoco/instances.json", annotations)
        room.write("refcoco/refs(unc).p", refs)
        read_all(lambda: RefCoco(root, ("refcoco",), regions_per_image=4, index_dir=index), str(root))

    def eval_set(name: str, file: str, picture: str) -> Callable[[bytes], None]:
        def target(data: bytes) -> None:
            root = room.fresh(**{file: data, picture: JPEG})
            read_all(lambda: EvalSetReader(name, root), str(root))

        return target

    def parquet_rows(row: Any) -> None:
        import pyarrow
        from pyarrow import parquet

        row = row if isinstance(row, dict) else {}
        row |= {key: dumped(row[key]).decode() for key in ("raw_anns", "raw_image_info") if key in row}
        root = room.fresh(**{"COCO_train2014_000000000001.jpg": JPEG})
        try:
            parquet.write_table(pyarrow.Table.from_pylist([row]), root / "a.parquet")
        except Exception:  # pyarrow cannot write it
            return
        read_all(lambda: RefParquet(root / "a.parquet", root), str(root))

    def parquet_bytes(data: bytes) -> None:
        root = room.fresh(**{"a.parquet": data, "COCO_train2014_000000000001.jpg": JPEG})
        read_all(lambda: RefParquet(root / "a.parquet", root), str(root))

    def pair(data: bytes) -> None:
        root = room.fresh(**{"masklet_data_0.npz": data})
        read_all(lambda: SavPairs(root, None, index, 3), str(root))

    def sav_json(data: bytes) -> None:
        root = room.fresh(**{"sav_000001_manual.json": data})
        shutil.copy(video, root / "sav_000001.mp4")
        read_all(lambda: SavVideos(root, None, 2, min_seconds=0.1, index_dir=index), str(root))

    def sav_video_file(data: bytes) -> None:
        root = room.fresh(**{"sav_000001_manual.json": dumped(masklets), "sav_000001.mp4": data})
        read_all(lambda: SavVideos(root, None, 2, min_seconds=0.1, index_dir=index), str(root))

    def open_images(data: bytes) -> None:
        files = {"images/train/a.jpg": JPEG, "images/train/b.jpg": JPEG, "masks/train/a_m01_b0.png": mask}
        root = room.fresh(**{"train-annotations-object-segmentation.csv": data, **files})
        read_all(lambda: OpenImages(root, None, 4, index_dir=index), str(root))

    def predictions(data: bytes) -> None:
        root = room.fresh(**{"p.jsonl": data})
        found = attempt(lambda: read_predictions(root / "p.jsonl"), "p.jsonl") or {}
        for codes in found.values():
            for code in codes:
                attempt(lambda code=code: decode_rle(code, "p.jsonl"), "p.jsonl")

    def rle(code: Any) -> None:
        attempt(lambda: decode_rle(code, "here"), "here")
        attempt(lambda: decode_segmentation(code, H, W, "here"), "here")

    def polygons(case: tuple[Any, int, int]) -> None:
        for summed in (False, True):
            attempt(lambda summed=summed: decode_segmentation(*case, "here", summed), "here")

    mask = png(MASK.astype(np.uint8) * 255)
    labels = png((MASK * np.arange(W)).astype(np.uint8))
    formats = [
        name for name, has in (("WEBP", "webp"), ("JPEG2000", "jpg_2000"), ("AVIF", "avif")) if features.check(has)
    ]
    stored = [picture(name) for name in ("PNG", "JPEG", "TIFF", "BMP", "GIF", "PPM", "TGA", *formats)]
    stored += [
        picture("TIFF", compression="tiff_lzw"),
        picture("JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\1\0\x12\1\3\0\1\0\0\0\6\0\0\0"),
    ]
    side = st.integers(0, 40) | st.sampled_from([-1, 2**16, 100_000, 200_000, 2**31, 2**70])
    run = st.integers(0, 300) | st.sampled_from([-1, 2**28, 2**63, 2**70, 1.0, None, True])
    string = st.text(st.characters(min_codepoint=40, max_codepoint=120), max_size=40)
    counts = st.lists(run, max_size=8) | string | string.map(str.encode) | st.sampled_from(ODD)
    codes = st.fixed_dictionaries(
        {}, optional={"size": st.lists(side, max_size=3) | st.sampled_from(ODD), "counts": counts}
    )
    number = st.floats(-50, 50) | st.sampled_from([math.nan, math.inf, 1e9, -1e9, 1e300, None, "1", 2**70, True, [1]])
    polygon = st.lists(number, min_size=5, max_size=12) | st.sampled_from(
        [[*POLYGON], [0, 0, 1e4, 0, 0, 1e4] * 9999, *ODD]
    )
    row = {
        **{"image_id": 1, "ref_id": 1, "sentences": [{"sent": "a box", "raw": "A box"}]},
        **{"raw_anns": {"segmentation": [POLYGON]}, "raw_image_info": {"file_name": "a.jpg", "height": H, "width": W}},
    }
    pixels = {
        "question_id": "1",
        "image": {"bytes": JPEG, "path": "a.jpg"},
        "answer": ["a box"],
        "segmentation": POLYGON,
    }
    objects = {"image": pixels["image"], "samples": [{"sentences": ["a box"], "mask": encode_rle(MASK)}] * 2}
    shape = {"label": "ignore", "points": [[0, 0], [5, 0], [5, 5.5]]}
    reasoned = {"text": ["a box"], "is_sentence": True, "shapes": [shape, shape | {"label": "target"}]}
    grounded = {"idx": 1, "image_path": "1.jpg", "class_id": 2, "caption": "a box", "segmentation": encode_rle(MASK)}
    region = {"index": 1, "mask_rle": encode_rle(MASK)}
    captioned = [{"file_name": "1.jpg", "height": H, "width": W, "image_id": "1", "annotations": [region]}]
    members = {"./sa_1.jpg": JPEG, "./sa_1.json": dumped(SA1B), "./sa_2.jpg": JPEG, "./sa_2.json": dumped(SA1B)}
    parquet_file = folder / "whole.parquet"
    targets = {
        "masks.coco": (json_files(COCO), masks("a.json")),
        "masks.lines": (st.lists(json_files(LINE), max_size=3).map(b"\n".join), masks("a.jsonl")),
        "masks.captions": (json_files({"1": "a box", "2#1": ["a", "b"]}), masks("captions.json")),
        "masks.labelme": (json_files(LABELME), masks("images/1.json")),
        "masks.yolo": (damaged(b"0 0.1 0.1 0.5 0.1 0.5 0.5\n1 0.2 0.2 0.6 0.2 0.6 0.6\n"), masks("labels/1.txt")),
        "masks.npy": (npy_files() | damaged(npy(MASK)), masks("masks/a.npy")),
        "masks.png": (damaged(mask) | damaged(labels) | png_files(), mask_file),
        "images": (st.sampled_from(stored).flatmap(damaged) | png_files(), image),
        "rle": (codes | trees(encode_rle(MASK)), rle),
        "polygons": (st.tuples(st.lists(polygon, max_size=3) | st.sampled_from(ODD), side, side), polygons),
        "sa1b.json": (json_files(SA1B), sa1b),
        "sa1b.tar": (tar_files(members), tar),
        "openimages.csv": (damaged(CSV), open_images),
        "refcoco.instances": (json_files(make_instances()), instances),
        "grefcoco": (json_files([ref | {"ann_id": [ref["ann_id"]]} for ref in make_refs()[:4]]), grefcoco),
        "refcoco.pickle": (pickles(), references),
        "reasonseg": (json_files(reasoned), eval_set("reasonseg", "val/1.json", "val/1.jpg")),
        "gseval": (
            st.lists(json_files(grounded), max_size=3).map(b"\n".join),
            eval_set("gseval", "GroundingSuite-Eval.jsonl", "1.jpg"),
        ),
        "dlc": (json_files(COCO), eval_set("dlc-bench", "annotations.json", "images/1.jpg")),
        "paradlc": (json_files(captioned), eval_set("paradlc-bench", "annotations.json", "images/1.jpg")),
        "parquet.rows": (trees(row) | trees(pixels) | trees(objects), parquet_rows),
        "sav.npz": (npz_files() | damaged(_pair()), pair),
        "sav.json": (json_files(masklets), sav_json),
        "sav.video": (damaged(video.read_bytes()), sav_video_file),
        "predictions": (st.lists(json_files(RECORD), max_size=3).map(b"\n".join), predictions),
    }
    try:
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist([pixels] * 3), parquet_file)
        targets["parquet.bytes"] = (damaged(parquet_file.read_bytes()), parquet_bytes)
    except ImportError:
        del targets["parquet.rows"]
    return targets


def _pair() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, data in PAIR.items():
            archive.writestr(f"{name}.npy", data)
    return stream.getvalue()


def main(folder: str, seconds: float = 60, number: int | None = None, only: str = "") -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MOST_ADDRESSES, MOST_ADDRESSES))
    targets = make_targets(Path(folder))
    targets = {name: target for name, target in targets.items() if only in name}
    failed = [name for name in targets if not passes(name, *targets[name], seconds / len(targets), number)]
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


class OutOfTime(KeyboardInterrupt):
    """Ends a target: the one exception that hypothesis does not take for a finding."""


def passes(
    name: str, strategy: st.SearchStrategy[Any], read: Callable[[Any], None], seconds: float, number: int | None
) -> bool:
    """Read files of ``strategy`` for some seconds; print what was raised, and how many were read."""
    started, done, is_sound = time.monotonic(), 0, True

    def test(value: Any) -> None:
        nonlocal done
        if time.monotonic() > started + seconds:
            raise OutOfTime
        read(value)
        done += 1

    options = settings(
        max_examples=EXAMPLES,
        derandomize=number is None,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )
    run = options(given(strategy)(test))
    try:
        (run if number is None else seed(number)(run))()
    except OutOfTime:
        pass
    except BaseException as error:  # hypothesis groups what several files raise
        traceback.print_exception(error)
        is_sound = False
    print(f"{name}: {done} files, {time.monotonic() - started:.1f} s, peak {peak() / 2**30:.2f} GiB", flush=True)
    return is_sound


if __name__ == "__main__":
    main(sys.argv[1], *(kind(value) for kind, value in zip((float, int, str), sys.argv[2:], strict=False)))
