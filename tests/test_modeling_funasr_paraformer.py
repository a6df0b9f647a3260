"""Paraformer's network: batching, losses, sampler, hotwords, saving, over every option of the configuration."""

import math

import pytest
import torch
from tiny_funasr_paraformer import BASE, VARIANTS, pad, pad_labels, tiny_features, tiny_model

from hf_speechllm.models.cif import fire_rounded
from hf_speechllm.models.configuration_funasr_paraformer import FunasrParaformerConfig
from hf_speechllm.models.conformer_encoder import legacy_shift, relative_shift
from hf_speechllm.models.modeling_funasr_paraformer import (
    FunasrParaformerForSpeechRecognition,
    smoothed_cross_entropy,
)


LENGTHS = (41, 17, 60, 28)
LABELS = [[2, 3, 3, 5], [7], [9, 12, 11, 4, 5, 6], [6, 5]]
HOTWORDS = [[5, 6], [7], [3, 4, 8], [9], [12, 11]]


def close(actual, expected, atol=3e-5):
    torch.testing.assert_close(actual, expected, atol=atol, rtol=1e-4)


def hotwords_of(model) -> list[list[int]] | None:
    return HOTWORDS if model.config.hotword_type else None


# -- an item of a batch equals the item alone -------------------------------------------------------------------------
@pytest.mark.parametrize("variant", VARIANTS)
def test_alone_equals_in_a_padded_batch(variant):
    model = tiny_model(variant)
    pieces = tiny_features(model, *LENGTHS)
    hotwords = hotwords_of(model)
    alone = [model.generate(**pad([piece]), hotwords=hotwords, return_dict_in_generate=True) for piece in pieces]
    assert sum(int(output.raw_lengths) for output in alone) > 4, "the test needs tokens"
    for order in ([0, 1, 2, 3], [2, 3, 0, 1]):
        batch = pad([pieces[i] for i in order], extra=9)
        together = model.generate(**batch, hotwords=hotwords, return_dict_in_generate=True)
        for row, i in enumerate(order):
            single, count = alone[i], int(alone[i].sequences_lengths)
            raw, track = int(single.raw_lengths), int(single.track_lengths)
            assert (int(together.raw_lengths[row]), int(together.sequences_lengths[row])) == (raw, count)
            close(together.log_probs[row, :raw], single.log_probs[0], atol=2e-4)
            assert together.sequences[row, :count].tolist() == single.sequences[0].tolist()
            assert bool((together.sequences[row, count:] == model.config.pad_token_id).all())
            assert int(together.track_lengths[row]) == track
            close(together.alphas[row, :track], single.alphas[0, :track])
            close(together.token_timestamps[row, :count], single.token_timestamps[0], atol=1e-4)
            close(together.scores[row].float(), single.scores[0].float(), atol=1e-3)
            close(together.token_confidences[row, :count], single.token_confidences[0], atol=1e-3)


@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_of_a_batch_is_the_loss_of_its_items(variant):
    model = tiny_model(variant, sampling_ratio=0.0, mwer_weight=0.0, length_normalized_loss=False)
    pieces = tiny_features(model, *LENGTHS)
    together = model(**pad(pieces, extra=5), labels=pad_labels(LABELS))
    alone = [model(**pad([piece]), labels=pad_labels([row])) for piece, row in zip(pieces, LABELS, strict=True)]
    for name in ("loss_att", "loss_length", "loss_timestamp_length"):
        if getattr(together, name) is not None:
            close(getattr(together, name), torch.stack([getattr(output, name) for output in alone]).mean())
    for row, output in enumerate(alone):
        close(together.logits[row, : output.logits.shape[1]], output.logits[0], atol=2e-4)


