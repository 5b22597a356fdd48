// The embedded data: small things are JSON; what every token has is base64 of numbers.

const data = JSON.parse(document.getElementById("data").textContent);
const teacherCount = data.teachers.length;

const bytesOf = (text) => {
  const binary = atob(text), bytes = new Uint8Array(binary.length);
  for (let index = 0; index < binary.length; index += 1) bytes[index] = binary.charCodeAt(index);
  return bytes.buffer;
};

// Half-precision numbers by their 16 bits; browsers cannot read them by themselves everywhere.
const halfPrecision = () => {
  const numbers = new Float32Array(65536);
  for (let bits = 0; bits < 65536; bits += 1) {
    const exponent = (bits >> 10) & 31, fraction = bits & 1023, sign = bits & 32768 ? -1 : 1;
    const size = exponent === 0 ? fraction * 2 ** -24
      : exponent === 31 ? (fraction ? NaN : Infinity) : (1 + fraction / 1024) * 2 ** (exponent - 15);
    numbers[bits] = sign * size;
  }
  return numbers;
};

// ---------------------------------------------------------------- tokens

const starts = [0];  // of each rollout's tokens among all
data.rollouts.forEach((rollout) => starts.push(starts[starts.length - 1] + rollout.length));
const pieceIds = new Uint32Array(bytesOf(data.pieces.ids));
const pieceAt = (rollout, depth) => data.pieces.texts[pieceIds[starts[rollout] + depth]];
const shownPiece = (piece) => (piece === "" ? "∅" : piece);

// ---------------------------------------------------------------- influence of every token

const readInfluence = ({ value, half, scale }) => {
  const numbers = halfPrecision();
  const decoded = (text) => Float32Array.from(new Uint16Array(bytesOf(text)), (bits) => scale * numbers[bits]);
  return { value: decoded(value), half: decoded(half), scale };
};
const influence = data.influence && readInfluence(data.influence);
const influenceOf = (rollout, depth, teacher) => {
  const place = (starts[rollout] + depth) * teacherCount + teacher;
  return { value: influence.value[place], half: influence.half[place], significant: Math.abs(influence.value[place]) > influence.half[place] };
};

// ---------------------------------------------------------------- nodes

const nodesOfRollout = data.rollouts.map(() => new Map());  // by depth
data.nodes.forEach((node) => nodesOfRollout[node.rollout].set(node.depth, node));
const isSignificant = (node, teacher) => node.low[teacher] !== null && (node.low[teacher] > 0 || node.high[teacher] < 0);
