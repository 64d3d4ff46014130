"""The tiny model on this device against float32 on the CPU: losses, gradients, tokens; settings, attention kernels."""

from __future__ import annotations

from functools import cache
from typing import Any

from dual_loop.model.hardware import why_no_liger
from dual_loop.training.devices import KERNELS, why_no_kernel

from acceptance.found import Asked, Found
from acceptance.small import (
    Taken,
    gradient_difference,
    loss_difference,
    small_setting,
    take_step,
    whole_difference,
)
from bench.setup import LEVERS, OFF, build_config

LOSS, GRADIENT = 1e-5, 1e-4
TF32_LOSS, TF32_GRADIENT = 1e-3, 2e-2
"""TF32 keeps ten bits of each factor."""
BF16_LOSS, BF16_GRADIENT = 2e-2, 5e-2
"""Against "math" in bfloat16, which keeps eight bits of each value; gradients as one vector of all parameters."""

WAYS: dict[str, dict[str, Any]] = {
    "plain loop": {},
    "grpo": {"policy.caption_gradient": "grpo", "policy.captions_per_region": 2},
    "turns": {"loop.segment_form": "turns"},
}
"""Ways to train; each is compared with itself on the CPU."""


def settings(asked: Asked) -> dict[str, dict[str, Any]]:
    """Return what is switched, by the name of the row: every lever off, and on what is off by default."""
    found: dict[str, dict[str, Any]] = {f"speed.{name} off": {f"speed.{name}": OFF[name]} for name in LEVERS}
    found |= {
        "speed.images_at_once 1": {"speed.images_at_once": "1"},
        "speed.prefetch_to_device": {"speed.prefetch_to_device": True},
        "speed.checkpoint_layers all": {"speed.checkpoint_layers": "all", "model.gradient_checkpointing": True},
        "speed.decode_graph off": {"speed.decode_graph": "off"},
        "speed.expandable_segments off": {"speed.expandable_segments": False},
        "train.deterministic": {"train.deterministic": True},
        "speed.feature_cache": {"speed.feature_cache": f"{asked.folder}/features"},
    }
    if not asked.is_tiny:  # half a minute
        found["speed.compile"] = {"speed.compile": True}
    if why_no_liger(asked.device) is None:
        found["speed.liger"] = {"speed.liger": True}
    return found


def run(asked: Asked, found: Found) -> None:
    @cache
    def on_cpu(way: str) -> Taken:
        return take_step(small_setting(asked, WAYS[way], "cpu"))

    def compare(
        name: str, way: str, changes: dict[str, Any], most_loss: float = LOSS, most_gradient: float = GRADIENT
    ) -> None:
        try:
            seen = take_step(small_setting(asked, {**WAYS[way], **changes}))
        except Exception as error:  # the other rows still tell something
            found.check(name, False, f"{type(error).__name__}: {error}")
            return
        expected = on_cpu(way)
        loss, (gradient, where) = loss_difference(seen, expected), gradient_difference(seen, expected)
        same = sum(a == b for a, b in zip(seen.tokens, expected.tokens, strict=True))
        tokens = f"{same} of {len(expected.tokens)}"
        found.row("float32 against the CPU", what=name, loss=loss, gradient=gradient, worst=where, same_captions=tokens)
        passed = loss <= most_loss and gradient <= most_gradient and same == len(expected.tokens)
        found.check(name, passed, f"losses {loss:.1e}, gradients {gradient:.1e} ({where}), captions {tokens}")

    for way in WAYS:
        compare(way, way, {})
    for name, changes in settings(asked).items():
        compare(name, "plain loop", changes)
    compare("speed.tf32", "plain loop", {"speed.tf32": True}, TF32_LOSS, TF32_GRADIENT)
    reason = why_no_liger(asked.device)
    if reason is not None:
        found.note(f"speed.liger is left out: {reason}")
    compare_kernels(asked, found, compare)


def compare_kernels(asked: Asked, found: Found, compare: Any) -> None:
    """Compare attention kernels: in float32 with the CPU, in bfloat16 with "math", where texts are given."""
    bf16 = {"train.mixed_precision": "bf16"}
    expected = take_step(small_setting(asked, {**bf16, "speed.sdpa_kernel": "math"}), is_captioned=True)
    for kernel in ("auto", *KERNELS):
        change = {"speed.sdpa_kernel": kernel}
        setting = small_setting(asked, {**bf16, **change})
        reason = why_no_kernel(build_config(setting, "default"), asked.device)
        if reason is not None:
            found.row("attention kernels in bfloat16", kernel=kernel, loss=None, gradient=None, why_not=reason)
            continue
        if kernel in ("efficient", "math"):  # the others take no float32
            compare(f"attention kernel {kernel}", "plain loop", change)
        try:
            seen = take_step(setting, is_captioned=True)
        except Exception as error:
            found.check(f"attention kernel {kernel} in bfloat16", False, f"{type(error).__name__}: {error}")
            continue
        loss, gradient = loss_difference(seen, expected), whole_difference(seen, expected)
        found.row("attention kernels in bfloat16", kernel=kernel, loss=loss, gradient=gradient, why_not=None)
        passed = loss <= BF16_LOSS and gradient <= BF16_GRADIENT
        found.check(f"attention kernel {kernel} in bfloat16", passed, f"losses {loss:.1e}, gradients {gradient:.1e}")
