"""The error that says all a user has to know."""

from __future__ import annotations


class CmaeError(ValueError):
    """What a user can mend: a setting, a file, the data. `cmae` prints its message without a traceback.

    Args:
        message: Whole message; an empty one is composed of the other arguments.
        key: Setting or file that it concerns, such as 'optim.epochs'.
        found: Value that is refused.
        allowed: What is accepted instead, such as '>= 1'.
        repair: What to do about it.
    """

    exit_code = 1
    """What `cmae` exits with."""
    is_on_every_rank = False
    """Every rank of the run raises it, so that one of them has to print it."""

    def __init__(
        self,
        message: str = "",
        *,
        key: str = "",
        found: object = None,
        allowed: str = "",
        repair: str = "",
    ) -> None:
        self.key, self.found, self.allowed, self.repair = key, found, allowed, repair
        composed = f"{key} is {found!r}; it must be {allowed}{repair and f': {repair}'}"
        super().__init__(message or composed)

    def within(self, section: str) -> CmaeError:
        """The same error with its key inside a section of the configuration."""
        key = f"{section}.{self.key}"
        return CmaeError(key=key, found=self.found, allowed=self.allowed, repair=self.repair)


def require(holds: bool, key: str, found: object, allowed: str, *, repair: str = "") -> None:
    """Refuse a setting that is out of its range.

    Args:
        holds: Whether the setting is in its range.
        key: Name of the setting.
        found: Its value.
        allowed: Its range, as a phrase after 'it must be'.
        repair: What to do about it, where the range does not say it.

    Raises:
        CmaeError: It is not.
    """
    if not holds:
        raise CmaeError(key=key, found=found, allowed=allowed, repair=repair)
