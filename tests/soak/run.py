"""Send prompts to a server, one after the other, and record what happens to them and to the server."""
from __future__ import annotations

import hashlib
import json
import re
import shutil
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import psutil
from safetensors.torch import load_file

from ..nodes.host import checkpoints, comfy_server
from . import mishaps, recipes
from .recipes import Recipe

HOST = comfy_server.REPOSITORY / "tests/nodes/host"
PACKS = HOST / "random_conditioning", HOST / "small_models", Path(__file__).parent / "pack"
PARAMS = "models/sparge_params"
FATES = {"runs": 70, "is interrupted": 13, "fails": 13, "runs after freeing": 4}
# ComfyUI keeps this many results of nodes, so that models stay patched from prompt to prompt and their number is
# bounded; its default keeps what the machine's memory holds.
OPTIONS = "--cpu", "--disable-dynamic-vram", "--cache-lru", "30"
ERROR = re.compile(r"Traceback|\[ERROR\]")


@dataclass(frozen=True)
class Outcome:
    """The outcome of a prompt. status: done, interrupted, failed or refused. message: why. pictures: their digest."""

    status: str
    message: str = ""
    pictures: str = ""


@dataclass(frozen=True)
class Sample:
    """Of a process. memory: resident, in bytes. files: open file descriptors, sockets among them."""

    memory: int
    threads: int
    files: int

    @classmethod
    def of(cls, process: psutil.Process) -> Sample:
        files = process.num_handles() if psutil.WINDOWS else process.num_fds()
        return cls(process.memory_info().rss, process.num_threads(), files)


def prepare(base: Path) -> None:
    """Checkpoints and packs for a server on `base`; ComfyUI has to be configured."""
    comfy_server.prepare(base)
    for pack in PACKS:
        (base / "custom_nodes" / pack.name).symlink_to(pack, target_is_directory=True)
    folder = base / "models/diffusion_models"
    folder.mkdir(parents=True)
    for family in recipes.FAMILIES:
        checkpoints.write(checkpoints.FAMILIES[family], folder / f"tiny_{family}.safetensors")


