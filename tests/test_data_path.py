"""Data path: manifests, augmentation, data set, bucketing, collation."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from torch.utils.data import DataLoader

from hf_speechllm.data.augmentation import (
    AugmentationConfig,
    augment_log_mel,
    augment_waveform,
    change_speed,
    change_tempo,
    colored_noise,
    join_clips,
    mask_features,
    sample_generator,
    spec_augment,
    spec_substitute,
    spec_trim,
    warp_frequencies,
)
from hf_speechllm.data.bucketing import DurationBucketBatchSampler, EpochDataLoader
from hf_speechllm.data.collator import SpeechRecognitionCollator
from hf_speechllm.data.dataset import SpeechRecognitionDataset, _resample, cmvn_statistics
from hf_speechllm.data.manifests import ManifestError, Utterance, read_hub_dataset, read_manifest
from hf_speechllm.models.feature_extraction_kaldi_fbank import KaldiFbankFeatureExtractor
from hf_speechllm.upstream.tokens import build_word_tokenizer


WORDS = ("one", "two", "three")
EVERYTHING = AugmentationConfig(
    speeds=[0.9, 1.0, 1.1],
    join_weights=[0.5, 0.3, 0.2],
    edge_silence_seconds=(0.0, 0.2),
    gain_db=(-6.0, 6.0),
    noise_probability=0.5,
    dither=1.0,
    warp_probability=0.5,
    tempo_probability=0.5,
    equalizer_probability=0.5,
    spec_aug=True,
    max_time_mask=5,
    spec_sub=True,
    max_substitution=5,
    spec_trim=True,
    max_trim=5,
)


def write_clips(folder: Path, count: int = 12, rate: int = 8000) -> Path:
    """An audiofolder of tones, two speakers, 0.1 to 0.5 s; the word tells the pitch."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    lines = ["file_name,transcription,speaker,split,duration"]
    for number in range(count):
        samples = int(rate * rng.uniform(0.1, 0.5))
        tone = 0.3 * np.sin(2 * np.pi * (300 + 400 * (number % 3)) * np.arange(samples) / rate)
        soundfile.write(folder / f"{number}.flac", tone + 0.01 * rng.standard_normal(samples), rate)
        split = "validation" if number % 4 == 3 else "train"
        lines.append(f"{number}.flac,{WORDS[number % 3]},speaker{number % 2},{split},{samples / rate:.3f}")
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    return write_clips(tmp_path / "clips")


@pytest.fixture(scope="module")
def tokenizer():
    return build_word_tokenizer(
        {name: number for number, name in enumerate(("<blank>", "<unk>", *WORDS, "<sos/eos>"))}
    )


def make_dataset(folder: Path, tokenizer, augmentation=None, **options) -> SpeechRecognitionDataset:
    return SpeechRecognitionDataset(
        read_manifest(folder), KaldiFbankFeatureExtractor(), tokenizer, augmentation, **options
    )


def same_item(left: dict, right: dict) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


