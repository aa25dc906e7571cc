"""Detections in images and videos: drawn, and as COCO JSON."""

import argparse
import contextlib
import glob
import itertools
import json
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator
from typing import Any

import cv2
import numpy as np
import pycocotools.mask as mask_util
from detectron2.config import CfgNode
from detectron2.data import Metadata, MetadataCatalog
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import Instances
from detectron2.utils.video_visualizer import VideoVisualizer
from tqdm import tqdm

from .. import model_zoo
from ..data import read_image, register_coco_datasets
from ..data.check import read_categories
from ..data.dataset_mapper import IMAGE_SUFFIXES, BadImageError
from ..utils.errors import UserError, say
from ..utils.files import replace_file
from ..utils.label_visualizer import LabelVisualizer, arrange_labels
from .checks import check_num_classes, check_registered
from .defaults import load_config
from .predictor import Predictor

_MIN_WIDTH = 320  # pixels; smaller images are drawn larger, so that labels can be read
_WINDOW = "detections"
_ESCAPE = 27


def run_demo(args: argparse.Namespace) -> int:
    """
    Find objects in images, a video, or what the webcam sees. They are drawn, and written as COCO
    JSON, or shown in a window. Images are read as in training, turned as their EXIF orientation
    says: sizes and boxes are those of the image as it is seen.

    Args:
        args: of ``tools/demo.py``.

    Returns:
        The exit status: 1 if an input could not be read, which stderr tells of, else 0.

    Raises:
        UserError: if there is nothing to read, the arguments contradict each other, the model
            cannot be built, or its output can neither be written nor shown.
    """
    if not 0 <= args.confidence_threshold <= 1:
        raise UserError(f"--confidence-threshold {args.confidence_threshold} is not from 0 to 1.")
    if args.batch_size is not None and args.batch_size < 1:
        raise UserError(f"--batch-size {args.batch_size}: it is at least 1.")
    if args.webcam and args.output:
        raise UserError("--webcam shows what it sees in a window: leave --output out.")
    if not args.output:
        _check_display()
    return _run_on_images(args) if args.input else _run_on_video(args)


def find_images(inputs: list[str]) -> tuple[list[str], list[str]]:
    """
    Args:
        inputs: paths of images, paths of directories, of which the images are taken, and patterns
            as those of :mod:`glob`.

    Returns:
        The paths of the images, each once, and what is wrong with each input that leads to none.
    """
    images: dict[str, str] = {}  # by absolute path
    faults = []
    for name in map(os.path.expanduser, inputs):
        paths = []
        for path in [name] if os.path.exists(name) else sorted(glob.glob(name)):
            if os.path.isdir(path):
                files = (os.path.join(path, file) for file in sorted(os.listdir(path)))
                paths += [file for file in files if file.lower().endswith(IMAGE_SUFFIXES)]
            else:
                paths.append(path)
        if not paths:
            exists = "holds no images" if os.path.isdir(name) else "does not exist"
            faults.append(f"{name} {'matches no image' if glob.has_magic(name) else exists}")
        for path in paths:
            images.setdefault(os.path.abspath(path), path)
    return list(images.values()), faults


def predict(
    predictor: Predictor, images: Iterable[tuple[str, np.ndarray]], batch_size: int
) -> Iterator[tuple[str, np.ndarray, Instances]]:
    """
    Predict in batches of images of one size that follow one another. Sizes are not mixed: the
    padding of the smaller images would go into the statistics of Group Normalization.

    Args:
        predictor: a :class:`Predictor`.
        images: names and images of shape (H, W, 3), uint8, in BGR order.
        batch_size: the largest number of images in a batch.

    Yields:
        The name, the image and the instances of each, on the CPU.
    """
    for _, same in itertools.groupby(images, key=lambda item: item[1].shape):
        while batch := list(itertools.islice(same, batch_size)):
            outputs: Any = predictor([image for _, image in batch])
            for (name, image), output in zip(batch, outputs):
                yield name, image, output["instances"].to("cpu")


