"""Run checkpoints: round trip, interruption at every point, rotation, verification, several ranks, random states."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import resource
import shutil
import threading
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save

from dual_loop.checkpoint.store import (
    capture_rng,
    load_run_checkpoint,
    newest_whole,
    restore_rng,
    save_run_checkpoint,
)
from dual_loop.errors import CheckpointError, EnvironmentProblem

FILES = ("model.safetensors", "ema.safetensors", "optimizer.pt", "state.json", "rng_0.pt")


class Killed(BaseException):
    """Stands for the end of the process: no handler of ordinary exceptions may catch it."""


def _content(value: float = 1.0) -> dict[str, Any]:
    torch.manual_seed(int(value))
    layer = torch.nn.Linear(3, 2).to(torch.bfloat16)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.01, betas=(0.9, 0.98))
    layer(torch.ones(1, 3, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
    return {
        "model_tensors": {name: tensor.detach() for name, tensor in layer.named_parameters()},
        "ema_tensors": {name: tensor.detach().float() * 0.5 for name, tensor in layer.named_parameters()},
        "optimizer_state": optimizer.state_dict(),
        "state": {"epoch": 2, "best": None, "value": value, "seen": ["a", 1.5, True]},
        "rng_states": capture_rng(),
    }


def _save(root: Path, step: int, **options: Any) -> Path:
    return save_run_checkpoint(root, step, **{**_content(float(step)), **options})


def _steps(root: Path) -> list[str]:
    return sorted(path.name for path in (root / "checkpoints").iterdir())


def _assert_same(first: Any, second: Any) -> None:
    assert type(first) is type(second)
    if isinstance(first, torch.Tensor):
        assert first.dtype == second.dtype
        assert torch.equal(first, second)
    elif isinstance(first, dict):
        assert list(first) == list(second)
        for key in first:
            _assert_same(first[key], second[key])
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second)
        for one, other in zip(first, second, strict=True):
            _assert_same(one, other)
    else:
        assert first == second


# --- round trip -----------------------------------------------------------------------------------------------------


def test_everything_comes_back_bitwise_with_its_types(tmp_path: Path):
    content = _content()
    path = save_run_checkpoint(tmp_path, 12, **content)
    assert path == tmp_path / "checkpoints" / "step_00000012"
    loaded = load_run_checkpoint(path)
    assert loaded.step == 12
    for name, value in content.items():
        restored = getattr(loaded, name)
        _assert_same({k: value[k] for k in sorted(value)}, {k: restored[k] for k in sorted(restored)})


def test_a_loaded_optimizer_continues_bitwise(tmp_path: Path):
    def build() -> tuple[torch.nn.Parameter, torch.optim.AdamW]:
        parameter = torch.nn.Parameter(torch.linspace(-1, 1, 5))
        return parameter, torch.optim.AdamW([parameter], lr=0.1)

    def advance(parameter: torch.nn.Parameter, optimizer: torch.optim.AdamW) -> None:
        parameter.grad = parameter.detach() ** 2 + 0.1
        optimizer.step()

    parameter, optimizer = build()
    advance(parameter, optimizer)
    path = _save(tmp_path, 1, model_tensors={"p": parameter}, optimizer_state=optimizer.state_dict())
    advance(parameter, optimizer)
    other, other_optimizer = build()
    loaded = load_run_checkpoint(path)
    other.data.copy_(loaded.model_tensors["p"])
    other_optimizer.load_state_dict(loaded.optimizer_state)
    advance(other, other_optimizer)
    assert torch.equal(parameter, other)


def test_without_averages_there_is_no_file_and_none_comes_back(tmp_path: Path):
    path = _save(tmp_path, 3, ema_tensors=None)
    assert not (path / "ema.safetensors").exists()
    assert load_run_checkpoint(path).ema_tensors is None


def test_non_contiguous_scalar_and_empty_tensors_come_back(tmp_path: Path):
    tensors = {"t": torch.arange(6.0).reshape(2, 3).t(), "s": torch.tensor(2.5), "e": torch.zeros(0, 4)}
    loaded = load_run_checkpoint(_save(tmp_path, 1, model_tensors=tensors, ema_tensors={})).model_tensors
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_an_older_checkpoint_with_a_schedule_is_read_and_still_verified(tmp_path: Path):
    path = _save(tmp_path, 4)
    _forge(path, "scheduler.pt", b"last_epoch")
    assert load_run_checkpoint(path).step == 4
    (path / "scheduler.pt").write_bytes(b"last_eposh")
    with pytest.raises(CheckpointError, match=r"SHA-256.*scheduler\.pt"):
        load_run_checkpoint(path)


# --- interruption ---------------------------------------------------------------------------------------------------


def _kill_at(monkeypatch: pytest.MonkeyPatch, number: int) -> list[str]:
    """Make the ``number``-th call of fsync, rename or rmtree raise Killed; the list fills with the calls made."""
    calls: list[str] = []

    def wrap(module: Any, name: str) -> None:
        original = getattr(module, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            if len(calls) == number:
                raise Killed
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, counted)

    wrap(os, "fsync")
    wrap(os, "rename")
    wrap(shutil, "rmtree")
    return calls


@pytest.mark.parametrize("second_step", [12, 6])
def test_killed_anywhere_leaves_a_whole_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, second_step: int):
    """With keep=1, kill the second save (of a later or of the same step) at each of its points, one after another."""
    number = 0
    while True:
        number += 1
        root = tmp_path / str(number)
        _save(root, 6, state={"save": 1}, keep=1)
        with monkeypatch.context() as patch:
            calls = _kill_at(patch, number)
            try:
                _save(root, second_step, state={"save": 2}, keep=1)
            except Killed:
                finished = False
            else:
                finished = True
        latest = newest_whole(root)[0]
        assert latest is not None, f"nothing left after a kill at call {number} ({calls[-1]})"
        assert load_run_checkpoint(latest).state["save"] in ((2,) if finished else (1, 2))
        if finished:
            break
        _save(root, 20, keep=1)
        assert _steps(root) == ["step_00000020"], f"leftovers after a kill at call {number} ({calls[-1]})"
    assert {"fsync", "rename", "rmtree"} <= set(calls)
    assert number > 8


@pytest.mark.parametrize("failing_call", [1, 2])
def test_a_failing_barrier_publishes_nothing(tmp_path: Path, failing_call: int):
    _save(tmp_path, 1)
    calls = 0

    def barrier() -> None:
        nonlocal calls
        calls += 1
        if calls == failing_call:
            raise Killed

    with pytest.raises(Killed):
        _save(tmp_path, 2, barrier=barrier)
    assert _steps(tmp_path) == [".tmp-step_00000002", "step_00000001"]
    latest = newest_whole(tmp_path)[0]
    assert latest is not None
    assert latest.name == "step_00000001"
    _save(tmp_path, 3)
    assert _steps(tmp_path) == ["step_00000001", "step_00000003"]


def test_half_written_folders_are_never_the_latest(tmp_path: Path):
    good, no_manifest, truncated, missing, garbled = (_save(tmp_path, step, keep=9) for step in (1, 2, 3, 4, 5))
    (no_manifest / "manifest.json").unlink()
    os.truncate(truncated / "optimizer.pt", 10)
    (missing / "state.json").unlink()
    (garbled / "manifest.json").write_text('{"format": ')
    assert newest_whole(tmp_path)[0] == good
    for path, expected in (
        (no_manifest, "no manifest"),
        (truncated, r"wrong size.*optimizer\.pt"),
        (missing, r"missing.*state\.json"),
        (garbled, "manifest cannot be read"),
    ):
        with pytest.raises(CheckpointError, match=expected):
            load_run_checkpoint(path)


def test_nothing_saved_is_none_and_a_missing_folder_is_an_error(tmp_path: Path):
    assert newest_whole(tmp_path / "never")[0] is None
    with pytest.raises(CheckpointError, match="no manifest"):
        load_run_checkpoint(tmp_path / "never")


# --- rotation -------------------------------------------------------------------------------------------------------


def test_rotation_keeps_the_newest(tmp_path: Path):
    for step in (5, 10, 15, 20):
        _save(tmp_path, step, keep=2)
    assert _steps(tmp_path) == ["step_00000015", "step_00000020"]


def test_latest_goes_by_number_beyond_eight_digits(tmp_path: Path):
    for step in (99_999_999, 100_000_000):
        _save(tmp_path, step)
    latest = newest_whole(tmp_path)[0]
    assert latest is not None
    assert latest.name == "step_100000000"


def test_damaged_checkpoints_do_not_push_out_whole_ones(tmp_path: Path):
    _save(tmp_path, 1, keep=2)
    (_save(tmp_path, 2, keep=2) / "manifest.json").unlink()
    _save(tmp_path, 3, keep=2)
    assert _steps(tmp_path) == ["step_00000001", "step_00000002", "step_00000003"]


def test_saving_an_earlier_step_keeps_it_and_warns_about_the_later_ones(tmp_path: Path):
    for step in (6, 12, 24):
        _save(tmp_path, step, keep=3)
    with pytest.warns(UserWarning, match=r"later steps.*step_00000024"):
        _save(tmp_path, 18, keep=1)
    assert _steps(tmp_path) == ["step_00000018", "step_00000024"]


def test_saving_the_same_step_again_replaces_it(tmp_path: Path):
    _save(tmp_path, 7, state={"save": 1})
    path = _save(tmp_path, 7, state={"save": 2})
    assert load_run_checkpoint(path).state == {"save": 2}
    assert _steps(tmp_path) == ["step_00000007"]


def test_rotation_leaves_other_entries_and_links_alone(tmp_path: Path):
    folder = tmp_path / "checkpoints"
    (folder / "mine").mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "keep.txt").write_text("x")
    (folder / ".tmp-link").symlink_to(tmp_path / "outside")
    _save(tmp_path, 1, keep=1)
    _save(tmp_path, 2, keep=1)
    assert _steps(tmp_path) == [".tmp-link", "mine", "step_00000002"]
    assert (tmp_path / "outside" / "keep.txt").exists()


def test_links_to_checkpoints_survive_rotation_with_what_they_point_to(tmp_path: Path):
    folder = tmp_path / "checkpoints"
    best = _save(tmp_path, 1, keep=1)
    (folder / "best").symlink_to(best.name)
    elsewhere = shutil.move(_save(tmp_path, 2, keep=1), tmp_path / "big_disk")
    (folder / "step_00000002").symlink_to(elsewhere)
    for step in (3, 4):
        _save(tmp_path, step, keep=1)
    assert _steps(tmp_path) == ["best", "step_00000001", "step_00000002", "step_00000004"]
    assert load_run_checkpoint(folder / "best").step == 1
    assert load_run_checkpoint(folder / "step_00000002").step == 2
    _save(tmp_path, 2, state={"save": 2}, keep=9)  # takes the link's place, not that of what it points to
    assert load_run_checkpoint(folder / "step_00000002").state == {"save": 2}
    assert load_run_checkpoint(tmp_path / "big_disk").step == 2


# --- verification ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_byte_is_found_and_the_file_named(tmp_path: Path, name: str):
    path = _save(tmp_path, 1) / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=f"SHA-256.*{name}"):
        load_run_checkpoint(path.parent)


def test_the_newest_whole_one_is_found_by_its_hashes_and_others_are_named(tmp_path: Path):
    good, flipped, no_manifest = (_save(tmp_path, step, keep=9) for step in (1, 2, 3))
    data = bytearray((flipped / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (flipped / "model.safetensors").write_bytes(data)
    (no_manifest / "manifest.json").unlink()
    found, passed_over = newest_whole(tmp_path)
    assert found == good
    assert "step_00000003" in passed_over[0]
    assert "no manifest" in passed_over[0]
    assert "SHA-256" in passed_over[1]
    assert "step_00000002/model.safetensors" in passed_over[1]
    assert newest_whole(tmp_path / "never") == (None, [])


@pytest.mark.parametrize("limit", [100, 50_000, 500_000])
def test_a_file_that_may_not_grow_is_named_with_its_cause(tmp_path: Path, limit: int):
    """The first limit stops random states, the second the weights, the third the optimiser's archive."""
    _save(tmp_path, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    state = {"state": {0: {"exp_avg": torch.zeros(200_000)}}}
    try:
        with pytest.raises(EnvironmentProblem, match=r"File too large.*expected: [\d,]+ bytes of space.*to do: raise"):
            _save(tmp_path, 2, model_tensors={"a": torch.zeros(100_000)}, optimizer_state=state)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert newest_whole(tmp_path)[0] == tmp_path / "checkpoints/step_00000001"


# --- what is not finite ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("part", "where"),
    [
        ("model_tensors", r"model_tensors\['a'\]"),
        ("ema_tensors", r"ema_tensors\['a'\]"),
        ("optimizer_state", r"optimizer_state\['state'\]\[0\]\['exp_avg'\]"),
        ("state", r"state\['seconds'\]"),
    ],
)
def test_nothing_that_is_not_finite_is_saved(tmp_path: Path, part: str, where: str, value: float):
    _save(tmp_path, 1)
    broken: dict[str, Any] = {"a": torch.tensor([1.0, value], dtype=torch.bfloat16)}
    if part == "optimizer_state":
        broken = {"state": {0: {"step": torch.tensor(1.0), "exp_avg": torch.tensor([value])}}, "param_groups": []}
    if part == "state":
        broken = {"seconds": value}
    with pytest.raises(CheckpointError, match=f"not finite.*{where}.*to do:"):
        _save(tmp_path, 2, **{part: broken})
    assert _steps(tmp_path) == ["step_00000001"]


