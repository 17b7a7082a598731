"""What rides along with training: who trains what is added, what an error leaves, what a save in the middle writes."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

from hfcompress import (
    Adapters,
    Cast,
    CompressionError,
    LowRank,
    PruneHeads,
    PruneLayers,
    PruneNeurons,
    PruneWeights,
    Quantize,
    Student,
    riding,
)
from hfcompress.methods import METHODS, Method
from hfcompress.methods.riding import check_together
from tests.methods.test_laws import METHOD_ROWS, FewBatches, auto, logits
from tests.tiny import tiny_model

ADDING = [LowRank(rank=4), Adapters(r=2), PruneLayers(0.5, scores="position"), Student(config={"intermediate_size": 64})]


def loop(model: Any, optimizer: Any, tick: Any = None, steps: int = 2, kind: str = "bert") -> None:
    for step in range(1, steps + 1):
        model.train()(**FewBatches(kind).batch(step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if tick is not None:
            tick(step / steps)


# ---------------------------------------------------------------- optimizers


@pytest.mark.parametrize("method", [LowRank(rank=4), Adapters(r=2, merge=False)], ids=str)
def test_an_optimizer_that_was_built_before_is_refused(method: Method) -> None:
    model = tiny_model("bert")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    with pytest.raises(CompressionError) as error, riding(model, [method], [FewBatches("bert").batch()]) as tick:
        loop(model, optimizer, tick)
    assert str(error.value) == (
        f"{method.key()}: the optimizer was built before `riding` put new parameters into the model, and would not train them; "
        "build it inside the with block, or give it: riding(model, methods, batches, optimizer=optimizer)."
    )
    after = model.state_dict()
    assert set(after) == set(before) and all(torch.equal(before[name], value) for name, value in after.items())


@pytest.mark.parametrize("method", ADDING, ids=str)
def test_an_optimizer_that_is_given_trains_what_was_put_in(method: Method) -> None:
    model = tiny_model("bert")
    decayed = [one for one in model.parameters() if one.dim() > 1]
    others = [one for one in model.parameters() if one.dim() < 2]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}], lr=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    with riding(model, [method], [FewBatches("bert").batch()], optimizer=optimizer) as tick:
        trained = {name: one for name, one in model.named_parameters() if one.requires_grad}
        before = {name: one.detach().clone() for name, one in trained.items()}
        loop(model, optimizer, tick)
        schedule.step()
        still = [name for name, one in trained.items() if torch.equal(before[name], one) and ".pooler." not in name]
        assert trained and not still
        groups = [{id(one) for one in group["params"]} for group in optimizer.param_groups]
        assert not groups[0] & groups[1] and len(groups) == 2
        in_model = {id(one) for one in model.parameters()}
        assert groups[0] | groups[1] <= in_model, "what left the model left the optimizer"
        if isinstance(method, LowRank):
            assert {id(one) for name, one in trained.items() if name.endswith(("first.weight", "second.weight"))} <= groups[0]
            assert {id(one) for name, one in trained.items() if name.endswith("second.bias")} <= groups[1]


def test_an_optimizer_built_inside_is_right() -> None:
    model = tiny_model("bert")
    with riding(model, [LowRank(rank=4)], None) as tick:
        loop(model, torch.optim.SGD(model.parameters(), lr=0.1), tick)


def test_two_optimizers_are_judged_together() -> None:
    model = tiny_model("bert")
    for forgets in (False, True):
        model = tiny_model("bert")
        with riding(model, [LowRank(rank=4, target_modules=["query", "key"])], None) as tick:
            some = [one for name, one in model.named_parameters() if ".query." in name]
            more = [one for name, one in model.named_parameters() if ".query." not in name]
            if forgets:
                more = [one for name, one in model.named_parameters() if ".query." not in name and ".key." not in name]
            both = [torch.optim.SGD(some, lr=0.1), torch.optim.SGD(more, lr=0.1)]
            model.train()(**FewBatches("bert").batch()).loss.backward()
            for one in both:
                one.step()
            if forgets:
                with pytest.raises(CompressionError, match="low_rank: the optimizer was built before"):
                    tick(0.5)
            else:
                tick(0.5)


def test_an_optimizer_of_another_model_is_refused() -> None:
    optimizer = torch.optim.SGD(tiny_model("bert").parameters(), lr=0.1)
    with pytest.raises(CompressionError) as error, riding(tiny_model("bert"), [LowRank(rank=4)], None, optimizer):
        pass
    assert str(error.value) == (
        "optimizer: it holds no parameter of this model, and there are new ones to train; build it of model.parameters(), or "
        "after the methods were applied."
    )


def test_factors_of_what_is_frozen_are_frozen() -> None:
    model = tiny_model("bert")
    model.bert.requires_grad_(False)
    LowRank(rank=4).run(model, None)
    assert {name.split(".")[0] for name, one in model.named_parameters() if one.requires_grad} == {"classifier"}


# ---------------------------------------------------------------- errors


class Stop(BaseException):
    """No library takes it for one of its own."""


def standing(model: Any) -> Any:
    """Everything that a model is, as plain data."""
    modules = [(name, type(module).__name__) for name, module in model.named_modules()]
    counts = [
        (name, key, value)
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if type(value) in (int, float, bool, str) and key != "training"
    ]
    hooks = [
        (name, len(module._forward_hooks), len(module._forward_pre_hooks), len(module._state_dict_hooks))
        for name, module in model.named_modules()
    ]
    trained = [(name, tuple(one.shape), one.dtype, one.requires_grad) for name, one in model.named_parameters()]
    tied = len({id(one) for one in model.parameters()})
    return modules, sorted(counts), hooks, trained, tied, model.config.to_dict(), getattr(model, "peft_config", None)


class Failing:
    """Raises at the n-th call of a function of hfcompress that edits a model; counts them if n is None."""

    FILES = ("/methods/", "/surgery/", "/layers/", "/calibration/", "/checkpoint/", "/distillation/")
    TIDY = ("remove", "undo", "noting", "restored_on_error", "evaluating", "in_float32", "silenced")
    CLOSED = ("shortened",)  # generators that are left half-way: what is raised as one is closed, Python drops

    def __init__(self, at: int | None) -> None:
        self.at, self.seen, self.is_over = at, 0, False

    def __call__(self, frame: FrameType, event: str, arg: Any) -> None:
        code = frame.f_code
        self.is_over |= code.co_name == "leave_loadable"  # values that were written in place are the model's by then
        if self.is_over or event != "call" or not any(f"hfcompress{part}" in code.co_filename for part in self.FILES):
            return
        if (
            code.co_name.startswith(("_", "<"))
            or code.co_name in (*self.TIDY, *self.CLOSED)
            or "/units/specimens/" in code.co_filename
        ):
            return
        self.seen += 1
        if self.seen == self.at:
            raise Stop

    def during(self, work: Callable[[], None]) -> None:
        sys.setprofile(self)
        try:
            work()
        finally:
            sys.setprofile(None)


def mixture() -> Any:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 128}
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**sizes, intermediate_size=32, num_local_experts=4, pad_token_id=0)).eval()


def subject(key: str) -> tuple[Any, str]:
    if key == "quantize_cache":
        return tiny_model("llama"), "llama"
    return (mixture(), "llama") if key == "prune_experts" else (tiny_model("bert"), "bert")


def method_of(key: str) -> Method:
    if key == "distill":
        return METHODS[key](tiny_model("bert", seed=1))
    if key == "prune_heads":
        return PruneHeads(0.5, scores="l1", repair=True, samples=8)
    if key == "prune_neurons":
        return PruneNeurons(0.4, scores="fisher", samples=8, iterations=2, round_to=1)
    return METHOD_ROWS[key][1 if key == "adapters" else 0]


RIDING = [key for key, method in METHODS.items() if method.rides]


@pytest.mark.parametrize("key", RIDING)
def test_an_error_in_the_loop_leaves_the_model_as_it_was(key: str) -> None:
    model, kind = subject(key)
    task = [FewBatches(kind).batch()]
    frozen = next(model.parameters())
    frozen.requires_grad_(False)
    before, said = standing(model), logits(model, kind)
    for error in (Stop, KeyboardInterrupt):
        with pytest.raises(error), riding(model, [method_of(key)], task) as tick:
            tick(0.1 if key != "prune_weights" else 0.0)
            raise error
        assert standing(model) == before
        assert torch.equal(logits(model, kind), said)


@pytest.mark.parametrize("key", METHODS)
def test_an_error_at_any_moment_leaves_the_model_as_it_was(key: str) -> None:
    """It is raised in any function on the way: while it enters, in the middle of an edit, when it finishes."""

    def work(model: Any, kind: str) -> Callable[[], None]:
        method, task = method_of(key), FewBatches(kind)

        def run() -> None:
            if not method.rides:
                method.run(model, task)
                return
            with riding(model, [method], task) as tick:
                tick(0.0)
                tick(1.0)

        return run

    model, kind = subject(key)
    work(model, kind)()  # what is proven once a process is proven
    model, kind = subject(key)
    counter = Failing(None)
    counter.during(work(model, kind))
    assert counter.seen > 3
    moments = {1, 2, counter.seen, counter.seen - 1, *random.Random(0).sample(range(1, counter.seen + 1), min(4, counter.seen))}
    for moment in sorted(moments):
        model, kind = subject(key)
        before, said = standing(model), logits(model, kind)
        with pytest.raises(Stop):
            Failing(moment).during(work(model, kind))
        assert standing(model) == before, moment
        if key != "prune_weights":  # whose zeros, once a tick has set them, are values that training goes on from
            assert torch.equal(logits(model, kind), said), moment


@pytest.mark.parametrize("key", [key for key in RIDING if key not in ("distill", "adapters")])
def test_a_model_that_cant_be_described_is_as_it_was(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Any) -> None:
        raise Stop

    monkeypatch.setattr(sys.modules["hfcompress.methods.base"], "describe", fail)
    model, kind = subject(key)
    before = standing(model)
    with pytest.raises(Stop), riding(model, [method_of(key)], FewBatches(kind)) as tick:
        tick(1.0)
    assert standing(model) == before


def test_what_another_method_finished_is_taken_back_too() -> None:
    """The last finishes first: it has cut when the one before it fails."""
    model = tiny_model("bert")
    before, said = standing(model), logits(model, "bert")

    class Fails(Cast):
        def applied(self, model: nn.Module, task: Any) -> Any:
            from contextlib import contextmanager

            @contextmanager
            def failing() -> Any:
                yield None
                raise Stop

            return failing()

    with (
        pytest.raises(Stop),
        riding(model, [Fails(), LowRank(rank=4, target_modules=["query"]), PruneNeurons(0.5, scores="l1")]) as tick,
    ):
        tick(1.0)
    assert standing(model) == before and torch.equal(logits(model, "bert"), said)


# ---------------------------------------------------------------- saved in the middle


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama", "t5", "vit", "mixtral"])
def test_what_is_saved_while_units_fade_is_what_is_computed(kind: str, tmp_path: Path) -> None:
    from tests.calibration.test_scores import given

    model, batch = given(kind)
    model.eval()
    whole = model(**batch).logits
    methods = [PruneNeurons(0.5, scores="l1", fade=1.0)]
    if kind != "mixtral":
        methods.append(PruneHeads(0.5, scores="l1", fade=1.0))
    with riding(model, methods, None) as tick:
        tick(0.4)
        model.save_pretrained(tmp_path)
        said = model(**batch).logits
        again = type(model).from_pretrained(tmp_path)
        torch.testing.assert_close(again.eval()(**batch).logits, said, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(said, whole, atol=1e-4)
    assert not any(module._state_dict_hooks for module in model.modules())


# ---------------------------------------------------------------- ties and orders


@pytest.mark.parametrize(
    ("kind", "task", "target", "others"),
    [
        ("t5", None, "shared", "encoder.embed_tokens"),
        ("bart", None, "shared", "model.encoder.embed_tokens"),  # a class of its own, which nothing stands in for
        ("bart", None, "embed_tokens", "model.shared"),
        ("bert", "masked-lm", "word_embeddings", "cls.predictions.decoder"),
        ("bert", "masked-lm", "decoder", "bert.embeddings.word_embeddings"),
    ],
)
def test_what_shares_its_weight_is_not_parted(kind: str, task: str | None, target: str, others: str) -> None:
    model = tiny_model(kind, task)
    with pytest.raises(
        CompressionError, match=f"shares its weight with .*{others}.*would part them; take it out of target_mod"
    ):
        LowRank(rank=4, target_modules=[target]).run(model, None)
    if target == "decoder":
        with (
            pytest.raises(CompressionError, match=f"adapters: cls.predictions.decoder shares its weight with {others}"),
            riding(model, [Adapters(target_modules=[target])]),
        ):
            pass
    assert not getattr(model, "peft_config", None)


def test_a_tie_is_seen_by_its_storage() -> None:
    model = tiny_model("bert")
    first, second = (layer.intermediate.dense for layer in model.bert.encoder.layer)
    second.weight = nn.Parameter(first.weight.detach())  # another parameter on the same memory
    assert second.weight is not first.weight
    with pytest.raises(CompressionError, match=r"intermediate\.dense shares its weight with"):
        LowRank(rank=4, target_modules=["intermediate.dense"]).run(model, None)
    for method in (LowRank(rank=4), Quantize(8)):
        method.run(model, None)
        assert type(model.bert.encoder.layer[0].intermediate.dense) is nn.Linear
        assert type(model.bert.encoder.layer[0].output.dense) is not nn.Linear
        model = tiny_model("bert")
        first, second = (layer.intermediate.dense for layer in model.bert.encoder.layer)
        second.weight = nn.Parameter(first.weight.detach())


def test_factors_and_fading_units_have_one_advice_in_either_order() -> None:
    sentence = (
        "low_rank: it would factor the layers that prune_neurons cuts when training ends; do prune_neurons in a step before, or "
        "low_rank in a step after, or give low_rank target_modules that lose no units."
    )
    for methods in ([PruneNeurons(0.5), LowRank(rank=4)], [LowRank(rank=4), PruneNeurons(0.5)]):
        with pytest.raises(CompressionError) as error:
            check_together(methods)
        assert str(error.value) == sentence
    named = LowRank(rank=4, target_modules=["intermediate.dense", "output.dense"])
    with pytest.raises(CompressionError) as error, riding(tiny_model("bert"), [PruneNeurons(0.5, scores="l1"), named]):
        pass
    assert str(error.value) == (
        "low_rank: bert.encoder.layer.0.output.dense reads units that fade in this training, and would be cut as factors; do "
        "low_rank in a step after, or take dense out of target_modules."
    )


def test_an_adapter_that_is_kept_is_for_the_model_as_it_came() -> None:
    with pytest.raises(CompressionError) as error:
        check_together([PruneLayers(0.5), Adapters(merge=False)])
    assert str(error.value) == (
        "adapters: merge: false leaves an adapter for the model as it came, and prune_layers makes another of it; do "
        "prune_layers in a step before, and save its result, or set merge: true."
    )


# ---------------------------------------------------------------- half precision, casts, fields


def test_float16_gradients_do_not_vanish_in_scores() -> None:
    """Scores of a float16 model are those of the same weights in float32, however small the loss's slope."""
    half, whole = tiny_model("bert"), tiny_model("bert")
    for model in (half, whole):
        model.classifier.weight.data *= 1e-4
        model.half()
    whole.float()
    cuts = []
    for model in (half, whole):
        PruneHeads(0.5, scores="fisher", samples=8).run(model, FewBatches("bert"))
        cuts.append(model.bert.encoder.layer[0].attention.self.query.weight.float())
    assert half.dtype == torch.float16 and torch.equal(*cuts)


