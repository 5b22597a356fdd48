"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const $ = (id) => document.getElementById(id);
  const PAGE = 40;
  const SCALE = [[127, 59, 8], [224, 130, 20], [254, 224, 182], [247, 247, 247], [216, 218, 235], [128, 115, 172], [45, 0, 75]];
  const FRAMES = [[196, 106, 22], [140, 140, 140], [128, 100, 190]];
  const byRollout = data.rollouts.map(() => new Map());
  data.nodes.forEach((node) => byRollout[node.r].set(node.d, node));
  let limit = PAGE, pinned = null;

  const make = (tag, cls, text) => {
    const e = document.createElement(tag);
    if (cls) e.className = cls;
    if (text !== undefined) e.textContent = text;
    return e;
  };
  const colour = (value, scale) => {
    const x = ((value + 1) / 2) * (scale.length - 1);
    const i = Math.min(scale.length - 2, Math.floor(x));
    return scale[i].map((c, j) => Math.round(c + (x - i) * (scale[i + 1][j] - c)));
  };
  const percent = (x) => (x === null ? "–" : x < 0.0005 && x > 0 ? "<0.1 %" : (100 * x).toFixed(1) + " %");
  const signed = (x) => (x === null ? "undefined" : (x >= 0 ? "+" : "−") + Math.abs(x).toFixed(3));
  const state = () => ({
    k: Number($("teacher").value), correct: $("correct").value, from: Number($("from").value || 0),
    to: $("to").value === "" ? Infinity : Number($("to").value), certain: $("certain").checked, sort: $("sort").value,
  });
  const sure = (node, k) => node.l[k] !== null && (node.l[k] > 0 || node.h[k] < 0);
  const passes = (node, s) => node.d >= s.from && node.d <= s.to && (!s.certain || sure(node, s.k));

  const chosenRollouts = (s) => {
    const some = s.certain || s.from > 0 || s.to < Infinity;
    const found = data.rollouts.map((r, i) => i).filter((i) => (s.correct === "" || data.rollouts[i].correct === (s.correct === "1"))
      && (!some || [...byRollout[i].values()].some((node) => passes(node, s))));
    if (s.sort === "order") return found;
    const sign = s.sort === "harm" ? 1 : -1;
    const total = (i) => {
      let sum = 0;
      byRollout[i].forEach((node) => { if (passes(node, s) && node.g[s.k] !== null) sum += node.g[s.k]; });
      return sign * sum;
    };
    const keys = new Map(found.map((i) => [i, total(i)]));
    return found.sort((a, b) => keys.get(a) - keys.get(b));
  };

  const draw = () => {
    const s = state(), order = chosenRollouts(s), place = $("rollouts");
    place.replaceChildren();
    let count = 0;
    order.forEach((i) => byRollout[i].forEach((node) => { if (passes(node, s)) count += 1; }));
    order.slice(0, limit).forEach((i) => place.append(drawRollout(i, s)));
    $("count").textContent = `${count} measured tokens in ${order.length} rollouts`;
    $("more").hidden = order.length <= limit;
    // The question stands at a prompt's end.
    document.querySelectorAll("#rollouts .prompt").forEach((e) => { e.scrollTop = e.scrollHeight; });
    const first = place.querySelector(".tok[data-d]:not(.faded)");
    if (first) first.tabIndex = 0;
    pinned = null;
    if (!first) $("panel").replaceChildren(make("p", "note", "No measured token passes these filters."));
  };
  const drawRollout = (i, s) => {
    const rollout = data.rollouts[i], box = make("article", "rollout"), head = make("header");
    head.append("question ", make("bdi", "", rollout.question), ` · ${rollout.correct ? "correct" : "incorrect"} · reward ${rollout.reward}${rollout.truncated ? " · cut at the limit" : ""}`);
    const response = make("div", "response");
    rollout.pieces.forEach((piece, d) => {
      const node = byRollout[i].get(d);
      const token = make("span", "tok", piece === "" ? "∅" : piece);
      if (node) {
        const kind = node.u[s.k];
        token.classList.add(kind);
        token.dataset.r = i;
        token.dataset.d = d;
        token.tabIndex = -1;  // one stop for all tokens: the arrow keys go on from there
        token.setAttribute("role", "button");
        token.setAttribute("aria-label", `${piece}, token ${d}, alignment ${kind === "defined" ? signed(node.a[s.k]) + (sure(node, s.k) ? ", side sure" : ", side not sure") : kind}`);
        if (!passes(node, s)) token.classList.add("faded");
        if (kind === "defined" && node.a[s.k] !== null) {
          if (sure(node, s.k)) {
            const rgb = colour(node.a[s.k], SCALE);
            token.classList.add("sure");
            token.style.background = `rgb(${rgb.join(",")})`;
            token.style.color = 0.3 * rgb[0] + 0.59 * rgb[1] + 0.11 * rgb[2] > 140 ? "#000" : "#fff";
          } else {
            token.classList.add("unsure");
            token.style.borderColor = `rgb(${colour(node.a[s.k], FRAMES).join(",")})`;
          }
        }
      }
      response.append(token);
    });
    if (rollout.more) response.append(make("span", "note", ` … and ${rollout.more} more tokens that are not shown`));
    box.append(head, make("div", "prompt", rollout.prompt), response);
    return box;
  };

  const show = (token) => {
    document.querySelectorAll(".tok.chosen").forEach((e) => e.classList.remove("chosen"));
    token.classList.add("chosen");
    const node = byRollout[Number(token.dataset.r)].get(Number(token.dataset.d));
    const panel = $("panel"), word = (k) => { const w = data.words[k]; return w === undefined ? `token ${k}` : w === "" ? "∅" : w; };
    panel.replaceChildren();
    panel.append(make("h2", "", `Token ${node.d} of the response`));
    const list = make("table");
    const top = make("tr");
    ["teacher", "alignment", "predicted gain"].forEach((t) => top.append(make("th", "", t)));
    list.append(top);
    data.teachers.forEach((name, k) => {
      const row = make("tr"), kind = node.u[k];
      const cell = make("td");
      cell.append(make("bdi", "", name));
      row.append(cell, make("td", "", kind === "defined" ? signed(node.a[k]) + (node.l[k] === null ? "" : ` (true one ${signed(node.l[k])} to ${signed(node.h[k])})`) : kind === "undefined" ? "undefined" : "cannot tell"), make("td", "", signed(node.g[k])));
      list.append(row);
    });
    panel.append(list);
    const table = make("table"), head = make("tr");
    ["could stand here", data.free ? "reward" : "success", "student p"].forEach((t) => head.append(make("th", "", t)));
    table.append(head);
    node.k.forEach((id, a) => {
      if (data.free && a !== node.t) return;  // the other branch is what the reward is compared with
      const row = make("tr"), name = make("td");
      name.append(make("span", "word", word(id)));
      if (a === node.t) name.append(make("span", "note", " taken"));
      row.append(name);
      const [mean, low, high, n] = node.s[a];
      if (data.free) row.append(make("td", "", String(data.rollouts[node.r].reward)));
      else row.append(make("td", "", mean === null ? "not measured" : n === 0 ? `${percent(mean)} known` : `${percent(mean)} (${percent(low)} to ${percent(high)}; ${n})`));
      row.append(make("td", "", percent(node.p[a])));
      table.append(row);
      // A line of its own: with many teachers a column for each would not fit.
      const line = make("tr", "q"), cell = make("td");
      cell.colSpan = 3;
      data.teachers.forEach((name, k) => {
        const q = node.q[k][a], up = q > node.p[a], part = make("span", "one");
        part.append(make("bdi", "", name), ` ${percent(q)}`);
        if (q !== null && Math.abs(q - node.p[a]) > 1e-4) part.append(make("span", up ? "up" : "down", up ? " ▲" : " ▼"));
        cell.append(part, " ");
      });
      line.append(cell);
      table.append(line);
    });
    panel.append(table, make("p", "note", data.free ? "Free mode: no continuation was sampled, and the rollout's own reward stands for the success of its tokens; ▲ pushed up, ▼ pushed down by the teacher, whose probability q is given" : "success: share of the student's own continuations that reach it, with its 95 % interval and their number; ▲ pushed up, ▼ pushed down by the teacher, whose probability q is given. Click a token to hold this, click it again to let go."));
  };

  const hold = (token) => {
    document.querySelectorAll(".tok.pinned").forEach((o) => o.classList.remove("pinned"));
    pinned = token;
    if (token) token.classList.add("pinned");
  };
  $("rollouts").addEventListener("mouseover", (e) => { const t = e.target.closest("[data-d]"); if (t && !pinned) show(t); });
  $("rollouts").addEventListener("click", (e) => {
    const t = e.target.closest("[data-d]");
    if (!t) return;
    hold(pinned === t ? null : t);
    show(t);
  });
  $("rollouts").addEventListener("focusin", (e) => {
    const t = e.target.closest("[data-d]");
    if (!t) return;
    document.querySelectorAll('#rollouts [tabindex="0"]').forEach((o) => { o.tabIndex = -1; });
    t.tabIndex = 0;
    if (!pinned) show(t);
  });
  $("rollouts").addEventListener("keydown", (e) => {
    if ((e.key === "Enter" || e.key === " ") && e.target.closest("[data-d]")) {
      e.preventDefault();
      e.target.closest("[data-d]").click();
      return;
    }
    const step = { ArrowRight: 1, ArrowLeft: -1 }[e.key];
    if (!step) return;
    const all = [...document.querySelectorAll("#rollouts [data-d]")];
    let place = all.indexOf(document.activeElement) + step;
    while (all[place] && all[place].classList.contains("faded")) place += step;
    const next = all[place];
    if (next) { next.focus(); e.preventDefault(); }
  });
  ["teacher", "correct", "from", "to", "certain", "sort"].forEach((id) => $(id).addEventListener($(id).tagName === "SELECT" ? "change" : "input", () => { limit = PAGE; draw(); }));
  $("more").addEventListener("click", () => {
    const before = limit, held = pinned && [pinned.dataset.r, pinned.dataset.d];
    limit += PAGE;
    draw();
    const fresh = $("rollouts").children[before], token = fresh && fresh.querySelector("[data-d]:not(.faded)");
    if (held) hold(document.querySelector(`#rollouts [data-r="${held[0]}"][data-d="${held[1]}"]`));
    if (token) token.focus();
  });
  draw();
})();
