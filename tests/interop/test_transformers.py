"""attn_implementation="jflash" in Hugging Face Transformers, against its own "sdpa" and "eager"."""

import itertools
import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

transformers = pytest.importorskip("transformers")
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from transformers import masking_utils  # noqa: E402
from transformers.integrations.sdpa_attention import sdpa_attention_forward  # noqa: E402

from interop import flash_attn_func  # noqa: E402
from interop.masks import Mask, Pattern, mask  # noqa: E402
from interop.operands import Operands, Options  # noqa: E402
from interop.transformers import attend, register  # noqa: E402
from tests.interop.cases import assert_follows, gradients, qkv  # noqa: E402

register()

SIZES = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MODELS = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=64, **no_dropout("pdrop"))
    ),
    "mistral": lambda: transformers.MistralForCausalLM(transformers.MistralConfig(**SIZES, sliding_window=5)),
    "gemma2": lambda: transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(
            **SIZES, head_dim=8, sliding_window=5, attn_logit_softcapping=2.0, query_pre_attn_scalar=8
        )
    ),
    "gpt_oss": lambda: transformers.GptOssForCausalLM(
        transformers.GptOssConfig(
            **SIZES,
            head_dim=8,
            sliding_window=5,
            num_local_experts=2,
            num_experts_per_tok=2,
            experts_implementation="eager",
        )
    ),
    "llama4": lambda: transformers.Llama4ForCausalLM(
        transformers.Llama4TextConfig(
            **SIZES,
            head_dim=8,
            intermediate_size_mlp=48,
            num_local_experts=2,
            attention_chunk_size=5,
            moe_layers=[],
            no_rope_layers=[1, 0],
        )
    ),
    "bert": lambda: transformers.BertForMaskedLM(
        transformers.BertConfig(
            **{n: x for n, x in SIZES.items() if n != "num_key_value_heads"}, **no_dropout("dropout_prob")
        )
    ),
}
PEERS = {"gemma2": "eager", "gpt_oss": "eager"}  # sdpa knows neither soft caps nor sinks


def no_dropout(ending):
    return {f"{name}_{ending}": 0.0 for name in ("attn", "embd", "resid", "hidden", "attention_probs")}


def model(name):
    """Random weights; the same every time."""
    torch.manual_seed(0)
    found = MODELS[name]().train()
    with torch.no_grad():
        for x in found.parameters():
            x.normal_(0, 0.3)
    return found


def tokens(batch=2, length=13):
    return torch.randint(3, 61, (batch, length), generator=torch.Generator().manual_seed(1))


def padding(side):
    """The first of two sequences of 13 tokens has 4 that are not there."""
    found = torch.ones(2, 13, dtype=torch.int64)
    found[0, slice(4) if side == "left" else slice(9, None)] = 0
    return found


def packed():
    return torch.cat([torch.arange(n) for n in (4, 1, 8)])[None]


INPUTS = {
    "dense": lambda: {"input_ids": tokens()},
    "left": lambda: {"input_ids": tokens(), "attention_mask": padding("left")},
    "right": lambda: {"input_ids": tokens(), "attention_mask": padding("right")},
    "packed": lambda: {"input_ids": tokens(1), "position_ids": packed(), "use_cache": False},
}


