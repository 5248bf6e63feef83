"""One op a file: dispatcher, torch reference with the same signature, Triton kernel and its launcher.

The ops are loaded when they are first used. An op has the name of its module; the package's name is the op.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
