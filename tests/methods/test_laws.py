"""The mathematics of every method on every family: a new method is one row of METHODS here."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

import hfcompress.checkpoint.quantizer  # noqa: F401
from hfcompress.checkpoint.artifact import save
from hfcompress.checkpoint.describe import describe, diff
from hfcompress.checkpoint.errors import CompressionError
from hfcompress.checkpoint.structure import rebuild, twin
from hfcompress.layers import holds_codes
from hfcompress.layers.quantized import QuantLinear
from hfcompress.methods import (
    METHODS,
    Adapters,
    Cast,
    Distill,
    Heal,
    LayerDrop,
    LowRank,
    Method,
    PruneExperts,
    PruneHeads,
    PruneLayers,
    PruneNeurons,
    PruneVocab,
    PruneWeights,
    Quantize,
    QuantizeAware,
    QuantizeCache,
    Student,
    riding,
)
from hfcompress.surgery.units.cut import cut
from hfcompress.surgery.units.gates import gate
from hfcompress.surgery.units.verify import units_of
from tests import fresh
from tests.tiny import DECODERS, ENCODERS, tiny_model, tiny_tokenizer

KINDS = (*ENCODERS, *DECODERS)
# A word a token; batches hold 5 to 119.
WORDS = [f"word{number}" for number in range(128)]
# One row a method; lists are several ways to use it.
METHOD_ROWS: dict[str, list[Method]] = {
    "prune_heads": [
        PruneHeads(0.5),
        PruneHeads(0.5, scores="magnitude", ranking="global"),
        PruneHeads(0.5, scores="fisher", ranking="global", max_ratio=0.75),
        PruneHeads(0.5, scores="l1", repair=True, samples=16),
    ],
    "prune_neurons": [
        PruneNeurons(0.4),
        PruneNeurons(0.4, ranking="global", round_to=1),
        PruneNeurons(0.4, scores="taylor", iterations=2, round_to=1, samples=16),
        PruneNeurons(0.4, scores="activation", samples=16, repair=True),
    ],
    "prune_experts": [
        PruneExperts(0.5),
        PruneExperts(number=2, scores="magnitude"),
        PruneExperts(0.25, scores="random", seed=1),
    ],
    "prune_layers": [
        PruneLayers(0.5),
        PruneLayers(number=1, scores="angular"),
        PruneLayers(number=1, scores="loss", samples=8),
        PruneLayers(layers=[1]),
    ],
    "prune_vocab": [PruneVocab([" ".join(WORDS[5:120])])],
    "prune_weights": [
        PruneWeights(0.6),
        PruneWeights(0.5, scores="wanda", ranking="global", max_sparsity=0.9, samples=16),
        PruneWeights(pattern="2:4", scores="sparsegpt", repair=True, samples=16),
        PruneWeights(0.5, pattern="4x2", repair=True, samples=16),
    ],
    "low_rank": [
        LowRank(ratio=0.5),
        LowRank(rank=4),
        LowRank(energy=0.6),
        LowRank(ratio=0.5, whiten=True, samples=16),
        LowRank(ratio=0.5, ranking="global", whiten=True, repair=True, samples=16),
    ],
    "quantize": [
        Quantize(8),
        Quantize(4),
        Quantize(4, quant_type="fp4", use_double_quant=False),
        Quantize(8, threshold=6.0),
        Quantize(4, calibrate="rounding", use_double_quant=False, samples=16),
        Quantize(8, engine="hfcompress", embeddings=8),
        Quantize(3, engine="hfcompress", calibrate="scales", embeddings=6),
        Quantize(1, engine="hfcompress", group_size=16, bits_pattern={r".*\.0\..*": 2}),
        Quantize(4, smooth=True, samples=8),
        Quantize(4, engine="hfcompress", calibrate=True, samples=16),
        Quantize(engine="hfcompress", target_bits=6, samples=8),
        Quantize(4, engine="hfcompress", group_size=16, symmetric=False, embeddings=4, bits_pattern={r".*\.0\..*": 8}),
    ],
    "quantize_aware": [QuantizeAware(2), QuantizeAware(4, group_size=16, embeddings=4, warmup=0.2)],
    "quantize_cache": [QuantizeCache()],
    "cast": [Cast(), Cast("float16")],
    "student": [
        Student(every=2),
        Student(layers=[1]),
        Student(number=1),
        Student(architecture={"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2}),
    ],
    "adapters": [Adapters(r=4, merge=False), Adapters(target_modules=["query"])],
    "layer_drop": [LayerDrop(0.5), LayerDrop(0.3, grows=True)],
    "heal": [Heal(["norms"]), Heal(["biases", "embeddings"])],
    "distill": [
        Distill("me/teacher", temperature=3.0, alpha=0.2),
        Distill(["me/one", "me/two"], terms=["task", {"kl": 0.5}, {"hidden_mse": {"layers": {0: 1}, "embeddings": True}}]),
    ],
}
# What needs training does nothing alone, the models here have no experts, and encoders no cache: their laws are tests of
# their own.
ROWS = [
    method
    for methods in METHOD_ROWS.values()
    for method in methods
    if not method.needs_training and not isinstance(method, PruneExperts | QuantizeCache)
]


def stacked(model: nn.Module, kind: str) -> None:
    """Uneven heads and neurons, and factors, in one model; sizes that 4-bit kernels can still read are left."""
    PruneHeads(0.5, ranking="global").run(model, FewBatches(kind))
    PruneNeurons(0.3, ranking="global", round_to=32).run(model, FewBatches(kind))
    LowRank(rank=4, target_modules=[units.output for units in units_of(model, "heads")]).run(model, None)


class FewBatches:
    """A task in miniature: labelled random batches."""

    original = None

    def __init__(self, kind: str) -> None:
        self.causal = kind in DECODERS
        self.processor = tiny_tokenizer(WORDS[5:])  # special tokens are 0 to 4

    def batch(self, seed: int = 0, size: int = 8, length: int = 12) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(5, 120, (size, length), generator=generator)
        labels = ids if self.causal else torch.randint(0, 3, (size,), generator=generator)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}

    def batches(self, model: nn.Module, samples: int, batch_size: int = 8, seed: int = 0) -> Iterator[dict[str, torch.Tensor]]:
        for number in range(-(-samples // batch_size)):
            yield self.batch(number, batch_size)


def logits(model: nn.Module, kind: str) -> torch.Tensor:
    model.eval()
    batch = FewBatches(kind).batch(seed=99)
    batch.pop("labels")
    for module in model.modules():  # a plain bitsandbytes load repacks 4-bit codes into bfloat16 on some CPUs
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    with torch.no_grad():
        return model(**batch).logits.float()


def auto(kind: str) -> Any:
    return AutoModelForCausalLM if kind in DECODERS else AutoModelForSequenceClassification


def test_every_method_has_a_row() -> None:
    assert set(METHOD_ROWS) == set(METHODS)


@pytest.mark.parametrize("part", ["heads", "neurons"])
@pytest.mark.parametrize("kind", KINDS)
def test_cutting_a_unit_equals_silencing_it(kind: str, part: str) -> None:
    model = tiny_model(kind)
    for number, units in enumerate(units_of(model, part)):
        keep = torch.tensor([i for i in range(units.count) if i % (number + 2) != 0])
        gates = torch.zeros(units.count, 1)
        gates[keep] = 1
        handle = gate(model, units, lambda x, gates=gates: gates)
        silenced = logits(model, kind)
        handle.remove()
        before = logits(model, kind)
        cut(model, units, keep)
        assert not torch.allclose(silenced, before, atol=1e-4), "silencing must be felt, or the law says nothing"
        torch.testing.assert_close(logits(model, kind), silenced, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_full_rank_equals_dense(kind: str) -> None:
    model = tiny_model(kind)
    before = logits(model, kind)
    method = LowRank(rank=10**6)
    for units in units_of(model, "neurons"):
        # forced: at full rank the factors are larger than the layer, so the method itself would leave it alone
        from hfcompress.layers.low_rank import LowRankLinear
        from hfcompress.surgery.modules import swap

        old = model.get_submodule(units.output)
        matrix = old.weight.detach().T if type(old).__name__ == "Conv1D" else old.weight.detach()
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        assert method._rank(values, matrix.shape) == len(values)
        swap(model, units.output, LowRankLinear.from_dense(old, right * values.sqrt()[:, None], left * values.sqrt()))
    torch.testing.assert_close(logits(model, kind), before, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", ROWS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_reload_equals_the_original_twice(kind: str, method: Method, tmp_path: Any) -> None:
    model = tiny_model(kind)
    method.run(model, FewBatches(kind))
    check_reload(model, kind, tmp_path)


@pytest.mark.parametrize("last", [Quantize(8), Quantize(4), Quantize(8, engine="hfcompress", embeddings=8), Cast()], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_all_methods_on_one_model_reload(kind: str, last: Method, tmp_path: Any) -> None:
    model = tiny_model(kind)
    stacked(model, kind)
    last.run(model, None)
    check_reload(model, kind, tmp_path)


def check_reload(model: Any, kind: str, folder: Any) -> None:
    expected = logits(model, kind)
    save(model, None, folder / "once")
    assert diff(rebuild(twin(model), diff(model))) == diff(model)
    once = auto(kind).from_pretrained(folder / "once")
    assert torch.equal(logits(once, kind), expected)
    assert [told(edit, once.dtype) for edit in diff(once).items()] == [told(edit, once.dtype) for edit in diff(model).items()]
    assert getattr(once.config, "quantization_config", None) is None or once.config.quantization_config
    save(once, None, folder / "twice")
    assert torch.equal(logits(auto(kind).from_pretrained(folder / "twice"), kind), expected)
    base = AutoModel.from_pretrained(folder / "once").eval()
    batch = FewBatches(kind).batch(seed=99)
    batch.pop("labels")
    for module in base.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    with torch.no_grad():
        body = getattr(once, once.base_model_prefix)(**batch).last_hidden_state
        assert torch.equal(base(**batch).last_hidden_state, body)


def told(edit: tuple[str, Any], dtype: torch.dtype) -> tuple[str, Any]:
    """bitsandbytes' own config can't say that a layer computes in the dtype of its input, which is the model's."""
    name, fields = edit
    same = {"compute_dtype": fields["compute_dtype"] or str(dtype).removeprefix("torch.")} if "compute_dtype" in fields else {}
    return name, {**fields, **same}