def test_a_peft_model_is_cast() -> None:
    model = get_peft_model(tiny_model("bert"), LoraConfig(target_modules=["query"]))
    with riding(model, [Cast("bfloat16")]):
        pass
    assert {one.dtype for one in model.parameters()} == {torch.bfloat16}
    assert model.get_base_model().config.dtype == torch.bfloat16


def test_surplus_values_are_refused() -> None:
    with pytest.raises(CompressionError) as error:
        Cast("float16", "oops")
    assert str(error.value) == "Cast: 2 values were given without a name, and it has 1 field, dtype; leave out 'oops'."
    with pytest.raises(CompressionError) as error:
        Cast("float16", dtype="bfloat16")
    assert str(error.value) == ("Cast: dtype was given twice, 'float16' without its name and 'bfloat16' with it; give it once.")


# ---------------------------------------------------------------- heads beside adapters


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert"])
def test_the_head_of_a_classifier_is_trained_whole_beside_adapters(kind: str, tmp_path: Path) -> None:
    tiny_model(kind, "masked-lm").base_model.save_pretrained(tmp_path / "base")
    torch.manual_seed(1)
    model = auto(kind).from_pretrained(tmp_path / "base", num_labels=3)
    head = {name: one.detach().clone() for name, one in model.named_parameters() if "classifier" in name}
    with riding(model, [Adapters(r=2, merge=False)], None) as tick:
        loop(model, torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=0.1), tick)
    model.save_pretrained(tmp_path / "adapter")
    torch.manual_seed(2)  # another head is drawn
    again = auto(kind).from_pretrained(tmp_path / "adapter", num_labels=3)
    assert torch.equal(logits(again, kind), logits(model, kind))
    torch.manual_seed(1)
    merged = auto(kind).from_pretrained(tmp_path / "base", num_labels=3)
    with riding(merged, [Adapters(r=2)], None) as tick:
        loop(merged, torch.optim.SGD([one for one in merged.parameters() if one.requires_grad], lr=0.1), tick)
    assert all(not torch.equal(one, dict(merged.named_parameters())[name]) for name, one in head.items())
    assert all(one.requires_grad for one in merged.parameters())


