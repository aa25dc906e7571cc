import importlib.metadata
import json

import detectron2

from gnws_d2.utils.compat import detectron2_version


def installed(monkeypatch, directory, version, origin=None):
    """Have `directory` be where Detectron2's metadata is, as pip and uv write it."""
    info = directory / f"detectron2-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: detectron2\nVersion: {version}\n")
    if origin:
        (info / "direct_url.json").write_text(json.dumps(origin))
    distribution = importlib.metadata.Distribution.at(info)
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: distribution)


def test_version_of_detectron2_tells_the_commit(monkeypatch, tmp_path):
    installed(monkeypatch, tmp_path, "0.6+02b5c4e", {"url": "file:///tmp/a.whl"})
    assert detectron2_version() == "0.6+02b5c4e"
    commit = "02b5c4e295e990042a714712c21dc79b731e8833"
    origin = {"url": "https://x/y.git", "vcs_info": {"vcs": "git", "commit_id": commit}}
    installed(monkeypatch, tmp_path, "0.6", origin)
    assert detectron2_version() == "0.6+02b5c4e"


def test_version_of_detectron2_without_metadata_is_its_own(monkeypatch):
    def not_found(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", not_found)
    assert detectron2_version() == detectron2.__version__
