"""The options of the loop that teach something beside the plain losses: one file each (see :mod:`.base`)."""

from __future__ import annotations

from dual_loop.config import Config, caption_gradient
from dual_loop.loop.judge import Judge
from dual_loop.loop.signals.alignment import Alignment
from dual_loop.loop.signals.base import Signal
from dual_loop.loop.signals.cycle_filter import CycleFilter
from dual_loop.loop.signals.distillation import Distillation
from dual_loop.loop.signals.gumbel import GumbelCaptions
from dual_loop.loop.signals.no_target import NoTarget
from dual_loop.loop.signals.policy import CaptionPolicy
from dual_loop.loop.signals.recaption import Recaption
from dual_loop.model.ema import ExponentialMovingAverage
from dual_loop.model.prompts import Prompter
from dual_loop.model.sa2va import Sa2VA
from dual_loop.types import RankComm


def build_signals(
    model: Sa2VA,
    prompter: Prompter,
    config: Config,
    average: ExponentialMovingAverage | None,
    comm: RankComm,
    judge: Judge | None = None,
) -> list[Signal]:
    """Return the signals that ``config`` switches on; every rank must use them in this order.

    ``policy.caption_gradient`` names the captioner's: ``none``, ``scst``, ``grpo``, ``gumbel``, ``gumbel+scst``,
    ``gumbel+grpo``.
    """
    loop, loss = config.loop, config.loss
    *straight_through, estimator = caption_gradient(config.policy, config.reward).split("+")
    signals: list[Signal] = []
    if loop.cycle_keep is not None:
        signals.append(CycleFilter(model, prompter, config))
    if estimator in ("scst", "grpo") or config.policy.kl_weight > 0:
        signals.append(CaptionPolicy(model, prompter, config, estimator, comm, judge))
    if "gumbel" in (*straight_through, estimator):
        signals.append(GumbelCaptions(prompter, config))
    if loss.no_target_weight > 0:
        signals.append(NoTarget(prompter, config, comm))
    if loss.recaption_weight > 0:
        signals.append(Recaption(model, prompter, config))
    if loss.align_weight > 0:
        signals.append(Alignment(model, loss))
    if loss.distill_weight > 0:
        if average is None:
            raise ValueError("distillation needs the weight average")
        signals.append(Distillation(model, average, loss))
    return signals