class Calls(TorchDispatchMode):
    """The operands and options of every attention."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.jflash.attention_forward.default:
            self.found.append(args)
        return func(*args, **(kwargs or {}))


def results(m, inputs):
    """Logits of the tokens that are there, and gradients of all weights."""
    logits = m(**inputs).logits
    if "attention_mask" in inputs:
        logits = logits * inputs["attention_mask"][..., None]
    weights = [x for x in m.parameters() if x.requires_grad]
    return [logits, *gradients(logits, weights)]


CASES = [
    *(("llama", kind) for kind in INPUTS),
    *(("gpt2", kind) for kind in ("dense", "left")),
    *(("mistral", kind) for kind in ("dense", "right", "packed")),
    *(("gemma2", kind) for kind in ("dense", "right")),
    ("gpt_oss", "right"),
    pytest.param("llama4", "left", marks=pytest.mark.slow),
    ("bert", "right"),
]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_logits_and_gradients(name, kind):
    inputs = INPUTS[kind]()
    m = model(name)
    m.set_attn_implementation("jflash")
    assert m.config._attn_implementation == "jflash"
    with Calls() as calls:
        ours = results(m, inputs)
    assert len(calls.found) == 2
    m.set_attn_implementation(PEERS.get(name, "sdpa"))
    low = results(m, inputs)
    ref = results(m.double(), inputs)
    names = ["logits", *(n for n, x in m.named_parameters() if x.requires_grad)]
    # The bias of keys adds one number to all scores of a row: its gradient is nothing but rounding.
    real = [one for one in zip(names, ours, low, ref, strict=True) if one[3].abs().max() > 1e-12]
    assert len(real) >= len(names) - 2
    assert_follows(*zip(*real, strict=True), torch.float32)


def test_packed_is_each_alone():
    """Also with a cache, where Transformers' masks do not tell, and by cumulative lengths."""
    m = model("mistral").eval()
    m.set_attn_implementation("sdpa")
    ids, starts = tokens(1), (0, 4, 5, 13)
    expected = torch.cat([m(input_ids=ids[:, i:j]).logits for i, j in itertools.pairwise(starts)], dim=1)
    m.set_attn_implementation("jflash")
    lengths = torch.tensor(starts, dtype=torch.int32)
    sums = {"cu_seq_lens_q": lengths, "cu_seq_lens_k": lengths.clone(), "max_length_q": 8, "max_length_k": 8}
    for options in ({"use_cache": False}, {"use_cache": True}, {"use_cache": True, **sums}):
        out = m(input_ids=ids, position_ids=packed(), **options)
        torch.testing.assert_close(out.logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_generate(name, cache):
    """Greedy tokens of a padded batch, the same as under sdpa."""
    m = model(name).eval()
    inputs = {"input_ids": tokens(), "attention_mask": padding("left")}
    found = []
    for implementation in ("jflash", "sdpa"):
        m.set_attn_implementation(implementation)
        out = m.generate(
            **inputs, max_new_tokens=4, do_sample=False, cache_implementation=cache, disable_compile=True,
            output_logits=True, return_dict_in_generate=True, eos_token_id=None,
        )  # fmt: skip
        found.append((out.sequences, torch.stack(out.logits)))
    (ours, logits), (expected, expected_logits) = found
    assert torch.equal(ours, expected)
    assert ours.shape == (2, 17)
    torch.testing.assert_close(logits, expected_logits, atol=1e-4, rtol=1e-4)


def test_kernels_get_limits_and_segments_instead_of_a_mask():
    m = model("mistral")
    m.set_attn_implementation("jflash")
    for kind, segmented in (("dense", False), ("right", True)):
        with Calls() as calls:
            m(**INPUTS[kind]())
        for args in calls.found:
            operands, options = (
                Operands(*args[: len(Operands._fields)]),
                Options(*args[len(Operands._fields) :]),
            )
            assert (options.left, options.right) == (4, 0)
            assert operands.mask is None
            assert (operands.q_segment_ids is not None) == segmented


def window(w):
    return masking_utils.sliding_window_causal_mask_function(w)


def islands(b, h, q, k):
    return q // 4 == k // 4


PACKED_IDS = torch.tensor([[0] * 4 + [1] + [2] * 8] * 2)
# name: (mask function, whether its pattern is known to us)
PATTERNS = {
    "causal": (masking_utils.causal_mask_function, True),
    "window": (window(4), True),
    "wide_window": (window(40), True),
    "window_of_one": (window(1), True),
    "both_ways": (masking_utils.bidirectional_mask_function, True),
    "both_ways_window": (masking_utils.sliding_window_bidirectional_mask_function(3), True),
    "packed": (
        masking_utils.packed_sequence_compatibility_function(
            masking_utils.causal_mask_function, packed().expand(2, -1), PACKED_IDS
        ),
        True,
    ),
    "packed_window": (
        masking_utils.packed_sequence_compatibility_function(window(3), packed().expand(2, -1), PACKED_IDS),
        True,
    ),
    "chunks": (masking_utils.chunked_causal_mask_function(4, torch.tensor([0, 2])), False),
    "islands": (masking_utils.or_masks(masking_utils.causal_mask_function, islands), False),
    "causal_islands": (masking_utils.and_masks(masking_utils.causal_mask_function, islands), False),
    "packed_twice": (
        masking_utils.and_masks(*[masking_utils.packed_sequence_mask_function(PACKED_IDS)] * 2),
        False,
    ),
}
WINDOWS = {"window": 4, "wide_window": 40, "window_of_one": 1}
# name: (queries, keys, queries' first position, keys' first position)
PLACES = {
    "prefill": (13, 13, 0, 0),
    "decode": (1, 13, 12, 0),
    "more": (5, 13, 8, 0),
    "rolling": (2, 6, 11, 7),
    "static": (5, 13, 0, 0),
    "static_decode": (1, 13, 6, 0),
}


def as_tensor(found, q_length, kv_length):
    """The [2, 1, Sq, Sk] mask that a result of `mask` stands for."""
    if found is None:  # the layer's is_causal, from the top left, but for a lone query
        causal = torch.ones(q_length, kv_length, dtype=torch.bool).tril()
        return (causal | torch.tensor(q_length == 1)).expand(2, 1, -1, -1)
    return found & True


# Transformers packs a prefill only.
PLACED = [(x, y) for x in PATTERNS for y in PLACES if "packed" not in x or y == "prefill"]


@pytest.mark.parametrize("padded", [None, "left", "right"])
@pytest.mark.parametrize(("pattern", "place"), PLACED)
def test_masks_are_those_of_sdpa(pattern, place, padded):
    function, known = PATTERNS[pattern]
    q_length, kv_length, q_offset, kv_offset = PLACES[place]
    where = dict(zip(("q_length", "kv_length", "q_offset", "kv_offset"), PLACES[place], strict=True))
    attention_mask = None if padded is None else padding(padded).bool()
    options = {"batch_size": 2, **where, "mask_function": function, "attention_mask": attention_mask}
    skip = place != "static_decode" and pattern in ("causal", *WINDOWS)  # as Transformers allows it
    found = mask(**options, allow_is_causal_skip=skip, local_size=WINDOWS.get(pattern))
    in_place = pattern == "both_ways" or q_offset + q_length == kv_offset + kv_length
    if known and in_place and (skip or q_length > 1):
        assert found is None or isinstance(found, Mask)
    else:
        assert not isinstance(found, Mask)
    expected = masking_utils.sdpa_mask(**options, allow_is_causal_skip=False)
    assert torch.equal(as_tensor(found, q_length, kv_length), expected.expand(2, 1, -1, -1))


def test_mask_is_a_tensor():
    found = Mask(Pattern(left=2, right=0), (2, 1, 5, 7), "cpu")
    assert isinstance(found, torch.Tensor)
    assert (found.shape, found.dtype, found.device.type) == ((2, 1, 5, 7), torch.bool, "cpu")
    assert found.contiguous() is found
    assert type(found & found) is type(found[:, :, -3:]) is torch.Tensor
    assert found[0, 0].tolist() == [[2 <= j - i + 2 <= 4 for j in range(7)] for i in range(5)]
    assert found.sum() == 2 * 5 * 3


def test_positions_on_the_device_are_not_read():
    found = mask(2, 1, 13, torch.tensor(12), attention_mask=padding("left").bool(), allow_is_causal_skip=False)
    assert torch.equal(found[:, 0, 0], padding("left").bool())


LAYER = torch.nn.Module()


def heads_first(**shape):
    return [x.transpose(1, 2) for x in qkv(2, **{"B": 1, "Sq": 13, "Hk": 4, "grad": False} | shape)]


def test_sequences_of_an_image_encoder():
    """No mask, not causal, cumulative lengths; a window and a soft cap on top."""
    q, k, v = heads_first()
    lengths = torch.tensor([0, 4, 5, 13], dtype=torch.int32)
    options = {"cu_seq_lens_q": lengths, "cu_seq_lens_k": lengths, "is_causal": False, "softcap": 1.5}
    out, nothing = attend(LAYER, q, k, v, None, sliding_window=4, **options)
    assert nothing is None
    for i, j in ((0, 4), (4, 5), (5, 13)):
        part = [x[:, :, i:j].transpose(1, 2) for x in (q, k, v)]
        expected = flash_attn_func(*part, window_size=(3, 3), softcap=1.5)
        torch.testing.assert_close(out[:, i:j], expected, atol=1e-5, rtol=1e-5)


def test_a_mask_has_the_window_in_it():
    """T5Gemma's encoder lets its mask reach one token further than its `sliding_window` says."""
    q, k, v = heads_first()
    lazy = Mask(Pattern(left=3, right=3), (1, 1, 13, 13), "cpu")
    ours, _ = attend(LAYER, q, k, v, lazy, sliding_window=3)
    theirs, _ = sdpa_attention_forward(LAYER, q, k, v, lazy.written_out(), sliding_window=3)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_sequences_with_more_keys_than_queries():
    """Causal from the bottom right of each."""
    q, _, _ = heads_first(Sq=6)
    _, k, v = heads_first()
    queries, keys = torch.tensor([0, 2, 3, 6]), torch.tensor([0, 4, 5, 13])
    out, _ = attend(LAYER, q, k, v, None, cu_seq_lens_q=queries, cu_seq_lens_k=keys)
    for n in range(3):
        i, j = (slice(cu[n], cu[n + 1]) for cu in (queries, keys))
        part = [x[:, :, s].transpose(1, 2) for x, s in ((q, i), (k, j), (v, j))]
        torch.testing.assert_close(out[:, i], flash_attn_func(*part, causal=True), atol=1e-5, rtol=1e-5)


def test_position_bias_is_added_and_has_a_gradient():
    q, k, v = heads_first()
    bias = torch.randn(1, 4, 13, 13, requires_grad=True)
    visible = masking_utils.sdpa_mask(1, 13, 13, mask_function=window(4), allow_is_causal_skip=False)
    lazy = Mask(Pattern(left=3, right=0), (1, 1, 13, 13), "cpu")
    inputs = dict(zip(("query", "key", "value"), (q, k, v), strict=True))
    ours, _ = attend(LAYER, **inputs, attention_mask=lazy, position_bias=bias)
    theirs, _ = sdpa_attention_forward(LAYER, **inputs, attention_mask=visible, position_bias=bias)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradients(ours, [bias]), gradients(theirs, [bias]), atol=1e-5, rtol=1e-5)


