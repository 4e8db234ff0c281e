"""The root is the package `longreach`: what is installed, under which names, and what `make` would do."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

import longreach

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
LAYERS = {"kernels", "parallel", "framework", "launch", "configs"}
NOT_INSTALLED = {"tests", "benchmarks", "docs", "build", "dist", "data", "runs"}
DATA_SUFFIXES = {".yaml", ".json", ".cpp", ".h", ".cu", ".sbatch", ".sh", ".example"}


@pytest.fixture(scope="module")
def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def installed_files() -> list[Path]:
    """Returns the files, relative to the root, that an installation has to hold."""
    files = []
    for folder, folders, names in os.walk(ROOT):
        relative = Path(folder).relative_to(ROOT)
        for name in list(folders):
            is_environment = (Path(folder) / name / "pyvenv.cfg").exists()
            if name.startswith((".", "__pycache__")) or name.endswith(".egg-info") or is_environment:
                folders.remove(name)
        if not relative.parts:
            folders[:] = [name for name in folders if name not in NOT_INSTALLED]
        suffixes = {".py"} | (DATA_SUFFIXES if LAYERS.intersection(relative.parts[:1]) else set())
        files += [relative / name for name in names if Path(name).suffix in suffixes]
    return files


def test_every_folder_with_python_is_a_listed_package(pyproject: dict[str, Any]) -> None:
    folders = {file.parent for file in installed_files() if file.suffix == ".py"}
    names = {".".join(["longreach", *folder.parts]) for folder in folders}
    assert names == set(pyproject["tool"]["setuptools"]["packages"])


def test_every_package_but_kernels_has_an_init_file(pyproject: dict[str, Any]) -> None:
    # Hugging Face's package is called `kernels` too. Where the root is on sys.path, a folder without
    # __init__.py gives way to it.
    for package in pyproject["tool"]["setuptools"]["packages"]:
        folder = ROOT.joinpath(*package.split(".")[1:])
        assert (folder / "__init__.py").exists() == (package != "longreach.kernels"), folder


def test_a_wheel_holds_the_package_and_nothing_else(tmp_path: Path) -> None:
    source = tmp_path / "a copy"
    copy_to(source)
    offline = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    command = [sys.executable, "-m", "pip", "wheel", *offline, "--wheel-dir", str(tmp_path), str(source)]
    subprocess.run(command, check=True)

    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name == f"longreach-{longreach.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if not name.endswith("/")]
    info = f"longreach-{longreach.__version__}.dist-info"
    assert {name.split("/")[0] for name in names} == {"longreach", info}
    assert {name for name in names if name.startswith("longreach/")} == {
        f"longreach/{file.as_posix()}" for file in installed_files()
    }
    assert f"{info}/licenses/LICENSE" in names
    check_it_runs(wheel, tmp_path)


def check_it_runs(wheel: Path, tmp_path: Path) -> None:
    """Unpacked where nothing else is: the program starts, finds its configs, and is not that of the checkout."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = "import longreach; from longreach.launch.cli import main; print(longreach.__file__); "
    code += "main(['completion', 'bash'])"
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(str(tmp_path / "site")) and "quickstart" in done.stdout


def test_an_sdist_holds_what_a_wheel_is_built_from(tmp_path: Path) -> None:
    source = tmp_path / "a copy"
    copy_to(source)
    command = [sys.executable, "-c", f"from setuptools import build_meta; build_meta.build_sdist({str(tmp_path)!r})"]
    subprocess.run(command, cwd=source, capture_output=True, check=True)
    with tarfile.open(tmp_path / f"longreach-{longreach.__version__}.tar.gz") as archive:
        names = {Path(*Path(name).parts[1:]) for name in archive.getnames()}
    assert names >= {*installed_files(), Path("pyproject.toml"), Path("LICENSE")}


def copy_to(source: Path) -> None:
    """What builds are made of, elsewhere: they leave folders where they run."""
    for file in [*installed_files(), Path("pyproject.toml"), Path("LICENSE")]:
        (source / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, source / file)


