"""Settings of `cmae finetune`, and of `cmae evaluate partial` and `linear --images true`."""

# Real annotations, no `from __future__ import annotations`: jsonargparse reads them.

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cmae.errors import require
from cmae.paths import expand_home


@dataclass(frozen=True)
class FinetuneConfig:
    """One supervised run; the values are MAE's and CMAE's fine-tuning of ViT-B."""

    encoder: str = ""
    """A run's folder, a checkpoint, an exported encoder, a .pth of the authors' code or of MAE, or
    random:RECIPE, or timm:NAME=FILE."""
    branch: Literal["online", "target"] = "online"
    """Which encoder of a checkpoint: the trained one, or its moving average."""
    train: str | list[str] = ""
    """Labelled WebDataset tars to train on."""
    val: str | list[str] = ""
    """Labelled WebDataset tars, with indices, to score after each `eval_every` epochs."""
    out: Path = Path("runs/finetune")
    """Folder for checkpoints, metrics and results. The same command continues an interrupted run."""
    num_classes: int | None = None
    """null: one more than the largest label of `val`."""
    blocks: float | None = None
    """Train only so many of the last blocks and the head: 0, 0.5 (the last block's MLP), 1, 2 and so on.
    null: everything."""
    head: Literal["norm", "batch_norm"] = "norm"
    """Before the linear layer: 'norm' is a LayerNorm of the pooled tokens (fine-tuning), 'batch_norm' a batch
    norm without affine (linear probe)."""
    pool: Literal["mean", "cls"] = "mean"
    """Mean of the patch tokens, or the cls token."""
    img_size: int | None = None
    """Side of the images, px; position embeddings are interpolated. null: the encoder's."""
    centre_share: float = 0.875
    """Side of the square that is scored over the image's shorter side."""
    epochs: int = 100
    """Length of the schedule in passes over the data."""
    global_batch_size: int = 1024
    """Images in an optimiser step, over all ranks and micro-batches."""
    micro_batch_size: int | None = None
    """Images in one pass on one rank. null: the whole share of the rank."""
    optimizer: Literal["adamw", "lars"] = "adamw"
    """'lars' with momentum .9 and trust coefficient .001 is that of MAE's linear probe."""
    lr_per_256: float = 5e-4
    """Peak learning rate for 256 images; scaled by global_batch_size / 256."""
    min_lr: float = 1e-6
    """Learning rate at the end of the cosine, before layer decay."""
    warmup_epochs: float = 5.0
    """Linear warm-up from 0."""
    weight_decay: float = 0.05
    """Of weights; norms, biases, the cls token and position embeddings have none."""
    layer_decay: float = 0.65
    """Factor of the learning rate from one block to the one before it; 1: none."""
    drop_path: float = 0.1
    """Largest rate of stochastic depth, in the last block."""
    label_smoothing: float = 0.1
    """Share of the target that is spread over all classes."""
    mixup: float = 0.8
    """Alpha of Mixup; 0: none."""
    cutmix: float = 1.0
    """Alpha of CutMix; 0: none. With both, one of them is drawn for each micro-batch."""
    random_erasing: float = 0.25
    """Probability with which a rectangle of an image is replaced by noise."""
    randaugment_ops: int = 2
    """Operations of RandAugment for each image; 0: none."""
    randaugment_magnitude: float = 9.0
    """Their mean level, 0..10."""
    min_area: float = 0.08
    """Smallest window of an image as a share of its area."""
    hflip_prob: float = 0.5
    """Probability of a horizontal flip."""
    ema: float | None = None
    """Keep a moving average of the weights with this momentum, and score it too. null: none."""
    clip_grad: float | None = None
    """Clip the norm of all gradients. null: not at all."""
    precision: Literal["fp16", "bf16", "fp32"] = "fp16"
    """On a CPU fp16 becomes fp32."""
    device: str = "auto"
    """'auto' takes CUDA when there is a GPU."""
    num_threads: int | None = None
    """CPU threads that decode, for each rank. null: the node's cores, shared out to its ranks."""
    seed: int = 0
    """Of the head, the order of the images and all augmentation."""
    log_every: int = 50
    """Steps between two records."""
    eval_every: int = 1
    """Epochs between two scorings; the last epoch is always scored."""
    checkpoint_every: int = 1
    """Epochs between two checkpoints; an interrupted run writes one too."""
    progress: bool = True
    """Draw a progress bar when the output is a terminal."""

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        object.__setattr__(self, "out", expand_home(self.out))
        for name in ("epochs", "global_batch_size", "log_every", "eval_every", "checkpoint_every"):
            require(getattr(self, name) >= 1, name, getattr(self, name), ">= 1")
        for name in ("num_classes", "micro_batch_size", "img_size", "num_threads"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, value, ">= 1, or null")
        for name in ("lr_per_256", "min_lr", "warmup_epochs", "weight_decay", "mixup", "cutmix"):
            require(getattr(self, name) >= 0, name, getattr(self, name), ">= 0")
        for name in ("drop_path", "label_smoothing"):
            require(0 <= getattr(self, name) < 1, name, getattr(self, name), "in [0, 1)")
        for name in ("random_erasing", "hflip_prob"):
            require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "in 0..1")
        for name in ("layer_decay", "min_area", "centre_share"):
            require(0 < getattr(self, name) <= 1, name, getattr(self, name), "in (0, 1]")
        blocks = self.blocks
        is_count = blocks is None or blocks == 0.5 or (blocks >= 0 and blocks == int(blocks))
        require(is_count, "blocks", blocks, "0, 0.5, a whole number, or null for all")
        require(self.ema is None or 0 < self.ema < 1, "ema", self.ema, "in (0, 1), or null")
        clip = self.clip_grad
        require(clip is None or clip > 0, "clip_grad", clip, "> 0, or null")
        require(bool(self.encoder), "encoder", self.encoder, "the encoder to start from")
        require(bool(self.train), "train", self.train, "labelled tars to train on")
        require(bool(self.val), "val", self.val, "labelled tars to score")
        for name in ("randaugment_ops", "seed"):
            require(getattr(self, name) >= 0, name, getattr(self, name), ">= 0")
        level = self.randaugment_magnitude
        require(0 <= level <= 10, "randaugment_magnitude", level, "in 0..10")
