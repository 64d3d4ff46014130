"""Getting the reference weights into the model, and checking that every one of them arrived."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from dual_loop.checkpoint.importer import guess_load_checkpoint, load_weights
from dual_loop.checkpoint.key_rules import ORIGINAL, file_name, iterate_export, place, sources_of
from dual_loop.model.adapters import trainable_parameters, without_mask_gradient
from dual_loop.model.sa2va_api import VideoLLaVASAMModel

from .case import FULL, TRAINABLE, Case
from .report import Report


def original_key(native: str) -> str:
    """Return the original's name of a native parameter that is a plain rename (all that train are)."""
    ((canonical, _, _),) = sources_of(native, ORIGINAL)
    return file_name(canonical, ORIGINAL)


def import_full(case: Case, report: Report) -> VideoLLaVASAMModel:
    """Build the model, import the full checkpoint, and compare every tensor on the way back, bit for bit."""
    model = case.new_model()
    print(load_weights(model, case.folder / FULL, tokenizer=case.tokenizer))
    source = guess_load_checkpoint(case.folder / FULL)
    back = dict(iterate_export(model.state_dict().items(), ORIGINAL))
    dropped = {name for name in source if (found := place(name, ORIGINAL)) is not None and found[1]}
    report.same("names of the full checkpoint", sorted(back), sorted(source.keys() - dropped))
    different = [
        name for name in back if name in source and not torch.equal(back[name].to(source[name].dtype), source[name])
    ]
    report.same(f"{len(back)} tensors, written back", different, [])
    if "full" in case.keys:
        report.same("keys.json: full", sorted(source), sorted(case.keys["full"]))
    check_trainable(case, model, report)
    return model


def check_trainable(case: Case, model: VideoLLaVASAMModel, report: Report) -> None:
    """Compare what trains with ``keys.json``, and then let *all* of that require grad.

    The package freezes what mask losses never reach (IoU head, object-score head, the hypernetwork of candidate 0).
    Switched on again here, those show whether they really get none.
    """
    skipped = without_mask_gradient(case.config.model.single_mask)
    own = {original_key(name) for name in trainable_parameters(model)}
    frozen = {}
    for name, parameter in model.named_parameters():
        if "grounding_encoder.mask_decoder." in name and any(part in name for part in skipped):
            frozen[original_key(name)] = parameter
    if "trainable" in case.keys:
        report.same("keys.json: trainable", sorted(own | frozen.keys()), sorted(case.keys["trainable"]))
    report.same("none of those trains that has no gradient", sorted(own & frozen.keys()), [])
    for parameter in frozen.values():
        parameter.requires_grad_(True)


def import_trainable(case: Case, full: VideoLLaVASAMModel, report: Report) -> VideoLLaVASAMModel:
    """Import the trained part over a base whose own trained part is random; compare with the full import."""
    model = case.new_model()
    trained = guess_load_checkpoint(case.folder / TRAINABLE)
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base.pth"
        generator = torch.Generator().manual_seed(0)
        state = {
            name: torch.randn(tensor.shape, generator=generator) if name in trained else tensor
            for name, tensor in guess_load_checkpoint(case.folder / FULL).items()
        }
        torch.save({"state_dict": state, "meta": {}}, base)
        print(load_weights(model, [base, case.folder / TRAINABLE], tokenizer=case.tokenizer))
    for key in ("trainable", "trimmed"):
        if key in case.keys:
            report.same(f"keys.json: {key}, in the trained checkpoint", sorted(trained), sorted(case.keys[key]))
    expected = full.state_dict()
    different = [name for name, value in model.state_dict().items() if not torch.equal(value, expected[name])]
    report.same("all tensors as from the full checkpoint", different, [])
    check_trainable(case, model, report)
    return model