def test_every_requirement_is_pinned(pyproject: dict[str, Any]) -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"==[0-9.]+", str(pin.specifier)) for pin in pins)

    project = pyproject["project"]
    extras = project["optional-dependencies"]
    requirements = [*project["dependencies"], *(line for extra in extras.values() for line in extra)]
    named = {extra for line in extras["dev"] for extra in Requirement(line).extras}
    assert named == set(extras) - {"dev"}, "the development tools bring what every extra needs"
    for requirement in map(Requirement, requirements):
        if requirement.name in ("triton", project["name"]):  # torch's CUDA builds name the triton that they need
            continue
        for python in ("3.10", "3.11", "3.12", "3.13"):
            (version,) = [
                next(iter(pin.specifier)).version
                for pin in pins
                if pin.name == requirement.name
                and (pin.marker is None or pin.marker.evaluate({"python_version": python}))
            ]
            assert version in requirement.specifier, f"{requirement} on Python {python}"


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A clone in a directory with a space in its name, with a finished `.venv` whose Python is this one."""
    clone = tmp_path / "my clone"
    (clone / ".venv" / "bin").mkdir(parents=True)
    (clone / ".venv" / "bin" / "python").symlink_to(sys.executable)
    for file in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / file, clone / file)
    (clone / ".venv" / "made-in").write_text(f"{clone.resolve()}\n", encoding="utf-8")
    (clone / ".venv" / "installed-run").touch()
    (clone / ".venv" / "installed-dev").touch()
    return clone


def make(clone: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # `make test` hands its own settings down to what it runs; this call must not inherit them.
    environment = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MFLAGS")}
    return subprocess.run(["make", *arguments], cwd=clone, env=environment, capture_output=True, text=True)


def planned(clone: Path, target: str) -> str:
    done = make(clone, "--dry-run", target)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("target", ["quickstart", "dev", "test", "check"])
def test_a_second_make_installs_nothing(clone: Path, target: str) -> None:
    plan = planned(clone, target)
    assert "pip" not in plan and "-m venv" not in plan


@pytest.mark.parametrize("changed", ["pyproject.toml", "constraints.txt"])
def test_make_installs_again_when_the_requirements_changed(clone: Path, changed: str) -> None:
    later = (clone / ".venv" / "installed-dev").stat().st_mtime + 10
    os.utime(clone / changed, (later, later))
    plan = planned(clone, "test")
    assert '-e ".[dev]"' in plan and "-m venv" not in plan


def test_the_quickstart_needs_no_development_tools(clone: Path) -> None:
    (clone / ".venv" / "installed-dev").unlink()
    assert "pip" not in planned(clone, "quickstart")
    (clone / ".venv" / "installed-run").unlink()
    plan = planned(clone, "quickstart")
    assert "-e ." in plan and "[dev]" not in plan


def test_a_moved_clone_gets_a_new_environment(clone: Path) -> None:
    moved = clone.rename(clone.with_name("moved"))
    plan = planned(moved, "test")
    assert "-m venv" in plan and '-e ".[dev]"' in plan


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (None, "was not found"),
        ('case "$2" in *version_info*) exit 1; esac', "is older than 3.10"),
        ('case "$2" in *ensurepip*) exit 1; esac', "cannot make virtual environments"),
    ],
)
def test_an_unusable_python_is_named_in_one_line(clone: Path, body: str | None, message: str) -> None:
    shutil.rmtree(clone / ".venv")
    python = clone / "some python"
    if body is not None:
        python.write_text(f"#!/bin/sh\n{body}\n", encoding="utf-8")
        python.chmod(0o755)
    done = make(clone, "dev", f"PYTHON={python}")
    assert done.returncode != 0
    (line,) = [line for line in done.stderr.splitlines() if not line.startswith("make")]
    assert line.startswith(f"PYTHON={python}") and message in line
    assert not (clone / ".venv").exists()
