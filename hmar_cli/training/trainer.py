"""The one trainer: any objective, any stream of batches, on one process or several.

What a step computes follows from the recipe's seed and the step's number alone: the order of the data is
stateless, and the random number generators are seeded before every micro-batch. So a checkpoint needs no
generator state, and a resumed run repeats what an uninterrupted one does, on the CPU bit for bit.

The host waits for the device only when it logs, saves or shows pictures. Of several processes each stays at most
two steps ahead of its device, to learn of the others' signals, so that the device never runs dry. A loss or
gradient that is not finite stops training before it can touch a weight: on a CPU the step's result is read at
once; on a GPU the device itself skips this and every later update until the next log step, where training ends
with the number of the step.
"""

import contextlib
import signal
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Generator, Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import InitProcessGroupKwargs
from torch import Tensor, nn

from hmar_cli.checkpoints.store import Checkpoint, clean, list_steps, prune, step_folder
from hmar_cli.console import console, progress, warn
from hmar_cli.data.ahead import prefetch
from hmar_cli.data.sharing import gather
from hmar_cli.errors import UserError
from hmar_cli.files import atomic_file
from hmar_cli.launch import choose_device
from hmar_cli.recipe import to_toml
from hmar_cli.settings import Recipe
from hmar_cli.training.ema import Ema
from hmar_cli.training.graphs import GraphedStep
from hmar_cli.training.logging import Log, Means, Row, require_wandb
from hmar_cli.training.objective import Objective
from hmar_cli.training.optimizer import Optimizer

if TYPE_CHECKING:
    from PIL.Image import Image

AHEAD = 2
"""Steps that are given to a GPU before its process reads what others noted in the first of them."""

