"""The commands: what each is for, its arguments, and what runs it. What does the work is imported there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from importlib import import_module
from inspect import getdoc, signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

from cmae.errors import CmaeError

if TYPE_CHECKING:
    from jsonargparse import Namespace

    from cmae.train.config_parser import Parser

Settings = TypeVar("Settings")
Run = Callable[["Namespace"], int]
"""Takes parsed arguments; returns the exit code."""


class Command(NamedTuple):
    """One command."""

    summary: str
    """A line for the overview."""
    build: Callable[[Parser], Run] | None = None
    """Adds its arguments to a parser, and returns what runs it."""
    description: str = ""
    """Opening of its help; '' takes the summary."""
    commands: dict[str, Command] = {}  # noqa: RUF012 - nobody writes to it
    """Commands inside it; a command with arguments of its own has them beside."""
    only_shows: bool = False
    """Whether it is of no use without a reader, and ends with it; others go on when a terminal is closed."""


def _taken(settings: type[Settings], values: Any) -> Settings:
    """A dataclass from the parsed values of its fields."""
    return settings(**{one.name: values[one.name] for one in fields(cast("Any", settings))})


def _pretrain(parser: Parser) -> Run:
    from cmae.train.config_parser import add_config, instantiate, to_config

    add_config(parser)

    def run(parsed: Namespace) -> int:
        config = to_config(instantiate(parser, parsed))
        from cmae.train.loop.pretrain import pretrain

        return pretrain(config).exit_code

    return run


def _tune(parser: Parser) -> Run:
    from cmae.train.config_parser import add_config, instantiate, to_config
    from cmae.train.tuning.config import TuneConfig

    add_config(parser)
    parser.add_class_arguments(TuneConfig)

    def run(parsed: Namespace) -> int:
        sections = instantiate(parser, parsed)
        chosen = _taken(TuneConfig, sections)
        from cmae.train.tuning.run import tune

        return tune(to_config(sections), chosen)

    return run


def _plan(parser: Parser) -> Run:
    from cmae.train.commands.plan.predict import IMAGENET, OPTIONS, Cluster

    parser.add_argument("--gpus", default="8xa100", help="number and kind, such as 32xa100")
    parser.add_argument(
        "--recipe",
        nargs="+",
        default=["cmae_vit_s", "cmae_vit_b", "cmae_vit_l", "cmae_vit_h"],
        help="recipes that ship with the package, or YAML files",
    )
    parser.add_argument("--epochs", type=int, help="default: the recipe's")
    parser.add_argument(
        "--set", nargs="+", default=[], help="settings of all recipes, such as speed.parallel=fsdp"
    )
    parser.add_argument("--images", type=int, default=IMAGENET, help="of an epoch")
    for name, help_text in OPTIONS.items():
        default = getattr(Cluster, name)
        parser.add_argument(f"--{name}", type=type(default), default=default, help=help_text)
    parser.add_argument(
        "--calibrate", action="store_true", help="correct the model by the nearest measured step"
    )
    parser.add_argument(
        "--results",
        type=Path,
        default=Path("benchmarks/results"),
        help="folder with files of `cmae bench step`",
    )
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="also take a step of every rank with tensors that hold no numbers: shapes, memory, and whether "
        "all ranks send the same in the same order. ViT-B on 32 ranks: a minute on 2 cores",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")

    def run(parsed: Namespace) -> int:
        from cmae.train.commands.plan.predict import plan_recipes

        return plan_recipes(parsed)

    return run


def _profile(parser: Parser) -> Run:
    from cmae.train.config_parser import add_config, instantiate, to_config
    from cmae.train.profiling.config import ProfileConfig

    add_config(parser)
    parser.add_class_arguments(ProfileConfig, "profile")

    def run(parsed: Namespace) -> int:
        from cmae.train.commands.look import profile

        sections = instantiate(parser, parsed)
        return profile.profile_run(to_config(sections), sections["profile"])

    return run


def _profile_show(parser: Parser) -> Run:
    parser.add_argument("profile", type=Path, help="profile.json of `cmae profile`")
    parser.add_argument("--html", type=Path, help="HTML report to write")

    def run(parsed: Namespace) -> int:
        from cmae.train.commands.look.profile import show

        return show(parsed.profile, html=parsed.html)

    return run


def _profile_diff(parser: Parser) -> Run:
    parser.add_argument("before", type=Path, help="the older profile.json")
    parser.add_argument("after", type=Path, help="the newer one")
    parser.add_argument("--html", type=Path, help="HTML report to write")

    def run(parsed: Namespace) -> int:
        from cmae.train.commands.look.profile import diff

        return diff(parsed.before, parsed.after, html=parsed.html)

    return run


def _bench(parser: Parser) -> Run:
    from cmae.train.config_parser import add_config, instantiate, to_config

    add_config(parser)
    parser.add_argument("--gpu", default="h100", help="a GPU by name, or 'measured': this one")
    parser.add_argument("--batch_size", type=int, help="images in one pass on one GPU")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--results",
        type=Path,
        default=Path("benchmarks/results"),
        help="folder with files of `cmae bench step`",
    )

    def run(parsed: Namespace) -> int:
        config = to_config(instantiate(parser, parsed))
        from cmae.train.commands.bench import bench_model

        return bench_model(
            config,
            parsed.gpu,
            batch_size=parsed.batch_size,
            results=parsed.results,
            as_json=parsed.json,
        )

    return run


def _measure(*names: str) -> Callable[[Parser], Run]:
    def build(parser: Parser) -> Run:
        from cmae.train.bench.config import BenchConfig
        from cmae.train.config_parser import add_config, instantiate, to_config

        add_config(parser)
        parser.add_class_arguments(BenchConfig)

        def run(parsed: Namespace) -> int:
            sections = instantiate(parser, parsed)
            chosen = _taken(BenchConfig, sections)
            from cmae.train.commands.bench import run_benchmarks

            return run_benchmarks(names, to_config(sections), chosen)

        return run

    return build


def _compare(parser: Parser) -> Run:
    parser.add_argument("old", type=Path, help="result file to compare with")
    parser.add_argument("new", type=Path, help="result file to judge")
    parser.add_argument(
        "--threshold", type=float, default=0.05, help="0.05: 5 percent worse is tolerated"
    )
    parser.add_argument(
        "--any_device", action="store_true", help="compare other devices and settings too"
    )

    def run(parsed: Namespace) -> int:
        from cmae.train.bench.compare import compare_files

        options = {"threshold": parsed.threshold, "any_device": parsed.any_device}
        return compare_files(parsed.old, parsed.new, **options)

    return run


def _finetune(parser: Parser) -> Run:
    from cmae.train.config_parser import add_evaluation_settings
    from cmae.train.finetune.config import FinetuneConfig

    add_evaluation_settings(parser, FinetuneConfig)

    def run(parsed: Namespace) -> int:
        config = _taken(FinetuneConfig, parsed)
        from cmae.train.finetune.run import finetune

        return finetune(config).exit_code

    return run


def _evaluate_partial(parser: Parser) -> Run:
    from cmae.train.config_parser import add_evaluation_settings
    from cmae.train.finetune.config import FinetuneConfig

    add_evaluation_settings(parser, FinetuneConfig)
    parser.add_argument(
        "--counts",
        type=float,
        nargs="+",
        default=[0, 0.5, 1, 2, 4, 6, 8, 12],
        help="numbers of last blocks to train; 0.5 is the last block's MLP",
    )

    def run(parsed: Namespace) -> int:
        config = _taken(FinetuneConfig, parsed)
        from cmae.train.commands.evaluate import evaluate_partial

        return evaluate_partial(config, parsed.counts)

    return run


def _add_features(parser: Parser) -> None:
    from cmae.train.commands.evaluate import EvalConfig

    parser.add_argument(
        "encoder",
        help="a run's folder, a checkpoint, an exported encoder, a .pth of the authors' code, MAE, ConvMAE, "
        "random:RECIPE, or timm:NAME=FILE",
    )
    parser.add_class_arguments(EvalConfig)


def _eval_config(parsed: Namespace) -> Any:
    from cmae.train.commands.evaluate import EvalConfig

    return _taken(EvalConfig, parsed)


def _evaluate_knn(parser: Parser) -> Run:
    _add_features(parser)
    parser.add_argument("--k", type=int, nargs="+", default=[10, 20, 100], help="neighbours")
    parser.add_argument(
        "--temperature", type=float, nargs="+", default=[0.07], help="of the votes' weights"
    )

    def run(parsed: Namespace) -> int:
        from cmae.train.commands.evaluate import evaluate_knn

        config = _eval_config(parsed)
        return evaluate_knn(parsed.encoder, config, k=parsed.k, temperature=parsed.temperature)

    return run


def _evaluate_linear(parser: Parser) -> Run:
    _add_features(parser)
    parser.add_argument(
        "--blocks", type=int, nargs="+", default=[1], help="last blocks side by side, such as 1 4"
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        default=["logistic", "lars"],
        help="'logistic': L-BFGS on standardised features; 'lars': MAE's protocol on kept features",
    )

    def run(parsed: Namespace) -> int:
        from cmae.train.commands.evaluate import evaluate_linear

        config = _eval_config(parsed)
        return evaluate_linear(parsed.encoder, config, blocks=parsed.blocks, methods=parsed.methods)

    return run


def _classify(parser: Parser) -> Run:
    parser.add_argument("classifier", type=Path, help="folder of `cmae finetune`, or a checkpoint")
    parser.add_argument("shards", nargs="+", help="labelled tars with indices")
    parser.add_argument("--out", type=Path, help="folder; default: `classify` in the run's folder")
    parser.add_argument("--device", default="auto", help="'auto' takes CUDA when there is a GPU")
    parser.add_argument(
        "--centre_share", type=float, help="side of the square over the shorter side; as in its run"
    )

    def run(parsed: Namespace) -> int:
        from cmae.train.commands.evaluate import classify

        return classify(
            parsed.classifier,
            parsed.shards,
            out=parsed.out,
            device=parsed.device,
            centre_share=parsed.centre_share,
        )

    return run


def _sweep(parser: Parser) -> Run:
    from cmae.train.config_parser import recipe_names

    parser.add_argument("file", help=f"YAML file, or one of: {', '.join(recipe_names('sweeps'))}")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds, from 0")
    parser.add_argument("--out", type=Path, help="folder; default: runs/NAME")
    parser.add_argument("--train", type=str, help="labelled tars, for k-NN and the probe")
    parser.add_argument("--val", type=str, help="labelled tars to score")
    parser.add_argument(
        "--set", nargs="+", default=[], help="settings of all variants, such as optim.epochs=100"
    )
    parser.add_argument(
        "--launcher", default="", help="such as 'torchrun --nproc-per-node 8'; default: this Python"
    )

    def run(parsed: Namespace) -> int:
        from cmae.train.commands.sweep import run_sweep

        return run_sweep(
            parsed.file,
            seeds=parsed.seeds,
            out=parsed.out,
            settings=parsed.set,
            train=parsed.train,
            val=parsed.val,
            launcher=parsed.launcher,
        )

    return run


def _report(parser: Parser) -> Run:
    parser.add_argument("run", type=Path, help="folder of the run (run.out)")
    parser.add_argument(
        "--shards", type=str, help="labelled tars: pictures of what the newest encoder sees in them"
    )
    parser.add_argument("--out", type=Path, help="HTML file; default: report.html in the folder")

    def run(parsed: Namespace) -> int:
        from cmae.train.commands.look.report import report

        return report(parsed.run, shards=parsed.shards, out=parsed.out)

    return run


def _launch(parser: Parser) -> Run:
    # `main` hands the words over as they are: they are torchrun's and another command's.
    parser.add_argument(
        "words", nargs="*", help="flags of torchrun (torchrun --help), then a command with its own"
    )

    def run(parsed: Namespace) -> int:
        from cmae.train.commands.launch import launch

        return launch(parsed.words)

    return run


def _compare_runs(parser: Parser) -> Run:
    parser.add_argument("runs", type=Path, nargs="+", help="folders of two to six runs")
    parser.add_argument("--html", type=Path, help="page to write, with the curves over each other")
    parser.add_argument(
        "--write_bands",
        type=Path,
        help="YAML file to write: the range of each metric over runs of several seeds, for run.bands",
    )

    def run(parsed: Namespace) -> int:
        from cmae.train.commands.look.report import compare

        return compare(parsed.runs, out=parsed.html, bands=parsed.write_bands)

    return run


def _top(parser: Parser) -> Run:
    parser.add_argument("run", type=Path, help="folder of the run (run.out)")
    parser.add_argument("--once", action="store_true", help="print one frame and exit, for logs")
    parser.add_argument("--every_s", type=float, default=2.0, help="seconds between two frames")

    def run(parsed: Namespace) -> int:
        from cmae.train.commands.look.top import top

        return top(parsed.run, once=parsed.once, every_s=parsed.every_s)

    return run


def _demo(parser: Parser) -> Run:
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/demo"),
        help="folder for tiles, shards, checkpoints, metrics and images",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of weights, order of the data, views and masks"
    )

    def run(parsed: Namespace) -> int:
        from cmae.train.commands.demo.run import demo

        return demo(parsed.out, parsed.seed)

    return run


def _doctor(parser: Parser) -> Run:
    parser.add_argument(
        "--quick",
        action="store_true",
        help="only what may change while a container runs: for a health check",
    )
    parser.add_argument(
        "--all_ranks",
        action="store_true",
        help="all machines together, started by a launcher: cmae launch --nnodes 4 ... doctor --all_ranks. "
        "What differs between them, the rate of an all-reduce, and what the next two flags ask for",
    )
    parser.add_argument(
        "--shards", help="with --all_ranks: local shards; each rank reads up to 256 MB of one"
    )
    parser.add_argument(
        "--runs", type=Path, help="with --all_ranks: folder that all nodes must share and write to"
    )

    def run(parsed: Namespace) -> int:
        if not parsed.all_ranks and (parsed.shards or parsed.runs):
            raise CmaeError("--shards and --runs belong to --all_ranks: add it")
        if parsed.all_ranks:
            from cmae.train.commands.cluster import check_all_ranks

            return check_all_ranks(shards=parsed.shards, runs=parsed.runs)
        from cmae.train.commands.doctor import doctor

        return doctor(quick=parsed.quick)

    return run


def _reconstruct(parser: Parser) -> Run:
    parser.add_argument(
        "checkpoint", type=Path, help="checkpoint of a run, or made by `cmae import`"
    )
    parser.add_argument("images", type=Path, nargs="+", help="files; the centre square is used")
    parser.add_argument("--out", type=Path, default=Path("reconstruction.png"), help="PNG to write")
    parser.add_argument("--seed", type=int, default=0, help="seed of the mask")

    def run(parsed: Namespace) -> int:
        from cmae.train.commands.look.reconstruct import reconstruct

        return reconstruct(parsed.checkpoint, parsed.images, parsed.out, parsed.seed)

    return run


def _import(parser: Parser) -> Run:
    parser.add_argument(
        "source", type=Path, help="a file that torch.save wrote: a state dict, or a dict with one"
    )
    parser.add_argument("out", type=Path, help="checkpoint to write")
    parser.add_argument(
        "--layout",
        choices=("authors", "mae", "convmae"),
        default="authors",
        help="names in the file: ZhichengHuang/CMAE, facebookresearch/mae, or Alpha-VL/ConvMAE",
    )
    parser.add_argument(
        "--channel_order",
        choices=("rgb", "bgr"),
        default="bgr",
        help="order of the colour channels that the network was trained on (layout 'authors' only); the "
        "authors' own weights are 'bgr'",
    )
    parser.add_argument(
        "--trust",
        type=bool,
        default=False,
        help="also unpickle objects that are not tensors (logs and settings of training frameworks); such a "
        "file can run any code, so know where it comes from",
    )
    published = "those of the published model of its sizes"
    for name, words, default in (
        ("num_heads", "the encoder", published),
        ("decoder_num_heads", "the decoders", "16"),
    ):
        parser.add_argument(
            f"--{name}",
            type=int,
            help=f"attention heads of {words}, which no file says; default: {default}",
        )

    def run(parsed: Namespace) -> int:
        from cmae.train.commands.weights.importing import import_weights

        return import_weights(
            parsed.source,
            parsed.out,
            parsed.layout,
            parsed.channel_order,
            num_heads=parsed.num_heads,
            decoder_num_heads=parsed.decoder_num_heads,
            trust=parsed.trust,
        )

    return run


def _export(parser: Parser) -> Run:
    parser.add_argument("checkpoint", type=Path, help="checkpoint of this project")
    parser.add_argument("out", type=Path, help="file or folder to write")
    from cmae.train.commands.weights.exporting import FORMATS

    parser.add_argument(
        "--to",
        choices=tuple(FORMATS),
        default="timm",
        help="; ".join(f"{name}: {text}" for name, text in FORMATS.items()),
    )
    parser.add_argument(
        "--branch",
        choices=("online", "target"),
        default="online",
        help="'online' is the trained encoder, 'target' its moving average",
    )

    def run(parsed: Namespace) -> int:
        from cmae.train.commands.weights.exporting import export_weights

        return export_weights(parsed.checkpoint, parsed.out, parsed.branch, parsed.to)

    return run


def _function(module: str, name: str) -> Callable[[Parser], Run]:
    """A command that is a function of a module of this package, whose docstring is its help."""

    def build(parser: Parser) -> Run:
        function = getattr(import_module(f"cmae.train.commands.{module}"), name)
        parser.description = str(getdoc(function)).split("\n\nArgs:")[0]
        return _call(parser, function)

    return build


_SEVERAL: dict[str, tuple[type, str]] = {
    "shards": (
        str,
        "tar files, folders, quoted globs, URLs, or braces such as train-{000000..000099}.tar",
    ),
    "paths": (Path, "folders of runs, or checkpoints"),
}


def _call(parser: Parser, function: Callable[..., int]) -> Run:
    """Take arguments and their help from a function; those of `_SEVERAL` take several words."""
    names = list(signature(function).parameters)
    skip: set[str | int] = {name for name in names if name in _SEVERAL}
    for name in names:
        if name in _SEVERAL:
            kind, text = _SEVERAL[name]
            parser.add_argument(name, nargs="+", type=kind, help=text)
    parser.add_function_arguments(function, as_group=False, as_positional=True, skip=skip)

    def run(parsed: Namespace) -> int:
        chosen: dict[str, Any] = {name: parsed[name] for name in names}
        return function(**chosen)

    return run


COMMANDS: dict[str, Command] = {
    "demo": Command(
        "pretrain a micro CMAE on real photographs, in minutes, on any machine",
        _demo,
        "Pretrain a micro CMAE on tiles of real photographs and score it beside MAE and untrained baselines. "
        "Exits with 0 if its k-NN accuracy is 3 points above those of MAE and of both baselines, else with "
        "1. Run it again after an interruption and it continues; delete the folder to start afresh.",
    ),
    "doctor": Command(
        "check this machine and say what to fix",
        _doctor,
        "Check this machine: packages, GPU, memory, limits. Exit code 1 if something needed does not work.",
        only_shows=True,
    ),
    "shards": Command(
        "write, index, verify, repair and inspect WebDataset shards",
        commands={
            "write": Command(
                "copy a folder of JPEGs into shards with their indices",
                _function("shards", "write"),
            ),
            "index": Command(
                "index shards made elsewhere, for reading at random", _function("shards", "index")
            ),
            "verify": Command(
                "read every byte and compare it with the indices",
                _function("shards", "verify"),
                only_shows=True,
            ),
            "repair": Command(
                "write clean copies of damaged shards", _function("shards", "repair")
            ),
            "inspect": Command(
                "print what shards hold; draw a contact sheet",
                _function("shards", "inspect"),
                only_shows=True,
            ),
        },
    ),
    "plan": Command(
        "predict hours, memory and what binds on GPUs that are not there",
        _plan,
        "Predict a run before anybody rents GPUs: step, network, data rate, memory, hours, and what binds. "
        "Example: cmae plan --gpus 32xa100 --recipe cmae_vit_b cmae_vit_l --epochs 1600",
        only_shows=True,
    ),
    "pretrain": Command(
        "pretrain from shards; continues by itself",
        _pretrain,
        "Pretrain on WebDataset shards. Example: cmae pretrain --recipe cmae_vit_b "
        "--data.shards '/data/imagenet/train-*.tar' --run.out runs/vit_b. "
        "The same command continues the run after any interruption.",
    ),
    "bench": Command(
        "measure loader, step, kernels and both together; or count what a step costs at best",
        _bench,
        "Count what a recipe's training step computes, moves and keeps, and what a GPU makes of it at best. "
        "Example: cmae bench --recipe cmae_vit_b --gpu h200 --batch_size 256. To measure on this machine: "
        "`cmae bench all --help`, or loader, step, kernels, e2e; `cmae bench compare --help`.",
        only_shows=True,
        commands={
            "loader": Command(
                "images/s of the loader beside other people's",
                _measure("loader"),
                "Measure the loader on a recipe's shards beside other people's loaders, in interleaved "
                "rounds, with the synthetic ceiling. Example: cmae bench loader --recipe cmae_vit_b "
                "--data.shards '/data/imagenet/train-*.tar' --colors exact none",
            ),
            "step": Command(
                "images/s, TFLOP/s and MFU of the training step",
                _measure("step"),
                "Measure a recipe's training step on synthetic batches, beside MAE's step as its public "
                "code does it; --levers true measures each switch instead. Example: cmae bench step --recipe "
                "cmae_vit_b --batch_size 256",
            ),
            "kernels": Command(
                "each kernel beside eager and compiled torch",
                _measure("kernels"),
                "Measure every kernel, forward and backward, beside eager and compiled torch and the floor "
                "of what must be moved. Example: cmae bench kernels",
            ),
            "e2e": Command(
                "the step fed by the loader, over the step on synthetic batches",
                _measure("e2e"),
                "Measure how much of the step's rate is left when real images feed it. Example: cmae bench "
                "e2e --recipe cmae_vit_b --data.shards '/data/imagenet/train-*.tar'",
            ),
            "all": Command(
                "kernels, step, loader and e2e",
                _measure("kernels", "step", "loader", "e2e"),
                "Measure kernels, step, loader and both together. Example: cmae bench all --recipe "
                "cmae_vit_b --data.shards '/data/imagenet/train-*.tar'",
            ),
            "compare": Command(
                "what changed between two result files",
                _compare,
                "Has something become slower? Row by row; exit code 1 on a regression. "
                "Example: cmae bench compare old.json new.json",
                only_shows=True,
            ),
        },
    ),
    "evaluate": Command(
        "score an encoder: k-NN, linear probe, partial fine-tuning, classification",
        commands={
            "knn": Command(
                "k-nearest-neighbour accuracy of frozen features",
                _evaluate_knn,
                "Score frozen features by their k nearest neighbours. Example: cmae evaluate knn runs/vit_b "
                "--train '/data/imagenet/train-*.tar' --val '/data/imagenet/val-*.tar'",
            ),
            "linear": Command(
                "linear classifiers on frozen features",
                _evaluate_linear,
                "Fit linear classifiers to frozen features, which are computed once and kept: logistic "
                "regression, and MAE's LARS probe at many learning rates. Settings are chosen on a tenth of "
                "the training images. Example: cmae evaluate linear runs/vit_b --train "
                "'/data/imagenet/train-*.tar' --val '/data/imagenet/val-*.tar' --blocks 1 4",
            ),
            "partial": Command(
                "fine-tune the last blocks alone",
                _evaluate_partial,
                "Fine-tune the last k blocks alone, for several k. Takes what `cmae finetune` takes. "
                "Example: cmae evaluate partial --recipe finetune_vit_b --encoder runs/vit_b ...",
            ),
            "classify": Command(
                "score a fine-tuned classifier on labelled shards",
                _classify,
                "Score a fine-tuned classifier: top-1, top-5, per class, and a picture of what is taken for "
                "what. Example: cmae evaluate classify runs/finetune '/data/imagenet/val-*.tar'",
            ),
        },
    ),
    "finetune": Command(
        "train an encoder with a head on labels; continues by itself",
        _finetune,
        "Fine-tune an encoder on labelled shards, or train a linear probe on images (--recipe linear). "
        "Example: cmae finetune --recipe finetune_vit_b --encoder runs/vit_b --train "
        "'/data/imagenet/train-*.tar' --val '/data/imagenet/val-*.tar' --out runs/finetune. The same command "
        "continues the run after any interruption.",
    ),
    "launch": Command(
        "start a command on all GPUs of this node, as torchrun does",
        _launch,
        "Start a command on every process of this node: torchrun's flags first, then a command of cmae with "
        "its own. Unlike torchrun's, the exit code tells what happened: 75 if it was stopped and wrote a "
        "checkpoint, else that of the first process that failed. Example: cmae launch --nproc-per-node 8 "
        "pretrain --recipe cmae_vit_b --data.shards '/data/imagenet/train-*.tar'",
    ),
    "sweep": Command(
        "a recipe with one setting changed at a time, several seeds, one table",
        _sweep,
        "Pretrain the variants of a sweep file with several seeds, score frozen features (k-NN, logistic "
        "probe), and write one table and one picture with deviations and paired differences. What is done is "
        "not done again. Example: cmae sweep ablation_vit_b --seeds 3 --train '/data/imagenet/train-*.tar' "
        "--val '/data/imagenet/val-*.tar' --set \"data.shards=/data/imagenet/train-*.tar\"",
    ),
    "tune": Command(
        "find the loader's fastest settings for this machine and shards",
        _tune,
        "Find the loader's threads, readers, queue depth and decoder split for this machine and these "
        "shards, in under three minutes, and write them as a recipe. Takes what `cmae pretrain` takes; "
        "settings given here are not searched. Example: cmae tune --recipe cmae_vit_b --data.shards "
        "'/data/imagenet/train-*.tar', then cmae pretrain --recipe cmae_vit_b --recipe tuned.yaml ...",
    ),
    "top": Command(
        "watch a running job: ranks, loader stages, stragglers",
        _top,
        "Watch a running job: rates, where each rank waits, its loader's stages, stragglers. Works from any "
        "machine that sees the run's folder. Exit code 1: the run failed, its processes are gone, or there "
        "has been no news of it for ten minutes.",
        only_shows=True,
    ),
    "profile": Command(
        "measure where a step's time goes, and what would help",
        _profile,
        "Measure where the time of a training step goes, and what would make it shorter. Takes the recipe "
        "and settings of `cmae pretrain`. Example: cmae profile --recipe cmae_vit_b "
        "--data.shards '/data/imagenet/train-*.tar'. Profiles that are there already: `cmae profile show "
        "--help`, `cmae profile diff --help`.",
        commands={
            "show": Command("print a profile; draw it where asked", _profile_show, only_shows=True),
            "diff": Command(
                "print what changed between two profiles", _profile_diff, only_shows=True
            ),
        },
    ),
    "report": Command(
        "one page of a run: curves, evaluations, pictures, configuration",
        _report,
        "Write one HTML page of a run: curves, evaluations, reconstructions, nearest neighbours, attention, "
        "a map of the features, configuration. Example: cmae report runs/vit_b --shards "
        "'/data/imagenet/val-*.tar'",
    ),
    "compare": Command(
        "what differs between runs: settings, scores, curves",
        _compare_runs,
        "Print the settings and scores that differ between runs; --html writes a page with their curves over "
        "each other. Example: cmae compare runs/a runs/b --html compare.html",
        only_shows=True,
    ),
    "reconstruct": Command(
        "image of original, masked and reconstruction",
        _reconstruct,
        "Draw original, masked input and reconstruction of image files.",
    ),
    "replay": Command(
        "repeat one step of a run, and find where its numbers stop being finite",
        _function("look.replay", "replay"),
    ),
    "checkpoint": Command(
        "list, verify and prune the checkpoints of a run",
        commands={
            "ls": Command(
                "what a run has kept, and what was set aside and why",
                _function("weights.checkpoints", "ls"),
                only_shows=True,
            ),
            "verify": Command(
                "read checkpoints whole and compare them with their digests",
                _function("weights.checkpoints", "verify"),
                only_shows=True,
            ),
            "prune": Command(
                "delete those that no rule keeps", _function("weights.checkpoints", "prune")
            ),
            "join": Command(
                "one file of a checkpoint in shards", _function("weights.checkpoints", "join")
            ),
        },
    ),
    "import": Command(
        "weights of the authors' code, of MAE or of ConvMAE -> checkpoint",
        _import,
        "Turn a checkpoint of the CMAE authors' code, MAE or ConvMAE into one of this project, for `cmae "
        "reconstruct`, `cmae export` and `cmae pretrain --init_from`.",
    ),
    "export": Command(
        "checkpoint -> encoder for timm, Hugging Face, ONNX or torch.export, with a card",
        _export,
        "Write the encoder of a checkpoint with timm's names, for timm.create_model('vit_base_patch16_224', "
        "num_classes=0, checkpoint_path=OUT).",
    ),
}
