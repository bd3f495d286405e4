"""The recipes of speech: the model read from CTranslate2, sound files, and each recipe in a few steps."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import audio
import audio_classification
import embedded_speech
import numpy as np
import pytest
import scores
import soundfile
import speech_recognition
import torch
from transformers import AutoTokenizer

RECIPES = Path(__file__).parent.parent / "recipes"

pytestmark = [
    pytest.mark.filterwarnings("ignore:schedule .* will not reach:UserWarning"),
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning"),  # Trainer's default
]
LEFT = ["model.safetensors", "preprocessor_config.json", "trainer_state.json", "all_results.json", "timeline.png",
        "README.md"]  # fmt: skip
SHORT = ["--max_steps", "4", "--logging_steps", "1", "--per_device_train_batch_size", "2", "--use_cpu",
         "--disable_tqdm", "true", "--window_seconds", "1"]  # fmt: skip
SAMPLES = ["--max_train_samples", "8", "--max_eval_samples", "4", "--window_seconds", "6"]


@pytest.fixture
def prompts():
    if not shutil.which("apt-get") and not (Path(sys.prefix) / "debian" / embedded_speech.SPOKEN).is_dir():
        pytest.skip("the prompts are Debian packages, and there is no apt-get")
    return embedded_speech.clips(3.0)


def tone(path, hertz=440, seconds=0.5, rate=8000):
    soundfile.write(path, 0.5 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate), rate)
    return path.name


def test_resampling_keeps_a_tone():
    wave = np.sin(2 * np.pi * 1000 * np.arange(8000) / 8000)
    heard = audio.resample(wave, 8000, 16000)
    assert len(heard) == 16000
    spectrum = np.abs(np.fft.rfft(heard))
    assert spectrum.argmax() == 1000  # bins of 1 Hz
    assert spectrum[4000:].max() < 1e-2 * spectrum[1000]  # no image of it at 7 kHz


def test_transcripts_have_words_only():
    lines = ["; heading", "", "hello: Hello (note: not 'hi') there.", "beep: [a tone]", "silence/1: (a second)",
             "letters/at: at [@]", "time: it is: noon"]  # fmt: skip
    assert embedded_speech.transcripts(lines) == {"hello": "Hello there.", "letters/at": "at", "time": "it is: noon"}


def test_words_are_compared_without_case_and_punctuation():
    assert scores.words("You are NOW, muted.") == "you are now muted"
    metric = scores.WordErrorRate(keep_in_memory=True)
    assert metric.compute(predictions=["a b x"], references=["a b c d"])["wer"] == 0.5


def test_the_converted_whisper_transcribes_word_for_word(prompts):
    from transformers import AutoFeatureExtractor, AutoTokenizer, WhisperForConditionalGeneration

    folder = embedded_speech.whisper()
    model, report = WhisperForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    wanted = {clip["name"]: clip for clip in embedded_speech.clips(30.0)}["agent-pass"]
    wave = audio.read(wanted["audio"], Path(), 16000)
    features = AutoFeatureExtractor.from_pretrained(folder)(wave, sampling_rate=16000, return_tensors="pt")
    with torch.no_grad():
        heard = model.generate(features.input_features, max_new_tokens=30)
    text = AutoTokenizer.from_pretrained(folder).decode(heard[0], skip_special_tokens=True)
    assert scores.words(text) == scores.words(wanted["text"])


@pytest.mark.parametrize(
    ("recipe", "score"), [(speech_recognition, "eval_wer"), (audio_classification, "eval_accuracy")]
)
def test_four_steps_on_embedded_data(tmp_path, prompts, recipe, score):
    recipe.main(["--output_dir", str(tmp_path), *SHORT, *SAMPLES])
    assert all((tmp_path / name).stat().st_size for name in LEFT)
    assert score in json.loads((tmp_path / "all_results.json").read_text())
    assert json.loads((tmp_path / "config.json").read_text())["max_source_positions"] == 300
    assert recipe is audio_classification or (tmp_path / "tokenizer.json").exists()


def test_own_table_of_sounds_and_words(tmp_path):
    rows = [f"{tone(tmp_path / f'{i}.wav', 300 + i)},tone {i}" for i in range(5)]
    (tmp_path / "mine.csv").write_text("\n".join(["file,said", *rows]))
    speech_recognition.main(["--train_file", str(tmp_path / "mine.csv"), "--audio_column", "file", "--text_column",
                             "said", "--output_dir", str(tmp_path / "out"), *SHORT])  # fmt: skip
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_own_folder_of_classes(tmp_path):
    for name in ("high", "low"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(5):
            tone(tmp_path / "data" / name / f"{i}.wav", 2000 if name == "high" else 200)
    out = tmp_path / "out"
    audio_classification.main(["--dataset_name", str(tmp_path / "data"), "--output_dir", str(out), *SHORT])
    assert json.loads((out / "config.json").read_text())["id2label"] == {"0": "high", "1": "low"}


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("sound,text\na.wav,hello\n", "no column 'audio'; the data has sound, text"),
        ("audio,text\nnone.wav,hello\n", "there is no file .*none.wav"),
        ("audio,text\nmine.csv,hello\n", "mine.csv cannot be read as sound"),
        ("audio,text\nlong.wav,hello\n", "lasts 1.5 s, and the model hears 1 s. Give --window_seconds 2"),
        ("audio,text\nlong.wav,...\n", "has no words"),
    ],
)
def test_bad_tables_are_refused_in_one_line(tmp_path, table, message):
    tone(tmp_path / "long.wav", seconds=1.5)
    (tmp_path / "mine.csv").write_text(table)
    path = str(tmp_path / "mine.csv")
    with pytest.raises(SystemExit, match=message):
        speech_recognition.main(["--train_file", path, "--validation_file", path, "--output_dir", str(tmp_path),
                                 *SHORT])  # fmt: skip


def test_a_model_of_many_languages_wants_to_be_told_one():
    tokenizer = AutoTokenizer.from_pretrained(embedded_speech.whisper())
    model = SimpleNamespace(generation_config=SimpleNamespace(is_multilingual=True))
    for language, message in ((None, "--language german"), ("germann", "Did you mean 'german'")):
        with pytest.raises(SystemExit, match=message):
            speech_recognition.set_language(model, tokenizer, language)
    speech_recognition.set_language(model, tokenizer, "german")
    assert (model.generation_config.language, model.generation_config.task) == ("german", "transcribe")
    told = tokenizer.convert_ids_to_tokens(tokenizer("hallo").input_ids)
    assert told[:4] == ["<|startoftranscript|>", "<|de|>", "<|transcribe|>", "<|notimestamps|>"]
    model.generation_config.is_multilingual = False
    with pytest.raises(SystemExit, match="knows English alone"):
        speech_recognition.set_language(model, tokenizer, "german")