def _run_on_images(args: argparse.Namespace) -> int:
    paths, faults = find_images(args.input)
    if not paths:
        raise UserError(f"There is nothing to read: {'; '.join(faults)}.")
    total = len(paths) + len(faults)
    root = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in paths])
    names = {path: os.path.relpath(path, root) for path in paths}
    pictures: dict[str, str] = _picture_paths(args.output, names) if args.output else {}
    predictor, metadata = _load_model(args)
    coco = _new_coco(metadata, {"image_root": root})
    for fault in faults:
        say(f"{fault}.")

    def images() -> Iterator[tuple[str, np.ndarray]]:
        for path in paths:
            try:
                yield path, read_image(path, "BGR")
            except BadImageError as e:
                faults.append(str(e))
                with tqdm.external_write_mode(sys.stderr):
                    say(str(e))
                bar.update()

    with tqdm(total=len(paths), unit="image", disable=not args.output) as bar:
        for path, image, instances in predict(predictor, images(), _batch_size(args, predictor)):
            picture = _draw(image, instances, metadata)
            if args.output:
                _write_picture(picture, pictures[path])
                _add_to_coco(coco, instances, names[path], image)
            elif _show(picture, 0):
                break
            bar.update()
    if args.output:
        _write_coco(coco, args.output)
    if faults:
        say(f"{len(faults)} of {total} inputs could not be read.")
    return 1 if faults else 0


def _run_on_video(args: argparse.Namespace) -> int:
    path = args.video_input
    if path and not os.path.isfile(path):
        raise UserError(f"The video {path} does not exist.")
    # What OpenCV cannot read or write is told of in one sentence.
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    video = cv2.VideoCapture(0 if args.webcam else path)
    is_read, frame = video.read()
    if not is_read:
        raise UserError(f"OpenCV cannot read {'a webcam' if args.webcam else f'the video {path}'}.")
    frames_per_second = video.get(cv2.CAP_PROP_FPS)
    num_frames = int(video.get(cv2.CAP_PROP_FRAME_COUNT))
    output, codec = _video_path(args.output, path) if args.output else (None, "")
    predictor, metadata = _load_model(args)
    visualizer = VideoVisualizer(metadata)
    coco = _new_coco(metadata, {"video": path})
    batch_size = 1 if args.webcam else _batch_size(args, predictor)  # no frame waits for others

    def frames() -> Iterator[tuple[str, np.ndarray]]:
        is_read, next_frame = True, frame
        while is_read:
            yield path, next_frame
            is_read, next_frame = video.read()

    with contextlib.ExitStack() as stack:
        if output:
            writer = stack.enter_context(
                _video_writer(output, codec, frames_per_second, frame.shape)
            )
        bar = stack.enter_context(tqdm(total=max(num_frames, 0) or None, unit="frame"))
        for _, image, instances in predict(predictor, frames(), batch_size):
            drawn = visualizer.draw_instance_predictions(image[:, :, ::-1], instances)
            picture = np.ascontiguousarray(arrange_labels(drawn).get_image()[:, :, ::-1])
            if output:
                writer.write(picture)
                _add_to_coco(coco, instances, os.path.basename(path), image, frame=bar.n)
            elif _show(picture, 1):
                return 0
            bar.update()
    if output:
        _write_coco(coco, output)
    # The number is often an estimate.
    if bar.n < num_frames - max(frames_per_second, 1):
        say(f"The video {path} ended after {bar.n} of {num_frames} frames: is it damaged?")
        return 1
    return 0


def _load_model(args: argparse.Namespace) -> tuple[Predictor, Metadata]:
    register_coco_datasets(args.dataset)
    threshold = ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", args.confidence_threshold]
    if args.config_file:
        cfg = load_config(args.config_file, [*args.opts, *threshold])
    else:
        if args.model not in model_zoo.names():
            raise UserError(f"--model {args.model}: the models are {', '.join(model_zoo.names())}.")
        weights = ["MODEL.WEIGHTS", model_zoo.get_checkpoint_url(args.model)]
        config_file = model_zoo.get_config_file(args.model)
        cfg = load_config(config_file, [*weights, *args.opts, *threshold])
    if cfg.MODEL.META_ARCHITECTURE != "GeneralizedRCNN":
        raise UserError(
            f"MODEL.META_ARCHITECTURE is {cfg.MODEL.META_ARCHITECTURE}: this is for a "
            "GeneralizedRCNN, a Faster or Mask R-CNN."
        )
    metadata = _read_classes(cfg)
    return Predictor(cfg), metadata


