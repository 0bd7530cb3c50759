"""Models in the compiled kernels and in the reference give the same logits and the same text, in every way of running them."""

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import exact_model, random_ids, source_model
from fresh import run_fresh
from peft import LoraConfig, get_peft_model
from transformers import DynamicCache, PreTrainedModel, StaticCache

from xeco_convert.modeling import LatentSelfAttention, attention_xeco
from xeco_convert.ops import fused, mask_ranges
from xeco_convert.ops.choice import AttentionChoiceError
from xeco_convert.ops.extension import extension

needs_extension = pytest.mark.skipif(extension() is None, reason="the extension is not built")
Force = Callable[[str | None], None]
# In float32, relative to the logits' standard deviation, where a test takes one kind of model: conftest.py has all others'.
TOLERANCE = 2e-5
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "without a cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
    "beams": {"num_beams": 3},
    "beams in a static cache": {"num_beams": 3, "cache_implementation": "static"},
    "prefill in chunks": {"prefill_chunk_size": 4},
}


@pytest.fixture
def force(monkeypatch: pytest.MonkeyPatch) -> Force:
    """Sets XECO_ATTENTION, or removes it."""

    def to(name: str | None) -> None:
        if name is None:
            monkeypatch.delenv("XECO_ATTENTION", raising=False)
        else:
            monkeypatch.setenv("XECO_ATTENTION", name)

    return to


@pytest.fixture
def kernel_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ops that the model called."""
    calls: list[str] = []
    for name in ("latent_attention", "latent_attention_decode", "latent_attention_packed"):
        original = getattr(fused, name)

        def noted(*arguments: Any, original: Any = original, name: str = name, **settings: Any) -> Any:
            calls.append(name)
            return original(*arguments, **settings)

        monkeypatch.setattr(fused, name, noted)
    return calls


def padded(lengths: tuple[int, ...], *, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask of rows of these lengths."""
    ids, mask = random_ids(len(lengths), max(lengths)), torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    for row, length in zip(mask, lengths, strict=True):
        row[-length if left else 0 : None if left else length] = 1
    return ids, mask


def text(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor, **settings: Any) -> torch.Tensor:
    settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 12, **settings}
    found: torch.Tensor = model.generate(ids, attention_mask=mask, **settings)
    return found


@needs_extension
@pytest.mark.parametrize(
    ("way", "lengths"),
    # without padding there is a mask less in a forward pass with a cache of either kind, and no other difference
    [*((way, (10, 3, 1)) for way in WAYS), ("greedy", (10, 10)), ("static cache", (10, 10))],
)
def test_kernels_and_reference_write_the_same_text(
    model: PreTrainedModel, way: str, lengths: tuple[int, ...], force: Force, kernel_calls: list[str], decode_op: str
) -> None:
    ids, mask = padded(lengths, left=True)
    force("reference")
    expected = text(model, ids, mask, **WAYS[way])
    assert kernel_calls == []
    force("fused")
    assert torch.equal(text(model, ids, mask, **WAYS[way]), expected)
    assert (decode_op in kernel_calls) == (way != "without a cache")
    force("sdpa")
    assert torch.equal(text(model, ids, mask, **WAYS[way]), expected)


@needs_extension
@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("lengths", [(25,), (25, 25), (25, 11, 1)])
def test_kernels_and_reference_give_the_same_logits(
    model: PreTrainedModel,
    left: bool,
    lengths: tuple[int, ...],
    force: Force,
    kernel_calls: list[str],
    decode_op: str,
    tolerance: float,
) -> None:
    ids, mask = padded(lengths, left=left)
    logits = []
    for name in ("reference", "fused"):
        force(name)
        logits.append(model(ids, attention_mask=mask).logits[mask.bool()])
    assert (logits[1] - logits[0]).abs().max() / logits[0].std() < tolerance
    assert set(kernel_calls) == {decode_op if decode_op.endswith("packed") else "latent_attention"}


@needs_extension
def test_assisted_generation_is_the_same(
    model_of: Callable[[str], PreTrainedModel], force: Force, kernel_calls: list[str]
) -> None:
    model, ids = model_of("llama"), random_ids(1, 10)
    settings = {"assistant_model": source_model("llama", seed=5)}
    force("reference")
    expected = text(model, ids, torch.ones_like(ids), **settings)
    force("fused")
    assert torch.equal(text(model, ids, torch.ones_like(ids), **settings), expected)
    assert "latent_attention" in kernel_calls  # several candidates at once, behind a cache


@needs_extension
def test_the_kernels_serve_by_default(
    model_of: Callable[[str], PreTrainedModel], force: Force, kernel_calls: list[str]
) -> None:
    force(None)
    ids, mask = padded((10, 4), left=True)
    text(model_of("llama"), ids, mask)
    assert set(kernel_calls) == {"latent_attention", "latent_attention_decode"}