def test_position_bias_of_a_static_cache():
    """Its keys go on after the last query; no mask says so, only that the layer is causal."""
    q, _, _ = heads_first(Sq=6)
    _, k, v = heads_first()
    bias = torch.randn(1, 4, 6, 13)
    options = {"attention_mask": None, "is_causal": True, "position_bias": bias}
    ours, _ = attend(LAYER, q, k, v, **options)
    theirs, _ = sdpa_attention_forward(LAYER, q, k, v, **options)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_float_masks_are_added():
    q, k, v = heads_first()
    added = torch.randn(1, 1, 13, 13)
    ours, _ = attend(LAYER, q, k, v, added)
    theirs, _ = sdpa_attention_forward(LAYER, q, k, v, added)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_dropout_is_applied():
    q, k, v = heads_first()
    torch.manual_seed(3)
    out, _ = attend(LAYER, q, k, v, None, dropout=0.5, is_causal=False)
    torch.manual_seed(3)
    expected = flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), dropout_p=0.5)
    assert torch.equal(out, expected)


def test_compiles_whole():
    m = model("mistral").eval()
    m.set_attn_implementation("jflash")
    inputs = {**INPUTS["left"](), "use_cache": False}
    expected = m(**inputs).logits
    torch._dynamo.reset()
    found = torch.compile(m, fullgraph=True, backend="aot_eager")(**inputs).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    m, inputs = model("llama"), {**INPUTS["left"](), "use_cache": False}
    m.set_attn_implementation("jflash")
    expected = results(m, inputs)
    m.gradient_checkpointing_enable({"use_reentrant": reentrant})
    weights = [x for x in m.parameters() if x.requires_grad]
    with Calls() as calls:
        logits = m(**inputs).logits * inputs["attention_mask"][..., None]
        g = torch.Generator().manual_seed(0)  # the weights of `gradients`
        logits.backward(torch.randn(logits.shape, generator=g))
    assert len(calls.found) == 4
    for x, y in zip([logits, *(x.grad for x in weights)], expected, strict=True):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-5)


