"""The set-up says exactly what is wrong, and leaves an installed Detectron2 alone."""

import fcntl
import importlib.metadata
import os
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
import tarfile
import time
import venv
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import ROOT

# Nothing listens there.
CLOSED = "http://127.0.0.1:9"
# Stands for uv: it makes environments, and writes down what it is asked to install.
FAKE_UV = """#!/usr/bin/env bash
[ "$1" != venv ] || exec {python} -m venv --without-pip "$3" .venv
echo "$*" >> {log}
echo "$UV_DEFAULT_INDEX" >> {log}
[ ! -f {error} ] || {{ cat {error} >&2; exit 1; }}
"""


@pytest.fixture
def setup_env(tmp_path):
    checkout = tmp_path / "checkout"
    (checkout / "tools").mkdir(parents=True)
    names = ("tools/setup_env.sh", "tools/detectron2_wheel.py")
    for name in (*names, "requirements.txt", "setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, checkout / name)
    (checkout / "gnws_d2").symlink_to(ROOT / "gnws_d2")

    def run(*extras, cwd=checkout, **environ):
        command = ["bash", str(checkout / "tools" / "setup_env.sh"), *extras]
        environ = {**os.environ, **environ}
        return subprocess.run(command, cwd=cwd, env=environ, capture_output=True, text=True)

    run.checkout = checkout
    return run


@pytest.fixture
def bare_python(tmp_path):
    """A Python that has no Detectron2."""
    venv.create(tmp_path / "bare", with_pip=False)
    return str(tmp_path / "bare" / "bin" / "python")


@pytest.fixture
def fake_uv(tmp_path, bare_python):
    """A directory for PATH with a uv that only writes down its arguments, and the files it uses."""
    (tmp_path / "uv").mkdir()
    log, error = tmp_path / "uv" / "log", tmp_path / "uv" / "error"
    script = tmp_path / "uv" / "uv"
    script.write_text(FAKE_UV.format(python=bare_python, log=log, error=error))
    script.chmod(0o755)
    with zipfile.ZipFile(tmp_path / "detectron2-0.6-py3-none-any.whl", "w"):
        pass
    environ = {
        "PATH": f"{script.parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHON": bare_python,
        "DETECTRON2": str(tmp_path / "detectron2-0.6-py3-none-any.whl"),
    }
    return environ, log, error


def test_unsuitable_python_is_named(setup_env, tmp_path):
    needed = re.search(r'python_requires=">=(3\.\d+)"', (ROOT / "setup.py").read_text())[1]
    python = {"old": "exit 1", "bare": f'[ "$2" != venv ] || exit 1\nexec {sys.executable} -S "$@"'}
    for name, text in python.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    path = [d for d in os.environ["PATH"].split(os.pathsep) if not Path(d, "uv").exists()]
    for python, message in (
        ("no-such-python", f"is not Python {needed} or later: "),
        ("/no/such/python", f"is not Python {needed} or later: "),
        (str(tmp_path / "old"), f"is not Python {needed} or later: "),
        (str(tmp_path / "bare"), "cannot make a virtual environment: it needs its module venv"),
    ):
        run = setup_env(PYTHON=python, PATH=os.pathsep.join(path))
        assert run.returncode == 2 and not (setup_env.checkout / ".venv").exists()
        assert f"setup_env.sh: error: '{python}' {message}" in run.stderr


@pytest.mark.parametrize(
    "extras, message",
    [
        (["reprot"], "'reprot' is not an extra of setup.py, which has: onnx wandb hub"),
        (["dev,reprot"], "'reprot' is not an extra"),
        (["--help"], "'--help' is not an extra"),
        (["dev", "onnx"], "give the extras as one argument, as in dev,onnx; got 'dev onnx'."),
    ],
)
def test_misspelled_extras_are_refused_before_anything_is_installed(
    setup_env, fake_uv, extras, message
):
    environ, log, _ = fake_uv
    run = setup_env(*extras, **environ)
    assert run.returncode == 2 and run.stderr.startswith(f"setup_env.sh: error: {message}")
    assert not log.exists() and not (setup_env.checkout / ".venv").exists()


def test_uv_installs_the_tested_versions_with_the_wanted_build_of_pytorch_and_index(
    setup_env, fake_uv, tmp_path
):
    environ, log, _ = fake_uv
    # Paths are those of the user's directory.
    variables = {name: value.removeprefix(f"{tmp_path}/") for name, value in environ.items()}
    variables |= {"TORCH_BACKEND": "cpu", "PIP_INDEX_URL": "https://mirror/simple"}
    run = setup_env("dev", cwd=tmp_path, **{**variables, "PATH": environ["PATH"]})
    assert run.returncode == 0, run.stderr
    python = setup_env.checkout / ".venv" / "bin" / "python"
    assert run.stdout == f"{python}\n"
    *_, command, index = log.read_text().splitlines()
    assert command.startswith(f"pip install --python {python} --torch-backend cpu ")
    assert command.endswith(f"{environ['DETECTRON2']} -e .[dev]")
    assert index == "https://mirror/simple"


def test_second_set_up_installs_nothing_unless_versions_or_extras_changed(setup_env, fake_uv):
    environ, log, _ = fake_uv

    def installed(*extras):
        log.write_text("")
        run = setup_env(*extras, **environ)
        assert run.returncode == 0 and run.stdout.endswith(".venv/bin/python\n"), run.stderr
        return bool(log.read_text())

    assert installed("dev") and not installed("dev") and installed()
    with open(setup_env.checkout / "requirements.txt", "a") as f:
        f.write("another==1.0\n")
    assert installed("dev") and not installed("dev")

    # The environment was made with other variables.
    run = setup_env("dev", **{**environ, "TORCH_BACKEND": "cpu"})
    assert run.stderr.startswith("TORCH_BACKEND=cpu is ignored") and ".venv" in run.stderr


def test_environment_that_is_broken_is_repaired(setup_env, fake_uv):
    environ, log, _ = fake_uv
    assert setup_env(**environ).returncode == 0
    python = setup_env.checkout / ".venv" / "bin" / "python"
    site_packages = Path(sysconfig.get_path("purelib", vars={"base": str(python.parents[1])}))
    # As uv leaves packages when it is killed.
    (site_packages / "whole.py").touch()
    records = {"whole": ["whole.py"], "half": ["whole.py", "missing.py"], "empty": []}
    for name, files in records.items():
        info = site_packages / f"{name}-1.0.dist-info"
        info.mkdir()
        for file in files:
            with open(info / "RECORD", "a") as f:
                f.write(f"{file},sha256=0,0\n{file}c,,\n")
    assert setup_env("dev", **environ).returncode == 0
    assert [path.name for path in site_packages.glob("*.dist-info")] == ["whole-1.0.dist-info"]

    # The Python that it was made with is gone.
    python.unlink()
    python.symlink_to("/no/such/python")
    log.write_text("")
    assert setup_env("dev", **environ).returncode == 0
    assert "-e .[dev]" in log.read_text() and python.exists()


def test_set_up_waits_for_another_one(setup_env, fake_uv):
    environ, log, _ = fake_uv
    with open(setup_env.checkout / "setup.py") as file, ThreadPoolExecutor() as pool:
        fcntl.flock(file, fcntl.LOCK_EX)
        waiting = pool.submit(setup_env, **environ)
        time.sleep(1)
        installed = log.exists()
        fcntl.flock(file, fcntl.LOCK_UN)
        run = waiting.result()
    assert not installed and log.exists()
    assert run.returncode == 0
    assert run.stderr.startswith("Another set-up of this directory is running. Waiting for it ...")


def test_activated_environment_of_a_linked_checkout_is_its_own(setup_env, fake_uv, tmp_path):
    environ, log, _ = fake_uv
    assert setup_env(**environ).returncode == 0
    python = setup_env.checkout / ".venv" / "bin" / "python"
    info = next(python.parents[1].glob("lib/python*/site-packages")) / "detectron2-0.6.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: detectron2\nVersion: 0.6\n")
    (tmp_path / "link").symlink_to(setup_env.checkout)
    log.write_text("")
    linked = str(tmp_path / "link" / ".venv" / "bin" / "python")
    assert setup_env(**{**environ, "PYTHON": linked}).returncode == 0
    assert log.read_text() == ""


