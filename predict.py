"""Predict pictures, folders of pictures, and videos by a checkpoint; no data set is needed."""

from utils import startup

startup.prepare()  # before imports that take seconds

import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from dataset import DataError
from dataset.reading import read_image
from evaluation import Predictor
from evaluation.attention_page import (
    attention_layer,
    attention_page,
    attention_rounds,
    check_point,
    heat_pictures,
)
from evaluation.inputs import LEGEND, InputFile, find_inputs
from evaluation.options import AMP, CheckpointOptions
from evaluation.pipeline import Background, iterate_ahead, read_ahead
from evaluation.prediction_files import (
    overlay,
    prepare_folder,
    write_bytes,
    write_legend,
    write_picture,
    write_prediction,
)
from evaluation.video import NO_H264, VideoReader, VideoWriter, find_ffmpeg
from training.recipes import find_recipe
from training.snapshots import find_checkpoint
from utils.arguments import UsageError, parse_options, run_script
from utils.distributed import choose_devices
from utils.fields import REQUIRED, setting


@dataclass(frozen=True, kw_only=True)
class PredictOptions(CheckpointOptions):
    """What is predicted, how, and where results go; ``predict.py`` makes a flag of each field."""

    input: tuple[Path, ...] = setting(REQUIRED, "pictures, folders, videos", metavar="PATH", several=True)
    output_dir: Path = setting(REQUIRED, "folder for colour/, ids/, overlay/ and legend.png")
    attention: str | None = setting(
        None, "instead of predictions, a page for each picture that shows where a point of it looks; "
        "of the pixel in row Y, column X as pictures", metavar="Y,X", optional_value="",
    )  # fmt: skip

    recurrence: int | None = setting(
        None, "rounds R (default: the checkpoint's; 2 for a state dict, which does not hold it)",
        group="network", min=0,
    )  # fmt: skip

    whole: bool | None = setting(
        None, "predict pictures whole; no: in tiles (default: by size and memory)", group="protocol"
    )
    input_size: tuple[int, int] | None = setting(
        None, "size of the tiles (default: the training crop)", group="protocol", metavar="H,W"
    )
    batch_size: int = setting(
        4, "pictures of one size, or tiles, through the network at once", group="protocol", min=1
    )
    scales: tuple[float, ...] = setting(
        (1.0,), "factors of the picture's size after --fit, 0.75,1,1.25 for one; logits are averaged",
        group="protocol", metavar="S,S,…", exclusive_min=0, max=8,
    )  # fmt: skip
    fit: tuple[int, int] | tuple[()] | None = setting(
        None, "size that pictures are fitted into first; none: their own (default: what the recipe says)",
        group="protocol", metavar="H,W", may_be_none=True,
    )  # fmt: skip
    flip: bool = setting(False, "average with the mirrored picture's prediction", group="protocol")

    gpu: str = setting("auto", "auto, cpu, or a GPU's number", group="run")
    amp: str = setting(
        "auto", "compute in a half type; auto: bf16 where the device is fast at it", group="run", choices=AMP
    )

    def __post_init__(self) -> None:
        ways = {"--whole no": self.whole is False, "--scales": self.scales != (1.0,), "--flip": self.flip}
        for flag, is_given in ways.items():
            if self.attention is not None and is_given:
                raise UsageError(
                    f"--attention and {flag} exclude each other: it shows the picture whole, once"
                )

    @property
    def point(self) -> tuple[int, int] | None:
        """The pixel (row, column) of ``attention``; None: all of them, on a page.

        Raises:
            UsageError: something else than two whole numbers.
        """
        if not self.attention:
            return None
        try:
            row, column = (int(part) for part in self.attention.split(","))
        except ValueError:
            raise UsageError(
                f"--attention {self.attention}: expected Y,X, a pixel's row and column"
            ) from None
        return row, column


