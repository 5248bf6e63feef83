from .any_loader import profile_loader

__all__ = ["profile_loader"]