@pytest.mark.parametrize("kind", DECODERS)
def test_generate_works_after_cutting_and_reloading(kind: str, tmp_path: Any) -> None:
    model = tiny_model(kind)
    stacked(model, kind)
    save(model, None, tmp_path)
    again = auto(kind).from_pretrained(tmp_path)
    ids = torch.tensor([[7, 8, 9]])
    expected = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert torch.equal(again.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0), expected)


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_bf16_load_is_the_model_cast_to_bf16(kind: str, tmp_path: Any) -> None:
    model = tiny_model(kind)
    stacked(model, kind)
    save(model, None, tmp_path)
    half = auto(kind).from_pretrained(tmp_path, dtype=torch.bfloat16)
    Cast().run(model, None)
    assert half.dtype == torch.bfloat16
    assert torch.equal(logits(half, kind), logits(model, kind))


LOUD = {
    "heads": [PruneHeads(0.5, ranking="global")],
    "low_rank_linear": [LowRank(rank=4)],
    "low_rank_embedding": [LowRank(rank=4, target_modules=["word_embeddings"])],
    "linear_4bit": [LowRank(rank=4, target_modules=["query"]), Quantize(4)],
    "linear_8bit": [LowRank(rank=4, target_modules=["query"]), Quantize(8)],
    "quant_linear": [Quantize(8, engine="hfcompress")],
    "quant_linear_of_4_bits": [Quantize(4, engine="hfcompress")],
    "quant_embedding": [Quantize(8, engine="hfcompress", embeddings=8, skip_modules=["dense", "query", "key"])],
    "quant_conv": [Quantize(8, convolutions=8, bits_pattern={".*": 16})],
}


