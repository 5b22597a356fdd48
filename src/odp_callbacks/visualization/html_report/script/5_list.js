// The list of rollouts. It is long, so only the blocks in and near its window hold elements; the others keep their height.

const TOKENS_PER_BLOCK = 400, ROLLOUTS_PER_BLOCK = 8, NEAR = 500;  // pixels beyond the window that are drawn as well
const list = byId("rollouts");
let blocks = [], filters = null, pixelsPerUnit = 1;  // of the estimated heights, learned from the blocks that were drawn

const makeBlocks = (indices) => {
  const made = [];
  let tokens = 0;
  indices.forEach((index) => {
    const last = made[made.length - 1], length = data.rollouts[index].length;
    if (last && last.rollouts.length < ROLLOUTS_PER_BLOCK && tokens + length <= TOKENS_PER_BLOCK) last.rollouts.push(index);
    else {
      made.push({ rollouts: [index], element: element("div", "block"), filled: false });
      tokens = 0;
    }
    tokens += length;
  });
  return made;
};

// About how high a block is: a header and a prompt for each rollout, and lines of tokens.
const estimateHeight = (block) => block.rollouts.reduce((height, index) => {
  const lines = Math.ceil((data.rollouts[index].length * 48) / Math.max(200, list.clientWidth - 60));
  return height + 75 + 30 * lines;
}, 0) * pixelsPerUnit;

const fill = (block) => {
  if (block.filled) return;
  block.filled = true;
  block.element.style.height = "";
  block.element.replaceChildren(...block.rollouts.map((index) => drawRollout(index, filters)));
  restoreMarks(block.element);
};

const empty = (block) => {
  if (!block.filled || block.element.contains(document.activeElement)) return;
  block.element.style.height = `${block.element.offsetHeight}px`;
  block.filled = false;
  block.element.replaceChildren();
};

const observer = new IntersectionObserver((entries) => entries.forEach((entry) => {
  const block = blocks[Number(entry.target.dataset.block)];
  if (!block || block.element !== entry.target) return;
  if (entry.isIntersecting) fill(block);
  else empty(block);
}), { root: list, rootMargin: `${NEAR}px 0px` });

const drawList = () => {
  filters = readFilters();
  document.querySelectorAll("[data-measure]").forEach((legend) => {
    legend.hidden = (legend.dataset.measure === "influence") !== filters.byInfluence;
  });
  const summaries = selectRollouts(filters);
  byId("count").textContent = `${summaries.reduce((sum, summary) => sum + summary.count, 0)} `
    + `${filters.byInfluence ? "" : "measured "}tokens in ${summaries.length} rollouts`;
  observer.disconnect();
  forgetMarks();
  blocks = makeBlocks(summaries.map((summary) => summary.index));
  blocks.forEach((block, number) => { block.element.dataset.block = number; });
  list.replaceChildren(...blocks.map((block) => block.element));
  drawFirstBlocks();
  list.scrollTop = 0;
  blocks.forEach((block) => observer.observe(block.element));
  const firstToken = list.querySelector(".token[data-depth]:not(.faded)");
  if (firstToken) firstToken.tabIndex = 0;
  else if (influence || data.nodes.length) {
    byId("panel").classList.add("idle");
    byId("panel").replaceChildren(element("p", "note", "No measured token passes these filters."));
  }
};

// What is seen at once is drawn at once; the observer would draw it one frame later. Heights are read once, because each
// reading makes the browser lay out the page: the first block says how high the others will be.
const drawFirstBlocks = () => {
  if (!blocks.length) return;
  fill(blocks[0]);
  const height = blocks[0].element.offsetHeight;
  if (height > 0) pixelsPerUnit *= height / estimateHeight(blocks[0]);
  let bottom = height;
  blocks.slice(1).forEach((block) => {
    const estimated = estimateHeight(block);
    if (bottom < 0.8 * window.innerHeight) fill(block);
    else block.element.style.height = `${estimated}px`;
    bottom += estimated;
  });
};

// The next token in a direction that is not faded, drawing blocks as far as necessary; null at either end.
const neighbour = (token, step) => {
  const number = Number(token.closest(".block").dataset.block);
  const usable = (block) => [...block.element.querySelectorAll("[data-depth]:not(.faded), [data-depth]:focus")];
  const inBlock = usable(blocks[number]), next = inBlock[inBlock.indexOf(token) + step];
  if (next) return next;
  for (let other = number + step; other >= 0 && other < blocks.length; other += step) {
    fill(blocks[other]);
    const tokens = usable(blocks[other]);
    if (tokens.length) return tokens[step > 0 ? 0 : tokens.length - 1];
  }
  return null;
};
