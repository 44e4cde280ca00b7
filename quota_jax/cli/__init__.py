"""The command line ``quota-jax``: one class per command, one readable line for every bad input."""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Protocol

from quota_jax import __version__
from quota_jax.errors import QuotaError

OK, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130

# Name -> class, and what the overview says. Modules are imported on use: `--help` needs no jax.
COMMANDS = {
    "demo": ("demo:Demo", "ask the shipped small model, in full precision and in 4 bits"),
    "convert": ("convert:Convert", "Hugging Face checkpoint -> quota_jax checkpoint"),
    "samples": ("samples:Samples", "published data sets -> list of samples for calibrate"),
    "calibrate": ("calibrate:Calibrate", "full-precision checkpoint -> quantized checkpoint"),
    "finetune": ("finetune:Finetune", "full-precision teacher -> quantized student, by training"),
    "recipe": ("recipe:ShowRecipe", "show or store which visual tokens are dropped where"),
    "profile": ("profile:ShowProfile", "where visual tokens can be dropped, layer by layer"),
    "flops": ("flops:ShowFlops", "what a prefill costs, layer by layer, under any recipe"),
    "generate": ("generate:Generate", "answer one prompt about one or more pictures"),
    "chat": ("chat:Chat", "a conversation about pictures, line by line"),
    "eval": ("eval:Eval", "benchmarks in their official formats, with scores and comparison"),
    "reproduce": ("reproduce:Reproduce", "the paper's tables and figures, beside the paper's own"),
    "inspect": ("inspect:Inspect", "configuration, parameters and bytes of a checkpoint"),
    "verify": ("verify:Verify", "check a checkpoint's files, and compare it with its source"),
    "bench": ("bench:Bench", "speed, memory and power of a model at its real shape"),
    "export": ("export:Export", "quota_jax checkpoint -> Hugging Face checkpoint"),
}


class Command(Protocol):
    """A frozen dataclass whose fields are the command's options."""

    def run(self) -> int:
        """Does the work; returns the exit status."""
        ...


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status.

    0 done; 1 a check failed or a defect; 2 bad input, told in one line on stderr; 130 interrupted.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        status = _dispatch(argv)
        sys.stdout.flush()
        return status
    except QuotaError as error:
        return _fail(str(error), BAD_INPUT)
    except KeyboardInterrupt:
        return _fail("interrupted", INTERRUPTED)
    except BrokenPipeError:
        # The reader went away (`| head`): later writes, at exit too, go nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _fail(f"{where}{error.strerror or error}", BAD_INPUT)
    except Exception as error:
        if os.environ.get("QUOTA_JAX_DEBUG"):
            raise
        text = " ".join(f"{type(error).__name__}: {error}".split())
        return _fail(f"internal: {text[:400]} (QUOTA_JAX_DEBUG=1 shows where)", FAILED)


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_overview())
        return OK if argv else BAD_INPUT
    if argv[0] == "--version":
        print(f"quota-jax {__version__}")
        return OK
    name = argv[0]
    if name not in COMMANDS:
        raise QuotaError(f"no command {name!r}; known: {', '.join(COMMANDS)}")

    from quota_jax.cli.parsing import parse

    module, _, attribute = COMMANDS[name][0].partition(":")
    kind = getattr(importlib.import_module(f"quota_jax.cli.{module}"), attribute)
    command = parse(kind, name, argv[1:])
    if command is None:
        return OK
    _quiet_libraries()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # libraries' advice to programmers
        return command.run()


def _overview() -> str:
    width = max(map(len, COMMANDS))
    rows = "\n".join(f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items())
    return (
        "usage: quota-jax COMMAND ...\n\n"
        "Vision-language models in JAX at 4 bits with most visual tokens pruned.\n\n"
        f"{rows}\n\n"
        "quota-jax COMMAND --help shows the options and an example; quota-jax --version."
    )


def _quiet_libraries() -> None:
    """Settings that libraries read when they are imported; the user's own settings win."""
    import logging

    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    defaults = {
        "TRANSFORMERS_VERBOSITY": "error",
        "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        # Compiled programs are kept, so that a second run starts at once.
        "JAX_COMPILATION_CACHE_DIR": os.path.join(cache, "quota_jax", "jax"),
        "JAX_COMPILATION_CACHE_MAX_SIZE": str(2**31),
        # XLA reports on standard error what is no user's business, for example cache details.
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    for key, value in defaults.items():
        os.environ.setdefault(key, value)
    for logger in ("absl", "orbax"):
        logging.getLogger(logger).setLevel(logging.ERROR)


def _fail(message: str, status: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return status