@pytest.mark.parametrize("variant", ["paraformer", "bicif", "conformer, legacy", "conformer, shifted"])
def test_upstreams_padding_leaks(variant):
    """The switch that reproduces upstream's batch must change something, or it reproduces nothing."""
    model = tiny_model(variant)
    batch = pad(tiny_features(model, *LENGTHS), extra=9)
    right = model.generate(**batch, return_dict_in_generate=True).alphas
    model.config.padding = "upstream"
    for module in model.modules():
        if hasattr(module, "invariant"):
            module.invariant = False
    leaking = model.generate(**batch, return_dict_in_generate=True).alphas
    assert right.shape != leaking.shape or float((right - leaking).abs().max()) > 1e-3


# -- losses -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("variant", VARIANTS)
def test_training_step_reaches_every_weight(variant):
    model = tiny_model(variant).train()
    batch = pad(tiny_features(model, *LENGTHS))
    extra = {}
    if model.config.hotword_type:
        extra["hotword_ids"] = pad_labels([*HOTWORDS, [model.config.bos_token_id]])
    output = model(**batch, labels=pad_labels(LABELS), **extra)
    output.loss.backward()
    unused = {name for name, p in model.named_parameters() if p.grad is None}
    if model.config.hotword_type == "seaco":
        # Without hotword labels this is the plain recogniser's training.
        assert all(name.startswith(("model.bias_", "model.seaco_decoder.", "hotword_head.")) for name in unused)
    else:
        # The sampler shows labels only where the first pass is wrong; without one nobody embeds anything.
        assert unused <= {"model.decoder.embed_tokens.weight"}
        assert not unused or model.config.sampling_ratio == 0
    assert math.isfinite(float(output.loss.detach()))
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or bool(parameter.grad.isfinite().all()), name


def test_smoothed_cross_entropy_is_upstreams_kl_divergence():
    logits = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([[1, 5, -100], [2, -100, -100]])
    distribution = torch.full((3, 7), 0.1 / 6).scatter(1, torch.tensor([[1], [5], [2]]), 0.9)
    real = logits[targets != -100].log_softmax(-1)
    expected = torch.nn.functional.kl_div(real, distribution, reduction="sum")
    close(smoothed_cross_entropy(logits, targets, 0.1, per_token=True), expected / 3)
    close(smoothed_cross_entropy(logits, targets, 0.1, per_token=False), expected / 2)
    optimum = distribution.log()[None]
    close(smoothed_cross_entropy(optimum, torch.tensor([[1, 5, 2]]), 0.1, True), torch.tensor(0.0), atol=1e-6)
    close(smoothed_cross_entropy(logits, targets, 0.0, True), torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten()))  # fmt: skip


def test_parts_of_the_loss_add_up():
    model = tiny_model("ctc", timestamp_head="cnn", mwer_weight=0.3, predictor_weight=0.7)
    batch = pad(tiny_features(model, *LENGTHS))
    output = model(**batch, labels=pad_labels(LABELS), generator=torch.Generator().manual_seed(0))
    expected = 0.3 * output.loss_ctc + 0.7 * output.loss_att + 0.3 * output.loss_mwer
    close(output.loss, expected + 0.7 * (output.loss_length + 0.5 * output.loss_timestamp_length))
    # The length loss compares the weights' sum before scaling with the tokens, end mark included.
    hidden, mask = output.encoder_last_hidden_state, output.encoder_attention_mask
    counts = model.model.predictor.weights(model.model.predictor.convolve(hidden), mask).sum(-1)
    lengths = torch.tensor([len(row) + 1 for row in LABELS])
    close(output.loss_length, (counts - lengths).abs().mean())
    assert torch.equal(output.token_lengths, lengths)


def test_ctc_loss_leaves_out_what_cannot_be_spelled():
    model = tiny_model("ctc")
    pieces = tiny_features(model, 30, 2)
    both = model(**pad(pieces), labels=pad_labels([[2, 3], [4, 4, 4]]))
    close(both.loss_ctc, model(**pad(pieces[:1]), labels=pad_labels([[2, 3]])).loss_ctc)
    none = model(**pad(pieces[1:]), labels=pad_labels([[4, 4, 4]]))
    assert float(none.loss_ctc.detach()) == 0.0


