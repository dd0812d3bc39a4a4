"""Command lines: types of arguments, and one clear line for whatever is wrong."""

import argparse
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from utils.distributed import is_out_of_memory, leave, world_size


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults that there are."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that shows defaults and answers mistakes with one line and exit status 2."""

    def __init__(self, description: str | None) -> None:
        super().__init__(description=description, formatter_class=_Formatter, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        speaks = os.environ.get("RANK", "0") == "0"  # of several processes, which all have this command line
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n" if speaks else None)


def boolean(text: str) -> bool:
    """1, true, yes, on and their opposites, as users of the reference write them."""
    if text.lower() in ("1", "true", "yes", "on"):
        return True
    if text.lower() in ("0", "false", "no", "off"):
        return False
    raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")


def number(
    kind: type, least: float, most: float = float("inf"), exclusive: bool = False
) -> Callable[[str], float]:
    """An argument type: an int or float from ``least`` (``exclusive``: above it) to ``most``."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = float("nan")
        inside = least < value <= most if exclusive else least <= value <= most
        if not inside or value == float("inf"):
            bounds = f"{'above' if exclusive else 'at least'} {least:g}"
            bounds += "" if most == float("inf") else f" and at most {most:g}"
            word = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"expected {word} {bounds}, got {text!r}")
        return value

    return parse


positive_int = number(int, 1)
count = number(int, 0)
SWITCH: dict[str, Any] = {"type": boolean, "nargs": "?", "const": True, "metavar": "BOOL"}


def size(text: str) -> tuple[int, int]:
    """HEIGHT,WIDTH in pixels."""
    try:
        height, width = (int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected HEIGHT,WIDTH, got {text!r}") from None
    if height < 1 or width < 1:
        raise argparse.ArgumentTypeError(f"expected a positive height and width, got {text!r}")
    return height, width


def scales(text: str) -> tuple[float, ...]:
    """Factors separated by commas."""
    return tuple(number(float, 0, 8, exclusive=True)(part) for part in text.split(","))


def add_data_arguments(
    parser: argparse.ArgumentParser, datasets: Sequence[str], split: str
) -> argparse._ArgumentGroup:
    """The flags that say which images and labels are meant; ``split`` is the default one."""
    cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    workers = max(1, min(8, cores))
    data = parser.add_argument_group("data")
    data.add_argument("--data-dir", type=Path, required=True, help="the data set's folder")
    data.add_argument("--dataset", choices=datasets, help="which data set; guessed from the folder's layout")
    data.add_argument("--data-list", type=Path, help="file of 'image label' lines relative to --data-dir")
    data.add_argument("--split", default=split, help="the data set's own split, without --data-list")
    data.add_argument("--num-classes", type=number(int, 1, 255), help="needed for --dataset list")
    data.add_argument(
        "--ignore-label", type=number(int, 0, 255), default=255, help="label that does not count"
    )
    data.add_argument(
        "--num-workers", type=count, default=workers, help="processes that read the data for each that trains"
    )
    return data


def check_data_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """What the flags of ``add_data_arguments`` must fulfil together."""
    if args.dataset == "list" and (args.num_classes is None or args.data_list is None):
        parser.error("--dataset list needs --data-list and --num-classes")


def add_training_arguments(parser: argparse.ArgumentParser, precisions: Sequence[str]) -> None:
    """The flags of a training run that hold for any network: loss, schedule, speed, what it leaves."""
    rate, share = number(float, 0, exclusive=True), number(float, 0, 1)

    loss = parser.add_argument_group("loss")
    loss.add_argument("--ohem", **SWITCH, default=True, help="learn from hard pixels only")
    loss.add_argument("--ohem-thres", type=share, default=0.7, help="probability up to which one is hard")
    loss.add_argument(
        "--ohem-keep", type=count, default=100000, help="pixels kept at least, for every two images"
    )

    recipe = parser.add_argument_group("schedule")
    recipe.add_argument("--batch-size", type=positive_int, default=8, help="images a step, over all GPUs")
    recipe.add_argument("--num-steps", type=positive_int, default=60000, help="length of the run")
    recipe.add_argument("--start-iters", type=count, default=0, help="step to start at, for the schedule")
    recipe.add_argument("--learning-rate", type=rate, default=1e-2, help="at step 0; falls polynomially to 0")
    recipe.add_argument("--power", type=number(float, 0), default=0.9, help="of the polynomial")
    recipe.add_argument("--momentum", type=share, default=0.9, help="of SGD")
    recipe.add_argument("--weight-decay", type=number(float, 0), default=1e-4, help="of SGD")
    recipe.add_argument(
        "--freeze-bn",
        "--ft",
        **SWITCH,
        default=False,
        help="fine-tune: statistics, weights and biases of the normalisation stay as they are",
    )
    recipe.add_argument(
        "--random-seed",
        type=number(int, 0, 2**32 - 1),
        default=12345,
        help="of weights, order, crops, dropout",
    )

    speed = parser.add_argument_group("devices and speed")
    speed.add_argument(
        "--gpu", default="auto", help="auto, cpu, a GPU's number, or several: 0,1,2,3; or use torchrun"
    )
    speed.add_argument("--amp", choices=precisions, default="off", help="compute in a half type")
    speed.add_argument("--compile", **SWITCH, default=False, help="compile the network (torch.compile)")
    speed.add_argument(
        "--accumulate", type=positive_int, default=1, metavar="N", help="compute a step's batch in N parts"
    )
    speed.add_argument(
        "--checkpoint-activations", **SWITCH, default=False, help="compute twice instead of holding"
    )
    speed.add_argument(
        "--deterministic", **SWITCH, default=False, help="GPU kernels that give the same bits again, slower"
    )

    run = parser.add_argument_group("run")
    run.add_argument("--snapshot-dir", type=Path, default="snapshots", help="for checkpoints and logs")
    run.add_argument("--save-pred-every", type=positive_int, default=5000, help="steps between checkpoints")
    run.add_argument(
        "--keep-last", type=count, default=0, metavar="K", help="keep the newest K checkpoints; 0: all"
    )
    run.add_argument(
        "--val-every",
        type=count,
        default=0,
        metavar="N",
        help="steps between evaluations, of which the best checkpoint is kept; 0: none",
    )
    run.add_argument("--val-split", help="the split evaluated there; val")
    run.add_argument("--val-list", type=Path, help="list file of what is evaluated there")
    run.add_argument("--save-num-images", type=count, default=2, help="images a time in TensorBoard")
    run.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="CHECKPOINT",
        help="continue the run in --snapshot-dir exactly, from its newest checkpoint or the one given",
    )


def check_training_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """What the flags of a training run must fulfil together."""
    if args.start_iters >= args.num_steps:
        parser.error(f"--start-iters {args.start_iters} is not below --num-steps {args.num_steps}")
    if args.not_restore_last and args.restore_from is None:
        parser.error("--not-restore-last goes with --restore-from")
    if (args.val_list or args.val_split) and not args.val_every:
        parser.error("--val-list and --val-split go with --val-every")
    args.val_split = args.val_split or "val"
    gpus = args.gpu.count(",") + 1
    if gpus > 1 and args.compile:
        parser.error(f"--compile does not go with --gpu {args.gpu}; use torchrun, a process for each GPU")
    if args.checkpoint_activations and args.compile:
        parser.error("--checkpoint-activations does not go with --compile, which plans memory by itself")
    parts = world_size() * gpus
    if args.batch_size % (parts * args.accumulate):
        shared = f" over {world_size()} processes" * (world_size() > 1) + f" over {gpus} GPUs" * (gpus > 1)
        into = f" into {args.accumulate} parts" * (args.accumulate > 1)
        parser.error(f"--batch-size {args.batch_size} cannot be split{into}{shared}")
    height, width = args.input_size
    together = args.batch_size // args.accumulate // (1 if args.norm in ("auto", "sync") else parts)
    if together * -(-height // 8) * -(-width // 8) < 2:
        parser.error("one feature a batch has no variance: raise --input-size or --batch-size")


def exit_on(
    main: Callable[[], None],
    usage: tuple[type[Exception], ...],
    data: tuple[type[Exception], ...],
) -> None:
    """Run a script; its users' mistakes end it with one line and status 2 (usage) or 1 (data)."""
    program, rank = sys.argv[0].rsplit("/", 1)[-1], os.environ.get("RANK", "0")
    where = "" if rank == "0" else f"process {rank}: "
    status = 0
    try:
        main()
    except (*usage, *data) as error:
        if str(error):  # otherwise another process tells
            print(f"{program}: error: {where}{error}", file=sys.stderr)
        status = 2 if isinstance(error, usage) else 1
    except KeyboardInterrupt:
        # Letting go of all that a run holds takes a moment, in which a further Ctrl-C has nothing to end.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        print(f"\n{program}: interrupted", file=sys.stderr)  # below a progress bar
        status = 130
    except SystemExit as stop:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # as above
        status = stop.code if isinstance(stop.code, int) else 0
    except Exception as error:
        if is_out_of_memory(error):
            print(f"{program}: error: {where}out of memory; take smaller batches or tiles", file=sys.stderr)
        elif world_size() == 1:
            raise
        else:
            traceback.print_exc()
        status = 1
    if status or world_size() > 1:
        leave(status)