@dataclass
class Soak:
    """A run of prompts. `problems` says what went wrong, `samples` has one entry a prompt.

    deadline: of `time.monotonic`. warm: prompts before the first census. sparse_calls: as the pack counts them.
    """

    server: comfy_server.Server
    random: Random
    deadline: float
    problems: list[str] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    outcomes: Counter = field(default_factory=Counter)
    warm: int = 0
    sparse_calls: int = 0
    first_census: dict[str, int] = field(default_factory=dict)
    last_census: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._process = psutil.Process(self.server.process.pid)
        self._pictures: dict[str, str] = {}
        self._seconds: dict[str, float] = {}
        self._log_end = 0

    def run(self, prompts: int, number: int) -> None:
        """Send about `prompts` prompts of `number` recipes; all recipes run at the start and at the end."""
        drawn = recipes.draw(self.random, number)
        for recipe in drawn:
            self.expect_picture(recipe)
        self.damage_params()
        self.first_census, self.warm = self.census(), len(self.samples)
        weights = [recipe.weight for recipe in drawn]
        while len(self.samples) < prompts - number:
            if time.monotonic() > self.deadline:
                self.problems.append(f"out of time after {len(self.samples)} of {prompts} prompts")
                break
            self.one(*self.random.choices(drawn, weights), *self.random.choices(list(FATES), list(FATES.values())))
        for recipe in drawn:
            self.expect_picture(recipe)
        self.last_census = self.census()

    def damage_params(self) -> None:
        folder = self.server.base / PARAMS
        data = (folder / recipes.TUNED_FILE).read_bytes()
        (folder / mishaps.DAMAGED).write_bytes(data[:len(data) // 2])

    def one(self, recipe: Recipe, fate: str) -> None:
        """Do to a recipe what `fate` says, then run it normally and check its picture."""
        if fate == "runs after freeing":
            self.server.request("/free", {"unload_models": True, "free_memory": True})
        elif fate == "is interrupted":
            after = self.random.uniform(0, self._seconds[recipe.name])
            outcome = self.send(recipe.graph(self.random.getrandbits(30)), interrupt_after=after)
            if outcome.status == "done":  # it finished before the interruption
                self.check_picture(recipe, outcome)
            elif outcome.status != "interrupted":
                self.problem(recipe, f"was to be interrupted, {outcome.status}: {outcome.message}")
        elif fate == "fails":
            graph, pattern, mishap = mishaps.failing(recipe, self.random.getrandbits(30), self.random)
            outcome = self.send(graph, failing=True)
            if outcome.status not in ("failed", "refused") or not re.search(pattern, outcome.message):
                self.problem(recipe, f"{mishap}: {outcome.status}: {outcome.message}")
        self.expect_picture(recipe)

    def expect_picture(self, recipe: Recipe) -> None:
        """Run `recipe` and check that its picture equals that of its first run."""
        start = time.monotonic()
        outcome = self.send(recipe.graph(self.random.getrandbits(30)))
        self._seconds[recipe.name] = time.monotonic() - start
        if outcome.status != "done":
            self.problem(recipe, f"{outcome.status}: {outcome.message}")
        else:
            self.check_picture(recipe, outcome)

    def check_picture(self, recipe: Recipe, outcome: Outcome) -> None:
        if outcome.pictures != self._pictures.setdefault(recipe.name, outcome.pictures):
            self.problem(recipe, "gave another picture than at first")

    def send(self, graph: dict, interrupt_after: float | None = None, failing: bool = False) -> Outcome:
        """Queue a prompt, perhaps interrupt it after some seconds, and wait for its end."""
        status, body = self.server.request("/prompt", {"prompt": graph})
        answer = json.loads(body)
        if status == 200 and interrupt_after is not None:
            time.sleep(interrupt_after)
            self.server.request("/interrupt", {"prompt_id": answer["prompt_id"]})
        outcome = self.result(answer["prompt_id"]) if status == 200 else Outcome("refused", body)
        if outcome.status == "done" and answer["node_errors"]:  # ComfyUI has run the nodes that do not depend on it
            outcome = Outcome("refused", json.dumps(answer["node_errors"]))
        self.outcomes[outcome.status] += 1
        self.read_log(failing)
        self.samples.append(Sample.of(self._process))
        return outcome

    def result(self, prompt_id: str) -> Outcome:
        entry = self.server.finished(prompt_id)
        # Neither ComfyUI's history nor its folders may count as growth.
        self.server.request("/history", {"delete": [prompt_id]})
        pictures = hashlib.sha256()
        for _, output in sorted(entry["outputs"].items()):
            for latent in output.get("latents", ()):
                path = self.server.base / "output" / latent["subfolder"] / latent["filename"]
                pictures.update(load_file(path)["latent_tensor"].numpy().tobytes())
        for folder in ("output", "temp"):
            shutil.rmtree(self.server.base / folder, ignore_errors=True)
        messages = dict(entry["status"]["messages"])
        if "execution_error" in messages:
            return Outcome("failed", messages["execution_error"]["exception_message"])
        if "execution_interrupted" in messages:
            return Outcome("interrupted")
        return Outcome("done", pictures=pictures.hexdigest())

    def read_log(self, failing: bool) -> None:
        """Check that only a prompt that was made to fail leaves an error in the server's log."""
        with open(self.server.log_path, "rb") as log:
            log.seek(self._log_end)
            new = log.read().decode(errors="replace")
            self._log_end = log.tell()
        self.sparse_calls += sum(map(int, re.findall(r"SpargeAttn: (\d+) attention calls sparse", new)))
        if not failing and ERROR.search(new):
            self.problems.append(f"prompt {len(self.samples)}: in the log: {new[-3000:]}")

    def problem(self, recipe: Recipe, text: str) -> None:
        self.problems.append(f"prompt {len(self.samples)}: {recipe}: {text}")

    def census(self) -> dict[str, int]:
        """The objects that the server's process holds after it has dropped its cache and its models."""
        self.server.request("/free", {"unload_models": True, "free_memory": True})
        time.sleep(1)  # the server's worker frees them in its own time
        entry, _ = self.server.run({"census": recipes.node("Census")})
        return json.loads(entry["outputs"]["census"]["census"][0])