Batch = dict[str, Tensor]
Batches = Callable[[int, int, int, int], Iterator[Batch]]
"""(first global micro-batch, rank, world size, images of a process and micro-batch) -> its micro-batches."""
Weights = Mapping[str, Mapping[str, Tensor]]
Save = Callable[[Path, int, Weights, tuple[Mapping[str, Tensor], Mapping[str, Any]]], None]
"""Writes a checkpoint: (folder, step, state dicts by name, training state)."""
Preview = Callable[[nn.Module], "Image"]
"""Draws a grid of pictures with the network given, or raises FloatingPointError where they are not finite."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The size of a run, found out before it starts.

    Attributes:
        device: where it runs.
        precision: "bf16" or "fp32".
        world: processes.
        steps: optimizer steps in all; 0 where they follow from epochs of images that nobody counted.
        steps_per_epoch: optimizer steps in which every image is seen once (a fraction with accumulation); 0 likewise.
        micro_batch: images of a process and micro-batch.
        parameters: parameters of each network.
        trainable: those of them that are trained.
        memory_bytes: weights, gradients, moments and averages of one process, without activations.
    """

    device: str
    precision: str
    world: int
    steps: int
    steps_per_epoch: float
    micro_batch: int
    parameters: dict[str, int]
    trainable: dict[str, int]
    memory_bytes: int


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a run ended.

    Attributes:
        checkpoint: the newest checkpoint; None if nothing was written.
        step: optimizer steps done.
        interrupted: number of the signal that ended the run early, 0 if none did.
        last: the last row of metrics.
        plan: the run's size.
        main: whether this is the process that reports.
        peak_memory_bytes: largest memory of a GPU, 0 on a CPU.
        data: what was trained on, in words.
    """

    checkpoint: Path | None
    step: int
    interrupted: int
    last: Row
    plan: Plan
    main: bool
    peak_memory_bytes: int = 0
    data: str = ""


class Due(NamedTuple):
    """What a step is followed by."""

    log: bool
    save: bool
    sample: bool


@dataclass
class Interrupt:
    """Notes the first Ctrl-C or SIGTERM, so that the step can be finished.

    A second one acts at once, unless there are several processes: their launcher repeats what they got.
    """

    several: bool = False
    number: int = 0
    _old: dict[int, Any] = field(default_factory=dict)

    def __enter__(self) -> "Interrupt":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._old[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
        self._old.clear()

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.number = number
        if not self.several:
            self.__exit__()


def fit(
    objective: Objective,
    batches: Batches,
    *,
    recipe: Recipe,
    images: int,
    out: Path,
    save: Save,
    preview: Preview | None = None,
    resume: Checkpoint | None = None,
    device: str = "",
    wandb: bool = False,
) -> Outcome:
    """Train `objective` as `recipe` says, from the start or from a checkpoint of the same run.

    Args:
        objective: loss and networks; moved to the device.
        batches: gives this process's micro-batches from any place of the endless stream on.
        recipe: the resolved recipe; `[optim]` and `[train]` are read here.
        images: images of an epoch.
        out: the run folder.
        save: writes one checkpoint.
        preview: draws a grid every `sample_every` steps, with averaged weights where there are any.
        resume: checkpoint to go on from.
        device: "cpu", "cuda" or "" for a GPU where there is one.
        wandb: also report to Weights & Biases.

    Returns:
        How it ended; Ctrl-C saves and returns, too.

    Raises:
        UserError: settings that do not fit, a loss or gradient that is not finite, another run's checkpoint.
        OSError: a full disk; checkpoints that are complete stay so.
    """
    if wandb:
        require_wandb()
    trainer = Trainer(objective, recipe, images, device, resume)
    return trainer.run(batches, out, save, preview, resume, wandb)


def rehearse(
    objective: Objective,
    batches: Batches,
    *,
    recipe: Recipe,
    images: int,
    resume: Checkpoint | None = None,
    device: str = "",
) -> Outcome:
    """Run the next step of what `fit` would do, if it has one left, and write nothing; the row is of that step alone.

    Raises:
        UserError: as `fit`.
    """
    trainer = Trainer(objective, recipe, images, device, resume)
    if trainer.step >= trainer.plan.steps:
        return trainer.outcome(None, 0, Row())
    trainer.means, trainer.norms = Means(), Means()
    stream = trainer.stream(batches)
    start = time.perf_counter()
    with contextlib.closing(stream):
        trainer.train_step(stream)
    trainer.check()
    return trainer.outcome(None, 0, trainer.read_row(time.perf_counter() - start, recipe.train.batch_size))


class Trainer:
    """The state of a run and what one step does to it; see `fit`."""

    def __init__(
        self,
        objective: Objective,
        recipe: Recipe,
        images: int,
        device: str = "",
        resume: Checkpoint | None = None,
    ) -> None:
        parallel = DistributedDataParallelKwargs(
            broadcast_buffers=False,
            find_unused_parameters=objective.unused_parameters,
            gradient_as_bucket_view=True,
        )
        patience = InitProcessGroupKwargs(timeout=timedelta(hours=1))  # the first process may save for long
        self.accelerator = Accelerator(
            cpu=device == "cpu", mixed_precision="no", kwargs_handlers=[parallel, patience]
        )
        self.recipe, self.objective = recipe, objective
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        self.device = choose_device(device) if self.world == 1 else torch.device(self.accelerator.device)
        self.patient = self.device.type != "cpu"  # steps are not waited for
        if self.device.type == "cuda":
            torch.set_float32_matmul_precision("high")
            torch.backends.cudnn.benchmark = True
        objective.to(self.device).train()
        self.plan = make_plan(objective, recipe, images, self.world, self.device)
        self.bf16 = self.plan.precision == "bf16"
        self.step = 0
        self.saved: Path | None = None  # the newest checkpoint
        self.optimizer = Optimizer(objective, recipe.optim, recipe.train.batch_size, self.plan.steps)
        self.model = objective.networks["model"]
        self.ema = Ema(self.model, recipe.train.ema) if recipe.train.ema else None
        self.means, self.norms = Means(), Means()
        self.recent: list[tuple[int, Tensor]] = []  # source indices of each step since the last log
        self.unusable: set[int] = set()  # source indices of images that others took the places of
        self.interrupt = Interrupt(self.world > 1)
        self.noted: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()  # see `_stop`
        lines = objective.prepare(self.plan.micro_batch, torch.bfloat16 if self.bf16 else torch.float32)
        self.graphed: GraphedStep | None = None
        if recipe.train.graphs:
            if why := self._no_graphs():
                lines.append(f"graphs: none ({why})")
            else:
                parameters = list(self.optimizer.parameters.values())
                self.graphed = GraphedStep(self.losses, parameters, 1 / recipe.train.accumulate)
        if self.rank == 0:
            for line in lines:
                console.print(line, highlight=False)
        if recipe.train.compile:
            objective.compile_networks()
        self.wrapped: nn.Module = objective
        if self.world > 1:
            # the successor of `broadcast_buffers` is not in every PyTorch from 2.8 on
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
                self.wrapped = self.accelerator.prepare_model(objective, device_placement=False)
        if resume is not None:
            self.restore(resume)

    def _no_graphs(self) -> str:
        """Why steps cannot be CUDA graphs; empty where they can."""
        if self.device.type != "cuda":
            return "they need a GPU"
        if self.world > 1:
            return "several processes train"
        return "" if self.objective.graphable else "steps of this kind differ from each other"

    def train_step(self, stream: Iterator[Batch]) -> None:
        """One optimizer step: accumulate gradients over the micro-batches, judge them, update."""
        train = self.recipe.train
        finite = torch.ones((), dtype=torch.bool, device=self.device)
        for micro in range(train.accumulate):
            batch = next(stream)
            if "index" in batch:
                index = batch.pop("index")
                self.recent.append((self.step, index))
                self.unusable.update(index[index != batch.pop("used", index)].tolist())
            self.objective.shared = seed_step(train.seed, self.step, micro, self.rank)
            loss, metrics = self.gradients(batch, last=micro == train.accumulate - 1)
            self.means.add({"loss": loss, **metrics})
            finite &= loss.detach().isfinite()
        norms = self.optimizer.norms()
        for norm in norms.values():
            finite &= norm.isfinite()
        self.norms.add({f"grad_norm_{name}": norm for name, norm in norms.items()})
        self.optimizer.judge(self.step, self._all(finite))
        if not self.patient:
            self.check()
        self.optimizer.step(self.step, keep=self.graphed is not None)
        self.step += 1
        if self.ema is not None:
            self.ema.update()
        self.objective.on_step(self.step)

    def gradients(self, batch: Batch, last: bool) -> tuple[Tensor, Batch]:
        """Add the gradients of a micro-batch; return its loss and metrics.

        Args:
            batch: on the host.
            last: of the step, whose gradients the processes share.
        """
        progress = self.step / self.plan.steps
        if self.graphed is not None:
            shapes, numbers = self.objective.draw_shapes(progress)
            scalars = {name: torch.tensor(number).pin_memory() for name, number in numbers.items()}
            return self.graphed(batch | scalars, shapes)
        batch = {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}
        with contextlib.nullcontext() if last else self.accelerator.no_sync(self.wrapped):
            with self.autocast():
                loss, metrics = self.wrapped(batch, progress)
            (loss / self.recipe.train.accumulate).backward()
        return loss, metrics

    def losses(self, batch: Batch, shapes: Hashable) -> tuple[Tensor, Batch]:
        """What a recorded step computes."""
        with self.autocast():
            return self.objective.forward_shapes(batch, shapes)

    def autocast(self) -> torch.autocast:
        """The precision of the forward pass."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def check(self) -> None:
        """Wait for the device, and stop if a loss or gradient was not finite.

        Raises:
            UserError: naming the step and its batch; the weights are those before that step.
        """
        if not self.optimizer.bad.item():
            return
        step, train = int(self.optimizer.bad_step.item()), self.recipe.train
        batch = train.batch_size
        seen = round(self.plan.steps_per_epoch * batch)
        first = step * batch
        details = [f"batch: images {first} to {first + batch - 1} of the stream, {seen} an epoch"]
        own = [i for s, indices in self.recent if s == step for i in indices.tolist()]
        if own:
            details.append(f"their indices in the data (process {self.rank}): {' '.join(map(str, own))}")
        means = {"loss": self.means.read(lambda flat: flat)["loss"], **self.norms.read(lambda flat: flat)}
        numbers = (f"{name.replace('_', ' ')} {value:.4g}" for name, value in means.items())
        details.append(f"means since the last log: {', '.join(numbers)}")
        precise = ", or try train.precision=fp32" if self.bf16 else ""
        good = f"; {self.saved} is good" if self.saved else ""
        raise UserError(
            f"the loss or a gradient is not finite at step {step + 1}; the step was not taken",
            f"lower optim.base_lr or optim.clip{precise}{good}",
            details,
        )

    def _all(self, flag: Tensor) -> Tensor:
        """Whether `flag` holds on every process; they tell each other their signals, too."""
        if self.world == 1:
            return flag
        number = torch.full((), float(self.interrupt.number), device=self.device)
        worst = torch.stack([(~flag).float(), number])
        torch.distributed.all_reduce(worst, torch.distributed.ReduceOp.MAX)
        copy = worst[1].to("cpu", non_blocking=True)
        copied = torch.cuda.Event(blocking=True) if worst.is_cuda else None
        if copied is not None:
            copied.record()
        self.noted.append((copy, copied))
        return worst[0] < 0.5

    def _stop(self) -> int:
        """The signal that ends the run after this step on all processes, 0 if none does.

        On GPUs it is what they noted up to a step that lies back so far that the device has work while it is read.
        """
        if self.world == 1:
            return self.interrupt.number
        if len(self.noted) <= (AHEAD if self.patient else 0):
            return 0
        number, copied = self.noted.popleft()
        if copied is not None:
            copied.synchronize()
        return int(number)

    def _mean(self, flat: Tensor) -> Tensor:
        """Mean over processes."""
        if self.world == 1:
            return flat
        flat = flat / self.world
        torch.distributed.all_reduce(flat)
        return flat

    def run(
        self,
        batches: Batches,
        out: Path,
        save: Save,
        preview: Preview | None,
        resume: Checkpoint | None,
        wandb: bool,
    ) -> Outcome:
        """Train to the end; see `fit`."""
        recipe, batch = self.recipe, self.recipe.train.batch_size
        never = resume.folder if resume else None
        with contextlib.ExitStack() as stack:
            log = bar = None
            if self.rank == 0:
                with atomic_file(out / "recipe.toml") as temporary:
                    temporary.write_text(to_toml(recipe), encoding="utf-8")
                clean(out)
                log = Log(out, self.step, wandb=wandb, name=recipe.name)
                stack.callback(log.close)
                name, total = recipe.name or "training", self.plan.steps * batch
                bar = stack.enter_context(progress(name, total, completed=self.step * batch))
            stream = self.stream(batches)
            stack.callback(stream.close)
            stack.enter_context(self.interrupt)
            clock, row, stop = Clock(), Row(), 0  # stop: a signal that all processes know of
            while self.step < self.plan.steps and not stop:
                self.train_step(stream)
                clock.steps += 1
                if bar is not None:
                    bar.advance(batch)
                due = self.due()
                if due.log:
                    self.check()
                    row = self.read_row(clock.lap(), clock.take() * batch)
                    if log is not None and bar is not None:
                        log.write(row)
                        bar.note(f"loss {row['loss']:.4f}")
                        report(row, self.plan.steps, batch)
                stop = self._stop()
                with clock.paused():
                    if due.save or stop:
                        self.save(out, save, never)
                    if preview is not None and due.sample:
                        self.show(out, preview, log)
        steps = list_steps(out)
        return self.outcome(steps[-1] if steps else None, stop, row)

    def due(self) -> "Due":
        """What is to be done after the current step; everything after the last."""
        train, last = self.recipe.train, self.step == self.plan.steps
        every = (train.log_every, train.save_every, train.sample_every)
        return Due(*(last or self.step % n == 0 for n in every))

    def stream(self, batches: Batches) -> Generator[Batch, None, None]:
        """This process's micro-batches from the current step on; a thread reads ahead for a GPU."""
        start = self.step * self.recipe.train.accumulate
        source = batches(start, self.rank, self.world, self.plan.micro_batch)
        return read_ahead(source) if self.device.type == "cuda" else iterate(source)

    def read_row(self, seconds: float, images: int) -> Row:
        """The means since the last row; waits for the device."""
        rate, decay = self.optimizer.rates(self.step - 1)
        row: Row = {
            "step": self.step,
            "epoch": round(self.step / self.plan.steps_per_epoch, 6),
            "lr": rate,
            "weight_decay": decay,
            **self.means.read(self._mean),
            **self.norms.read(self._mean),
        }
        if self.device.type == "cuda":
            row["memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 3)
        self.recent.clear()
        self.unusable = set().union(*gather(self.unusable))
        if self.unusable:
            row["unusable_images"] = len(self.unusable)
        row["images_per_second"] = round(images / max(seconds, 1e-9), 2)
        return row

    def outcome(self, checkpoint: Path | None, interrupted: int, row: Row) -> Outcome:
        """Sum up the run."""
        return Outcome(
            checkpoint=checkpoint,
            step=self.step,
            interrupted=interrupted,
            last=row,
            plan=self.plan,
            main=self.rank == 0,
            peak_memory_bytes=torch.cuda.max_memory_allocated() if self.device.type == "cuda" else 0,
        )

    def save(self, out: Path, save: Save, never: Path | None) -> None:
        """Write a checkpoint of this step, and delete old ones but `never`."""
        self.check()
        tensors, counters = self.state()
        if self.rank == 0:
            weights: dict[str, Mapping[str, Tensor]] = {"model": self.model.state_dict()}
            if self.ema is not None:
                weights["ema"] = self.ema.state_dict()
            save(step_folder(out, self.step), self.step, weights, (tensors, counters))
            prune(out, self.recipe.train.keep, never)
        self.saved = step_folder(out, self.step)
        self.accelerator.wait_for_everyone()

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything beyond the model's weights from which training goes on."""
        tensors = {f"optimizer.{name}": tensor for name, tensor in self.optimizer.state_dict().items()}
        for network, module in self.objective.networks.items():
            if network != "model":
                tensors |= {f"network.{network}.{name}": t for name, t in module.state_dict().items()}
        tensors |= {f"objective.{name}": t for name, t in self.objective.resume_state().items()}
        counters: dict[str, Any] = {
            "step": self.step,
            "steps": self.plan.steps,
            "ema_updates": self.ema.updates if self.ema else 0,
            "unusable": sorted(self.unusable),
        }
        for name, means in (("means", self.means), ("norms", self.norms)):
            tensors |= {f"{name}.{key}": tensor for key, tensor in means.reduced(self._mean).items()}
            counters[name] = means.counts
        return tensors, counters

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint of this run.

        Raises:
            UserError: it lacks something that this recipe needs.
        """
        tensors, counters = checkpoint.training()
        parts: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            kind, rest = name.split(".", 1)
            parts.setdefault(kind, {})[rest] = tensor
        try:
            self.model.load_state_dict(checkpoint.load("model"))
            for network, module in self.objective.networks.items():
                if network != "model":
                    own = parts.get("network", {}).items()
                    prefix = f"{network}."
                    module.load_state_dict(
                        {n.removeprefix(prefix): t for n, t in own if n.startswith(prefix)}
                    )
            if self.ema is not None:
                self.ema.load(checkpoint.load("ema"), counters["ema_updates"])
            self.objective.load_resume_state(parts.get("objective", {}))
            self.optimizer.load(parts.get("optimizer", {}))
            self.means.load(parts.get("means", {}), counters["means"], self.device)
            self.norms.load(parts.get("norms", {}), counters["norms"], self.device)
            self.unusable = set(counters.get("unusable", ()))
            self.step, self.saved = int(counters["step"]), checkpoint.folder
        except (KeyError, RuntimeError) as error:
            message = f"{checkpoint.folder} does not fit this recipe: {error}"
            raise UserError(message, "resume with the recipe that the run began with") from error

    def show(self, out: Path, preview: Preview, log: Log | None) -> None:
        """Draw a grid with the averaged weights, where there are any; one that is not finite is a warning."""
        self.check()
        if log is not None:
            self.objective.eval()
            try:
                with torch.no_grad(), self.ema.applied() if self.ema else contextlib.nullcontext():
                    image = preview(self.model)
            except FloatingPointError as error:
                warn(f"no picture of step {self.step}: {error}")
            else:
                with atomic_file(out / "samples" / f"step-{self.step:08d}.png") as temporary:
                    image.save(temporary, format="PNG")
                log.picture(self.step, np.asarray(image.convert("RGB")))
            self.objective.train()
        self.accelerator.wait_for_everyone()


class Clock:
    """Seconds and steps since the last log, without the time spent on saving and showing."""

    def __init__(self) -> None:
        self.steps, self._start = 0, time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last call; starts anew."""
        start, self._start = self._start, time.perf_counter()
        return self._start - start

    def take(self) -> int:
        """Steps since the last call."""
        steps, self.steps = self.steps, 0
        return steps

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count the time of the block."""
        start = time.perf_counter()
        yield
        self._start += time.perf_counter() - start


def make_plan(
    objective: Objective, recipe: Recipe, images: int | None, world: int, device: torch.device
) -> Plan:
    """Work out the size of a run.

    Args:
        objective: its networks; they may be without memory, on PyTorch's device "meta".
        recipe: `[train]` is read.
        images: of an epoch; None where nobody counted them.
        world: processes.
        device: where it runs.

    Raises:
        UserError: a batch that the processes cannot share, or fewer images than a micro-batch.
    """
    train = recipe.train
    share, rest = divmod(train.batch_size, world * train.accumulate)
    if rest or not share:
        raise UserError(
            f"train.batch_size {train.batch_size} cannot be shared by {world} processes with "
            f"{train.accumulate} micro-batches each",
            f"give a multiple of {world * train.accumulate}, or change train.accumulate",
        )
    per_epoch = 0 if images is None else images // (share * world)
    if images is not None and not per_epoch:
        raise UserError(
            f"the data has {images} images, fewer than the {share * world} of a micro-batch",
            "lower train.batch_size or raise train.accumulate",
        )
    steps = max(1, round(train.epochs * per_epoch / train.accumulate)) if per_epoch else 0
    bf16 = train.precision == "bf16" or (train.precision == "auto" and device.type == "cuda")
    parameters, trainable, memory = {}, {}, 0
    for name, module in objective.networks.items():
        sizes = [(p.numel(), p.requires_grad) for p in module.parameters()]
        parameters[name] = sum(size for size, _ in sizes)
        trainable[name] = sum(size for size, trained in sizes if trained)
        averaged = trainable[name] if name == "model" and train.ema else 0
        memory += 4 * (parameters[name] + 3 * trainable[name] + averaged)
    return Plan(
        device=str(device),
        precision="bf16" if bf16 else "fp32",
        world=world,
        steps=train.steps or steps,
        steps_per_epoch=per_epoch / train.accumulate,
        micro_batch=share,
        parameters=parameters,
        trainable=trainable,
        memory_bytes=memory,
    )


def seed_step(seed: int, step: int, micro: int, rank: int) -> torch.Generator:
    """Seed PyTorch's generators by the place in the run alone; return one more, the same for every rank."""

    def mix(*place: int) -> int:
        words = np.random.SeedSequence(place).generate_state(2, np.uint32)
        return int(words[0]) << 31 ^ int(words[1])

    torch.manual_seed(mix(seed, step, micro, rank))
    return torch.Generator().manual_seed(mix(seed, step, micro, 0, 1))  # the 1 is in no rank's seed


def report(row: Row, total: int, batch: int) -> None:
    """Print a row where no bar can be drawn, as in a log file; `total` is the run's steps of `batch` images."""
    if not console.is_terminal:
        accuracy = f" accuracy {row['accuracy']:.2%}" if "accuracy" in row else ""
        speed = row["images_per_second"]
        left = timedelta(seconds=round((total - row["step"]) * batch / max(speed, 1e-9)))
        console.print(
            f"step {row['step']}/{total} epoch {row['epoch']:.2f} loss {row['loss']:.4f}{accuracy} "
            f"{speed:,.0f} images/s ETA {left}",
            highlight=False,
        )


def iterate(source: Iterator[Batch]) -> Generator[Batch, None, None]:
    """Pass batches on."""
    yield from source


def read_ahead(source: Iterator[Batch]) -> Generator[Batch, None, None]:
    """Read batches in a thread into pinned memory, a few ahead of the device."""
    pinned = ({name: tensor.pin_memory() for name, tensor in batch.items()} for batch in source)
    yield from prefetch(pinned, depth=3)