# -- sampler ----------------------------------------------------------------------------------------------------------
def sampled(model, predicted_ids, ratio, **options):
    """Which positions the sampler shows, for a first pass that gives `predicted_ids`."""
    model.config.sampling_ratio = ratio
    targets = pad_labels([[3, 4, 5, 6, 7, 8], [9, 10]])
    lengths = torch.tensor([6, 2])
    predicted = model.model.predictor(torch.randn(2, 30, 16), None, lengths)
    hidden = torch.randn(2, 30, 16)
    ids = torch.tensor(predicted_ids)
    first = torch.nn.functional.one_hot(ids, model.config.vocab_size).float()
    hook = model.lm_head.register_forward_hook(lambda module, inputs, output: first)
    mask = torch.ones(2, 30, dtype=torch.bool)
    options = {"hotwords": None, "permutations": None, "generator": None} | options
    embeddings, first_ids = model._sample_embeddings(predicted, targets, hidden, mask, **options)
    hook.remove()
    assert torch.equal(first_ids, ids)
    table = model.model.decoder.embed_tokens.weight[targets.clamp_min(0)]
    assert bool((embeddings[1, 2:] == 0).all())
    shown = (embeddings == table).all(-1) & (targets != -100)
    kept = (embeddings == predicted.embeddings).all(-1)
    assert bool((shown ^ kept)[targets != -100].all())
    return shown


def test_sampler_shows_a_share_of_the_wrong_tokens_at_any_position():
    model = tiny_model("paraformer")
    # 4 of 6 and 1 of 2 are wrong: floor(4 * 0.75) = 3 and floor(0.75) = 0 positions.
    first = [[3, 4, 1, 1, 1, 1], [9, 1, 1, 1, 1, 1]]
    orders = [torch.tensor([1, 0, 5, 2, 3, 4]), None]
    assert sampled(model, first, 0.75, permutations=orders).tolist() == [
        [True, True, False, False, False, True],
        [False] * 6,
    ]
    draws = [
        sampled(model, first, 0.75, generator=torch.Generator().manual_seed(seed)).sum(-1).tolist()
        for seed in range(5)
    ]
    assert draws == [[3, 0]] * 5
    everything = [[1] * 6, [1] * 6]
    assert sampled(model, everything, 1.0).sum(-1).tolist() == [6, 2]
    right = [[3, 4, 5, 6, 7, 8], [9, 10, 1, 1, 1, 1]]
    assert sampled(model, right, 1.0).sum(-1).tolist() == [0, 0]


def test_sampler_is_reproducible_and_counts_in_the_loss():
    model = tiny_model("paraformer", sampling_ratio=1.0)
    batch = pad(tiny_features(model, *LENGTHS))

    def loss(seed):
        return model(**batch, labels=pad_labels(LABELS), generator=torch.Generator().manual_seed(seed)).loss_att

    model.config.sampling_ratio = 0.6
    assert torch.equal(loss(1), loss(1))
    assert len({round(float(loss(seed).detach()), 5) for seed in range(6)}) > 1


def test_sampler_embeds_with_the_output_layer_where_embeddings_are_shared():
    model = tiny_model("shared embedding")
    assert model.model.decoder.embed_tokens is None
    batch = pad(tiny_features(model, *LENGTHS))
    output = model(**batch, labels=pad_labels(LABELS))
    rows = torch.autograd.grad(output.loss_att, model.lm_head.weight)[0]
    assert bool(rows.isfinite().all())


