"""Scripts that operate the report page, for tests in a browser and for benchmarks."""

FILTER = """
const control = document.getElementById(arguments[0]), start = performance.now();
if (control.type === 'checkbox') control.checked = arguments[1]; else control.value = arguments[1];
control.dispatchEvent(new Event(control.tagName === 'SELECT' ? 'change' : 'input'));
document.getElementById('rollouts').getBoundingClientRect();
return performance.now() - start;
"""
"""Sets a control by its id to a value, and returns the milliseconds until the page is laid out again."""
