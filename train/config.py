"""The configuration of one pretraining run: frozen dataclasses, one section per kind of effect.

`run` and `speed` change where results go and how fast they come; `data`, `model`, `optim` and `seed`
change the results themselves. The attribute docstrings are the text of `cmae pretrain --help`.
"""

import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from cmae.errors import CmaeError, require
from cmae.model import ModelConfig
from cmae.paths import expand_home
from cmae.pipeline import LoaderConfig, ViewConfig
from cmae.pipeline.loader.config import FROM_THE_RUN
from cmae.pipeline.remote.schemes import redact, redact_options, redact_shards

COLLECTIVE_TIMEOUT_S = 600.0
"""How long a rank waits for the others; what a rank may wait for by itself must end earlier."""


@dataclass(frozen=True)
class RunConfig:
    """Where results go. Nothing here changes them."""

    out: Path = Path("runs/cmae")
    """Folder for checkpoints, metrics, pictures and the ledger of bad samples."""
    resume: str = "auto"
    """'auto' continues the newest checkpoint in `out`, 'never' refuses a folder that holds one,
    anything else is the path of a checkpoint."""
    stop_at_step: int | None = None
    """Stop early, with a checkpoint, after this optimiser step; the schedule stays as it is."""
    log_every: int = 20
    """Optimiser steps between two metric records."""
    checkpoint_every: int = 1000
    """Optimiser steps between two checkpoints; the last step always writes one."""
    keep_checkpoints: int = 3
    """How many of the newest checkpoints are kept."""
    keep_every: int | None = None
    """Checkpoints whose step is a multiple of this are kept for good."""
    keep_hours: float | None = None
    """Checkpoints younger than this stay too. null: no matter how old."""
    checkpoint_shards: bool = False
    """Every rank writes its part of weights and moments into a folder beside the checkpoint, instead of the
    first rank all of them: for models whose state is too large for one host. `cmae checkpoint join` makes one
    file of it."""
    mirror: str | None = None
    """Folder of a store, such as s3://bucket/runs/x, that gets a copy of every checkpoint and of the metrics
    in the background. A node whose `out` holds no checkpoint goes on from there. Credentials come from the
    environment or data.storage_options."""
    hang_s: float | None = 480.0
    """Seconds without a step after which a run hangs: it names the rank that keeps the others, and ends with
    exit code 75, to be started again. At least ten times the longest step, and data.remote_deadline_s. null:
    never."""
    checkpoint_patience_min: float = 60.0
    """Minutes for which checkpoints that the disk refuses are tried again, while the run goes on, before it
    ends."""
    image_every: int | None = None
    """Optimiser steps between two pictures of original, masked and reconstruction."""
    eval_shards: str | list[str] = ""
    """Labelled tars with indices on which k-NN, a linear probe and statistics of both encoders' features are
    computed while the run goes on. Empty: none."""
    eval_every: int | None = None
    """Optimiser steps between two of these evaluations. null: one an epoch."""
    eval_samples: int = 5000
    """Images of `eval_shards` to take, spread evenly; every fifth is asked about, the others are known. They
    stay in host memory."""
    eval_centre_share: float = 0.875
    """Side of the centred square that is looked at over the image's shorter side."""
    bands: str = ""
    """Ranges of the metrics that are expected, drawn behind the curves of `loss.png` and `cmae report`: a
    file that `cmae compare --write_bands` wrote from runs of several seeds, or 'demo'. Empty: none."""
    progress: bool = True
    """Show the live progress display on a terminal; without one, lines are printed instead."""
    wandb_project: str | None = None
    """Weights & Biases project; needs the package `wandb`."""
    mlflow_uri: str | None = None
    """MLflow tracking server, such as http://host:5000; needs the extra `mlflow`."""
    prometheus_port: int | None = None
    """Port on which the first rank shows its newest metrics to Prometheus; needs the extra `prometheus`."""

    def __post_init__(self) -> None:
        """Find the home folder in paths, and refuse periods that are not positive."""
        object.__setattr__(self, "out", expand_home(self.out))
        if self.resume not in ("auto", "never"):
            object.__setattr__(self, "resume", str(expand_home(self.resume)))
        for name in ("log_every", "checkpoint_every", "keep_checkpoints", "eval_samples"):
            require(getattr(self, name) >= 1, f"run.{name}", getattr(self, name), ">= 1")
        for name in ("stop_at_step", "keep_every", "image_every", "eval_every"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"run.{name}", value, ">= 1, or null")
        hours, patience = self.keep_hours, self.checkpoint_patience_min
        require(hours is None or hours > 0, "run.keep_hours", hours, "> 0, or null")
        hang = self.hang_s
        allowed = f"> 0 and < {COLLECTIVE_TIMEOUT_S:g}, the timeout of collectives, or null"
        require(hang is None or 0 < hang < COLLECTIVE_TIMEOUT_S, "run.hang_s", hang, allowed)
        require(
            not (self.checkpoint_shards and self.mirror),
            "run.checkpoint_shards",
            True,
            "false with run.mirror, which copies single files",
        )
        port = self.prometheus_port
        require(
            port is None or 0 < port < 1 << 16, "run.prometheus_port", port, "1 to 65535, or null"
        )
        require(patience >= 0, "run.checkpoint_patience_min", patience, ">= 0")
        share = self.eval_centre_share
        require(0 < share <= 1, "run.eval_centre_share", share, "in (0, 1]")