def main() -> None:
    options = parse_options(PredictOptions, __doc__)
    devices = choose_devices(options.gpu)
    if len(devices) > 1:
        raise UsageError(f"--gpu {options.gpu}: prediction takes one GPU")
    if options.recipe:
        find_recipe(options.recipe)  # for what its module registers
    point = options.point
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: what is done of a video is kept
    files = find_inputs(options.input, options.output_dir)
    predictor = Predictor(
        find_checkpoint(options.restore_from),
        devices[0],
        scales=options.scales,
        flip=options.flip,
        amp=options.amp,
        whole=options.whole,
        tile_size=options.input_size,
        batch_size=options.batch_size,
        num_classes=options.num_classes,
        recurrence=options.recurrence,
        fit="auto" if options.fit is None else options.fit or None,
    )
    if options.attention is not None:
        attention_layer(predictor)  # or an error
        prepare_folder(options.output_dir, ("attention",))
        run = Run(options, predictor)
        with run.bar:
            run.show_attention(files, point)
        run.finish(len(files), "attention")
        return
    prepare_folder(options.output_dir, ("colour", "ids", "overlay"))
    write_legend(options.output_dir / LEGEND, predictor.labels)
    run = Run(options, predictor)
    with run.bar:
        run.predict_pictures([file for file in files if not file.is_video])
        run.predict_videos([file for file in files if file.is_video])
    run.finish(len(files), f"colour, ids, overlay, {LEGEND}")


