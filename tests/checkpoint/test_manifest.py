"""The manifest: what it lists, and which it refuses."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from dual_loop.checkpoint.manifest import FileEntry, read_manifest, write_manifest
from dual_loop.checkpoint.store import newest_whole
from dual_loop.errors import CheckpointError

FILES = ("model.safetensors", "optimizer.pt", "state.json", "rng_0.pt")


def _written(root: Path) -> Path:
    folder = root / "checkpoints" / "step_00000004"
    folder.mkdir(parents=True)
    for name in FILES:
        (folder / name).write_text(f"in {name}")
    write_manifest(folder, 4, 1)
    return folder


def test_it_lists_sizes_and_hashes_and_reads_back(tmp_path: Path) -> None:
    folder = _written(tmp_path)
    content = json.loads((folder / "manifest.json").read_text())
    assert sorted(content["files"]) == sorted(FILES)
    for name, entry in content["files"].items():
        data = (folder / name).read_bytes()
        assert entry == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    manifest = read_manifest(folder)
    assert (manifest.step, manifest.world_size) == (4, 1)
    assert manifest.files["state.json"] == FileEntry(**content["files"]["state.json"])
    assert newest_whole(tmp_path)[0] == folder


def test_a_file_that_is_missing_short_or_changed_is_named(tmp_path: Path) -> None:
    folder = _written(tmp_path)
    entry, path = read_manifest(folder).files["state.json"], folder / "state.json"
    entry.verify(path)
    path.write_text("in state.jsom")
    with pytest.raises(CheckpointError, match=r"SHA-256.*state\.json"):
        entry.verify(path)
    path.write_text("in")
    with pytest.raises(CheckpointError, match=r"wrong size.*state\.json.*2 bytes.*13 bytes"):
        entry.verify(path)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"missing.*state\.json"):
        entry.verify(path)


def test_a_rank_without_its_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"did not write.*missing rng_1\.pt"):
        write_manifest(_written(tmp_path), 4, 2)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("format", "another"),
        ("version", 99),
        ("step", "12"),
        ("files", []),
        ("files", {}),
        ("files", {"../../secret": {"bytes": 1, "sha256": ""}}),
        ("files", {"extra.pt": {"bytes": "1", "sha256": ""}}),
    ],
)
def test_a_malformed_manifest_is_refused(tmp_path: Path, key: str, value: Any) -> None:
    path = _written(tmp_path) / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest[key] = {**manifest["files"], **value} if key == "files" and value else value
    path.write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="manifest is malformed"):
        read_manifest(path.parent)
    assert newest_whole(tmp_path)[0] is None
