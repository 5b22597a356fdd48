"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const ROLLOUTS_PER_PAGE = 40;
  // Colours of alignments from -1 to +1: of filled tokens, and of frames, whose middle must be visible on the card.
  const FILL_SCALE = [[127, 59, 8], [224, 130, 20], [254, 224, 182], [247, 247, 247], [216, 218, 235], [128, 115, 172], [45, 0, 75]];
  const FRAME_SCALE = [[196, 106, 22], [140, 140, 140], [128, 100, 190]];

  const byId = (id) => document.getElementById(id);
  const element = (tag, className, text) => {
    const created = document.createElement(tag);
    if (className) created.className = className;
    if (text !== undefined) created.textContent = text;
    return created;
  };
  const row = (tag, texts) => {
    const created = element("tr");
    texts.forEach((text) => created.append(element(tag, "", text)));
    return created;
  };

  const interpolate = (value, scale) => {
    const position = ((value + 1) / 2) * (scale.length - 1);
    const start = Math.min(scale.length - 2, Math.floor(position));
    return scale[start].map((channel, i) => Math.round(channel + (position - start) * (scale[start + 1][i] - channel)));
  };
  const css = (rgb) => `rgb(${rgb.join(",")})`;
  const isLight = (rgb) => 0.3 * rgb[0] + 0.59 * rgb[1] + 0.11 * rgb[2] > 140;
  const percentage = (share) => (share === null ? "–" : share < 0.0005 && share > 0 ? "<0.1%" : (100 * share).toFixed(1) + "%");
  const signed = (value) => (value === null ? "no estimate" : (value >= 0 ? "+" : "−") + Math.abs(value).toFixed(3));

  // ---------------------------------------------------------------- nodes and filters

  const nodesOfRollout = data.rollouts.map(() => new Map());  // by depth
  data.nodes.forEach((node) => nodesOfRollout[node.rollout].set(node.depth, node));
  const nodeOf = (token) => nodesOfRollout[Number(token.dataset.rollout)].get(Number(token.dataset.depth));
  const isSignificant = (node, teacher) => node.low[teacher] !== null && (node.low[teacher] > 0 || node.high[teacher] < 0);

  const readFilters = () => ({
    teacher: Number(byId("teacher").value),
    correct: byId("correct").value,
    from: Number(byId("from").value || 0),
    to: byId("to").value === "" ? Infinity : Number(byId("to").value),
    significant: byId("significant").checked,
    sort: byId("sort").value,
  });
  const passes = (node, filters) =>
    node.depth >= filters.from && node.depth <= filters.to && (!filters.significant || isSignificant(node, filters.teacher));

  const selectRollouts = (filters) => {
    const filtersNodes = filters.significant || filters.from > 0 || filters.to < Infinity;
    const selected = data.rollouts.map((_, index) => index).filter((index) =>
      (filters.correct === "" || data.rollouts[index].correct === (filters.correct === "1"))
      && (!filtersNodes || [...nodesOfRollout[index].values()].some((node) => passes(node, filters))));
    if (filters.sort === "order") return selected;
    const totalGain = (index) => [...nodesOfRollout[index].values()]
      .filter((node) => passes(node, filters))
      .reduce((sum, node) => sum + (node.gain[filters.teacher] ?? 0), 0);
    const sign = filters.sort === "harm" ? 1 : -1;
    const keys = new Map(selected.map((index) => [index, sign * totalGain(index)]));
    return selected.sort((first, second) => keys.get(first) - keys.get(second));
  };

  // ---------------------------------------------------------------- rollouts

  let rolloutLimit = ROLLOUTS_PER_PAGE, pinnedToken = null;

  const drawRollouts = () => {
    const filters = readFilters(), selected = selectRollouts(filters), list = byId("rollouts");
    list.replaceChildren(...selected.slice(0, rolloutLimit).map((index) => drawRollout(index, filters)));
    let count = 0;
    selected.forEach((index) => nodesOfRollout[index].forEach((node) => { if (passes(node, filters)) count += 1; }));
    byId("count").textContent = `${count} measured tokens in ${selected.length} rollouts`;
    byId("more").hidden = selected.length <= rolloutLimit;
    // Scroll to the end of each prompt, where the question stands.
    list.querySelectorAll(".prompt").forEach((prompt) => { prompt.scrollTop = prompt.scrollHeight; });
    const firstToken = list.querySelector(".token[data-depth]:not(.faded)");
    pinnedToken = null;
    if (firstToken) firstToken.tabIndex = 0;
    else byId("panel").replaceChildren(element("p", "note", "No measured token passes these filters."));
  };

  const drawRollout = (index, filters) => {
    const rollout = data.rollouts[index], article = element("article", "rollout"), header = element("header");
    header.append("question ", element("bdi", "", rollout.question),
      ` · ${rollout.correct ? "correct" : "incorrect"} · reward ${rollout.reward}${rollout.truncated ? " · cut at the length limit" : ""}`);
    const response = element("div", "response");
    rollout.pieces.forEach((piece, depth) => {
      const token = element("span", "token", piece === "" ? "∅" : piece);
      const node = nodesOfRollout[index].get(depth);
      if (node) styleToken(token, node, piece, filters);
      response.append(token);
    });
    if (rollout.omitted) response.append(element("span", "note", ` … and ${rollout.omitted} more tokens that are not shown`));
    article.append(header, element("div", "prompt", rollout.prompt), response);
    return article;
  };

  const styleToken = (token, node, piece, filters) => {
    const status = node.status[filters.teacher], alignment = node.alignment[filters.teacher];
    const significant = isSignificant(node, filters.teacher);
    token.classList.add(status);
    token.dataset.rollout = node.rollout;
    token.dataset.depth = node.depth;
    token.tabIndex = -1;  // Tab stops at one token only; the arrow keys move on from there
    token.setAttribute("role", "button");
    const description = status === "defined" ? `${signed(alignment)}, ${significant ? "significant" : "not significant"}` : status;
    token.setAttribute("aria-label", `${piece}, token ${node.depth}, alignment ${description}`);
    if (!passes(node, filters)) token.classList.add("faded");
    if (status !== "defined" || alignment === null) return;
    if (significant) {
      const fill = interpolate(alignment, FILL_SCALE);
      token.classList.add("significant");
      token.style.background = css(fill);
      token.style.color = isLight(fill) ? "#000" : "#fff";
    } else {
      token.classList.add("insignificant");
      token.style.borderColor = css(interpolate(alignment, FRAME_SCALE));
    }
  };

  // ---------------------------------------------------------------- the panel on one token

  const showToken = (token) => {
    document.querySelectorAll(".token.chosen").forEach((other) => other.classList.remove("chosen"));
    token.classList.add("chosen");
    const node = nodeOf(token);
    byId("panel").replaceChildren(
      element("h2", "", `Token ${node.depth} of the response`), teacherTable(node), candidateTable(node), panelNote());
  };

  const teacherTable = (node) => {
    const table = element("table");
    table.append(row("th", ["teacher", "alignment", "predicted gain"]));
    data.teachers.forEach((name, teacher) => {
      const low = node.low[teacher], interval = low === null ? "" : ` (${signed(low)} to ${signed(node.high[teacher])})`;
      const alignment = node.status[teacher] === "defined" ? signed(node.alignment[teacher]) + interval : node.status[teacher];
      const line = element("tr"), cell = element("td");
      cell.append(element("bdi", "", name));
      line.append(cell, element("td", "", alignment), element("td", "", signed(node.gain[teacher])));
      table.append(line);
    });
    return table;
  };

  const candidateTable = (node) => {
    const table = element("table");
    table.append(row("th", ["candidate", data.free ? "reward" : "success", "student"]));
    node.tokens.forEach((id, branch) => {
      // In free mode the second branch is only the baseline that the reward is compared with.
      if (!data.free || branch === node.taken) table.append(candidateRow(node, id, branch), teachersRow(node, branch));
    });
    return table;
  };

  const candidateRow = (node, id, branch) => {
    const line = element("tr"), cell = element("td"), text = data.words[id];
    cell.append(element("span", "word", text === undefined ? `token ${id}` : text === "" ? "∅" : text));
    if (branch === node.taken) cell.append(element("span", "note", " sampled"));
    line.append(cell, element("td", "", describeSuccess(node, branch)), element("td", "", percentage(node.student[branch])));
    return line;
  };

  const describeSuccess = (node, branch) => {
    if (data.free) return String(data.rollouts[node.rollout].reward);
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
    + (data.free
      ? "In free mode no continuation was sampled; the rollout's own reward stands for the success of its tokens."
      : `Success: the share of the student's continuations from the candidate that succeed, with its ${data.level} interval and their number.`)
    + " Click a token to pin it, and click it again to unpin it.");

  const pin = (token) => {
    document.querySelectorAll(".token.pinned").forEach((other) => other.classList.remove("pinned"));
    pinnedToken = token;
    if (token) token.classList.add("pinned");
  };

  // ---------------------------------------------------------------- events

  const onToken = (type, handler) => byId("rollouts").addEventListener(type, (event) => {
    const token = event.target.closest("[data-depth]");
    if (token) handler(token, event);
  });
  onToken("mouseover", (token) => { if (!pinnedToken) showToken(token); });
  onToken("click", (token) => {
    pin(pinnedToken === token ? null : token);
    showToken(token);
  });
  onToken("focusin", (token) => {
    document.querySelectorAll('#rollouts [tabindex="0"]').forEach((other) => { other.tabIndex = -1; });
    token.tabIndex = 0;
    if (!pinnedToken) showToken(token);
  });
  onToken("keydown", (token, event) => {
    if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      token.click();
      return;
    }
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    const tokens = [...document.querySelectorAll("#rollouts [data-depth]:not(.faded), #rollouts [data-depth]:focus")];
    const next = tokens[tokens.indexOf(token) + step];
    if (next) {
      next.focus();
      event.preventDefault();
    }
  });
  ["teacher", "correct", "from", "to", "significant", "sort"].forEach((id) => {
    const control = byId(id);
    control.addEventListener(control.tagName === "SELECT" ? "change" : "input", () => {
      rolloutLimit = ROLLOUTS_PER_PAGE;
      drawRollouts();
    });
  });
  byId("more").addEventListener("click", () => {
    const before = rolloutLimit, pinnedPlace = pinnedToken && { ...pinnedToken.dataset };
    rolloutLimit += ROLLOUTS_PER_PAGE;
    drawRollouts();
    if (pinnedPlace) pin(document.querySelector(`#rollouts [data-rollout="${pinnedPlace.rollout}"][data-depth="${pinnedPlace.depth}"]`));
    const firstNew = byId("rollouts").children[before], token = firstNew && firstNew.querySelector("[data-depth]:not(.faded)");
    if (token) token.focus();
  });
  drawRollouts();
})();