@dataclass(frozen=True)
class SpeedConfig:
    """How fast it goes. Results stay the same, but for rounding."""

    device: str = "auto"
    """'auto' takes a GPU when there is one; or 'cpu', 'cuda'."""
    micro_batch_size: int | Literal["auto"] | None = None
    """Images per rank in one forward pass. null: the whole share of the global batch at once. 'auto': the
    largest number that divides the share and fits into the device's memory by the cost model's count; a run
    that is continued keeps its own. BatchNorm in the heads sees one micro-batch of every rank."""
    torch_threads: int | None = None
    """CPU threads inside one torch operator. null: torch's own choice. Small models are faster with 1, and
    threads that share their cores with other work wait for each other."""
    kernels: Literal["auto", "torch", "triton"] = "auto"
    """What gathers patches and computes losses. 'auto': Triton kernels on a GPU, torch elsewhere. 'triton'
    stops where a kernel cannot run."""
    compile: Literal["auto", "none", "blocks", "model", "model_graphs"] = "auto"
    """torch.compile: not at all, each transformer block, or each branch as a whole. 'auto': blocks on a GPU
    before Hopper, which takes half a minute at the start, and none elsewhere. 'model_graphs' also
    records each branch as a CUDA graph (torch's mode reduce-overhead), which saves the cost of launches: a
    GPU only, and one micro-batch a step."""
    sdpa: Literal["torch", "auto", "flash", "cudnn", "efficient", "math"] = "torch"
    """Attention kernel: torch's own choice, the fastest one by measurement of each shape at the start (a
    GPU only), or one for all shapes."""
    recompute: Literal["none", "blocks"] = "none"
    """'blocks' keeps each transformer block's input alone and computes the block again in the backward pass:
    a third more operations, a fraction of the memory. The same results."""
    parallel: Literal["ddp", "zero1", "fsdp", "hsdp"] = "ddp"
    """What each rank holds. 'ddp': everything. 'zero1': all weights, and the optimiser's state of its share
    of them. 'fsdp': its share of weights, target, gradients and state, gathered block by block (FSDP2).
    'hsdp': the same inside a node, and a copy on each node. Checkpoints are whole either way: a run goes on
    with another. With one rank all of these are the same."""
    target_copy: bool = False
    """Keep a 16-bit copy of the target's matrices beside them, so that autocast does not cast them in every
    step. Same results; 2 bytes more for each of their weights."""

    def __post_init__(self) -> None:
        """Refuse sizes that are not positive."""
        micro, threads = self.micro_batch_size, self.torch_threads
        is_size = micro in (None, "auto") or (isinstance(micro, int) and micro >= 1)
        require(is_size, "speed.micro_batch_size", micro, ">= 1, 'auto', or null")
        require(threads is None or threads >= 1, "speed.torch_threads", threads, ">= 1, or null")

    def resolved(self, capability: tuple[int, int] | None) -> "SpeedConfig":
        """The same settings, with `compile` as it is on a GPU of this compute capability; None = a CPU.

        From Hopper on, the host is slower with compiled blocks than the GPU is faster (docs/design/0020).
        """
        if self.compile != "auto":
            return self
        is_older = capability is not None and capability < (9, 0)
        return replace(self, compile="blocks" if is_older else "none")


