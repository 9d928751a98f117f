"""The only training loop: it knows the objective's contract and nothing else of a method."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import Optimizer

from fewmask.config import RunSection, StageSection
from fewmask.draws import drawing_for
from fewmask.engine.checkpoint import restore_newest, save_checkpoint, write_tensors
from fewmask.engine.device import accelerator_for, resolve_precision
from fewmask.engine.optim import build_optimiser, learning_rate, set_schedule
from fewmask.engine.run import is_main, seed_step
from fewmask.engine.stage import Progress, Stage
from fewmask.models.norms import synchronise_norms
from fewmask.objective import Objective
from fewmask.types import Batch, Interrupted, NotTrainedError, UserError

Validate = Callable[[nn.Module], dict[str, float]]
Watch = Callable[[nn.Module], dict[str, float]]
LOG_EVERY = 10


class Stream(Protocol):
    """What the loop needs of a loader: any batch by its number, so that no position has to be restored."""

    steps_per_epoch: int
    num_images: int
    rounds: float
    """How often an epoch goes through the images it is counted by, where a least number of steps makes it longer."""

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        """Return this process's part of a global batch."""


@dataclass
class State:
    """What a checkpoint holds beside tensors."""

    step: int = 0
    seconds: float = 0.0
    progress: float = 0.0
    best_score: float = -math.inf
    best_step: int = -1
    finished: bool = False


@dataclass
class Meter:
    """Running figures between two lines of the log."""

    terms: dict[str, list[Tensor]] = field(default_factory=dict)
    images: int = 0
    waiting: float = 0.0
    started: float = field(default_factory=time.perf_counter)

    def add(self, terms: dict[str, Tensor], images: int, waiting: float) -> None:
        """Count one step."""
        for name, value in terms.items():
            self.terms.setdefault(name, []).append(value.detach())
        self.images += images
        self.waiting += waiting

    def read(self) -> dict[str, float]:
        """Return the means and rates since the last reading, and start anew."""
        seconds = max(time.perf_counter() - self.started, 1e-9)
        means = {name: float(torch.stack(values).float().mean()) for name, values in self.terms.items()}
        rates = {"images_per_s": self.images / seconds, "data_wait": self.waiting / seconds}
        self.__init__()  # type: ignore[misc]
        return {**means, **rates}


