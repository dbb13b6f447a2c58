"""Where a command runs: its device, and several processes on this machine through Accelerate's launcher."""

import os
import re
import signal
import sys
import time
from datetime import timedelta
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from hmar_cli.errors import UserError

if TYPE_CHECKING:
    import torch


def check_device(device: str) -> None:
    """Refuse a device that is not there.

    Raises:
        UserError: an unknown name, or a GPU where PyTorch sees none.
    """
    if device not in ("", "cpu", "cuda"):
        raise UserError(f"--device {device}: unknown", "give cpu or cuda, or leave it out")
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise UserError("--device cuda: no GPU is visible to PyTorch", "leave --device out, or give cpu")


def choose_device(device: str = "") -> "torch.device":
    """The device of a command that runs in one process.

    Args:
        device: "cpu", "cuda" or "" for a GPU where there is one.

    Raises:
        UserError: see `check_device`.
    """
    check_device(device)
    import torch

    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def wait_for_launcher(error: RuntimeError) -> None:
    """Wait for the end if `error` only says that another process of this run has failed; else return.

    That process has said what is wrong; the launcher ends this one as soon as it has noticed.
    """
    lost = re.search("closed by peer|reset by peer|Broken pipe|likely closed", str(error))
    if lost and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        time.sleep(60)


def let_first_process_speak() -> None:
    """Wait a while in all processes of a run but the first.

    Most mistakes are met by all of them. The launcher ends the others as soon as the first has said what is wrong.
    """
    if int(os.environ.get("RANK", "0")) > 0:
        time.sleep(3)


def keep_stdout_for_data() -> None:
    """Send what libraries print to standard output below Python to standard error, in one of several processes.

    Gloo, which connects processes on CPUs, announces every connection there in PyTorch before 2.9.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        sys.stdout = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
        os.dup2(2, 1)


def without_launch(arguments: list[str]) -> list[str]:
    """The arguments of a command less `--launch N`, for the processes that are started."""
    kept: list[str] = []
    skip = False
    for argument in arguments:
        if not skip and argument != "--launch" and not argument.startswith("--launch="):
            kept.append(argument)
        skip = argument == "--launch"
    return kept


def delegate(processes: int, device: str = "") -> None:
    """Run this same command in several processes and end with their exit code; with one, just return.

    On GPUs this is `accelerate launch --multi_gpu`. On CPUs Accelerate's launcher starts a single process, so
    there it is the elastic launcher of PyTorch, which Accelerate uses itself.

    Args:
        processes: how many.
        device: "cpu", "cuda" or "" for GPUs where there are any.

    Raises:
        UserError: more processes than GPUs, or a device that is not there.
    """
    if processes <= 1:
        return
    import torch

    gpus, on_cpu = torch.cuda.device_count(), choose_device(device).type == "cpu"
    if not on_cpu and processes > gpus:
        raise UserError(f"--launch {processes}: only {gpus} GPUs are visible", f"use --launch {gpus}")
    end(_launch(processes, on_cpu, ["-m", "hmar_cli", *without_launch(sys.argv[1:])]))


def end(code: int) -> NoReturn:
    """End this process, which has only waited for others or served a page.

    Not through Python's shutdown: a thread at work, of PyTorch's launcher or of drawing, aborts it now and then.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class Place(NamedTuple):
    """Where a process of a command computes.

    Attributes:
        device: its device.
        rank: which process it is, from 0.
        world: how many there are.
    """

    device: "torch.device"
    rank: int
    world: int

    @property
    def share(self) -> tuple[int, int]:
        """Its part of the work: its number, and how many there are."""
        return self.rank, self.world


def join_processes(device: str = "") -> Place:
    """Connect this process with the others that `delegate` started, if it did.

    Args:
        device: "cpu", "cuda" or "" for a GPU where there is one.

    Raises:
        UserError: see `check_device`.
    """
    from accelerate import PartialState

    place = choose_device(device)
    long = timedelta(days=7)  # the last may be at work long after the first is done
    state = PartialState(cpu=place.type == "cpu", timeout=long)
    if state.num_processes > 1:
        place = state.device
    return Place(place, state.process_index, state.num_processes)


def wait_for_processes() -> None:
    """Wait until all processes that `join_processes` connected have come here; alone, just return."""
    from accelerate import PartialState

    PartialState().wait_for_everyone()


def leave_processes() -> None:
    """Part from the other processes, where there are any; nothing can be exchanged with them any more."""
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _wait_for_saving() -> None:
    """Let processes that were told to end write their checkpoint, for up to TORCH_ELASTIC_SHUTDOWN_TIMEOUT seconds.

    The launcher would kill them after 30 s, as it still does with those that one which failed has left behind.
    """
    from torch.distributed.elastic.multiprocessing.api import PContext
    from torch.distributed.launcher.api import LaunchConfig

    seconds = os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")
    if "shutdown_timeout" not in LaunchConfig.__dataclass_fields__:  # not in every PyTorch from 2.8 on
        close = PContext.close

        def patient(self: PContext, death_sig: signal.Signals | None = None, timeout: int = 30) -> None:
            close(self, death_sig, int(seconds) if death_sig else timeout)  # a failure gives no signal

        PContext.close = patient  # type: ignore[method-assign]


def _launch(processes: int, on_cpu: bool, command: list[str]) -> int:
    """Start the processes, wait for them, and return the exit code of the first that failed, else 0."""
    import logging

    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)  # the processes report their own errors
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    _wait_for_saving()
    try:
        if on_cpu:
            from torch.distributed.run import parse_args, run

            os.environ["ACCELERATE_USE_CPU"] = "true"
            flags = ["--standalone", "--nproc-per-node", str(processes)]
            run(parse_args([*flags, *command]))
        else:
            from accelerate.commands.launch import launch_command, launch_command_parser

            flags = [
                "--multi_gpu",
                "--num_machines",
                "1",
                "--mixed_precision",
                "no",
                "--dynamo_backend",
                "no",
            ]
            port = ["--num_processes", str(processes), "--main_process_port", "0"]
            launch_command(launch_command_parser().parse_args([*flags, *port, *command]))
    except ChildFailedError as error:
        first = min(error.failures.values(), key=lambda failure: failure.timestamp)
        return first.exitcode if first.exitcode > 0 else 128 - first.exitcode
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0
