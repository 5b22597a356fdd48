// The panel on one token, and the marks of the tokens that were chosen and pinned.

let chosenToken = null, pinnedToken = null;  // as {rollout, depth}, because a block's elements come and go
const placeOf = (token) => ({ rollout: Number(token.dataset.rollout), depth: Number(token.dataset.depth) });
const isAt = (place, token) => place !== null && place.rollout === Number(token.dataset.rollout) && place.depth === Number(token.dataset.depth);
const tokenAt = (place, within) => within.querySelector(`[data-rollout="${place.rollout}"][data-depth="${place.depth}"]`);

const mark = (className, place) => {
  document.querySelectorAll(`.token.${className}`).forEach((other) => other.classList.remove(className));
  const token = place && tokenAt(place, list);
  if (token) token.classList.add(className);
};
const restoreMarks = (within) => {
  [["chosen", chosenToken], ["pinned", pinnedToken]].forEach(([className, place]) => {
    const token = place && tokenAt(place, within);
    if (token) token.classList.add(className);
  });
};
const forgetMarks = () => {
  chosenToken = null;
  pinnedToken = null;
};

const pin = (place) => {
  pinnedToken = place;
  mark("pinned", place);
};

const showToken = (token) => {
  chosenToken = placeOf(token);
  mark("chosen", chosenToken);
  const { rollout, depth } = chosenToken, node = nodesOfRollout[rollout].get(depth);
  const heading = element("h2", "", `Token ${depth} of the response `);
  heading.append(element("span", "word", shownPiece(pieceAt(rollout, depth))));
  const contents = [element("button", "close", "close"), heading];
  if (influence) contents.push(influenceTable(rollout, depth));
  if (node) contents.push(teacherTable(node), candidateTable(node), panelNote());
  else if (data.nodes.length) contents.push(element("p", "note", "Not measured with continuations. Tokens with a bar below them are."));
  byId("panel").classList.remove("idle");
  byId("panel").replaceChildren(...contents);
};

const nameCell = (name) => {
  const cell = element("td");
  cell.append(element("bdi", "", name));
  return cell;
};

const influenceTable = (rollout, depth) => {
  const table = element("table");
  table.append(row("th", ["teacher", "influence", `${data.level} interval`]));
  data.teachers.forEach((name, teacher) => {
    const { value, half, significant } = influenceOf(rollout, depth, teacher), line = element("tr");
    const side = significant ? (value > 0 ? "helps" : "harms") : "";
    line.append(nameCell(name), element("td", side, Number.isNaN(value) ? "not measured" : precise(value)),
      element("td", "", Number.isNaN(half) ? "too few questions" : `${precise(value - half)} to ${precise(value + half)}`));
    table.append(line);
  });
  return table;
};

const teacherTable = (node) => {
  const table = element("table");
  table.append(row("th", ["teacher", "alignment", "predicted gain"]));
  data.teachers.forEach((name, teacher) => {
    const low = node.low[teacher], interval = low === null ? "" : ` (${signed(low)} to ${signed(node.high[teacher])})`;
    const alignment = node.status[teacher] === "defined" ? signed(node.alignment[teacher]) + interval : node.status[teacher];
    const line = element("tr");
    line.append(nameCell(name), element("td", "", alignment), element("td", "", signed(node.gain[teacher])));
    table.append(line);
  });
  return table;
};

const candidateTable = (node) => {
  const table = element("table");
  table.append(row("th", ["candidate", "success", "student"]));
  node.tokens.forEach((id, branch) => {
    table.append(candidateRow(node, id, branch), teachersRow(node, branch));
  });
  return table;
};

const candidateRow = (node, id, branch) => {
  const line = element("tr"), cell = element("td"), text = data.words[id];
  cell.append(element("span", "word", text === undefined ? `token ${id}` : shownPiece(text)));
  if (branch === node.taken) cell.append(element("span", "note", " sampled"));
  line.append(cell, element("td", "", describeSuccess(node, branch)), element("td", "", percentage(node.student[branch])));
  return line;
};

const describeSuccess = (node, branch) => {
  const [mean, low, high, count] = node.success[branch];
  if (mean === null) return "not measured";
  return count === 0 ? `${percentage(mean)} exact` : `${percentage(mean)} (${percentage(low)} to ${percentage(high)}; ${count})`;
};

// A row of its own for the teachers' probabilities, since there is no room for a column of each teacher.
const teachersRow = (node, branch) => {
  const line = element("tr", "teachers"), cell = element("td");
  cell.colSpan = 3;
  data.teachers.forEach((name, teacher) => {
    const probability = node.teachers[teacher][branch], student = node.student[branch];
    const entry = element("span", "teacher");
    entry.append(element("bdi", "", name), ` ${percentage(probability)}`);
    if (probability !== null && Math.abs(probability - student) > 1e-4)
      entry.append(probability > student ? element("span", "up", " ▲") : element("span", "down", " ▼"));
    cell.append(entry, " ");
  });
  line.append(cell);
  return line;
};

const panelNote = () => element("p", "note",
  "Student: the probability of the candidate under the student. Below it, its probability under each teacher: ▲ pushed up, ▼ pushed down. "
  + `Success: the share of the student's continuations from the candidate that succeed, with its ${data.level} interval and their number.`
  + " Click a token to pin it, and click it again to unpin it.");