@needs_extension
def test_masks_are_looked_at_once_in_a_forward_pass(
    model_of: Callable[[str], PreTrainedModel], force: Force, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[int] = []
    find = mask_ranges._find
    monkeypatch.setattr(mask_ranges, "_find", lambda mask: looks.append(1) or find(mask))
    force("fused")
    for kind, masks in (("llama", 1), ("qwen2_window", 2)):  # two kinds of layers, two masks
        looks.clear()
        model_of(kind)(padded((10, 4), left=True)[0], attention_mask=padded((10, 4), left=True)[1])
        assert len(looks) == masks


def tree_mask(tokens: int) -> torch.Tensor:
    """Every third token is invisible to those behind it."""
    mask = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    mask[:, ::3] &= torch.eye(tokens, dtype=torch.bool)[:, ::3]
    return mask[None, None]


@needs_extension
@pytest.mark.parametrize("additive", [True, False])
def test_masks_of_another_kind_go_to_plain_torch(
    model_of: Callable[[str], PreTrainedModel], force: Force, kernel_calls: list[str], additive: bool
) -> None:
    model, ids, mask = model_of("llama"), random_ids(2, 12), tree_mask(12).expand(2, -1, -1, -1)
    if additive:
        mask = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    force("reference")
    expected = model(ids, attention_mask=mask).logits
    force(None)
    found = model(ids, attention_mask=mask).logits
    assert (found - expected).abs().max() / expected.std() < TOLERANCE and kernel_calls == []
    force("fused")
    with pytest.raises(
        AttentionChoiceError, match="XECO_ATTENTION=fused cannot serve this call: the mask is not one range"
    ):
        model(ids, attention_mask=mask)


@needs_extension
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kernels_round_no_worse_than_the_reference(
    model_of: Callable[[str], PreTrainedModel], force: Force, dtype: torch.dtype
) -> None:
    model, (ids, mask) = model_of("llama"), padded((25, 11), left=True)
    rounded, kept = copy.deepcopy(model).to(dtype), mask.bool()
    force("reference")
    expected = model(ids, attention_mask=mask).logits[kept]
    plain = (rounded(ids, attention_mask=mask).logits[kept] - expected).square().mean().sqrt()
    force("fused")
    assert (rounded(ids, attention_mask=mask).logits[kept] - expected).square().mean().sqrt() <= 2 * plain


@needs_extension
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_decides_the_dtype_of_the_kernels(
    model_of: Callable[[str], PreTrainedModel], force: Force, kernel_calls: list[str], dtype: torch.dtype
) -> None:
    """Rotated keys stay in float32 there, latents do not."""
    model, ids = model_of("llama"), random_ids(2, 9)
    force("fused")
    expected = model(ids).logits
    with torch.autocast("cpu", dtype=dtype):
        found = model(ids).logits
        step = model(ids, use_cache=True)
        model(ids[:, :1], past_key_values=step.past_key_values)
    assert (found - expected).square().mean().sqrt() / expected.std() < 0.05
    assert "latent_attention_decode" in kernel_calls


@needs_extension
@pytest.mark.usefixtures("gradients")
@pytest.mark.parametrize("checkpointing", [None, True, False])
@pytest.mark.parametrize("left", [True, False])
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_training_has_the_gradients_of_the_reference(
    model: PreTrainedModel, force: Force, kernel_calls: list[str], checkpointing: bool | None, left: bool
) -> None:
    ids, mask = padded((14, 5), left=left)
    gradients = []
    for name in ("reference", "fused"):
        force(name)
        student = copy.deepcopy(model).train()
        if checkpointing is not None:
            student.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        student(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in student.named_parameters()})
    for name, gradient in gradients[1].items():
        torch.testing.assert_close(
            gradient, gradients[0][name], rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert set(kernel_calls) == {"latent_attention"}


@needs_extension
def test_dropout_on_attention_weights_goes_to_plain_torch(
    model_of: Callable[[str], PreTrainedModel], force: Force, kernel_calls: list[str]
) -> None:
    student, ids = copy.deepcopy(model_of("llama")).train(), random_ids(2, 9)
    for layer in student.model.layers:
        layer.self_attn.attention_dropout = 0.5
    force(None)
    student(ids)
    assert kernel_calls == []
    force("fused")
    with pytest.raises(AttentionChoiceError, match="the kernels have no dropout on attention weights"):
        student(ids)


def with_lora(model: PreTrainedModel) -> Any:
    torch.manual_seed(0)
    settings = LoraConfig(r=4, target_modules=["kv_b_proj"], init_lora_weights=False, lora_dropout=0.0)
    return get_peft_model(copy.deepcopy(model), settings).eval()


def test_a_wrapped_up_projection_is_expanded_through_by_every_implementation(
    model_of: Callable[[str], PreTrainedModel], force: Force
) -> None:
    adapted, ids = with_lora(model_of("llama")), random_ids(2, 12)
    logits = []
    for name in ("reference", "sdpa", None):
        force(name)
        logits.append(adapted(ids).logits)
    force("reference")
    merged = with_lora(model_of("llama")).merge_and_unload().eval()(ids).logits
    for found in logits:
        assert (found - merged).abs().max() / merged.std() < TOLERANCE
    force("fused")
    with pytest.raises(AttentionChoiceError, match=r"kv_b_proj is wrapped \(LoRA, quantised\)"):
        adapted(ids)


def test_the_eager_implementation_gives_weights_through_a_wrapped_up_projection(
    model_of: Callable[[str], PreTrainedModel], force: Force
) -> None:
    force(None)
    adapted, ids = with_lora(model_of("llama")), random_ids(2, 12)
    expected = adapted(ids).logits
    adapted.base_model.model.set_attn_implementation("eager")
    output = adapted(ids, output_attentions=True)
    assert (output.logits - expected).abs().max() / expected.std() < TOLERANCE
    for weights in output.attentions:
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 12))


