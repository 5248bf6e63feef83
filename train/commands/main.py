"""The command `cmae`. Each subcommand is imported only when it is called, so that help comes at once."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from jsonargparse import auto_cli, set_parsing_settings

from cmae.train.config_parser import (
    Parser,
    build_config,
    build_config_parser,
    build_sections,
    find_recipes,
    read_config,
    to_config,
    with_underscores,
)

Command = Callable[[Sequence[str]], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; the console script's entry."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0
    name, rest = arguments[0], [with_underscores(word) for word in arguments[1:]]
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        print(f"cmae: error: there is no command {name!r}{hint}", file=sys.stderr)
        print(f"commands: {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    try:
        return COMMANDS[name][1](rest)
    except (ValueError, OSError, RuntimeError) as error:
        # An OSError names its file; the others say all only when this project raised them itself.
        if isinstance(error, OSError) or _is_ours(error):
            if not _is_said_by_another_rank(error):
                print(f"cmae {name}: error: {error}", file=sys.stderr)
            return 1
        raise
    except KeyboardInterrupt:
        print(f"cmae {name}: interrupted", file=sys.stderr)
        return 130


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {summary}" for name, (summary, _) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: cmae COMMAND [--help] ...",
            "",
            "Pretrain Contrastive Masked Autoencoders from sharded images.",
            "",
            *lines,
            "",
            "start with `cmae demo`, or `cmae doctor` on a new machine",
        ]
    )


def _is_ours(error: BaseException) -> bool:
    """Whether this project raised the error itself: then its message says all, without a traceback."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and str(trace.tb_frame.f_globals.get("__name__")).startswith("cmae.")


def _is_said_by_another_rank(error: BaseException) -> bool:
    """Whether every rank of the run got this very error; then the first one's line is enough."""
    return getattr(error, "is_on_every_rank", False) and os.environ.get("RANK", "0") != "0"


def _pretrain(arguments: Sequence[str]) -> int:
    parser = build_config_parser(
        "cmae pretrain",
        "Pretrain on WebDataset shards. Example: cmae pretrain --recipe cmae_vit_b "
        "--data.shards '/data/imagenet/train-*.tar' --run.out runs/vit_b. "
        "The same command continues the run after any interruption.",
    )
    config = read_config(parser, arguments)
    from cmae.train.loop.pretrain import pretrain

    return pretrain(config).exit_code


def _tune(arguments: Sequence[str]) -> int:
    parser = build_config_parser(
        "cmae tune",
        "Find the loader's threads, readers, queue depth and decoder split for this machine and these "
        "shards, in under three minutes. Takes what `cmae pretrain` takes; settings given here are not "
        "searched. Example: cmae tune --recipe cmae_vit_b --data.shards '/data/imagenet/train-*.tar'",
    )
    from cmae.train.tuning.run import TuneOptions, tune

    parser.add_class_arguments(TuneOptions)
    parsed = parser.parse_args(find_recipes(arguments))
    options = {field.name: parsed[field.name] for field in fields(TuneOptions)}
    return tune(build_config(parser, parsed), TuneOptions(**options))


def _profile(arguments: Sequence[str]) -> int:
    from cmae.train.commands.profile import profile_run, profile_tools
    from cmae.train.profiling.config import ProfileConfig

    code = profile_tools(arguments)
    if code is not None:
        return code
    parser = build_config_parser(
        "cmae profile",
        "Measure where the time of a training step goes, and what would make it shorter. Takes the recipe "
        "and settings of `cmae pretrain`. Example: cmae profile --recipe cmae_vit_b "
        "--data.shards '/data/imagenet/train-*.tar'. Profiles that are there already are drawn by "
        "`cmae profile show` and `cmae profile diff`.",
    )
    parser.add_class_arguments(ProfileConfig, "profile")
    sections = build_sections(parser, parser.parse_args(find_recipes(arguments)))
    return profile_run(to_config(sections), sections["profile"])


def _call(function: Callable[..., int], prog: str, arguments: Sequence[str]) -> int:
    code: int = auto_cli(
        function, args=list(arguments), prog=prog, parser_class=Parser, as_positional=True
    )
    return code


