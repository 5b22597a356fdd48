"""The demonstration: a real student, real questions, three teachers, five minutes on two cores."""
