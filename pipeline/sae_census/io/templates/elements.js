// Elements and numbers. Whatever comes from a catalog enters the page as text nodes, never as markup.

const SVG = "http://www.w3.org/2000/svg";
function make(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}
const el = (tag, attributes, ...children) => make(document.createElement(tag), attributes, children);
const svg = (tag, attributes, ...children) => make(document.createElementNS(SVG, tag), attributes, children);

const ODD = /[\p{C}\u2028\u2029]|[^\S ]/gu;
const MARKS = { "\n": "↵", "\r": "␍", "\t": "⇥", "\u00a0": "⍽" };
/** A text of the corpus as nodes: what has no shape, or would reorder what stands around it, is spelled out. */
function shown(text) {
  const nodes = [];
  let from = 0;
  for (const match of text.matchAll(ODD)) {
    const character = match[0], code = character.codePointAt(0);
    if (match.index > from) nodes.push(text.slice(from, match.index));
    nodes.push(el("i", { class: "odd" }, MARKS[character] || "U+" + code.toString(16).toUpperCase().padStart(4, "0")));
    if (character === "\n") nodes.push(el("span", { class: "break" }, "\n"));
    from = match.index + character.length;
  }
  nodes.push(text.slice(from));
  return nodes;
}
const isolated = (text, attributes) => el("bdi", { dir: "ltr", ...attributes }, shown(text));

// ---------- numbers ----------

const whole = (n) => n.toLocaleString("en-US");
function short(x) {
  if (x === null || x === undefined) return "–";
  if (x === 0) return "0";
  const size = Math.abs(x);
  if (size >= 1e6 || size < 1e-4) return x.toExponential(2).replace("e+", "e");
  return size >= 1000 ? whole(Math.round(x)) : x.toPrecision(size < 1 ? 3 : 4);
}
const percent = (x) => (x === 0 ? "0 %" : `${x >= 0.001 ? (100 * x).toPrecision(3) : short(100 * x)} %`);
const oneIn = (x) => (x > 0 ? (x > 0.5 ? "most tokens" : `1 in ${whole(Math.round(1 / x))}`) : "never");
