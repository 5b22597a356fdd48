// One rollout as an element, its tokens coloured.

const drawRollout = (index, filters) => {
  const rollout = data.rollouts[index], article = element("article", "rollout"), header = element("header");
  header.append("question ", element("bdi", "", rollout.question),
    ` · ${rollout.correct ? "correct" : "incorrect"} · reward ${rollout.reward}${rollout.truncated ? " · cut at the length limit" : ""}`);
  const response = element("div", "response");
  for (let depth = 0; depth < rollout.length; depth += 1) {
    const piece = pieceAt(index, depth), token = element("span", "token", shownPiece(piece)), node = nodesOfRollout[index].get(depth);
    if (filters.byInfluence) styleByInfluence(token, index, depth, piece, filters);
    else if (node) styleByAlignment(token, node, piece, filters);
    response.append(token);
  }
  if (rollout.omitted) response.append(element("span", "note", ` … and ${rollout.omitted} more tokens that are not shown`));
  const prompt = element("div", "prompt");
  prompt.append(element("div", "", rollout.prompt));
  article.append(header, prompt, response);
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
    const fill = interpolate(share, fillScale());
    token.classList.add("significant");
    token.style.background = css(fill);
    token.style.color = isLight(fill) ? "#000" : "#fff";
  } else {
    token.classList.add(frameClass);
    token.style.borderColor = css(interpolate(share, FRAME_SCALE));
  }
};

// What is not significant is only tinted, and the text keeps its colour.
const tint = (share) => `rgba(${FRAME_SCALE[share < 0 ? 0 : 2].join(",")},${(0.5 * Math.abs(share)).toFixed(2)})`;

const describeAlignment = (node, teacher) => {
  const status = node.status[teacher];
  return status === "defined" ? `${signed(node.alignment[teacher])}, ${isSignificant(node, teacher) ? "significant" : "not significant"}` : status;
};

const styleByInfluence = (token, rollout, depth, piece, filters) => {
  const { value, significant } = influenceOf(rollout, depth, filters.teacher), node = nodesOfRollout[rollout].get(depth);
  if (Number.isNaN(value)) return;
  token.classList.add("defined");
  let description = `${piece}, token ${depth}, influence ${precise(value)}, ${significant ? "significant" : "not significant"}`;
  if (node) {
    drawAlignmentBar(token, node, filters.teacher);
    description += `, alignment ${describeAlignment(node, filters.teacher)}`;
  }
  makeButton(token, rollout, depth, description, !passes(depth, significant, filters));
  const share = Math.max(-1, Math.min(1, value / influence.scale));
  colour(token, share, significant, "slight");
  if (!significant) token.style.background = tint(share);
};

// The alignment of a measured token as a bar below its influence: thick where it is significant.
const drawAlignmentBar = (token, node, teacher) => {
  const alignment = node.status[teacher] === "defined" ? node.alignment[teacher] : null;
  const side = alignment === null ? "none" : alignment > 0 ? "towards" : "away";
  token.classList.add("node", side);
  if (isSignificant(node, teacher)) token.classList.add("sure");
  token.style.setProperty("--bar", BAR[side]);
};

const styleByAlignment = (token, node, piece, filters) => {
  const status = node.status[filters.teacher], alignment = node.alignment[filters.teacher];
  const significant = isSignificant(node, filters.teacher);
  token.classList.add(status);
  const description = `${piece}, token ${node.depth}, alignment ${describeAlignment(node, filters.teacher)}`;
  makeButton(token, node.rollout, node.depth, description, !passes(node.depth, significant, filters));
  if (status === "defined" && alignment !== null) colour(token, alignment, significant, "insignificant");
};
