"""Adversarial training: losses, discriminators, the mel loss, distillation, and runs that resume."""

import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import free_port
from safetensors.torch import load_file, save_file
from tiny_speechtokenizer import tiny_codec, waves
from torch import Tensor, multiprocessing, nn
from transformers import HubertConfig, HubertModel

from hf_speechllm.data.fixed_batches import FixedBatchSampler
from hf_speechllm.data.manifests import Utterance
from hf_speechllm.data.waveform_crops import WaveformCropDataset, collate_crops
from hf_speechllm.models.modeling_speechtokenizer import SpeechTokenizerModel
from hf_speechllm.train.adversarial_losses import adversarial_loss, discriminator_loss, feature_matching_loss
from hf_speechllm.train.discriminators import DiscriminatorEnsemble, PeriodDiscriminator, build_discriminators
from hf_speechllm.train.distillation import d_axis_loss, t_axis_loss
from hf_speechllm.train.gan_trainer import LOG_NAME, GanTrainer, GanTrainingArguments, GeneratorStep
from hf_speechllm.train.mel_loss import LogMelSpectrogram, MultiScaleMelLoss
from hf_speechllm.train.semantic_teacher import SemanticTeacher
from hf_speechllm.train.speechtokenizer_step import LOSS_WEIGHTS, SpeechTokenizerStep, reconstruction_metrics


CROP = 640


# -- losses -----------------------------------------------------------------------------------------------------------
def test_adversarial_losses_by_hand():
    real, fake = [torch.tensor([1.0, 0.5]), torch.tensor([[2.0]])], [torch.tensor([0.0, 1.0]), torch.tensor([[-1.0]])]
    assert discriminator_loss(real, fake) == pytest.approx((0.125 + 0.5) + (1.0 + 1.0))
    assert adversarial_loss(fake) == pytest.approx(0.5 + 4.0)
    maps = [[torch.zeros(2, 3), torch.ones(4)]], [[torch.full((2, 3), 0.5), torch.full((4,), 3.0)]]
    assert feature_matching_loss(*maps) == pytest.approx(2 * (0.5 + 2.0))


def test_feature_matching_teaches_the_generator_only():
    real, fake = torch.ones(3, requires_grad=True), torch.zeros(3, requires_grad=True)
    feature_matching_loss([[real]], [[fake]]).backward()
    assert real.grad is None and fake.grad.abs().sum() > 0


