"""How a program of this package ends: one line for every error, and an exit status that scripts can rely on.

| status | when |
|---|---|
| 0 | it worked |
| 2 | the arguments cannot be parsed (`ArgumentError`, or the command line's own parser) |
| 75 | preempted: the run has saved itself and asks to be queued again (`Preempted` of `training` passes through) |
| 130 | interrupted from the keyboard |
| 143 | ended by SIGTERM, after cleaning up (`SystemExit(143)` passes through) |
| 1 | everything else |

Imports neither torch nor transformers, so that a mistyped option is answered at once.
"""

import sys
from collections.abc import Callable, Sequence

from dinov3_hf.errors import ArgumentError

# Exceptions whose message is written for the user. Others are bugs, ours or a dependency's: the line names their type.
USER_ERRORS = (ValueError, OSError, ImportError, RuntimeError, NotImplementedError)


# What torch.distributed raises when another process is gone; gloo has no class of its own.
_LOST_PROCESS = ("DistBackendError", "DistNetworkError")
_GLOO = "gloo/transport"


def one_line(error: BaseException) -> str:
    """What `error` says, as one line of text."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    text = str(error)
    if text.startswith("Caught ") and "Original Traceback" in text:
        # A data worker's error carries the worker's traceback in its message; the last line is what was raised there.
        text = text.rstrip().rpartition("\n")[2].partition(": ")[2]
    if type(error).__name__ in _LOST_PROCESS or _GLOO in text:
        return (
            "another process of the run has ended; look at what it said, and go on with --resume_from_checkpoint last"
        )
    message = " ".join(text.split())
    if isinstance(error, USER_ERRORS) and message:
        return message
    name = type(error).__name__
    return f"{name}: {message} (--debug shows where)" if message else f"{name} (--debug shows where)"


def run(main: Callable[[list[str]], object], argv: Sequence[str] | None = None) -> None:
    """Call `main(arguments)` and end the process as the table above says if it raises.

    Args:
        main: takes the arguments that follow the program's name; what it returns is ignored.
        argv: those arguments; `None` reads `sys.argv`. `--debug` may stand anywhere among them: it is taken out here,
            and lets an error through with its traceback.

    Raises:
        SystemExit: with the error's status, if `main` raises and `--debug` is not given.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "--debug" in arguments:
        main([argument for argument in arguments if argument != "--debug"])
        return
    try:
        main(arguments)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ArgumentError) else 1)
