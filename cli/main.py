"""The `vitarium` command: one subcommand per module of this package.

Exit status: 0 done, 1 the work failed, 2 bad usage or configuration, 130 or 143 interrupted.
Nothing heavy is imported before the subcommand is known.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import re
import sys

# Each module has `parser() -> jsonargparse.ArgumentParser` and `run(config) -> int | None`.
COMMANDS = {
    "demo": "train, evaluate, predict and measure on handwritten digits in one go",
    "train": "train a model on digits or on your own images",
    "eval": "evaluate a checkpoint on held-out images",
    "data": "read a data set once: sizes, broken files, duplicates, balance",
    "predict": "classify image files with a checkpoint",
    "explain": "draw where a position of an image looks, and which heads matter",
    "prune": "remove hidden units and heads from a trained model, and compare",
    "quantize": "make a trained model compute in int8, and compare",
    "convert": "write an official checkpoint as safetensors in our names",
    "export": "write a model as a torch.export program and as ONNX, checked",
    "bench": "measure models: parameters, GFLOPs, latency, throughput, memory",
    "testbed": "train every mixer in one macro design, and compare them",
    "probes": "train mixers on drawn tasks that tell what they see",
    "recommend": "models by published accuracy that fit a latency, on this machine",
    "list": "list the models of this package, with published figures",
    "info": "describe one model",
    "doctor": "versions, devices, and which backends can run",
    "simulate": "how many key tiles a neighborhood attention kernel must visit",
}
# What public functions raise on bad input: the message says it all, a traceback would hide it.
REPORTED = (ValueError, TypeError, OSError, FloatingPointError, NotImplementedError)


def main(arguments: list[str] | None = None) -> int:
    """Run one subcommand; the return value is the process's exit status."""
    try:
        return _main(sys.argv[1:] if arguments is None else arguments)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except BrokenPipeError:  # the reader of our output has left, as in `vitarium list | head`
        sys.stderr.close()
        return 141


def _main(arguments: list[str]) -> int:
    options = _top_level_parser().parse_args(arguments)
    name = options.command
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, 1) or COMMANDS
        hint = f"did you mean one of {', '.join(close)}?"
        return _fail(f"unknown command {name!r}; {hint}", 2)
    module = importlib.import_module(f"vitarium.cli.{name}")
    parser = module.parser()
    parser.prog = f"vitarium {name}"
    parser.exit_on_error = False
    try:
        try:
            config = parser.parse_args(options.arguments)
            return module.run(config) or 0
        except argparse.ArgumentError as error:
            return _fail(_usage_message(str(error), parser) + f"; see {parser.prog} --help", 2)
    except REPORTED as error:
        if options.traceback:
            raise
        return _fail(str(error), 1)


def _top_level_parser() -> argparse.ArgumentParser:
    width = max(map(len, COMMANDS))
    parser = argparse.ArgumentParser(
        prog="vitarium",
        description="Efficient vision backbones: train, evaluate and measure them.",
        epilog="commands:\n"
        + "".join(f"  {name:{width}}  {text}\n" for name, text in COMMANDS.items())
        + "\n`vitarium COMMAND --help` says more.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    parser.add_argument("command", metavar="COMMAND", help="one of those below")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser


def _usage_message(message: str, parser: argparse.ArgumentParser) -> str:
    """The parser's complaint on one line, with the option that was probably meant."""
    message = " ".join(message.split())
    unknown = re.search(r"nrecognized arguments: --([\w.-]+)", message)
    if unknown:
        from vitarium.train.config import nearest

        options = [text[2:] for text in parser._option_string_actions if text.startswith("--")]
        message += nearest(unknown[1], options)
    return message


def _fail(message: str, status: int) -> int:
    print(f"vitarium: error: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
