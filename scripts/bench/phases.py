"""The benchmark counts and times with what plans a run: ``dual_loop.training.counting``."""

from dual_loop.training.counting import PHASES, PhaseClock, ProductCounter, watch, watch_model

__all__ = ["PHASES", "PhaseClock", "ProductCounter", "watch", "watch_model"]
