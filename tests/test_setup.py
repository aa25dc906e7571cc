"""The set-up says exactly what is wrong, and leaves an installed Detectron2 alone."""

import os
import shutil
import subprocess
import sysconfig
import venv
from pathlib import Path

import pytest
from conftest import ROOT


@pytest.fixture
def setup_env(tmp_path):
    (tmp_path / "tools").mkdir()
    for name in ("tools/setup_env.sh", "requirements.txt", "setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "gnws_d2").symlink_to(ROOT / "gnws_d2")

    def run(**environ):
        return subprocess.run(
            ["bash", "tools/setup_env.sh"],
            cwd=tmp_path,
            env={**os.environ, **environ},
            capture_output=True,
            text=True,
        )

    return run


@pytest.fixture
def bare_python(tmp_path):
    """A Python that has no Detectron2."""
    venv.create(tmp_path / "bare", with_pip=False)
    return str(tmp_path / "bare" / "bin" / "python")


@pytest.mark.parametrize(
    "source, message",
    [
        ("git+file:///no/such/detectron2.git", "cannot be fetched from file:///no/such/detectron2"),
        ("git+file:///no/such/detectron2.git@02b5c4e", "from file:///no/such/detectron2.git: set"),
        ("/no/such/checkout", "DETECTRON2=/no/such/checkout does not exist"),
    ],
)
def test_source_out_of_reach_is_named(setup_env, bare_python, source, message):
    run = setup_env(PYTHON=bare_python, DETECTRON2=source)
    assert run.returncode == 2
    assert message in run.stderr and run.stdout == ""


def test_missing_compiler_is_named(setup_env, bare_python, tmp_path):
    run = setup_env(PYTHON=bare_python, DETECTRON2=str(tmp_path), CXX="no-such-compiler")
    assert run.returncode == 2 and "no C++ compiler" in run.stderr


def test_unsuitable_python_is_named(setup_env):
    run = setup_env(PYTHON="no-such-python")
    assert run.returncode == 2 and "'no-such-python' is not Python 3.10 or later" in run.stderr


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
    assert not (tmp_path / ".venv").exists()
    assert not list(Path(site_packages).glob("detectron2*"))
    assert list(Path(site_packages).glob("*gnws_d2*"))