def _shards(arguments: Sequence[str]) -> int:
    from cmae.train.commands import shards as shards_cli

    commands: dict[str, Any] = {
        "write": shards_cli.write,
        "index": shards_cli.index,
        "verify": shards_cli.verify,
        "repair": shards_cli.repair,
        "inspect": shards_cli.inspect,
    }
    code: int = auto_cli(
        commands,
        args=shards_cli.join_shards(arguments),
        prog="cmae shards",
        parser_class=Parser,
    )
    return code


def _bench(arguments: Sequence[str]) -> int:
    rest = [argument for argument in arguments if argument != "--model"]
    if len(rest) == len(arguments) and not {"-h", "--help"} & set(rest):
        raise ValueError("`cmae bench` has one kind of answer so far: add --model")
    parser = build_config_parser(
        "cmae bench --model",
        "Count what a recipe's training step computes, moves and keeps, and what a GPU makes of it at best. "
        "Example: cmae bench --model --recipe cmae_vit_b --gpu h200 --batch_size 256",
    )
    parser.add_argument("--gpu", default="h100", help="a GPU by name, or 'measured': this one")
    parser.add_argument("--batch_size", type=int, help="images in one pass on one GPU")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--results",
        type=Path,
        default=Path("benchmarks/results"),
        help="folder with files of benchmarks/bench_step.py",
    )
    config = read_config(parser, rest)
    chosen = parser.parse_args(find_recipes(rest))
    from cmae.train.commands.bench import bench_model

    return bench_model(
        config,
        chosen.gpu,
        batch_size=chosen.batch_size,
        results=chosen.results,
        as_json=chosen.json,
    )


def _reconstruct(arguments: Sequence[str]) -> int:
    parser = Parser(
        prog="cmae reconstruct",
        description="Draw original, masked input and reconstruction of image files.",
    )
    parser.add_argument("checkpoint", type=Path, help="of a run, or made by `cmae import`")
    parser.add_argument("images", type=Path, nargs="+", help="files; the centre square is used")
    parser.add_argument("--out", type=Path, default=Path("reconstruction.png"), help="PNG to write")
    parser.add_argument("--seed", type=int, default=0, help="of the mask")
    parsed = parser.parse_args(list(arguments))
    from cmae.train.commands.reconstruct import reconstruct

    return reconstruct(parsed.checkpoint, parsed.images, parsed.out, parsed.seed)


def _demo(arguments: Sequence[str]) -> int:
    from cmae.train.commands.demo import demo

    return _call(demo, "cmae demo", arguments)


def _import(arguments: Sequence[str]) -> int:
    from cmae.train.commands.weights import import_weights

    return _call(import_weights, "cmae import", arguments)


def _export(arguments: Sequence[str]) -> int:
    from cmae.train.commands.weights import export_weights

    return _call(export_weights, "cmae export", arguments)


def _doctor(arguments: Sequence[str]) -> int:
    from cmae.train.commands.doctor import doctor

    return _call(doctor, "cmae doctor", arguments)


def _top(arguments: Sequence[str]) -> int:
    parser = Parser(
        prog="cmae top",
        description="Watch a running job: rates, where each rank waits, its loader's stages, stragglers. "
        "Works from any machine that sees the run's folder. Exit code 1: the run failed or is dead.",
    )
    parser.add_argument("run", type=Path, help="folder of the run (run.out)")
    parser.add_argument("--once", action="store_true", help="print one frame and exit, for logs")
    parser.add_argument("--every_s", type=float, default=2.0, help="seconds between two frames")
    parsed = parser.parse_args(list(arguments))
    from cmae.train.commands.top import top

    return top(parsed.run, once=parsed.once, every_s=parsed.every_s)


COMMANDS: dict[str, tuple[str, Command]] = {
    "demo": ("pretrain a micro CMAE on real photographs, in minutes, on any machine", _demo),
    "doctor": ("check this machine and say what to fix", _doctor),
    "shards": ("write, index, verify, repair and inspect WebDataset shards", _shards),
    "pretrain": ("pretrain from shards; continues by itself", _pretrain),
    "bench": ("--model: what a recipe's step costs on a GPU, at best", _bench),
    "tune": ("find the loader's fastest settings for this machine and shards", _tune),
    "top": ("watch a running job: ranks, loader stages, stragglers", _top),
    "profile": ("measure where a step's time goes, and what would help", _profile),
    "reconstruct": ("picture of original, masked and reconstruction", _reconstruct),
    "import": ("weights of the authors' code or of MAE -> checkpoint", _import),
    "export": ("checkpoint -> encoder weights for timm", _export),
}
