"""Teachers named by the import paths of their classes."""

import pytest

from odp_callbacks.engine.teachers import EMATeacher, as_teachers


def test_a_class_path_makes_a_teacher_alone_in_a_list_and_by_name() -> None:
    moving = {"class_path": "odp_callbacks.EMATeacher", "init_args": {"decay": 0.9, "context": "{answer} {prompt}"}}
    for teachers in (moving, [moving], {"ema": moving}):
        (teacher,) = as_teachers(teachers).values()
        assert isinstance(teacher, EMATeacher)
        assert teacher.decay == 0.9
        assert teacher.context == "{answer} {prompt}"
    assert list(as_teachers([{"class_path": "odp_callbacks.BaseTeacher"}, moving])) == ["base", "ema"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"class_path": "odp_callbacks.NoTeacher"}, "'odp_callbacks.NoTeacher', which cannot be imported"),
        ({"class_path": "no_such_package.Teacher"}, "'no_such_package.Teacher', which cannot be imported"),
        ({"class_path": "EMATeacher"}, "import paths such as 'odp_callbacks.ModelTeacher', but 'EMATeacher'"),
        (
            {"class_path": "odp_callbacks.ProbeConfig"},
            "classes of teachers, .* but 'odp_callbacks.ProbeConfig' is none",
        ),
        ({"class_path": "odp_callbacks.EMATeacher", "decay": 0.9}, "beside 'decay'; .* belong into 'init_args'"),
        ({"class_path": "odp_callbacks.EMATeacher", "init_args": {"rate": 0.9}}, "cannot make .*'rate'"),
        ({"class_path": "odp_callbacks.EMATeacher", "init_args": {"decay": 9}}, "`decay` must lie in"),
    ],
)
def test_what_cannot_be_made_is_refused(value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        as_teachers({"teacher": value})
