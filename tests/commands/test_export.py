"""``dual-loop export`` from a run folder: every format is read back, and what differs fails."""

from __future__ import annotations

import json
import resource
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from dual_loop.checkpoint import exporter
from dual_loop.checkpoint.importer import guess_load_checkpoint
from dual_loop.cli import main as cli
from dual_loop.commands import export
from dual_loop.errors import EnvironmentProblem
from dual_loop.testing.demo_data import write_demo_data
from dual_loop.train_dual_loop import main as train

from end_to_end import BASE, data_flags


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run folder of two steps on generated data."""
    folder = tmp_path_factory.mktemp("export")
    write_demo_data(folder / "demo", 12, 3)
    out = folder / "run"
    index = ["--cfg-options", f"data.index_dir={folder / 'index'}"]
    arguments = [*BASE, *data_flags(folder / "demo"), "--max_steps", "2", "--batch_size", "1", "--output_dir", str(out)]
    assert train([*arguments, *index]) == 0
    return out


def test_the_run_folder_says_what_it_started_from(trained):
    report = json.loads((trained / "import_report.json").read_text())
    [source] = report["sources"]
    assert (source["layout"], source["extent"]) == ("native", "full")
    assert all(len(digest) == 64 for digest in source["sha256"].values())


@pytest.mark.parametrize("limit", [100, 20_000, 2_000_000])
@pytest.mark.parametrize("file_format", ["original", "original-trimmed", "hf-native", "hf-sa2va", "adapter"])
def test_a_full_disk_is_one_message_and_leaves_nothing(trained, tmp_path, capsys, file_format, limit):
    """A limit on the size of files stands for the disk."""
    name = "o.pth" if file_format == "original" and limit > 20_000 else "o"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        status = cli(["export", str(trained), str(tmp_path / name), "--format", file_format])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    text = capsys.readouterr().err
    assert status == 2
    assert text.count("error: the export cannot be written; where: ") == 1
    assert str(tmp_path) in text
    assert "File too large" in text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file_format", "name", "tolerance"),
    [
        ("original", "o.pth", "tolerance 0"),
        ("original", "o", "tolerance 0"),
        ("original-trimmed", "t.pth", "tolerance 0"),
        ("hf-native", "native", "tolerance 0.01"),
        ("hf-sa2va", "chat", "tolerance 0.01"),
        ("adapter", "adapter", "tolerance 0"),
    ],
)
def test_every_format_is_read_back(trained, tmp_path, capsys, file_format, name, tolerance):
    assert cli(["export", str(trained), str(tmp_path / name), "--format", file_format]) == 0
    printed = capsys.readouterr().out
    assert "caption identical" in printed
    assert tolerance in printed
    assert (tmp_path / name).exists()
    assert (tmp_path / name / "README.md").is_file() == (tmp_path / name).is_dir()
    assert not list(tmp_path.glob(".writing-*"))
    assert ("no video memory" in printed) == (file_format in ("original", "hf-sa2va"))


@pytest.mark.parametrize("file_format", ["original-trimmed", "adapter"])
def test_what_lacks_its_base_answers_over_it(trained, tmp_path, capsys, file_format):
    """The flags are those that the export prints."""
    assert cli(["export", str(trained), str(tmp_path / "out"), "--format", file_format]) == 0
    base = capsys.readouterr().out.partition("note: under it belongs what the run started from: ")[2].splitlines()[0]
    image = next((trained.parent / "demo/sa1b").rglob("*.jpg"))
    answers = []
    for model in ([str(trained)], [str(tmp_path / "out"), *base.split()]):
        ask = ["caption", str(image), "--box", "10,10,50,50", "--device", "cpu", "--max_new_tokens", "4"]
        assert cli([*ask, "--checkpoint", *model]) == 0
        answers.append(json.loads(capsys.readouterr().out)["images"])
    assert answers[0] == answers[1]
    if file_format == "adapter":
        written = json.loads((tmp_path / "out/adapter_config.json").read_text())
        assert written["base_model_name_or_path"] == "tiny_cpu"


def test_averaged_and_live_weights_are_what_the_checkpoint_holds(trained, tmp_path):
    key = "text_hidden_fcs.2.bias"
    checkpoint = trained / "checkpoints" / "step_00000002"
    for weights, file in (("ema", "ema.safetensors"), ("live", "model.safetensors")):
        out = tmp_path / f"{weights}.pth"
        arguments = ["export", str(checkpoint), str(out), "--format", "original-trimmed", "--weights", weights]
        assert cli(arguments) == 0
        assert torch.equal(guess_load_checkpoint(out)[key], load_file(checkpoint / file)[key])


def test_what_cannot_be_is_refused(trained, tmp_path, capsys):
    out = tmp_path / "there"
    out.mkdir()
    cases = [
        ([str(trained), str(out), "--format", "adapter"], "the target exists"),
        ([str(tmp_path), str(tmp_path / "a"), "--format", "adapter"], "not a run folder"),
        ([str(trained), str(tmp_path / "a.pth"), "--format", "adapter"], "a folder, not a file"),
        ([str(trained), str(tmp_path / "b"), "--format", "adapter", "--merge_lora"], "cannot be merged"),
    ]
    for arguments, message in cases:
        assert cli(["export", *arguments]) == 2
        assert message in capsys.readouterr().err
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text((trained / "config.json").read_text())
    assert cli(["export", str(tmp_path / "run"), str(tmp_path / "c"), "--format", "adapter"]) == 2
    assert "no whole checkpoint" in capsys.readouterr().err


def test_video_weights_that_are_gone_are_asked_for(trained, tmp_path, capsys):
    report = json.loads((trained / "import_report.json").read_text())
    changed = tmp_path / "run"
    changed.mkdir()
    (changed / "config.json").write_text((trained / "config.json").read_text())
    (changed / "checkpoints").symlink_to(trained / "checkpoints")
    report["sources"][0]["dropped"] = {"video memory: single images do not use it": 157}
    (changed / "import_report.json").write_text(json.dumps(report))
    assert cli(["export", str(changed), str(tmp_path / "o.pth"), "--format", "original"]) == 2
    assert "--video_weights" in capsys.readouterr().err
    donor = tmp_path / "sam2.safetensors"
    save_file({"image_encoder.trunk.pos_embed": torch.zeros(1), "no_obj_ptr": torch.full((1, 4), 7.0)}, donor)
    arguments = ["export", str(changed), str(tmp_path / "o.pth"), "--format", "original", "--video_weights", str(donor)]
    assert cli(arguments) == 0
    found = guess_load_checkpoint(tmp_path / "o.pth")["grounding_encoder.sam2_model.no_obj_ptr"]
    assert torch.equal(found, torch.full((1, 4), 7.0))


class FakeHub:
    """Stands for ``HfApi``: what it is asked is kept; ``fails`` is raised at the upload."""

    asked, fails, is_private = [], None, True

    def create_repo(self, name, **how):
        self.asked.append(("create", name, how))

    def model_info(self, name):
        return SimpleNamespace(private=self.is_private)

    def upload_folder(self, repo_id, folder_path, **_):
        if self.fails:
            raise self.fails
        self.asked.append(("upload", repo_id, {str(p.relative_to(folder_path)) for p in Path(folder_path).rglob("*")}))
        return SimpleNamespace(commit_url="https://hub/commit/1")


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    fake = type("Hub", (FakeHub,), {"asked": []})
    monkeypatch.setattr(huggingface_hub, "HfApi", fake)
    return fake


@pytest.fixture
def exported(tmp_path):
    folder = tmp_path / "an export"
    (folder / "mllm").mkdir(parents=True)
    (folder / "mllm" / "model.safetensors").write_bytes(b"0" * 1_500_000)
    (folder / "README.md").write_text("card")
    return folder


def test_a_push_says_what_it_uploads_and_is_private_unless_asked(hub, exported, capsys):
    export.push(exported, "me/model", False)
    said = capsys.readouterr().out
    assert "uploading 2 files, 1.5 MB, to me/model (private): README.md, mllm/model.safetensors" in said
    assert "uploaded to https://hub/commit/1" in said
    assert hub.asked[0] == ("create", "me/model", {"private": True, "exist_ok": True})
    assert hub.asked[1] == ("upload", "me/model", {"README.md", "mllm", "mllm/model.safetensors"})
    hub.is_private = False
    export.push(exported, "me/model", True)
    assert hub.asked[2][2]["private"] is False


def test_nothing_goes_to_a_public_model_unless_asked(hub, exported):
    hub.is_private = False
    with pytest.raises(EnvironmentProblem, match=r"the model is public.*--public"):
        export.push(exported, "me/model", False)
    assert [what for what, *_ in hub.asked] == ["create"]


@pytest.mark.parametrize("error", [OSError("no route"), ValueError("x"), RuntimeError("500")])
def test_a_failed_push_says_how_to_go_on(hub, exported, error):
    hub.fails = error
    with pytest.raises(EnvironmentProblem, match="the export is whole") as caught:
        export.push(exported, "me/model", False)
    assert f"hf upload me/model '{exported}' --private" in str(caught.value)
    assert "hf_secret" not in str(caught.value)
    assert (exported / "README.md").is_file()


def test_what_cannot_be_pushed_is_refused_before_anything_is_read(hub, tmp_path, capsys, monkeypatch):
    cases = [("out", "no/such/name"), ("out", "../x"), ("out", "name"), ("out", "a/b--c"), ("o.pth", "me/model")]
    for out, name in cases:
        assert cli(["export", "nowhere", str(tmp_path / out), "--format", "original", "--push_to_hub", name]) == 2
        assert "hub" in (text := capsys.readouterr().err) or "not uploaded" in text
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    assert cli(["export", "nowhere", str(tmp_path / "o"), "--format", "original", "--push_to_hub", "me/model"]) == 2
    assert "hf auth login" in capsys.readouterr().err
    assert cli(["export", "nowhere", str(tmp_path / "o"), "--format", "original", "--public"]) == 2
    assert "--push_to_hub" in capsys.readouterr().err
    assert hub.asked == []


def test_an_export_whose_push_fails_is_there_with_its_card(trained, hub, tmp_path, capsys):
    hub.fails, out = OSError("no route"), tmp_path / "out"
    command = ["export", str(trained), str(out), "--format", "adapter"]
    assert cli([*command, "--push_to_hub", "me/model"]) == 2
    assert f"hf upload me/model {out} --private" in capsys.readouterr().err
    card = (out / "README.md").read_text()
    assert "2 optimiser steps" in card
    assert "base_model" not in card
    assert str(trained.parent) not in card
    assert "README.md" in json.loads((out / "export.json").read_text())["files"]
    hub.fails = None
    assert cli([*command, "--push_to_hub", "me/model", "--overwrite"]) == 0
    assert "export.json" in hub.asked[-1][2]


def test_a_run_whose_records_are_damaged_is_exported_with_a_card_that_lacks_them(trained, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    (run / "summary.json").write_text("{")
    assert cli(["export", str(run), str(tmp_path / "out"), "--format", "adapter"]) == 0
    assert "note: the model card lacks" in capsys.readouterr().out
    assert "no summary" in (tmp_path / "out" / "README.md").read_text()


def test_overwrite_replaces_exports_and_nothing_else(trained, tmp_path, capsys):
    export = ["export", str(trained), "--overwrite", "--format"]
    run, others, file, link = tmp_path / "run", tmp_path / "others", tmp_path / "model.pth", tmp_path / "link"
    shutil.copytree(trained, run)
    others.mkdir()
    (others / "thesis.tex").write_text("years of work")
    torch.save({"state_dict": {"a": torch.ones(1)}, "meta": {}}, file)
    link.symlink_to(others)
    for out, file_format, named in [
        (run, "adapter", "checkpoints/"),
        (others, "adapter", "thesis.tex"),
        (link, "adapter", "no file that an export wrote"),
        (file, "original", "no file that an export wrote"),
    ]:
        assert cli([*export, file_format, str(out)]) == 2
        assert named in (shown := capsys.readouterr().err)
        assert "is not replaced" in shown
    assert (others / "thesis.tex").read_text() == "years of work"
    assert (run / "checkpoints" / "step_00000002" / "manifest.json").is_file()
    assert list(guess_load_checkpoint(file)) == ["a"]
    for out, file_format in ((tmp_path / "adapter", "adapter"), (tmp_path / "o.pth", "original-trimmed")):
        assert cli([*export, file_format, str(out)]) == 0
        assert cli([*export, file_format, str(out)]) == 0
        capsys.readouterr()
    (tmp_path / "adapter" / "modeling.py").write_text("mine = 1")
    assert cli([*export, "adapter", str(tmp_path / "adapter")]) == 2
    assert "seen: modeling.py;" in capsys.readouterr().err
    assert (tmp_path / "adapter" / "modeling.py").is_file()


def test_a_file_that_reads_back_differently_fails_and_is_set_aside(trained, tmp_path, capsys, monkeypatch):
    honest = exporter.export_weights

    def damaged(model, out, *rest, **options):
        with torch.no_grad():
            model.text_hidden_fcs[2].bias.add_(3.0)
        return honest(model, out, *rest, **options)

    monkeypatch.setattr(exporter, "export_weights", damaged)
    out = tmp_path / "o.pth"
    assert cli(["export", str(trained), str(out), "--format", "original"]) == 2
    assert "what was read back differs" in capsys.readouterr().err
    assert not out.exists()
    assert (tmp_path / "o.pth.failed").is_file()