class TestManifests:
    def test_every_layout_gives_the_same_utterances(self, clips):
        expected = [(u.audio.name, u.text, u.speaker, u.duration) for u in read_manifest(clips)]
        assert len(expected) == 12

        rows = [
            {"audio": name, "text": text, "speaker": speaker, "duration": duration}
            for name, text, speaker, duration in expected
        ]
        (clips / "all.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
        kaldi = clips.parent / "kaldi"
        kaldi.mkdir()
        tables = {
            "wav.scp": lambda row: clips / row["audio"],
            "text": lambda row: row["text"],
            "utt2spk": lambda row: row["speaker"],
            "utt2dur": lambda row: row["duration"],
        }
        for name, value in tables.items():
            lines = [f"utt{number} {value(row)}" for number, row in enumerate(rows)]
            (kaldi / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
        for source in (clips / "all.jsonl", kaldi):
            found = read_manifest(source)
            assert [(u.audio.name, u.text, u.speaker, u.duration) for u in found] == expected
            assert all(u.audio.is_file() for u in found)

    def test_split_folders_and_filter(self, tmp_path):
        for name in ("train", "test"):
            write_clips(tmp_path / "set" / name)
        assert len(read_manifest(tmp_path / "set")) == 24
        assert len(read_manifest(tmp_path / "set", {"split": "validation"})) == 6
        assert len(read_manifest(tmp_path / "set", {"split": ["validation", "train"], "speaker": "speaker1"})) == 12

    def test_hub_dataset_is_decoded_without_torchcodec(self, clips, tokenizer, tmp_path):
        datasets = pytest.importorskip("datasets")
        rows = [{"audio": {"bytes": u.audio.read_bytes(), "path": None}, "text": u.text} for u in read_manifest(clips)]
        (tmp_path / "hub").mkdir()
        datasets.Dataset.from_list(rows).to_parquet(tmp_path / "hub" / "train.parquet")

        from_hub = SpeechRecognitionDataset(
            read_hub_dataset(str(tmp_path / "hub"), "train"), KaldiFbankFeatureExtractor(), tokenizer
        )
        from_folder = make_dataset(clips, tokenizer)
        assert len(from_hub) == len(from_folder) == 12
        assert all(same_item(from_hub[number], from_folder[number]) for number in range(12))

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("a.jsonl", '{"audio": "x.wav", "text": "a"}\nnot json\n', "a.jsonl:2: expected a JSON object"),
            ("a.jsonl", '{"text": "a"}\n', "expected one of the columns file_name"),
            ("a.jsonl", '{"audio": "x.wav"}\n', "expected one of the columns transcription"),
            ("a.jsonl", '{"audio": "x.wav", "text": "a", "duration": "long"}\n', "expected a duration"),
            ("a.jsonl", "", "expected at least one utterance"),
            ("a.txt", "", "expected a .jsonl file"),
        ],
    )
    def test_bad_manifests_are_named(self, tmp_path, name, content, message):
        (tmp_path / name).write_text(content, encoding="utf-8")
        with pytest.raises(ManifestError, match=message):
            read_manifest(tmp_path / name)

    def test_commands_in_wav_scp_are_refused(self, tmp_path):
        (tmp_path / "wav.scp").write_text("a touch /tmp/run |\n", encoding="utf-8")
        (tmp_path / "text").write_text("a one\n", encoding="utf-8")
        with pytest.raises(ManifestError, match="commands are not run"):
            read_manifest(tmp_path)


