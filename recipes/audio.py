"""Sound files for the recipes of speech: reading, resampling, and a window shorter than Whisper's 30 seconds."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import soundfile
import torch
from scipy.signal import resample_poly
from tables import DataArguments
from torch import nn
from transformers import AutoConfig, AutoFeatureExtractor

SOUNDS = (".wav", ".flac", ".ogg", ".mp3")
POSITIONS = 50  # of Whisper's encoder for a second


@dataclass
class AudioArguments(DataArguments):
    """Column of the sound files, and how much of them is heard."""

    audio_column: str = field(
        default="audio", metadata={"help": "Column with the sound file; a relative path starts at the table's folder."}
    )
    window_seconds: int = field(
        default=6, metadata={"help": "Seconds the model hears, 30 at most; no clip may be longer."}
    )


def without_decoding(data: datasets.DatasetDict, column: str) -> datasets.DatasetDict:
    """Leave sound columns as files: decoding them by datasets would need torchcodec."""
    for split, rows in data.items():
        if isinstance(rows.features.get(column), datasets.Audio):
            data[split] = rows.cast_column(column, datasets.Audio(decode=False))
    return data


def by_folder(root: Path) -> datasets.DatasetDict:
    """Return the sound files of a folder that has one folder for each class; datasets' own reader needs torchcodec."""
    files = sorted(path.resolve() for path in root.glob("*/*") if path.suffix.lower() in SOUNDS)
    if not files:
        raise SystemExit(f"{root} has no folders with {', '.join(SOUNDS)} files, one folder for each class.")
    rows = [{"audio": str(path), "label": path.parent.name} for path in files]
    return datasets.DatasetDict(train=datasets.Dataset.from_list(rows))


def read(sound: str | dict[str, Any], folder: Path, rate: int) -> np.ndarray:
    """Return the one channel of a sound file at ``rate``; several are averaged."""
    path = sound if isinstance(sound, str) else sound["path"]
    held = None if isinstance(sound, str) else sound["bytes"]
    source = io.BytesIO(held) if held else folder / path
    if isinstance(source, Path) and not source.is_file():
        raise SystemExit(f"there is no file {source}. Relative paths start at the folder of the table.")
    try:
        wave, own_rate = soundfile.read(source, dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise SystemExit(f"{path} cannot be read as sound: {error}") from None
    return resample(wave.mean(axis=1), own_rate, rate)


def resample(wave: np.ndarray, own_rate: int, rate: int) -> np.ndarray:
    """Return the same sound at another rate, by a polyphase filter that lets no frequency fold back."""
    divisor = math.gcd(own_rate, rate)
    return resample_poly(wave, rate // divisor, own_rate // divisor).astype(np.float32)


class Listener:
    """Turns rows into input features of a Whisper whose window is cut to the seconds asked for."""

    def __init__(self, name: str, arguments: AudioArguments) -> None:
        config = AutoConfig.from_pretrained(name)
        if config.model_type != "whisper":
            raise SystemExit(f"{name} is a {config.model_type}; this recipe trains a whisper.")
        longest = config.max_source_positions // POSITIONS
        if not 1 <= arguments.window_seconds <= longest:
            raise SystemExit(f"--window_seconds {arguments.window_seconds}: write 1 to {longest} for {name}.")
        self.seconds = arguments.window_seconds
        self.column = arguments.audio_column
        self.folder = Path(arguments.train_file or ".").parent
        self.extractor = AutoFeatureExtractor.from_pretrained(name, chunk_length=self.seconds)

    def cut(self, model: nn.Module) -> None:
        """Keep the positions of the window; Whisper's are fixed sinusoids, so the first of them are as before."""
        encoder = next(part for part in model.modules() if hasattr(part, "embed_positions") and hasattr(part, "conv1"))
        positions = encoder.embed_positions.weight[: self.seconds * POSITIONS].detach().clone()
        encoder.embed_positions = nn.Embedding.from_pretrained(positions, freeze=True)
        encoder.max_source_positions = model.config.max_source_positions = len(positions)

    def features(self, row: dict[str, Any]) -> np.ndarray:
        """Return what the model hears of a row; a clip that does not fit the window is refused."""
        rate = self.extractor.sampling_rate
        wave = read(row[self.column], self.folder, rate)
        if len(wave) > self.seconds * rate:
            raise SystemExit(
                f"a clip lasts {len(wave) / rate:.1f} s, and the model hears {self.seconds} s. "
                f"Give --window_seconds {math.ceil(len(wave) / rate)}, 30 at most, or drop longer clips."
            )
        return self.extractor(wave, sampling_rate=rate).input_features[0]


def stack(rows: list[dict[str, Any]]) -> torch.Tensor:
    """Return the features of the rows as one tensor; all windows are of one length."""
    return torch.from_numpy(np.stack([np.asarray(row["input_features"], dtype=np.float32) for row in rows]))
