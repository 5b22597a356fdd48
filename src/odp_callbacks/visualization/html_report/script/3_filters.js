// Which rollouts are shown, in which order, and which of their tokens are faded.

const readFilters = () => ({
  byInfluence: influence !== null && byId("measure").value === "influence",
  teacher: Number(byId("teacher").value),
  correct: byId("correct").value,
  from: Number(byId("from").value || 0),
  to: byId("to").value === "" ? Infinity : Number(byId("to").value),
  significant: byId("significant").checked,
  sort: byId("sort").value,
});
const passes = (depth, significant, filters) =>
  depth >= filters.from && depth <= filters.to && (!filters.significant || significant);

// The tokens of a rollout that have a figure and pass the filters: their number, and the sum of the figure.
const summarise = (index, filters) => {
  let count = 0, sum = 0;
  if (filters.byInfluence) {
    const last = Math.min(data.rollouts[index].length - 1, filters.to);
    for (let depth = Math.max(0, filters.from); depth <= last; depth += 1) {
      const place = (starts[index] + depth) * teacherCount + filters.teacher, value = influence.value[place];
      if (Number.isNaN(value) || (filters.significant && !(Math.abs(value) > influence.half[place]))) continue;
      count += 1;
      sum += value;
    }
  } else nodesOfRollout[index].forEach((node) => {
    if (!passes(node.depth, isSignificant(node, filters.teacher), filters)) return;
    count += 1;
    sum += node.gain[filters.teacher] ?? 0;
  });
  return { index, count, sum };
};

const selectRollouts = (filters) => {
  const filtersTokens = filters.significant || filters.from > 0 || filters.to < Infinity;
  const selected = data.rollouts.map((_, index) => index)
    .filter((index) => filters.correct === "" || data.rollouts[index].correct === (filters.correct === "1"))
    .map((index) => summarise(index, filters))
    .filter((summary) => !filtersTokens || summary.count > 0);
  const sign = { harm: 1, help: -1, order: 0 }[filters.sort];
  return selected.sort((first, second) => sign * (first.sum - second.sum));
};
