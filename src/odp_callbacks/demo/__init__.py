"""A demonstration: distil a real student on real questions, and measure three teachers, in minutes on two cores."""