@pytest.mark.parametrize(
    "error, message",
    [
        ("failed to write: No space left on device (os error 28)", "the disk is full"),
        ("error sending request for url (https://x/)", "the package index cannot be reached"),
        ("cause: invalid peer certificate: UnknownIssuer", "the certificate of the package index"),
        ("  cause: failed to create directory `/a`: Read-only file system (os error 30)",
         "a directory cannot be written to: failed to create directory `/a`: Read-only file"),
        ("invalid value 'x' for '--torch-backend'", "TORCH_BACKEND=cpu is not a build of PyTorch"),
        ("something else", "the installation failed; the reason is above"),
    ],
)  # fmt: skip
def test_failed_installation_is_one_sentence(setup_env, fake_uv, error, message):
    environ, _, file = fake_uv
    file.write_text(error)
    run = setup_env(**environ, TORCH_BACKEND="cpu")
    assert run.returncode == 2 and run.stdout == ""
    assert error in run.stderr
    assert f"setup_env.sh: error: {message}" in run.stderr.splitlines()[-1]


@pytest.mark.ci
def test_installed_detectron2_is_used(setup_env, tmp_path):
    venv.create(tmp_path / "env", with_pip=True)
    python = str(tmp_path / "env" / "bin" / "python")
    site_packages = sysconfig.get_path("purelib", vars={"base": str(tmp_path / "env")})
    # What this test's own environment has, without a copy of it.
    Path(site_packages, "installed.pth").write_text(sysconfig.get_path("purelib"))

    run = setup_env(PYTHON=python, DETECTRON2="/no/such/checkout")
    assert run.returncode == 0, run.stderr
    assert run.stdout == f"{python}\n"
    version = importlib.metadata.version("detectron2")
    assert f"Detectron2 is version {version}, which {python} has already." in run.stderr
    assert not (setup_env.checkout / ".venv").exists()
    assert not list(Path(site_packages).glob("detectron2*"))
    assert list(Path(site_packages).glob("*gnws_d2*"))