class OnlyMultiplies(torch.Tensor):
    """A weight that can be multiplied by and nothing else, as a quantised one."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.Tensor.unflatten, torch.Tensor.view, torch.einsum, torch.Tensor.__getitem__):
            raise NotImplementedError(f"{func.__name__} of a quantised weight")
        found = super().__torch_function__(func, types, args, kwargs or {})
        return found.as_subclass(torch.Tensor) if func is torch.nn.functional.linear else found


def with_weights_of_their_own_type(model: PreTrainedModel) -> PreTrainedModel:
    changed = copy.deepcopy(model)
    for layer in changed.model.layers:
        for name in ("kv_b_proj", "q_head_proj"):
            linear = getattr(layer.self_attn, name, None)
            if linear is not None:
                weight = linear.weight.detach().as_subclass(OnlyMultiplies)
                linear.weight = torch.nn.Parameter(weight, requires_grad=False)
                assert type(linear.weight) is OnlyMultiplies
    return changed


@pytest.mark.parametrize("kind", ["llama", "qwen3", "olmo2"])
def test_quantised_weights_are_only_multiplied_by(
    kind: str, model_of: Callable[[str], PreTrainedModel], force: Force
) -> None:
    """torchao keeps nn.Linear and changes the type of its weight, of which rows cannot be taken."""
    force(None)
    plain = model_of(kind) if kind == "llama" else exact_model(source_model(kind))
    quantised, ids = with_weights_of_their_own_type(plain), random_ids(2, 12)
    expected = plain(ids).logits
    assert (quantised(ids).logits - expected).abs().max() / expected.std() < TOLERANCE
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    assert torch.equal(quantised.generate(ids, **settings), plain.generate(ids, **settings))
    assert "weight of its own type (OnlyMultiplies" in quantised.model.layers[0].self_attn.explain_choice(1, 12)


def test_lora_of_every_projection_reaches_the_heads_behind_a_norm() -> None:
    model = exact_model(source_model("qwen3"))
    torch.manual_seed(0)
    settings = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    adapted, ids = get_peft_model(copy.deepcopy(model), settings).eval(), random_ids(2, 12)
    found = adapted(ids).logits
    merged = adapted.merge_and_unload().eval()(ids).logits
    assert (found - merged).abs().max() / merged.std() < TOLERANCE


@pytest.mark.parametrize("name", ["fused", "sdpa"])
def test_weights_are_refused_by_implementations_that_have_none(
    name: str, model_of: Callable[[str], PreTrainedModel], force: Force
) -> None:
    model = copy.deepcopy(model_of("llama"))
    model.set_attn_implementation("eager")
    force(name)
    with pytest.raises(
        AttentionChoiceError, match=f"XECO_ATTENTION={name} cannot serve this call: attention weights are"
    ):
        model(random_ids(1, 4))


def test_a_name_that_does_not_exist_is_refused(model_of: Callable[[str], PreTrainedModel], force: Force) -> None:
    force("flash")
    with pytest.raises(
        AttentionChoiceError, match="XECO_ATTENTION: expected one of reference, fused, sdpa, found 'flash'"
    ):
        model_of("llama")(random_ids(1, 4))


def test_float64_models_run_in_plain_torch(
    model_of: Callable[[str], PreTrainedModel], force: Force, kernel_calls: list[str]
) -> None:
    model, ids = copy.deepcopy(model_of("llama")).double(), random_ids(2, 9)
    force(None)
    assert model(ids).logits.dtype == torch.float64 and kernel_calls == []
    force("fused")
    with pytest.raises(
        AttentionChoiceError, match="the compiled kernels take float32, bfloat16 and float16, not float64"
    ):
        model(ids)


@needs_extension
def test_a_layer_says_what_it_chooses_and_why(model_of: Callable[[str], PreTrainedModel], force: Force) -> None:
    layer = model_of("llama").model.layers[0].self_attn
    force(None)
    assert layer.explain_choice(1, 900).startswith("fused: one query over a cache")
    force("sdpa")
    assert layer.explain_choice(1, 900).startswith("absorbed: one query over a cache")
    force("reference")
    assert layer.explain_choice(7, 900).startswith("reference: XECO_ATTENTION=reference")


@needs_extension
def test_an_inference_mode_model_is_the_same(model_of: Callable[[str], PreTrainedModel], force: Force) -> None:
    model, (ids, mask) = model_of("mistral_window"), padded((10, 4), left=True)
    force("reference")
    expected = text(model, ids, mask)
    force("fused")
    with torch.inference_mode():
        assert torch.equal(text(model, ids, mask), expected)


@needs_extension
@pytest.mark.parametrize("tokens", [1, 6])
def test_attention_without_a_mask_compiles_to_one_graph_with_the_op_in_it(
    tokens: int, model_of: Callable[[str], PreTrainedModel], force: Force
) -> None:
    attention: LatentSelfAttention = model_of("llama").model.layers[0].self_attn
    hidden = torch.randn(2, tokens, 32, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(4, 4 + tokens)[None]
    caches = [DynamicCache(config=model_of("llama").config) for _ in range(2)]
    for cache in caches if tokens == 1 else []:
        model_of("llama")(random_ids(2, 4), past_key_values=cache)

    def run(states: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
        return attention(states, (states, states), past_key_values=cache, position_ids=positions)[0]

    graphs: list[str] = []

    def noted(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph.code)
        return graph

    force("fused")
    expected = run(hidden, caches[0])
    torch.compiler.reset()
    torch.testing.assert_close(torch.compile(run, backend=noted, fullgraph=True)(hidden, caches[1]), expected)
    (code,) = graphs
    assert ("latent_attention_decode" if tokens == 1 else "latent_attention(") in code


@needs_extension
def test_a_compiled_decode_step_of_a_static_cache_says_why_kernels_do_not_serve(
    model_of: Callable[[str], PreTrainedModel], force: Force
) -> None:
    """Its mask is a tensor, whose numbers cannot be read while tracing; by default plain torch computes it."""
    model, ids = model_of("llama"), random_ids(2, 9)
    cache = StaticCache(config=model.config, max_cache_len=16)
    model(ids, past_key_values=cache, use_cache=True)
    force("fused")
    torch.compiler.reset()
    step = torch.compile(lambda token: model(token, past_key_values=cache).logits, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=r"cannot be read while torch\.compile traces"):
        step(ids[:, :1])


WITHOUT = """
import importlib.util, sys
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "xeco_convert._C" else found(name, *rest)
"""
PLAIN = """
import torch, xeco_convert
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
ids = torch.arange(12).view(2, 6)
for _ in range(2):
    logits = model(ids).logits