class Run:
    """A predictor, the progress of its work, and the inputs that failed."""

    def __init__(self, options: PredictOptions, predictor: Predictor) -> None:
        self.options, self.predictor = options, predictor
        self.failed = 0
        self.began = time.perf_counter()
        self.bar = tqdm(total=0, unit="image")

    def predict_pictures(self, files: list[InputFile]) -> None:
        """Read, predict and write at the same time; neighbours of one size form batches."""
        self._expect(len(files))
        batch: list[tuple[InputFile, np.ndarray]] = []
        with Background(workers=2) as writer:
            for file, image in self._readable(read_ahead(files, lambda file: read_image(file.path))):
                if batch and (len(batch) == self.options.batch_size or batch[0][1].shape != image.shape):
                    self._predict_batch(batch, writer)
                    batch = []
                batch.append((file, image))
            self._predict_batch(batch, writer)

    def _predict_batch(self, batch: list[tuple[InputFile, np.ndarray]], writer: Background) -> None:
        results = self.predictor.predict_batch([image for _, image in batch])
        for (file, image), ids in zip(batch, results, strict=True):
            writer.run(
                write_prediction, self.options.output_dir, file.name, image, ids, self.predictor.labels
            )
        self.bar.update(len(batch))

    def predict_videos(self, files: list[InputFile]) -> None:
        """One overlay for each video; what can be decoded of a damaged one is kept."""
        ffmpeg = find_ffmpeg() if files else None
        if files and ffmpeg is None:
            tqdm.write(NO_H264, file=sys.stderr)
        for file in files:
            try:
                video = VideoReader(file.path)
                self._expect(video.frames)
                self._predict_video(file, video, ffmpeg)
            except DataError as error:
                self._report(error)

    def _predict_video(self, file: InputFile, video: VideoReader, ffmpeg: str | None) -> None:
        labels, target = self.predictor.labels, None
        fault: DataError | KeyboardInterrupt | None = None
        path = self.options.output_dir / "overlay" / f"{file.name}.mp4"

        def write(frame: np.ndarray, ids: np.ndarray) -> None:
            assert target is not None
            target.write(overlay(frame, ids, labels))

        done = 0
        try:
            # An error's traceback keeps the reader alive, whose thread must end before the interpreter does.
            with Background() as writer, closing(iterate_ahead(video)) as read:
                try:
                    for frames, ids in self._predicted_frames(read):
                        if target is None:
                            target = VideoWriter(path, frames[0].shape[:2], video.rate, ffmpeg)
                        for frame in zip(frames, ids, strict=True):
                            writer.run(write, *frame)
                        done += len(frames)
                        self.bar.update(len(frames))
                except (DataError, KeyboardInterrupt) as error:  # the frames before it are kept
                    fault = error
            if target is not None:
                target.close()
        except BaseException:
            if target is not None:
                target.discard()
            raise
        self._expect(done - video.frames)
        if target is not None and isinstance(fault, KeyboardInterrupt):
            tqdm.write(f"{path}: holds the {done} frames that were done", file=sys.stderr)
        if fault is not None:
            raise fault

    def _predicted_frames(
        self, frames: Iterator[np.ndarray]
    ) -> Iterator[tuple[list[np.ndarray], list[np.ndarray]]]:
        """Frames and their ids, some at a time: a batch, or a clip for a network that was trained on clips.

        Clips follow each other; the last one reaches back, so that it is as long as the others.
        """
        length = self.predictor.clip
        several = length if length > 1 else self.options.batch_size
        before: list[np.ndarray] = []
        waiting: list[np.ndarray] = []
        fault = None
        try:
            for frame in frames:
                waiting.append(frame)
                if len(waiting) == several:
                    yield waiting, self._frame_ids(waiting)
                    before, waiting = waiting, []
        except DataError as error:
            fault = error
        if waiting:
            context = before[len(waiting) :] if length > 1 else []
            yield waiting, self._frame_ids([*context, *waiting])[len(context) :]
        if fault is not None:
            raise fault

    def _frame_ids(self, frames: list[np.ndarray]) -> list[np.ndarray]:
        if self.predictor.clip > 1:
            return list(self.predictor(np.stack(frames)))
        return self.predictor.predict_batch(frames)

    def show_attention(self, files: list[InputFile], point: tuple[int, int] | None) -> None:
        """A page for each picture, or pictures of one pixel's attention."""
        self._expect(len(files))
        for video in (file for file in files if file.is_video):
            self._report(DataError(f"{video.path}: --attention shows pictures, not videos"))
            self._expect(-1)
        pictures = [file for file in files if not file.is_video]
        folder = self.options.output_dir / "attention"
        for file, image in self._readable(read_ahead(pictures, lambda file: read_image(file.path), ahead=1)):
            try:
                if point is None:
                    page = attention_page(file.name, image, attention_rounds(self.predictor, image))
                    write_bytes(folder / f"{file.name}.html", page.encode())
                else:
                    check_point(point, image.shape[:2])
                    shown = heat_pictures(image, attention_rounds(self.predictor, image), point)
                    for r, picture in enumerate(shown, start=1):
                        write_picture(folder / f"{file.name}_R{r}.png", picture)
                self.bar.update(1)
            except DataError as error:
                self._report(DataError(f"{file.path}: {error}"))
                self._expect(-1)

    def _readable(
        self, results: Iterator[tuple[InputFile, Future[np.ndarray]]]
    ) -> Iterator[tuple[InputFile, np.ndarray]]:
        for file, result in results:
            try:
                yield file, result.result()
            except DataError as error:
                self._report(error)
                self._expect(-1)

    def _expect(self, images: int) -> None:
        """More images to come, or fewer."""
        self.bar.total += images
        self.bar.refresh()

    def _report(self, error: DataError) -> None:
        self.failed += 1
        tqdm.write(f"predict.py: error: {error}", file=sys.stderr)

    def finish(self, files: int, written: str) -> None:
        """Say what was done.

        Raises:
            DataError: something was not.
        """
        seconds = time.perf_counter() - self.began
        images = self.bar.n
        print(f"{images} images in {seconds:.1f} s, {images / seconds:.3g} images/s")
        if images:
            print(f"results are in {self.options.output_dir}/ ({written})")
        if self.failed:
            others = "; the others are done" if self.failed < files else ""
            raise DataError(f"{self.failed} of {files} inputs failed, see above{others}")


if __name__ == "__main__":
    run_script(main)
