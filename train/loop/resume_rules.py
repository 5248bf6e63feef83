"""What becomes of every setting when a run goes on with another value than its checkpoint's.

Three answers: the setting is *applied* from the next step on, and the run says so; it is *free*, because it
changes no result beyond rounding; or it is *refused* by its name, with what to do instead. Some are refused
only inside an epoch, whose samples would else come twice or never. docs/checkpoints.md prints the table.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from cmae.model.export.stored import CheckpointError, current_fields
from cmae.pipeline import LoaderState
from cmae.train.config import Config

_FRESH = "start a new run from its weights (--init_from), or keep the value"


class Rule(NamedTuple):
    """What happens to one setting."""

    kind: Literal["applied", "free", "refused", "between epochs"]
    why: str


_FREE = Rule("free", "changes no result")
_ROUNDING = Rule("free", "changes results within rounding")
_SPEED = Rule("free", "changes when batches come, not what they hold")
_LEFT_OUT = Rule("free", "a run makes it from other settings")
_ORDER = Rule("between epochs", "the order of the samples: inside an epoch some would come twice")
_VIEWS = Rule("applied", "views of the samples that follow")
_SCHEDULE = Rule("applied", "the schedule is computed anew for the step that comes next")
_LOSS = Rule("applied", "the loss from the next step on")
_BUILT = Rule("refused", f"it shapes the model's function: {_FRESH}")

RULES: dict[str, Rule] = {
    "seed": Rule(
        "refused", f"order, views and masks would change in the middle of the run: {_FRESH}"
    ),
    "init_from": Rule(
        "refused",
        "a run's weights come from its checkpoint: leave it out, or choose another run.out",
    ),
    "run.*": _FREE,
    "speed.*": _ROUNDING,
    "speed.micro_batch_size": Rule("applied", "batch norm in the heads sees one micro-batch"),
    "data.shards": Rule(
        "applied", "other places of the same samples; other samples are refused, shard by shard"
    ),
    "data.source": Rule(
        "applied", "an index and a stream count differently: refused where it matters"
    ),
    **dict.fromkeys(("data.batch_size", "data.global_batch_size", "data.seed"), _LEFT_OUT),
    **dict.fromkeys(
        ("data.shuffle", "data.shuffle_block", "data.shuffle_window", "data.last_batch"), _ORDER
    ),
    "data.max_bad_fraction": Rule("applied", "counted since step 0"),
    "data.*": _SPEED,
    "data.views.*": _VIEWS,
    "model.*": _BUILT,
    "model.mask_ratio": Rule("applied", "masks of the samples that follow"),
    "model.mask_unit": Rule("applied", "masks of the samples that follow"),
    "model.contrastive_loss": Rule("applied", "info_nce and byol; none is another model: refused"),
    "model.reconstruction_weight": Rule("applied", "0 is another model: refused"),
    **dict.fromkeys(
        (
            "model.contrastive_weight",
            "model.two_tau_factor",
            "model.temperature",
            "model.norm_pix_loss",
        ),
        _LOSS,
    ),
    **dict.fromkeys(
        ("model.momentum", "model.momentum_schedule"),
        Rule("applied", "the target's average from the next step on"),
    ),
    "optim.global_batch_size": Rule(
        "refused",
        f"steps, schedule and the place in the data count global batches: {_FRESH}",
    ),
    **dict.fromkeys(
        ("optim.epochs", "optim.total_steps", "optim.warmup_epochs", "optim.lr_per_256"), _SCHEDULE
    ),
    **dict.fromkeys(
        ("optim.weight_decay", "optim.betas"), Rule("applied", "all groups of the optimiser")
    ),
    "optim.decay_tokens": Rule("applied", "the tokens change their group and keep their moments"),
    "optim.impl": Rule("refused", f"the optimisers' states have other forms: {_FRESH}"),
    "optim.clip_grad": Rule("applied", "from the next step on"),
    "optim.precision": Rule("applied", "from the next step on; the loss scale begins anew"),
    "optim.residual": Rule("applied", "from the next step on"),
    "optim.gradient_compression": Rule("applied", "from the next step on"),
    "optim.spike_factor": Rule("applied", "from the next step on; the mean of the norms goes on"),
    "optim.max_skipped_steps": Rule("applied", "counted anew"),
    "optim.max_rollbacks": Rule("applied", "those that were made count"),
}
"""By dotted name; 'section.*' is for the settings of a section that have no line of their own."""

_OLD_DEFAULTS = {
    "optim.target_fp8": False,
    "optim.warmup_start": 1e-4,
    "optim.min_lr": 0.0,
}
"""Settings that older checkpoints hold, with the values that hold for every run now."""


def rule_of(name: str) -> Rule:
    """The rule of a setting by its dotted name.

    Raises:
        KeyError: There is none.
    """
    if name in RULES:
        return RULES[name]
    return RULES[name.rsplit(".", 1)[0] + ".*"]


def check_changes(path: Path, stored: Mapping[str, Any], config: Config) -> list[str]:
    """Compare a checkpoint's settings with this run's.

    Args:
        path: Path of the checkpoint, for the message.
        stored: Whole checkpoint, its configuration under today's keys.
        config: Configuration of this run.

    Returns:
        A line for each change that is applied.

    Raises:
        CheckpointError: A change is refused; names every such setting, both values, and what to do.
    """
    before = dict(_flat({**stored["config"], "model": current_fields(stored["config"]["model"])}))
    now, default = dict(_flat(config.to_dict())), dict(_flat(Config().to_dict()))
    place = LoaderState.from_dict(stored["loader"])
    applied, refused = [], []
    for name in [*now, *(name for name in before if name not in now)]:
        then = before.get(name, default.get(name))
        if _means_the_same(name, then, now, before):
            continue
        line = f"{name}: {_shown(then)} in the checkpoint, {_shown(now.get(name))} now"
        rule = _judge(name, then, now.get(name))
        if rule.kind == "refused" or (rule.kind == "between epochs" and place.offset):
            refused.append(f"{line} ({rule.why})")
        elif rule.kind != "free":
            applied.append(line)
    if refused:
        inside = f"inside epoch {place.epoch}, {place.offset} {place.unit}s from its beginning"
        where = f" ({inside})" if place.offset else ""
        raise CheckpointError(
            f"{path}{where} does not go on with these changes:\n  "
            + "\n  ".join(refused)
            + "\nset them as in the checkpoint, or choose another run.out"
        )
    return applied


def _means_the_same(
    name: str, then: Any, now: Mapping[str, Any], before: Mapping[str, Any]
) -> bool:
    if name not in now:
        return bool(then == _OLD_DEFAULTS.get(name, then if name.startswith("model.") else None))
    if name == "init_from":  # a resumed run needs it no more
        return now[name] in (None, then)
    if name == "data.shuffle_window":  # which blocks of one sample do not care about
        blocks = (one.get("data.shuffle_block", 1) for one in (now, before))
        shuffles = any(one.get("data.shuffle", True) for one in (now, before))
        return bool(then == now[name]) or not shuffles or all(block == 1 for block in blocks)
    if name == "data.shuffle_block":
        shuffles = any(one.get("data.shuffle", True) for one in (now, before))
        return bool(then == now[name]) or not shuffles
    return bool(then == now[name])


def _judge(name: str, then: Any, now: Any) -> Rule:
    if name == "model.contrastive_loss" and "none" in (then, now):
        return _BUILT
    if name == "model.reconstruction_weight" and 0 in (then, now):
        return _BUILT
    try:
        return rule_of(name)
    except KeyError:  # a setting that older runs had
        return Rule("applied", "gone")


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping) and name not in ("storage_options",):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", list(value) if isinstance(value, tuple) else value


def render_rules(names: list[str]) -> str:
    """Markdown: a row for each rule, with the settings that it holds for, in the order of `names`."""
    found: dict[Rule, list[str]] = {}
    for name in names:
        found.setdefault(rule_of(name), []).append(name)
    rows = [
        f"| {rule.kind} | {rule.why} | {', '.join(f'`{name}`' for name in members)} |"
        for rule, members in found.items()
    ]
    return "\n".join(["| | why | settings |", "| --- | --- | --- |", *rows])