torch.save(logits, sys.argv[2])
"""


@pytest.mark.slow
def test_without_the_extension_models_run_in_plain_torch_after_one_warning(
    folder_of: Callable[[str], tuple[Path, Path]], model_of: Callable[[str], PreTrainedModel], tmp_path: Path
) -> None:
    program = (WITHOUT + PLAIN, str(folder_of("llama")[1]), str(tmp_path / "logits"))
    for name, warnings in (("", 1), ("sdpa", 0)):
        environment = {**os.environ, "XECO_ATTENTION": name}
        done = run_fresh(*program, environment=environment)
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("attention runs in plain torch") == warnings
        found = torch.load(tmp_path / "logits")
        torch.testing.assert_close(found, model_of("llama")(torch.arange(12).view(2, 6)).logits, rtol=1e-4, atol=5e-5)
    environment = {**os.environ, "XECO_ATTENTION": "fused"}
    done = run_fresh(*program, environment=environment)
    assert done.returncode == 1
    assert "XECO_ATTENTION=fused cannot serve this call: the extension xeco_convert._C is not there" in done.stderr


def test_the_model_asks_one_function_alone() -> None:
    """What attention_xeco uses is what tests/ops/test_choice.py tests."""
    from xeco_convert.ops import choice

    assert attention_xeco.choose is choice.choose