@pytest.mark.parametrize("name", ["model.safetensors", "ema.safetensors", "optimizer.pt"])
def test_a_checkpoint_of_before_that_is_not_finite_is_refused(tmp_path: Path, name: str):
    path = _save(tmp_path, 1)
    broken = {"a": torch.tensor([1.0, float("nan")])}
    data = io.BytesIO()
    torch.save(broken, data)
    _forge(path, name, data.getvalue() if name.endswith(".pt") else save(broken))
    with pytest.raises(CheckpointError, match=rf"not finite.*{name}.*'a'.*to do:.*earlier"):
        load_run_checkpoint(path)


def _forge(path: Path, name: str, data: bytes) -> None:
    """Replace a file and make the manifest agree with it."""
    (path / name).write_bytes(data)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (path / "manifest.json").write_text(json.dumps(manifest))


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path):
    path = _save(tmp_path, 1)
    trace = tmp_path / "ran"
    _forge(path, "optimizer.pt", b"cposix\nsystem\n(S'touch " + str(trace).encode() + b"'\ntR.")
    with pytest.raises(CheckpointError, match=r"cannot be read safely.*optimizer\.pt"):
        load_run_checkpoint(path)
    assert not trace.exists()


def test_damaged_tensors_with_a_matching_hash_are_still_an_explained_error(tmp_path: Path):
    path = _save(tmp_path, 1)
    _forge(path, "model.safetensors", b"not safetensors")
    with pytest.raises(CheckpointError, match=r"tensors cannot be read.*model\.safetensors"):
        load_run_checkpoint(path)