# -- training rule of the predictor -----------------------------------------------------------------------------------
@pytest.mark.parametrize("variant", ["paraformer", "bicif"])
def test_no_token_is_lost_in_training(variant):
    model = tiny_model(variant)
    lost = 0
    for seed in range(30):
        hidden = torch.randn(4, 50, 16, generator=torch.Generator().manual_seed(seed))
        lengths = torch.tensor([6, 9, 12, 17])
        for rule in ("exact", "upstream"):
            model.config.cif_training = rule
            embeddings = model.model.predictor(hidden, None, lengths).embeddings
            last = embeddings[torch.arange(4), lengths - 1]
            missing = int((last == 0).all(-1).sum())
            assert missing == 0 or rule == "upstream"
            lost += missing
    assert lost > 5, "upstream loses tokens; if not, the two rules are one"
    model.config.cif_training, model.config.cif_training_margin = "upstream", 2e-5
    assert bool(
        (model.model.predictor(hidden, None, lengths).embeddings[torch.arange(4), lengths - 1] != 0).any(-1).all()
    )


def test_dynamic_threshold_rounds_the_number_of_tokens_up():
    model = tiny_model("dynamic threshold")
    hidden = torch.randn(3, 33, 16, generator=torch.Generator().manual_seed(2))
    output = model.model.predictor(hidden, None)
    assert output.token_lengths.tolist() == output.token_counts.ceil().long().tolist()
    # The tokens share the whole weight evenly: each has beta = sum / ceil(sum).
    ones = torch.ones_like(hidden)
    alphas = model.model.predictor.weights(model.model.predictor.convolve(hidden), None)
    model.model.predictor.convolve = lambda states: hidden
    model.model.predictor.weights = lambda convolved, mask: alphas
    beta = output.token_counts / output.token_lengths
    embeddings = model.model.predictor(ones, None).embeddings
    for row, count in enumerate(output.token_lengths.tolist()):
        close(embeddings[row, :count], beta[row].expand(count, 16))


# -- edges ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("variant", VARIANTS)
def test_no_token_fires(variant):
    model = tiny_model(variant, cif_dynamic_threshold=False)
    model.model.predictor.alpha_proj.bias.data.fill_(-50.0)
    model.model.predictor.alpha_proj.weight.data.zero_()
    batch = pad(tiny_features(model, *LENGTHS))
    output = model.generate(**batch, hotwords=hotwords_of(model), return_dict_in_generate=True)
    assert output.sequences.shape == (4, 0) and output.sequences_lengths.tolist() == [0] * 4
    assert model(**batch).logits.shape == (4, 0, model.config.vocab_size)
    loss = model(**batch, labels=pad_labels(LABELS)).loss
    loss.backward()
    assert bool(loss.isfinite())
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("frames", [0, 1, 2])
def test_very_short_audio(variant, frames):
    model = tiny_model(variant)
    batch = pad(tiny_features(model, frames))
    output = model.generate(**batch, hotwords=hotwords_of(model), return_dict_in_generate=True)
    assert output.sequences.shape[1] <= frames + 1
    trained = model(**batch, labels=pad_labels([[3, 4]]))
    trained.loss.backward()
    assert bool(trained.loss.isfinite())
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("variant", VARIANTS)
def test_batch_with_an_empty_item_and_an_empty_text(variant):
    model = tiny_model(variant)
    batch = pad(tiny_features(model, 40, 0, 30))
    output = model.generate(**batch, hotwords=hotwords_of(model), return_dict_in_generate=True)
    assert int(output.sequences_lengths[1]) == 0
    assert int(output.sequences_lengths[0]) > 0
    trained = model(**batch, labels=pad_labels([[2, 3, 4], [5], []]))
    trained.loss.backward()
    assert bool(trained.loss.isfinite())
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters())
    nothing = model(**batch, labels=pad_labels([[], [], []]))
    assert bool(nothing.loss.isfinite())


def test_alphas_far_above_the_length():
    """Weights that sum to 40 for a text of two: finite, and every token has weight 1."""
    for variant in ("paraformer", "bicif", "first predictor"):
        model = tiny_model(variant)
        model.model.predictor.alpha_proj.bias.data.fill_(8.0)
        batch = pad(tiny_features(model, 60, 50))
        trained = model(**batch, labels=pad_labels([[2], [3, 4]]))
        trained.loss.backward()
        assert bool(trained.loss.isfinite()) and float(trained.loss_length.detach()) > 5
        assert model.generate(**batch).shape[1] > 40


