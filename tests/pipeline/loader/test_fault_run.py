"""One epoch over 5000 images, exactly 1 % of them truncated and 0.1 % with a flipped bit, on two ranks."""

from __future__ import annotations

import json
import tarfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from support.fault_data import bit_flip, noise, truncated
from support.loaders import loader_of
from support.pipeline_data import toy_mask, write_tar

from cmae.pipeline import ViewConfig
from cmae.pipeline.bad_samples import BEFORE_FIRST_EPOCH, read_ledger
from cmae.pipeline.formats.dataset_index import build_indices

VIEWS = ViewConfig(img_size=16, source_crop_size=16, target_shift=0)
NUM, PER_SHARD = 5000, 1000


class Planted(NamedTuple):
    """Paths, and (shard number, record_number) of the faults of each sort."""

    paths: list[Path]
    cut_before: set[tuple[int, int]]
    """Truncated when the shard was written."""
    cut_after: set[tuple[int, int]]
    """The rest of the file overwritten with zeros after the shard was indexed."""
    flipped: set[tuple[int, int]]
    """One bit changed after the shard was indexed."""


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    """1 % truncated (30 before the index was made, 20 after), 0.1 % flipped (5, after)."""
    folder = tmp_path_factory.mktemp("faults")
    rng = np.random.default_rng(0)
    # Damage after indexing lies outside the ends that the digest covers: a stale index is another fault.
    middle = [(s, p) for s in range(NUM // PER_SHARD) for p in range(100, PER_SHARD - 100)]
    chosen = [middle[i] for i in rng.choice(len(middle), 55, replace=False)]
    cut_before, cut_after, flipped = set(chosen[:30]), set(chosen[30:50]), set(chosen[50:])
    paths = []
    for shard in range(NUM // PER_SHARD):
        samples = []
        for record_number in range(PER_SHARD):
            number = shard * PER_SHARD + record_number
            image = noise(number, 16, 16)
            if (shard, record_number) in cut_before:
                image = truncated(image)
            samples.append((f"{number:05d}", image, number))
        paths.append(write_tar(folder / f"part-{shard}.tar", samples))
    assert all(result.error is None for result in build_indices([str(path) for path in paths]))
    for shard, path in enumerate(paths):
        harm_in_place(path, shard, cut_after, flipped)
    return Planted(paths, cut_before, cut_after, flipped)


def harm_in_place(
    path: Path, shard: int, cut: set[tuple[int, int]], flipped: set[tuple[int, int]]
) -> None:
    with tarfile.open(path) as tar:
        members = {name: tar.getmember(name) for name in tar.getnames()}
    with open(path, "r+b") as file:
        for faults, harm in ((cut, truncated), (flipped, bit_flip)):
            for _, record_number in (fault for fault in faults if fault[0] == shard):
                member = members[f"{shard * PER_SHARD + record_number:05d}.jpg"]
                file.seek(member.offset_data)
                data = file.read(member.size)
                file.seek(member.offset_data)
                file.write(harm(data).ljust(member.size, b"\0"))


def run_epoch(
    planted: Planted, ledger: Path, *, global_batch_size: int, **options
) -> tuple[Counter[int], dict[int, int], int]:
    """How often each sample came on two ranks, the label that it came with, and the number of bad samples."""
    batch_size = global_batch_size // 2
    loaders = [
        loader_of(
            planted.paths,
            VIEWS,
            batch_size=batch_size,
            global_batch_size=global_batch_size,
            draw_mask=toy_mask,
            rank=rank,
            world_size=2,
            num_threads=1,
            ledger=ledger,
            max_bad_fraction=0.02,
            **options,
        )
        for rank in range(2)
    ]
    seen: Counter[int] = Counter()
    labels: dict[int, int] = {}
    bad = 0
    for loader in loaders:
        with loader:
            for batch in loader:
                # It also brings what was met after the last full batch of epoch 0.
                if batch.epoch == 1:
                    break
                ids = (
                    (batch.sample_id >> 32) * PER_SHARD + (batch.sample_id & 0xFFFFFFFF)
                ).tolist()
                seen.update(ids)
                labels |= dict(zip(ids, batch.label.tolist(), strict=True))
            bad += loader.bad_samples
    return seen, labels, bad


def numbers(faults: set[tuple[int, int]]) -> set[int]:
    return {shard * PER_SHARD + record_number for shard, record_number in faults}


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["cpu", "dali"])
def test_no_good_sample_is_lost_and_every_fault_is_listed_once(
    planted: Planted, tmp_path: Path, backend: str
) -> None:
    ledger = tmp_path / "bad.jsonl"
    seen, labels, bad = run_epoch(
        planted, ledger, global_batch_size=70, source="indexed", view_backend=backend
    )
    replaced = planted.cut_after | planted.flipped
    expected = set(range(NUM)) - numbers(planted.cut_before)
    assert seen == Counter(expected)  # each exactly once; 71 x 70 = 4970 is the whole epoch
    assert bad == len(replaced) == 25
    good = expected - numbers(replaced)
    assert {sample: labels[sample] for sample in good} == {sample: sample for sample in good}
    lines = list(read_ledger(ledger))
    listed = Counter((planted.paths.index(Path(line.shard)), line.record_number) for line in lines)
    assert listed == Counter(planted.cut_before | replaced)  # each once, and nothing else
    for line in lines:
        fault = planted.paths.index(Path(line.shard)), line.record_number
        assert line.key == f"{fault[0] * PER_SHARD + fault[1]:05d}"
        assert line.epoch == (BEFORE_FIRST_EPOCH if fault in planted.cut_before else 0)
        assert ("CRC32" in line.reason) == (fault in replaced)
    ranks = {json.loads(line)["rank"] for line in ledger.read_text().splitlines()}
    assert ranks == {0, 1}


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["cpu", "dali"])
def test_in_a_stream_the_flipped_bits_pass_and_the_truncated_files_do_not(
    planted: Planted, tmp_path: Path, backend: str
) -> None:
    ledger = tmp_path / "bad.jsonl"
    seen, labels, _ = run_epoch(
        planted, ledger, global_batch_size=20, source="stream", view_backend=backend
    )
    assert set(seen.values()) == {1}
    # A flipped bit shows only where it makes a code that the decoder does not know.
    shown = {sample for sample in seen if labels[sample] != sample}
    assert shown < numbers(planted.flipped)
    # All that the header walk passes came, but for what does not fill the last batch of a rank. A tail of
    # zeros has lost its end marker, so the walk finds it too.
    cut = planted.cut_before | planted.cut_after
    missing = set(range(NUM)) - numbers(cut) - set(seen)
    assert not set(seen) & numbers(cut)
    assert len(missing) < 2 * 10
    listed = Counter(
        (planted.paths.index(Path(line.shard)), line.record_number)
        for line in read_ledger(ledger)
        if line.epoch == 0
    )
    assert set(listed.values()) == {1}
    assert numbers(set(listed)) == numbers(cut) | shown
