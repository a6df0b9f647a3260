"""The network: batching, kernels, saving, losses, expert routing, over every option of the configuration."""

import hashlib
import math

import pytest
import torch
from tiny_wenet_u2pp import BASE, VARIANTS, VOCABULARY, pad, pad_labels, tiny_features, tiny_model

from hf_speechllm.models.configuration_wenet_u2pp import WenetU2ppConfig
from hf_speechllm.models.conformer import (
    EncoderSelfAttention,
    chunk_attention_mask,
    sinusoidal_positions,
)
from hf_speechllm.models.modeling_wenet_u2pp import (
    WenetU2ppForSpeechRecognition,
    frame_labels,
    reverse_labels,
)


LENGTHS = (61, 23, 90, 15)
LABELS = [[2, 3, 3, 5], [7], [9, 2, 11, 4, 5, 6], [6, 5]]


def close(actual, expected, atol=2e-5):
    torch.testing.assert_close(actual, expected, atol=atol, rtol=1e-5)


def without_dropout(**changes) -> dict:
    rates = ("hidden", "positional", "attention", "decoder", "decoder_positional")
    return {f"{name}_dropout": 0.0 for name in rates} | changes


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# -- an item of a batch equals the item alone -------------------------------------------------------------------------
@pytest.mark.parametrize("variant", VARIANTS)
def test_alone_equals_in_a_padded_batch(variant):
    model = tiny_model(variant)
    pieces = tiny_features(*LENGTHS)
    alone = [model(**pad([piece]), labels=pad_labels([row])) for piece, row in zip(pieces, LABELS, strict=True)]
    blank = model.config.pad_token_id
    for order in ([0, 1, 2, 3], [2, 3, 0, 1]):
        batch = pad([pieces[i] for i in order], extra=9)
        together = model(**batch, labels=pad_labels([LABELS[i] for i in order]))
        for row, i in enumerate(order):
            frames = alone[i].logits.shape[1]
            assert frames == int(model.model.encoder.output_lengths(torch.tensor(LENGTHS[i])))
            assert together.encoder_attention_mask[row].tolist() == [True] * frames + [False] * (
                together.logits.shape[1] - frames
            )
            close(together.logits[row, :frames], alone[i].logits[0])
            close(together.encoder_last_hidden_state[row, :frames], alone[i].encoder_last_hidden_state[0])
            assert bool((together.encoder_last_hidden_state[row, frames:] == 0).all())
            assert bool((together.logits[row, frames:].argmax(-1) == blank).all())
            if model.config.decoder_layers:
                tokens = len(LABELS[i]) + 1
                close(together.decoder_logits[row, :tokens], alone[i].decoder_logits[0])
            if model.config.reverse_weight:
                close(together.right_decoder_logits[row, :tokens], alone[i].right_decoder_logits[0])
        for name in ("loss", "loss_ctc", "loss_att"):
            if together.get(name) is not None:
                close(together[name], torch.stack([output[name] for output in alone]).mean(), atol=1e-4)


@pytest.mark.parametrize("variant", ["u2pp", "non-causal batch norm", "causal batch norm", "moe", "post-norm"])
def test_training_does_not_see_padding(variant):
    """Batch-norm statistics, losses and gradients with more padding around the same batch."""
    pieces, labels = tiny_features(40, 23, 31), pad_labels(LABELS[:3])
    found = []
    for extra in (0, 30):
        model = tiny_model(variant, **without_dropout(), use_dynamic_chunk=False).train()
        output = model(**pad(pieces, extra), labels=torch.nn.functional.pad(labels, (0, extra), value=-100))
        output.loss.backward()
        statistics = {n: b for n, b in model.named_buffers() if "running" in n}
        found.append((output.loss.detach(), gradients(model), statistics))
    close(found[0][0], found[1][0])
    for index in (1, 2):
        assert found[0][index].keys() == found[1][index].keys()
        for name, tensor in found[0][index].items():
            torch.testing.assert_close(tensor, found[1][index][name], atol=1e-4, rtol=1e-3, msg=name)


