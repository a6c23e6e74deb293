"""The console script `m2f`. Each verb is a module of `m2f.cluster.verbs`, imported only when it is called.

`m2f.cluster.exit_status` lists the exit statuses.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import logging
import os
import re
import select
import sys
from collections.abc import Sequence
from contextlib import suppress
from types import ModuleType
from typing import NoReturn

import m2f
from m2f.cluster.exit_status import MEANINGS, ExitStatus, end_process, flush_output
from m2f.cluster.terminal import print_err, print_out
from m2f.data_pipeline.errors import OutageError
from m2f.data_pipeline.printable import has_lost_output, printable
from m2f.model.errors import UserError
from m2f.model.extras import missing_extra

SECTIONS = {
    "first steps": {
        "demo": "m2f.cluster.verbs.demo",
        "init": "m2f.cluster.verbs.init",
        "config": "m2f.cluster.verbs.config",
        "doctor": "m2f.cluster.verbs.doctor",
    },
    "data": {
        "shard": "m2f.cluster.verbs.shard",
        "index": "m2f.cluster.verbs.index",
        "verify": "m2f.cluster.verbs.verify",
        "stats": "m2f.cluster.verbs.stats",
        "preview": "m2f.cluster.verbs.preview",
    },
    "training": {
        "plan": "m2f.cluster.verbs.plan",
        "train": "m2f.cluster.verbs.train",
        "submit": "m2f.cluster.verbs.submit",
        "checkpoint": "m2f.cluster.verbs.checkpoint",
    },
    "evaluation": {
        "eval": "m2f.cluster.verbs.evaluate",
        "score": "m2f.cluster.verbs.score",
        "compare": "m2f.cluster.verbs.compare",
        "analyze": "m2f.cluster.verbs.analyze",
    },
    "trained models": {
        "predict": "m2f.cluster.verbs.predict",
        "export": "m2f.cluster.verbs.export",
        "register": "m2f.cluster.verbs.register",
    },
}
"""Sections of `m2f --help`: heading, and the verbs below it with their modules."""

VERBS = {verb: module for verbs in SECTIONS.values() for verb, module in verbs.items()}

MORE_HELP = {
    "m2f VERB --help": "options of a verb, and an example",
    "m2f config --explain": "all settings of recipes",
    "m2f --version": "installed version",
}
"""Last section of `m2f --help`: commands and what they print."""

ONLY_PRINTING = ("stats", "plan", "config")
"""Verbs that only print. If `| head` closes the pipe, they end quietly, as nothing is left to do."""

RAY_NOISE = "|".join(
    (
        "A worker died or was killed while executing a task",
        "has been marked dead because the detector",
        "Raylet is terminated",
        "There are infinite retries remaining",
    )
)
"""Regular expression of messages that Ray must not print, because m2f reports each failure in one line."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return its exit status.

    Without `argv`, this reads the arguments from the command line, and exits instead of returning if PyTorch is loaded.
    """
    status: int = ExitStatus.DONE
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        try:
            status = _run_verb(words)
        except SystemExit:  # argparse raises this after it has printed help or an error
            sys.stdout.flush()
            raise
        if status == ExitStatus.DONE and has_lost_output() and words[0] != "train":  # its results are in files
            status = ExitStatus.FAILED
        flush_output()  # if the pipe is closed, a flush at interpreter shutdown would print a traceback
        if argv is None and "torch" in sys.modules:
            end_process(status)
        return status
    except BrokenPipeError:
        if not _stdout_is_closed():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return status


class _PrintableFormatter(logging.Formatter):
    """Logging formatter that removes terminal control sequences from messages."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


class _Parser(argparse.ArgumentParser):
    """Argument parser that suggests the closest match for an unknown option or choice."""

    def error(self, message: str) -> NoReturn:
        option = re.search(r"unrecognized arguments: (--[\w-]+)", message)
        choice = re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message)
        close: Sequence[str] = ()
        if option:
            close = difflib.get_close_matches(option[1], self._options(), n=1)
        elif choice:
            close = difflib.get_close_matches(choice[1], re.findall(r"[\w-]+", choice[2]), n=1)
        super().error(printable(f"{message}; did you mean {close[0]}?" if close else message))

    def _options(self) -> list[str]:
        """Return the visible long options of this parser and its subparsers.

        Subparsers leave unknown options to this parser.
        """
        subparsers = [a for a in self._actions if isinstance(a, argparse._SubParsersAction)]
        parsers = [self, *(parser for action in subparsers for parser in action.choices.values())]
        options = [option for parser in parsers for option in parser._option_string_actions.items()]
        return [name for name, action in options if name.startswith("--") and action.help != argparse.SUPPRESS]


