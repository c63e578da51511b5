"""ComfyUI's server with the pack, driven over HTTP on the loopback interface."""
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[3]
START_TIMEOUT = 180  # seconds, for imports on a slow disk
RUN_TIMEOUT = 180
POLL = 0.05  # seconds between two looks at the history


def host_python():
    """ComfyUI's virtual environment where its folder has one, else this interpreter."""
    root = Path(os.environ["COMFYUI_PATH"])
    candidates = root / ".venv/bin/python", root / ".venv/Scripts/python.exe"
    return str(next(filter(Path.exists, candidates), sys.executable))


def prepare(base, pack=REPOSITORY, models=()):
    """ComfyUI's folders under `base`, with `pack`, the picture that examples load, and empty files for models.

    models: (folder, file name) each.
    """
    for name in ("custom_nodes", "input", "output", "temp", "user"):
        (base / name).mkdir(parents=True, exist_ok=True)
    (base / "custom_nodes" / "spargeattn-nodes").symlink_to(pack, target_is_directory=True)
    shutil.copy(Path(os.environ["COMFYUI_PATH"], "input/example.png"), base / "input")
    for folder, name in models:
        path = base / "models" / folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def needed_models():
    """(folder, file name) of the models that the example workflows name."""
    nodes = [node for path in sorted((REPOSITORY / "workflows").glob("*.json"))
             for node in json.loads(path.read_text(encoding="utf-8"))["nodes"]]
    return sorted({(model["directory"], model["name"]) for node in nodes
                   for model in node.get("properties", {}).get("models", ())})


class Server:
    """A running `main.py` on `base`; `url` ends without a slash, `log()` is what it has printed so far."""

    def __init__(self, process, base, url, log_path):
        self.process, self.base, self.url, self.log_path = process, base, url, log_path

    def log(self):
        return self.log_path.read_text(errors="replace")

    def request(self, path, data=None):
        """Status and body, as text, of a GET, or of a POST where there is `data`."""
        request = urllib.request.Request(self.url + path, data and json.dumps(data).encode(),
                                         {"Content-Type": "application/json"} if data else {})
        try:
            with urllib.request.urlopen(request, timeout=10) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def get(self, path, data=None):
        status, body = self.request(path, data)
        if status != 200:
            raise AssertionError(f"{path}: {status} {body}")
        return json.loads(body)

    def wait_until_up(self):
        deadline = time.monotonic() + START_TIMEOUT
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                return self.get("/system_stats")
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.5)
        raise AssertionError(f"the server did not start:\n{self.log()[-4000:]}")

    def finished(self, prompt_id, timeout=RUN_TIMEOUT):
        """The history's entry of a queued prompt, once it is there."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline and self.process.poll() is None:
            history = self.get(f"/history/{prompt_id}")
            if prompt_id in history:
                return history[prompt_id]
            time.sleep(POLL)
        raise AssertionError(f"the prompt did not finish:\n{self.log()[-4000:]}")

    def run(self, prompt, timeout=RUN_TIMEOUT):
        """Queue `prompt` (API format) and wait for its entry in the history; returns it and the node errors."""
        queued = self.get("/prompt", {"prompt": prompt})
        return self.finished(queued["prompt_id"], timeout), queued["node_errors"]


@contextmanager
def running(base, *options):
    """A Server on `base` with further command-line options."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [host_python(), os.path.join(os.environ["COMFYUI_PATH"], "main.py"), "--listen", "127.0.0.1", "--port",
               str(port), "--base-directory", str(base), "--database-url", "sqlite:///:memory:",
               "--disable-auto-launch", "--disable-api-nodes", *options]
    log_path = base / "server.log"
    with open(log_path, "wb") as log:
        process = subprocess.Popen(command, cwd=base, stdout=log, stderr=subprocess.STDOUT)
    try:
        server = Server(process, base, f"http://127.0.0.1:{port}", log_path)
        server.wait_until_up()
        yield server
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