def test_from_pretrained(tmp_path):
    m = model("llama").eval()
    m.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="jflash").eval()
    assert loaded.config._attn_implementation == "jflash"
    with Calls() as calls:
        logits = loaded(input_ids=tokens()).logits
    assert len(calls.found) == 2
    m.set_attn_implementation("sdpa")
    torch.testing.assert_close(logits, m(input_ids=tokens()).logits, atol=1e-4, rtol=1e-4)


def test_other_names_stay_checked():
    """Ours can be any; the ones that are not ours are still looked for as packages."""
    register("of_my_own")
    m = model("llama")
    m.set_attn_implementation("of_my_own")
    assert m.config._attn_implementation == "of_my_own"
    with pytest.raises(ValueError, match="not_registered"):
        m.set_attn_implementation("not_registered")
    with pytest.raises(ImportError, match="FlashAttention2 doesn't seem to be installed"):
        m.set_attn_implementation("flash_attention_2")


def test_models_without_named_attention_raise():
    config = transformers.GPTJConfig(vocab_size=61, n_embd=32, n_layer=1, n_head=4, rotary_dim=4)
    config._attn_implementation = "jflash"
    with pytest.raises(ValueError, match="must be 'eager' for GPTJForCausalLM"):
        transformers.GPTJForCausalLM(config)