# The wheel of Detectron2.


def build_wheel(directory, requirements=None, **environ):
    """Run the script, with GitHub out of reach unless `requirements` name another address."""
    if requirements is None:
        requirements = directory / "requirements.txt"
        requirements.write_text(f"detectron2 @ git+{CLOSED}/detectron2.git@02b5c4e\n")
    tool = str(ROOT / "tools" / "detectron2_wheel.py")
    environ = {k: v for k, v in os.environ.items() if k != "DETECTRON2"} | environ
    command = [sys.executable, tool, requirements, directory]
    return subprocess.run(command, env=environ, capture_output=True, text=True)


@pytest.fixture
def detectron2_checkout(tmp_path):
    """The least that Detectron2's source has, compiled in place."""
    checkout = tmp_path / "detectron2"
    files = {
        "detectron2/__init__.py": '__version__ = "0.6"\n',
        "detectron2/_C.cpython-311-x86_64-linux-gnu.so": "",
        "detectron2/layers/__init__.py": "",
        "detectron2/layers/csrc/vision.cpp": "",
        "detectron2/model_zoo/__init__.py": "",
        "configs/COCO-Detection/retinanet.yaml": "{}",
        "configs/common/train.py": "",
        "projects/TridentNet/train_net.py": "",
        "setup.py": "import torch\nsetup(install_requires=['black==21.4b2', 'yacs>=0.1.8'])\n",
    }
    for name, text in files.items():
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_text(text)
    return checkout


@pytest.mark.parametrize(
    "format, root", [(None, ""), ("gztar", "d2-02b5"), ("gztar", ""), ("zip", "d2")]
)
def test_wheel_has_the_python_files_and_configs_alone(detectron2_checkout, tmp_path, format, root):
    source = detectron2_checkout
    if format is not None:
        (tmp_path / "archived").mkdir()
        shutil.copytree(source, tmp_path / "archived" / root, dirs_exist_ok=True)
        source = shutil.make_archive(tmp_path / "detectron2", format, tmp_path / "archived")
    run = build_wheel(tmp_path, DETECTRON2=str(source))
    assert run.returncode == 0, run.stderr
    assert run.stderr == f"Detectron2 is {source}; not compiled.\n"
    wheel = Path(run.stdout.strip())
    assert wheel == tmp_path / "detectron2-0.6-py3-none-any.whl"
    info = "detectron2-0.6.dist-info"
    with zipfile.ZipFile(wheel) as file:
        assert set(file.namelist()) == {
            "detectron2/__init__.py",
            "detectron2/layers/__init__.py",
            "detectron2/model_zoo/__init__.py",
            "detectron2/model_zoo/configs/COCO-Detection/retinanet.yaml",
            "detectron2/model_zoo/configs/common/train.py",
            *(f"{info}/{name}" for name in ("METADATA", "RECORD", "WHEEL", "top_level.txt")),
        }
        file.extractall(tmp_path / "site")
    metadata = importlib.metadata.Distribution.at(tmp_path / "site" / info)
    assert (metadata.metadata["Name"], metadata.version) == ("detectron2", "0.6")
    assert metadata.requires == ["black", "yacs>=0.1.8"]


@pytest.mark.parametrize(
    "source, message",
    [
        ("git+", " cannot be cloned"),
        ("git+file:///no/such.git@02b5c4e", "file:///no/such.git cannot be cloned"),
        ("/no/such/checkout", "DETECTRON2=/no/such/checkout does not exist. It is a checkout,"),
        ("https://mirror/d2.git", "DETECTRON2=https://mirror/d2.git does not exist."),
        ("empty.tar.gz", "empty.tar.gz is not an archive of Detectron2: it has no detectron2/."),
        ("empty.whl", "empty.whl is not a wheel."),
        ("configs", "configs is not a checkout of Detectron2"),
        ("README.md", "README.md is not an archive of Detectron2"),
    ],
)
def test_source_that_cannot_be_used_is_named(tmp_path, monkeypatch, source, message):
    for name in ("configs", "README.md"):
        (tmp_path / name).symlink_to(ROOT / name)
    tarfile.open(tmp_path / "empty.tar.gz", "w:gz").close()
    (tmp_path / "empty.whl").touch()
    monkeypatch.chdir(tmp_path)
    run = build_wheel(tmp_path, DETECTRON2=source)
    assert run.returncode != 0 and run.stdout == "" and run.stderr.count("\n") == 1
    assert run.stderr.startswith(f"Detectron2 cannot be installed: {message}"), run.stderr


