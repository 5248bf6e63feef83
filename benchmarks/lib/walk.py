"""Which files and functions does one sample walk through, and which one batch?

    python -m lib.walk            print them, and how many; needs PYTHONPATH=benchmarks
    python -m lib.walk --json FILE

The demo's run is profiled for a few steps after it has settled. A sample's walk is what the loader's threads
enter, from the shard's bytes to the batch in the queue, and what the training thread enters to take it out.
A batch's walk is what the training thread enters from asking for a step's batches to the end of the step.
Comprehensions and lambdas belong to the function around them.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

from lib.results import ROOT

ROOMS = ("pipeline", "model", "kernels", "train")
STEPS_BEFORE, STEPS = 6, 6
"""Steps until the run has settled, and steps that are looked at."""

Walk = dict[str, list[str]]
"""Functions by file, both in the order of their first call."""


class Tracer:
    """Records functions of the rooms by thread while it is switched on.

    Args:
        root: Folder that holds the rooms.
        start: Qualified name of the function whose call begins a step.
        end: Qualified name of the function whose return ends it.
        take: Qualified name of the loader's function that hands out a batch.
    """

    def __init__(self, root: Path, *, start: str, end: str, take: str) -> None:
        self._root = root
        self._names = {"start": start, "end": end, "take": take}
        self._homes: dict[CodeType, tuple[str, str] | None] = {}
        self._step = 0
        self._is_in_step = False
        self._takes = 0
        self.batch: Walk = {}
        self.taken: Walk = {}
        self.threads: dict[int, Walk] = {}

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Follow this thread and every thread that begins inside."""
        threading.setprofile(self._on_other)
        sys.setprofile(self._on_main)
        try:
            yield
        finally:
            sys.setprofile(None)
            threading.setprofile(None)

    def sample(self) -> Walk:
        """What the pipeline's threads entered, and the taking of a batch.

        A thread that enters `train` as well is not the pipeline's: it watches.
        """
        walk: Walk = {}
        for one in [*self.threads.values(), self.taken]:
            if not any(path.startswith("train/") for path in one):
                for path, functions in one.items():
                    walk.setdefault(path, []).extend(functions)
        return {path: list(dict.fromkeys(functions)) for path, functions in walk.items()}

    @property
    def _is_on(self) -> bool:
        return STEPS_BEFORE < self._step <= STEPS_BEFORE + STEPS

    def _on_main(self, frame: FrameType, event: str, argument: object) -> None:
        if event not in ("call", "return"):
            return
        home = self._home(frame.f_code)
        if home is None:
            return
        path, name = home
        if event == "return":
            self._is_in_step &= name != self._names["end"]
            self._takes -= name == self._names["take"]
            return
        if name == self._names["start"]:
            self._step += 1
            self._is_in_step = True
        self._takes += name == self._names["take"]
        if self._is_on and self._is_in_step:
            self._note(self.batch, path, name)
            if self._takes:
                self._note(self.taken, path, name)

    def _on_other(self, frame: FrameType, event: str, argument: object) -> None:
        if event != "call" or not self._is_on:
            return
        home = self._home(frame.f_code)
        if home is not None:
            self._note(self.threads.setdefault(threading.get_ident(), {}), *home)

    def _note(self, walk: Walk, path: str, name: str) -> None:
        functions = walk.setdefault(path, [])
        if name not in functions:
            functions.append(name)

    def _home(self, code: CodeType) -> tuple[str, str] | None:
        """(file below the root, qualified name); None for what is not ours or has no name."""
        if code not in self._homes:
            self._homes[code] = self._find_home(code)
        return self._homes[code]

    def _find_home(self, code: CodeType) -> tuple[str, str] | None:
        path = Path(code.co_filename).resolve()
        if code.co_name.startswith("<") or not path.is_relative_to(self._root):
            return None
        relative = path.relative_to(self._root)
        return (str(relative), code.co_qualname) if relative.parts[0] in ROOMS else None


def count(walk: Walk) -> dict[str, int]:
    """Files and functions."""
    return {"files": len(walk), "functions": sum(map(len, walk.values()))}


def show(title: str, walk: Walk) -> None:
    """Print a walk and its size."""
    size = count(walk)
    print(f"\n{title}: {size['files']} files, {size['functions']} functions")
    for path, functions in walk.items():
        print(f"  {path}")
        for name in functions:
            print(f"    {name}")


def trace(train: Callable[[Path], Any], tracer: Tracer) -> Mapping[str, Walk]:
    """Run the demo's training under the tracer."""
    with tempfile.TemporaryDirectory() as folder, tracer.recording():
        train(Path(folder))
    return {"sample": tracer.sample(), "batch": tracer.batch}


def train_demo(folder: Path) -> None:
    """The demo's run, as far as the tracer looks, without a checkpoint before its end."""
    from cmae.train.commands.demo.data import write_demo_shards
    from cmae.train.config_parser import load_recipe
    from cmae.train.loop.pretrain import pretrain

    write_demo_shards(folder)
    settings = {
        "data.shards": folder / "shards" / "train",
        "run.out": folder,
        "run.progress": False,
        "run.stop_at_step": STEPS_BEFORE + STEPS + 2,
    }
    pretrain(load_recipe("demo", overrides=settings))


def trace_this_tree() -> Mapping[str, Walk]:
    """The walks of the tree that this file lies in."""
    names = {"start": "StepBatches.next_batches", "end": "TrainStep.__call__"}
    return trace(train_demo, Tracer(ROOT, take="Loader.__next__", **names))


def main() -> int:
    """Trace and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the walks there too")
    arguments = parser.parse_args()
    walks = trace_this_tree()
    show("One sample, from the shard's bytes to the batch", walks["sample"])
    show("One batch, from next_batches to the end of the step", walks["batch"])
    if arguments.json:
        sizes = {name: count(walk) for name, walk in walks.items()}
        arguments.json.write_text(json.dumps({"sizes": sizes, "walks": walks}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