class TestAugmentation:
    def test_generator_depends_on_each_part(self):
        draws = {sample_generator(*key).random() for key in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]}
        assert len(draws) == 4
        assert sample_generator(3, 2, 1).random() == sample_generator(3, 2, 1).random()

    def test_defaults_change_nothing(self, clips, tokenizer):
        plain, augmented = make_dataset(clips, tokenizer), make_dataset(clips, tokenizer, AugmentationConfig())
        assert all(same_item(plain[number], augmented[number]) for number in range(12))

    @pytest.mark.parametrize("speed", [0.9, 1.1])
    def test_speed_moves_duration_and_pitch(self, speed):
        tone = np.sin(2 * np.pi * 1000 * np.arange(16000) / 16000).astype(np.float32)
        changed = change_speed(tone, speed, 16000, _resample)
        assert abs(changed.size - 16000 / speed) <= 2
        peak = np.abs(np.fft.rfft(changed * np.hanning(changed.size))).argmax() * 16000 / changed.size
        assert abs(peak - 1000 * speed) < 2
        assert change_speed(tone, 1.0, 16000, _resample) is tone

    def test_spec_augment_zeroes_spans(self):
        features = np.ones((200, 80), dtype=np.float32)
        masked = spec_augment(features, sample_generator(0, 0, 0), max_time_mask=20, max_frequency_mask=8)
        frames, bins = (masked == 0).all(axis=1).sum(), (masked == 0).all(axis=0).sum()
        assert 1 <= frames <= 40 and 1 <= bins <= 16
        rows, columns = (masked == 0).all(axis=1), (masked == 0).all(axis=0)
        assert ((masked == 0) == (rows[:, None] | columns[None, :])).all()
        assert (features == 1).all()

    def test_spec_substitute_copies_earlier_frames_of_the_input(self):
        features = np.repeat(np.arange(100, dtype=np.float32)[:, None], 3, axis=1)
        changed_any = False
        for index in range(20):
            changed = spec_substitute(features, sample_generator(0, 0, index), max_substitution=10)
            assert changed.shape == features.shape
            assert (changed <= features).all() and (changed == changed[:, :1]).all()
            changed_any |= bool((changed < features).any())
            # Inside a substituted span the source runs on frame by frame: it is never a frame copied twice.
            steps = np.diff(changed[:, 0])
            starts = int((steps != 1).sum())
            assert starts <= 6
        assert changed_any
        assert (features[:, 0] == np.arange(100)).all()

    def test_spec_trim_cuts_the_end_but_never_half(self):
        features = np.arange(40, dtype=np.float32)[:, None]
        lengths = {spec_trim(features, sample_generator(0, 0, index), max_trim=30).shape[0] for index in range(200)}
        assert min(lengths) == 21 and max(lengths) == 40
        for index in range(50):
            trimmed = spec_trim(features, sample_generator(0, 0, index), max_trim=30)
            assert (trimmed == features[: len(trimmed)]).all()
        assert spec_trim(features[:2], sample_generator(0, 0, 0), max_trim=30).shape[0] == 2

    def test_tempo_and_warp(self):
        features = np.random.default_rng(0).standard_normal((50, 80)).astype(np.float32)
        assert change_tempo(features, 2.0).shape == (25, 80) and change_tempo(features, 0.5).shape == (100, 80)
        assert np.allclose(change_tempo(features, 0.5)[[0, -1]], features[[0, -1]])
        assert np.allclose(warp_frequencies(features, 1.0, 16000), features, atol=1e-4)
        spike = np.zeros((1, 80), dtype=np.float32)
        spike[0, 40] = 1
        assert warp_frequencies(spike, 0.85, 16000).argmax() > 40 > warp_frequencies(spike, 1.15, 16000).argmax()

    def test_noise_has_the_wanted_level(self):
        rng = sample_generator(0, 0, 0)
        for exponent in (0.0, 1.0, 2.0):
            assert abs(np.sqrt(np.mean(colored_noise(4000, exponent, rng) ** 2)) - 1) < 0.05
        tone = 0.1 * np.sin(np.arange(16000) * 0.3).astype(np.float32)
        config = AugmentationConfig(noise_probability=1.0, noise_snr_db=(10.0, 10.0))
        noise = augment_waveform(tone, config, rng) - tone
        assert abs(20 * np.log10(np.std(tone) / np.std(noise)) - 10) < 1

    def test_join_keeps_clips_and_pauses(self):
        ones, twos = np.full(10, 0.5, np.float32), np.full(5, 0.25, np.float32)
        joined = join_clips([ones, twos], [3, 4, 2], [-80.0] * 3, sample_generator(0, 0, 0))
        assert joined.shape == (24,) and joined.dtype == np.float32
        assert (joined[3:13] == 0.5).all() and (joined[17:22] == 0.25).all()
        assert np.abs(joined[:3]).max() < 1e-3 and np.abs(joined[:3]).max() > 0

    def test_shapes_survive_every_step(self):
        for frames in (1, 2, 7, 100):
            features = np.zeros((frames, 80), dtype=np.float32)
            rng = sample_generator(0, 0, frames)
            augmented = mask_features(augment_log_mel(features, EVERYTHING, rng, 16000), EVERYTHING, rng)
            assert augmented.shape[1] == 80 and frames / 2 <= augmented.shape[0] <= frames

    @pytest.mark.parametrize(
        "bad",
        [{"speeds": []}, {"speeds": [0.0]}, {"join_weights": [0.0]}, {"gain_db": (1, 0)}, {"warp_factors": (0, 1)}],
    )
    def test_bad_settings_are_refused(self, bad):
        with pytest.raises(ValueError, match=next(iter(bad))):
            AugmentationConfig(**bad)


