"""Profiles of older formats, in today's words."""

from __future__ import annotations

from typing import Any

FORMAT = 2
"""Of the profiles written today."""

_COMPONENTS = {
    "feed": "prefetch",
    "decode": "decode_augment",
    "fetch_warm": "read_warm",
    "fetch_cold": "read_cold",
}
_BOTTLENECKS = {"feed": "prefetch", "decode": "decode_augment", "h2d": "host_to_device"}
_PHASES = {"feed": "prefetch"}
_STAGES = {"views": "decode_augment", "finish": "prefetch", "ready": "queue"}
_OPERATIONS = {"cut": "crop"}


def upgrade(values: dict[str, Any]) -> dict[str, Any]:
    """A profile's plain values in today's format; those of today are returned as they are.

    Args:
        values: Content of a profile.json of format 1 or 2.
    """
    if values["format"] == FORMAT:
        return values
    diagnosis = dict(values["verdict"])
    diagnosis["bottleneck"] = _today(diagnosis.pop("binds"), _BOTTLENECKS)
    upgraded = {
        "phases": [_phase(one) for one in values["phases"]],
        "breakdown": [_renamed(one, _COMPONENTS) for one in values["parts"]],
        "diagnosis": diagnosis,
        "actions": [_action(one) for one in values.get("actions", ())],
        "operations": [_renamed(one, _OPERATIONS) for one in values.get("operations", ())],
        "slow_images": [_slow_image(one) for one in values.get("tails", ())],
        "curves": values.get("curves", ()),
        "notes": values.get("notes", ()),
        "ranks": values.get("ranks", ()),
        "format": FORMAT,
    }
    gone = ("parts", "verdict", "tails")
    return {name: value for name, value in values.items() if name not in gone} | upgraded


def _today(name: str, names: dict[str, str]) -> str:
    return names.get(name, name)


def _renamed(record: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    return record | {"name": _today(record["name"], names)}


def _action(record: dict[str, Any]) -> dict[str, Any]:
    then = _today(record["then_binds"], _BOTTLENECKS)
    kept = {name: value for name, value in record.items() if name != "then_binds"}
    return kept | {"then_bottleneck": then}


def _slow_image(record: dict[str, Any]) -> dict[str, Any]:
    return {"jpeg_kind" if name == "kind" else name: value for name, value in record.items()}


def _phase(record: dict[str, Any]) -> dict[str, Any]:
    loader = record["loader"]
    if loader is not None:
        loader = {name: value for name, value in loader.items() if name != "views_by_kind"}
        stages = [_renamed(one, _STAGES) for one in loader["stages"].values()]
        loader |= {"stages": {one["name"]: one for one in stages}}
    return _renamed(record, _PHASES) | {"loader": loader}