# -- hotwords ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("variant", ["contextual", "seaco", "seaco, both directions"])
def test_hotwords_change_the_result_and_their_order_does_not(variant):
    model = tiny_model(variant)
    batch = pad(tiny_features(model, *LENGTHS))

    def run(hotwords):
        return model.generate(**batch, hotwords=hotwords, return_dict_in_generate=True).log_probs

    plain, biased = run(None), run(HOTWORDS)
    assert float((plain - biased).abs().max()) > 1e-2
    close(run(HOTWORDS[::-1]), biased, atol=2e-4)
    close(run([]), plain)
    with pytest.raises(ValueError, match="at least one token"):
        run([[3], []])


def test_hotwords_need_an_encoder():
    model = tiny_model("paraformer")
    with pytest.raises(ValueError, match="no hotword encoder"):
        model.generate(**pad(tiny_features(model, 20)), hotwords=[[3]])


def test_seaco_keeps_the_recogniser_where_the_hotword_decoder_claims_nothing():
    model = tiny_model("seaco")
    batch = pad(tiny_features(model, *LENGTHS))
    model.hotword_head.bias.data[19] = 100.0
    plain = model.generate(**batch, return_dict_in_generate=True)
    biased = model.generate(**batch, hotwords=HOTWORDS, return_dict_in_generate=True)
    close(plain.log_probs, biased.log_probs)
    model.hotword_head.bias.data[19] = 0.0
    model.hotword_head.bias.data[5] = 100.0
    claimed = model.generate(**batch, hotwords=HOTWORDS, return_dict_in_generate=True)
    real = torch.arange(claimed.raw_sequences.shape[1]) < claimed.raw_lengths[:, None]
    assert bool((claimed.raw_sequences[real] == 5).all())
    ignored = model.generate(**batch, hotwords=HOTWORDS, hotwords_score=0.0, return_dict_in_generate=True)
    close(plain.log_probs, ignored.log_probs)


def test_seaco_training_targets_the_hotword_decoder():
    model = tiny_model("seaco")
    batch = pad(tiny_features(model, *LENGTHS))
    labels = pad_labels(LABELS)
    options = {
        "labels": labels,
        "hotword_ids": pad_labels([*HOTWORDS, [1]]),
        "hotword_labels": torch.where(labels == 5, labels, torch.where(labels == -100, labels, 19)),
    }
    output = model(**batch, **options, generator=torch.Generator().manual_seed(0))
    close(output.loss, output.loss_hotword + 0.01 * output.loss_att)
    output.loss.backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None]
    assert all(name.startswith(("model.predictor.",)) for name in missing), missing
    model.config.seaco_train_decoder = False
    close(model(**batch, **options).loss, output.loss_hotword)
    with pytest.raises(ValueError, match="hotword_labels"):
        tiny_model("contextual")(**pad(tiny_features(tiny_model("contextual"), 9)), **options)


# -- shifts of the conformer ------------------------------------------------------------------------------------------
def test_relative_shifts_are_those_of_espnet():
    """The textbook way: pad with a column of zeros and view the matrix anew."""

    def shifted(scores):
        batch, heads, rows, columns = scores.shape
        padded = torch.cat([scores.new_zeros(batch, heads, rows, 1), scores], -1)
        return padded.view(batch, heads, columns + 1, rows)[:, :, 1:].reshape(batch, heads, rows, columns)

    for frames in (1, 2, 7):
        wide = torch.randn(2, 3, frames, 2 * frames - 1)
        assert torch.equal(relative_shift(wide), shifted(wide)[..., :frames])
        square = torch.randn(2, 3, frames, frames)
        assert torch.equal(legacy_shift(square), shifted(square))


# -- saving, kernels, configuration -----------------------------------------------------------------------------------
@pytest.mark.parametrize("variant", VARIANTS)
def test_save_and_load(variant, tmp_path):
    model = tiny_model(variant)
    model.save_pretrained(tmp_path / "first")
    again, report = FunasrParaformerForSpeechRecognition.from_pretrained(tmp_path / "first", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    again.save_pretrained(tmp_path / "second")
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("first", "second"))
    assert first == second
    batch = pad(tiny_features(model, *LENGTHS))
    close(again.eval().generate(**batch), model.generate(**batch), atol=0)