# --- what may be saved ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "value", "where"),
    [
        ("optimizer_state", {"groups": [{"fn": print}]}, r"optimizer_state\['groups'\]\[0\]\['fn'\]"),
        ("optimizer_state", {"lr": np.float64(1.0)}, r"optimizer_state\['lr'\].*numpy"),
        ("rng_states", {"x": {1, 2}}, r"rng_states\['x'\].*set"),
        ("state", {"pair": (1, 2)}, r"state\['pair'\].*tuple"),
        ("state", {"by_id": {3: "x"}}, "key cannot be saved"),
        ("state", {"loss": torch.zeros(1)}, r"state\['loss'\].*Tensor"),
    ],
)
def test_values_that_would_not_come_back_are_refused_before_writing(tmp_path: Path, part: str, value: Any, where: str):
    with pytest.raises(CheckpointError, match=where):
        _save(tmp_path, 1, **{part: value})
    assert newest_whole(tmp_path)[0] is None
    assert not (tmp_path / "checkpoints").exists()


def test_a_loader_that_dies_while_tensors_are_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Torch raises in the main process, wherever that is, when a loader's process dies."""

    def save_file(*_: Any) -> None:
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")

    monkeypatch.setattr("dual_loop.checkpoint.store.save_file", save_file)
    with pytest.raises(RuntimeError, match="DataLoader worker"):
        _save(tmp_path, 1)


