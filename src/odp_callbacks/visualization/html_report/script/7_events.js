// What the reader does.

const onToken = (type, handler) => list.addEventListener(type, (event) => {
  const token = event.target.closest("[data-depth]");
  if (token) handler(token, event);
});
onToken("mouseover", (token) => { if (!pinnedToken) showToken(token); });
onToken("click", (token) => {
  pin(isAt(pinnedToken, token) ? null : placeOf(token));
  showToken(token);
});
onToken("focusin", (token) => {
  list.querySelectorAll('[tabindex="0"]').forEach((other) => { other.tabIndex = -1; });
  token.tabIndex = 0;
  if (!pinnedToken) showToken(token);
});
onToken("keydown", (token, event) => {
  if (event.key === "Enter" || event.key === " ") {
    event.preventDefault();
    token.click();
    return;
  }
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key], next = step && neighbour(token, step);
  if (next) {
    next.focus();
    event.preventDefault();
  }
});
["measure", "teacher", "correct", "from", "to", "significant", "sort"].forEach((id) => {
  const control = byId(id);
  control.addEventListener(control.tagName === "SELECT" ? "change" : "input", drawList);
});
darkScheme.addEventListener("change", drawList);
byId("panel").addEventListener("click", (event) => { if (event.target.closest(".close")) byId("panel").classList.add("idle"); });
drawList();
