from __future__ import annotations

from pathlib import Path

import pytest
from support.shard_data import indexed_shard, problem_lines

from cmae.pipeline.formats.dataset_folder import load_classes, stated_downscaled
from cmae.pipeline.shards.output_folder import claim_folder
from cmae.pipeline.shards.verify import verify_shards

BROKEN = [
    b"",
    b"{",
    b"[" * 200000,
    b"\xff\xfe",
    b"3",
    b"9" * 5000,
    b'{"presized": 3}',
    b'{"settings": 1}',
]


@pytest.mark.parametrize("content", BROKEN)
def test_a_broken_file_beside_the_shards_is_one_line_that_names_it(
    tmp_path: Path, content: bytes
) -> None:
    path = indexed_shard(tmp_path / "a.tar")
    for name in ("classes.json", "dataset.json"):
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=r"classes\.json .*correct it, or remove it"):
        load_classes(tmp_path)
    with pytest.raises(ValueError, match=r"dataset\.json .*correct it, or remove it"):
        stated_downscaled([path])
    with pytest.raises(ValueError, match=r"dataset\.json"):
        claim_folder(tmp_path, {})
    assert "classes.json" in problem_lines(verify_shards([path]))
