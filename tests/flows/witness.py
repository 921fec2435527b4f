"""Secrets that are planted around a run, and a witness who looks for them wherever a run leaves or shows anything."""

import base64
import secrets
import tempfile
import threading
from contextlib import suppress
from pathlib import Path
from typing import Self

import psutil
import pyarrow.parquet as pq

# Of these tests alone: another checkout on this machine has other ones.
OWN = secrets.token_hex(6)
PLANTED = {
    "AWS_SECRET_ACCESS_KEY": f"planted/aws+secret000000000000{OWN}",
    "AWS_SESSION_TOKEN": f"planted-session-token-1111111111{OWN}",
    "HF_TOKEN": f"hf_planted222222222222222222{OWN}",
    "OPENAI_API_KEY": f"sk-planted-3333333333{OWN}",
    "PREFECT_API_AUTH_STRING": f"admin:planted-password-4444444444{OWN}",
}
RAY = "RAY_AUTH_TOKEN"
LOOK_SECONDS = 2.0
# Logs and settings are smaller, weights and engines' caches are not read.
MOST_BYTES = 16 << 20


class Witness:
    """Watches the process list and temporary files, Ray's logs among them, while a run goes on: both are gone
    afterwards. ``used``: further secrets that the run is given."""

    def __init__(self, root: Path | str, *used: str) -> None:
        self.root = root
        self.secrets = {*PLANTED.values(), *used}
        self.secrets |= {base64.b64encode(secret.encode()).decode() for secret in self.secrets}
        self.commands: set[str] = set()
        self.logs: dict[Path, bytes] = {}
        self._before = temporary()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(LOOK_SECONDS):
            for process in psutil.process_iter():
                with suppress(psutil.Error):
                    command = " ".join(process.cmdline())
                    self.commands.add(command)
                    if str(self.root) in command and (token := process.environ().get(RAY)):
                        # Made by the run, so known from its processes only.
                        self.secrets.add(token)
            for place in temporary() - self._before:
                with suppress(OSError):
                    for file in [place, *place.rglob("*")]:
                        self._keep(file)

    def _keep(self, file: Path) -> None:
        with suppress(OSError):
            if file.is_file() and not file.is_symlink() and file.stat().st_size < MOST_BYTES:
                self.logs[file] = file.read_bytes()

    def leaks(self, *folders: Path, said: str) -> list[str]:
        """Where a secret is to be seen. What is packed is unpacked."""
        texts = {"what it said": said, "the process list": "\n".join(self.commands)}
        texts |= {str(file): data.decode(errors="replace") for file, data in self.logs.items()}
        for folder in folders:
            for file in folder.rglob("*"):
                if file.is_file():
                    texts[str(file)] = unpacked(file)
        return [place for place, text in texts.items() for secret in self.secrets if secret in text]


def temporary() -> set[Path]:
    """What lies in the folders for temporary files: Ray's, vLLM's, Prefect's, and those of everybody else."""
    return {entry for folder in {"/tmp", tempfile.gettempdir()} for entry in Path(folder).iterdir()}


def unpacked(file: Path) -> str:
    if file.suffix == ".parquet" and file.stat().st_size:
        return str(pq.read_metadata(file).metadata) + str(pq.read_table(file).to_pylist())
    return file.read_bytes().decode(errors="replace")
