"""Train a segmentation network. Without options: the published recipe on Cityscapes, R=2 with OHEM."""

from utils import startup

startup.prepare()  # before imports that take seconds

import sys
from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

import cc_attention
import libs
from dataset import Batch
from evaluation.inference import multi_scale, sliding
from evaluation.pictures import panels
from evaluation.scores import validation_scores
from networks import Start, build_model, fold_norms, read_start, start_from
from training.category_loss import CCL_CHANNELS
from training.command import NO_DATA, Command, parse_args
from training.data import find_data, load_data
from training.progress import LossWindow, Progress
from training.recipes import Recipe, format_recipe
from training.resumption import Resumed, check_same_start, find_resumed, restore, resumption_lines
from training.run import Run, is_due
from training.snapshots import Snapshots, find_checkpoint
from training.step import build_step, make_deterministic, set_rates
from utils.arguments import UsageError, run_script
from utils.distributed import Process, process_group
from utils.memory import FreedMemory

LOG_EVERY = 10  # steps; reading a loss waits for the device, so it is not done at every step
PICTURES = 10  # how often in a run predictions are shown in TensorBoard


def main() -> None:
    command = parse_args(__doc__)
    options = command.options
    if command.print_recipe:
        print_recipe(command)
        return
    if options.deterministic:
        make_deterministic()
    with process_group(options.gpu) as process:
        with process.all_or_none():
            run, remarks = build(command, process)
        images = f"{run.data.images} and for validation {run.data.validation_images}"
        check_same_start(process, images, run.first_step, run.recipe, options.joint())
        with ExitStack() as stack:
            with process.all_or_none():
                if process.is_main:
                    stack.enter_context(run.snapshots.locked())
                    run.prepare(remarks, implementations(run.step.network))
            train(run)
    if run.interruption.signum:
        sys.exit(128 + run.interruption.signum)


def find_start(command: Command) -> tuple[Resumed | None, Start | None, Recipe]:
    """The checkpoint to resume, or else the file to start from; and the recipe of the run."""
    options = command.options
    resumed, start = find_resumed(options.resume, options.snapshot_dir), None
    if resumed is None and options.restore_from is not None:
        start = read_start(find_checkpoint(options.restore_from))
    return resumed, start, command.recipe_for(resumed, start.network if start else {})


def print_recipe(command: Command) -> None:
    """The recipe that the command line's run would have; without ``--data-dir`` its classes are as given."""
    resumed, _, recipe = find_start(command)
    if command.options.data_dir != NO_DATA:
        _, recipe = find_data(command.options, recipe, command.num_classes(resumed))
    print(format_recipe(recipe))


def build(command: Command, process: Process) -> tuple[Run, list[str]]:
    """The run of a command line, restored if it is resumed, and what there is to say of that."""
    options = command.options
    resumed, start, recipe = find_start(command)
    spec, recipe = find_data(options, recipe, command.num_classes(resumed))
    options.check(recipe)
    data = load_data(spec, recipe, options)
    # Crops have one size, so the search for the fastest kernel pays; it may end otherwise in another run.
    torch.backends.cudnn.benchmark = not options.deterministic
    torch.manual_seed(recipe.random_seed)
    config = recipe.network
    if config.norm == "auto":
        config = replace(config, norm="sync" if process.parts > 1 else "inplace_abn")
    try:
        network = build_model(
            config,
            checkpoint_activations=options.checkpoint_activations,
            embedding_channels=CCL_CHANNELS if recipe.ccl else 0,
        )
    except ValueError as error:  # of a backbone or head that somebody added
        raise UsageError(f"--backbone {config.backbone}, --model {config.model}: {error}") from None
    network.to(process.device).to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    if recipe.freeze_bn:
        libs.freeze(network)
    if start is not None:
        new = start_from(network, start.contents, start.path, options.not_restore_last)
        if process.is_main:
            first_line, *lines = command.start_lines(start.path, start.network)
            what_is_new = f", with new {new} for {config.num_classes} classes" if new else ""
            print(first_line + what_is_new, *lines, sep="\n")
    step = build_step(network, recipe, spec.ignore_label, process, libs.abort)
    torch.manual_seed(recipe.random_seed + process.rank)  # for layers that do not draw by the samples' keys
    snapshots = Snapshots(options.snapshot_dir, spec.prefix, options.keep_last)
    run = Run(recipe, options, process, data, step, snapshots, options.start_iters)
    if resumed is not None:
        run.first_step = restore(resumed, step, recipe, data.images)
        return run, resumption_lines(resumed, recipe, process.world_size)
    if options.resume is not None and process.is_main:
        print(f"--resume: no {spec.prefix}_*.pth in {options.snapshot_dir} yet, starting anew")
    return run, []


