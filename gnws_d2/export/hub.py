"""Share a trained model on the Hugging Face Hub, and download shared ones."""

import json
import os
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import cv2
from detectron2.config import CfgNode

from ..checkpoint import load_checkpoint
from ..data import read_image
from ..prediction import Predictor, find_trained
from ..prediction.drawing import LabelVisualizer
from ..report.run_dir import Run, read_run
from ..utils.errors import UserError
from .model_card import model_card

_FILES = ["config.yaml", "gnws.json", "model.safetensors"]
_OPTIONAL = ["detections.jpg", "threshold.json"]


def push_to_hub(
    output_dir: str, repo: str, *, license: str, picture: str | None = None, private: bool = False
) -> str:
    """
    Upload the weights of a trained model, folded, with what predictions need of its config, its
    classes and threshold, and a model card. No training image, path or host name is in them.

    Args:
        output_dir: ``OUTPUT_DIR`` of a run: its best checkpoint, or else its last.
        repo: "USER/REPO", which is created if it does not exist.
        license: for the card, as the Hub spells it, such as "apache-2.0".
        picture: an image to draw detections on, for the card.
        private: whether others may not see a new repository.

    Returns:
        The address of the repository.

    Raises:
        UserError: if there is no such run, extra or token, or the Hub is out of reach or refuses.
    """
    hub = _import_hub(f"To push to {repo}", repo)
    run = read_run(output_dir)
    if not hub.get_token():
        raise UserError("There is no token to push with: run `hf auth login`, or set HF_TOKEN.")
    api = hub.HfApi()
    with tempfile.TemporaryDirectory() as folder:
        try:
            _write_files(folder, run, repo, license, picture)
            url = api.create_repo(repo, private=private or None, exist_ok=True)
            if private and not api.repo_info(repo).private:
                raise UserError(f"{url} is public: name another repository for --private.")
            api.upload_folder(
                repo_id=repo,
                folder_path=folder,
                commit_message=f"Upload a model of gnws_d2 {version('gnws_d2')}",
                delete_patterns=_OPTIONAL,  # those of an earlier model
            )
        except hub.errors.HfHubHTTPError as e:
            raise UserError(
                f"The Hugging Face Hub refuses {repo}: {_shorten(e.server_message or e)} If it is "
                "not about the licence, `hf auth login` with a token that may write there."
            ) from e
        except (hub.errors.HTTPError, hub.errors.OfflineModeIsEnabled) as e:
            raise UserError(
                f"Cannot reach the Hugging Face Hub, so {repo} is not pushed ({_shorten(e)}) Run "
                "this again with a network connection, and without HF_HUB_OFFLINE."
            ) from e
        except (OSError, ValueError, RuntimeError) as e:
            raise UserError(f"Cannot push {repo}: {_shorten(e)}") from e
    return str(url)


def download_from_hub(name: str) -> str:
    """
    Return the local directory of a model that :func:`push_to_hub` has shared; without a network,
    that of an earlier download.

    Args:
        name: "USER/REPO", or "hf://USER/REPO" with an optional "@REVISION".

    Raises:
        UserError: if there is no such model or extra, or the Hub is out of reach.
    """
    repo, _, revision = name.removeprefix("hf://").partition("@")
    hub = _import_hub(f"{name} is not on this machine: to look on the Hugging Face Hub", repo)
    try:
        files = [*_FILES, "threshold.json"]  # and no other, such as a pickle
        directory = hub.snapshot_download(repo, revision=revision or None, allow_patterns=files)
    except hub.errors.RevisionNotFoundError as e:
        raise UserError(f"{repo} has no revision {revision}: see its branches and tags.") from e
    except hub.errors.RepositoryNotFoundError as e:
        raise UserError(
            f"There is no {repo}, neither here nor, for you, on the Hugging Face Hub: check the "
            "name, and if it is private or gated, run `hf auth login`."
        ) from e
    except (hub.errors.HTTPError, OSError) as e:
        raise UserError(
            f"Cannot download {repo}, and it is not on this machine ({_shorten(e)}) Where there is "
            f"a network, run `hf download {repo} --local-dir DIRECTORY`, and name that directory."
        ) from e
    missing = [file for file in _FILES if not os.path.isfile(os.path.join(directory, file))]
    if missing:
        raise UserError(f"{repo} is not a model of `gnws push`: it has no {', '.join(missing)}.")
    return directory


def _import_hub(purpose: str, repo: str) -> Any:
    try:
        import huggingface_hub.errors
        import huggingface_hub.utils
        import safetensors.torch  # noqa: F401
    except ImportError as e:
        raise UserError(f"{purpose}, pip install 'gnws_d2[hub]' ({e.name} is missing).") from e
    try:
        huggingface_hub.utils.validate_repo_id(repo if "/" in repo else f"/{repo}")
    except ValueError as e:
        raise UserError(f"{repo} is not the name USER/REPO of a repository: {_shorten(e)}") from e
    return huggingface_hub


def _write_files(folder: str, run: Run, repo: str, license: str, picture: str | None) -> None:
    from safetensors.torch import save_file

    cfg = find_trained(run.path, ["MODEL.DEVICE", "cpu"]).clone()
    shared = _shared_config(cfg).dump()
    cfg.defrost()
    cfg.TEST.AUG.ENABLED = False  # which would wrap the model
    predictor, checkpoint = Predictor(cfg), load_checkpoint(cfg.MODEL.WEIGHTS)
    state = {k: v.contiguous().clone() for k, v in predictor.model.state_dict().items()}
    save_file(state, os.path.join(folder, "model.safetensors"))
    threshold, cut, file = None, 0.5, Path(cfg.MODEL.WEIGHTS).with_name("threshold.json")
    if file.is_file():
        try:
            threshold = json.loads(file.read_bytes())
            cut = float(threshold["threshold"])
        except (ValueError, LookupError, TypeError) as e:
            raise UserError(f"{file} is damaged: remove it to push without it.") from e
        shutil.copyfile(file, os.path.join(folder, file.name))
    classes = [{"id": k, "name": v} for k, v in (checkpoint.get("classes") or {}).items()]
    content = json.dumps({"classes": classes, "threshold": threshold}, indent=1)
    card = model_card(run, state, checkpoint, repo, license, bool(picture))
    for name, text in (("config.yaml", shared), ("gnws.json", content), ("README.md", card)):
        Path(folder, name).write_text(text, "utf-8")
    if picture:
        image = read_image(picture, "RGB")
        instances = predictor(image[:, :, ::-1])["instances"]  # type: ignore[call-overload]
        instances = instances[instances.scores >= cut]
        visualizer = LabelVisualizer(image, predictor.metadata)
        drawn = visualizer.draw_instance_predictions(instances).get_image()
        cv2.imwrite(os.path.join(folder, "detections.jpg"), drawn[:, :, ::-1])


def _shared_config(cfg: CfgNode) -> CfgNode:
    """Return what predictions need: no path, no dataset and no device."""
    cfg = cfg.clone()
    for node, keys in (
        (cfg, cfg.keys() - {"VERSION", "MODEL", "INPUT", "TEST"}),
        (cfg.TEST, cfg.TEST.keys() - {"AUG", "DETECTIONS_PER_IMAGE"}),
        (cfg.MODEL, {"WEIGHTS", "DEVICE"}),
    ):
        for key in keys:
            del node[key]
    return cfg


def _shorten(error: Any) -> str:
    return " ".join(str(error).split())[:300].rstrip(".") + "."