def test_upstream_padding_leaks_and_invariant_padding_does_not():
    pieces = tiny_features(40, 23)
    leaking = tiny_model("non-causal", padding="upstream")
    tight = tiny_model("non-causal")
    alone = tight(**pad(pieces[1:])).logits[0]
    close(leaking(**pad(pieces[1:])).logits[0], alone)
    close(tight(**pad(pieces)).logits[1, : len(alone)], alone)
    assert not torch.allclose(leaking(**pad(pieces)).logits[1, : len(alone)], alone, atol=1e-3)


@pytest.mark.parametrize("chunk,left", [(1, -1), (2, 0), (3, 1), (16, -1)])
@pytest.mark.parametrize("variant", ["u2pp", "absolute", "transformer"])
def test_alone_equals_in_a_batch_under_chunk_masks(variant, chunk, left):
    model, pieces = tiny_model(variant), tiny_features(*LENGTHS)
    options = {"decoding_chunk_size": chunk, "num_left_chunks": left}
    together = model(**pad(pieces), **options).logits
    for row, piece in zip(together, pieces, strict=True):
        alone = model(**pad([piece]), **options).logits[0]
        close(row[: len(alone)], alone)


@pytest.mark.parametrize("frames", [0, 1, 5, 6, 7, 10, 11])
@pytest.mark.parametrize("variant", ["u2pp", "conv2d6", "conv2d8", "linear", "absolute"])
def test_audio_shorter_than_a_window(variant, frames):
    model = tiny_model(variant)
    needed = model.config.right_context + 1
    expected = 0 if frames < needed else 1 + (frames - needed) // model.config.subsampling_rate
    for inputs in (pad(tiny_features(frames)), {"input_features": tiny_features(frames)[0][None]}):
        output = model(**inputs)
        assert int(output.encoder_attention_mask.sum()) == expected
        assert bool(torch.isfinite(output.logits).all())
        assert int((output.logits.argmax(-1) != 0)[~output.encoder_attention_mask].sum()) == 0


# -- kernels ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("chunk", [-1, 4])
def test_eager_equals_sdpa(variant, chunk):
    model = tiny_model(variant)
    inputs = pad(tiny_features(61, 33)) | {"labels": pad_labels(LABELS[:2])}
    results = []
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        assert model.model.encoder.layers[0].self_attn.config._attn_implementation == implementation
        model.zero_grad()
        output = model(**inputs, decoding_chunk_size=chunk)
        output.loss.backward()
        results.append((output, gradients(model)))
    (eager, eager_gradients), (sdpa, sdpa_gradients) = results
    close(eager.logits, sdpa.logits)
    close(eager.loss, sdpa.loss, atol=1e-4)
    assert eager_gradients.keys() == sdpa_gradients.keys()
    for name, gradient in eager_gradients.items():
        torch.testing.assert_close(gradient, sdpa_gradients[name], atol=1e-3, rtol=1e-3, msg=name)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["none", "padding", "chunks", "chunks and padding"])