class Fit:
    """The state of one training; `fit` is the way in."""

    def __init__(
        self, objective: Objective, loader: Stream, settings: StageSection, stage: Stage, run: RunSection
    ) -> None:
        self.objective, self.loader, self.settings, self.stage, self.run = objective, loader, settings, stage, run
        self.accelerator = accelerator_for(run)
        self.views = objective.views()
        # Convolutions run faster with the channels last, on CPUs and GPUs alike; elsewhere it changes nothing.
        objective.to(memory_format=torch.channels_last)
        if self.accelerator.num_processes > 1:
            synchronise_norms(objective, self.accelerator.device)
        optimiser = build_optimiser(objective, settings)
        self.tracing = run.compile  # until the first step
        compiled = torch.compile(objective) if run.compile else objective
        self.model, self.optimiser = self.accelerator.prepare(compiled, optimiser)
        self.scaler = self.accelerator.scaler  # of fp16's loss; None in any other precision
        self.state = State()
        self.total_steps = settings.epochs * loader.steps_per_epoch
        self.best: dict[str, Tensor] = {}
        self.saved_best, self.stopping = -1, False
        self.recent: deque[tuple[int, Tensor, list[str]]] = deque(maxlen=2)

    @property
    def raw_optimiser(self) -> Optimizer:
        """The torch optimiser under Accelerate's wrapper."""
        return self.optimiser.optimizer

    @property
    def rate(self) -> str:
        """The setting of the learning rate."""
        return f"{self.stage.name}.{self.settings.rate}"

    def progress(self) -> float:
        """Return how far the training is, by steps, or by the clock when that is further; note whether to stop.

        Clocks and signals differ between processes, the schedule and the last step may not: all take the furthest.
        """
        by_steps = self.state.step / self.total_steps if self.total_steps else 1.0
        by_time = self.stage.elapsed / self.stage.budget if self.stage.budget is not None else 0.0
        furthest, self.stopping = max(by_steps, by_time), self.stage.run.stop_requested
        if self.accelerator.num_processes > 1:
            own = torch.tensor([[furthest, float(self.stopping)]], device=self.accelerator.device)
            furthest, stopping = self.accelerator.gather(own).amax(0).tolist()
            self.stopping = bool(stopping)
        return min(furthest, 1.0)

    def step(self, progress: float) -> tuple[dict[str, Tensor], float]:
        """Do one optimisation step; return the terms and the seconds spent waiting for data."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        began = time.perf_counter()
        batch = self.loader.batch(self.state.step, rank, world)
        waiting, share = time.perf_counter() - began, batch.share
        # Several processes draw as one does for the whole batch, and each takes what its own images get.
        seed_step(self.stage.run.seed, self.state.step, 0 if share else rank)
        with torch.no_grad(), drawing_for(share):
            batch = self.views(batch.to(self.accelerator.device))
            batch.image = batch.image.contiguous(memory_format=torch.channels_last)
        set_schedule(self.raw_optimiser, progress, self.settings)
        with self.accelerator.autocast(), drawing_for(share), _one_image_is_told(self.stage.name):
            terms = self.model(batch)
        self.optimiser.zero_grad(set_to_none=True)
        self.accelerator.backward(terms["loss"])
        self.objective.before_step(progress)
        if self.settings.clip:
            self.accelerator.clip_grad_norm_(self.objective.parameters(), self.settings.clip)
        self.optimiser.step()
        self.state.step += 1
        self.objective.after_step(progress)
        self.recent.append((self.state.step, terms["loss"].detach(), batch.names))
        return terms, waiting

    def of_all(self, figures: dict[str, float]) -> dict[str, float]:
        """Return the means of figures over all processes: what is logged is of whole batches."""
        if self.accelerator.num_processes == 1:
            return figures
        own = torch.tensor(list(figures.values()), device=self.accelerator.device)
        return dict(zip(figures, self.accelerator.reduce(own, "mean").tolist(), strict=True))

    def check_finite(self, everything: bool = False) -> None:
        """Stop when a loss was not finite.

        The newest loss is looked at one step late, so that an accelerator never waits for the host; before anything is
        saved, all are looked at, so that no checkpoint holds weights from after the fault.
        """
        ready = list(self.recent) if everything or self.accelerator.device.type == "cpu" else list(self.recent)[:-1]
        for step, loss, names in ready:
            if not torch.isfinite(loss):
                raise NotTrainedError(
                    f"The loss became {float(loss)} at step {step} with the images {', '.join(names)}; look at them, "
                    f"or lower {self.rate} and use another output folder. The last checkpoint in {self.stage.folder} "
                    "is sound."
                )

    def save(self) -> None:
        """Write a checkpoint."""
        self.check_finite(everything=True)
        if not all(bool(torch.isfinite(parameter).all()) for parameter in self.objective.parameters()):
            raise NotTrainedError(
                f"The weights became infinite before step {self.state.step}; lower {self.rate} and use "
                f"another output folder. The last checkpoint in {self.stage.folder} is sound."
            )
        self.state.seconds = began = self.stage.elapsed
        if is_main():
            folder = self.stage.folder / "checkpoints"
            if self.best and self.state.best_step != self.saved_best:
                write_tensors(self.best_path(self.state.best_step), self.best, {"step": str(self.state.best_step)})
            save_checkpoint(
                folder, self.state.step, self.objective, self.raw_optimiser,
                {**asdict(self.state), "scaler": self.scaler and self.scaler.state_dict(),
                 "budget": self.stage.budget, "config": self.stage.run.config,
                 "data": self.stage.run.info.get("data"), "git": self.stage.run.info.get("git")},
            )  # fmt: skip
            wanted = {self.best_path(self.state.best_step), self.best_path(self.saved_best)}
            for path in set(folder.glob("best_*.safetensors")) - wanted:
                path.unlink(missing_ok=True)
            self.stage.run.note_time()
        self.saved_best = self.state.best_step
        self.stage.log("checkpoint", step=self.state.step, seconds=self.stage.elapsed - began)

    def tell_long_epochs(self) -> None:
        """Say so where the images are so few that an epoch goes through them several times."""
        if self.loader.rounds >= 2 and self.total_steps and not self.state.step:
            steps, setting = self.loader.steps_per_epoch, f"{self.stage.name}.min_epoch_steps"
            text = (
                f"an epoch here is {steps} steps ({setting}): about {self.loader.rounds:.0f} times through the images"
            )
            Progress(self.stage.name).close(text)

    def restore(self) -> None:
        """Go on from the newest sound checkpoint, if there is one."""
        header, remarks = restore_newest(self.stage.folder / "checkpoints", self.objective, self.raw_optimiser)
        for remark in remarks:
            self.stage.log("remark", text=remark)
            Progress(self.stage.name).close(remark)
        if header is None:
            return
        saved = header["state"]
        self.state = State(**{name: saved[name] for name in asdict(self.state)})
        if self.scaler and saved.get("scaler"):
            self.scaler.load_state_dict(saved["scaler"])
        self.saved_best = self.state.best_step
        self.stage.seconds_before = self.state.seconds
        if saved["config"].get("run", {}).get("time") == self.run.time:
            self.stage.budget = saved["budget"]
        elif self.stage.budget is not None:  # another run.time was asked for: it is counted from now on
            self.stage.budget += self.state.seconds
        self._restore_best()
        self.stage.log("resume", step=self.state.step, seconds=self.state.seconds)
        if not self.state.finished:
            Progress(self.stage.name).close(f"goes on from step {self.state.step}")

    def _restore_best(self) -> None:
        if self.state.best_step < 0:
            return
        try:
            self.best = load_file(self.best_path(self.state.best_step))
        except (OSError, SafetensorError):
            self.stage.log("remark", text="the best weights so far are damaged; the best from here on will be kept")
            self.state.best_score, self.state.best_step, self.saved_best = -math.inf, -1, -1

    def validate(self, validate: Validate, progress: float) -> dict[str, float]:
        """Score the product, and keep it when it is the best so far."""
        figures = validate(self.objective.product())
        score = figures["score"]
        if score > self.state.best_score:
            self.state.best_score, self.state.best_step = score, self.state.step
            product = self.objective.product().state_dict()
            self.best = {name: value.detach().cpu().clone() for name, value in product.items()}
        return figures

    def watch(self, watch: Watch) -> None:
        """Look at the product when it is time to: after every so many epochs, and after the last step."""
        every, epoch = self.settings.probe_every, self.state.step / self.loader.steps_per_epoch
        if every and (epoch % every == 0 or self.state.progress >= 1.0):
            figures = watch(self.objective.product())
            self.stage.log("probe", step=self.state.step, epoch=epoch, **figures)
            self.objective.train()

    def best_path(self, step: int) -> Path:
        """Where the product that was best at a step is kept while a checkpoint refers to it."""
        return self.stage.folder / "checkpoints" / f"best_{step:09d}.safetensors"

    def finish(self) -> nn.Module:
        """Return the product: the best one where there was a validation, the last one otherwise."""
        product = self.objective.product()
        if self.state.best_step >= 0:
            product.load_state_dict(self.best)
        return product


def fit(
    objective: Objective,
    loader: Stream,
    settings: StageSection,
    stage: Stage,
    run: RunSection,
    validate: Validate | None = None,
    watch: Watch | None = None,
) -> tuple[nn.Module, dict[str, Any]]:
    """Train until the epochs or the stage's time are used up; return the product and the facts to report.

    `validate` scores the product after each epoch, and the best is kept; `watch` looks at it every
    `settings.probe_every` epochs and after the last step, and what it returns is logged as "probe" and decides nothing.
    Resumes from the stage's checkpoints. With a step-bounded schedule the result equals the uninterrupted run bit for
    bit on a CPU; with a time budget it cannot, because the schedule follows the clock. Raises Interrupted after saving
    when a stop was asked for, and UserError when a loss is not finite.
    """
    loop = Fit(objective, loader, settings, stage, run)
    (stage.folder / "checkpoints").mkdir(exist_ok=True)
    with stage.logging(run.tensorboard):
        loop.restore()
        loop.tell_long_epochs()
        stage.run.deferring = True
        try:
            _train(loop, validate, watch)
        finally:
            stage.run.deferring = False
        if loop.total_steps and not loop.state.step:
            raise UserError(
                f"The time of '{stage.name}' was over before its first step, and nothing was learnt: raise run.time, "
                f"or set {stage.name}.epochs=0 to leave it out."
            )
        if not loop.state.finished:
            objective.at_end()
            loop.state.finished = True
            loop.save()
    facts = {
        "epochs": round(loop.state.step / loader.steps_per_epoch, 2),
        "steps": loop.state.step,
        "num_images": loader.num_images,
        "batch_size": settings.batch_size,
        "budget": stage.budget,
        "best_score": loop.state.best_score if loop.state.best_step >= 0 else None,
        "best_step": loop.state.best_step if loop.state.best_step >= 0 else None,
        "device": str(loop.accelerator.device),
        "precision": resolve_precision(run),
        "num_processes": loop.accelerator.num_processes,
    }
    return loop.finish(), facts


def _train(loop: Fit, validate: Validate | None, watch: Watch | None) -> None:
    state, stage, steps = loop.state, loop.stage, loop.loader.steps_per_epoch
    line, meter, epoch_meter = Progress(stage.name), Meter(), Meter()
    last_save, last_score = time.monotonic(), ""
    loop.objective.train()
    progress = loop.progress()
    while not state.finished and progress < 1.0:
        terms, waiting = loop.step(progress)
        if loop.tracing:  # took minutes in which nothing was learnt: the schedule begins after it
            stage.start_clock()
            loop.tracing = False
        loop.check_finite()
        num_images = loop.settings.batch_size
        meter.add(terms, num_images, waiting)
        epoch_meter.add(terms, num_images, waiting)
        state.progress = loop.progress()
        epoch_ends = state.step % steps == 0 or state.progress >= 1.0
        figures: dict[str, float] = {}
        if epoch_ends:
            figures = loop.of_all(epoch_meter.read())
            if validate is not None:
                figures |= loop.validate(validate, state.progress)
                last_score = f", validation {figures['score']:.4f} (best {state.best_score:.4f})"
                loop.objective.train()
            if watch is not None:
                loop.watch(watch)
            epoch_meter = Meter()
            stage.log("epoch", epoch=math.ceil(state.step / steps), step=state.step, seconds=stage.elapsed, **figures)
        if state.step % LOG_EVERY == 0 or epoch_ends:
            read = loop.of_all(meter.read())
            lr = learning_rate(progress, loop.settings)
            stage.log("step", step=state.step, epoch=state.step / steps, progress=state.progress, lr=lr, **read)
            text = f"epoch {state.step / steps:.1f}, loss {read['loss']:.4f}{last_score}"
            rates = f"{read['images_per_s']:.0f} images/s, {read['data_wait']:.0%} waiting for data"
            line.update(state.progress, f"{text}, {rates}")
        if loop.stopping or time.monotonic() - last_save > loop.settings.checkpoint_seconds:
            loop.save()
            last_save = time.monotonic()
        if loop.stopping:
            raise Interrupted
        # Asked once a step, so that no training ends after a step that it took for the last but one; a validation takes
        # time of its own.
        progress = loop.progress() if epoch_ends else state.progress
    if validate is not None and state.best_step < 0:  # no epoch was completed: an already finished or empty training
        loop.validate(validate, 1.0)
    line.close(f"{state.step} steps, {state.step / steps:.1f} epochs{last_score}")


@contextmanager
def _one_image_is_told(stage: str) -> Iterator[None]:
    """Make torch's refusal to normalise a single value over a batch of one a UserError."""
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise UserError(
            "A batch of one image leaves batch normalisation a single value where the network is coarsest: raise "
            f"{stage}.batch_size to at least 2, or model.size."
        ) from None