RAISES = [
    (
        {"output_attentions": True},
        NotImplementedError,
        "output_attentions=True needs attn_implementation='eager'",
    ),
    ({"indices": torch.zeros(1)}, NotImplementedError, "indices of Module must be None"),
    ({"cache": object()}, NotImplementedError, "cache of Module must be None"),
    (
        {"attention_mask": torch.ones(1, 13) > 0},
        ValueError,
        r"attention_mask.shape=\[1, 13\] must have 4 axes",
    ),
    (
        {"cu_seq_lens_q": torch.tensor([0, 4, 13]), "cu_seq_lens_k": torch.tensor([0, 5, 14])},
        ValueError,
        r"cu_seq_lens_k=\[0, 5, 14\] must start at 0, never fall, and end at 13 or before",
    ),
]


@pytest.mark.parametrize(("options", "error", "message"), RAISES, ids=[m[:30] for *_, m in RAISES])
def test_raises(options, error, message):
    with pytest.raises(error, match=message):
        attend(LAYER, *heads_first(), **{"attention_mask": None} | options)


def test_packed_lengths_are_of_one_row():
    lengths = torch.tensor([0, 4, 13])
    with pytest.raises(ValueError, match="batch=2 must be 1 with cu_seq_lens_q"):
        attend(LAYER, *heads_first(B=2), None, cu_seq_lens_q=lengths, cu_seq_lens_k=lengths)


def test_unknown_versions_are_refused(monkeypatch):
    monkeypatch.delattr(transformers.PreTrainedModel, "_check_and_adjust_attn_implementation")
    with pytest.raises(RuntimeError, match=r"transformers==\S+ must be as 5.23 is"):
        register()
