"""Detectron2's demo for these models: draw detections, and write them as COCO JSON and labels."""

import argparse
import os
import signal
from itertools import chain
from typing import Any

import cv2
import numpy as np
from tqdm import tqdm

from ..checkpoint.files import read_threshold
from ..config import choose_device, load_config
from ..data import read_image, register_coco_datasets
from ..data.coco import check_num_classes, check_registered, class_metadata, dataset_classes
from ..utils.errors import UserError, print_error
from ..utils.files import atomic_write
from ..utils.signals import catch_signals, received_signal
from .drawing import LabelVisualizer
from .labels import labels_directory, save_labels
from .picture import find_images, num_frames
from .predictor import Predictor, find_trained
from .results import CocoDetections

_MIN_WIDTH = 320  # pixels; smaller images are enlarged so that labels can be read
_MAX_SIDE = 4096  # pixels; of an image that is enlarged
_WRITABLE = (".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
_FRAME_RATE = 25  # of a video without one


class VisualizationDemo:
    """Run a model on images or frames, draw its detections, and collect them."""

    def __init__(self, args: argparse.Namespace):
        """`args` are the options of ``tools/demo.py``."""
        if args.model is not None:
            cfg = find_trained(args.model, args.opts, args.dataset)
        else:
            cfg = load_config(args.config_file, args.opts, args.dataset)
            if "MODEL.DEVICE" not in args.opts:
                choose_device(cfg)
        given = args.threshold
        self.threshold = read_threshold(cfg.MODEL.WEIGHTS) if given is None else given
        cfg.defrost()
        cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = self.threshold
        self.predictor = Predictor(cfg)
        metadata = self.predictor.metadata
        if metadata.get("thing_classes") is None:
            # The checkpoint does not have them. Images and annotations may be missing.
            register_coco_datasets(cfg.DATASETS.COCO)
            if not cfg.DATASETS.TEST:
                raise UserError(
                    "The checkpoint has no class names, and DATASETS.TEST is empty: name a dataset "
                    "that has them."
                )
            check_registered("TEST", metadata.name)
            metadata = class_metadata(metadata.name, dataset_classes(metadata.name))
        check_num_classes(cfg, metadata.name, metadata.thing_classes)
        self.metadata, self.detections = metadata, CocoDetections(metadata)

    def run_on_image(self, image: np.ndarray, scale: float = 1.0, **fields: Any) -> np.ndarray:
        """
        Draw the detections on an image, (H, W, 3), uint8, BGR; return (H', W', 3), `scale` times
        its size. `fields` are keys of the image in the COCO dataset.
        """
        outputs: Any = self.predictor(image)
        instances = outputs["instances"].to("cpu")
        self.detections.add(instances, **fields)
        visualizer = LabelVisualizer(image[:, :, ::-1], self.metadata, scale)
        drawn = visualizer.draw_instance_predictions(instances).get_image()
        return np.ascontiguousarray(drawn[:, :, ::-1])


def run_demo(args: argparse.Namespace) -> int:
    """
    Return the exit status: 0; 1 if an input could not be read, which stderr names; or that of a
    signal, which stops the demo between two images. What was done before is written.
    """
    try:
        return _run_on_images(args) if args.input else _run_on_video(args)
    except OSError as e:
        raise UserError(f"{e.filename}: {e.strerror or e}.") from e


def _run_on_images(args: argparse.Namespace) -> int:
    found = {path: find_images(path) for path in args.input}
    errors = [UserError(f"There is no image at {path}.") for path in found if not found[path]]
    paths = list(dict.fromkeys(chain(*found.values())))
    if not paths:
        raise UserError(" ".join(map(str, errors)))
    root = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in paths])
    names = [os.path.relpath(path, root) for path in paths]
    pictures = [os.path.join(args.output, picture) for picture in _name_drawings(names)]
    _check_not_overwritten(paths, pictures)
    if args.save_labels:
        labels_directory(args.output, args.save_labels)  # fails before the work if it exists
    os.makedirs(args.output, exist_ok=True)
    demo = VisualizationDemo(args)
    notes = []
    with catch_signals():
        try:
            for path, name, picture in zip(tqdm(paths, unit="image"), names, pictures):
                if received_signal():
                    break
                try:
                    image = read_image(path, "BGR")
                    if (frames := num_frames(path)) > 1:
                        notes.append(
                            f"{path} has {frames} frames or pages: only the first is used."
                        )
                    scale = min(_MIN_WIDTH / image.shape[1], _MAX_SIDE / max(image.shape[:2]))
                    drawn = demo.run_on_image(image, max(1, scale), file_name=name)
                    os.makedirs(os.path.dirname(picture), exist_ok=True)
                    _, data = cv2.imencode(os.path.splitext(picture)[1], drawn)
                    with atomic_write(picture, "wb") as f:
                        f.write(data)
                except UserError as e:
                    errors.append(e)
        finally:
            _write(demo, args.output, image_root=root)
        if args.save_labels:
            save_labels(demo.detections, args.output, args.save_labels, root)
        if errors:
            notes += [*map(str, errors), f"{len(errors)} of the inputs could not be used."]
        for note in notes:
            print_error(note)
        return _status(bool(errors))


