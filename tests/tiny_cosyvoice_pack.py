"""A complete CosyVoice 2 pack of tiny networks, around the golden graphs."""

import json
import shutil
import sys
from pathlib import Path

import torch
from tiny_cosyvoice_flow import tiny_flow
from tiny_cosyvoice_hift import tiny_hift
from tiny_cosyvoice_lm import build


sys.path.insert(0, str(Path(__file__).parents[1] / "conversion"))
import cosyvoice_flow
import cosyvoice_hift
import cosyvoice_lm


GOLDEN = Path(__file__).parent / "golden" / "cosyvoice"
CODES = 6561
YAML = """sample_rate: 24000
chunk_size: 4
token_mel_ratio: 2
{llm}
flow: !new:cosyvoice.flow.flow.CausalMaskedDiffWithXvec
    input_size: 16
    output_size: 80
    spk_embed_dim: 192
    output_type: 'mel'
    vocab_size: 6561
    input_frame_rate: 25
    only_mask_loss: True
    token_mel_ratio: !ref <token_mel_ratio>
    pre_lookahead_len: 3
    encoder: !new:cosyvoice.transformer.upsample_encoder.UpsampleConformerEncoder
        output_size: 16
        attention_heads: 2
        linear_units: 20
        num_blocks: 2
        dropout_rate: 0.1
        positional_dropout_rate: 0.1
        attention_dropout_rate: 0.1
        normalize_before: True
        input_layer: 'linear'
        pos_enc_layer_type: 'rel_pos_espnet'
        selfattention_layer_type: 'rel_selfattn'
        input_size: 16
        use_cnn_module: False
        macaron_style: False
        static_chunk_size: !ref <chunk_size>
    decoder: !new:cosyvoice.flow.flow_matching.CausalConditionalCFM
        in_channels: 240
        n_spks: 1
        spk_emb_dim: 80
        cfm_params: !new:omegaconf.DictConfig
            content:
                sigma_min: 1e-06
                solver: 'euler'
                t_scheduler: 'cosine'
                training_cfg_rate: 0.2
                inference_cfg_rate: 0.7
                reg_loss_type: 'l1'
        estimator: !new:cosyvoice.flow.decoder.CausalConditionalDecoder
            in_channels: 320
            out_channels: 80
            channels: [16]
            dropout: 0.0
            attention_head_dim: 4
            n_blocks: 1
            num_mid_blocks: 1
            num_heads: 2
            act_fn: 'gelu'
            static_chunk_size: !ref <chunk_size> * <token_mel_ratio>
            num_decoding_left_chunks: -1
hift: !new:cosyvoice.hifigan.generator.HiFTGenerator
    in_channels: 80
    base_channels: 16
    nb_harmonics: 8
    sampling_rate: !ref <sample_rate>
    nsf_alpha: 0.1
    nsf_sigma: 0.003
    nsf_voiced_threshold: 10
    upsample_rates: [8, 5, 3]
    upsample_kernel_sizes: [16, 11, 7]
    istft_params: {{n_fft: 16, hop_len: 4}}
    resblock_kernel_sizes: [3]
    resblock_dilation_sizes: [[1, 3]]
    source_resblock_kernel_sizes: [7, 7, 11]
    source_resblock_dilation_sizes: [[1], [1], [1]]
    lrelu_slope: 0.1
    audio_limit: 0.99
    f0_predictor: !new:cosyvoice.hifigan.f0_predictor.ConvRNNF0Predictor
        num_class: 1
        in_channels: 80
        cond_channels: 8
feat_extractor: !name:matcha.utils.audio.mel_spectrogram
    n_fft: 1920
    num_mels: 80
    sampling_rate: !ref <sample_rate>
    hop_size: 480
    win_size: 1920
    fmin: 0
    fmax: 8000
    center: False
get_tokenizer: !name:cosyvoice.tokenizer.tokenizer.get_qwen_tokenizer
    token_path: !ref <sample_rate>
allowed_special: 'all'
"""


def write_pack(folder: Path) -> None:
    """Write the pack to `folder`, which must not exist; one speaker has a recording, one has none."""
    folder.mkdir()
    lm = build(2, speech_vocab_size=CODES, text_vocab_size=300, end_of_prompt_id=261)
    sizes = {"vocab_size": CODES, "num_mel_bins": 80, "speaker_embedding_size": 192, "num_upsampled_layers": 4}
    flow = tiny_flow(2, **sizes)
    vocoder = tiny_hift(
        2,
        **{"num_mel_bins": 80, "upsample_rates": [8, 5, 3], "upsample_kernel_sizes": [16, 11, 7]},
        **{"resblock_kernel_sizes": [3], "resblock_dilation_sizes": [[1, 3]]},
        **{"source_resblock_kernel_sizes": [7, 7, 11], "source_resblock_dilation_sizes": [[1], [1], [1]]},
    )
    state = cosyvoice_lm.restore_weights(lm.state_dict(), lm.config)
    torch.save(cosyvoice_lm.compact(state), folder / "llm.pt")
    torch.save(cosyvoice_flow.restore_weights(flow.state_dict(), flow.config), folder / "flow.pt")
    torch.save(cosyvoice_hift.restore_weights(vocoder.state_dict(), vocoder.config), folder / "hift.pt")
    text = YAML.format(llm=cosyvoice_lm.upstream_yaml(lm.config))
    (folder / "cosyvoice2.yaml").write_text(text, encoding="utf-8")
    shutil.copy(GOLDEN / "s3_v2" / "speech_tokenizer_v2.onnx", folder)
    shutil.copy(GOLDEN / "campplus" / "campplus.onnx", folder)
    cosyvoice_lm.write_qwen_folder(folder / "CosyVoice-BlankEN", state, lm.config)
    write_tokenizer(folder / "CosyVoice-BlankEN")
    generator = torch.Generator().manual_seed(0)
    plain = {"embedding": torch.randn(1, 192, generator=generator)}
    prompt = {
        "prompt_text": torch.tensor([[5, 6]], dtype=torch.int32),
        "llm_prompt_speech_token": torch.tensor([[7, 8, 9]], dtype=torch.int32),
        "flow_prompt_speech_token": torch.tensor([[7, 8, 9]], dtype=torch.int32),
        "prompt_speech_feat": torch.randn(1, 6, 80, generator=generator),
        "llm_embedding": torch.randn(1, 192, generator=generator),
    }
    prompt["flow_embedding"] = prompt["llm_embedding"]
    prompt |= {f"{name}_len": torch.tensor([value.shape[1]]) for name, value in prompt.items() if "embed" not in name}
    torch.save({"中文女": plain, "mine": prompt}, folder / "spk2info.pt")


def write_tokenizer(folder: Path) -> None:
    """A byte-level vocabulary with two merges."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = iter(range(0x100, 0x200))
    names = [chr(byte) if byte in visible else chr(next(hidden)) for byte in range(256)]
    vocabulary = {name: number for number, name in enumerate([*names, "he", "ll"])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\nh e\nl l\n", encoding="utf-8")
    added = {"258": {"content": "<|endoftext|>", "special": True}}
    settings = {"added_tokens_decoder": added, "tokenizer_class": "Qwen2Tokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