class TestDataset:
    def test_item_depends_on_seed_epoch_and_index_only(self, clips, tokenizer):
        first, second = (make_dataset(clips, tokenizer, EVERYTHING, seed=5) for _ in range(2))
        torch.manual_seed(0)
        np.random.seed(0)
        expected = {(epoch, index): first[epoch, index] for epoch in (0, 3) for index in range(12)}
        torch.manual_seed(1)
        np.random.seed(1)
        for key in reversed(expected):
            assert same_item(second[key], expected[key])
        second.set_epoch(3)
        assert all(same_item(second[index], expected[3, index]) for index in range(12))
        assert not any(same_item(expected[0, index], expected[3, index]) for index in range(12))
        other = make_dataset(clips, tokenizer, EVERYTHING, seed=6)
        assert not any(same_item(other[0, index], expected[0, index]) for index in range(12))

    def test_global_generators_are_not_touched(self, clips, tokenizer):
        dataset = make_dataset(clips, tokenizer, EVERYTHING)
        before = torch.get_rng_state(), np.random.get_state()[1].copy()
        dataset[0, 0]
        dataset.lengths(1)
        assert torch.equal(torch.get_rng_state(), before[0])
        assert (np.random.get_state()[1] == before[1]).all()

    def test_joined_clips_are_one_speakers_and_labels_follow(self, clips, tokenizer):
        dataset = make_dataset(clips, tokenizer, AugmentationConfig(join_weights=[0, 0, 1]))
        for index in range(12):
            plan, item = dataset.plan(index, 0), dataset[0, index]
            assert len(plan.clips) == 3 and plan.clips[0] == index
            assert len({dataset.utterances[clip].speaker for clip in plan.clips}) == 1
            text = " ".join(dataset.texts[clip] for clip in plan.clips)
            assert tokenizer.decode(item["labels"], group_tokens=False) == text

    def test_planned_lengths_are_right(self, clips, tokenizer):
        config = AugmentationConfig(speeds=[0.9, 1.1], join_weights=[1, 1], edge_silence_seconds=(0.1, 0.2))
        dataset = make_dataset(clips, tokenizer, config)
        real = np.array([dataset[2, index]["input_features"].shape[0] for index in range(12)])
        assert np.abs(dataset.lengths(2) - real).max() <= 1

    def test_stacked_and_normalized_features(self, clips, tokenizer):
        """Without a change they are the extractor's own, bit by bit; changes are made before stacking and CMVN."""
        extractor = KaldiFbankFeatureExtractor(window_type="hamming", lfr_m=7, lfr_n=6)
        generator = np.random.default_rng(0)
        extractor.cmvn_mean = generator.uniform(5.0, 9.0, 560).tolist()
        extractor.cmvn_inverse_std = generator.uniform(0.2, 0.4, 560).tolist()
        utterances = read_manifest(clips)
        plain = SpeechRecognitionDataset(utterances, extractor, tokenizer)
        unchanged = SpeechRecognitionDataset(utterances, extractor, tokenizer, AugmentationConfig())
        config = AugmentationConfig(equalizer_probability=1.0, tempo_probability=1.0, tempo_factors=(0.8, 0.8))
        changed = SpeechRecognitionDataset(utterances, extractor, tokenizer, config)
        for index in range(12):
            assert same_item(unchanged[index], plain[index])
            assert plain[index]["input_features"].shape == (plain.plan(index, 0).num_frames, 560)
            features = changed[index]["input_features"]
            assert features.shape == (changed.plan(index, 0).num_frames, 560)
            log_mel = (features / torch.tensor(extractor.cmvn_inverse_std) + torch.tensor(extractor.cmvn_mean)).view(
                -1, 7, 80
            )
            # Frame 6 of a stack is frame 0 of the next one.
            assert torch.allclose(log_mel[:-1, 6], log_mel[1:, 0], atol=1e-4)

    def test_length_limits(self, clips, tokenizer):
        everything = make_dataset(clips, tokenizer)
        longest = max(utterance.duration for utterance in everything.utterances)
        assert len(make_dataset(clips, tokenizer, max_seconds=longest - 0.001)) == 11
        with pytest.raises(ValueError, match="length limits"):
            make_dataset(clips, tokenizer, min_tokens=2)

    def test_joining_needs_speakers(self, clips, tokenizer):
        utterances = [Utterance(key="a", audio=clips / "0.flac", text="one", duration=0.2)]
        with pytest.raises(ValueError, match="speaker"):
            SpeechRecognitionDataset(
                utterances, KaldiFbankFeatureExtractor(), tokenizer, AugmentationConfig(join_weights=[1, 1])
            )

    def test_cmvn(self, clips, tokenizer):
        dataset = make_dataset(clips, tokenizer)
        mean, inverse_std = cmvn_statistics(dataset)
        features = torch.cat([dataset[index]["input_features"] for index in range(12)])
        normal = (features - mean) * inverse_std
        assert normal.mean(0).abs().max() < 1e-3 and (normal.std(0, correction=0) - 1).abs().max() < 1e-3


