"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const ROLLOUTS_PER_PAGE = 40, TOKENS_PER_PAGE = 6000;
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

  // Influences are small, so they are written with three digits whatever their size.
  const precise = (value) => (value >= 0 ? "+" : "−") + Number(Math.abs(value).toPrecision(3)).toString();

  // ---------------------------------------------------------------- influence of every token

  const teacherCount = data.teachers.length;
  const starts = [0];  // of each rollout's tokens among all
  data.rollouts.forEach((rollout) => starts.push(starts[starts.length - 1] + rollout.pieces.length));
  const decode = (text) => new Float32Array(Uint8Array.from(atob(text), (character) => character.charCodeAt(0)).buffer);
  const influence = data.influence && { value: decode(data.influence.value), half: decode(data.influence.half), scale: data.influence.scale };
  const influenceOf = (rollout, depth, teacher) => {
    const place = (starts[rollout] + depth) * teacherCount + teacher;
    return { value: influence.value[place], half: influence.half[place], significant: Math.abs(influence.value[place]) > influence.half[place] };
  };

  // ---------------------------------------------------------------- nodes and filters

  const nodesOfRollout = data.rollouts.map(() => new Map());  // by depth
  data.nodes.forEach((node) => nodesOfRollout[node.rollout].set(node.depth, node));
  const isSignificant = (node, teacher) => node.low[teacher] !== null && (node.low[teacher] > 0 || node.high[teacher] < 0);

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
      data.rollouts[index].pieces.forEach((_, depth) => {
        const { value, significant } = influenceOf(index, depth, filters.teacher);
        if (Number.isNaN(value) || !passes(depth, significant, filters)) return;
        count += 1;
        sum += value;
      });
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

  // ---------------------------------------------------------------- rollouts

  // Rollouts are drawn page by page: a page of tens of thousands of tokens would be slow.
  let selectedRollouts = [], drawnCount = 0, pinnedToken = null;

  const drawRollouts = () => {
    const filters = readFilters();
    document.querySelectorAll("[data-measure]").forEach((legend) => {
      legend.hidden = (legend.dataset.measure === "influence") !== filters.byInfluence;
    });
    const summaries = selectRollouts(filters);
    selectedRollouts = summaries.map((summary) => summary.index);
    byId("count").textContent = `${summaries.reduce((sum, summary) => sum + summary.count, 0)} `
      + `${filters.byInfluence ? "" : "measured "}tokens in ${summaries.length} rollouts`;
    drawnCount = 0;
    pinnedToken = null;
    byId("rollouts").replaceChildren();
    drawNextPage();
    const firstToken = byId("rollouts").querySelector(".token[data-depth]:not(.faded)");
    if (firstToken) firstToken.tabIndex = 0;
    else if (influence || data.nodes.length) byId("panel").replaceChildren(element("p", "note", "No measured token passes these filters."));
  };

  const drawNextPage = () => {
    const filters = readFilters(), articles = [];
    let tokenCount = 0;
    while (drawnCount < selectedRollouts.length && articles.length < ROLLOUTS_PER_PAGE && tokenCount < TOKENS_PER_PAGE) {
      const index = selectedRollouts[drawnCount];
      articles.push(drawRollout(index, filters));
      tokenCount += data.rollouts[index].pieces.length;
      drawnCount += 1;
    }
    byId("rollouts").append(...articles);
    byId("more").hidden = drawnCount >= selectedRollouts.length;
    // Scroll to the end of each prompt, where the question stands.
    articles.forEach((article) => {
      const prompt = article.querySelector(".prompt");
      prompt.scrollTop = prompt.scrollHeight;
    });
    return articles;
  };

  const drawRollout = (index, filters) => {
    const rollout = data.rollouts[index], article = element("article", "rollout"), header = element("header");
    header.append("question ", element("bdi", "", rollout.question),
      ` · ${rollout.correct ? "correct" : "incorrect"} · reward ${rollout.reward}${rollout.truncated ? " · cut at the length limit" : ""}`);
    const response = element("div", "response");
    rollout.pieces.forEach((piece, depth) => {
      const token = element("span", "token", piece === "" ? "∅" : piece);
      const node = nodesOfRollout[index].get(depth);
      if (filters.byInfluence) styleByInfluence(token, index, depth, piece, filters);
      else if (node) styleByAlignment(token, node, piece, filters);
      response.append(token);
    });
    if (rollout.omitted) response.append(element("span", "note", ` … and ${rollout.omitted} more tokens that are not shown`));
    article.append(header, element("div", "prompt", rollout.prompt), response);
    return article;
  };

  const makeButton = (token, rollout, depth, description, faded) => {
    token.dataset.rollout = rollout;
    token.dataset.depth = depth;
    token.tabIndex = -1;  // Tab stops at one token only; the arrow keys move on from there
    token.setAttribute("role", "button");
    token.setAttribute("aria-label", description);
    if (faded) token.classList.add("faded");
  };

  // Colour a token by a figure from -1 to +1.
  const colour = (token, share, significant, frameClass) => {
    if (significant) {
      const fill = interpolate(share, FILL_SCALE);
      token.classList.add("significant");
      token.style.background = css(fill);
      token.style.color = isLight(fill) ? "#000" : "#fff";
    } else {
      token.classList.add(frameClass);
      token.style.borderColor = css(interpolate(share, FRAME_SCALE));
    }
  };

  const styleByInfluence = (token, rollout, depth, piece, filters) => {
    const { value, significant } = influenceOf(rollout, depth, filters.teacher);
    if (Number.isNaN(value)) return;
    token.classList.add("defined");
    if (nodesOfRollout[rollout].has(depth)) token.classList.add("node");
    const description = `${piece}, token ${depth}, influence ${precise(value)}, ${significant ? "significant" : "not significant"}`;
    makeButton(token, rollout, depth, description, !passes(depth, significant, filters));
    colour(token, Math.max(-1, Math.min(1, value / influence.scale)), significant, "slight");
  };

  const styleByAlignment = (token, node, piece, filters) => {
    const status = node.status[filters.teacher], alignment = node.alignment[filters.teacher];
    const significant = isSignificant(node, filters.teacher);
    token.classList.add(status);
    const description = status === "defined" ? `${signed(alignment)}, ${significant ? "significant" : "not significant"}` : status;
    makeButton(token, node.rollout, node.depth, `${piece}, token ${node.depth}, alignment ${description}`, !passes(node.depth, significant, filters));
    if (status === "defined" && alignment !== null) colour(token, alignment, significant, "insignificant");
  };

  // ---------------------------------------------------------------- the panel on one token

  const showToken = (token) => {
    document.querySelectorAll(".token.chosen").forEach((other) => other.classList.remove("chosen"));
    token.classList.add("chosen");
    const rollout = Number(token.dataset.rollout), depth = Number(token.dataset.depth);
    const node = nodesOfRollout[rollout].get(depth);
    const piece = data.rollouts[rollout].pieces[depth], heading = element("h2", "", `Token ${depth} of the response `);
    heading.append(element("span", "word", piece === "" ? "∅" : piece));
    const contents = [heading];
    if (influence) contents.push(influenceTable(rollout, depth));
    if (node) contents.push(teacherTable(node), candidateTable(node), panelNote());
    else if (data.nodes.length) contents.push(element("p", "note", "Not measured with continuations. Underlined tokens are."));
    byId("panel").replaceChildren(...contents);
  };

  const influenceTable = (rollout, depth) => {
    const table = element("table");
    table.append(row("th", ["teacher", "influence", `${data.level} interval`]));
    data.teachers.forEach((name, teacher) => {
      const { value, half, significant } = influenceOf(rollout, depth, teacher);
      const line = element("tr"), cell = element("td");
      cell.append(element("bdi", "", name));
      const side = significant ? (value > 0 ? "helps" : "harms") : "";
      line.append(cell, element("td", side, Number.isNaN(value) ? "not measured" : precise(value)),
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
      const line = element("tr"), cell = element("td");
      cell.append(element("bdi", "", name));
      line.append(cell, element("td", "", alignment), element("td", "", signed(node.gain[teacher])));
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
    cell.append(element("span", "word", text === undefined ? `token ${id}` : text === "" ? "∅" : text));
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
  ["measure", "teacher", "correct", "from", "to", "significant", "sort"].forEach((id) => {
    const control = byId(id);
    control.addEventListener(control.tagName === "SELECT" ? "change" : "input", drawRollouts);
  });
  byId("more").addEventListener("click", () => {
    const [firstNew] = drawNextPage(), token = firstNew && firstNew.querySelector("[data-depth]:not(.faded)");
    if (token) token.focus();
  });
  drawRollouts();
})();
