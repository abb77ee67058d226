"""The wheel, and what installs it."""

import subprocess
from pathlib import Path

import pytest
from cache import ROOT


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    # The wheel is built from the source distribution.
    subprocess.run(["uv", "build", "--quiet", "--out-dir", folder, ROOT], check=True)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="session")
def application(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the developers of an application install."""
    folder = tmp_path_factory.mktemp("application") / "venv"
    packages = [f"{wheel}[cli,fastapi,testing]", "httpx", "uvicorn"]
    subprocess.run(["uv", "venv", "--quiet", "--python", "3.13", folder], check=True)
    subprocess.run(
        ["uv", "pip", "install", "--quiet", "--python", folder / "bin" / "python", *packages],
        check=True,
    )
    return folder / "bin"