def test_revisions_and_copies_of_the_release_get_its_edits(detectron2_checkout, tmp_path):
    files = {
        "layers/deform_conv.py": "from detectron2 import _C\n",
        "export/__init__.py": "from .api import *\nfrom .flatten import TracingAdapter\n",
        "data/transforms/transform.py": "mode = Image.LINEAR\n",
    }
    for name, text in files.items():
        path = detectron2_checkout / "detectron2" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    source = str(detectron2_checkout)
    if shutil.which("git"):  # which the set-up does not need
        git = ["git", "-C", source, "-c", "user.name=a", "-c", "user.email=a@b"]
        commands = (["init", "-q"], ["add", "."], ["commit", "-qm", "release"], ["tag", "v0.6"])
        for command in (*commands, ["rm", "-rq", "detectron2"], ["commit", "-qm", "later"]):
            subprocess.run([*git, *command], check=True)
        source = f"git+file://{source}@v0.6"
    run = build_wheel(tmp_path, DETECTRON2=source)
    assert run.returncode == 0, run.stderr
    with zipfile.ZipFile(run.stdout.strip()) as wheel:
        read = {name: wheel.read(f"detectron2/{name}").decode() for name in ("_C.py", *files)}
    assert "get_compiler_version = " in read["_C.py"]
    assert read["export/__init__.py"] == "from .flatten import TracingAdapter\n"
    assert read["data/transforms/transform.py"] == "mode = Image.BILINEAR\n"


def test_servers_out_of_reach_are_noticed_within_ten_seconds(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:  # connects, and never answers
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        requirements = tmp_path / "requirements.txt"
        requirements.write_text(f"detectron2 @ git+{url}/detectron2.git@02b5c4e\n")
        start = time.monotonic()
        environ = {"UV_DEFAULT_INDEX": f"{CLOSED}/simple", "UV_HTTP_RETRIES": "0"}
        run = build_wheel(tmp_path, requirements, **environ)
        assert time.monotonic() - start < 10
    assert run.returncode != 0 and run.stdout == ""
    assert "or cannot be reached. Set DETECTRON2" in run.stderr


def test_release_with_other_content_is_refused(tmp_path, server):
    name = "pb1-detectron2-0.6.tar.gz"
    server.files["simple/pb1-detectron2"] = f'<a href="/{name}">{name}</a>'.encode()
    server.files[name] = b"another file"
    run = build_wheel(tmp_path, UV_DEFAULT_INDEX=f"{server.url}/simple", UV_NO_CACHE="1")
    assert run.returncode != 0 and run.stdout == ""
    assert "has another SHA-256 than 5d2e9e51e523" in run.stderr


@pytest.mark.ci
@pytest.mark.parametrize("pinned", [True, False])
def test_wheel_of_detectron2(tmp_path, pinned):
    """From GitHub, if it can be reached, and from the package index."""
    run = build_wheel(tmp_path, ROOT / "requirements.txt" if pinned else None)
    assert run.returncode == 0, run.stderr
    wheel = Path(run.stdout.strip())
    release = "Detectron2 is the release v0.6 of the package index, as http" in run.stderr
    assert release or (
        pinned and "Detectron2 is commit 02b5c4e of https://github.com" in run.stderr
    )
    version = "0.6" if release else "0.6+02b5c4e"
    assert wheel.name == f"detectron2-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as file:
        names = file.namelist()
        file.extractall(tmp_path / "site")
    assert {name.rpartition(".")[2] for name in names if ".dist-info" not in name} == {"py", "yaml"}
    modules = [name for name in names if name.startswith("detectron2/") and name.endswith(".py")]
    assert len(modules) > 150
    configs = "detectron2/model_zoo/configs"
    for name in ("Base-RCNN-FPN.yaml", "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x.yaml"):
        assert f"{configs}/{name}" in names
    assert f"{configs}/common/train.py" in names
    assert ("detectron2/_C.py" in names) == release
    # As it is installed, and only the packages of this environment beside it.
    code = "import importlib.metadata as m, detectron2.engine, detectron2.model_zoo as z\n"
    code += "z.get_config_file('Base-RCNN-C4.yaml'); import detectron2.export\n"
    code += "print(m.version('detectron2'), detectron2.__file__)"
    environ = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environ, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stdout.split() == [version, str(tmp_path / "site/detectron2/__init__.py")], (
        done.stderr
    )