def test_without_the_import_every_layer_kind_raises(tmp_path: Any) -> None:
    for name, methods in LOUD.items():
        model = tiny_model("vit" if name == "quant_conv" else "bert")
        for method in methods:
            method.run(model, FewBatches("bert"))
        save(model, None, tmp_path / name)
    program = (
        "import sys, transformers\n"
        "for folder in sys.argv[1:]:\n"
        "    auto = 'AutoModelForImageClassification' if 'conv' in folder else 'AutoModelForSequenceClassification'\n"
        "    try:\n"
        "        getattr(transformers, auto).from_pretrained(folder)\n"
        "    except (RuntimeError, ValueError) as error:\n"
        "        assert 'mismatch' in str(error), error\n"
        "        print('raised', folder)\n"
    )
    folders = [str(tmp_path / name) for name in LOUD]
    run = fresh.run([sys.executable, "-c", program, *folders], check=True)
    assert [line.split()[1] for line in run.stdout.splitlines() if line.startswith("raised")] == folders


PLAIN = {
    "student": [Student(every=2)],
    "even neurons": [PruneNeurons(0.5)],
    "int8": [Quantize(8)],
    "nf4": [Quantize(4)],
    "even neurons in int8": [PruneNeurons(0.5), Quantize(8)],
    "bf16": [Cast()],
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_plain_config_can_tell_needs_no_import(kind: str, tmp_path: Any) -> None:
    for name, methods in PLAIN.items():
        model = tiny_model(kind)
        for method in methods:
            method.run(model, FewBatches(kind))
        save(model, None, tmp_path / name)
        told = auto(kind).from_pretrained(tmp_path / name).config
        assert getattr(getattr(told, "quantization_config", None), "quant_method", None) != "hfcompress", name


def test_even_heads_are_plain_where_the_config_has_head_dim(tmp_path: Any) -> None:
    for kind in ("qwen3", "mistral"):
        model = tiny_model(kind)
        PruneHeads(0.5).run(model, FewBatches(kind))
        assert describe(model) == {}
        assert model.config.num_key_value_heads == 1


def dense_weight(layer: Any) -> torch.Tensor:
    """(out, in) in float32, of a dense layer or of what codes stand for."""
    import bitsandbytes as bnb

    if type(layer).__name__ == "Linear4bit":
        return bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    if isinstance(layer, QuantLinear):
        return layer.dequantised()
    if type(layer).__name__ == "Linear8bitLt":
        scale = layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB
        return layer.weight.data.float() * scale[:, None] / 127
    return layer.weight.detach().T if type(layer).__name__ == "Conv1D" else layer.weight.detach()


def half_step(dense: torch.Tensor, layer: Any) -> torch.Tensor:
    """The largest rounding error that codes may have, for every weight."""
    if isinstance(layer, QuantLinear):  # what a scale or an offset was rounded to in float16 comes on top
        step = layer.scale.float() * (0.5 + 2**-10 * 2**layer.bits) + (
            0 if layer.offset is None else layer.offset.abs() * 2**-11
        )
        return step.repeat_interleave(dense.shape[1] // step.shape[1], 1)
    if type(layer).__name__ == "Linear8bitLt":
        # the codes are computed in float16: its rounding comes on top, once for the weight and once for the quotient
        return dense.abs().amax(dim=1, keepdim=True) / 127 / 2 + dense.abs() * 2**-10
    state = layer.weight.quant_state
    codes = state.code.sort().values
    blocks = dense.reshape(-1, state.blocksize).abs().amax(dim=1, keepdim=True)
    step = blocks * (codes[1:] - codes[:-1]).max() / 2
    # scales that are quantised themselves, to 8 bits, may be off by a part in a hundred
    return (step + blocks * (0.02 if state.nested else 1e-6)).expand(-1, state.blocksize).reshape_as(dense)


OURS = [
    Quantize(8, engine="hfcompress"),
    Quantize(8, engine="hfcompress", group_size=16, symmetric=False),
    Quantize(4, engine="hfcompress"),
    Quantize(4, engine="hfcompress", group_size=8, symmetric=False),
    *(Quantize(bits, engine="hfcompress", group_size=16) for bits in (2, 3, 5, 6, 7)),
    *(Quantize(bits, engine="hfcompress", group_size=16, symmetric=False) for bits in (2, 3, 5)),
]


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
@pytest.mark.parametrize(
    "method", [Quantize(8), Quantize(4), Quantize(4, quant_type="fp4", use_double_quant=False), *OURS], ids=str
)
def test_quantisation_error_stays_within_half_a_step(kind: str, method: Quantize) -> None:
    model = tiny_model(kind)
    layer = model.get_submodule(units_of(model, "neurons")[0].projections[0])
    low, dense = method.quantized(layer), dense_weight(layer)
    error = (dense_weight(low) - dense).abs()
    assert (error <= half_step(dense, low)).all()
    assert error.max() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_distilling_from_itself_gives_zero_loss_and_zero_gradient(kind: str) -> None:
    model = tiny_model(kind)
    for module in model.modules():  # dropout would make the student another model than the teacher
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.config.attention_dropout = model.config.attention_probs_dropout_prob = 0.0
    with riding(model, [Distill(copy.deepcopy(model), alpha=1.0)], None):
        model.train()
        loss = model(**FewBatches(kind).batch()).loss
        loss.backward()
    assert loss.abs() < 1e-6
    assert max(p.grad.abs().max() for p in model.parameters() if p.grad is not None) < 1e-6


@pytest.mark.parametrize("bits", [None, 4, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_lora_is_the_identity_before_training_and_merging_changes_nothing(kind: str, bits: int | None) -> None:
    model = tiny_model(kind)
    if bits:
        Quantize(bits).run(model, None)
    before = logits(model, kind)
    with riding(model, [Adapters(r=4)], None):
        assert torch.equal(logits(model, kind), before)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.02)
        healed = logits(model, kind)
        assert not torch.equal(healed, before)
        wanted = {
            name: dense_weight(module.get_base_layer()) + oriented(module.get_delta_weight("default"), module)
            for name, module in model.named_modules()
            if hasattr(module, "get_delta_weight")
        }
    assert wanted
    assert not any("lora" in name for name, _ in model.named_parameters())
    for name, dense in wanted.items():
        layer = model.get_submodule(name)
        limit = half_step(dense, layer) if holds_codes(layer) else torch.full_like(dense, 1e-6)
        assert ((dense_weight(layer) - dense).abs() <= limit).all(), name
    if bits is None:
        torch.testing.assert_close(logits(model, kind), healed, atol=1e-5, rtol=1e-4)


def oriented(delta: torch.Tensor, module: Any) -> torch.Tensor:
    """PEFT gives the update as the base layer stores its weight: a Conv1D's is (in, out)."""
    return delta.T if type(module.get_base_layer()).__name__ == "Conv1D" else delta


@pytest.mark.parametrize("kind", KINDS)
def test_fading_gates_end_where_the_cut_model_begins(kind: str) -> None:
    model, cut_at_once = tiny_model(kind), tiny_model(kind)
    method = PruneHeads(0.5)
    method.run(cut_at_once, FewBatches(kind))
    keys = set(model.state_dict())
    with riding(model, [method], FewBatches(kind)) as tick:
        tick(0.0)
        torch.testing.assert_close(logits(model, kind), logits(tiny_model(kind), kind))
        assert set(model.state_dict()) == keys, "a checkpoint holds the student's keys only"
        tick(1.0)
        torch.testing.assert_close(logits(model, kind), logits(cut_at_once, kind), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits(model, kind), logits(cut_at_once, kind), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2"])
def test_masks_survive_the_optimizer(kind: str) -> None:
    model, task = tiny_model(kind).train(), FewBatches(kind)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with riding(model, [PruneWeights(0.9)], task) as tick:
        for step in range(6):
            model(**task.batch(step)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            tick((step + 1) / 6)
    for units in (*units_of(model, "heads"), *units_of(model, "neurons")):
        for name in (*units.projections, units.output):
            weight = model.get_submodule(name).weight
            assert abs((weight == 0).float().mean() - 0.9) < 0.01


def test_an_error_in_the_loop_leaves_the_model_uncut() -> None:
    model = tiny_model("bert")
    before = logits(model, "bert")
    with pytest.raises(RuntimeError, match="stop"), riding(model, [PruneHeads(0.5), Distill()], FewBatches("bert")) as tick:
        tick(0.5)
        raise RuntimeError("stop")
    assert torch.equal(logits(model, "bert"), before)


def test_a_structure_from_the_internet_is_checked() -> None:
    name = "bert.encoder.layer.0.intermediate.dense"
    fine = {"kind": "linear", "in_features": 64, "out_features": 8, "bias": True}
    bad: list[tuple[Any, str]] = [
        ({name: {**fine, "out_features": 10**9}}, "out_features = 1000000000 is not an integer from 1 to 128"),
        ({name: {**fine, "out_features": 0}}, "out_features = 0"),
        ({name: {**fine, "out_features": True}}, "out_features = True"),
        ({name: {**fine, "kind": "os.system"}}, "unknown edit"),
        ({name: {**fine, "dtype": "x"}}, "'dtype' is not allowed: Linear has in_features, out_features, bias;"),
        ({name: {"kind": "linear"}}, "in_features, out_features missing"),
        ({"bert.nothing": fine}, "there is no module 'bert.nothing'"),
        ({"bert.encoder": fine}, "can't become a linear"),
        ({"bert.encoder.layer.0.attention.self": {"kind": "counts", "forward": 1}}, "it has no count 'forward'"),
        ({"bert.encoder.layer.0.attention.self": {"kind": "counts", "num_attention_heads": 5}}, "from 1 to 4"),
    ]
    for structure, message in bad:
        with pytest.raises(CompressionError, match=message):
            rebuild(twin(tiny_model("bert")), structure)
    assert rebuild(twin(tiny_model("bert")), {name: fine}).get_submodule(name).out_features == 8


def test_what_a_load_would_make_random_is_not_saved(tmp_path: Any) -> None:
    model = tiny_model("bert", layers=3)
    model.bert.encoder.layer = model.bert.encoder.layer[:2]
    with pytest.raises(CompressionError, match=r"bert.encoder.layer.2.* the model has none, so a load would make it random"):
        save(model, None, tmp_path)
    wide = tiny_model("bert")
    wide.classifier = nn.Linear(64, 7)
    with pytest.raises(CompressionError, match="'classifier': out_features = 7 is not an integer from 1 to 3"):
        save(wide, None, tmp_path)


def test_t5_keeps_dense_what_its_forward_reads_the_dtype_of(tmp_path: Any) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=64, d_model=64, d_kv=16, d_ff=128, num_layers=1, num_heads=4, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(config).eval()
    Quantize(8).run(model, None)
    kinds = {type(module).__name__ for name, module in model.named_modules() if name.endswith((".wo", "lm_head"))}
    assert kinds == {"Linear"}
    ids = torch.tensor([[5, 6, 7]])
    expected = model(input_ids=ids, labels=ids).logits
    save(model, None, tmp_path)
    assert torch.equal(T5ForConditionalGeneration.from_pretrained(tmp_path).eval()(input_ids=ids, labels=ids).logits, expected)


def test_a_failed_cut_leaves_nothing_half_done() -> None:
    model = tiny_model("bert")
    LowRank(rank=4, target_modules=["output.dense"]).run(model, None)
    before = {name: tuple(p.shape) for name, p in model.named_parameters()}
    with pytest.raises(CompressionError, match="can't cut a LowRankLinear; only dense layers can be cut"):
        PruneNeurons(0.5, scores="magnitude").run(model, None)
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == before