@pytest.mark.parametrize("variant", ["paraformer", "bicif", "seaco", "conformer, legacy", "contextual"])
def test_kernels_agree(variant):
    model = tiny_model(variant)
    batch = pad(tiny_features(model, *LENGTHS))
    eager = tiny_model(variant)
    eager.set_attn_implementation("eager")
    options = {"hotwords": hotwords_of(model), "return_dict_in_generate": True}
    close(model.generate(**batch, **options).log_probs, eager.generate(**batch, **options).log_probs, atol=2e-4)
    if model.config.encoder_type == "sanm":
        outputs = eager(**batch, output_hidden_states=True, output_attentions=True)
        assert len(outputs.attentions) == model.config.num_hidden_layers
        assert outputs.attentions[0].shape == (4, 2, 60, 60)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("variant", ["bicif", "decoder without cross-attention", "conformer, legacy", "contextual"])
def test_gradient_checkpointing_changes_no_gradient(variant, reentrant):
    rates = ("hidden", "attention", "positional", "cif", "decoder", "decoder_positional", "decoder_self_attention")
    dropout = {f"{name}_dropout": 0.0 for name in (*rates, "decoder_cross_attention")}
    results = []
    for checkpointing in (False, True):
        model = tiny_model(variant, **dropout).train()
        if checkpointing:
            old = model.gradient_checkpointing_enable
            getattr(model, "activation_checkpointing_enable", old)({"use_reentrant": reentrant})
            assert all(layer.gradient_checkpointing for layer in model.model.encoder.layers)
            assert all(layer.gradient_checkpointing for layer in model.model.decoder.layers)
        batch = pad(tiny_features(model, *LENGTHS))
        if reentrant:
            batch["input_features"].requires_grad_()
        output = model(**batch, labels=pad_labels(LABELS), generator=torch.Generator().manual_seed(0))
        output.loss.backward()
        results.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert results[0].keys() == results[1].keys()
    for name, gradient in results[0].items():
        close(results[1][name], gradient)


def test_bfloat16_predictor_stays_in_float32_sums():
    model = tiny_model("paraformer")
    batch = pad(tiny_features(model, *LENGTHS))
    with torch.no_grad():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = model(**batch)
        whole = model(**batch)
    assert output.alphas.dtype == torch.float32
    assert float((output.alphas.sum(-1) - whole.alphas.sum(-1)).abs().max()) < 0.5


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("encoder_type", "rnn"),
        ("cif_integration", "parallel"),
        ("num_attention_heads", 3),
        ("decoder_attention_heads", 0),
        ("input_size", 13),
        ("fsmn_shift", 9),
        ("cif_groups", 5),
        ("decoder_layers", 0),
        ("chunk_size", [5, 10]),
        ("ctc_weight", 1.5),
        ("eos_token_id", 23),
        ("num_timestamp_prediction_layers", 2),
        ("mwer_num_candidates", 1),
    ],
)
def test_configuration_names_what_is_wrong(field, value):
    changes = {"mwer_weight": 1.0} if field == "mwer_num_candidates" else {}
    with pytest.raises(ValueError, match=field):
        FunasrParaformerConfig(**{**BASE, **changes, field: value})


def test_peaks_of_the_timestamp_head_are_the_loops():
    model = tiny_model("bicif")
    output = model.generate(**pad(tiny_features(model, 50)), return_dict_in_generate=True)
    close(output.alphas.sum(-1), output.raw_lengths.float(), atol=1e-4)
    close(output.peaks, fire_rounded(output.alphas, 1 - 1e-4, 1 - 1e-4).peaks)
    assert int((output.peaks >= 1 - 1e-4).sum()) == int(output.raw_lengths)