@pytest.mark.parametrize("variant", ["u2pp", "relative grouped queries", "relative without table"])
def test_folded_attention_is_the_direct_formula(variant, kind, implementation):
    """softmax(((q + u) k^T + (q + v) p^T) / sqrt(d)) v in float64, every score on its own."""
    config = WenetU2ppConfig(**{**BASE, **VARIANTS[variant]})
    config._attn_implementation = implementation
    torch.manual_seed(0)
    attention = EncoderSelfAttention(config).double().eval()
    torch.nn.init.normal_(attention.pos_bias_u)
    torch.nn.init.normal_(attention.pos_bias_v)
    batch, time, dim = 2, 7, config.hidden_size
    hidden = torch.randn(batch, time, dim, dtype=torch.float64)
    table = sinusoidal_positions(torch.arange(time)[None], dim).double()
    if variant == "relative without table":
        table = torch.zeros_like(table)
    allowed = torch.ones(batch, 1, time, time, dtype=torch.bool)
    if "padding" in kind:
        allowed = allowed & (torch.arange(time) < torch.tensor([time, 5])[:, None])[:, None, None]
    mask = {"none": None, "padding": allowed[:, :, :1]}.get(kind)
    if "chunks" in kind:
        allowed = mask = allowed & chunk_attention_mask(time, 3, 1, hidden.device)
    with torch.no_grad():
        actual, _, _ = attention(hidden, mask, table)

        heads, size = attention.num_heads, attention.head_dim
        q, k, v = (getattr(attention, f"{n}_proj")(hidden).unflatten(-1, (-1, size)) for n in "qkv")
        p = attention.pos_proj(table).unflatten(-1, (-1, size))[0]
        rows = torch.zeros(batch, time, heads, size, dtype=torch.float64)
        for b in range(batch):
            for h in range(heads):
                kv = h // (heads // k.shape[2])
                u_bias, v_bias = attention.pos_bias_u[h], attention.pos_bias_v[h]
                for i in range(time):
                    keys = [j for j in range(time) if bool(allowed[b, 0, i, j])]
                    scores = torch.stack(
                        [((q[b, i, h] + u_bias) @ k[b, j, kv] + (q[b, i, h] + v_bias) @ p[j, h]) for j in keys]
                    )
                    weights = (scores / math.sqrt(size)).softmax(0)
                    rows[b, i, h] = sum(w * v[b, j, kv] for w, j in zip(weights, keys, strict=True))
        expected = attention.o_proj(rows.flatten(2))
    # The eager kernel takes its softmax in float32.
    atol = 1e-6 if implementation == "eager" else 1e-12
    torch.testing.assert_close(actual, expected, atol=atol, rtol=1e-10)


