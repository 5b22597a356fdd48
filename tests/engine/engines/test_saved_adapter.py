"""The adapter as a folder, and the weights that it makes: both act as the student does."""

import pytest
import torch
from peft import LoraConfig, PeftModel

from odp_callbacks.engine.engines.merged_weights import merged_weights
from odp_callbacks.engine.engines.saved_adapter import adapter_in_use, save_adapter
from odp_callbacks.engine.teachers import AdapterTeacher, BaseTeacher
from tests.helpers.models import randomise, tiny, tiny_base

PROMPT = torch.tensor([[1, 6, 7, 8]])


def test_a_saved_adapter_makes_the_student_of_its_base(family, tmp_path):
    student = tiny(family)
    before = {name: weight.clone() for name, weight in student.state_dict().items()}
    folder = save_adapter(student.float(), tmp_path)
    loaded = PeftModel.from_pretrained(tiny_base(family).float(), folder)
    torch.testing.assert_close(loaded(PROMPT).logits, student(PROMPT).logits)
    assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert all(torch.equal(weight.float(), student.state_dict()[name]) for name, weight in before.items())


def test_the_active_one_of_several_adapters_is_saved(student, tmp_path):
    student.add_adapter("other", LoraConfig(r=3, target_modules=["up_proj"]))
    randomise(student, "other", 0.3, 1).double()
    student.set_adapter("other")
    loaded = PeftModel.from_pretrained(tiny_base(), save_adapter(student, tmp_path))
    torch.testing.assert_close(loaded(PROMPT).logits, student(PROMPT).logits, rtol=1e-5, atol=1e-5)


def test_two_adapters_at_a_time_are_refused(student, tmp_path):
    student.add_adapter("other", LoraConfig(r=3, target_modules=["up_proj"]))
    student.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="`engine` needs a student that uses one adapter"):
        save_adapter(student, tmp_path)


def test_while_a_teacher_is_run_on_the_student_its_adapter_is_saved(student, tmp_path):
    student.add_adapter("other", LoraConfig(r=3, target_modules=["up_proj"]))
    randomise(student, "other", 0.3, 1).double()
    with AdapterTeacher("other").policy(student), torch.no_grad():
        assert adapter_in_use(student) == "other"
        loaded = PeftModel.from_pretrained(tiny_base(), save_adapter(student, tmp_path))
        torch.testing.assert_close(loaded(PROMPT).logits, student(PROMPT).logits, rtol=1e-5, atol=1e-5)
    assert adapter_in_use(student) == "default"


def test_without_its_adapter_the_student_is_its_base(student, tmp_path):
    with BaseTeacher().policy(student):
        assert adapter_in_use(student) is None
        with pytest.raises(ValueError, match="but this one uses none"):
            save_adapter(student, tmp_path)
        merged = dict(merged_weights(student))
    base = tiny_base()
    assert merged
    assert all(torch.equal(weight, base.state_dict()[name]) for name, weight in merged.items())
    assert dict(merged_weights(base)).keys() == dict(base.named_parameters()).keys()


@pytest.mark.parametrize("every_weight", [False, True])
def test_merged_weights_make_the_student_without_touching_it(family, every_weight):
    student = tiny(family)
    before = {name: weight.clone() for name, weight in student.state_dict().items()}
    merged = dict(merged_weights(student, every_weight=every_weight))
    assert all(torch.equal(weight, student.state_dict()[name]) for name, weight in before.items())
    plain = tiny_base(family, seed=0)
    missing = plain.load_state_dict(merged, strict=False).missing_keys
    assert not missing or not every_weight or missing == ["lm_head.weight"]  # tied to the embedding
    torch.testing.assert_close(plain(PROMPT).logits, student(PROMPT).logits)