def test_tensors_that_share_memory_are_refused(tmp_path: Path):
    shared = torch.zeros(4)
    with pytest.raises(CheckpointError, match="tensors cannot be saved"):
        _save(tmp_path, 1, model_tensors={"a": shared, "b": shared})


@pytest.mark.parametrize("options", [{"keep": 0}, {"rank": 1}, {"step": -1}])
def test_arguments_out_of_range_are_refused(tmp_path: Path, options: dict[str, int]):
    with pytest.raises(ValueError, match="cannot save a checkpoint"):
        save_run_checkpoint(tmp_path, **{"step": 1, **_content(), **options})


def test_too_little_space_is_reported_with_numbers_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 0, 5_000_000))
    _save(tmp_path, 1)
    with pytest.raises(EnvironmentProblem, match=r"5,000,000 bytes free.*at least 9,\d{3},\d{3} bytes"):
        _save(tmp_path, 2, model_tensors={"w": torch.zeros(2_000_000)})
    assert _steps(tmp_path) == ["step_00000001"]


def test_a_disk_that_fills_up_while_writing_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    original = Path.open
    monkeypatch.setattr(
        Path,
        "open",
        lambda self, *a, **k: original(Path("/dev/full") if self.name == "optimizer.pt" else self, *a, **k),
    )
    with pytest.raises(EnvironmentProblem, match=r"cannot be written.*No space left.*free some space"):
        _save(tmp_path, 1)
    assert newest_whole(tmp_path)[0] is None