@dataclass(frozen=True)
class OptimConfig:
    """Optimiser, schedule and precision."""

    global_batch_size: int = 4096
    """Images in one optimiser step, over all ranks and micro-batches; the contrastive bank."""
    epochs: int = 300
    """Length of the schedule in passes over the data."""
    total_steps: int | None = None
    """Length of the schedule in optimiser steps; overrides `epochs`. A stream whose size is not
    known needs it."""
    warmup_epochs: float = 40.0
    """Linear warmup from 1e-4 of the peak, in epochs (a share of `total_steps` when the epoch's length is not
    known). Half a cosine down to zero follows it."""
    lr_per_256: float = 1.5e-4
    """Peak learning rate for 256 images; scaled by global_batch_size / 256."""
    weight_decay: float = 0.05
    """Decoupled weight decay of matrices; norms, biases and position embeddings have none."""
    decay_tokens: bool = False
    """Decay cls and mask tokens too, as MAE's public code does."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's running-average factors."""
    clip_grad: float | None = None
    """Largest gradient norm. null: no clipping."""
    precision: Literal["fp16", "bf16", "fp32"] = "fp16"
    """fp16 scales the loss and skips steps that overflow; on a CPU use bf16 or fp32."""
    residual: Literal["fp32", "16bit"] = "fp32"
    """Number format of the residual streams: float32 as autocast has it, or that of `precision`, which
    halves their traffic and memory and rounds every sum."""
    impl: Literal["torch_fused", "apex"] = "torch_fused"
    """AdamW of torch (fused), or FusedAdam of NVIDIA's apex, for whoever compares with runs of that
    optimiser. The same update; apex has to be built from source."""
    gradient_compression: Literal["none", "fp16", "bf16"] = "none"
    """Number format of gradients on the wire between ranks."""
    spike_factor: float | None = None
    """A step whose gradients' norm is more than this many times the running mean of the norms is skipped, as
    one whose gradients are not finite; the mean is that of about 50 steps, and 100 have to be taken first.
    null: none."""
    max_skipped_steps: int = 20
    """This many skipped steps in a row mean that the run has gone astray."""
    max_rollbacks: int = 1
    """How often a run that has gone astray begins again at its newest checkpoint, behind the samples that it
    has seen since. Then, and without a checkpoint, it stops."""

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        checks = {
            "global_batch_size": (self.global_batch_size >= 1, ">= 1"),
            "epochs": (self.epochs >= 1, ">= 1"),
            "total_steps": (self.total_steps is None or self.total_steps >= 1, ">= 1, or null"),
            "warmup_epochs": (self.warmup_epochs >= 0, ">= 0"),
            "lr_per_256": (self.lr_per_256 > 0, "> 0"),
            "weight_decay": (self.weight_decay >= 0, ">= 0"),
            "betas": (all(0 <= beta < 1 for beta in self.betas), "two numbers in [0, 1)"),
            "clip_grad": (self.clip_grad is None or self.clip_grad > 0, "> 0, or null"),
            "spike_factor": (self.spike_factor is None or self.spike_factor > 1, "> 1, or null"),
            "max_skipped_steps": (self.max_skipped_steps >= 1, ">= 1"),
            "max_rollbacks": (self.max_rollbacks >= 0, ">= 0"),
        }
        for name, (ok, allowed) in checks.items():
            require(ok, f"optim.{name}", getattr(self, name), allowed)
        require(
            self.precision != "fp32" or self.residual == "fp32",
            "optim.residual",
            self.residual,
            "fp32 with optim.precision fp32, or optim.precision fp16 or bf16",
        )


@dataclass(frozen=True)
class Config:
    """One pretraining run."""

    seed: int = 0
    """Seeds the weights, the order of the samples, the views and the masks."""
    init_from: Path | None = None
    """Start from the weights in this checkpoint (`cmae import` writes them) instead of random ones."""
    run: RunConfig = field(default_factory=RunConfig)
    """Where results go. Nothing here changes them."""
    speed: SpeedConfig = field(default_factory=SpeedConfig)
    """How fast it goes. Results stay the same, but for rounding."""
    data: LoaderConfig = field(default_factory=LoaderConfig)
    """Which images, which views of them, and how they are read."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The network, its mask and its losses."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimiser, schedule and precision."""

    def __post_init__(self) -> None:
        """Refuse views that do not fit the model, and settings of the loader that the run makes."""
        if self.init_from is not None:
            object.__setattr__(self, "init_from", expand_home(self.init_from))
        views, model = self.data.views, self.model
        for name, source in FROM_THE_RUN.items():
            given, default = getattr(self.data, name), getattr(LoaderConfig, name)
            require(
                given == default, f"data.{name}", given, f"left out: in a run it follows {source}"
            )
        allowed = f"> 0 and < {COLLECTIVE_TIMEOUT_S:g}, the timeout of collectives"
        deadline = self.data.remote_deadline_s
        require(deadline < COLLECTIVE_TIMEOUT_S, "data.remote_deadline_s", deadline, allowed)
        if self.run.image_every and not model.has_reconstruction:
            raise CmaeError(
                f"run.image_every is {self.run.image_every}, but model.reconstruction_weight is 0: "
                "there is no decoder to draw with; leave run.image_every out"
            )
        if views.img_size != model.img_size:
            raise CmaeError(
                f"data.views.img_size is {views.img_size} but model.img_size is {model.img_size}; "
                "they must be equal: set model.img_size alone, the views follow it"
            )
        if model.has_contrast and views.num_views != 2:
            raise CmaeError(
                f"data.views.num_views is {views.num_views}, but the contrastive loss "
                f"({model.contrastive_loss!r}) compares 2 views; set data.views.num_views=2, or "
                "model.contrastive_loss=none"
            )

    @property
    def loader_views(self) -> ViewConfig:
        """The views that are made: without a contrastive loss nobody looks at the target view."""
        views = self.data.views
        return views if self.model.has_contrast else replace(views, num_views=1)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dicts, as stored in checkpoints and result files; no secrets."""
        plain: dict[str, Any] = _plain(asdict(self))
        data = plain["data"]
        data["shards"] = redact_shards(data["shards"])
        for name in ("mirror", "mlflow_uri"):
            value = plain["run"][name]
            plain["run"][name] = value and redact(value)
        data["storage_options"] = redact_options(data["storage_options"])
        for name in FROM_THE_RUN:
            del plain["data"][name]
        return plain


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