def _run_verb(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        print_out(_overview())
        return ExitStatus.DONE if words else ExitStatus.USER_ERROR
    if words[0] == "--version":
        print_out(f"m2f {m2f.__version__}")
        return ExitStatus.DONE
    verb = words[0]
    if verb not in VERBS:
        close = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f"did you mean `m2f {close[0]}`?" if close else f"verbs: {', '.join(VERBS)}"
        return _fail(f"m2f: no such verb `{verb}`; {hint}")
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", RAY_NOISE)  # Ray reads this at import
    if logging.lastResort is not None:  # the handler that prints warnings of all modules
        logging.lastResort.setFormatter(_PrintableFormatter())
    module, args = parse_verb(words)
    try:
        return module.run(args)
    except KeyboardInterrupt:
        print_err(f"m2f {verb}: interrupted")
        return ExitStatus.INTERRUPTED
    except BrokenPipeError:
        if verb in ONLY_PRINTING or not _stdout_is_closed():
            raise
        with suppress(BrokenPipeError):  # standard error may be the same pipe
            _fail(f"m2f {verb}: stopped, because the reader of its output ended; write the output to a file instead")
        return ExitStatus.FAILED
    except Exception as error:
        user_error = _user_error(error)
        if (missing := missing_extra(f"m2f {verb}", error)) is not None:
            return _fail(str(missing))
        if user_error is None:
            raise
        status = ExitStatus.OUTAGE if isinstance(user_error, OutageError) else ExitStatus.USER_ERROR
        return _fail(f"m2f {verb}: {user_error}", status)


def _stdout_is_closed() -> bool:
    """Return whether the reader of standard output has ended, as in `m2f stats | head`.

    Sockets and pipes to other processes raise BrokenPipeError too, so the error alone does not tell.
    """
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)  # errors are always polled
    return bool(poll.poll(0))


def parse_verb(words: Sequence[str]) -> tuple[ModuleType, argparse.Namespace]:
    """Return the module of a known verb and its parsed arguments. Raises SystemExit as argparse does."""
    module = importlib.import_module(VERBS[words[0]])
    parser = _Parser(
        prog=f"m2f {words[0]}",
        description=module.SUMMARY,
        epilog=f"example:\n  {module.EXAMPLE}",
        formatter_class=argparse.RawDescriptionHelpFormatter,  # keeps the example on one line
        allow_abbrev=False,
    )
    module.add_arguments(parser)
    # Positional arguments and options may be mixed, except in verbs with subparsers: argparse does not support both.
    parse = parser.parse_args if hasattr(module, "KINDS") else parser.parse_intermixed_args
    return module, parse(words[1:])


def _user_error(error: BaseException) -> UserError | None:
    """Return the UserError to show, or None. For a failed Ray task, it is the cause; Ray's own text is a traceback."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, UserError):
        return cause
    return error if isinstance(error, UserError) else None


def _fail(message: str, status: ExitStatus = ExitStatus.USER_ERROR) -> int:
    print_err(message)
    return status


def _overview() -> str:
    lines = ["usage: m2f VERB ...", "", "Train Mask2Former-class segmentation models at scale."]
    for heading, verbs in SECTIONS.items():
        summaries = {verb: importlib.import_module(module).SUMMARY for verb, module in verbs.items()}
        lines += ["", f"{heading}:", *(f"  {verb:<11}{summary}" for verb, summary in summaries.items())]
    lines += ["", "exit statuses:", *(f"  {status:<11d}{MEANINGS[status]}" for status in ExitStatus)]
    lines += ["", "more help:", *(f"  {command:<22}{text}" for command, text in MORE_HELP.items())]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