# --- several ranks --------------------------------------------------------------------------------------------------


def _save_with_ranks(root: Path, step: int, world_size: int) -> list[BaseException]:
    """Call the save from one thread a rank; return what they raised."""
    barrier = threading.Barrier(world_size, timeout=30)
    content = _content()
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        own = {**content, "rng_states": {"rank": rank}}
        if rank > 0:
            own.update(model_tensors={}, ema_tensors=None)
        try:
            save_run_checkpoint(root, step, **own, rank=rank, world_size=world_size, barrier=barrier.wait)
            assert newest_whole(root)[0] is not None
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


def test_each_rank_gets_its_own_random_states(tmp_path: Path):
    assert _save_with_ranks(tmp_path, 5, world_size=3) == []
    path = newest_whole(tmp_path)[0]
    assert path is not None
    for rank in range(3):
        loaded = load_run_checkpoint(path, rank=rank, world_size=3)
        assert loaded.rng_states == {"rank": rank}
        assert loaded.model_tensors


@pytest.mark.parametrize(("rank", "world_size"), [(2, 3), (0, 1), (0, 3)])
def test_another_world_size_loads_all_but_the_random_states(tmp_path: Path, rank: int, world_size: int):
    assert _save_with_ranks(tmp_path, 5, world_size=2) == []
    path = newest_whole(tmp_path)[0]
    assert path is not None
    with pytest.warns(UserWarning, match=r"saved by 2 rank.*not restored"):
        loaded = load_run_checkpoint(path, rank=rank, world_size=world_size)
    assert loaded.rng_states is None
    assert loaded.optimizer_state


def test_a_rank_whose_file_was_lost_is_an_error_not_a_changed_world(tmp_path: Path):
    assert _save_with_ranks(tmp_path, 5, world_size=2) == []
    path = tmp_path / "checkpoints" / "step_00000005"
    (path / "rng_1.pt").unlink()
    assert newest_whole(tmp_path)[0] is None
    with pytest.raises(CheckpointError, match=r"missing.*rng_1\.pt"):
        load_run_checkpoint(path, rank=1, world_size=2)


def test_a_barrier_that_does_not_wait_cannot_publish(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"did not write.*rng_1\.pt"):
        _save(tmp_path, 1, rank=0, world_size=2)
    assert newest_whole(tmp_path)[0] is None


def test_a_rank_on_another_file_system_is_told_so(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"rank 1.*file system that all nodes share"):
        _save(tmp_path, 1, rank=1, world_size=2)


# --- random states --------------------------------------------------------------------------------------------------


def _draw() -> list[Any]:
    return [random.random(), random.gauss(0, 1), np.random.rand(3).tolist(), np.random.randn(), torch.rand(4).tolist()]


@pytest.mark.parametrize("num_gauss", [0, 1])
def test_random_states_continue_bitwise_through_a_file(tmp_path: Path, num_gauss: int):
    """With one Gaussian drawn, Python and numpy hold its twin back; that must be saved as well."""
    random.seed(3)
    np.random.seed(4)
    torch.manual_seed(5)
    for _ in range(num_gauss):
        random.gauss(0, 1)
        np.random.randn()
    path = save_run_checkpoint(tmp_path, 1, **{**_content(), "rng_states": (states := capture_rng())})
    restore_rng(states)
    expected = _draw()
    _draw()
    loaded = load_run_checkpoint(path).rng_states
    assert loaded is not None
    restore_rng(loaded)
    assert _draw() == expected


def test_malformed_random_states_are_refused():
    with pytest.raises(CheckpointError, match="malformed"):
        restore_rng({"python": (3, torch.zeros(625), None)})


@pytest.mark.skipif(torch.cuda.is_available(), reason="this checks a machine without CUDA")
def test_a_cuda_state_without_cuda_is_left_out_with_a_warning():
    with pytest.warns(UserWarning, match="is not now"):
        restore_rng({**capture_rng(), "cuda": torch.zeros(16, dtype=torch.uint8)})
