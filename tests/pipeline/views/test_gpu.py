"""The graph with mixed decode: pixels beside the reference, and life after a batch that fails."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.loaders import loader_of
from support.pipeline_data import jpeg, photo, toy_mask, write_tar

from cmae.kernels import color_jitter
from cmae.pipeline import ViewConfig, draw_view_params
from cmae.pipeline.formats.shard_index import build_index, index_path, save_index
from cmae.pipeline.views.color_batch import ColorOp, apply_color
from cmae.pipeline.views.reference import reference_views

pytestmark = pytest.mark.gpu
VIEWS = ViewConfig(color="none")


def test_mixed_decode_gives_the_references_pixels() -> None:
    from cmae.pipeline.views.dali import DaliViews

    files = [jpeg(photo(h, w, seed=h)) for h, w in [(180, 240), (400, 300), (97, 501), (260, 256)]]
    sizes = np.array([Image.open(io.BytesIO(file)).size for file in files])
    params = draw_view_params(
        VIEWS,
        seed=0,
        epoch=0,
        sample_id=np.arange(len(files)),
        height=sizes[:, 1],
        width=sizes[:, 0],
    )
    view_backend = DaliViews(VIEWS, torch.device("cuda", 0), batch_size=len(files), num_threads=2)
    encoded = [np.frombuffer(file, np.uint8) for file in files]
    made = view_backend.collect(view_backend.submit(encoded, params))
    view_backend.close()
    for row, file in enumerate(files):
        expected = reference_views(file, params, views=VIEWS, row=row)
        for view, reference in zip((made.online, made.target), expected, strict=True):
            error = np.abs(view[row].cpu().numpy().astype(int) - reference)
            assert error.mean() < 1.0, row


def test_batches_after_an_undecodable_one_still_come(tmp_path: Path) -> None:
    good = [jpeg(photo(90, 120, seed=i)) for i in range(24)]
    # Header, size and end are those of a JPEG, so that only the decoder can refuse it.
    broken = bytearray(good[5])
    start = broken.index(b"\xff\xc4") + 4
    broken[start : start + 60] = b"\xff" * 60
    good[5] = bytes(broken)
    tar = write_tar(tmp_path / "x.tar", [(f"s{i:02d}", data, i) for i, data in enumerate(good)])
    save_index(build_index(tar), index_path(tar))
    ledger = tmp_path / "bad.jsonl"
    with loader_of(
        tar,
        VIEWS,
        batch_size=4,
        global_batch_size=4,
        draw_mask=toy_mask,
        device="cuda",
        shuffle=False,
        ledger=ledger,
        max_bad_fraction=0.5,
    ) as loader:
        batches = [next(loader) for _ in range(12)]
    assert [len(batch.online) for batch in batches] == [4] * 12
    keys = [json.loads(line)["key"] for line in ledger.read_text().splitlines()]
    assert set(keys) == {"s05"}


@pytest.mark.parametrize("op", [None, color_jitter], ids=["chain", "fused"])
@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_colour_on_a_batch_is_the_hosts_and_never_waits(mode: str, op: ColorOp | None) -> None:
    pixels = torch.from_numpy(np.stack([photo(224, 224, seed=i) for i in range(64)]))
    sizes = np.full(64, 300)
    params = draw_view_params(
        ViewConfig(), seed=0, epoch=0, sample_id=np.arange(64), height=sizes, width=sizes
    )
    expected = apply_color(pixels, params, mode=mode).int()
    on_device = pixels.cuda()
    apply_color(on_device, params, mode=mode, op=op)  # loads kernels and pins memory
    torch.cuda.set_sync_debug_mode("error")
    try:
        made = apply_color(on_device, params, mode=mode, op=op)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    error = (made.cpu().int() - expected).abs()
    # CUDA fuses multiply and add where the host rounds in between: single pixels, before a strong contrast.
    assert error.float().mean() < 0.02
    assert error.max() <= 4
