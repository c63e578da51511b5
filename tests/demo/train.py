"""Train the demo's model: ``python -m tests.demo.train OUT --minutes 8`` (one H100 or better).

Flow matching as Wan does it: x_s = (1 - s) x0 + s noise, the model sees s * 1000 and predicts noise - x0.
Learning rate, mix of clip sizes and end of the run follow the clock. Master weights are fp32; on a GPU the
forward and backward passes run in bf16.
"""

import argparse
import csv
import math
import time
from pathlib import Path

import torch
from torch.func import functional_call

from comfyui_spargeattn.nodes.demo.words import encode, prompt

from .clips import clips, random_prompts
from .model import WanConfig, WanT2V, load, save
from .muon import Muon
from .sampling import sample, sheet, shifted

# Grids in tokens; latents are twice as high and wide. Shares of the steps for the three thirds of a run.
GRIDS = {
    (5, 16, 16): (0.40, 0.15, 0.10),
    (9, 16, 20): (0.20, 0.15, 0.12),
    (9, 16, 26): (0.15, 0.15, 0.13),
    (13, 20, 32): (0.15, 0.20, 0.20),
    (21, 30, 52): (0.10, 0.35, 0.45),
}
DROPPED = 0.1  # share of clips trained without their prompt, for classifier-free guidance


def learning_rate(progress: float) -> float:
    """Factor at a share 0..1 of the run: short warm-up, then a cosine to nearly nothing."""
    return min(1.0, progress / 0.02) * (0.01 + 0.99 * (0.5 + 0.5 * math.cos(math.pi * min(progress, 1.0))))


def noise_levels(count: int, tokens: int, device) -> torch.Tensor:
    """Logit-normal levels, shifted towards noise; one in ten is uniform, so that no level is left out.

    The more tokens a clip has, the more noise is needed to hide its layout. So the shift grows with the square root of
    their number; without that, the model never learns a consistent layout of large clips.
    """
    shift = 4.0 * math.sqrt(tokens / 1280)
    normal = shifted(torch.randn(count, device=device).sigmoid(), shift)
    uniform = torch.rand(count, device=device)
    return torch.where(torch.rand(count, device=device) < 0.1, uniform, normal)


def flow_loss(predict, grid: tuple[int, int, int], batch: int, device, dtype) -> torch.Tensor:
    """Mean squared velocity error on freshly drawn clips; ``predict(x, t, context)`` is the model."""
    frames, height, width = grid
    prompts = random_prompts(batch, device)
    x0 = clips(prompts, (frames, 2 * height, 2 * width))
    context = encode(prompts) * (torch.rand(batch, 1, 1, device=device) >= DROPPED)
    level = noise_levels(batch, math.prod(grid), device)
    s = level.view(-1, 1, 1, 1, 1)
    noise = torch.randn_like(x0)
    velocity = predict(x0.lerp(noise, s).to(dtype), level * 1000, context.to(dtype))
    return torch.nn.functional.mse_loss(velocity.float(), noise - x0)


class Trainer:
    """Model, optimisers and moving average. On a GPU each grid's step is one CUDA graph, unless ``eager``."""

    def __init__(self, model: WanT2V, device: str, lr: float, tokens: int, eager: bool):
        self.device, self.dtype = device, torch.bfloat16 if device == "cuda" else torch.float32
        self.eager, self.tokens, self.steps, self.graphs = eager or device == "cpu", tokens, 0, {}
        self.model = model.to(device).train().requires_grad_(True)
        self.params = list(model.parameters())
        self.average = [p.detach().clone() for p in self.params]
        named = model.named_parameters()
        matrices = [p for n, p in named if n.startswith("blocks.") and n.endswith("weight") and p.ndim == 2]
        chosen = set(map(id, matrices))
        rest = [p for p in self.params if id(p) not in chosen]
        # Rates that change between replays of a graph must be tensors.
        self.peaks = (lr, 0.3 * lr)
        self.lr = [torch.zeros((), device=device) for _ in self.peaks]
        self.refresh = torch.zeros((), device=device)
        self.optimisers = [
            Muon(matrices, lr=self.lr[0]),
            torch.optim.AdamW(rest, lr=self.lr[1], betas=(0.9, 0.98), weight_decay=0.0, fused=True,
                              capturable=device == "cuda"),
        ]

    def predict(self, *inputs):
        if self.dtype == torch.float32:
            return self.model(*inputs)
        return functional_call(self.model, {n: p.to(self.dtype) for n, p in self.model.named_parameters()}, inputs)

    def update(self, grid: tuple[int, int, int]) -> torch.Tensor:
        """One optimisation step at the present rates -> loss. No host synchronisation: it can be recorded."""
        batch = max(1, self.tokens // math.prod(grid))
        loss = flow_loss(self.predict, grid, batch, self.device, self.dtype)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.params, 1.0)
        for optimiser in self.optimisers:
            optimiser.step()
            optimiser.zero_grad()
        with torch.no_grad():
            change = torch._foreach_sub(self.params, self.average)
            torch._foreach_mul_(change, self.refresh)
            torch._foreach_add_(self.average, change)
        return loss.detach()

    def step(self, grid: tuple[int, int, int], rate: float) -> torch.Tensor:
        for lr, peak in zip(self.lr, self.peaks):
            lr.fill_(peak * rate)
        self.refresh.fill_(max(0.001, 1 / (1 + self.steps / 10)))
        self.steps += 1
        if grid not in self.graphs:
            return self.update(grid)
        graph, loss = self.graphs[grid]
        graph.replay()
        return loss.clone()

    def warm_up(self, grids: list, steps: int = 3) -> None:
        """Take a few steps at learning rate 0 on every grid, to fail early if at all; then record the graphs."""
        stream = None
        if self.device == "cuda":
            stream = torch.cuda.Stream()  # recording wants its warm-up off the default stream
            stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for grid in grids:
                loss = [self.step(grid, 0.0).item() for _ in range(steps)][-1]
                if not math.isfinite(loss):
                    raise FloatingPointError(f"loss must be finite, got {loss} on grid {grid}")
                print(f"grid {grid}: loss {loss:.3f}", flush=True)
        if self.device == "cuda":
            torch.cuda.synchronize()
        if not self.eager:
            for grid in grids:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    loss = self.update(grid)
                self.graphs[grid] = graph, loss
                start = time.perf_counter()
                losses = [self.step(grid, 0.0).item() for _ in range(10)]
                cost = 100 * (time.perf_counter() - start)
                print(f"grid {grid}: recorded, loss {sum(losses) / 10:.3f}, {cost:.1f} ms a step", flush=True)
        self.steps = 0

    def averaged_state(self) -> dict[str, torch.Tensor]:
        return dict(zip((n for n, _ in self.model.named_parameters()), self.average))


