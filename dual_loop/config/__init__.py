"""The settings of a run: declared once in ``schema``, read, checked and offered as flags by ``load``."""

from dual_loop.config.load import (
    CONFIG_DIR,
    DEFAULT_CONFIG,
    add_data_flags,
    add_training_flags,
    load_config,
    overrides_from,
    parse_options,
    resolve_config_path,
)
from dual_loop.config.schema import (
    GATES,
    SETTINGS,
    Config,
    DataConfig,
    LoopConfig,
    LossConfig,
    ModelConfig,
    PolicyConfig,
    RewardConfig,
    SpeedConfig,
    TrainConfig,
    caption_gradient,
)
from dual_loop.errors import ConfigError

__all__ = [
    "CONFIG_DIR",
    "DEFAULT_CONFIG",
    "GATES",
    "SETTINGS",
    "Config",
    "ConfigError",
    "DataConfig",
    "LoopConfig",
    "LossConfig",
    "ModelConfig",
    "PolicyConfig",
    "RewardConfig",
    "SpeedConfig",
    "TrainConfig",
    "add_data_flags",
    "add_training_flags",
    "caption_gradient",
    "load_config",
    "overrides_from",
    "parse_options",
    "resolve_config_path",
]
