"""The command line that every job shares. Floor: above config; no step and no Ray."""

import argparse
import json
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

from cp2image.config import Config
from cp2image.config_reading import read_config
from cp2image.errors import Cp2ImageError
from cp2image.storage import exists

DONE, BUG, REFUSED = 0, 1, 2
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_PATIENCE_S = 8.0
"""Seconds that a dry run waits for a store to say whether something is there."""


class _Stopped(KeyboardInterrupt):
    """Unwinds like Ctrl-C, so that whatever cleans up after that does so here too."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.signal = signal.Signals(number)


def run_job(
    description: str,
    action: Callable[[Config], object],
    argv: Sequence[str] | None = None,
    *,
    reads: Sequence[str] = (),
    writes: Sequence[str] = (),
    plates_of: str = "",
    check: Callable[[Config], object] | None = None,
) -> int:
    """Parse the command line, run one step, print its result or one readable error.

    Parameters
    ----------
    description
        Shown by ``--help``: the job's docstring.
    action
        The step; ``str`` of what it returns is printed, unless it is None.
    argv
        Arguments; None for the process's own.
    reads, writes
        Dotted keys of the config that say where; ``--dry-run`` prints them below the config, and
        whether there is something. ``*`` in one stands for each key of a dict.
    plates_of
        Section of the config whose ``plates`` may be chosen by ``--plates``.
    check
        What ``--dry-run`` calls beside: it refuses what the step would, without reading anything.

    Returns
    -------
    int
        Exit code: 0 done; 1 a bug, with its traceback; 2 input or settings refused, one message
        without a traceback; 130 after SIGINT (Ctrl-C), 143 after SIGTERM, both unwound.
    """
    parser = _parser(description)
    if plates_of:
        parser.add_argument(
            "--plates",
            metavar="PLATE",
            nargs="+",
            help="only these plates; others may follow later",
        )
    options = parser.parse_args(argv)
    changes = list(options.set or [])
    if plates_of and options.plates:
        changes.append(f"{plates_of}.plates={json.dumps(options.plates)}")
    try:
        with _signals_unwind():
            config = read_config(options.config, changes).anchor()
            if options.dry_run:
                if check is not None:
                    check(config)
                print(config.yaml(), end="", flush=True)
                for line in _places(config, reads, writes):
                    print(line, flush=True)
                return DONE
            result = action(config)
            if result is not None:
                print(result, flush=True)
            return DONE
    except _Stopped as stop:
        return _stopped(stop.signal)
    except KeyboardInterrupt:
        return _stopped(signal.SIGINT)
    except SystemExit as stop:
        if stop.code != signal.SIGTERM:  # Ray's own handler exits with the number of the signal
            raise
        return _stopped(signal.SIGTERM)
    except Exception as error:
        refused = _refusal(error)
        if refused is None:
            traceback.print_exc()
            return BUG
        print(f"error: {refused}", file=sys.stderr, flush=True)
        return REFUSED


def _parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML of the experiment, path or URI")
    parser.add_argument(
        "--set",
        metavar="SECTION.KEY=VALUE",
        action="append",
        help="replace one value of the config, written in YAML; may be repeated",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the complete config and what would be read and written; run nothing",
    )
    return parser


def _places(config: Config, reads: Sequence[str], writes: Sequence[str]) -> Iterator[str]:
    """Say, as comments below the YAML, what would be read and written."""
    for verb, keys in (("reads", reads), ("writes", writes)):
        for key in keys:
            for name, value in _values(config, key.split(".")):
                several = list(value.values()) if isinstance(value, dict) else value
                for one in several if isinstance(several, list) else [several]:
                    place = getattr(one, "uri", one)
                    if place:
                        yield f"# {verb} {name}: {place} ({_state(place, verb)})"


def _values(node: Any, names: Sequence[str], seen: str = "") -> Iterator[tuple[str, Any]]:
    """Find the values of a dotted key, with its full name; ``*`` stands for each key of a dict."""
    if not names or node is None:
        yield seen, node
        return
    name, *rest = names
    inside = node if isinstance(node, dict) else {name: getattr(node, name, None)}
    for key in inside if name == "*" else [name]:
        yield from _values(inside.get(key), rest, f"{seen}.{key}".removeprefix("."))


def _state(place: str, verb: str) -> str:
    if place.startswith(("models:/", "runs:/")):
        return "of MLflow"
    found: list[bool] = []
    errors: list[Exception] = []

    def look() -> None:
        try:
            found.append(exists(place))
        except Exception as error:
            errors.append(error)

    # A daemon: a store that does not answer must not keep the process from ending.
    looking = threading.Thread(target=look, daemon=True)
    looking.start()
    looking.join(_PATIENCE_S)
    if errors:
        return str(errors[0])
    if not found:
        return f"cannot tell: no answer in {_PATIENCE_S:g} s"
    if verb == "reads":
        return "found" if found[0] else "not there"
    return "there already" if found[0] else "new"


@contextmanager
def _signals_unwind() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, _: FrameType | None) -> None:
        raise _Stopped(number)

    before = {number: signal.signal(number, stop) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stopped(number: signal.Signals) -> int:
    print(f"stopped by {number.name}; run the same command to go on", file=sys.stderr, flush=True)
    return 128 + number


def _refusal(error: BaseException) -> Cp2ImageError | None:
    """Find the refusal in ``error``; Ray wraps a worker's exception and keeps it as ``cause``."""
    inner = getattr(error, "cause", None)
    if isinstance(inner, BaseException):
        return _refusal(inner)
    if isinstance(error, Cp2ImageError):
        return error
    wrapped = type(error).__module__.startswith("ray.") and error.__cause__
    return _refusal(wrapped) if wrapped else None
