"""The flows of CosyVoice 1, 2 and 3 against upstream: encoder, velocity network, solutions, streams, training loss."""

from pathlib import Path

import torch
from cosyvoice_flow import convert
from torch import Tensor
from transformers import AutoModel

import hf_speechllm  # noqa: F401  registers the Auto classes
from hf_speechllm.models.causal_token_to_mel import CausalTokenToMelModel
from hf_speechllm.models.flow_matching import FlowMatchingDraws, fixed_noise, time_steps
from hf_speechllm.models.modeling_cosyvoice_flow import CosyVoiceFlowModel, MelOverlap, continue_overlaps
from hf_speechllm.models.ragged_rows import length_mask
from hf_speechllm.models.token_to_mel import TokenToMelModel

from .case import Case


# Upstream's layout of spectrograms is (batch, bins, frames).
_TRAINING_INPUTS = ("speech_token", "speech_token_len", "speech_feat", "speech_feat_len", "embedding", "t", "z")


def check_flow(case: Case, work: Path) -> None:
    """Convert the pack of `case` into `work` and check every expected value."""
    convert(case.directory, work / "model")
    model = AutoModel.from_pretrained(work / "model").eval()
    # A padded batch is upstream's in training and in the single call of the velocity network.
    upstream = AutoModel.from_pretrained(work / "model", padding="upstream").eval()
    with torch.no_grad():
        check_velocity(case, upstream)
        if isinstance(model, CosyVoiceFlowModel):
            check_overlapping(case, model)
        else:
            check_causal(case, model)
        check_training(case, upstream)


def swapped(spectrogram: Tensor) -> Tensor:
    """`(b, m, t)` ↔ `(b, t, m)`."""
    return spectrogram.transpose(1, 2)


def check_velocity(case: Case, model: TokenToMelModel) -> None:
    """One call of the velocity network, and its attention in chunks where the case has it."""
    names = [f"est.{name}" for name in ("x", "mask", "mu", "t", "spks", "cond")]
    case.use(*names)
    noisy, mask, conditions, time, speaker, prompt = (case.tensors[name] for name in names)
    for name, streaming in (("est.out", False), ("est.out_streaming", True)):
        if name in case.tensors:
            velocity = model.estimator(
                swapped(noisy),
                swapped(conditions),
                speaker,
                swapped(prompt),
                model.estimator.embed_times(time),
                mask[:, 0],
                streaming,
            )
            case.compare(name, swapped(velocity))


def check_training(case: Case, model: TokenToMelModel) -> None:
    """Training loss with upstream's draws, and what leads to it."""
    values = {name.removeprefix("train."): case.tensors[name] for name in case.tensors if name.startswith("train.")}
    case.use(*(f"train.{name}" for name in (*_TRAINING_INPUTS, "cfg_rand")))
    tokens, mel = values["speech_token"], values["speech_feat"]
    # Of the prompt upstream keeps the frames only, not their number.
    prompt_frames = (values["cond"] != 0).any(dim=1).sum(dim=1)
    draws = FlowMatchingDraws(
        values["t"].flatten(),
        swapped(values["z"]),
        values["cfg_rand"] > model.config.condition_dropout,
        prompt_frames,
        streaming="streaming=True" in case.facts["tensors"]["train.loss"]["what"],
    )
    output = model(
        tokens,
        mel,
        values["embedding"],
        speech_token_mask=length_mask(values["speech_token_len"], tokens.shape[1]),
        mel_mask=length_mask(values["speech_feat_len"], mel.shape[1]),
        draws=draws,
    )
    case.compare("train.mu", swapped(output.conditions))
    case.compare("train.cond", swapped(output.prompt))
    case.compare("train.mask", output.mel_mask[:, None].to(values["mask"].dtype))
    case.compare("train.y", swapped(output.noisy))
    case.compare("train.pred", swapped(output.velocity))
    case.compare("train.loss", output.loss)


# -- version 1 --------------------------------------------------------------------------------------------------------


def check_overlapping(case: Case, model: CosyVoiceFlowModel) -> None:
    """Every call of upstream's inference, with the overlap of the call before."""
    for call in sorted({name.split(".")[0] for name in case.tensors if name.endswith(".cache_in")}):
        check_call(case, model, call)


