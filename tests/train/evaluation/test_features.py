"""Encoders of any origin, features of every image once, probes, and the commands on them."""

from __future__ import annotations

import io
import json
import os
import shutil
import socket
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.multiprocessing as mp
from safetensors.torch import save_file
from support.tiny_runs import ALONE, SMALL

from cmae.errors import CmaeError
from cmae.model import build_model, load_model, to_timm
from cmae.pipeline.formats.shard_index import build_index, index_path, save_index
from cmae.train.commands.main import main
from cmae.train.distributed import join_world
from cmae.train.evaluation.encoders import load_encoder
from cmae.train.evaluation.features import Images, compute_features, read_labels
from cmae.train.evaluation.probes import ProbeData, hold_out, lars_probe, logistic_probe
from cmae.train.loop.weights import save_model

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "model.pt"
    save_model(build_model(SMALL, seed=0), path)
    return path


class TestEncoders:
    def test_blocks_and_pools_are_the_models(self, checkpoint: Path) -> None:
        model, images = load_model(checkpoint), torch.randint(0, 256, (3, 32, 32, 3)).byte()
        found = load_encoder(checkpoint)(images, last=2)
        assert found.keys() == {(pool, block) for pool in ("mean", "cls") for block in (1, 2)}
        for pool in ("mean", "cls"):
            torch.testing.assert_close(
                found[pool, 1], model.features(images, pool), rtol=1e-4, atol=1e-5
            )
        assert not torch.equal(found["mean", 1], found["mean", 2])

    def test_the_target_is_another_encoder(self, checkpoint: Path) -> None:
        images = torch.randint(0, 256, (3, 32, 32, 3)).byte()
        model = load_model(checkpoint)
        with torch.no_grad():
            model.target_encoder.patch_embed.proj.weight.mul_(2)
        changed = checkpoint.with_name("changed.pt")
        save_model(model, changed)
        online, target = (load_encoder(changed, branch=b)(images) for b in ("online", "target"))
        assert not torch.allclose(online["mean", 1], target["mean", 1])

    def test_random_weights_come_from_a_recipe_and_a_seed(self) -> None:
        first, again, other = (load_encoder(f"random:demo{seed}") for seed in ("", ":0", ":1"))
        assert first.digest() == again.digest() != other.digest()

    def test_weights_of_timm_are_timms(self, tmp_path: Path) -> None:
        vit = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32)
        path = tmp_path / "vit.pth"
        torch.save(vit.state_dict(), path)
        encoder = load_encoder(f"timm:vit_tiny_patch16_224={path}", img_size=32)
        images = torch.randint(0, 256, (2, 32, 32, 3)).byte()
        # This network's images are normalised with .5 and .5.
        expected = vit.eval().forward_features((images.permute(0, 3, 1, 2) / 255 - 0.5) / 0.5)
        torch.testing.assert_close(encoder(images)["cls", 1], expected[:, 0], rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize(
        ("source", "message"),
        [
            ("random:demoo", "names no recipe.*did you mean 'demo'"),
            ("timm:vit_tiny_patch16_22", "timm has no model.*did you mean 'vit_tiny_patch16_224'"),
            ("timm:resnet18", "is a ResNet; it must be a VisionTransformer"),
            ("/nowhere/x.pt", "/nowhere/x.pt"),
        ],
    )
    def test_what_is_none_is_said(self, source: str, message: str) -> None:
        with pytest.raises(CmaeError, match=message):
            load_encoder(source)

    def test_a_file_of_something_else_is_said(self, tmp_path: Path) -> None:
        torch.save({"weight": torch.zeros(3)}, tmp_path / "x.pth")
        with pytest.raises(CmaeError, match="is no encoder that is known here"):
            load_encoder(tmp_path / "x.pth")

    def test_an_exported_encoder_loads_with_its_own_heads_and_size(
        self, checkpoint: Path, tmp_path: Path
    ) -> None:
        out = tmp_path / "encoder.safetensors"
        assert main(["export", str(checkpoint), str(out)]) == 0
        images = torch.randint(0, 256, (3, 32, 32, 3)).byte()
        expected = load_encoder(checkpoint)(images)["mean", 1]
        torch.testing.assert_close(load_encoder(out)(images)["mean", 1], expected)
        torch.testing.assert_close(load_model(out).features(images), expected, rtol=1e-4, atol=1e-5)

    def test_a_file_with_timms_names_and_no_notes_has_published_heads(self, tmp_path: Path) -> None:
        model = build_model(replace(SMALL, embed_dim=192, depth=12, num_heads=3), seed=0)
        save_file(
            {k: v.contiguous() for k, v in to_timm(model).items()}, tmp_path / "x.safetensors"
        )
        assert load_model(tmp_path / "x.safetensors").config.num_heads == 3


class TestFeatures:
    def test_every_image_comes_once_in_order(self, checkpoint: Path, small_shards: str) -> None:
        encoder = load_encoder(checkpoint)
        images = Images(small_shards, 32)
        found = compute_features(encoder, images, world=ALONE, batch_size=7)
        assert len(found) == 40
        assert found.num_left_out == 0
        assert torch.equal(found.labels, read_labels(small_shards))
        assert torch.equal(found.ids, found.ids.sort().values)
        few = compute_features(encoder, replace(images, max_samples=11), world=ALONE, batch_size=4)
        assert torch.equal(few.by_pool["mean", 1], found.by_pool["mean", 1][:11])

    def test_kept_features_are_taken_until_something_changes(
        self, checkpoint: Path, small_shards: str, tmp_path: Path
    ) -> None:
        encoder, images = load_encoder(checkpoint), Images(small_shards, 32)
        first = compute_features(encoder, images, world=ALONE, cache=tmp_path)
        (path,) = tmp_path.iterdir()
        stamp = path.stat().st_mtime_ns
        again = compute_features(encoder, images, world=ALONE, cache=tmp_path)
        assert torch.equal(first.by_pool["cls", 1], again.by_pool["cls", 1])
        assert path.stat().st_mtime_ns == stamp
        compute_features(encoder, replace(images, centre_share=1.0), world=ALONE, cache=tmp_path)
        compute_features(
            load_encoder("random:demo"), Images(small_shards, 48), world=ALONE, cache=tmp_path
        )
        assert len(list(tmp_path.iterdir())) == 3
        path.write_bytes(path.read_bytes()[:-100])
        repaired = compute_features(encoder, images, world=ALONE, cache=tmp_path)
        assert torch.equal(first.by_pool["cls", 1], repaired.by_pool["cls", 1])

    def test_an_image_that_cannot_be_read_is_left_out_and_counted(
        self, checkpoint: Path, small_shards: str, tmp_path: Path
    ) -> None:
        source = Path(small_shards.replace("*", "000000"))
        damaged = tmp_path / "damaged-000000.tar"
        with tarfile.open(source) as old, tarfile.open(damaged, "w") as new:
            for member in old.getmembers():
                content = old.extractfile(member).read()  # type: ignore[union-attr]
                if member.name == "image003.jpg":
                    content = content[:200] + bytes(len(content) - 200)
                member.size = len(content)
                new.addfile(member, io.BytesIO(content))
        save_index(build_index(damaged), index_path(damaged))
        found = compute_features(
            load_encoder(checkpoint), Images(str(damaged), 32), world=ALONE, batch_size=4
        )
        assert (len(found), found.num_left_out) == (19, 1)
        assert found.labels.tolist() == [n % 4 for n in range(20) if n != 3]

    def test_shards_without_index_or_labels_say_so(
        self, checkpoint: Path, small_shards: str, tmp_path: Path
    ) -> None:
        bare = tmp_path / "bare.tar"
        shutil.copy(small_shards.replace("*", "000000"), bare)
        with pytest.raises((CmaeError, FileNotFoundError), match="index"):
            compute_features(load_encoder(checkpoint), Images(str(bare), 32), world=ALONE)

    @pytest.mark.slow
    def test_two_ranks_get_what_one_gets(
        self, checkpoint: Path, small_shards: str, tmp_path: Path
    ) -> None:
        expected = compute_features(
            load_encoder(checkpoint), Images(small_shards, 32), world=ALONE, batch_size=8
        )
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        mp.spawn(rank_features, args=(port, checkpoint, small_shards, tmp_path), nprocs=2)
        for rank in range(2):
            labels, features = torch.load(tmp_path / f"{rank}.pt")
            assert torch.equal(labels, expected.labels)
            torch.testing.assert_close(features, expected.by_pool["mean", 1], rtol=1e-3, atol=1e-3)


def rank_features(rank: int, port: int, checkpoint: Path, shards: str, out: Path) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with join_world("cpu") as world:
        found = compute_features(
            load_encoder(checkpoint), Images(shards, 32), world=world, batch_size=7
        )
    torch.save((found.labels, found.by_pool["mean", 1]), out / f"{rank}.pt")


def blobs(num: int, *, seed: int, spread: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Four classes around four corners; columns of very different scale."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(num) % 4
    corners = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]])[labels]
    x = corners + spread * torch.randn(num, 2, generator=generator)
    noise = torch.randn(num, 6, generator=generator)
    return torch.cat([x * torch.tensor([1e-3, 1e3]), noise], 1), labels


