"""SA-V read from videos: the right frames, the right masks, pairs at the wanted distance, clear reasons."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from dual_loop.config import DataConfig
from dual_loop.data import sav_video
from dual_loop.data.dataset_builder import SOURCE_OPENERS
from dual_loop.data.sav_video import SavVideos
from dual_loop.data.video_frames import VideoFrames
from dual_loop.errors import ConfigError, SampleError
from video_maker import SIZE, code_of, number_of, true_mask, write_masklets, write_video

pytest.importorskip("av", reason="videos need PyAV")
FRAMES = 49