def test_mel_loss():
    """Frames as the formula says, zero for equal waveforms, and the weights."""
    real, fake = (torch.stack(waves(4801, seed=seed))[:, None] for seed in (0, 1))
    loss = MultiScaleMelLoss()
    assert LogMelSpectrogram()(real).shape == (1, 80, 1 + (4801 + 784 - 1024) // 240)
    assert loss(real, real) == 0 and loss(real, fake[..., :4000]) > 0
    scales = loss.scales(real, fake)
    assert scales.shape == (4,)
    assert loss(real, fake) == pytest.approx(float((scales * torch.tensor([45.0, 1, 1, 1])).sum()), rel=1e-6)
    silence = LogMelSpectrogram(n_fft=256, hop_length=64)(torch.zeros(1, 2000))
    assert torch.equal(silence, torch.full_like(silence, math.log(1e-5)))


def test_distillation_by_hand():
    """Cosines over time per channel, and over channels per frame; masked frames and surplus frames are not seen."""
    generator = torch.Generator().manual_seed(0)
    features, targets = torch.randn(2, 7, 3, generator=generator), torch.randn(2, 9, 3, generator=generator)
    x, y = features.double().numpy(), targets.double().numpy()[:, :7]

    def cosine(a, b, axis):
        return (a * b).sum(axis) / np.sqrt((a * a).sum(axis) * (b * b).sum(axis))

    over_time = np.mean(np.log1p(np.exp(-cosine(x, y, 1))))
    assert d_axis_loss(features, targets) == pytest.approx(over_time, rel=1e-5)
    frames = np.abs(x - y).mean(-1) + 0.5 * np.log1p(np.exp(-cosine(x, y, 2)))
    assert t_axis_loss(features, targets, cosine_weight=0.5) == pytest.approx(frames.mean(), rel=1e-5)

    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    changed = features.masked_fill(mask[..., None] == 0, 1e3)
    for loss in (d_axis_loss, t_axis_loss):
        assert loss(changed, targets, mask) == pytest.approx(float(loss(features, targets, mask)), rel=1e-6)
    per_item = [float(d_axis_loss(features[row : row + 1, :n], targets[row : row + 1])) for row, n in ((0, 7), (1, 4))]
    assert d_axis_loss(features, targets, mask) == pytest.approx(np.mean(per_item), rel=1e-5)
    assert t_axis_loss(features, targets, mask, 0.5) == pytest.approx(frames[mask.bool().numpy()].mean(), rel=1e-5)


# -- discriminators ---------------------------------------------------------------------------------------------------
def test_published_sizes():
    """Parameters of HiFi-GAN's MPD and MSD (41.1 M and 29.6 M) and of EnCodec's MS-STFT with 32 filters."""
    members = build_discriminators(["mpd", "msd", "msstftd"]).members
    sizes = {name: sum(p.numel() for p in member.parameters()) / 1e6 for name, member in members.items()}
    assert sizes["mpd"] == pytest.approx(41.1, abs=0.05) and sizes["msd"] == pytest.approx(29.6, abs=0.05)
    assert sizes["msstftd"] == pytest.approx(0.4723, abs=0.0001)
    with pytest.raises(ValueError, match=r"discriminators: expected names among .*, found \['mrd'\]"):
        build_discriminators(["mrd"])


def test_ensemble_sees_both_and_every_shape():
    ensemble = build_discriminators(["mpd", "msd", "msstftd"], shrink=32)
    waveform = torch.stack(waves(2501, 2501))
    real, fake = ensemble(waveform, waveform[:, None].flip(-1))
    assert len(real.scores) == len(real.features) == 5 + 3 + 5
    for one, other in zip(real.features, fake.features, strict=True):
        assert [part.shape for part in one] == [part.shape for part in other]
    discriminator_loss(real.scores, fake.scores).backward()
    assert all(parameter.grad is not None for parameter in ensemble.parameters())


def test_period_discriminator_reads_rows_of_one_phase():
    """A score of period 4 depends on samples of its own phase only."""
    torch.manual_seed(0)
    discriminator, waveform = PeriodDiscriminator(4, shrink=32), torch.stack(waves(400))
    before = discriminator(waveform).scores[0].unflatten(-1, (-1, 4))
    waveform[:, 1::4] += 1.0
    after = discriminator(waveform).scores[0].unflatten(-1, (-1, 4))
    assert torch.equal(before[..., [0, 2, 3]], after[..., [0, 2, 3]])
    assert (before[..., 1] != after[..., 1]).any()


# -- data and teacher -------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def recordings(tmp_path_factory) -> list[Utterance]:
    """Seven recordings: a rising ramp each, so that a sample tells its place. The third is shorter than a crop."""
    folder = tmp_path_factory.mktemp("recordings")
    utterances = []
    for index, samples in enumerate((3000, 2000, 500, 2500, 1700, 3100, 1201)):
        noise = waves(samples, seed=index)[0].numpy() * 0.1
        ramp = np.linspace(-0.5, 0.5, samples, dtype=np.float32)
        soundfile.write(folder / f"{index}.wav", ramp + noise, 16000, subtype="FLOAT")
        utterances.append(Utterance(key=str(index), audio=folder / f"{index}.wav", text=""))
    return utterances


def tiny_teacher(**changes) -> HubertModel:
    """40 samples a frame, as the codec of these tests."""
    torch.manual_seed(1)
    shape = {"conv_dim": (6, 6, 6), "conv_kernel": (10, 3, 2), "conv_stride": (5, 4, 2), "num_feat_extract_layers": 3}
    sizes = {"hidden_size": 6, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
    positions = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    return HubertModel(HubertConfig(**shape, **sizes, **positions, feat_extract_norm="layer", **changes))


def codec_of_tests(**changes) -> SpeechTokenizerModel:
    return tiny_codec(trained=False, upsampling_ratios=[5, 4, 2], kmeans_iterations=5, **changes).train()


def test_crops_depend_on_epoch_and_index_alone(recordings):
    first, second = (WaveformCropDataset(recordings, CROP, seed=3, gain_db=(-6, 6)) for _ in range(2))
    for index in (0, 2, 6):
        for key in ((0, index), (5, index)):
            one, other = first[key], second[key]
            assert all(torch.equal(one[name], other[name]) for name in one)
            assert all(len(value) == CROP for value in one.values())
    assert not torch.equal(first[0, 0]["waveform"], first[1, 0]["waveform"])
    short = first[0, 2]
    assert short["attention_mask"].sum() == 500 and not short["waveform"][500:].any()
    assert not short["teacher_values"][500:].any()


def test_teacher_hears_the_same_stretch(recordings):
    """Its values are the crop's, at the level of the whole recording."""
    data = WaveformCropDataset(recordings, CROP, seed=3, gain_db=(-6, 6))
    item, whole = data[4, 0], data.waveform(0)
    normalized = torch.from_numpy((whole - whole.mean()) / np.sqrt(whole.var() + 1e-7)).float()
    windows = normalized.unfold(0, CROP, 1)
    start = int((windows - item["teacher_values"]).abs().amax(dim=1).argmin())
    torch.testing.assert_close(windows[start], item["teacher_values"], rtol=0, atol=1e-6)
    ratio = item["waveform"] / torch.from_numpy(whole[start : start + CROP])
    assert ratio.std() < 1e-4 and 10 ** (-6 / 20) <= ratio.mean() <= 10 ** (6 / 20)


def test_teacher_features(recordings):
    model = tiny_teacher().eval()
    item = collate_crops([WaveformCropDataset(recordings, CROP)[0, index] for index in (0, 3)])
    arguments = (item["teacher_values"], item["attention_mask"])
    with torch.no_grad():
        states = model(item["teacher_values"], output_hidden_states=True).hidden_states
    mean = SemanticTeacher(model, "mean", 40)
    assert len(states) == 3 and mean.hidden_size == 6
    torch.testing.assert_close(mean(*arguments), sum(states) / 3)
    torch.testing.assert_close(SemanticTeacher(model, 1, 40)(*arguments), states[1])
    assert not any(parameter.requires_grad for parameter in mean.train().parameters()) and not mean.model.training
    with pytest.raises(ValueError, match="layer: expected 'mean' or 0..2 of the teacher, got 3"):
        SemanticTeacher(model, 3, 40)
    with pytest.raises(ValueError, match="hop_length: expected that of the codec, 320, .* got 40"):
        SemanticTeacher(model, "mean", 320)


def test_sampler_shares_an_epoch_out_and_finds_its_place():
    whole = FixedBatchSampler(11, 2, seed=4)
    whole.set_position(3)
    batches = list(whole)
    assert len(batches) == len(whole) == 5 and all(epoch == 3 for batch in batches for epoch, _ in batch)
    assert len({index for batch in batches for _, index in batch}) == 10
    whole.set_position(3, 2)
    assert list(whole) == batches[2:]
    whole.set_position(4)
    assert list(whole) != batches
    shares = [FixedBatchSampler(11, 2, seed=4, rank=rank, world_size=2) for rank in range(2)]
    seen = [index for sampler in shares for batch in sampler for _, index in batch]
    assert len(seen) == len(set(seen)) == 8
    with pytest.raises(ValueError, match="batch_size: expected 1..5 for 11 items and 2 processes, got 6"):
        FixedBatchSampler(11, 6, world_size=2)


# -- the trainer ------------------------------------------------------------------------------------------------------
class StopRun(Exception):
    """What a test raises after a checkpoint, like a run that is killed."""


def make_trainer(
    folder: Path, recordings: list[Utterance], model: SpeechTokenizerModel | None = None, **changes
) -> GanTrainer:
    """A codec with teacher and all discriminators; the same objects in every call."""
    model = model or codec_of_tests()
    torch.manual_seed(7)
    judges = build_discriminators(["mpd", "msd", "msstftd"], shrink=32)
    judges.members["msstftd"].members = judges.members["msstftd"].members[2:]  # windows that fit into a crop
    mel_loss = MultiScaleMelLoss(weights=(45.0, 1.0), n_fft=512, hop_length=120, num_mels=20)
    options = {"max_steps": 7, "batch_size": 2, "logging_steps": 2, "save_steps": 3, "learning_rate": 1e-3}
    options |= {"use_cpu": True, "progress_bar": False, "adversarial_start_step": 1, "loss_weights": LOSS_WEIGHTS}
    return GanTrainer(
        model,
        SpeechTokenizerStep(mel_loss, 40, SemanticTeacher(tiny_teacher(), "mean", 40)),
        GanTrainingArguments(str(folder), **options | changes),
        WaveformCropDataset(recordings, CROP, seed=1),
        collate_crops,
        discriminators=judges,
        evaluate=reconstruction_metrics([torch.from_numpy(waves(700)[0].numpy())], mel_loss),
    )


def weights_of(trainer: GanTrainer) -> dict[str, Tensor]:
    parts = {"generator": trainer.generator, "discriminators": trainer.discriminators}
    return {f"{part}.{name}": value for part, module in parts.items() for name, value in module.state_dict().items()}


@pytest.mark.parametrize("stopped_at", [3, 6])
def test_resumed_run_equals_the_uninterrupted(recordings, tmp_path, stopped_at):
    """Both networks bit by bit, codebooks included, and the log line by line; the stop is inside of an epoch."""
    options = {"eval_steps": 4, "max_grad_norm": 50.0}
    whole = make_trainer(tmp_path / "whole", recordings, **options)
    whole.train()

    stopped = make_trainer(tmp_path / "stopped", recordings, **options)
    save = stopped.save_checkpoint

    def save_and_stop():
        if save().name == f"checkpoint-{stopped_at}":
            # Logged after the checkpoint, before the end: these lines must not appear twice.
            with (tmp_path / "stopped" / LOG_NAME).open("a") as file:
                file.write('{"step": 99}\n')
            raise StopRun

    stopped.save_checkpoint = save_and_stop
    with pytest.raises(StopRun):
        stopped.train()
    torch.manual_seed(12345)
    resumed = make_trainer(tmp_path / "stopped", recordings, **options)
    resumed.train(resume=True)

    expected = weights_of(whole)
    assert any(name.endswith("embed") for name in expected) and len(expected) > 200
    for name, tensor in weights_of(resumed).items():
        assert torch.equal(tensor, expected[name]), name
    logs = [(tmp_path / name / LOG_NAME).read_text() for name in ("whole", "stopped")]
    assert logs[0] == logs[1]
    lines = [json.loads(line) for line in logs[0].splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 4, 6, 7, 7] and "eval_mel" in lines[2]
    assert {"mel", "waveform", "commitment", "distillation", "adversarial", "feature_matching"} <= lines[1].keys()


def started_codec() -> SpeechTokenizerModel:
    """Without anything drawn: its codebooks have their codewords, and none of them dies."""
    return tiny_codec(upsampling_ratios=[5, 4, 2], dead_code_threshold=0.0).train()


def _train_in_two(rank: int, folder: Path, recordings: list[Utterance], port: int) -> None:
    """One process of two, each with half of the items of a batch: two runs, of which one stops and goes on."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    started = make_trainer(folder / "started", recordings, started_codec())
    started.train()
    # K-means on the first batch, and codewords that die.
    make_trainer(folder / "new", recordings).train()
    if rank == 0:
        shutil.copytree(folder / "new", folder / "again", ignore=shutil.ignore_patterns("checkpoint-7"))
    torch.distributed.barrier()
    resumed = make_trainer(folder / "again", recordings)
    resumed.train(resume=True)
    for name, trainer in (("started", started), ("resumed", resumed)):
        save_file(weights_of(trainer), folder / f"{name}{rank}.safetensors")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_train_what_one_trains(recordings, tmp_path):
    """Data parallel, codebooks included; both processes hold the same, also after a stop.

    Without the recording that is shorter than a crop: distillation is a mean over the real frames of each process.
    """
    recordings = [item for item in recordings if soundfile.info(item.audio).frames >= CROP]
    multiprocessing.spawn(_train_in_two, args=(tmp_path, recordings, free_port()), nprocs=2)
    alone = make_trainer(tmp_path / "alone", recordings, started_codec(), batch_size=4)
    before = {name: value.clone() for name, value in weights_of(alone).items()}
    alone.train()
    first, second = (load_file(tmp_path / f"started{rank}.safetensors") for rank in range(2))
    moved = 0.0
    for name, tensor in weights_of(alone).items():
        wrapped = name.replace(".", ".module.", 1)
        torch.testing.assert_close(first[wrapped], tensor, rtol=0.0, atol=2e-5)
        assert torch.equal(first[wrapped], second[wrapped]), name
        moved = max(moved, float((tensor - before[name]).abs().max()))
    assert moved > 3e-3
    first, second = (load_file(tmp_path / f"resumed{rank}.safetensors") for rank in range(2))
    saved = SpeechTokenizerModel.from_pretrained(tmp_path / "new").state_dict()
    assert saved["quantizer.levels.0.embed"].any()
    for name, tensor in saved.items():
        assert torch.equal(first[f"generator.module.{name}"], tensor), name
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    logs = [(tmp_path / name / LOG_NAME).read_text() for name in ("new", "again")]
    assert logs[0] == logs[1]


def test_checkpoint_is_a_model_and_holds_the_discriminators(recordings, tmp_path):
    """Unlike upstream, where a run that goes on starts with new discriminators."""
    trainer = make_trainer(tmp_path, recordings, max_steps=4, save_steps=2, save_total_limit=2)
    fresh = {name: tensor.clone() for name, tensor in trainer.discriminators.state_dict().items()}
    trainer.train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    codec = SpeechTokenizerModel.from_pretrained(tmp_path / "checkpoint-4")
    final = SpeechTokenizerModel.from_pretrained(tmp_path)
    for name, tensor in trainer.generator.state_dict().items():
        assert torch.equal(codec.state_dict()[name], tensor) and torch.equal(final.state_dict()[name], tensor), name
    saved = load_file(tmp_path / "checkpoint-4" / "discriminators.safetensors")
    assert any(not torch.equal(tensor, fresh[name]) for name, tensor in saved.items())
    other = make_trainer(tmp_path / "other", recordings)
    other.load_checkpoint(tmp_path / "checkpoint-4")
    assert other.step_number == 4
    for name, tensor in other.discriminators.state_dict().items():
        assert torch.equal(tensor, saved[name]), name
    assert other.optimizer_d.state_dict()["state"] and other.optimizer_g.state_dict()["state"]
    (tmp_path / "checkpoint-4" / "discriminators.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="expected discriminators.safetensors"):
        make_trainer(tmp_path / "third", recordings).load_checkpoint(tmp_path / "checkpoint-4")
    # It is incomplete now: a run takes the one before.
    assert trainer._checkpoint_to_resume(True).name == "checkpoint-2"
    shutil.rmtree(tmp_path / "checkpoint-2")
    assert trainer._checkpoint_to_resume(True) is None


def test_discriminators_are_left_alone_by_the_generator(recordings, tmp_path):
    """The generator's update changes no discriminator, and before their start they do not learn."""
    trainer = make_trainer(tmp_path, recordings, max_steps=1, schedule="constant")
    before = {name: value.clone() for name, value in trainer.discriminators.named_parameters()}
    trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in trainer.discriminators.named_parameters())
    trainer._training_step(next(trainer._batches()))
    assert any(not torch.equal(value, before[name]) for name, value in trainer.discriminators.named_parameters())
    assert all(value.requires_grad and value.grad is None for value in trainer.discriminators.parameters())


def test_a_loss_without_weight_is_an_error(recordings, tmp_path):
    with pytest.raises(ValueError, match=r"loss_weights: expected a weight for \['distillation', 'mel'\]"):
        make_trainer(tmp_path, recordings, loss_weights={"commitment": 1.0, "waveform": 1.0}).train()


def test_a_loss_that_is_not_finite_stops_the_run(recordings, tmp_path):
    trainer = make_trainer(tmp_path, recordings, logging_steps=1)
    step = trainer.step

    def broken(generator: nn.Module, batch: dict[str, Tensor]) -> GeneratorStep:
        output = step(generator, batch)
        return GeneratorStep(output.real, output.fake, output.losses | {"mel": output.losses["mel"] * math.nan})

    trainer.step = broken
    with pytest.raises(FloatingPointError, match="expected a finite value at step 1"):
        trainer.train()


def test_learning_rate_schedules():
    arguments = GanTrainingArguments("x", max_steps=100, warmup_steps=10)
    factors = [arguments.learning_rate_factor(step) for step in range(100)]
    assert factors[0] == 0.1 and factors[9] == 1.0 and factors[10] == 1.0
    assert factors[55] == pytest.approx(0.5) and 0 < factors[99] < 0.01
    arguments = GanTrainingArguments("x", schedule="exponential", lr_decay=0.5, lr_decay_steps=10)
    assert [arguments.learning_rate_factor(step) for step in (0, 9, 10, 35)] == [1.0, 1.0, 0.5, 0.125]
    assert GanTrainingArguments("x", schedule="constant").learning_rate_factor(99999) == 1.0
    with pytest.raises(ValueError, match="schedule: expected one of"):
        GanTrainingArguments("x", schedule="linear")


def test_ensemble_of_own_members():
    ensemble = DiscriminatorEnsemble({"only": PeriodDiscriminator(3, shrink=32)})
    assert len(ensemble.judge(torch.stack(waves(100))).scores) == 1
