"""Pages of runs: every part is there, pictures show what they say, what is missing is said."""

from __future__ import annotations

import io
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.tiny_runs import SMALL, run

from cmae.errors import CmaeError
from cmae.model import build_model
from cmae.train.commands.main import main
from cmae.train.evaluation.encoders import from_model
from cmae.train.reports.charts import curve_chart
from cmae.train.reports.pictures import RIGHT, WRONG, _cls_attention, neighbours_picture
from cmae.train.reports.run import different_settings, read_run

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, small_shards: str) -> list[Path]:
    root = tmp_path_factory.mktemp("runs")
    run(small_shards, root / "a", **{"optim.total_steps": 3, "run.eval_shards": small_shards})
    run(small_shards, root / "b", **{"optim.total_steps": 3, "model.contrastive_loss": "none"})
    words = ["--train", small_shards, "--val", small_shards, "--cache", "null", "--k", "1"]
    assert main(["evaluate", "knn", str(root / "a"), *words]) == 0
    return [root / "a", root / "b"]


def test_a_report_has_every_part_and_needs_no_network(
    runs: list[Path], small_shards: str, tmp_path: Path
) -> None:
    out = tmp_path / "x.html"
    assert main(["report", str(runs[0]), "--shards", small_shards, "--out", str(out)]) == 0
    page = out.read_text()
    for part in (
        *("Curves", "Evaluation", "Reconstructions", "Nearest neighbours", "Attention"),
        *("Map of the features", "First batch", "Configuration", "k-NN accuracy while training"),
    ):
        assert part in page, part
    assert "100.00 %" in page
    assert page.count("data:image/png;base64,") == 5
    assert not re.search(r'(?:src|href)="https?:', page)
    assert "var(--line-1)" in page
    assert "#070809" not in page  # colours follow the theme


def test_a_report_without_images_has_the_rest(runs: list[Path]) -> None:
    assert main(["report", str(runs[1])]) == 0
    page = (runs[1] / "report.html").read_text()
    assert "Nearest neighbours" not in page
    assert "contrastive loss" not in page  # MAE has none


def test_runs_are_compared_in_words_and_on_a_page(
    runs: list[Path], tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "c.html"
    assert main(["compare", *map(str, runs), "--html", str(out)]) == 0
    told = capsys.readouterr().out
    assert "model.contrastive_loss" in told
    assert "'none'" in told
    page = out.read_text()
    assert "Settings that differ" in page
    assert "run.out" not in different_settings([read_run(one) for one in runs])[0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, "holds no metrics.jsonl"),
        (lambda folder: (folder / "metrics.jsonl").touch(), "holds no record yet"),
    ],
)
def test_a_folder_that_is_no_run_is_said(make: object, message: str, tmp_path: Path) -> None:
    make(tmp_path)  # type: ignore[operator]
    with pytest.raises(CmaeError, match=message):
        read_run(tmp_path)


def test_one_run_is_not_compared(runs: list[Path], tmp_path: Path, capsys: Capture) -> None:
    assert main(["compare", str(runs[0]), "--html", str(tmp_path / "x.html")]) == 1
    assert "two to six" in capsys.readouterr().err


def test_frames_say_whether_a_neighbour_is_of_the_class() -> None:
    images = torch.full((4, 8, 8, 3), 128, dtype=torch.uint8)
    features = torch.tensor([[1.0, 0.0], [1.0, 0.01], [0.0, 1.0], [0.01, 1.0]])
    for labels, frame in ((torch.tensor([0, 0, 1, 1]), RIGHT), (torch.tensor([0, 1, 2, 3]), WRONG)):
        png = neighbours_picture(images, labels, features, queries=1, shown=1)
        pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
        assert (pixels == frame).all(-1).any()
        other = WRONG if frame == RIGHT else RIGHT
        assert not (pixels == other).all(-1).any()


def test_attention_is_the_softmax_of_the_last_block() -> None:
    encoder = from_model(build_model(SMALL, seed=0), name="small")
    pixels = torch.randn(2, 3, 32, 32)
    found = _cls_attention(encoder.vit, pixels)
    assert found.shape == (2, 4, 4)
    tokens = encoder.vit.patch_embed(pixels)
    tokens = torch.cat([encoder.vit.cls_token.expand(2, -1, -1), tokens], 1) + encoder.vit.pos_embed
    for block in encoder.vit.blocks[:-1]:
        tokens = block(tokens)
    last = encoder.vit.blocks[-1]
    qkv = last.attn.qkv(last.norm1(tokens)).view(2, 17, 3, SMALL.num_heads, -1)
    query, key = qkv[:, 0, 0], qkv[:, :, 1]
    scores = torch.einsum("bhd,bnhd->bhn", query, key) / query.shape[-1] ** 0.5
    expected = scores.softmax(-1)[..., 1:].mean(1).view(2, 4, 4)
    torch.testing.assert_close(found, expected)


def test_charts_escape_labels_and_leave_out_what_is_empty() -> None:
    chart = curve_chart({"<a>": [(0, 1.0), (1, 2.0)], "b": []}, band=[(0, 0.5, 1.5), (1, 1.0, 2.5)])
    assert "<a>" not in chart
    assert "var(--line-1)" in chart
    assert "var(--line-2)" not in chart
