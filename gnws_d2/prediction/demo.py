"""Detectron2's ``VisualizationDemo`` for these models, which also writes COCO JSON."""

import argparse
import contextlib
import glob
import json
import os
import sys
import tempfile
from typing import Any

import cv2
import numpy as np
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from tqdm import tqdm

from ..config import choose_device, load_config
from ..data import read_image, register_coco_datasets
from ..data.coco import check_num_classes, check_registered, class_metadata, dataset_classes
from ..data.dataset_mapper import IMAGE_SUFFIXES, BadImageError
from ..utils.errors import UserError, print_error
from ..utils.files import atomic_write
from ..utils.process import keep_freed_memory
from .drawing import LabelVisualizer
from .predictor import Predictor, find_trained

_MIN_WIDTH = 320  # pixels; smaller images are enlarged so that labels can be read
_WINDOW = "detections"


class VisualizationDemo:
    """Run a model on images or frames, draw its detections, and collect them as a COCO dataset."""

    def __init__(self, args: argparse.Namespace):
        opts = [*args.opts, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", args.confidence_threshold]
        if args.model:
            cfg = find_trained(args.model, opts, args.dataset)
        else:
            cfg = load_config(args.config_file, opts, args.dataset)
            choose_device(cfg)
        self.predictor = Predictor(cfg)
        metadata = self.predictor.metadata
        if metadata.get("thing_classes") is None:
            # Of a checkpoint without them. Images and annotations may be missing.
            register_coco_datasets(cfg.DATASETS.COCO)
            if not cfg.DATASETS.TEST:
                raise UserError(
                    "DATASETS.TEST is empty, and the checkpoint does not know its classes: name "
                    "a dataset that has them."
                )
            check_registered("TEST", metadata.name)
            metadata = class_metadata(metadata.name, dataset_classes(metadata.name))
        check_num_classes(cfg, metadata.name, metadata.thing_classes)
        self.metadata = metadata
        self.draw = {"labels": not args.no_labels, "boxes": not args.no_boxes}
        ids = metadata.thing_dataset_id_to_contiguous_id  # in the order of the classes
        self.categories = [{"id": i, "name": name} for i, name in zip(ids, metadata.thing_classes)]
        self.images: list[dict[str, Any]] = []
        self.annotations: list[dict[str, Any]] = []

    def run_on_image(self, image: np.ndarray, enlarge: bool = True, **fields: Any) -> np.ndarray:
        """
        Draw the detections of an image, (H, W, 3), uint8, BGR.

        Args:
            enlarge: draw a small image larger, so that labels can be read.
            fields: of the image in the COCO dataset; without any, it is not added there.
        """
        outputs: Any = self.predictor(image)
        instances = outputs["instances"].to("cpu")
        rgb, (height, width) = image[:, :, ::-1], image.shape[:2]
        scale = max(1.0, _MIN_WIDTH / width) if enlarge else 1.0
        visualizer = LabelVisualizer(rgb, self.metadata, scale)
        drawn = visualizer.draw_instance_predictions(instances, **self.draw)
        if fields:
            image_id = len(self.images) + 1
            self.images.append({"id": image_id, **fields, "width": width, "height": height})
            areas = instances.pred_boxes.area()
            if instances.has("pred_masks"):
                areas = instances.pred_masks.sum(dim=(1, 2))
            for result, area in zip(instances_to_coco_json(instances, image_id), areas.tolist()):
                result["category_id"] = self.categories[result["category_id"]]["id"]
                result |= {"id": len(self.annotations) + 1, "area": area, "iscrowd": 0}
                self.annotations.append(result)
        return np.ascontiguousarray(drawn.get_image()[:, :, ::-1])

    def write_coco(self, output: str, **info: str) -> None:
        """Write the COCO dataset into the directory `output`, or beside the file `output`."""
        path = f"{os.path.splitext(output)[0]}.json"
        if os.path.isdir(output):
            path = os.path.join(output, "detections.json")
        coco = {"info": info, "categories": self.categories, "images": self.images}
        with atomic_write(path) as f:
            json.dump({**coco, "annotations": self.annotations}, f)
        print(f"{len(self.images)} images, {len(self.annotations)} objects: {path}")


def run_demo(args: argparse.Namespace) -> int:
    """Return the exit status: 1 if an input could not be read, which stderr names, else 0."""
    if not args.output:
        _open_window()
    keep_freed_memory()
    try:
        return _run_on_images(args) if args.input else _run_on_video(args)
    except OSError as e:
        raise UserError(f"{e.filename}: {e.strerror or e}.") from e


def _run_on_images(args: argparse.Namespace) -> int:
    paths, errors = _find_images(args.input)
    if not paths:
        raise UserError(f"Nothing to read. {' '.join(errors)}")
    root = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in paths])
    names = [os.path.relpath(path, root) for path in paths]
    pictures = [name if cv2.haveImageWriter(name) else f"{name}.png" for name in names]
    if args.output:
        pictures = _output_paths(args.output, paths, pictures)
        if not cv2.haveImageWriter(pictures[0]):
            raise UserError(f"--output {args.output}: OpenCV cannot write such a picture.")
    demo = VisualizationDemo(args)
    bar = tqdm(paths, unit="image", disable=not args.output)
    for path, name, picture in zip(bar, names, pictures):
        try:
            image = read_image(path, "BGR")
        except BadImageError as e:
            errors.append(str(e))
            continue
        if args.output:
            drawn = demo.run_on_image(image, file_name=name)
            with atomic_write(picture, "wb") as f:
                f.write(cv2.imencode(os.path.splitext(picture)[1], drawn)[1])
        elif _show(demo.run_on_image(image), 0):
            break
    if args.output:
        demo.write_coco(args.output, image_root=root)
    for error in errors:
        print_error(error)
    return 1 if errors else 0


