"""gnws:// over HTTP, from a server of the test's own, with files of the published names."""

import hashlib
import io
import multiprocessing
import os

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils.file_io import PathManager

from gnws_d2 import model_zoo
from gnws_d2.checkpoint import catalog
from gnws_d2.utils.errors import UserError

NAME = "faster_rcnn_R50_gnws_1x"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path))
    return tmp_path / "gnws_d2"


@pytest.fixture
def publish(server, monkeypatch):
    """Put a checkpoint on the server, under a file name with its hash, and in the catalog."""

    def publish(name, content, prefix=None):
        if not isinstance(content, bytes):
            f = io.BytesIO()
            torch.save(content, f)
            content = f.getvalue()
        file_name = f"model-{prefix or hashlib.sha256(content).hexdigest()[:8]}.pth"
        server.files[file_name] = content
        urls = {**catalog.checkpoint_urls(), name: f"{server.url}/{file_name}"}
        monkeypatch.setattr(catalog, "checkpoint_urls", lambda: urls)
        return file_name

    return publish


def small_checkpoint():
    return {"state_dict": {"backbone.layer1.0.conv1.weight": torch.ones(2, 2, 1, 1)}}


def files(cache):
    return sorted(path.name for path in cache.iterdir() if path.suffix != ".lock")


def get():
    return PathManager.get_local_path(f"gnws://{NAME}")


def test_catalog_has_every_model_and_the_backbone_that_it_starts_from():
    urls = catalog.checkpoint_urls()
    for row in model_zoo.table():
        assert urls[row["name"]].endswith(f"-{row['sha256_prefix']}.pth")
        cfg = model_zoo.get_config(row["name"])
        assert cfg.MODEL.WEIGHTS.removeprefix("gnws://") in urls
        depth = "-".join(row["backbone"].split("-")[:-1])
        assert cfg.MODEL.WEIGHTS == f"gnws://ImageNetPretrained/{depth}-GN-WS"


def test_downloads_once_checks_and_converts(publish, server, cache, capfd):
    file_name = publish(NAME, small_checkpoint())
    path = get()
    assert server.requests == 1 and "100%" in capfd.readouterr().err  # the progress bar
    assert torch.load(path)["model"].keys() == {"backbone.bottom_up.res2.0.conv1.weight"}
    assert files(cache) == [f"{file_name[:-4]}.detectron2.pth", file_name]
    assert get() == path and server.requests == 1
    (cache / f"{file_name[:-4]}.detectron2.pth").unlink()  # as if put there by hand
    assert get() == path and server.requests == 1
    conv = torch.nn.Module()
    conv.conv1 = torch.nn.Conv2d(2, 2, 1, bias=False)
    model = torch.nn.ModuleDict({"res2": torch.nn.ModuleList([conv])})
    for name in ("bottom_up", "backbone"):
        model = torch.nn.ModuleDict({name: model})
    DetectionCheckpointer(model).load(f"gnws://{NAME}")  # stock Detectron2
    assert (conv.conv1.weight == 1).all()


@pytest.mark.parametrize("name", ["mask_rcnn_R50_gnws_20_23_24", "ImageNetPretrained/R50-GN-WS"])
def test_unknown_name_offers_the_nearest(cache, name):
    with pytest.raises(UserError, match=r"mask_rcnn_R50_gnws_20_23_24e|ImageNetPretrained/R-50-GN"):
        PathManager.get_local_path(f"gnws://{name}")


def test_failed_download_says_why_and_is_restarted(publish, server, cache, monkeypatch):
    file_name = publish(NAME, small_checkpoint())
    content = server.files.pop(file_name)
    with pytest.raises(UserError, match=f"Cannot download {server.url}/{file_name} to .*404"):
        get()
    server.files[file_name], server.cut = content, 100
    with pytest.raises(UserError, match=r"Cannot download .*(invalid hash|IncompleteRead)"):
        get()
    server.cut = None
    with monkeypatch.context() as unreachable:
        url = "http://127.0.0.1:9/model-12345678.pth"
        unreachable.setattr(catalog, "checkpoint_urls", lambda: {NAME: url})
        with pytest.raises(UserError) as e:
            get()
    assert all(part in str(e.value) for part in (url, str(cache), 'MODEL.WEIGHTS ""'))
    assert "\n" not in str(e.value) and files(cache) == []
    assert torch.load(get())["model"]
    assert files(cache) == [f"{file_name[:-4]}.detectron2.pth", file_name]


def test_file_of_another_hash_is_refused(publish, cache):
    content = b"<html>Sign in</html>"
    file_name = publish(NAME, content, prefix="12345678")
    actual = hashlib.sha256(content).hexdigest()
    with pytest.raises(UserError, match=f'{file_name} to .*expected "12345678", got "{actual}"'):
        get()
    assert files(cache) == []


def test_cache_directory_without_permission_is_named(publish, tmp_path, monkeypatch):
    """Root may write anywhere, so a file stands where the directory should be."""
    publish(NAME, small_checkpoint())
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path))
    (tmp_path / "gnws_d2").write_text("")
    with pytest.raises(UserError, match=f"to {tmp_path}/gnws_d2: .*Not a directory.*FVCORE_CACHE"):
        get()


def _get(url, cache):
    os.environ["FVCORE_CACHE"] = cache
    catalog.checkpoint_urls = lambda: {NAME: url}
    return get()


def test_eight_processes_download_once(publish, server, cache):
    file_name = publish(NAME, small_checkpoint())
    server.delay = 1
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["gnws_d2.checkpoint.catalog"])
    with context.Pool(8) as pool:
        paths = pool.starmap(_get, [(f"{server.url}/{file_name}", str(cache.parent))] * 8)
    assert len(set(paths)) == 1 and torch.load(paths[0])["model"]
    assert server.requests == 1
