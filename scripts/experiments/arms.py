"""The arms of the label-scarce experiment: what each trains on, and with which flags."""

from __future__ import annotations

from dataclasses import dataclass

CAPTIONED, MASKS, ALL = "captioned", "masks", "all"
LEARNING_RATE = 4e-4

FAST = ("--learning_rate", str(2 * LEARNING_RATE))
ALIGN = ("--align_weight", "1")
PROJECTION = (*ALIGN, "--align_through", "projection")
GRPO = ("--caption_gradient", "grpo", "--captions_per_region", "4")
HOT = ("--policy_temperature", "1.5")
FROZEN = (*HOT, "--reward_listener", "frozen")


@dataclass(frozen=True)
class Arm:
    """One variant.

    Attributes:
        description: what it adds, for the table.
        data: ``captioned`` (the captioned part alone), ``masks`` (with the mask-only part, a quarter of the samples
            captioned), ``all`` (every scene with its captions).
        flags: of the trainer.
    """

    description: str
    data: str
    flags: tuple[str, ...] = ()


ARMS: dict[str, Arm] = {
    "A": Arm("supervised, captioned part alone", CAPTIONED),
    "B": Arm("+ dual loop, no caption gradient", MASKS),
    "C": Arm("B + cycle filter", MASKS, ("--cycle_keep", "0.7", "--cycle_drop", "0.3")),
    "D1": Arm("B + scst", MASKS, ("--caption_gradient", "scst", "--captions_per_region", "2")),
    "D2": Arm("B + grpo", MASKS, GRPO),
    "D3": Arm("D2, rewarded by the frozen listener, samples at 1.5", MASKS, (*GRPO, *FROZEN)),
    "D4": Arm("D2, samples at 1.5", MASKS, (*GRPO, *HOT)),
    "E": Arm("B + gumbel", MASKS, ("--caption_gradient", "gumbel")),
    "E2": Arm("B + gumbel+grpo", MASKS, ("--caption_gradient", "gumbel+grpo", "--captions_per_region", "4")),
    "F": Arm("D2 + distillation", MASKS, (*GRPO, "--distill_weight", "0.5")),
    "F0": Arm("B + distillation", MASKS, ("--distill_weight", "0.5")),
    "G": Arm("D2 + contrast reward", MASKS, (*GRPO, "--contrast_reward_weight", "1")),
    "H": Arm("B + latent alignment", MASKS, ALIGN),
    "H0": Arm("A + latent alignment (control of H)", CAPTIONED, ALIGN),
    "Hp": Arm("B + latent alignment through the projection alone", MASKS, PROJECTION),
    "Hp0": Arm("A + the same (control of Hp)", CAPTIONED, PROJECTION),
    "L-": Arm("B at half the learning rate", MASKS, ("--learning_rate", str(LEARNING_RATE / 2))),
    "L+": Arm("B at twice the learning rate", MASKS, FAST),
    "HL+": Arm("H at twice the learning rate", MASKS, (*ALIGN, *FAST)),
    "HD": Arm("H + grpo", MASKS, (*GRPO, *ALIGN)),
    "Z": Arm("all captions given (ceiling)", ALL),
}
