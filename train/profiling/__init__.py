"""Where the time of a training step goes: phases, a breakdown, a diagnosis, predictions and reports."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
