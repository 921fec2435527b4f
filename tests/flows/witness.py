"""Secrets that are planted around a run, and a witness who looks for them wherever a run leaves or shows anything."""

import base64
import threading
from contextlib import suppress
from pathlib import Path
from typing import Self

import psutil
import pyarrow.parquet as pq

PLANTED = {
    "AWS_SECRET_ACCESS_KEY": "planted/aws+secret0000000000000000000000",
    "AWS_SESSION_TOKEN": "planted-session-token-1111111111",
    "HF_TOKEN": "hf_planted22222222222222222222222222",
    "OPENAI_API_KEY": "sk-planted-3333333333333333333333",
    "PREFECT_API_AUTH_STRING": "admin:planted-password-4444444444",
}
RAY = "RAY_AUTH_TOKEN"
# Where Ray heads that runs start keep what they say.
RAY_FOLDERS = "switchyard-ray-*"
LOOK_SECONDS = 2.0


class Witness:
    """Watches the process list and Ray's logs while a run goes on: both are gone afterwards."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.secrets = set(PLANTED.values())
        self.secrets |= {base64.b64encode(secret.encode()).decode() for secret in self.secrets}
        self.commands: set[str] = set()
        self.logs: dict[Path, bytes] = {}
        self._before = set(Path("/tmp").glob(RAY_FOLDERS))
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
            for folder in set(Path("/tmp").glob(RAY_FOLDERS)) - self._before:
                for file in folder.rglob("*.*"):
                    with suppress(OSError):
                        if file.is_file() and not file.is_symlink():
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


def unpacked(file: Path) -> str:
    if file.suffix == ".parquet" and file.stat().st_size:
        return str(pq.read_metadata(file).metadata) + str(pq.read_table(file).to_pylist())
    return file.read_bytes().decode(errors="replace")
