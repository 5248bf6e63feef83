"""What a profile is made of. Written as JSON by `cmae profile`; every report is drawn from these records."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cmae.errors import CmaeError
from cmae.pipeline import LoaderSnapshot

FORMAT = 1


@dataclass(frozen=True)
class Reading:
    """What one stretch of a phase measured, on this rank."""

    phase: str
    step_times_ms: tuple[float, ...]
    wall_s: float
    images: int
    """Of this rank."""
    next_s: float
    """Seconds that the training thread spent in `next`."""
    next_cpu_s: float
    """CPU seconds of the training thread in `next`: work that no background thread does for it."""
    step_cpu_s: float
    """CPU seconds of the training thread outside `next`."""
    process_cpu_s: float
    """CPU seconds of this process and its children, all threads."""
    others_cpu_s: float
    """CPU seconds that other processes took on the cores this process may use; 0 where unknown."""
    run_delay_s: float
    """Seconds that this process's threads waited for a core, together; 0 where unknown."""
    loader: LoaderSnapshot | None = None

    @property
    def step_ms(self) -> float:
        """Mean wall time of a step, ms."""
        return 1000 * self.wall_s / len(self.step_times_ms)


@dataclass(frozen=True)
class Estimate:
    """A measured or derived number with its 95 % confidence interval."""

    value: float
    low: float
    high: float
    n: int
    """Independent repetitions behind it; 0 for a prediction."""


@dataclass(frozen=True)
class Phase:
    """One way of running the step or the loader, repeated and interleaved with the others."""

    name: str
    """synthetic, replay, replay_h2d, interference, memory, warm, cold, full, loader_memory, ..."""
    what: str
    """One line for the reader: what runs in it and what does not."""
    step_ms: Estimate
    """Wall time of a step of one rank, ms."""
    images_per_s: Estimate
    """Over all ranks."""
    loader: dict[str, Any] | None = None
    """`LoaderSnapshot.to_dict()` of the whole phase; None where no loader runs."""
    step_times_ms: tuple[float, ...] = ()
    """Every single step, in order, for histograms and the trace."""


@dataclass(frozen=True)
class Part:
    """One line of the account of the step."""

    name: str
    """model, host_to_device, decode, feed, fetch_warm, fetch_cold, interference, collective, straggler,
    residual."""
    ms: Estimate
    note: str
    """How it was found, and what it means."""


@dataclass(frozen=True)
class Action:
    """Something to change, with what it would bring."""

    what: str
    """For a person: 'decode on 4 more cores'."""
    overrides: dict[str, Any]
    """Dotted settings that apply it; empty where it is no setting (a faster disk)."""
    predicted_images_per_s: float
    then_binds: str
    """The resource that limits next."""
    measured_images_per_s: Estimate | None = None
    """After `--verify`."""


@dataclass(frozen=True)
class Verdict:
    """The sentence on top."""

    sentence: str
    binds: str
    """Resource that limits: model, decode, storage, feed, h2d, collective, straggler, ..."""
    headroom: float
    """Rate of the second most limiting resource over that of the first; >= 1."""


@dataclass(frozen=True)
class Curve:
    """Predicted rate against one setting."""

    title: str
    x_label: str
    x: tuple[float, ...]
    images_per_s: tuple[float, ...]
    now: float
    """Today's value of the setting."""


@dataclass(frozen=True)
class Operation:
    """What one operation of the views costs an image: with it, less without it and all that follows."""

    name: str
    """decode; resize, flip; cut; colour jitter; grayscale; blur."""
    cpu_ms: Estimate
    """CPU time of all threads."""
    wall_ms: Estimate
    """Time of the whole view maker; on a GPU that of the device counts too."""
    images_per_s: float
    """Rate with all operations up to this one, nothing else running."""


@dataclass(frozen=True)
class Profile:
    """Everything that one `cmae profile` found."""

    created: str
    machine: dict[str, Any]
    config: dict[str, Any]
    global_batch_size: int
    world_size: int
    phases: tuple[Phase, ...]
    step_ms: Estimate
    """Of the full run."""
    parts: tuple[Part, ...]
    """Their values sum to `step_ms`, the residual included."""
    verdict: Verdict
    actions: tuple[Action, ...] = ()
    curves: tuple[Curve, ...] = ()
    tails: tuple[dict[str, Any], ...] = ()
    """Decode time by JPEG kind and size: kind, megapixels, items, ms."""
    operations: tuple[Operation, ...] = ()
    """What each operation on an image costs, in their order; empty where it was not measured."""
    gpu: dict[str, Any] = field(default_factory=dict)
    """Mean load of decoder, SM, memory and PCIe while the full run went; empty without a GPU."""
    ranks: tuple[dict[str, Any], ...] = ()
    """With several ranks, of each: rank, step_ms (without collectives), wait_ms (for data in a full step)."""
    notes: tuple[str, ...] = ()
    """What could not be measured here, and why."""
    format: int = FORMAT

    def save(self, path: Path) -> None:
        """Write as JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")


def load_profile(path: Path) -> Profile:
    """Read a profile back.

    Raises:
        CmaeError: no profile, or of another format.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        found = values["format"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise CmaeError(f"{path} is no profile; `cmae profile` writes profile.json") from error
    if found != FORMAT:
        raise CmaeError(f"{path} has format {found}, this version reads {FORMAT}: profile again")
    values["phases"] = tuple(_phase(phase) for phase in values["phases"])
    values["step_ms"] = Estimate(**values["step_ms"])
    values["parts"] = tuple(
        Part(**part | {"ms": Estimate(**part["ms"])}) for part in values["parts"]
    )
    values["verdict"] = Verdict(**values["verdict"])
    values["actions"] = tuple(_action(action) for action in values["actions"])
    values["curves"] = tuple(
        Curve(**curve | {name: tuple(curve[name]) for name in ("x", "images_per_s")})
        for curve in values["curves"]
    )
    values["operations"] = tuple(_operation(one) for one in values.get("operations", ()))
    for name in ("tails", "notes", "ranks"):
        values[name] = tuple(values.get(name, ()))
    return Profile(**values)


def _phase(values: dict[str, Any]) -> Phase:
    estimates = {name: Estimate(**values[name]) for name in ("step_ms", "images_per_s")}
    return Phase(**values | estimates | {"step_times_ms": tuple(values["step_times_ms"])})


def _action(values: dict[str, Any]) -> Action:
    measured = values["measured_images_per_s"]
    return Action(**values | {"measured_images_per_s": measured and Estimate(**measured)})


def _operation(values: dict[str, Any]) -> Operation:
    costs = {name: Estimate(**values[name]) for name in ("cpu_ms", "wall_ms")}
    return Operation(**values | costs)
