"""Layers and kinds of LoRA modules by their names."""

from odp_callbacks.analysis.module_names import module_positions, short_kinds


def test_modules_of_two_towers_stay_apart() -> None:
    names = ["vision.layers.0.q_proj", "text.layers.0.q_proj"]
    assert module_positions(names) == {
        "vision.layers.0.q_proj": (0, "vision.layers.q_proj"),
        "text.layers.0.q_proj": (0, "text.layers.q_proj"),
    }
    assert list(short_kinds([kind for _, kind in module_positions(names).values()]).values()) == [
        "vision.layers.q_proj", "text.layers.q_proj",
    ]  # fmt: skip