def implementations(network: nn.Module) -> list[str]:
    """Lines of the summary: which code computes attention and normalisation."""
    norm = next((type(x).__name__ for x in network.modules() if isinstance(x, libs.ABN)), "no ABN")
    return [f"attention {cc_attention.backend()}", f"norm      {norm}; {libs.backend()}"]


def train(run: Run) -> None:
    """The loop over the steps that are left, or until a signal comes."""
    recipe, options, process, first_step = run.recipe, run.options, run.process, run.first_step
    lacks_evaluation = run.lacks_evaluation()
    if first_step >= recipe.num_steps and not lacks_evaluation:
        if process.is_main:
            print(f"the run is complete: {first_step} steps are done, --num-steps is {recipe.num_steps}")
        return
    if run.data.validation:
        run.find_best()
    batches = run.batches()
    if options.compile:
        libs.prepare_to_compile(run.step.network)
    run.step.wrap_model(options.compile)
    window, freed_memory = LossWindow(process, recipe.batch_size), FreedMemory()
    done = saved = first_step
    with run.interruption, run.progress() as progress:
        if lacks_evaluation:
            validate(run, first_step, progress)
        for step in range(first_step + 1, recipe.num_steps + 1):
            window.begin()
            batch = run.interruption.next_batch(batches, process)
            if batch is None:
                break
            set_rates(run.step.optimizer, recipe, step - 1)
            losses, logits = run.step(batch, step)
            window.end(losses)
            if progress:
                progress.step_done()
            done = step

            save_now = is_due(options.save_pred_every, step) or step == recipe.num_steps
            # Before an evaluation too: a loss that is not finite is told as such.
            if save_now or is_due(LOG_EVERY, step) or is_due(options.val_every, step):
                run.log(step, window.read(step), progress)
                freed_memory.give_back()
            if progress and is_due(max(recipe.num_steps // PICTURES, 1), step):
                progress.pictures(step, pictures(run, batch, logits))
            if save_now:
                run.save(step)
                saved = step
            if is_due(options.val_every, step):
                validate(run, step, progress)
        # One may have come to another process after the last exchange, during the last evaluation for one.
        run.interruption.signum = process.max(run.interruption.signum)
        if done > saved:  # a signal came
            if len(window):
                run.log(done, window.read(done), progress)
            run.save(done)
        elif done == recipe.num_steps and process.is_main:
            run.snapshots.prune()
    if run.interruption.signum and process.is_main:
        print(f"stopped after step {done}; --resume continues from there", file=sys.stderr)


def pictures(run: Run, batch: Batch, logits: Tensor) -> list[np.ndarray]:
    """Images, labels and predictions of the first images of a batch."""
    labels, normalization = run.data.spec.labels, run.data.train.transform.normalization
    aligned = run.recipe.network.align_corners
    return panels(batch, logits, run.options.save_num_images, labels, normalization, aligned)


def validate(run: Run, step: int, progress: Progress | None) -> None:
    """Evaluate as evaluate.py does by default; a checkpoint better than all before is kept."""
    process, data = run.process, run.data
    assert data.validation is not None
    process.broadcast(run.step.network.buffers())  # of layers that are not synchronised
    predict = sliding(fold_norms(run.step.network), run.recipe.input_size)
    predict = multi_scale(predict, fit=run.recipe.fit)
    scores = validation_scores(
        predict, data.validation, process, run.options.num_workers, run.interruption.until
    )
    if scores is None:
        return  # a signal came: it is made up for when the run goes on
    is_best = run.keep_if_best(step, scores)
    if progress:  # only now, so that after a kill before this line the evaluation is repeated
        progress.scalars(step, scores, group="val")
        best = "the best so far" if is_best else f"best {100 * run.best_miou:.2f}"
        tqdm.write(f"step {step}: mIoU {100 * scores['mIoU']:.2f} over {len(data.validation)} images, {best}")


if __name__ == "__main__":
    run_script(main)
