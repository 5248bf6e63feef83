"""How a global batch is shared out, by number and by what fits."""

import re

import pytest
import torch

from cmae.errors import CmaeError
from cmae.train import batch_split
from cmae.train.batch_split import BatchSplit, split_batch, step_memory
from cmae.train.config import Config
from cmae.train.config_parser import load_recipe
from cmae.train.distributed import World

GPU = torch.device("cuda", 0)
CPU = World(0, 1, torch.device("cpu"))


def recipe(**overrides: object) -> Config:
    settings = {"speed.micro_batch_size": "auto", "optim.precision": "bf16", **overrides}
    return load_recipe("cmae_vit_b", overrides={key: str(value) for key, value in settings.items()})


def test_a_batch_that_ranks_cannot_share_is_refused_with_one_that_they_can() -> None:
    with pytest.raises(ValueError, match=r"global_batch_size is 100.*3 ranks.*99"):
        BatchSplit.of(100, None, 3)
    with pytest.raises(ValueError, match=r"micro_batch_size is 5.*use for instance 4"):
        BatchSplit.of(64, 5, 4)
    assert BatchSplit.of(4096, 128, 8) == BatchSplit(128, 4)
    assert BatchSplit.of(4096, None, 32) == BatchSplit(128, 1)


@pytest.mark.parametrize(
    ("gigabytes", "expected"), [(500, 4096), (72, 1024), (36.3, 512), (9, 64), (4.7, 4)]
)
def test_auto_takes_the_largest_divisor_that_fits_and_says_so(
    gigabytes: float, expected: int
) -> None:
    lines: list[str] = []
    config = recipe()
    split = split_batch(config, CPU, log=lines.append, free_bytes=gigabytes * 1e9)
    assert split == BatchSplit(expected, 4096 // expected)
    assert f"auto takes {expected} images a pass" in lines[0]
    memory = step_memory(config, CPU.device)
    assert memory.total(expected) + memory.snapshot <= gigabytes * 1e9
    if expected < 4096:
        assert memory.total(2 * expected) + memory.snapshot > gigabytes * 1e9


def test_auto_divides_a_share_that_is_no_power_of_two() -> None:
    config = recipe(**{"optim.global_batch_size": 3 * 35})
    assert split_batch(config, CPU, free_bytes=6.0e9) == BatchSplit(21, 5)
    assert split_batch(config, CPU, num_ranks=3, free_bytes=500e9) == BatchSplit(35, 1)


def test_auto_keeps_the_micro_batch_of_the_run_that_is_continued_while_it_fits() -> None:
    lines: list[str] = []
    kept = split_batch(recipe(), CPU, before=128, log=lines.append, free_bytes=72e9)
    assert kept == BatchSplit(128, 32)
    assert "128 images a pass, as before" in lines[0]
    assert split_batch(recipe(), CPU, before=1024, free_bytes=36.3e9) == BatchSplit(512, 8)


def test_where_nothing_fits_the_message_has_the_numbers() -> None:
    expected = (
        r"micro_batch_size is 'auto'.*AdamW take 2\.5 GB.*2\.0 GB are free on cpu.*try a number"
    )
    with pytest.raises(CmaeError, match=expected):
        split_batch(recipe(), CPU, free_bytes=2e9)
    # One image would fit, and the heads' batch norm on one rank needs two.
    with pytest.raises(CmaeError, match="auto"):
        split_batch(recipe(), CPU, free_bytes=step_memory(recipe(), CPU.device).total(1) + 1)


def test_fp32_counts_twice_the_activations_of_16_bits() -> None:
    half, full = (
        step_memory(recipe(**{"optim.precision": name}), CPU.device) for name in ("bf16", "fp32")
    )
    assert full.activations_per_image == 2 * half.activations_per_image
    assert full.cast_weights == 0


def test_the_count_of_memory_is_that_of_the_first_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    # benchmarks/results/2026-11-27_levers_nvidia-h100-…: peaks of 10.12 GB eager, 9.55 GB in compiled blocks.
    monkeypatch.setattr(batch_split, "compute_capability", lambda device: (9, 0))
    for compiled, peak in (("none", 10.12e9), ("blocks", 9.55e9)):
        counted = step_memory(recipe(**{"speed.compile": compiled}), GPU).total(128)
        assert counted == pytest.approx(peak, rel=0.1)
        assert counted >= 0.99 * peak  # too little memory ends a run, too much costs a pass


def test_free_memory_of_a_gpu_leaves_its_reserves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (70e9, 80e9))
    assert batch_split._free_bytes(GPU) == 70e9 - 0.08 * 80e9 - 2e9


def test_other_words_and_sizes_are_refused() -> None:
    for value in ("0", "-3", "largest"):
        with pytest.raises(CmaeError, match=re.escape("micro_batch_size")):
            recipe(**{"speed.micro_batch_size": value})
