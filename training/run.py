"""A training run: what its parts share, and what is written at its start and between its steps."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from tqdm import tqdm

from dataset import Batch, StepSampler, load_batches
from training.data import TrainingData
from training.interruption import Interruption
from training.options import RunOptions
from training.progress import NOT_FINITE_HINT, Progress, was_logged
from training.provenance import describe, summary, write_run_file
from training.recipes import Recipe
from training.resumption import run_state
from training.snapshots import Snapshots, checkpoint_size
from training.step import TrainingError, TrainStep, rate_after
from utils.distributed import Process


@dataclass
class Run:
    """Recipe, data and step of a run, and where it writes; ``first_step`` steps were done before."""

    recipe: Recipe
    options: RunOptions
    process: Process
    data: TrainingData
    step: TrainStep
    snapshots: Snapshots
    first_step: int
    interruption: Interruption = field(default_factory=Interruption)
    best_miou: float = -1.0

    def prepare(self, remarks: list[str], implementations: list[str]) -> None:
        """Check the folder, print the summary, write ``run.json``; in the main process.

        Args:
            remarks, implementations: the summary's first and last lines.

        Raises:
            CheckpointError: the folder holds another run, or has no room.
        """
        recipe, options, first, train = self.recipe, self.options, self.first_step, self.data.train
        steps = max(recipe.num_steps - first, 0)
        self.snapshots.prepare(
            first,
            options.resume is not None,
            checkpoint_size(self.step.network),
            to_come=-(-steps // options.save_pred_every),
            best=steps > 0 and options.val_every > 0,
        )
        lines = [*remarks, f"data      {self.data.spec.name}, {len(train.pairs)} images", *self.data.remarks]
        lines += summary(recipe, options, self.step, len(train.pairs), first)
        print("\n".join(lines + implementations))
        if steps:
            start = describe(recipe, options, first, self.process.world_size)
            write_run_file(options.snapshot_dir / "run.json", start, continues=first > options.start_iters)

    def lacks_evaluation(self) -> bool:
        """Whether a kill came between the last checkpoint and its evaluation; in all processes."""
        options, first = self.options, self.first_step
        lacks = first > options.start_iters and is_due(options.val_every, first)
        lacks = lacks and not was_logged(options.snapshot_dir, first, "mIoU")
        return bool(self.process.all_gather_object(lacks)[0])

    def find_best(self) -> None:
        """Read how good the best checkpoint so far is; in all processes."""
        with self.process.all_or_none():
            if self.process.is_main:
                self.best_miou = self.snapshots.best_miou(self.data.validation_images, self.recipe.fit)
        self.best_miou = self.process.all_gather_object(self.best_miou)[0]

    def batches(self) -> Iterator[Batch]:
        """This process's share of the batch of each step that is left."""
        recipe, process = self.recipe, self.process
        share = (process.rank, process.world_size, recipe.accumulate)
        sampler = StepSampler(recipe.batch_size, self.first_step, recipe.num_steps, *share)
        on_gpu = process.device.type == "cuda"
        return load_batches(self.data.train, sampler, self.options.num_workers, pin_memory=on_gpu)

    def progress(self) -> AbstractContextManager[Progress | None]:
        """The main process's bar and logs."""
        if not self.process.is_main:
            return nullcontext()
        return Progress(self.options.snapshot_dir, self.first_step, self.recipe.num_steps)

    def log(self, step: int, losses: dict[str, float], progress: Progress | None) -> None:
        """Write the losses of the last steps, the recipe's rate and what else is measured; in all processes.

        Raises:
            TrainingError: the last step's gradient is infinite or not a number, and so are its weights.
        """
        measured = self.step.measurements()
        skipped_by_scaler = self.step.scaler.is_enabled()  # fp16 leaves out a step that overflows
        if measured["gradient_norm"] is None and not skipped_by_scaler:
            fault = f"step {step}: the gradient is not finite; {NOT_FINITE_HINT}"
            self.process.raise_if_any_failed(TrainingError(fault))
        if progress:
            self.snapshots.prune()  # losses and gradient are finite, so are the weights
            rate = rate_after(step - 1, self.recipe, self.recipe.learning_rate)
            progress.losses(step, losses | {"learning_rate": rate} | measured)

    def state(self, step: int) -> dict[str, Any]:
        """The checkpoint of a step; in all processes."""
        return run_state(self.step, step, self.recipe, self.data.spec, self.data.images)

    def save(self, step: int) -> None:
        """Write the checkpoint of a step; in all processes."""
        checkpoint = self.state(step)
        with self.process.all_or_none():
            if self.process.is_main:
                tqdm.write(f"saved {self.snapshots.save(checkpoint, step)}")

    def keep_if_best(self, step: int, scores: dict[str, Any]) -> bool:
        """Write the best checkpoint if no scores before were as good as these; in all processes."""
        if scores["mIoU"] <= self.best_miou:
            return False
        validation = {"step": step, "images": self.data.validation_images, "fit": self.recipe.fit, **scores}
        checkpoint = self.state(step) | {"validation": validation}
        with self.process.all_or_none():
            if self.process.is_main:
                self.snapshots.save_best(checkpoint)
        self.best_miou = scores["mIoU"]
        return True


def is_due(every: int, step: int) -> bool:
    """Whether something is to be done after this step; never if ``every`` is 0."""
    return every > 0 and step > 0 and step % every == 0
