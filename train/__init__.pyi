from .config import Config
from .config_parser import load_recipe
from .loop.pretrain import Outcome, pretrain

__all__ = ["Config", "Outcome", "load_recipe", "pretrain"]
