"""What a model keeps fixed by itself stays fixed whatever opens; what somebody froze is still an error."""

from __future__ import annotations

import pytest
import torch
import transformers
from conftest import tiny_bert
from test_cache_families import SPEECH, family_batch, family_data
from transformers import AutoConfig, AutoModelForObjectDetection, AutoModelForSpeechSeq2Seq

from hf_unfreeze import UnfreezeCallback, Unfreezer, set_trainable
from hf_unfreeze.errors import OptimizerError

SINUSOIDS = "model.encoder.embed_positions.weight"


def whisper():
    torch.manual_seed(0)
    return AutoModelForSpeechSeq2Seq.from_config(AutoConfig.for_model("whisper", **SPEECH)).double()


@pytest.mark.parametrize("schedule", ["all_at_once", "linear_probe(until=1ep)"])
def test_whisper_trains_and_keeps_its_sinusoids(make_trainer, schedule):
    ends = []
    for callbacks in ([], [UnfreezeCallback(schedule)]):
        trainer = make_trainer(*callbacks, model=whisper())
        trainer.train_dataset, trainer.data_collator = family_data("whisper"), family_batch("whisper")
        trainer.train()
        ends.append(dict(trainer.model.cpu().named_parameters()))
    before = dict(whisper().named_parameters())
    moved = {name for name in before if not torch.equal(before[name], ends[1][name])}
    assert moved == set(before) - {SINUSOIDS} and not ends[1][SINUSOIDS].requires_grad
    assert schedule != "all_at_once" or all(torch.equal(ends[0][name], ends[1][name]) for name in before)


@pytest.mark.skipif(transformers.__version__ < "5", reason="transformers 4 imports torchvision for it")
def test_a_stem_that_detr_keeps_fixed():
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    backbone = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1]}
    config = AutoConfig.for_model("table-transformer", use_timm_backbone=False, use_pretrained_backbone=False,
                                  backbone=None, backbone_config=backbone, **sizes)  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForObjectDetection.from_config(config)
    fixed = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    set_trainable(model, "all")
    assert fixed == {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert fixed and len(fixed) < len(list(model.parameters()))


def test_what_somebody_froze_is_an_error():
    model = tiny_bert()
    model.bert.embeddings.position_embeddings.weight.requires_grad_(False)
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.1)
    with pytest.raises(OptimizerError, match=r"position_embeddings.weight had requires_grad=False when the optimizer"):
        Unfreezer(model, optimizer, "gradual(every=1step)")
