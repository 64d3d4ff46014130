"""``speed.decode_graph``: a decoding step is recorded once as a CUDA graph and played again.

With a few rows a step on a GPU takes as long as the host needs to start its kernels (over a thousand at 36 layers);
playing a graph starts them all at once. A graph holds the addresses of its tensors, so a step changes tensors in place
and a graph lives no longer than the rows and weights that it was recorded with.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial

import torch

from dual_loop.config import Config
from dual_loop.model.sa2va import Sa2VA

logger = logging.getLogger("dual_loop")


def apply(model: Sa2VA, config: Config) -> None:
    """Record decoding steps where ``speed.decode_graph`` is ``auto`` and the model comes to a GPU."""
    if config.speed.decode_graph == "auto":
        model.after_loading.append(partial(record_steps, model))


def record_steps(model: Sa2VA, device: torch.device) -> None:
    """Put a :class:`Recorder` in the place of ``Sa2VA.repeated`` on a GPU."""
    if device.type == "cuda":
        model.repeated = Recorder()  # type: ignore[method-assign]


class Recorder:
    """``Sa2VA.repeated`` on a GPU, until a step could not be recorded; then steps stay as they are."""

    def __init__(self) -> None:
        self.works = True

    def __call__(self, step: Callable[[], None]) -> Callable[[], None]:
        """Return what runs ``step`` at its first call, records it at the second, and plays it from then on."""
        return RecordedStep(self, step) if self.works else step

    def record(self, step: Callable[[], None]) -> Callable[[], None]:
        """Record ``step``, which computes nothing meanwhile, and return what plays it; say once why that fails."""
        dtype, is_on = torch.get_autocast_dtype("cuda"), torch.is_autocast_enabled("cuda")
        try:
            graph = torch.cuda.CUDAGraph()
            # A copy that autocast keeps would have no values until the graph is played. Other threads may go on.
            with (
                torch.autocast("cuda", dtype, enabled=is_on, cache_enabled=False),
                torch.cuda.graph(graph, capture_error_mode="thread_local"),
            ):
                step()
        except Exception as error:  # whatever a driver, a library or a layer does not like
            self.works = False
            reason = (str(error) or type(error).__name__).splitlines()[0]
            logger.warning("decoding steps are not recorded as CUDA graphs (speed.decode_graph): %s", reason)
            return step
        return graph.replay


class RecordedStep:
    """A step that warms up once, is recorded, and is then played."""

    def __init__(self, recorder: Recorder, step: Callable[[], None]) -> None:
        self.recorder, self.run, self.is_warm, self.is_done = recorder, step, False, False

    def __call__(self) -> None:
        if self.is_warm and not self.is_done and self.recorder.works:
            self.run, self.is_done = self.recorder.record(self.run), True
        self.is_warm = True
        self.run()