class TestBucketing:
    LENGTHS = np.random.default_rng(0).integers(20, 600, size=500)

    def sampler(self, **options) -> DurationBucketBatchSampler:
        return DurationBucketBatchSampler(
            lambda epoch: self.LENGTHS, **{"max_frames": 3000, "max_items": 16} | options
        )

    def test_every_item_once_within_the_budget(self):
        batches = list(self.sampler())
        assert sorted(index for batch in batches for _, index in batch) == list(range(500))
        assert all(
            len(batch) <= 16 and len(batch) * max(self.LENGTHS[i] for _, i in batch) <= 3000 for batch in batches
        )
        padded = sum(len(batch) * max(self.LENGTHS[i] for _, i in batch) for batch in batches)
        assert self.LENGTHS.sum() / padded > 0.9

    def test_a_too_long_item_is_alone(self):
        batches = list(self.sampler(max_frames=300))
        assert all(len(batch) == 1 or len(batch) * max(self.LENGTHS[i] for _, i in batch) <= 300 for batch in batches)
        assert sorted(index for batch in batches for _, index in batch) == list(range(500))

    def test_order_depends_on_seed_and_epoch(self):
        one, two = self.sampler(seed=1), self.sampler(seed=1)
        assert list(one) == list(two) and list(one) == list(one)
        one.set_epoch(1)
        assert list(one) != list(two) and {epoch for batch in one for epoch, _ in batch} == {1}
        assert list(self.sampler(seed=2)) != list(two)

    def test_number_of_batches_is_the_same_in_every_epoch(self):
        sampler = DurationBucketBatchSampler(lambda epoch: self.LENGTHS * (1 + epoch % 3), max_frames=3000)
        counts = set()
        for epoch in range(6):
            sampler.set_epoch(epoch)
            counts.add(len(list(sampler)))
        assert counts == {len(sampler)}

    def test_processes_share_the_batches(self):
        whole = list(self.sampler())
        parts = [list(self.sampler(rank=rank, world_size=3)) for rank in range(3)]
        assert len({len(part) for part in parts}) == 1
        woven = [batch for group in zip(*parts, strict=True) for batch in group]
        assert woven[: len(whole)] == whole
        assert woven[len(whole) :] == whole[: len(woven) - len(whole)]

    def test_workers_change_nothing(self, clips, tokenizer):
        dataset = make_dataset(clips, tokenizer, EVERYTHING, seed=1)
        sampler = DurationBucketBatchSampler(dataset.lengths, max_frames=200, max_items=4)
        collate = SpeechRecognitionCollator()
        for epoch in range(2):
            batches = []
            for workers in (0, 2):
                loader = EpochDataLoader(dataset, batch_sampler=sampler, collate_fn=collate, num_workers=workers)
                loader.set_epoch(epoch)
                batches.append(list(loader))
            assert len(batches[0]) > 2
            assert all(same_item(left, right) for left, right in zip(*batches, strict=True))


class TestCollator:
    def test_padding(self, clips, tokenizer):
        dataset = make_dataset(clips, tokenizer)
        batch = next(
            iter(DataLoader(dataset, batch_size=12, collate_fn=SpeechRecognitionCollator(pad_to_multiple_of=8)))
        )
        lengths = [dataset[index]["input_features"].shape[0] for index in range(12)]
        assert batch["attention_mask"].sum(1).tolist() == lengths
        assert batch["input_features"].shape[1] % 8 == 0
        assert (batch["input_features"][batch["attention_mask"] == 0] == 0).all()
        assert batch["labels"].shape == (12, 1)

    def test_labels_are_padded_with_minus_100(self):
        items = [{"input_features": torch.zeros(3, 4), "labels": torch.tensor(ids)} for ids in ([1, 2], [3])]
        assert SpeechRecognitionCollator()(items)["labels"].tolist() == [[1, 2], [3, -100]]