class TestProbes:
    @pytest.mark.parametrize("probe", [logistic_probe, lars_probe])
    def test_separable_classes_are_found(self, probe: Any) -> None:
        data = ProbeData(*blobs(800, seed=0, spread=0.2), *blobs(400, seed=1, spread=0.2), 4)
        result = probe(data)
        assert result.chosen.accuracy > 0.98
        assert result.chosen.top5 == 1.0
        assert result.chosen.setting in [row.setting for row in result.rows]

    def test_the_setting_is_chosen_without_the_validation_images(self) -> None:
        train, labels = blobs(200, seed=0, spread=0.9)
        val, val_labels = blobs(200, seed=1, spread=0.9)
        right = logistic_probe(ProbeData(train, labels, val, val_labels, 4))
        wrong = logistic_probe(ProbeData(train, labels, val, (val_labels + 1) % 4, 4))
        assert right.chosen.setting == wrong.chosen.setting
        assert right.chosen.held_out == wrong.chosen.held_out
        assert right.chosen.accuracy > wrong.chosen.accuracy

    def test_logistic_regression_is_at_its_minimum(self) -> None:
        train, labels = blobs(300, seed=0, spread=0.7)
        data = ProbeData(train, labels, train, labels, 4)
        loose, tight = (logistic_probe(data, decays=[decay]) for decay in (1e-6, 100.0))
        assert loose.chosen.accuracy >= tight.chosen.accuracy

    def test_held_out_rows_are_others_than_those_fitted(self) -> None:
        fit, choose = hold_out(100, 0.1)
        assert len(choose) == 10
        assert sorted([*fit.tolist(), *choose.tolist()]) == list(range(100))


