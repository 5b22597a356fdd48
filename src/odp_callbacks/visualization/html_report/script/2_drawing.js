// Elements, colours and numbers as text.

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

// Colours of figures from -1 to +1: of filled tokens, whose middle is near the ground, light or dark; and of frames and
// bars, whose middle must be visible on the card.
const FILL_SCALES = {
  light: [[127, 59, 8], [224, 130, 20], [254, 224, 182], [247, 247, 247], [216, 218, 235], [128, 115, 172], [45, 0, 75]],
  dark: [[255, 196, 120], [224, 130, 20], [122, 72, 24], [62, 62, 70], [84, 74, 122], [143, 126, 200], [214, 200, 255]],
};
const darkScheme = window.matchMedia("(prefers-color-scheme: dark)");
const fillScale = () => FILL_SCALES[darkScheme.matches ? "dark" : "light"];
const FRAME_SCALE = [[196, 106, 22], [140, 140, 140], [128, 100, 190]];
const BAR = { towards: "rgb(128,100,190)", away: "rgb(206,110,16)", none: "rgb(140,140,140)" };

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
