"""Converted models train: gradients, checkpointing, LoRA on every projection."""

import copy
from collections.abc import Callable

import pytest
import torch
from builders import random_ids
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from xeco_convert.modeling import attention_xeco
from xeco_convert.ops.choice import Choice
from xeco_convert.ops.extension import extension

pytestmark = [
    pytest.mark.usefixtures("gradients"),
    # renamed in transformers 5.22; PEFT still calls it by the name that the oldest supported version has
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),
]
PROJECTIONS = ["q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]


@pytest.fixture
def student(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of each kind of model that a test may change."""
    return copy.deepcopy(model)


def gradients_of(model: PreTrainedModel, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    model.train()
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_every_weight_gets_a_gradient(student: PreTrainedModel) -> None:
    gradients = gradients_of(student, random_ids(2, 14))
    without = [name for name, gradient in gradients.items() if gradient is None or not gradient.any()]
    assert without == []


def test_all_paths_give_the_same_gradients(student: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    ids, gradients = random_ids(2, 14), []
    paths = ["expanded", "absorbed", "reference"] + ([] if extension() is None else ["fused"])
    for path in paths:
        monkeypatch.setattr(attention_xeco, "choose", lambda *_, path=path: Choice(path, "the test says so"))
        gradients.append(gradients_of(student, ids))
    for path, found in zip(paths, gradients, strict=True):
        for name, gradient in found.items():
            torch.testing.assert_close(
                gradient,
                gradients[0][name],
                rtol=1e-3,
                atol=1e-5,
                msg=lambda m, name=name, path=path: f"{path} {name}: {m}",
            )


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(student: PreTrainedModel, reentrant: bool) -> None:
    ids = random_ids(2, 14)
    expected = gradients_of(student, ids)
    student.gradient_checkpointing_enable({"use_reentrant": reentrant})
    runs: list[int] = []
    student.model.layers[0].self_attn.register_forward_hook(lambda *_: runs.append(1))
    found = gradients_of(student, ids)
    assert len(runs) == 2  # once forward, and once more on the way back
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-7)


def test_a_few_training_steps_lower_the_loss(student: PreTrainedModel) -> None:
    ids = random_ids(4, 20)
    optimiser = torch.optim.AdamW(student.parameters(), lr=3e-3)
    student.train()
    losses = []
    for _ in range(8):
        loss = student(ids, labels=ids).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_training_goes_on_after_generation(student: PreTrainedModel) -> None:
    """What generation leaves behind in the layers (it runs in inference mode) must serve autograd."""
    ids = random_ids(2, 9)
    student.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False, pad_token_id=0)
    assert gradients_of(student, ids)["model.embed_tokens.weight"].any()


def test_dropout_acts_in_training_only(model_of: Callable[[str], PreTrainedModel]) -> None:
    student, ids = copy.deepcopy(model_of("llama")), random_ids(2, 14)
    for layer in student.model.layers:
        layer.self_attn.attention_dropout = 0.5
    student.train()
    assert not torch.equal(student(ids).logits, student(ids).logits)
    student.eval()
    torch.testing.assert_close(student(ids).logits, model_of("llama")(ids).logits, rtol=0, atol=0)


def with_lora(model: PreTrainedModel, projections: list[str]) -> PeftModel:
    """LoRA with random (not zero) factors, so that it changes something from the start."""
    torch.manual_seed(0)
    settings = LoraConfig(r=4, lora_alpha=16, target_modules=projections, init_lora_weights=False, lora_dropout=0.0)
    return get_peft_model(copy.deepcopy(model), settings).eval()


def steps(model: torch.nn.Module, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of a prefill, and of two decoded tokens after it."""
    output = model(ids[:, :-2], use_cache=True)
    decoded = []
    for position in (-2, -1):
        token = ids[:, ids.shape[1] + position : ids.shape[1] + position + 1]
        decoded.append(model(token, past_key_values=output.past_key_values, use_cache=True).logits)
    return output.logits, torch.cat(decoded, dim=1)


@pytest.mark.parametrize("projection", PROJECTIONS)
@torch.no_grad()
def test_lora_acts_in_prefill_and_decode_as_its_merged_weights(
    projection: str, model_of: Callable[[str], PreTrainedModel]
) -> None:
    model, ids = model_of("llama"), random_ids(2, 12)
    adapted = with_lora(model, [projection])
    found, plain = steps(adapted, ids), steps(model, ids)
    merged = steps(adapted.merge_and_unload().eval(), ids)
    for one, other, same in zip(found, plain, merged, strict=True):
        assert (one - other).abs().max() > 0.1
        torch.testing.assert_close(one, same, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_decode_reads_the_adapted_up_projection(model_of: Callable[[str], PreTrainedModel]) -> None:
    """With an unchanged cache, only kv_b_proj's adapter can change the decoded token: the absorbed path must not pass it by."""
    model, ids = model_of("llama"), random_ids(1, 12)
    adapted = with_lora(model, ["kv_b_proj"])
    attention, original = adapted.base_model.model.model.layers[0].self_attn, model.model.layers[0].self_attn
    hidden = torch.randn(1, 1, 32, generator=torch.Generator().manual_seed(0))
    position = torch.tensor([[11]])
    outputs = []
    for module in (attention, original):
        cache = model(ids[:, :11], use_cache=True).past_key_values
        outputs.append(module(hidden, (hidden, hidden), past_key_values=cache, position_ids=position)[0])
    assert (outputs[0] - outputs[1]).abs().max() > 0.01


def test_lora_trains_the_projections_alone(student: PreTrainedModel) -> None:
    names = [
        "q_b_proj" if name == "q_proj" and "q_lora_rank" in str(student.config.mla_layers) else name
        for name in PROJECTIONS
    ]
    adapted = with_lora(student, names)
    adapted.train()
    ids = random_ids(2, 14)
    adapted(ids, labels=ids).loss.backward()
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    assert all(parameter.grad is not None for name, parameter in adapted.named_parameters() if name in trained)
