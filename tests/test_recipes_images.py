"""The image recipe: what is converted is right, a few steps on embedded and own images, wrong input."""

from __future__ import annotations

import gzip
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import embedded
import embedded_images
import image_classification
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModel, ViTConfig, ViTForImageClassification

RECIPES = Path(__file__).parent.parent / "recipes"

pytestmark = [
    pytest.mark.filterwarnings("ignore:schedule .* will not reach:UserWarning"),
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning"),  # Trainer's default
]
needs_fashion = pytest.mark.skipif(not shutil.which("apt-get"), reason="Fashion-MNIST comes by apt-get: there is none")
LEFT = ["model.safetensors", "preprocessor_config.json", "trainer_state.json", "all_results.json", "timeline.png",
        "README.md"]  # fmt: skip
SHORT = ["--max_steps", "4", "--logging_steps", "1", "--per_device_train_batch_size", "4", "--use_cpu",
         "--disable_tqdm", "true", "--eval_strategy", "no"]  # fmt: skip


@pytest.fixture
def tiny_vit(tmp_path):
    """A ViT of two blocks for images of 8 pixels, as a folder."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
    model = ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, num_labels=3, **sizes))
    model.save_pretrained(tmp_path / "vit")
    processor = {**embedded_images.PROCESSOR, "size": {"height": 8, "width": 8}}
    (tmp_path / "vit" / "preprocessor_config.json").write_text(json.dumps(processor))
    return str(tmp_path / "vit")


@pytest.fixture
def pictures(tmp_path):
    """Ten images of noise in a folder for each of two classes."""
    noise = np.random.default_rng(0)
    for name, channel in (("red", 0), ("blue", 2)):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for i in range(10):
            pixels = noise.integers(0, 100, (10, 12 + i, 3), dtype=np.uint8)
            pixels[..., channel] += 100
            Image.fromarray(pixels).save(tmp_path / "pictures" / name / f"{i}.png")
    return tmp_path / "pictures"


def test_the_converted_vit_computes_what_the_onnx_file_does():
    """Expected: onnxruntime 1.32 on the output of /backbone/layernorm, first and last token of the same image."""
    pixels = torch.sin(torch.arange(3 * 224 * 224, dtype=torch.float64) / 50).float().reshape(1, 3, 224, 224)
    model, loading = AutoModel.from_pretrained(embedded_images.vit(), output_loading_info=True)
    assert not any(loading.values())
    with torch.no_grad():
        hidden = model.eval()(pixels).last_hidden_state
    expected = torch.tensor([[0.74375, -0.35136, 1.37631, -4.11316], [1.44189, -0.17562, 0.41484, -4.34128]])
    torch.testing.assert_close(hidden[0, [0, -1], :4], expected, rtol=0, atol=1e-4)
    assert hidden.std().item() == pytest.approx(2.66438, abs=1e-4)


def test_an_idx_file_is_read_and_another_is_refused(tmp_path):
    values = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    header = bytes([0, 0, 8, 3, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0, 4])
    (tmp_path / "bytes.gz").write_bytes(gzip.compress(header + values.tobytes()))
    assert np.array_equal(embedded_images.read_idx(tmp_path / "bytes.gz"), values)
    (tmp_path / "floats.gz").write_bytes(gzip.compress(bytes([0, 0, 13]) + header[3:] + values.tobytes()))
    with pytest.raises(SystemExit, match=r"floats\.gz is no idx file of bytes: it starts with 00000d03"):
        embedded_images.read_idx(tmp_path / "floats.gz")


@needs_fashion
def test_the_embedded_images_are_the_same_every_time_and_of_all_classes():
    one, two = embedded_images.fashion(), embedded_images.fashion()
    assert {split: len(rows) for split, rows in one.items()} == {"train": 2000, "validation": 1000}
    assert min(np.bincount(one["train"]["label"], minlength=10)) > 150
    assert one["train"][7]["image"].tobytes() == two["train"][7]["image"].tobytes()


@needs_fashion
def test_four_steps_on_embedded_data(tmp_path):
    image_classification.main(
        ["--output_dir", str(tmp_path), "--max_train_samples", "16", "--max_eval_samples", "8", *SHORT]
    )
    assert all((tmp_path / name).stat().st_size for name in LEFT)
    results = json.loads((tmp_path / "all_results.json").read_text())
    assert {"eval_accuracy", "eval_f1", "train_loss"} <= set(results)
    assert set(json.loads((tmp_path / "config.json").read_text())["label2id"]) <= set(embedded_images.FASHION)
    assert json.loads((tmp_path / "preprocessor_config.json").read_text())["size"] == {"height": 56, "width": 56}


def own(pictures, model, out, *arguments):
    """Train on own images and return what is left, by name."""
    named = ["--dataset_name", str(pictures), "--model_name_or_path", model, "--output_dir", str(out)]
    image_classification.main([*arguments, *named, *SHORT, "--schedule", "head@0, block[-1]@2step"])
    return {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}


def test_own_folder_of_images_trains_and_augmentation_switches_the_cache_off(tmp_path, pictures, tiny_vit, capsys):
    plain = own(pictures, tiny_vit, tmp_path / "plain")
    assert json.loads(plain["config.json"])["id2label"] == {"0": "blue", "1": "red"}
    assert set(LEFT) <= set(plain)
    assert "cache is switched off" not in capsys.readouterr().out
    changed = own(pictures, tiny_vit, tmp_path / "changed", "--augment")
    assert "cache is switched off" in capsys.readouterr().out
    (tmp_path / "no_cache.json").write_text('{"cache": null}')
    uncached = own(pictures, tiny_vit, tmp_path / "uncached", str(tmp_path / "no_cache.json"))
    assert plain["model.safetensors"] == uncached["model.safetensors"] != changed["model.safetensors"]


def test_paths_in_a_csv_file_are_images_too(tmp_path, pictures, tiny_vit):
    rows = [f"{path},{path.parent.name}" for path in sorted(pictures.rglob("*.png"))]
    (tmp_path / "mine.csv").write_text("\n".join(["file,colour", *rows]))
    arguments = image_classification.ImageArguments(
        train_file=str(tmp_path / "mine.csv"), image_column="file", label_column="colour"
    )
    data = image_classification.load_images(arguments)
    for row in data["train"]:
        red, _, blue = row["image"].getpixel((0, 0))
        assert row["label"] == ("red" if red > blue else "blue")
    (pictures / "red" / "3.png").unlink()
    with pytest.raises(SystemExit, match=r"no file .*red/3\.png, which column 'file' names"):
        image_classification.load_images(arguments)


def test_an_augmented_image_is_a_part_of_the_image_and_follows_the_seed():
    values = np.arange(20 * 30, dtype=np.uint8).reshape(20, 30)
    images = []
    for seed in (0, 0, 1):
        random.seed(seed)
        images.append(image_classification.augmented(Image.fromarray(values)))
    assert images[0].size == (30, 20)
    assert images[0].tobytes() == images[1].tobytes() != images[2].tobytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset_name", "{}/nowhere"], "nowhere cannot be read"),
        (["--dataset_name", "{}/pictures/red"], "no column 'label'; the data has image.*one folder for each class"),
        (["--dataset_name", "{}/pictures", "--image_column", "photo"], "no column 'photo'; the data has image, label"),
        (["--dataset_name", "{}/pictures", "--image_column", "label"], "'label' holds neither images nor paths"),
        (["--dataset_name", "{}/pictures", "--image_size", "16"], "vit takes other sizes on request only"),
    ],
)
def test_wrong_input_ends_in_one_line(tmp_path, pictures, tiny_vit, arguments, message):
    arguments = [argument.format(tmp_path) for argument in arguments]
    with pytest.raises(SystemExit, match=message) as ended:
        image_classification.main([*arguments, "--model_name_or_path", tiny_vit, "--output_dir", str(tmp_path), *SHORT])
    assert "\n" not in str(ended.value)


def test_missing_debian_data_names_the_line_to_run_and_that_line_says_where_apt_get_is_missing(tmp_path):
    with pytest.raises(SystemExit, match=r"Run: bash -c '.*debian\.sh && debian_packages .* no-such'") as ended:
        embedded.debian("no-such", "usr/share/no-such")
    line = str(ended.value).partition("Run: ")[2]
    environment = {**os.environ, "PATH": str(tmp_path)}
    done = subprocess.run([shutil.which("bash"), "-c", line[9:-1]], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr.strip().partition(":")[0]) == (0, "no-such is not unpacked")


@pytest.mark.slow
@needs_fashion
def test_the_recipe_as_a_script_learns_from_a_part_of_the_embedded_data(tmp_path):
    command = [sys.executable, str(RECIPES / "image_classification.py"), "--output_dir", str(tmp_path)]
    part = ["--max_train_samples", "600", "--max_eval_samples", "300", "--num_train_epochs", "2", "--use_cpu"]
    subprocess.run([*command, *part, "--eval_strategy", "no"], check=True, capture_output=True, text=True)
    assert json.loads((tmp_path / "all_results.json").read_text())["eval_accuracy"] >= 0.77
    from transformers import pipeline

    classify = pipeline("image-classification", model=str(tmp_path), device="cpu")
    rows = embedded_images.fashion()["validation"].select(range(20))
    named = [classify(row["image"])[0]["label"] == embedded_images.FASHION[row["label"]] for row in rows]
    assert sum(named) >= 14