def _run_on_video(args: argparse.Namespace) -> int:
    # Errors are reported once, by us.
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    path = args.video_input
    video = cv2.VideoCapture(0 if args.webcam else path)
    if not video.isOpened():
        raise UserError(f"OpenCV cannot read {'a webcam' if args.webcam else f'the video {path}'}.")
    frames = (frame for _, frame in iter(video.read, (False, None)))
    if not args.output:
        demo = VisualizationDemo(args)
        any(_show(demo.run_on_image(frame, enlarge=False), 1) for frame in frames)
        return 0

    name = os.path.basename(path)
    (output,) = _output_paths(args.output, [path], [f"{os.path.splitext(name)[0]}.mp4"])
    demo = VisualizationDemo(args)
    rate, num_frames = video.get(cv2.CAP_PROP_FPS), int(video.get(cv2.CAP_PROP_FRAME_COUNT))
    size = [int(video.get(key)) for key in (cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT)]
    with tempfile.TemporaryDirectory(dir=os.path.dirname(output) or ".") as directory:
        part = os.path.join(directory, os.path.basename(output))
        writer = cv2.VideoWriter(part, cv2.VideoWriter.fourcc(*"mp4v"), rate, size)
        if not writer.isOpened():
            raise UserError(f"OpenCV cannot write the video {output}: name an .mp4 or .mkv file.")
        for i, frame in enumerate(tqdm(frames, total=max(num_frames, 0), unit="frame")):
            writer.write(demo.run_on_image(frame, False, file_name=name, frame=i))
        writer.release()
        if not cv2.VideoCapture(part).isOpened():  # the writer reports no errors
            raise UserError(f"The video {output} could not be written: is the disk full?")
        os.replace(part, output)
    demo.write_coco(output, video=path)
    if len(demo.images) < max(1, num_frames - rate):  # the number is often an estimate
        print_error(f"The video {path} ended after {len(demo.images)} of {num_frames} frames.")
        return 1
    return 0


def _open_window() -> None:
    # Without a display OpenCV would abort the process.
    if sys.platform != "linux" or {"DISPLAY", "WAYLAND_DISPLAY"} & set(os.environ):
        with contextlib.suppress(cv2.error):  # of opencv-python-headless
            return cv2.namedWindow(_WINDOW, cv2.WINDOW_NORMAL)
    raise UserError("There is no display to show pictures on: write them with --output.")


def _show(picture: np.ndarray, milliseconds: int) -> bool:
    """Show a picture, for 0 ms until a key is pressed. Return whether the key was Esc."""
    cv2.imshow(_WINDOW, picture)
    return cv2.waitKey(milliseconds) == 27  # Esc


def _find_images(inputs: list[str]) -> tuple[list[str], list[str]]:
    """Return the images at the inputs, and an error message for each input that has none."""
    images, errors = [], []
    for name in map(os.path.expanduser, inputs):
        if os.path.isdir(name):
            found = glob.glob(os.path.join(glob.escape(name), "*"))
            found = [path for path in found if path.lower().endswith(IMAGE_SUFFIXES)]
        else:
            found = [name] if os.path.exists(name) else glob.glob(name)
        if not found:
            errors.append(str(UserError(f"There is no image at {name}.")))
        images += sorted(map(os.path.normpath, found))
    return list(dict.fromkeys(images)), errors


def _output_paths(output: str, inputs: list[str], names: list[str]) -> list[str]:
    """Return the paths of the files to write, and create their directories."""
    is_directory = os.path.isdir(output) or not os.path.splitext(output)[1]
    paths = [os.path.join(output, name) if is_directory else output for name in names]
    if set(map(os.path.realpath, inputs)) & set(map(os.path.realpath, paths)):
        raise UserError(f"--output {output} would overwrite an input: name another directory.")
    if len(set(paths)) < len(paths):
        raise UserError(f"--output {output}: two pictures would be one file, name a directory.")
    for path in paths:
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    return paths
