"""The settings of a run: declared once in ``schema``, read, checked and offered as flags by ``load``."""

from dual_loop.config.derived import caption_gradient as caption_gradient
from dual_loop.config.derived import listener_paths as listener_paths
from dual_loop.config.derived import precision as precision
from dual_loop.config.load import CONFIG_DIR as CONFIG_DIR
from dual_loop.config.load import DEFAULT_CONFIG as DEFAULT_CONFIG
from dual_loop.config.load import TRUST_VARIABLE as TRUST_VARIABLE
from dual_loop.config.load import add_data_flags as add_data_flags
from dual_loop.config.load import add_training_flags as add_training_flags
from dual_loop.config.load import add_trust_flag as add_trust_flag
from dual_loop.config.load import load_config as load_config
from dual_loop.config.load import overrides_from as overrides_from
from dual_loop.config.load import resolve_config_path as resolve_config_path
from dual_loop.config.schema import SETTINGS as SETTINGS
from dual_loop.config.schema import Config as Config
from dual_loop.config.schema import DataConfig as DataConfig
from dual_loop.config.schema import LoopConfig as LoopConfig
from dual_loop.config.schema import LossConfig as LossConfig
from dual_loop.config.schema import ModelConfig as ModelConfig
from dual_loop.config.schema import PolicyConfig as PolicyConfig
from dual_loop.config.schema import RewardConfig as RewardConfig
from dual_loop.config.schema import SpeedConfig as SpeedConfig
from dual_loop.config.train import TrainConfig as TrainConfig
from dual_loop.config.words import FIGURES as FIGURES
from dual_loop.config.words import GATES as GATES
from dual_loop.config.words import LISTENERS as LISTENERS
from dual_loop.errors import ConfigError as ConfigError