class TestCommands:
    def words(self, kind: str, checkpoint: Path, shards: str, out: Path, *more: str) -> list[str]:
        return [
            *("evaluate", kind, str(checkpoint), "--train", shards, "--val", shards),
            *("--cache", str(out / "cache"), "--out", str(out / "result.json"), *more),
        ]

    def test_knn_finds_each_image_beside_itself(
        self, checkpoint: Path, small_shards: str, tmp_path: Path, capsys: Capture
    ) -> None:
        assert main(self.words("knn", checkpoint, small_shards, tmp_path, "--k", "1", "5")) == 0
        rows = json.loads((tmp_path / "result.json").read_text())["rows"]
        assert [(row["pool"], row["k"]) for row in rows] == [
            (pool, k) for pool in ("mean", "cls") for k in (1, 5)
        ]
        assert rows[0]["accuracy"] == 1.0
        assert "100.00%" in capsys.readouterr().out

    def test_linear_shows_every_pool_and_method(
        self, checkpoint: Path, small_shards: str, tmp_path: Path
    ) -> None:
        words = self.words("linear", checkpoint, small_shards, tmp_path, "--blocks", "1", "2")
        assert main(words) == 0
        rows = json.loads((tmp_path / "result.json").read_text())["rows"]
        assert len(rows) == 2 * 2 * 2
        assert all(0 <= row["accuracy"] <= row["top5"] <= 1 for row in rows)

    @pytest.mark.parametrize(
        ("more", "message"),
        [
            (["--pools", "[max]"], "--pools is"),
            (["--branch", "both"], "--branch is 'both'"),
            (["--centre_share", "0"], "--centre_share is 0"),
            (["--k", "0"], "k is 0"),
            (["--temperature", "0"], "temperature is 0"),
        ],
    )
    def test_values_out_of_range_are_named(
        self, more: list[str], message: str, checkpoint: Path, small_shards: str, tmp_path: Path,
        capsys: Capture,
    ) -> None:  # fmt: skip
        assert main(self.words("knn", checkpoint, small_shards, tmp_path, *more)) == 1
        assert message in capsys.readouterr().err

    def test_more_blocks_than_there_are_is_an_error(
        self, checkpoint: Path, small_shards: str, tmp_path: Path, capsys: Capture
    ) -> None:
        words = self.words("linear", checkpoint, small_shards, tmp_path, "--blocks", "3")
        assert main(words) == 1
        assert "--blocks holds 3, and 2 block(s)" in capsys.readouterr().err