def train(trainer: Trainer, minutes: float, log: Path, grids: list) -> None:
    """Train until the time is up, and write the mean loss of each grid every few seconds."""
    choose = torch.Generator().manual_seed(0)
    start, reported, losses = time.perf_counter(), 0.0, {}
    with log.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["minutes", "step", "grid", "loss", "learning_rate_factor"])
        while (elapsed := time.perf_counter() - start) < minutes * 60:
            progress = elapsed / (minutes * 60)
            shares = torch.tensor([GRIDS[g][min(2, int(progress * 3))] for g in grids]) + 1e-6
            grid = grids[torch.multinomial(shares, 1, generator=choose).item()]
            losses.setdefault(grid, []).append(trainer.step(grid, learning_rate(progress)))
            if trainer.steps % 10 == 0 and trainer.device == "cuda":
                torch.cuda.synchronize()  # the clock must not run ahead of the GPU
            if elapsed - reported > 10:
                reported = elapsed
                for g in sorted(losses):
                    mean = torch.stack(losses[g]).mean().item()
                    row = [f"{elapsed / 60:.2f}", trainer.steps, "x".join(map(str, g)), f"{mean:.4f}",
                           f"{learning_rate(progress):.3f}"]
                    table.writerow(row)
                    print(*row, flush=True)
                    if progress > 0.1 and not mean < 1.0 and trainer.device == "cuda":
                        raise FloatingPointError(f"loss must be below 1 by now, got {mean} on grid {g}")
                file.flush()
                losses = {}


SHEET_PROMPTS = [
    prompt("star red plain right", "blue plain left"),
    prompt("circle yellow checker left", "purple stripes right"),
    prompt("triangle cyan stripes spin", "orange plain up"),
    prompt("ring green plain orbit", "white dots down", "square white plain up"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for the weights, the log and the sample sheets")
    parser.add_argument("--minutes", type=float, default=8.0, help="wall clock of the training itself")
    parser.add_argument("--tokens", type=int, default=49152, help="tokens in a step (batch size times clip)")
    parser.add_argument("--lr", type=float, default=5e-3, help="of Muon; AdamW gets 0.3 of it")
    parser.add_argument("--resume", type=Path, help="start from these weights instead of new ones")
    parser.add_argument("--small", action="store_true", help="the smallest grid only, to try the script on a CPU")
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs: slower, easier to debug")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = True

    grids = list(GRIDS)[:1] if args.small else list(GRIDS)
    model = load(args.resume) if args.resume else WanT2V(WanConfig()).initialise()
    trainer = Trainer(model, device, args.lr, args.tokens, args.eager)
    trainer.warm_up(grids)
    train(trainer, args.minutes, args.out / "log.csv", grids)

    weights = args.out / "wan_shapes.safetensors"
    save(weights, trainer.averaged_state(), trainer.model.config)
    print(f"{trainer.steps} steps, {weights.stat().st_size / 2**20:.2f} MiB", flush=True)
    model = load(weights, device, trainer.dtype)
    prompts = torch.stack(SHEET_PROMPTS).to(device)
    for grid in grids:
        frames, height, width = grid
        latent = (frames, 2 * height, 2 * width)
        clips_made = torch.cat([sample(model, p[None], latent, seed=i) for i, p in enumerate(prompts)])
        sheet(clips_made, scale=2 if height > 20 else 3).save(args.out / f"sheet_{frames}x{height}x{width}.png")


if __name__ == "__main__":
    main()