def test_chunk_mask_by_the_definition():
    for time, chunk, left in [(7, 3, -1), (7, 3, 0), (7, 2, 1), (5, 16, 0), (1, 1, 0), (9, 1, 2)]:
        mask = chunk_attention_mask(time, chunk, left, torch.device("cpu"))
        for i in range(time):
            first = 0 if left < 0 else max((i // chunk - left) * chunk, 0)
            last = min((i // chunk + 1) * chunk, time)
            assert mask[i].nonzero().flatten().tolist() == list(range(first, last))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("variant", ["u2pp", "moe", "transformer post-norm moe", "causal batch norm", "lite"])
def test_gradient_checkpointing_changes_no_gradient(variant, reentrant):
    inputs = pad(tiny_features(61, 33)) | {"labels": pad_labels(LABELS[:2])}
    results = []
    for checkpointing in (False, True):
        model = tiny_model(variant).train()
        if checkpointing:
            # Renamed in transformers 5.2x; the old name warns there.
            old = model.gradient_checkpointing_enable
            getattr(model, "activation_checkpointing_enable", old)({"use_reentrant": reentrant})
            assert all(layer.gradient_checkpointing for layer in model.model.encoder.layers)
            assert all(layer.gradient_checkpointing for layer in model.model.decoder.layers)
        torch.manual_seed(5)  # dropout and the dynamic chunk
        output = model(**inputs)
        output.loss.backward()
        results.append((output.loss.detach(), gradients(model)))
    close(results[0][0], results[1][0])
    assert results[0][1].keys() == results[1][1].keys()
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(gradient, results[1][1][name], atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("variant", ["moe", "moe top-1", "moe without bias", "transformer post-norm moe"])
def test_experts_implementations_agree(variant):
    inputs = pad(tiny_features(61, 33)) | {"labels": pad_labels(LABELS[:2])}
    model = tiny_model(variant)
    assert model.config._experts_implementation == "eager"
    results = {}
    for implementation in ("eager", "batched_mm", "grouped_mm"):
        model.set_experts_implementation(implementation)
        experts = model.model.encoder.layers[0].feed_forward.experts
        assert experts.config._experts_implementation == implementation
        model.zero_grad()
        output = model(**inputs)
        output.loss.backward()
        results[implementation] = (output.logits.detach(), output.decoder_logits.detach(), gradients(model))
    for implementation in ("batched_mm", "grouped_mm"):
        for index in (0, 1):
            close(results[implementation][index], results["eager"][index])
        assert results[implementation][2].keys() == results["eager"][2].keys()
        for name, gradient in results["eager"][2].items():
            actual = results[implementation][2][name]
            torch.testing.assert_close(actual, gradient, atol=2e-4, rtol=1e-3, msg=f"{implementation} {name}")


@pytest.mark.parametrize("name", ["num_experts_per_tok", "decoder_num_experts_per_tok"])
def test_mixture_of_experts_is_the_weighted_sum(name):
    """Top k of the raw logits, softmax over these alone, experts as dense layers."""
    model = tiny_model("moe", **{name: 2})
    layers = model.model.decoder.layers if name.startswith("decoder") else model.model.encoder.layers
    moe = layers[0].feed_forward
    hidden = torch.randn(2, 5, 16)
    with torch.no_grad():
        actual = moe(hidden)
        for b in range(2):
            for t in range(5):
                x = hidden[b, t]
                logits = moe.router.weight @ x
                chosen = sorted(range(len(logits)), key=lambda e: float(logits[e]), reverse=True)[:2]
                weights = torch.stack([logits[e] for e in chosen]).softmax(0)
                expected = torch.zeros(16)
                for weight, e in zip(weights, chosen, strict=True):
                    inner = moe.experts.act_fn(moe.experts.up_proj[e] @ x + moe.experts.up_proj_bias[e])
                    expected += weight * (moe.experts.down_proj[e] @ inner + moe.experts.down_proj_bias[e])
                close(actual[b, t], expected, atol=1e-6)


# -- saving -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("variant", VARIANTS)
def test_save_load_save_is_bit_equal(variant, tmp_path):
    model = tiny_model(variant)
    model.save_pretrained(tmp_path / "a")
    loaded, info = WenetU2ppForSpeechRecognition.from_pretrained(tmp_path / "a", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    loaded.save_pretrained(tmp_path / "b")
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert "model.safetensors" in files and "config.json" in files
    assert files == sorted(path.name for path in (tmp_path / "b").iterdir())
    for name in files:
        digests = {hashlib.sha256((tmp_path / side / name).read_bytes()).hexdigest() for side in "ab"}
        assert len(digests) == 1, name
    inputs = pad(tiny_features(40))
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in loaded.state_dict().items())
    close(loaded.eval()(**inputs).logits, model(**inputs).logits)


def test_sharded_save_is_the_same_model(tmp_path):
    model = tiny_model("moe")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    loaded = WenetU2ppForSpeechRecognition.from_pretrained(tmp_path)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in loaded.state_dict().items())


def test_tied_word_embeddings(tmp_path):
    model = tiny_model("tied")
    for head, decoder in (
        (model.decoder_head, model.model.decoder),
        (model.right_decoder_head, model.model.right_decoder),
    ):
        assert head.weight is decoder.embed_tokens.weight
    assert model.decoder_head.weight is not model.right_decoder_head.weight
    model.save_pretrained(tmp_path)
    loaded = WenetU2ppForSpeechRecognition.from_pretrained(tmp_path)
    assert loaded.decoder_head.weight is loaded.model.decoder.embed_tokens.weight
    assert loaded.right_decoder_head.weight is loaded.model.right_decoder.embed_tokens.weight
    untied = tiny_model("u2pp")
    assert untied.decoder_head.weight is not untied.model.decoder.embed_tokens.weight
    # The class itself must stay untouched: two models with different heads live side by side.
    tiny_model("ctc only").save_pretrained(tmp_path / "ctc")
    model.save_pretrained(tmp_path / "again")
    first, second = (tmp_path / name / "model.safetensors" for name in (".", "again"))
    assert first.read_bytes() == second.read_bytes()


# -- recorded outputs -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("variant", ["moe", "transformer post-norm moe", "grouped queries"])
def test_recorded_outputs(variant):
    model = tiny_model(variant)
    model.set_attn_implementation("eager")
    asked = {"output_hidden_states": True, "output_attentions": True, "output_router_logits": True}
    output = model(**pad(tiny_features(61, 33)), labels=pad_labels(LABELS[:2]), **asked)
    batch, frames, _ = output.logits.shape
    assert [tuple(h.shape) for h in output.hidden_states] == [(batch, frames, 16)] * 3
    assert len(output.attentions) == 2
    for weights in output.attentions:
        assert weights.shape == (batch, model.config.num_attention_heads, frames, frames)
        close(weights.sum(-1), torch.ones(weights.shape[:-1]))
        real = int(output.encoder_attention_mask[1].sum())
        assert float(weights[1, :, :, real:].detach().abs().max()) == 0.0
    if variant == "grouped queries":
        assert not output.router_logits and not output.decoder_router_logits
        return
    routed = 4 if variant == "moe" else 2  # both halves of a macaron block
    assert [tuple(r.shape) for r in output.router_logits] == [(batch * frames, 4)] * routed
    tokens = max(len(row) for row in LABELS[:2]) + 1
    assert [tuple(r.shape) for r in output.decoder_router_logits] == [(batch * tokens, 3)] * 3  # 2 left, 1 right
    counts = model.tokens_per_expert(output.router_logits, 2)
    assert counts.shape == (routed, 4) and counts.sum(1).tolist() == [batch * frames * 2] * routed
    for layer, logits in zip(counts, output.router_logits, strict=True):
        expected = [0] * 4
        for row in logits.tolist():
            for expert in sorted(range(4), key=row.__getitem__)[-2:]:
                expected[expert] += 1
        assert layer.tolist() == expected
    quiet = model(**pad(tiny_features(61, 33)))
    assert quiet.hidden_states is quiet.attentions is quiet.router_logits is None


# -- configuration ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "changes,message",
    [
        ({"encoder_type": "squeezeformer"}, "encoder_type.*'squeezeformer'"),
        ({"subsampling_type": "conv2d2"}, "subsampling_type"),
        ({"position_embedding_type": "rope"}, "position_embedding_type"),
        ({"attention_type": "rel"}, "attention_type"),
        ({"conv_norm_type": "group_norm"}, "conv_norm_type"),
        ({"norm_type": "none"}, "norm_type"),
        ({"decoder_norm_type": "none"}, "decoder_norm_type"),
        ({"mlp_type": "position_wise_feed_forward"}, "mlp_type"),
        ({"decoder_mlp_type": "x"}, "decoder_mlp_type"),
        ({"hidden_act": "os.system"}, "hidden_act"),
        ({"decoder_hidden_act": "swish"}, "decoder_hidden_act"),
        ({"padding": "same"}, "padding"),
        ({"num_attention_heads": 3}, "hidden_size 16"),
        ({"num_attention_heads": 0}, "heads 0"),
        ({"decoder_attention_heads": 5}, "decoder_attention heads 5"),
        ({"num_key_value_heads": 1}, "num_key_value_heads=1 needs head_dim"),
        ({"num_attention_heads": 4, "num_key_value_heads": 3, "head_dim": 4}, "key-value heads 3"),
        ({"num_key_value_heads": 0, "head_dim": 8}, "key-value heads 0"),
        ({"mlp_type": "moe", "num_experts": 2, "num_experts_per_tok": 3}, "num_experts_per_tok.*1..2.*3"),
        ({"mlp_type": "moe", "num_experts_per_tok": 0}, "num_experts_per_tok"),
        ({"decoder_mlp_type": "moe", "decoder_num_experts": 1}, "decoder_num_experts_per_tok"),
        ({"head_dim": 4}, "rel_selfattn.*head_dim 4"),
        ({"encoder_type": "transformer"}, "attention_type"),
        ({"conv_causal": False, "conv_kernel_size": 4}, "conv_kernel_size.*4"),
        ({"ctc_weight": 1.5}, "ctc_weight.*1.5"),
        ({"reverse_weight": -0.1}, "reverse_weight.*-0.1"),
        ({"label_smoothing": 2.0}, "label_smoothing"),
        ({"decoder_layers": 0}, "without a decoder"),
        ({"right_decoder_layers": 0}, "reverse_weight 0.3 needs right_decoder_layers"),
        ({"pad_token_id": 13}, "pad_token_id.*0..12.*13"),
        ({"bos_token_id": -1}, "bos_token_id"),
        ({"eos_token_id": 99}, "eos_token_id.*99"),
    ],
)
def test_contradictory_configurations_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        WenetU2ppConfig(**{**BASE, **changes})


@pytest.mark.parametrize("variant", VARIANTS)
def test_config_round_trip(variant, tmp_path):
    config = WenetU2ppConfig(**{**BASE, **VARIANTS[variant]})
    config.save_pretrained(tmp_path)
    loaded = WenetU2ppConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    assert WenetU2ppConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()


def test_config_derived_values():
    for kind, rate, context in (("linear", 1, 0), ("conv2d4", 4, 6), ("conv2d6", 6, 10), ("conv2d8", 8, 14)):
        config = WenetU2ppConfig(**{**BASE, "subsampling_type": kind})
        assert (config.subsampling_rate, config.right_context) == (rate, context)
        assert config.inputs_to_logits_ratio == 160 * rate
        assert config.seconds_per_frame == pytest.approx(rate / 100)
    assert (config.bos_token_id, config.eos_token_id) == (12, 12)
    assert WenetU2ppConfig().is_streamable is False and config.is_streamable is True


# -- losses -----------------------------------------------------------------------------------------------------------
EDGE_CASES = {
    "empty targets": ((40, 30), [[], []]),
    "one empty target": ((40, 30), [[3], []]),
    "one token": ((40,), [[5]]),
    "target longer than the audio": ((15, 40), [[3, 4, 5, 6, 7, 8], [2]]),
    "repeats that do not fit": ((15,), [[3, 3]]),
    "one feature frame": ((1,), [[3]]),
    "one feature frame, no text": ((1,), [[]]),
    "an empty item": ((40, 0, 30), [[3, 4], [], [2]]),
    "an empty item with a text": ((40, 0), [[3, 4], [5]]),
    "nothing at all": ((0,), [[]]),
}


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("case", EDGE_CASES)
@pytest.mark.parametrize("variant", ["u2pp", "moe", "absolute", "causal batch norm", "lite", "ctc only", "post-norm"])
def test_loss_and_gradients_stay_finite(variant, case, implementation):
    lengths, rows = EDGE_CASES[case]
    # One frame of context has no batch statistics to train on; evaluation mode keeps the layer defined.
    model = tiny_model(variant).train("batch norm" not in variant)
    model.set_attn_implementation(implementation)
    output = model(**pad(tiny_features(*lengths)), labels=pad_labels(rows))
    assert bool(torch.isfinite(output.loss))
    output.loss.backward()
    for name, gradient in gradients(model).items():
        assert bool(torch.isfinite(gradient).all()), name


def test_impossible_targets_count_zero_as_upstream():
    model = tiny_model(**without_dropout())
    short, long = tiny_features(15, 60)
    alone = model(**pad([long]), labels=pad_labels([[2, 3]])).loss_ctc
    both = model(**pad([long, short]), labels=pad_labels([[2, 3], [4, 5, 6, 7, 8]])).loss_ctc
    close(both, alone / 2)


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_label_smoothing_is_a_kl_divergence(smoothing, normalised):
    model = tiny_model(label_smoothing=smoothing, length_normalized_loss=normalised)
    logits = 3 * torch.randn(3, 5, VOCABULARY)
    targets = torch.tensor([[1, 2, 3, 4, 12], [12, -100, -100, -100, -100], [5, 5, 12, -100, -100]])
    total = 0.0
    for b in range(3):
        for n in range(5):
            if targets[b, n] == -100:
                continue
            target = torch.full((VOCABULARY,), smoothing / (VOCABULARY - 1))
            target[targets[b, n]] = 1 - smoothing
            divergence = torch.nn.KLDivLoss(reduction="none")(logits[b, n].log_softmax(-1), target)
            total += float(divergence.nan_to_num().sum())
    close(model._label_smoothing_loss(logits, targets), torch.tensor(total / (9 if normalised else 3)), atol=1e-4)


def test_joint_loss_is_the_weighted_sum():
    model = tiny_model(ctc_weight=0.3, reverse_weight=0.4, label_smoothing=0.1)
    pieces, labels = tiny_features(61, 33), pad_labels(LABELS[:2])
    output = model(**pad(pieces), labels=labels)
    counts = torch.tensor([4, 1])
    eos = model.config.eos_token_id
    _, left = frame_labels(labels, counts, eos, eos)
    _, right = frame_labels(reverse_labels(labels, counts), counts, eos, eos)
    attention = 0.6 * model._label_smoothing_loss(output.decoder_logits, left)
    attention = attention + 0.4 * model._label_smoothing_loss(output.right_decoder_logits, right)
    close(output.loss_att, attention)
    close(output.loss, 0.3 * output.loss_ctc + 0.7 * attention)
    ctc = torch.nn.functional.ctc_loss(
        output.logits.log_softmax(-1).transpose(0, 1),
        labels.clamp_min(0),
        output.encoder_attention_mask.sum(1),
        counts,
        reduction="none",
    )
    close(output.loss_ctc, ctc.mean())
    hits = (output.decoder_logits.argmax(-1) == left)[left != -100]
    close(output.accuracy, hits.float().mean())


def test_decoder_sees_only_the_past():
    """Changing a label changes nothing before it, in either reading direction."""
    model, pieces = tiny_model(), tiny_features(60)
    one = model(**pad(pieces), labels=torch.tensor([[2, 3, 4, 5]]))
    other = model(**pad(pieces), labels=torch.tensor([[2, 3, 9, 5]]))
    close(one.decoder_logits[:, :3], other.decoder_logits[:, :3])
    assert not torch.allclose(one.decoder_logits[:, 3], other.decoder_logits[:, 3], atol=1e-3)
    close(one.right_decoder_logits[:, :2], other.right_decoder_logits[:, :2])
    assert not torch.allclose(one.right_decoder_logits[:, 2], other.right_decoder_logits[:, 2], atol=1e-3)


def test_framing_and_reversing_labels():
    labels, counts = torch.tensor([[5, 6, 7], [8, -100, -100], [-100, -100, -100]]), torch.tensor([3, 1, 0])
    inputs, targets = frame_labels(labels, counts, bos=1, eos=2)
    assert inputs.tolist() == [[1, 5, 6, 7], [1, 8, 2, 2], [1, 2, 2, 2]]
    assert targets.tolist() == [[5, 6, 7, 2], [8, 2, -100, -100], [2, -100, -100, -100]]
    assert reverse_labels(labels, counts).tolist() == [[7, 6, 5], [8, -100, -100], [-100, -100, -100]]


def test_surplus_label_padding_changes_nothing():
    model, inputs = tiny_model(), pad(tiny_features(61, 33))
    narrow = model(**inputs, labels=pad_labels(LABELS[:2]))
    wide = model(**inputs, labels=torch.nn.functional.pad(pad_labels(LABELS[:2]), (0, 7), value=-100))
    assert torch.equal(narrow.loss, wide.loss) and narrow.decoder_logits.shape == wide.decoder_logits.shape


# -- the dynamic chunk ------------------------------------------------------------------------------------------------
def test_dynamic_chunk_follows_its_generator():
    model = tiny_model(**without_dropout(), use_dynamic_left_chunk=True).train()
    encoder = model.model.encoder
    before = torch.get_rng_state()
    draws = [encoder.draw_dynamic_chunk(120, torch.Generator().manual_seed(seed)) for seed in range(300)]
    assert draws == [encoder.draw_dynamic_chunk(120, torch.Generator().manual_seed(seed)) for seed in range(300)]
    assert torch.equal(torch.get_rng_state(), before)
    full = [chunk for chunk, left in draws if chunk == 120]
    assert 110 < len(full) < 190
    chunked = [(chunk, left) for chunk, left in draws if chunk != 120]
    assert {chunk for chunk, _ in chunked} <= set(range(1, 26)) and len({chunk for chunk, _ in chunked}) > 15
    assert all(0 <= left <= 119 // chunk for chunk, left in chunked) and any(left > 0 for _, left in chunked)
    for frames in (0, 1, 2, 3):
        chunk, _ = encoder.draw_dynamic_chunk(frames, torch.Generator().manual_seed(0))
        assert chunk >= 1


def test_training_uses_the_drawn_chunk():
    model, inputs = tiny_model(**without_dropout()).train(), pad(tiny_features(150, 90))
    frames, seen = 36, set()
    for seed in range(12):
        chunk, left = model.model.encoder.draw_dynamic_chunk(frames, torch.Generator().manual_seed(seed))
        drawn = model(**inputs, generator=torch.Generator().manual_seed(seed)).logits
        assert drawn.shape[1] == frames
        fixed = model(**inputs, decoding_chunk_size=-1 if chunk == frames else chunk, num_left_chunks=left).logits
        assert torch.equal(drawn, fixed)
        seen.add(chunk)
    assert len(seen) > 3


def test_training_without_a_generator_follows_the_global_seed():
    model, inputs = tiny_model().train(), pad(tiny_features(150, 90)) | {"labels": pad_labels(LABELS[:2])}
    losses = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        losses.append(model(**inputs).loss.item())
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize("variant", ["u2pp", "moe"])
def test_inference_leaves_the_global_generator_alone(variant):
    model, inputs = tiny_model(variant), pad(tiny_features(61, 33))
    before = torch.get_rng_state()
    first = model(**inputs, labels=pad_labels(LABELS[:2]))
    model.generate(**inputs)
    model.align(inputs["input_features"], pad_labels([[3], [4]]), inputs["attention_mask"])
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.loss, model(**inputs, labels=pad_labels(LABELS[:2])).loss)


def test_only_dynamic_models_listen_to_the_chunk_size():
    inputs = pad(tiny_features(61))
    full = tiny_model("full context only")
    assert torch.equal(full(**inputs, decoding_chunk_size=2).logits, full(**inputs).logits)
    static = tiny_model("static chunk")
    assert torch.equal(static(**inputs, decoding_chunk_size=7).logits, static(**inputs).logits)
    dynamic = tiny_model("u2pp")
    close(dynamic(**inputs, decoding_chunk_size=3).logits, static(**inputs).logits)
    assert not torch.allclose(dynamic(**inputs, decoding_chunk_size=3).logits, dynamic(**inputs).logits, atol=1e-3)
    assert not torch.allclose(dynamic(**inputs, decoding_chunk_size=3, num_left_chunks=0).logits,
                              dynamic(**inputs, decoding_chunk_size=3).logits, atol=1e-3)  # fmt: skip


# -- other precisions, adapters ---------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "variant", ["u2pp", "moe", "non-causal batch norm", "rms norms", "grouped queries", "conv2d8"]
)
def test_bfloat16(variant):
    model = tiny_model(variant).to(torch.bfloat16)
    inputs = pad(tiny_features(61, 33, 3))
    output = model(**inputs, labels=pad_labels([*LABELS[:2], []]))
    assert output.logits.dtype == torch.bfloat16
    assert bool(torch.isfinite(output.logits).all()) and bool(torch.isfinite(output.loss))
    output.loss.backward()
    assert all(bool(torch.isfinite(gradient).all()) for gradient in gradients(model).values())
    reference = tiny_model(variant)(**inputs, labels=pad_labels([*LABELS[:2], []]))
    assert abs(float(output.loss) - float(reference.loss)) < 0.1 * abs(float(reference.loss)) + 0.1
    for decoding in ("ctc_greedy", "attention", "attention_rescoring"):
        model.generate(**inputs, decoding=decoding, num_beams=3)


TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"]


def test_lora_targets_are_present():
    leaves = {name.rsplit(".", 1)[-1] for name, _ in tiny_model().named_modules()}
    assert set(TARGETS) <= leaves


def test_lora_merged_equals_unmerged():
    peft = pytest.importorskip("peft", reason="peft (extra `train`) is not installed")
    inputs = pad(tiny_features(61, 33)) | {"labels": pad_labels(LABELS[:2])}
    plain = tiny_model()(**inputs)
    adapted = peft.get_peft_model(tiny_model(), peft.LoraConfig(target_modules=TARGETS, r=2, init_lora_weights=False))
    unmerged = adapted.eval()(**inputs)
    assert not torch.allclose(unmerged.logits, plain.logits, atol=1e-2)
    merged = adapted.merge_and_unload().eval()(**inputs)
    close(merged.logits, unmerged.logits, atol=1e-4)
    close(merged.loss, unmerged.loss, atol=1e-3)