def test_a_language_models_head_and_a_named_one_are_no_task_head() -> None:
    for model, method in (
        (tiny_model("llama"), Adapters(r=2)),
        (tiny_model("bert", "masked-lm"), Adapters(r=2)),
        (tiny_model("bert"), Adapters(r=2, target_modules=["query", "classifier"])),
        (tiny_model("bert"), Adapters(r=2, target_modules=["query"], modules_to_save=[])),
    ):
        with riding(model, [method], None):
            whole = {name.split(".modules_to_save")[0] for name, _ in model.named_modules() if "modules_to_save" in name}
            assert whole <= ({"bert.pooler"} if method.modules_to_save is None else set())


def test_a_new_head_of_half_precision_is_trained_in_float32(tmp_path: Path) -> None:
    model = tiny_model("bert").bfloat16()
    with riding(model, [Adapters(r=2)], None) as tick:
        assert model.classifier.modules_to_save["default"].weight.dtype == torch.float32
        loop(model, torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=0.1), tick)
    assert {one.dtype for one in model.parameters()} == {torch.bfloat16}
    assert not model.classifier._forward_pre_hooks


def test_weights_that_are_zeroed_in_parts_still_are_at_the_end() -> None:
    model = tiny_model("bert")
    with riding(model, [PruneWeights(0.9)], None) as tick:
        loop(model, torch.optim.SGD(model.parameters(), lr=0.1), tick, steps=4)
    dense = model.bert.encoder.layer[0].output.dense.weight
    assert float((dense == 0).float().mean()) == pytest.approx(0.9, abs=1e-3)
