"""Teachers: policies that the student is distilled from, each with a context of its own.

A teacher may be another model, another adapter, the base model, the student itself or an average of it. It always
receives exactly the response tokens that the student sampled, after its own prompt.
"""

from odp_callbacks.engine.teachers.context import Context
from odp_callbacks.engine.teachers.kinds import AdapterTeacher, BaseTeacher, EMATeacher, ModelTeacher, Policy, Teacher
from odp_callbacks.engine.teachers.logits import teacher_logits, teacher_prompt_ids
from odp_callbacks.engine.teachers.model_scorer import ModelScorer
from odp_callbacks.engine.teachers.naming import as_teachers
from odp_callbacks.engine.teachers.served import ServedTeacher

__all__ = [
    "AdapterTeacher",
    "BaseTeacher",
    "Context",
    "EMATeacher",
    "ModelScorer",
    "ModelTeacher",
    "Policy",
    "ServedTeacher",
    "Teacher",
    "as_teachers",
    "teacher_logits",
    "teacher_prompt_ids",
]
