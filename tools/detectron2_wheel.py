#!/usr/bin/env python3
"""
Build a wheel of Detectron2's Python files. Its compiled operators are left out: GN+WS models use
none of them, and so need no compiler. The source is the first of these that can be had:

* ``DETECTRON2``: a wheel, which is used as it is, a checkout, an archive (.tar.gz, .zip), git+URL,
  git+URL@REVISION, or v0.6 for the release below;
* the commit of requirements.txt from GitHub, as an archive, or by git;
* the last release, v0.6, from the package index, which has its source under another name.

Usage: detectron2_wheel.py requirements.txt DIRECTORY, in an environment with setuptools and uv.
Prints the path of the wheel, and on stderr a line that says what it is.
"""

import ast
import contextlib
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import urllib.parse
import urllib.request
import zipfile
from http.client import HTTPException
from pathlib import Path
from typing import Any

_TIMEOUT = 3  # seconds until a server that does not answer is out of reach, by HTTPS and by git
_RELEASE = "pb1-detectron2==0.6"  # the Python files of the tag v0.6
_RELEASE_SHA256 = "5d2e9e51e523ec72f6a31cca04b0a515492e9514b773a3d134cedc0677170b29"
# What v0.6 needs for newer libraries: files, what to replace, by what.
_RELEASE_EDITS = [
    ("detectron2/data/transforms/transform.py", r"Image\.LINEAR", "Image.BILINEAR"),  # Pillow 10
    ("detectron2/**/*.py", r"\bnp\.(bool|int|float)\b", r"\1"),  # NumPy 1.24
    ("detectron2/export/__init__.py", r"from \.api import .*\n", ""),  # caffe2, until PyTorch 2.0
]
# v0.6 imports its compiled operators for layers that GN+WS models do not have, and logs these.
_RELEASE_C = """get_compiler_version = get_cuda_version = lambda: "not compiled"
has_cuda = lambda: False
"""
_PYPROJECT = """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"

[project]
name = "detectron2"
version = "{version}"
description = "Detectron2 without its compiled operators"
license = {{text = "Apache-2.0"}}
dependencies = {dependencies}

[tool.setuptools]
packages.find.include = ["detectron2*"]
package-data."detectron2.model_zoo" = ["configs/**/*.yaml", "configs/**/*.py"]
"""


class SourceError(Exception):
    """Raised when a source of Detectron2 cannot be used."""


def build_wheel(requirements: str, directory: str) -> str:
    """Return the path of the wheel, in `directory`."""
    source = os.environ.get("DETECTRON2", "")
    if source.endswith(".whl") and os.path.isfile(source):
        if not zipfile.is_zipfile(source):
            raise SourceError(f"{source} is not a wheel.")
        print(f"Detectron2 is the wheel {source}.", file=sys.stderr)
        return source
    text = Path(requirements).read_text()
    ((url, commit),) = re.findall(r"^detectron2 @ git\+(\S+?)\.git@(\w+)$", text, re.M)
    with tempfile.TemporaryDirectory() as temporary:
        tree = Path(temporary)
        if source:
            what = _get_source(source, tree)
        else:
            try:
                what = _get_pinned(url, commit, tree)
            except SourceError:
                what = f"{_get_release(tree)}, as {url} cannot be reached"
        print(f"Detectron2 is {what}; not compiled.", file=sys.stderr)
        return os.path.join(directory, _build(tree, os.path.abspath(directory)))


def _get_source(source: str, tree: Path) -> str:
    if source == "v0.6":
        return _get_release(tree)
    if source.startswith("git+"):
        url = urllib.parse.urlsplit(source.removeprefix("git+"))
        path, _, revision = url.path.partition("@")
        _clone(url._replace(path=path).geturl(), revision, tree)
    elif os.path.isfile(source):
        _unpack(source, tree)
    elif os.path.isdir(source):
        _copy(Path(source), tree)
    else:
        raise SourceError(
            f"DETECTRON2={source} does not exist. It is a checkout, an archive (.tar.gz, .zip), a "
            "wheel (.whl), git+URL, git+URL@REVISION or v0.6."
        )
    return source


def _get_pinned(url: str, commit: str, tree: Path) -> str:
    # In a process, as looking up a name has no timeout.
    ask = "import sys, urllib.request; urllib.request.urlopen(sys.argv[1])"
    try:
        _run(sys.executable, "-c", ask, url, timeout=_TIMEOUT)
        _download(f"{url}/archive/{commit}.tar.gz", tree)
        (tree / "commit").write_text(commit)
    except SourceError:
        _clone(f"{url}.git", commit, tree, _TIMEOUT)
    return f"commit {commit[:7]} of {url}"


def _get_release(tree: Path) -> str:
    # uv knows the index, and what it asks for.
    uv = shutil.which("uv", path=os.path.dirname(sys.executable)) or "uv"
    command = [uv, "pip", "compile", "-q", "--no-deps", "--format", "pylock.toml", "-"]
    done = subprocess.run(command, input=_RELEASE, capture_output=True, text=True)
    urls = re.findall(r'sdist = \{ url = "([^"]+)"', done.stdout)
    if not urls:
        raise SourceError(
            f"the package index does not have {_RELEASE}, or cannot be reached. Set DETECTRON2 to "
            "another source (a checkout, an archive, a wheel, git+https://MIRROR/detectron2.git). "
            f"{_first_line(done.stderr)}"
        )
    _download(urls[0], tree, _RELEASE_SHA256)
    return "the release v0.6 of the package index"