def _read_classes(cfg: CfgNode) -> Metadata:
    """Of a dataset of one's own only the annotation file is read, and of that only the classes."""
    if not cfg.DATASETS.TEST:
        raise UserError("DATASETS.TEST is empty: name the dataset whose classes the model has.")
    name = cfg.DATASETS.TEST[0]
    check_registered("TEST", name)
    metadata = MetadataCatalog.get(name)
    if metadata.get("thing_classes") is None:
        categories = read_categories(metadata.json_file)
        metadata = Metadata(
            thing_classes=list(categories.values()),
            thing_dataset_id_to_contiguous_id={i: n for n, i in enumerate(categories)},
        )
    check_num_classes(cfg, name, metadata.thing_classes)
    return metadata


def _batch_size(args: argparse.Namespace, predictor: Predictor) -> int:
    return args.batch_size or (1 if predictor.cfg.MODEL.DEVICE == "cpu" else 4)


def _draw(image: np.ndarray, instances: Instances, metadata: Metadata) -> np.ndarray:
    """A picture in BGR order, like the image. Instances are on the CPU."""
    scale = max(1.0, _MIN_WIDTH / image.shape[1])
    visualizer = LabelVisualizer(image[:, :, ::-1], metadata, scale)
    drawn = visualizer.draw_instance_predictions(instances).get_image()
    return np.ascontiguousarray(drawn[:, :, ::-1])


def _new_coco(metadata: Metadata, info: dict[str, Any]) -> dict[str, Any]:
    """
    A dataset in COCO format without images. Its "annotations" are also detections in COCO's results
    format, as ``COCO.loadRes`` takes them.
    """
    index = metadata.thing_dataset_id_to_contiguous_id
    categories = [{"id": i, "name": metadata.thing_classes[index[i]]} for i in index]
    return {"info": info, "categories": categories, "images": [], "annotations": []}


def _add_to_coco(
    coco: dict[str, Any], instances: Instances, file_name: str, image: np.ndarray, **more: Any
) -> None:
    image_id = len(coco["images"]) + 1
    height, width = image.shape[:2]
    size = {"width": width, "height": height}
    coco["images"].append({"id": image_id, "file_name": file_name, **more, **size})
    for result in instances_to_coco_json(instances, image_id):
        # Detectron2 numbers the classes in the order of their ids.
        result["category_id"] = coco["categories"][result["category_id"]]["id"]
        if "segmentation" in result:
            area = float(mask_util.area(result["segmentation"]))
        else:
            area = result["bbox"][2] * result["bbox"][3]
        annotation_id = len(coco["annotations"]) + 1
        coco["annotations"].append({"id": annotation_id, **result, "area": area, "iscrowd": 0})


def _is_directory(output: str) -> bool:
    return os.path.isdir(output) or not os.path.splitext(output)[1]


def _picture_paths(output: str, names: dict[str, str]) -> dict[str, str]:
    """
    Args:
        output: of the command line.
        names: of each image, its path below the directory that holds them all.

    Returns:
        Of each image, the path of its picture. No two are the same, and none is an image.
    """
    if _is_directory(output):
        pictures = {
            path: os.path.join(output, name if cv2.haveImageWriter(name) else f"{name}.png")
            for path, name in names.items()
        }
    else:
        if len(names) > 1:
            raise UserError(f"--output {output} is a file: {len(names)} images need a directory.")
        if not cv2.haveImageWriter(output):
            raise UserError(f"--output {output}: OpenCV cannot write such a picture.")
        pictures = dict.fromkeys(names, output)
    taken = set(map(os.path.realpath, names))
    for path, picture in pictures.items():
        if os.path.realpath(picture) in taken:
            raise UserError(
                f"--output {output}: the picture of {path} would take the place of an input, or of "
                f"another picture, at {picture}. Name another directory."
            )
        taken.add(os.path.realpath(picture))
        with _writing(picture):
            os.makedirs(os.path.dirname(os.path.abspath(picture)), exist_ok=True)
    return pictures


