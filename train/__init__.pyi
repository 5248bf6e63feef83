from .config import Config
from .config_parser import load_recipe
from .loop.pretrain import pretrain
from .loop.training import Outcome

__all__ = ["Config", "Outcome", "load_recipe", "pretrain"]
