"""`cmae launch`: torchrun whose exit code tells a stop from a fault."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence

from cmae.errors import CmaeError
from cmae.train.monitor.console import PlainConsole

STOPPED = 75
"""Exit code of a run that wrote a checkpoint because it was asked to stop: start it again."""
_ENDED_BY_SIGTERM = -15


def launch(words: Sequence[str]) -> int:
    """Start a command on every process of this node, as torchrun does.

    torchrun itself ends with 1 whatever happened, so that a scheduler cannot tell a preempted run, which
    should start again, from a broken one, which should not.

    Args:
        words: Flags of torchrun, then a command of `cmae` with its own: --nproc-per-node 8 pretrain ...

    Returns:
        The exit code: 0; 75 if the processes were stopped and wrote a checkpoint; else that of the first
        process that failed, 1 if a signal ended it.

    Raises:
        CmaeError: No command among the words.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import get_args_parser, run

    parser = get_args_parser()
    place = command_place(words, parser._option_string_actions)
    if place is None:
        raise CmaeError(
            "name a command after torchrun's flags, such as: cmae launch --nproc-per-node 8 "
            "pretrain --recipe cmae_vit_b"
        )
    # Else ranks that are started again meet in the store of those before, find their addresses and hang.
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    parsed = parser.parse_args([*words[:place], "-m", "cmae.train", *words[place:]])
    try:
        run(parsed)
    except SignalException as error:
        return _say(STOPPED, f"stopped by {error.sigval.name}")
    except ChildFailedError as error:
        rank, first = error.get_first_failure()
        codes = {failure.exitcode for failure in error.failures.values()}
        if first.exitcode == STOPPED or codes <= {STOPPED, _ENDED_BY_SIGTERM}:
            return _say(STOPPED, "stopped, with a checkpoint")
        if first.exitcode > 0:
            return _say(
                first.exitcode, f"rank {rank} failed first, with exit code {first.exitcode}"
            )
        return _say(1, f"rank {rank} failed first, ended by signal {-first.exitcode}")
    return 0


def command_place(words: Sequence[str], options: Mapping[str, object]) -> int | None:
    """Index of the first word that is neither a flag of torchrun nor its value; None if there is none.

    Args:
        words: Flags and a command.
        options: Actions of torchrun's parser by flag; those that take no value have `nargs` 0.
    """
    index = 0
    while index < len(words):
        word = words[index]
        if not word.startswith("-"):
            return index
        takes_value = getattr(options.get(word), "nargs", 0) != 0
        index += 2 if takes_value and "=" not in word else 1
    return None


def _say(code: int, text: str) -> int:
    PlainConsole(stderr=True).print(f"cmae launch: {text}; exit code {code}", soft_wrap=True)
    sys.stderr.flush()
    return code