def check_call(case: Case, model: CosyVoiceFlowModel, call: str) -> None:
    """One call of inference, stage by stage, and as a whole."""
    inputs = ("token", "prompt_token", "prompt_feat", "embedding", "cache_in", "noise")
    case.use(*(f"{call}.{name}" for name in inputs))
    tokens, prompt_tokens, prompt_mel, speaker, cache, noise = (case.tensors[f"{call}.{name}"] for name in inputs)

    hidden = model.encode(torch.cat([prompt_tokens, tokens], dim=1), None)
    case.compare(f"{call}.encoder_out", hidden)
    case.compare(f"{call}.encoder_proj", model.encoder_proj(hidden))
    read = model.read_inputs(tokens, None, prompt_tokens, None, prompt_mel, None, speaker)
    case.compare(f"{call}.spks", read.speaker)
    conditions, _ = model.conditions_of(read)
    overlaps = None
    if cache.shape[2]:
        overlaps = [MelOverlap(*(swapped(cache[..., part])[0] for part in (0, 1)))]
        start, conditions = continue_overlaps(swapped(noise), conditions, overlaps)
    else:
        start = swapped(noise)
    case.compare(f"{call}.z0", swapped(start))
    case.compare(f"{call}.mu", swapped(conditions))
    case.compare(f"{call}.cond", swapped(model.prompt_of(read, conditions.shape[1])))
    check_schedule(case, f"{call}.t_span", model)
    output = model.generate_mel(
        tokens,
        prompt_token_ids=prompt_tokens,
        prompt_mel=prompt_mel,
        speaker_embedding=speaker,
        noise=swapped(noise),
        overlaps=overlaps,
    )
    case.compare(f"{call}.feat", swapped(output.mel))
    found = output.overlaps[0]
    case.compare(f"{call}.cache_out", torch.stack([found.noise.T, found.conditions.T], dim=-1)[None])


def check_schedule(case: Case, name: str, model: TokenToMelModel) -> None:
    """The times of the solution: where the steps begin, and where the last one ends."""
    steps = time_steps(len(case.tensors[name]) - 1, model.config.time_schedule)
    case.compare(name, torch.tensor([time for time, _ in steps] + [sum(steps[-1])]))


# -- versions 2 and 3 -------------------------------------------------------------------------------------------------


def check_causal(case: Case, model: CausalTokenToMelModel) -> None:
    """The whole utterance, with and without chunks, and its beginnings: at once, and as pieces of a stream."""
    inputs = [f"inf.{name}" for name in ("token", "prompt_token", "prompt_feat", "embedding")]
    case.use(*inputs)
    tokens, prompt_tokens, prompt_mel, speaker = (case.tensors[name] for name in inputs)
    known = case.tensors["inf.rand_noise"]
    case.compare("inf.rand_noise", swapped(fixed_noise(known.shape[2], known.shape[1], known.device)), known)
    prompt = {"prompt_token_ids": prompt_tokens, "prompt_mel": prompt_mel, "speaker_embedding": speaker}

    state, pieces, done = model.start_stream(**prompt), [], 0
    calls = sorted(name.removesuffix(".feat") for name in case.tensors if name.endswith(".feat"))
    for call in calls:
        expected = case.tensors[f"{call}.feat"]
        streaming, is_last = call != "offline", not call.startswith("stream_chunk")
        following = 0 if is_last else model.config.num_lookahead_tokens
        encoded = (expected.shape[2] + prompt_mel.shape[1]) // model.config.token_mel_ratio
        count = encoded + following - prompt_tokens.shape[1]
        if f"{call}.encoder_out" in case.tensors:
            ids = torch.cat([prompt_tokens, tokens[:, :count]], dim=1)
            case.compare(f"{call}.encoder_out", encoder_output(model, ids, streaming, following))
        mel = model.generate_mel(tokens[:, :count], **prompt, streaming=streaming, is_last=is_last).mel
        case.compare(f"{call}.feat", swapped(mel))
        # A stream gives whole chunks, and those of upstream end where a chunk ends.
        if not is_last and encoded % model.chunk_tokens == 0 and count > done:
            piece, state = model.stream_mel(state, tokens[:, done:count])
            pieces, done = [*pieces, piece.mel], count
            case.compare(f"{call}.feat (stream)", swapped(torch.cat(pieces, dim=1)), expected)
    if "stream_all.feat" in case.tensors:
        piece, state = model.stream_mel(state, tokens[:, done:], is_last=True)
        mel = torch.cat([*pieces, piece.mel], dim=1)
        case.compare("stream_all.feat (stream)", swapped(mel), case.tensors["stream_all.feat"])


def encoder_output(model: CausalTokenToMelModel, ids: Tensor, streaming: bool, following: int) -> Tensor:
    """What the encoder says before it is projected (version 2) or repeated (version 3)."""
    if model.config.model_type == "cosyvoice3_flow":
        return model.encode(ids, None, following)
    return model.encode(ids, None, streaming, following)[0]
