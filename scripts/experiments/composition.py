"""The table of composition: pairs of words that no caption named, relations, negation, and expressions of nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image
from safetensors.torch import load_file, save_file

from dual_loop.data.coco_masks import encode_rle
from dual_loop.model.build import TINY_ASSETS
from dual_loop.testing.scenes import CLEAR_OFFSET, Scene, SceneObject, generate_scene, pool_seed

from tiny.scenes import UNNAMED_PAIRS, without_unnamed

Asked = tuple[str, SceneObject, str]
"""Kind, object and text of an expression."""

UNNAMED_CAPTIONS = frozenset(f"{colour} {shape}" for shape, colour in UNNAMED_PAIRS)
RELATIONS = ("left of", "right of", "above", "below")


def names_unnamed_pair(caption: str) -> bool:
    return any(pair in caption for pair in UNNAMED_CAPTIONS)


def write_start(work: Path) -> Path:
    """Make the tiny checkpoint anew, without captions of some pairs; the vision tower, which saw none, is the packaged.

    About 20 minutes of one core; what was stopped goes on.
    """
    folder = work / "start_without_pairs"
    stages = folder / "stages"
    stages.mkdir(parents=True, exist_ok=True)
    if not (folder / "model.safetensors").is_file():
        (folder / "tokenizer.json").write_bytes((TINY_ASSETS / "tokenizer.json").read_bytes())
        packaged = load_file(TINY_ASSETS / "model.safetensors")
        vision = {key: value for key, value in packaged.items() if key.startswith("mllm.model.vision_tower.")}
        save_file(vision, stages / "vision.safetensors")
        script = Path(__file__).resolve().parents[1] / "pretrain_tiny.py"
        places = ("--work_dir", stages, "--out", folder, "--threads", "1")
        subprocess.run([sys.executable, script, "--without_pairs", *places], check=True)
    return folder


def write_objects(
    path: Path, images: str, pool: str, seed: int, scenes: int, choose: Callable[[Scene], Iterable[Asked]]
) -> None:
    """Write a line of JSON for every object and text that ``choose`` takes of the scenes of a pool, and their images.

    The identifier of a line is ``kind/number``; no text gives an object without a caption. What is there is kept.
    """
    if path.is_file():
        return
    (path.parent / images).parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8") as stream:
        for index in range(scenes):
            scene = generate_scene(pool_seed(seed, pool, index))
            file = images.format(index + 1)
            for number, (kind, item, text) in enumerate(choose(scene)):
                if number == 0 and not (path.parent / file).exists():
                    Image.fromarray(scene.image).save(path.parent / file, quality=95)
                line: dict[str, Any] = {"image": file, "id": f"{kind}/{number}"}
                line["segmentation"] = encode_rle(item.mask)
                stream.write(json.dumps({**line, "caption": text} if text else line) + "\n")
    temporary.replace(path)


def true(scene: Scene) -> list[Asked]:
    return [("true", item, item.caption) for item in scene.objects]


def named(scene: Scene) -> list[Asked]:
    return [("named", item, item.caption) for item in without_unnamed(scene).objects]


def asked(scene: Scene) -> list[Asked]:
    """Return the expressions for a scene, and its other objects, against which a mask is compared."""
    found = list(expressions(scene))
    done = {id(item) for _, item, _ in found}
    return found + [("other", item, "") for item in scene.objects if found and id(item) not in done]


def expressions(scene: Scene) -> Iterator[Asked]:
    """Yield kind, object and text, for objects that share their shape with one other, of another colour.

    The shape alone is right for one of two. A relation is to a third object whose shape no other has, and which lies
    between the two, so that it tells them apart.
    """
    for item in scene.objects:
        same = [other for other in scene.objects if other.shape == item.shape and other is not item]
        if len(same) != 1 or same[0].colour == item.colour:
            continue
        yield "shape", item, f"the {item.shape}"
        yield "negation", item, f"the {item.shape} that is not {same[0].colour}"
        for third in scene.objects:
            is_only = sum(other.shape == third.shape for other in scene.objects) == 1
            if is_only and (word := relation(scene, item, same[0], third)):
                yield "relation", item, f"the {item.shape} {word} the {third.shape}"


def relation(scene: Scene, item: SceneObject, other: SceneObject, third: SceneObject) -> str | None:
    """Return where ``item`` lies as seen from ``third``, if ``other`` lies clearly on the opposite side."""
    for axis, side in enumerate(scene.image.shape[1::-1]):
        own, across = ((one.centre[axis] - third.centre[axis]) / side for one in (item, other))
        if min(abs(own), abs(across)) > CLEAR_OFFSET / 2 and own * across < 0:
            return RELATIONS[2 * axis + (own > 0)]
    return None