def _video_path(output: str, path: str) -> tuple[str, str]:
    """
    Returns:
        The path of the video to write, and its codec, as in Detectron2's demo.
    """
    codec, suffix = ("x264", ".mkv") if _has_codec("x264", ".mkv") else ("mp4v", ".mp4")
    if _is_directory(output):
        output = os.path.join(output, os.path.splitext(os.path.basename(path))[0] + suffix)
    if os.path.realpath(output) == os.path.realpath(path):
        raise UserError(f"--output {output} is the input: name another file or directory.")
    with _writing(output):
        os.makedirs(os.path.dirname(os.path.abspath(output)), exist_ok=True)
    return output, codec


def _has_codec(codec: str, suffix: str) -> bool:
    with tempfile.TemporaryDirectory() as directory:
        path = os.path.join(directory, f"video{suffix}")
        return cv2.VideoWriter(path, cv2.VideoWriter.fourcc(*codec), 30.0, (64, 64)).isOpened()


@contextlib.contextmanager
def _video_writer(
    path: str, codec: str, frames_per_second: float, shape: tuple[int, ...]
) -> Iterator[cv2.VideoWriter]:
    """Write a video of frames of `shape`, (H, W, 3), which is there when the block has ended."""
    fourcc, (height, width) = cv2.VideoWriter.fourcc(*codec), shape[:2]
    directory = os.path.dirname(os.path.abspath(path))
    with _writing(path), tempfile.TemporaryDirectory(dir=directory) as temporary:
        part = os.path.join(temporary, os.path.basename(path))
        writer = cv2.VideoWriter(part, fourcc, frames_per_second, (width, height))
        if not writer.isOpened():
            raise UserError(f"OpenCV cannot write the video {path}: name an .mp4 or .mkv file.")
        try:
            yield writer
        finally:
            writer.release()
        if not cv2.VideoCapture(part).isOpened():  # the writer does not tell
            raise UserError(f"The video {path} could not be written: is the disk full?")
        os.replace(part, path)


def _write_picture(picture: np.ndarray, path: str) -> None:
    _, data = cv2.imencode(os.path.splitext(path)[1], picture)
    with _writing(path), replace_file(path, "wb") as f:
        f.write(data)


def _write_coco(coco: dict[str, Any], output: str) -> None:
    if os.path.isdir(output):
        path = os.path.join(output, "detections.json")
    else:
        path = f"{os.path.splitext(output)[0]}.json"
    with _writing(path), replace_file(path) as f:
        json.dump(coco, f)
    print(f"{len(coco['images'])} images, {len(coco['annotations'])} objects: {path}")


@contextlib.contextmanager
def _writing(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        raise UserError(f"Cannot write {path}: {e.strerror or e}.") from e


def _check_display() -> None:
    # Without a display OpenCV would abort the process.
    if sys.platform.startswith("linux") and not {"DISPLAY", "WAYLAND_DISPLAY"} & set(os.environ):
        raise UserError("There is no display to show pictures on: say with --output where they go.")
    try:
        cv2.namedWindow(_WINDOW, cv2.WINDOW_NORMAL)
    except cv2.error as e:  # opencv-python-headless
        raise UserError("This OpenCV cannot show pictures: say with --output where they go.") from e


def _show(picture: np.ndarray, milliseconds: int) -> bool:
    """
    Show a picture for a time, 0 for until a key is pressed.

    Returns:
        Whether to end.
    """
    cv2.imshow(_WINDOW, picture)
    return cv2.waitKey(milliseconds) == _ESCAPE