def _name_drawings(names: list[str]) -> list[str]:
    """Name the drawing of each picture as the picture; as PNG, if OpenCV has no other way."""
    taken: dict[str, None] = {}
    for name in names:
        suffix = os.path.splitext(name)[1].lower()
        while suffix not in _WRITABLE or name in taken:
            name, suffix = f"{name}.png", ".png"
        taken[name] = None
    return list(taken)


def _run_on_video(args: argparse.Namespace) -> int:
    path, name = args.video_input, os.path.basename(args.video_input)
    video = cv2.VideoCapture(path)
    if not video.isOpened():
        raise UserError(f"OpenCV cannot read the video {path}.")
    output = os.path.join(args.output, f"{os.path.splitext(name)[0]}.mp4")
    _check_not_overwritten([path], [output])
    os.makedirs(args.output, exist_ok=True)
    demo = VisualizationDemo(args)
    rate, count = video.get(cv2.CAP_PROP_FPS), int(video.get(cv2.CAP_PROP_FRAME_COUNT))
    size = [int(video.get(key)) for key in (cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT)]
    rate = rate if 0 < rate < 1000 else _FRAME_RATE
    writer = cv2.VideoWriter(output, cv2.VideoWriter.fourcc(*"mp4v"), rate, size)
    if not writer.isOpened():
        raise UserError(f"OpenCV cannot write the video {output}.")
    frames = (frame for _, frame in iter(video.read, (False, None)))
    progress = tqdm(frames, total=max(count, 0), unit="frame")
    with catch_signals():
        for i, frame in enumerate(progress):
            if received_signal():
                break
            writer.write(demo.run_on_image(frame, file_name=name, frame=i))
        writer.release()
        _write(demo, args.output, video=path)
        return _status(False)


def _status(failed: bool) -> int:
    """Return the exit status, after a signal as that of a program that it has ended."""
    if signum := received_signal():
        print_error(f"stopped by {signal.Signals(signum).name}")
    return 128 + signum if signum else int(failed)


def _check_not_overwritten(inputs: list[str], outputs: list[str]) -> None:
    for path in set(map(os.path.realpath, inputs)) & set(map(os.path.realpath, outputs)):
        raise UserError(f"--output would overwrite the input {path}: name another directory.")


def _write(demo: VisualizationDemo, directory: str, **info: str) -> None:
    path, found = os.path.join(directory, "detections.json"), demo.detections
    found.write(path, **info)
    counts = f"{len(found.images)} images, {len(found.annotations)} objects"
    print(f"{counts}: {path} (scores of at least {demo.threshold:.2f})")