def _first_line(reason: object) -> str:
    return str(reason).strip().partition("\n")[0]


def _run(*command: str, timeout: float | None = None) -> str:
    run: dict[str, Any] = {"check": True, "capture_output": True, "text": True}
    run["env"] = {**os.environ, "GIT_TERMINAL_PROMPT": "0"}
    try:
        return subprocess.run(command, timeout=timeout, **run).stdout
    except (OSError, subprocess.SubprocessError) as e:
        raise SourceError(_first_line(getattr(e, "stderr", None) or e)) from e


def _download(url: str, tree: Path, sha256: str = "") -> None:
    try:
        with urllib.request.urlopen(url, timeout=60) as response:
            data = response.read()
    except (OSError, HTTPException) as e:
        raise SourceError(f"{url} cannot be downloaded: {e}.") from e
    if sha256 and hashlib.sha256(data).hexdigest() != sha256:
        raise SourceError(f"{url} has another SHA-256 than {sha256}.")
    (tree / "archive.tar.gz").write_bytes(data)
    _unpack(str(tree / "archive.tar.gz"), tree)


def _unpack(archive: str, tree: Path) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        try:
            shutil.unpack_archive(archive, temporary)
        except Exception as e:  # a damaged file can fail in any way
            reason = _first_line(e)
            raise SourceError(f"{archive} is not an archive of Detectron2: {reason}.") from e
        roots = [Path(temporary), *Path(temporary).iterdir()]
        root = next((d for d in roots if (d / "detectron2" / "__init__.py").is_file()), None)
        if root is None:
            raise SourceError(f"{archive} is not an archive of Detectron2: it has no detectron2/.")
        _copy(root, tree)


def _clone(url: str, revision: str, tree: Path, timeout: float | None = None) -> None:
    with tempfile.TemporaryDirectory() as clone:
        try:
            _run("git", "ls-remote", url, "HEAD", timeout=timeout)
            _run("git", "clone", "-q", url, clone)
            _run("git", "-C", clone, "checkout", "-q", revision or "HEAD")
        except SourceError as e:
            raise SourceError(f"{url} cannot be cloned: {e}") from e
        _copy(Path(clone), tree)


def _copy(source: Path, tree: Path) -> None:
    if not (source / "detectron2" / "__init__.py").is_file():
        raise SourceError(f"{source} is not a checkout of Detectron2.")
    compiled = shutil.ignore_patterns("csrc", "_C*.so", "__pycache__")
    # A build links to the configs from the package; the release has them there alone.
    linked = (source / "detectron2" / "model_zoo" / "configs").is_symlink()
    shutil.copytree(source / "detectron2", tree / "detectron2", ignore=compiled)
    shutil.copy(source / "setup.py", tree)
    if (source / "configs").is_dir():
        configs = tree / "detectron2" / "model_zoo" / "configs"
        shutil.copytree(source / "configs", configs, dirs_exist_ok=linked)
    if (source / ".git").exists():
        with contextlib.suppress(SourceError):
            (tree / "commit").write_text(_run("git", "-C", str(source), "rev-parse", "HEAD"))


def _build(tree: Path, directory: str) -> str:
    # Later versions do without the compiled operators, and have the same version number.
    layer = tree / "detectron2" / "layers" / "deform_conv.py"
    if layer.is_file() and re.search(r"^from detectron2 import _C", layer.read_text(), re.M):
        for pattern, before, after in _RELEASE_EDITS:
            for path in tree.glob(pattern):
                path.write_text(re.sub(before, after, path.read_text()))
        (tree / "detectron2" / "_C.py").write_text(_RELEASE_C)
    text = (tree / "detectron2" / "__init__.py").read_text()
    (version,) = re.findall(r'^__version__ = "(.*)"', text, re.M)
    if (tree / "commit").is_file():  # Detectron2 has not changed its version since v0.6
        version += f"+{(tree / 'commit').read_text()[:7]}"
    setup = ast.parse((tree / "setup.py").read_text())
    keywords = (k for node in ast.walk(setup) for k in getattr(node, "keywords", ()))
    dependencies = next(ast.literal_eval(k.value) for k in keywords if k.arg == "install_requires")
    # v0.6 pins what formats its sources, and lists what only caffe2 needed.
    dependencies = [d.partition("==21")[0] for d in dependencies if d not in ("future", "pydot")]
    pyproject = _PYPROJECT.format(version=version, dependencies=dependencies)
    (tree / "pyproject.toml").write_text(pyproject)
    (tree / "setup.py").unlink()
    code = "import sys, setuptools.build_meta as b; print(b.build_wheel(sys.argv[1]))"
    command = [sys.executable, "-c", code, directory]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True)
    if done.returncode:
        raise SourceError(f"its wheel could not be built:\n{done.stderr}")
    return done.stdout.split()[-1]


if __name__ == "__main__":
    try:
        print(build_wheel(*sys.argv[1:]))
    except SourceError as e:
        sys.exit(f"Detectron2 cannot be installed: {e}")
