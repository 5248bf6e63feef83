"""What a profile is made of. Written as JSON by `cmae profile`; every report is drawn from these records."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from cmae.errors import CmaeError
from cmae.pipeline.stage_stats import LoaderSnapshot
from cmae.printable import printable
from cmae.train.profiling.analysis.upgrade import FORMAT, upgrade


@dataclass(frozen=True)
class Reading:
    """What one measurement window of a phase gave, on this rank."""

    phase: str
    step_times_ms: tuple[float, ...]
    wall_s: float
    images: int
    """Images of this rank."""
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

    @property
    def next_ms(self) -> float:
        """Mean time in `next` of a step, ms."""
        return 1000 * self.next_s / len(self.step_times_ms)

    @property
    def next_cpu_ms(self) -> float:
        """Mean CPU time of the training thread in `next` of a step, ms."""
        return 1000 * self.next_cpu_s / len(self.step_times_ms)

    @property
    def step_cpu_ms(self) -> float:
        """Mean CPU time of the training thread outside `next` of a step, ms."""
        return 1000 * self.step_cpu_s / len(self.step_times_ms)

    @property
    def images_per_s(self) -> float:
        """Rate of this rank."""
        return self.images / self.wall_s


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
    """synthetic, replay, replay_h2d, interference, prefetch, memory, warm, cold, full, loader_memory, ..."""
    what: str
    """One line for the reader: what runs in it and what does not."""
    step_ms: Estimate
    """Wall time of a step of one rank, ms."""
    images_per_s: Estimate
    """Over all ranks."""
    loader: dict[str, Any] | None = None
    """`LoaderSnapshot.to_dict()` of the whole phase; None where no loader runs."""
    step_times_ms: tuple[float, ...] = ()
    """Every single step, in order, for histograms."""


@dataclass(frozen=True)
class Component:
    """One line of the breakdown of the step."""

    name: str
    """model, python, straggler, collective, host_to_device, interference, prefetch, decode_augment,
    read_warm, read_cold, loader, residual."""
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
    then_bottleneck: str
    """What limits next."""
    measured_images_per_s: Estimate | None = None
    """After `--verify`."""


@dataclass(frozen=True)
class Diagnosis:
    """The sentence on top."""

    sentence: str
    bottleneck: str
    """What limits: model, decode_augment, storage, prefetch, host_to_device, collective, straggler, ..."""
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
    """decode; resize, flip; crop; colour jitter; grayscale; blur."""
    cpu_ms: Estimate
    """CPU time of all threads."""
    wall_ms: Estimate
    """Time of the whole view backend; on a GPU that of the device counts too."""
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
    """Wall time of a step of the full run, ms."""
    breakdown: tuple[Component, ...]
    """Their values sum to `step_ms`, the residual included."""
    diagnosis: Diagnosis
    actions: tuple[Action, ...] = ()
    curves: tuple[Curve, ...] = ()
    operations: tuple[Operation, ...] = ()
    """What each operation on an image costs, in their order; empty where it was not measured."""
    slow_images: tuple[dict[str, Any], ...] = ()
    """Time of an image by jpeg_kind and size, slowest first; empty where it was not measured."""
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
    """Read a profile back, of this format or an older one.

    Raises:
        CmaeError: no profile, or of another format.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        found = values["format"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CmaeError(f"{path} is no profile; `cmae profile` writes profile.json") from error
    if not isinstance(found, int) or found not in range(1, FORMAT + 1):
        raise CmaeError(
            f"{path} has format {printable(str(found))}, this version reads 1 to {FORMAT}: profile again"
        )
    try:
        profile = _from_dict(upgrade(values))
        _check(profile)
        return profile
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {printable(str(error))}"
        raise CmaeError(f"{path} is damaged, or no profile ({reason}): profile again") from error


_TYPES: dict[str, Any] = {
    "float": int | float,
    "int": int,
    "str": str,
    "tuple[float, ...]": tuple,
    "tuple[str, ...]": tuple,
    "dict[str, Any]": dict,
}
_NUMBERS = "tuple[float, ...]"


def _check(one: Any) -> None:
    """Compare a record, and the records in it, with what their fields are declared as.

    Raises:
        TypeError: A field is of another type.
    """
    for known in fields(one):
        value = getattr(one, known.name)
        wanted = _TYPES.get(str(known.type), object)
        if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not object):
            raise TypeError(f"{known.name} is {value!r}")
        for part in value if isinstance(value, tuple) else (value,):
            if is_dataclass(part):
                _check(part)
            elif known.type == _NUMBERS and not isinstance(part, int | float):
                raise TypeError(f"{known.name} holds {part!r}")
    if isinstance(one, Phase) and one.loader is not None:
        window = LoaderSnapshot.from_dict(one.loader)
        for counted in (window, *window.stages.values()):
            _check(counted)
    if isinstance(one, Profile):
        _check_profile(one)


def _check_profile(profile: Profile) -> None:
    """Raise ValueError or TypeError for what no profile says."""
    if profile.world_size < 1 or profile.global_batch_size < 1 or not profile.phases:
        raise ValueError("no rank, no image or no phase")
    if not profile.step_ms.value > 0:
        raise ValueError(f"a step of {profile.step_ms.value} ms")
    if not all(math.isfinite(one.ms.value) for one in profile.breakdown):
        raise ValueError("a component without a length")
    if not isinstance(profile.machine.get("cores") or 0, int | float):
        raise TypeError("a machine without a number of cores")
    for rows in (profile.slow_images, profile.ranks):
        if not all(isinstance(row, dict) for row in rows):
            raise TypeError("a row that is none")
    if not all(isinstance(note, str) for note in profile.notes):
        raise TypeError("a note that is no text")


def _from_dict(values: dict[str, Any]) -> Profile:
    records: dict[str, tuple[Any, ...]] = {
        "phases": tuple(_phase(one) for one in values["phases"]),
        "breakdown": tuple(
            Component(**one | {"ms": Estimate(**one["ms"])}) for one in values["breakdown"]
        ),
        "actions": tuple(_action(one) for one in values["actions"]),
        "curves": tuple(
            Curve(**one | {name: tuple(one[name]) for name in ("x", "images_per_s")})
            for one in values["curves"]
        ),
        "operations": tuple(_operation(one) for one in values["operations"]),
        "slow_images": tuple(values["slow_images"]),
        "notes": tuple(values["notes"]),
        "ranks": tuple(values["ranks"]),
    }
    step_ms, diagnosis = Estimate(**values["step_ms"]), Diagnosis(**values["diagnosis"])
    return Profile(**values | records | {"step_ms": step_ms, "diagnosis": diagnosis})


def _phase(values: dict[str, Any]) -> Phase:
    estimates = {name: Estimate(**values[name]) for name in ("step_ms", "images_per_s")}
    return Phase(**values | estimates | {"step_times_ms": tuple(values["step_times_ms"])})


def _action(values: dict[str, Any]) -> Action:
    measured = values["measured_images_per_s"]
    found = None if measured is None else Estimate(**measured)
    return Action(**values | {"measured_images_per_s": found})


def _operation(values: dict[str, Any]) -> Operation:
    costs = {name: Estimate(**values[name]) for name in ("cpu_ms", "wall_ms")}
    return Operation(**values | costs)
